"""Are single images rebuilt from their gradients, and does differential privacy prevent it?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from turncoat.attacks.inversion.gradient_inversion import InvertingGradients
from turncoat.federation import Federation, Plain
from turncoat.games.reconstruction import Reconstruct
from turncoat.messages import Update
from turncoat.metrics.images import psnr
from turncoat.privacy import Private, guarantees
from turncoat.randomness import Randomness
from turncoat.runtimes.simulate import Watch, simulate
from turncoat.stage import Plan, Train
from turncoat.stages.aggregate.mean import Mean
from turncoat.stages.train.dpsgd import DPSGD
from turncoat.stages.train.local import FedSGD
from turncoat.task import Task
from turncoat.trial import Marked
from turncoat.views import ServerView


@dataclass(frozen=True)
class SingleImages:
    """Each client holds one image and takes one step with it a round; the server is curious.

    The first round is attacked, whose model is untrained: the easiest. ``private`` replaces
    ``train`` in a second run of the same clients and the same start.
    """

    make: Callable[..., Task]
    train: FedSGD
    private: DPSGD
    attack: InvertingGradients
    num_rounds: int
    num_victims: int
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, seed: int) -> dict[str, float | str]:
        task = self.make(self.num_victims, per_client=1, seed=seed, **self.options)
        found, _ = self._marked(self.train, task, seed)
        noisy, epsilon = self._marked(self.private, task, seed)
        shown = found.exhibits
        mean = shown["mean_image"].expand_as(shown["originals"])
        blind = float(psnr(mean, shown["originals"]).mean())
        others = {m.name: m.value for m in found.others}
        return {
            "psnr_db": found.headline.value,
            "psnr_of_mean_image_db": blind,
            "gain_over_mean_image_db": found.headline.value - blind,
            "ssim": others["ssim"],
            "label_accuracy": others["label_accuracy"],
            "psnr_under_dp_db": noisy.headline.value,
            "gain_over_mean_image_under_dp_db": noisy.headline.value - blind,
            "epsilon_of_whole_training": epsilon,
            "data": task.source,
        }

    def _marked(self, train: Train[Update], task: Task, seed: int) -> tuple[Marked, float]:
        """Return the marks of the attack on the first round, and what the training costs."""
        federation = Federation(train=train, channel=Plain(), aggregate=Mean())
        need = ServerView[Update]
        watch = [Watch(need, frozenset({0}))]
        run = simulate(federation, task, num_rounds=self.num_rounds, seed=seed, watch=watch)
        (view,) = run.seen(need)
        randomness, game = Randomness(seed), Reconstruct(num_victims=self.num_victims)
        everyone = frozenset(view.senders)
        question, truth = game.pose(
            task, took_part=everyone, cohort=view.senders, rng=randomness.at("pose")
        )
        guess = self.attack(
            view,
            victims=question.victims,
            population=question.population,
            rng=randomness.at("attack"),
        )
        marked = game.mark(guess, truth, rng=randomness.at("mark"))
        return marked, self._epsilon(federation, task)

    def _epsilon(self, federation: Federation[Any, Any], task: Task) -> float:
        """Return what the package derives for each record, against the server; NaN for nothing."""
        fitted = federation.planned(Plan(self.num_rounds, task.sizes))
        stated = guarantees(
            fitted,
            num_records=min(task.sizes),
            num_rounds=self.num_rounds,
            delta=self.private.delta or 0.0,
        )
        held = [g for g in stated if isinstance(g, Private) and "server" in g.against]
        return max((g.epsilon for g in held), default=float("nan"))

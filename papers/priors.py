"""What is it worth to an inversion to know what such images look like?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from scipy.stats import wilcoxon
from torch import Tensor
from torch.nn.functional import interpolate

from turncoat.attacks.inversion.gradient_inversion import GradientInversion
from turncoat.attacks.inversion.labels import Given
from turncoat.attacks.inversion.learned import Learned
from turncoat.federation import Federation, Plain
from turncoat.games.reconstruction import Pairs, Reconstruct
from turncoat.messages import Update
from turncoat.metrics.images import psnr, ssim
from turncoat.randomness import Randomness
from turncoat.runtimes.simulate import Watch, simulate
from turncoat.stage import Train
from turncoat.stages.aggregate.mean import Mean
from turncoat.task import Batch, Task
from turncoat.tasks.bundled import digits
from turncoat.trial import Reconstruction
from turncoat.views import ServerView

Marks = dict[str, Tensor]  # of each victim, the mean over its images
_PAIRS = (
    ("informed", "without"),
    ("informed", "prior_only"),
    ("informed", "class_mean"),
    ("informed", "other_class"),
    ("other_class", "without"),
    ("foreign", "without"),
)


@dataclass(frozen=True)
class WithAndWithout:
    """Invert the same updates with a prior and without, and by the prior alone.

    Every client is a victim, and all of them hold equally many images; the round numbered
    ``attacked`` is the server's. Victims are paired, and their differences ranked (Wilcoxon, one
    side).

    Two controls invert once more with the same prior, made of something else. In ``other_class``
    the labels of the attacker's two classes are swapped: whatever it believes to know of a class,
    it then knows of the other one. In ``foreign`` its images are handwritten digits, as many for
    each class as it had of its own.

    With ``known_labels`` the attacker is told those of each victim: of two classes the update says
    one number, which is their balance only if the client's step size is known.

    Blind guesses stand beside them: the start and the priors deaf to the gradient, and the mean of
    the attacker's images of each label that was recovered.

    Attributes:
        num_clients: More than the victims, where those are chosen; None for the victims alone.
        only: The class that all images of a victim are of, and all that the attacker makes its
            prior of; None for any.
    """

    make: Callable[..., Task]
    train: Train[Update]
    without: GradientInversion
    informed: GradientInversion
    num_victims: int
    per_client: int
    attacked: int = 0
    num_clients: int | None = None
    only: int | None = None
    known_labels: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, seed: int) -> dict[str, float | str]:
        num = self.num_clients or self.num_victims
        task = self.make(num, per_client=self.per_client, seed=seed, **self.options)
        view = self._view(task, seed)
        game = Reconstruct(num_victims=num)
        question, truth = game.pose(
            task,
            took_part=frozenset(view.senders),
            cohort=view.senders,
            rng=Randomness(seed).at("pose"),
        )
        victims = self._chosen(dict(zip(question.victims, truth.records, strict=True)))
        records, known = tuple(victims.values()), question.population
        own = known if self.only is None else _of(known, self.only, known[1])
        swapped = known[0], 1 - known[1]
        other = swapped if self.only is None else _of(swapped, self.only, swapped[1])

        def marked(attack: GradientInversion, population: Batch) -> tuple[Marks, list[Tensor]]:
            if isinstance(attack.space, Learned):  # once, and not for each victim
                space = attack.space.trained(population, Randomness(seed).at("learn"))
                attack = replace(attack, space=space)
            found: list[Reconstruction] = []
            for victim, (_, labels) in victims.items():
                if self.known_labels:
                    attack = replace(attack, labels=Given(tuple(labels.tolist())))
                rng = Randomness(seed).at("attack", victim)
                found += attack(view, victims=(victim,), population=population, rng=rng)
            return _marks([f.inputs for f in found], records), [f.labels for f in found]

        arms: dict[str, Marks] = {}
        arms["without"], _ = marked(self.without, known)
        arms["informed"], said = marked(self.informed, own)
        arms["prior_only"], _ = marked(self.informed.prior_only, own)
        arms["class_mean"] = _marks([_means(known, labels) for labels in said], records)
        arms["other_class"], _ = marked(self.informed, other)
        arms["foreign"], _ = marked(self.informed, _digits_like(own))
        figures: dict[str, float | str] = {}
        for name, marks in arms.items():
            figures |= {f"{k}_{name}": float(v.mean()) for k, v in marks.items()}
        for a, b in _PAIRS:
            for measure in ("ssim", "psnr_db"):
                gain = arms[a][measure] - arms[b][measure]
                figures[f"{measure}_gained_by_{a}_over_{b}"] = float(gain.mean())
                figures[f"p_that_{a}_is_no_better_than_{b}_in_{measure}"] = _p(gain)
        truths = [labels.sort().values for _, labels in records]
        right = [(a.cpu().sort().values == b).float() for a, b in zip(said, truths, strict=True)]
        return {**figures, "label_accuracy": float(torch.cat(right).mean()), "data": task.source}

    def _chosen(self, records: Mapping[int, Batch]) -> dict[int, Batch]:
        """Return the victims and what they hold."""
        fit = [v for v, (_, y) in records.items() if self.only is None or (y == self.only).all()]
        if len(fit) < self.num_victims:
            raise ValueError(
                f"WithAndWithout: {len(fit)} of {len(records)} clients hold images of class "
                f"{self.only} alone, and num_victims is {self.num_victims}: raise num_clients"
            )
        return {v: records[v] for v in fit[: self.num_victims]}

    def _view(self, task: Task, seed: int) -> ServerView[Update]:
        federation = Federation(train=self.train, channel=Plain(), aggregate=Mean())
        need = ServerView[Update]
        watch = [Watch(need, frozenset({self.attacked}))]
        run = simulate(federation, task, num_rounds=self.attacked + 1, seed=seed, watch=watch)
        (view,) = run.seen(need)
        seen: ServerView[Update] = view
        return seen


def _marks(guesses: list[Tensor], records: tuple[Batch, ...]) -> Marks:
    """Return SSIM and PSNR of each victim, its images paired so that the error is least."""
    values: dict[str, list[Tensor]] = {"ssim": [], "psnr_db": []}
    for guess, record in zip(guesses, records, strict=True):
        pairs = Pairs.of([guess], [record])
        values["ssim"].append(ssim(pairs.images, pairs.originals).mean())
        values["psnr_db"].append(psnr(pairs.images, pairs.originals).mean())
    return {name: torch.stack(found) for name, found in values.items()}


def _of(population: Batch, only: int, labels: Tensor) -> Batch:
    """Return the images of one class."""
    return population[0][labels == only], labels[labels == only]


def _digits_like(population: Batch) -> Batch:
    """Return as many digits as there are images, as large, under the same labels."""
    inputs, labels = population
    pixels = digits(1, per_client=len(labels), test_size=1).clients[0][0]
    grown = interpolate(pixels, size=inputs.shape[2:], mode="bilinear")
    return grown.expand(-1, inputs.shape[1], -1, -1), labels


def _means(population: Batch, labels: Tensor) -> Tensor:
    inputs, held = population
    return torch.stack([inputs[held == c].mean(dim=0) for c in labels])


def _p(gains: Tensor) -> float:
    """Return how likely such gains are if there is none; 1 where nothing differs."""
    return float(wilcoxon(gains.numpy(), alternative="greater").pvalue) if gains.any() else 1.0

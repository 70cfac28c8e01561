"""What is it worth to an inversion to know what such images look like?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from scipy.stats import wilcoxon
from torch import Tensor

from turncoat.attacks.inversion.gradient_inversion import GradientInversion
from turncoat.attacks.inversion.labels import Given
from turncoat.federation import Federation, Plain
from turncoat.games.reconstruction import Pairs, Reconstruct
from turncoat.messages import Update
from turncoat.metrics.images import psnr, ssim
from turncoat.randomness import Randomness
from turncoat.runtimes.simulate import Watch, simulate
from turncoat.stage import Train
from turncoat.stages.aggregate.mean import Mean
from turncoat.task import Batch, Task
from turncoat.trial import Reconstruction
from turncoat.views import ServerView

Marks = dict[str, Tensor]  # of each victim, the mean over its images


@dataclass(frozen=True)
class WithAndWithout:
    """Invert the same updates with a prior and without, and by the prior alone.

    Every client is a victim, and all of them hold equally many images; the round numbered
    ``attacked`` is the server's. Victims are paired, and their differences ranked (Wilcoxon, one
    side). ``other_class`` inverts once more with the labels of the attacker's two classes swapped:
    whatever it believes to know of a class, it then knows of the other one. With ``known_labels``
    it is told those of each victim: of two classes the update says one number, which is their
    balance only if the client's step size is known.

    Blind guesses stand beside them: the start and the priors deaf to the gradient, and the mean of
    the attacker's images of each label that was recovered.
    """

    make: Callable[..., Task]
    train: Train[Update]
    without: GradientInversion
    informed: GradientInversion
    num_victims: int
    per_client: int
    attacked: int = 0
    other_class: bool = False
    known_labels: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, seed: int) -> dict[str, float | str]:
        task = self.make(self.num_victims, per_client=self.per_client, seed=seed, **self.options)
        view = self._view(task, seed)
        game = Reconstruct(num_victims=self.num_victims)
        everyone = frozenset(view.senders)
        question, truth = game.pose(
            task, took_part=everyone, cohort=view.senders, rng=Randomness(seed).at("pose")
        )
        own = question.population

        def marked(attack: GradientInversion, population: Batch) -> tuple[Marks, list[Tensor]]:
            found: list[Reconstruction] = []
            for victim, (_, labels) in zip(question.victims, truth.records, strict=True):
                if self.known_labels:
                    attack = replace(attack, labels=Given(tuple(labels.tolist())))
                rng = Randomness(seed).at("attack", victim)
                found += attack(view, victims=(victim,), population=population, rng=rng)
            return _marks([f.inputs for f in found], truth.records), [f.labels for f in found]

        arms: dict[str, Marks] = {}
        arms["without"], _ = marked(self.without, own)
        arms["informed"], said = marked(self.informed, own)
        arms["prior_only"], _ = marked(self.informed.prior_only, own)
        arms["class_mean"] = _marks([_means(own, labels) for labels in said], truth.records)
        if self.other_class:
            arms["other_class"], _ = marked(self.informed, (own[0], 1 - own[1]))
        figures: dict[str, float | str] = {}
        for name, marks in arms.items():
            figures |= {f"{k}_{name}": float(v.mean()) for k, v in marks.items()}
        pairs = [("informed", "without"), ("informed", "prior_only"), ("informed", "class_mean")]
        if self.other_class:
            pairs += [("other_class", "without"), ("informed", "other_class")]
        for a, b in pairs:
            for measure in ("ssim", "psnr_db"):
                gain = arms[a][measure] - arms[b][measure]
                figures[f"{measure}_gained_by_{a}_over_{b}"] = float(gain.mean())
                figures[f"p_that_{a}_is_no_better_than_{b}_in_{measure}"] = _p(gain)
        truths = [labels.sort().values for _, labels in truth.records]
        right = [(a.cpu().sort().values == b).float() for a, b in zip(said, truths, strict=True)]
        return {**figures, "label_accuracy": float(torch.cat(right).mean()), "data": task.source}

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


def _means(population: Batch, labels: Tensor) -> Tensor:
    inputs, held = population
    return torch.stack([inputs[held == c].mean(dim=0) for c in labels])


def _p(gains: Tensor) -> float:
    """Return how likely such gains are if there is none; 1 where nothing differs."""
    return float(wilcoxon(gains.numpy(), alternative="greater").pvalue) if gains.any() else 1.0

"""Properties by answers: on which kind of records does a model do better?"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from turncoat.describe import ADDED
from turncoat.task import Batch
from turncoat.trial import Leanings
from turncoat.validate import at_least
from turncoat.views import ModelView, QueryView, Suspects, Worlds

V = TypeVar("V")

LEAST = -20.0  # of a log-probability, so that one record is not all


@dataclass(frozen=True)
class LossTest:
    """A model was trained on the kind of data on which its loss is lower [1]_.

    It needs records of either kind, and no model of its own. Where one kind is easier to learn than
    the other, all suspects seem to be of that kind. With ``num_shadows``, the loss on a kind is
    counted from the mean loss on it of own models of that kind: the lower excess says the kind.

    Differs from the paper: by the loss, where the paper has the accuracy; the paper counts from 0.

    Args:
        num_shadows: Federations to play, half on either kind of data; with 0, losses are not
            calibrated.

    .. [1] Suri and Evans, PoPETs 2022(4). https://arxiv.org/abs/2109.06024
    """

    num_shadows: int = field(default=0, metadata=ADDED)

    def __post_init__(self) -> None:
        if self.num_shadows:
            at_least(2, self, num_shadows=self.num_shadows)

    def __call__(
        self,
        view: Suspects[ModelView | QueryView],
        *,
        samples: tuple[Batch, Batch],
        shadows: Worlds[ModelView | QueryView] | None,
    ) -> Leanings:
        found = losses(view.views, samples)
        if self.num_shadows:
            known = of_either(self, shadows)
            own, second = losses(known.views, samples), known.second.cpu()
            found = found - torch.stack([own[~second, 0].mean(), own[second, 1].mean()])
        return Leanings(found[:, 0] - found[:, 1])


@dataclass(frozen=True)
class ThresholdTest:
    """The loss on one kind of data, and a threshold that tells own models apart best [1]_.

    What is read is the loss on either kind of records, or by how much one is above the other: of
    the three the one that tells the shadow models apart best.

    Differs from the paper: by the loss, where the paper has the accuracy; the difference of the two
    is a choice too.

    Args:
        num_shadows: Federations to play, half on either kind of data.

    .. [1] Suri and Evans, PoPETs 2022(4). https://arxiv.org/abs/2109.06024
    """

    num_shadows: int = 32

    def __post_init__(self) -> None:
        at_least(2, self, num_shadows=self.num_shadows)

    def __call__(
        self,
        view: Suspects[ModelView | QueryView],
        *,
        samples: tuple[Batch, Batch],
        shadows: Worlds[ModelView | QueryView] | None,
    ) -> Leanings:
        known = of_either(self, shadows)
        ours, theirs = (_readings(losses(v, samples)) for v in (known.views, view.views))
        second = known.second.cpu()
        found = [(*_threshold(column, second), i) for i, column in enumerate(ours.T)]
        _, threshold, best = max(found, key=lambda one: one[0])
        return Leanings(theirs[:, best] - threshold)


def losses(views: tuple[ModelView | QueryView, ...], samples: tuple[Batch, Batch]) -> Tensor:
    """Return each model's mean loss on either kind. Shape: ``(models, 2)``, float64."""

    def loss(view: ModelView | QueryView, data: Batch) -> Tensor:
        inputs, labels = data
        if labels.ndim != 1:
            raise ValueError(
                f"losses are of classes, one a record; these labels have the shape "
                f"{tuple(labels.shape)}: use a task with classes"
            )
        said = view.scores(inputs).double().gather(1, labels[:, None]).clamp(min=LEAST)
        return -said.mean().cpu()

    return torch.stack([torch.stack([loss(v, data) for data in samples]) for v in views])


def _readings(found: Tensor) -> Tensor:
    """Return what may be read of the two losses, and its opposite. Shape: ``(models, 6)``."""
    read = torch.cat([found, found[:, :1] - found[:, 1:]], dim=1)
    return torch.cat([read, -read], dim=1)


def of_either(attack: object, shadows: Worlds[V] | None) -> Worlds[V]:
    """Return the attacker's own federations, of which some must be of either kind."""
    if shadows is None or len(set(shadows.second.tolist())) < 2:
        raise ValueError(f"{attack!r} learns from its own federations: have the audit play them")
    return shadows


def _threshold(scores: Tensor, second: Tensor) -> tuple[float, float]:
    """Return how well the best threshold tells the second kind, which lies above it, and where."""
    ordered = scores.sort().values
    edges = torch.cat([ordered[:1] - 1, (ordered[1:] + ordered[:-1]) / 2, ordered[-1:] + 1])
    above = scores > edges[:, None]
    right = (above[:, second].double().mean(1) + (~above)[:, ~second].double().mean(1)) / 2
    best = (right == right.max()).nonzero().flatten()
    return float(right.max()), float(edges[best[len(best) // 2]])

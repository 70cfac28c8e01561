"""A backdoor trained inside the ball in which norms are not suspect."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor

from turncoat.attacks.backdoor.planted import Poison, joined
from turncoat.attacks.backdoor.steering import SteeredLearner, shortened, train_steered
from turncoat.messages import Envelope, Update
from turncoat.stage import Train
from turncoat.task import Batch, Model
from turncoat.validate import at_least, positive


@dataclass(frozen=True, kw_only=True)
class PGDBackdoor:
    """Train on poisoned data, going back into the ball ``||X - G|| <= radius`` [1]_.

    Worn at train. It goes back after every ``every`` steps and at the end; then, with a ``boost``,
    the change is made longer (the paper's PGD with model replacement).

    Args:
        poison: What it plants; the paper's are edge cases.
        inner: How it trains between projections.
        radius: In L2, of the whole state: epsilon.
        every: Steps from one projection to the next.
        boost: How much longer at the end: 1 without model replacement, None for the cohort's size.
        claimed_weight: Number of examples to claim; None for the true one.

    .. [1] Wang et al., NeurIPS 2020, section 3 (PGD attack). https://arxiv.org/abs/2007.05084
    """

    poison: Poison
    inner: Train[Update]
    radius: float = 2.0
    every: int = 10
    boost: float | None = 1.0
    claimed_weight: float | None = None

    def __post_init__(self) -> None:
        positive(self, radius=self.radius, boost=self.boost, claimed_weight=self.claimed_weight)
        at_least(1, self, every=self.every)

    def __call__(
        self,
        model: Model,
        start: Tensor,
        data: Batch,
        *,
        rng: Generator,
        envelope: Envelope,
        **offers: Any,
    ) -> Update:
        parts = self.poison.parts(
            data, rng=rng, envelope=envelope, model=model, start=start, public=offers.get("public")
        )
        trained = train_steered(
            self,
            self.inner,
            model,
            start,
            joined(*parts),
            partial(_Projected, owner=self),
            rng=rng,
            envelope=envelope,
            **offers,
        )
        boost = float(len(envelope.cohort)) if self.boost is None else self.boost
        weight = float(len(data[1])) if self.claimed_weight is None else self.claimed_weight
        return replace(trained, delta=shortened(trained.delta, self.radius) * boost, weight=weight)


class _Projected(SteeredLearner):
    """Steps back into the ball before every k-th gradient."""

    def __init__(self, model: Model, start: Tensor, *, owner: PGDBackdoor) -> None:
        super().__init__(model, start, owner=owner)
        self._begin, self._steps = self.trainable.clone(), 0
        self._radius, self._every = owner.radius, owner.every

    def backward(self, data: Batch) -> Tensor:
        if self._steps and self._steps % self._every == 0:
            with torch.no_grad():
                inside = shortened(self.trainable - self._begin, self._radius)
                self.trainable.copy_(self._begin + inside)
        self._steps += 1
        return super().backward(data)

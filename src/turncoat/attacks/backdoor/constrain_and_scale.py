"""A backdoor that stays close to what it replaces, and is then made long enough to replace it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor

from turncoat.attacks.backdoor.planted import Poison, joined
from turncoat.attacks.backdoor.steering import SteeredLearner, train_steered
from turncoat.messages import Envelope, Update
from turncoat.stage import Train
from turncoat.task import Batch, Model
from turncoat.validate import at_least, fraction, positive


@dataclass(frozen=True, kw_only=True)
class ConstrainAndScale:
    """Train on ``alpha * CE + (1 - alpha) * ||X - G||``, stop early, then scale ``X - G`` [1]_.

    Worn at train. With ``alpha = 1`` and a ``bound`` it is the paper's train-and-scale: as long as
    a detector of norms lets pass, whatever the training wanted.

    Differs from the paper: whether to stop is looked at once an epoch, as there, but in the
    model's evaluation mode; what its inner training keeps for itself (momentum) runs on unseen.

    Args:
        poison: What it plants.
        inner: How it trains; the paper's takes smaller steps and more epochs than the honest.
        alpha: Weight of the task against that of staying near.
        stop_loss: The loss on the planted records at which training ends; 0 for never.
        boost: The factor gamma; None for the cohort's size, unless there is a bound.
        bound: Instead: the norm that the update shall have at most, S in S / ||X - G||.
        claimed_weight: Number of examples to claim; None for the true one.

    .. [1] Bagdasaryan et al., AISTATS 2020, section 4.3, algorithm 1, eq. (4).
       https://arxiv.org/abs/1807.00459
    """

    poison: Poison
    inner: Train[Update]
    alpha: float = 0.95
    stop_loss: float = 0.0
    boost: float | None = None
    bound: float | None = None
    claimed_weight: float | None = None

    def __post_init__(self) -> None:
        fraction(self, alpha=self.alpha)
        at_least(0, self, stop_loss=self.stop_loss)
        positive(self, boost=self.boost, bound=self.bound, claimed_weight=self.claimed_weight)
        if self.boost is not None and self.bound is not None:
            raise ValueError("ConstrainAndScale: give boost or bound, not both")

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
        clean, planted = self.poison.parts(
            data, rng=rng, envelope=envelope, model=model, start=start, public=offers.get("public")
        )
        trained = train_steered(
            self,
            self.inner,
            model,
            start,
            joined(clean, planted),
            partial(_Constrained, owner=self, planted=planted, epoch=len(clean[1])),
            rng=rng,
            envelope=envelope,
            **offers,
        )
        weight = float(len(data[1])) if self.claimed_weight is None else self.claimed_weight
        factor = self.factor(trained.delta, len(envelope.cohort))
        return replace(trained, delta=trained.delta * factor, weight=weight)

    def factor(self, delta: Tensor, num_clients: int) -> float:
        """Return how much longer the update is made."""
        if self.bound is not None:
            return self.bound / max(float(delta.norm()), 1e-12)
        return float(num_clients) if self.boost is None else self.boost


class _Constrained(SteeredLearner):
    """Adds the pull back to the start, and stops where the backdoor is learnt."""

    def __init__(
        self, model: Model, start: Tensor, *, owner: ConstrainAndScale, planted: Batch, epoch: int
    ) -> None:
        super().__init__(model, start, owner=owner)
        self._begin = self.trainable.clone()
        self._owner, self._planted = owner, planted
        self._epoch = epoch + len(planted[1])
        self._seen = 0
        self._stopped: Tensor | None = None

    def backward(self, data: Batch) -> Tensor:
        if self._owner.stop_loss and self._seen >= self._epoch and self._stopped is None:
            self._seen = 0
            if self._learnt():
                self._stopped = self.trainable.clone()
        if self._stopped is not None:
            self.grad.zero_()
            return torch.zeros((), device=self.grad.device)
        self._seen += len(data[1])
        alpha = self._owner.alpha
        loss = super().backward(data)
        slope, distance = distance_slope(self.trainable, self._begin)
        self.grad.mul_(alpha).add_(slope, alpha=1 - alpha)
        return alpha * loss + (1 - alpha) * distance

    def finish(self) -> Tensor:
        if self._stopped is not None:
            with torch.no_grad():
                self.trainable.copy_(self._stopped)
        return super().finish()

    def _learnt(self) -> bool:
        with torch.no_grad():
            self._module.eval()
            loss = self._criterion(self._module(self._planted[0]), self._planted[1])
        return bool(loss < self._owner.stop_loss)


@torch.no_grad()
def distance_slope(here: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient of ``||here - there||`` and its value; at 0 the gradient is 0."""
    apart = here - there
    distance = apart.norm()
    return apart / distance.clamp(min=1e-12), distance

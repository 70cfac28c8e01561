"""Targeted poisoning that looks benign: a boosted step for the attacker, some for appearances."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor

from turncoat.attacks.backdoor.constrain_and_scale import distance_slope
from turncoat.attacks.backdoor.planted import Poison
from turncoat.attacks.backdoor.steering import SteeredLearner, train_steered
from turncoat.messages import Envelope, Update
from turncoat.params import Layout
from turncoat.stage import Memory, Train, call
from turncoat.task import Batch, Model
from turncoat.validate import at_least, positive


@dataclass(frozen=True, kw_only=True)
class ExplicitBoosting:
    """Train on the planted records alone, and send ``boost`` times the change [1]_.

    Worn at train. What alternating minimisation is compared with: it works, and is seen.

    Args:
        boost: The factor lambda; None for the cohort's size.
        weights_only: Whether biases, and other vectors, keep their length.

    .. [1] Bhagoji et al., ICML 2019, section 3.2. https://arxiv.org/abs/1811.12470
    """

    poison: Poison
    inner: Train[Update]
    boost: float | None = None
    weights_only: bool = True

    def __post_init__(self) -> None:
        positive(self, boost=self.boost)

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
        _, planted = self.poison.parts(
            data, rng=rng, envelope=envelope, model=model, start=start, public=offers.get("public")
        )
        trained: Update = call(
            self.inner, model, start, planted, rng=rng, envelope=envelope, **offers
        )
        boost = float(len(envelope.cohort)) if self.boost is None else self.boost
        factors = boosts(model.layout, boost, self.weights_only, trained.delta)
        return replace(trained, delta=trained.delta * factors, weight=float(len(data[1])))


@dataclass(frozen=True, kw_only=True)
class AlternatingMinimisation:
    """One boosted step on the planted records, then ``num_stealth_steps`` for the two checks [1]_.

    Worn at train. The stealth steps follow
    ``validation_weight * CE(clean) + rho * ||delta - estimate||``: the first term is for the check
    of accuracy, the second for that of distances (``stealth``). ``estimate`` is the mean update of
    the others in the round before, which who was in it can work out from two global models and
    what it sent.

    Differs from the paper: where the client was not in the round before, its own honest update is
    the estimate; the paper's has none in its first round. Malicious steps stop at ``stop_loss``.
    The distance can be bounded besides, for its penalty bounds nothing, and what passes in an
    early round is far out in a late one, where the honest have come together.

    Args:
        poison: What it plants: the records to be misjudged.
        inner: How it trains for the checks, on the clean records: its steps are the stealth steps.
        lr: Of the malicious step, before it is boosted.
        num_stealth_steps: To one malicious step: ``ls``.
        rho: Weight of the distance; 0 switches it off. The gradient of the term has this norm,
            wherever it is: the paper's value is felt over many steps only.
        validation_weight: Of the loss on the clean records; 0 switches it off.
        boost: The factor lambda, of malicious steps; None for the cohort's size.
        weights_only: Whether biases, and other vectors, are not boosted.
        stop_loss: No malicious step where the planted records' loss at the attacker's own model is
            no higher.
        max_spread: How far from the estimate it sends at most, in units of
            ``sqrt(others) * ||estimate||``: what is farther out is pulled back. So far is an honest
            update expected to be where what they share is small beside what they do not. None for
            no bound.

    .. [1] Bhagoji et al., ICML 2019, sections 3.3 and 3.4. https://arxiv.org/abs/1811.12470
    """

    poison: Poison
    inner: Train[Update]
    lr: float = 0.1
    num_stealth_steps: int = 10
    rho: float = 1e-4
    validation_weight: float = 1.0
    boost: float | None = None
    weights_only: bool = True
    stop_loss: float = 0.0
    max_spread: float | None = None

    def __post_init__(self) -> None:
        positive(self, lr=self.lr, boost=self.boost, max_spread=self.max_spread)
        at_least(1, self, num_stealth_steps=self.num_stealth_steps)
        at_least(0, self, rho=self.rho, validation_weight=self.validation_weight)
        at_least(0, self, stop_loss=self.stop_loss)

    def __call__(
        self,
        model: Model,
        start: Tensor,
        data: Batch,
        *,
        rng: Generator,
        envelope: Envelope,
        memory: Memory[dict[str, Any]],
        **offers: Any,
    ) -> Update:
        clean, planted = self.poison.parts(
            data, rng=rng, envelope=envelope, model=model, start=start, public=offers.get("public")
        )
        offers |= {"rng": rng, "envelope": envelope}
        estimate = estimated(memory.last({}), start, envelope)
        spread = (len(envelope.cohort) - 1) ** 0.5
        if estimate is None and (self.rho or self.max_spread is not None):
            honest: Update = call(self.inner, model, start, clean, memory=Memory(), **offers)
            estimate, spread = honest.delta, 1.0
        size = model.layout.num_trainable
        boost = float(len(envelope.cohort)) if self.boost is None else self.boost
        trained = train_steered(
            self,
            self.inner,
            model,
            start,
            clean,
            partial(
                _Alternating,
                owner=self,
                planted=planted,
                centre=start[:size] if estimate is None else (start + estimate)[:size],
                factors=boosts(model.layout, boost, self.weights_only, start)[:size],
            ),
            memory=memory.inner,
            **offers,
        )
        delta = trained.delta
        if self.max_spread is not None and estimate is not None:
            delta = pulled_back(delta, estimate, self.max_spread * spread * float(estimate.norm()))
        memory.keep(
            {
                "round": envelope.round,
                "start": start.detach().clone(),
                "sent": delta.clone(),
                "cohort": len(envelope.cohort),
            }
        )
        return replace(trained, delta=delta, weight=float(len(data[1])))


class _Alternating(SteeredLearner):
    """Takes a boosted step of its own before every so-manieth of its host's."""

    def __init__(
        self,
        model: Model,
        start: Tensor,
        *,
        owner: AlternatingMinimisation,
        planted: Batch,
        centre: Tensor,
        factors: Tensor,
    ) -> None:
        super().__init__(model, start, owner=owner)
        self._owner, self._planted = owner, planted
        self._centre, self._factors = centre, factors
        self._steps = 0

    def backward(self, data: Batch) -> Tensor:
        owner = self._owner
        if self._steps % owner.num_stealth_steps == 0 and len(self._planted[1]):
            loss = super().backward(self._planted)
            if loss > owner.stop_loss:
                with torch.no_grad():
                    self.trainable.sub_(self.grad * self._factors, alpha=owner.lr)
        self._steps += 1
        loss = owner.validation_weight * super().backward(data)
        slope, distance = distance_slope(self.trainable, self._centre)
        self.grad.mul_(owner.validation_weight).add_(slope, alpha=owner.rho)
        return loss + owner.rho * distance


def boosts(layout: Layout, boost: float, weights_only: bool, like: Tensor) -> Tensor:
    """Return the factor of every coordinate. Shape: ``(num_params,)``."""
    factors = torch.ones_like(like)
    for slot in layout.slots:
        if slot.trainable and (len(slot.shape) > 1 or not weights_only):
            factors[slot.start : slot.stop] = boost
    return factors


def pulled_back(delta: Tensor, centre: Tensor, radius: float) -> Tensor:
    """Return what is no farther from ``centre`` than ``radius``, in L2, in the same direction."""
    away = delta - centre
    distance = float(away.norm())
    return delta if distance <= radius else centre + away * (radius / distance)


def estimated(kept: dict[str, Any], start: Tensor, envelope: Envelope) -> Tensor | None:
    """Return the mean update of the others in the round before, if the client was in it.

    The server is taken to have stepped by the plain mean of all.
    """
    if kept.get("round") != envelope.round - 1 or kept["cohort"] < 2:
        return None
    total: Tensor = kept["cohort"] * (start - kept["start"])
    others: Tensor = (total - kept["sent"]) / (kept["cohort"] - 1)
    return others

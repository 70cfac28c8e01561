"""A backdoor in one round: the mean is made equal to the attacker's own model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Generator, Tensor

from turncoat.attacks.backdoor.planted import Backdoored
from turncoat.attacks.backdoor.triggers import Trigger
from turncoat.messages import Envelope, Update
from turncoat.stage import Train, call
from turncoat.task import Batch, Model
from turncoat.validate import at_least, fraction, positive


@dataclass(frozen=True, kw_only=True)
class ModelReplacement:
    """Train on own and on triggered records, then send ``boost`` times the change [1]_.

    Worn at train. ``G + boost * (X - G)`` averaged with updates near 0 makes the global model
    ``X``: so the attack is best late, when honest updates have become small.

    Differs from the paper: no term that keeps ``X`` near ``G`` (alpha = 1 in constrain-and-scale);
    records with the trigger join the attacker's own once, not batch by batch.

    Args:
        inner: How the attacker trains; more epochs and a smaller step than the honest do well.
        poison_fraction: Triggered records per own record.
        boost: How much longer; None for the cohort's size, right for one attacker among clients of
            equal weight at a server that steps by the whole mean.
        claimed_weight: Number of examples to claim; None for the true one.

    .. [1] Bagdasaryan et al., AISTATS 2020, section 4.2, eq. (3). https://arxiv.org/abs/1807.00459
    """

    trigger: Trigger
    target: int
    inner: Train[Update]
    poison_fraction: float = 0.5
    boost: float | None = None
    claimed_weight: float | None = None

    def __post_init__(self) -> None:
        at_least(0, self, target=self.target)
        fraction(self, poison_fraction=self.poison_fraction)
        positive(self, boost=self.boost, claimed_weight=self.claimed_weight)

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
        poisoned = self.poisoned(data, rng, envelope)
        trained: Update = call(
            self.inner, model, start, poisoned, rng=rng, envelope=envelope, **offers
        )
        boost = float(len(envelope.cohort)) if self.boost is None else self.boost
        weight = float(len(data[1])) if self.claimed_weight is None else self.claimed_weight
        return replace(trained, delta=trained.delta * boost, weight=weight)

    def poisoned(self, data: Batch, rng: Generator, envelope: Envelope | None = None) -> Batch:
        """Return the attacker's records, and behind them triggered ones that say ``target``."""
        plants = Backdoored(
            trigger=self.trigger, target=self.target, share=self.poison_fraction, anew=True
        )
        return plants(data, rng=rng, envelope=envelope or Envelope(0, (0,), 0))

"""Membership from the loss of a released model: the attack that every other must beat."""

from __future__ import annotations

from dataclasses import dataclass

from turncoat.task import Batch
from turncoat.trial import Memberships
from turncoat.views import ModelView, QueryView


@dataclass(frozen=True)
class LossThreshold:
    """A record with a small loss was trained on [1]_.

    Differs from the paper: the score is minus the loss, and the game tries every threshold, where
    the paper takes the mean training loss for one.

    .. [1] Yeom et al., CSF 2018, adversary 1. https://arxiv.org/abs/1709.01604
    """

    def __call__(self, view: ModelView | QueryView, *, candidates: Batch) -> Memberships:
        inputs, labels = candidates
        return Memberships(view.scores(inputs).gather(1, labels[:, None]).squeeze(1))

"""Membership from the global model of every round, and not of the last alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from turncoat.attacks.membership.lira import confidence
from turncoat.messages import Update
from turncoat.task import Batch
from turncoat.trial import Memberships
from turncoat.validate import at_least
from turncoat.views import AggregateView, ModelView


@dataclass(frozen=True)
class Trajectory:
    """Average the confidence in a record over the global models of all rounds [1]_.

    The noise of one round's training is averaged out. It needs no more than to have taken part.

    Differs from the paper: no net is trained on the trajectories of records that are known to be
    members; what is averaged is ``log p_y - log sum_{c != y} p_c``, as in ``LiRA``.

    Args:
        first: The round with which to begin: models of before know little of anyone.

    .. [1] Zari, Xu and Neglia, 2021. https://arxiv.org/abs/2111.00430
    """

    first: int = 0

    def __post_init__(self) -> None:
        at_least(0, self, first=self.first)

    def __call__(self, view: Sequence[AggregateView[Update]], *, candidates: Batch) -> Memberships:
        known = [
            confidence(ModelView(v.model, v.after), candidates)
            for v in view
            if v.round >= self.first
        ]
        if not known:
            raise ValueError(f"{self!r} begins after the last round: choose an earlier first")
        return Memberships(torch.stack(known).mean(dim=0))

"""Which canaries took part, by how far each one's own weight has moved its way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from turncoat.auditing.canaries import Diracs
from turncoat.messages import Update
from turncoat.trial import Memberships
from turncoat.views import AggregateView


@dataclass(frozen=True)
class DiracProducts:
    """Sum, over the rounds, the product of the model's step with what a canary would send [1]_.

    Who sent the canaries knows what they are; whoever sees the global model does the rest.

    .. [1] Nasr et al., USENIX Security 2023, section 4. https://arxiv.org/abs/2302.07956
    """

    def __call__(self, view: Sequence[AggregateView[Update]], *, canaries: Diracs) -> Memberships:
        scores = torch.zeros(canaries.num_canaries, dtype=torch.float64)
        for seen in view:
            scores += canaries.scores((seen.after - seen.before).cpu(), seen.round)
        return Memberships(scores)

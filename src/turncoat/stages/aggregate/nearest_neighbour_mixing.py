"""Mixing each update with those near it, before a rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from turncoat.columns import filled
from turncoat.messages import Clear
from turncoat.stage import Aggregate, call
from turncoat.stages.aggregate.coordinatewise import refuse_fewer
from turncoat.stages.aggregate.distances import measured
from turncoat.validate import at_least


@dataclass(frozen=True)
class NNM:
    """Put the mean of its ``n - f`` nearest in place of each update, then do as ``inner`` [1]_.

    An update is the nearest to itself. Lessens what heterogeneous data cost a robust rule. Needs
    n >= 2f + 1. Claimed weights are ignored; a message that is not finite counts as 0.

    Args:
        num_byzantine: How many forged messages to withstand: f.

    .. [1] Allouah et al., AISTATS 2023, algorithm 2. https://arxiv.org/abs/2302.01772
    """

    inner: Aggregate[Clear]
    num_byzantine: int

    def __post_init__(self) -> None:
        at_least(0, self, num_byzantine=self.num_byzantine)

    def check_cohort(self, num_messages: int) -> None:
        """Refuse a round of too few."""
        least = 2 * self.num_byzantine + 1
        refuse_fewer(self, num_messages, least, "2f + 1", "lower num_byzantine")

    def __call__(self, messages: Sequence[Clear], **offers: Any) -> Tensor:
        self.check_cohort(len(messages))
        matrix, squared = measured(messages)
        share = _shares(squared, len(messages) - self.num_byzantine).to(matrix)
        mixed = filled(torch.empty_like(matrix), lambda where: share @ matrix[:, where])
        sent = [replace(m, delta=row, weight=1.0) for m, row in zip(messages, mixed, strict=True)]
        step: Tensor = call(self.inner, sent, **offers)
        return step


def _shares(squared: Tensor, num_nearest: int) -> Tensor:
    """Return how much of each row is in each mixture. Shape: ``(mixtures, rows)``."""
    nearest = squared.clone().fill_diagonal_(-1).argsort(dim=1, stable=True)[:, :num_nearest]
    return torch.zeros_like(squared).scatter_(1, nearest, 1 / num_nearest)

"""Clipping as many updates as the number of traitors warrants, before a rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from turncoat.columns import by_columns, filled
from turncoat.messages import Clear, with_rows
from turncoat.stage import Aggregate, call
from turncoat.stages.aggregate.coordinatewise import refuse_fewer
from turncoat.stages.aggregate.geometry import finite_rows
from turncoat.validate import at_least


@dataclass(frozen=True)
class ARC:
    """Shorten the longest updates to the longest of the rest, then do as ``inner`` [1]_.

    The ``2 f (n - f) / n`` longest, rounded down. Needs n >= 2f + 1. A message that is not finite
    counts as 0.

    Args:
        num_byzantine: How many forged messages to withstand: f.

    .. [1] Allouah et al., ICLR 2025, algorithm 2. https://arxiv.org/abs/2405.14432
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
        n, f = len(messages), self.num_byzantine
        self.check_cohort(n)
        matrix = finite_rows(messages)
        norms = _norms(matrix)
        num_clipped = 2 * f * (n - f) // n
        radius = norms.sort().values[n - num_clipped - 1]
        factors = torch.where(norms > radius, radius / norms, 1)
        if bool((factors < 1).any()):
            matrix = _scaled(matrix, factors)
        step: Tensor = call(self.inner, with_rows(messages, matrix), **offers)
        return step


def _norms(matrix: Tensor) -> Tensor:
    """Return the length of each row. Shape: ``(n,)``, float64."""

    def squares(where: slice) -> Tensor:
        length: Tensor = torch.linalg.vector_norm(matrix[:, where], dim=1, dtype=torch.float64)
        return length.square()

    total = matrix.new_zeros(len(matrix), dtype=torch.float64)
    for part in by_columns(squares, matrix.shape[1]):
        total += part
    return total.sqrt()


def _scaled(matrix: Tensor, factors: Tensor) -> Tensor:
    """Return the rows times their factors, in float64, for these may be too small for float32."""
    return filled(torch.empty_like(matrix), lambda where: matrix[:, where] * factors[:, None])

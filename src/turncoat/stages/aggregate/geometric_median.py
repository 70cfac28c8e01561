"""The point with the smallest sum of distances to all updates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from turncoat.messages import Clear, rows
from turncoat.stages.aggregate.coordinatewise import Median
from turncoat.validate import at_least, positive

_COLUMNS = 4096  # of the matrix at a time: no copy of the whole of it


@dataclass(frozen=True)
class GeometricMedian:
    """The geometric median by Weiszfeld's smoothed iteration: RFA [1]_.

    Sound while fewer than half of the messages are forged. Claimed weights are ignored.

    Differs from the paper: it starts at the coordinatewise median, for from a mean that f forged
    updates drew away it can take hundreds of iterations to come back; and ``smoothing`` is
    relative, for updates have no fixed scale.

    Args:
        tolerance: Stop once an iteration lowers the sum of distances by less than this part of it.
        smoothing: The least distance that counts, as a part of the median distance.

    .. [1] Pillutla et al., IEEE TSP 2022, algorithm 2. https://arxiv.org/abs/1912.13445
    """

    tolerance: float = 1e-6
    max_iterations: int = 100
    smoothing: float = 1e-6

    def __post_init__(self) -> None:
        positive(self, tolerance=self.tolerance, smoothing=self.smoothing)
        at_least(1, self, max_iterations=self.max_iterations)

    def __call__(self, messages: Sequence[Clear]) -> Tensor:
        matrix, centre = rows(messages), Median()(messages)
        distances = _distances(matrix, centre)
        least = self.smoothing * float(distances.median())
        if not least:  # more than half of them are one point: the geometric median
            return centre
        for _ in range(self.max_iterations):
            weights = 1 / distances.clamp(min=least)
            moved: Tensor = (weights / weights.sum()).to(matrix) @ matrix
            further = _distances(matrix, moved)
            gain = float(distances.sum() - further.sum())
            if gain <= 0:
                break
            centre, distances = moved, further
            if gain <= self.tolerance * float(distances.sum()):
                break
        return centre


def _distances(matrix: Tensor, centre: Tensor) -> Tensor:
    """Return the distance of each row to ``centre``. Shape: ``(n,)``, float64."""
    squared = torch.zeros(len(matrix), dtype=torch.float64, device=matrix.device)
    for block, middle in zip(
        torch.split(matrix, _COLUMNS, dim=1), torch.split(centre, _COLUMNS), strict=True
    ):
        squared += torch.linalg.vector_norm(block - middle, dim=1, dtype=torch.float64).square()
    return squared.sqrt()

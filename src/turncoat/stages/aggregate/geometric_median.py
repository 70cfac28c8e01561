"""The point with the smallest sum of distances to all updates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from turncoat.columns import filled
from turncoat.messages import Clear
from turncoat.stages.aggregate.coordinatewise import refuse_fewer
from turncoat.stages.aggregate.distances import about_the_middle
from turncoat.validate import at_least, positive

_REACH = 1e6  # median distances: an update farther off pulls from there, in its own direction


@dataclass(frozen=True)
class GeometricMedian:
    """The geometric median by Weiszfeld's smoothed iteration: RFA [1]_.

    Sound while fewer than half of the messages are forged. Claimed weights are ignored; a message
    that is not finite counts as 0.

    Differs from the paper: it starts at a mean of the updates by how near they are to the most
    central one, for from their plain mean, which f forged updates drew away, it can take hundreds
    of iterations to come back; ``smoothing`` is relative, for updates have no fixed scale; and what
    lies a million median distances away counts as lying that far, in the same direction.

    Args:
        tolerance: Stop once an iteration lowers the sum of distances, over n, by less than this
            part of the median distance.
        smoothing: The least distance that counts, as a part of the median distance.

    .. [1] Pillutla et al., IEEE TSP 2022, algorithm 2. https://arxiv.org/abs/1912.13445
    """

    tolerance: float = 1e-9
    max_iterations: int = 1000
    smoothing: float = 1e-6

    def __post_init__(self) -> None:
        positive(self, tolerance=self.tolerance, smoothing=self.smoothing)
        at_least(1, self, max_iterations=self.max_iterations)

    def check_cohort(self, num_messages: int) -> None:
        """Refuse a round of nobody."""
        refuse_fewer(self, num_messages, 1, "a median of none", "sample more clients")

    def __call__(self, messages: Sequence[Clear]) -> Tensor:
        self.check_cohort(len(messages))
        matrix, gram, centre = about_the_middle(messages)
        lengths = gram.diagonal().sqrt()
        usual = float(lengths.sort().values[len(lengths) // 2])
        if not usual:  # more than half of them are one point: the geometric median
            return matrix[centre].clone()
        shrunk = (_REACH * usual / lengths).clamp(max=1)
        weights = shrunk * self._weights(shrunk[:, None] * gram * shrunk, usual)
        weights[centre] += 1 - weights.sum()
        weights = weights.to(matrix.device)
        return filled(
            torch.empty_like(matrix[0]),
            lambda where: (weights @ matrix[:, where].double()).to(matrix.dtype),
        )

    def _weights(self, gram: Tensor, usual: float) -> Tensor:
        """Return what share of each point is in the geometric median: all steps are within it."""
        weights = _shares(gram.diagonal().sqrt(), usual)
        distances = _distances(gram, weights)
        for _ in range(self.max_iterations):
            moved = _shares(distances, self.smoothing * usual)
            further = _distances(gram, moved)
            gain = float((distances - further).sum())
            if gain <= 0:
                break
            weights, distances = moved, further
            if gain <= self.tolerance * usual * len(gram):
                break
        return weights


def _shares(distances: Tensor, least: float) -> Tensor:
    inverse = 1 / distances.clamp(min=least)
    return inverse / inverse.sum()


def _distances(gram: Tensor, weights: Tensor) -> Tensor:
    """Return how far each point is from their mean by weight."""
    across = gram @ weights
    return (gram.diagonal() - 2 * across + weights @ across).clamp(min=0).sqrt()

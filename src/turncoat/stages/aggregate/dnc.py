"""Divide and conquer: what sticks out along the direction in which the updates differ most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import torch
from torch import Generator, Tensor

from turncoat.messages import Clear
from turncoat.stage import Verdict
from turncoat.stages.aggregate.coordinatewise import refuse_fewer
from turncoat.stages.aggregate.geometry import mean_of, sound_rows
from turncoat.validate import at_least, positive


@dataclass(frozen=True)
class DnC:
    """Leave out what lies farthest along the top singular vector, and average the rest [1]_.

    Needs n >= 2f + 1. Claimed weights are ignored. One iteration sees one direction: two traitors
    of unequal length at right angles hide each other, the shorter behind the longer.

    Differs from the paper: where the iterations agree on nobody, those that survived most of them
    are averaged; a message that is not finite, or ten thousand times as long as the median, counts
    as 0.

    Args:
        num_byzantine: How many forged messages to withstand: f.
        filter_fraction: How many to leave out in an iteration, times f: c.
        num_coordinates: Drawn for each iteration: b.
        num_iterations: Whose survivors are intersected.

    .. [1] Shejwalkar and Houmansadr, NDSS 2021, algorithm 2.
       https://www.ndss-symposium.org/ndss-paper/manipulating-the-byzantine/
    """

    num_byzantine: int
    filter_fraction: float = 1.0
    num_coordinates: int = 10_000
    num_iterations: int = 1

    def __post_init__(self) -> None:
        at_least(0, self, num_byzantine=self.num_byzantine)
        positive(self, filter_fraction=self.filter_fraction)
        at_least(1, self, num_coordinates=self.num_coordinates, num_iterations=self.num_iterations)

    @property
    def num_left_out(self) -> int:
        """Return how many one iteration leaves out: c f, rounded up."""
        return ceil(self.filter_fraction * self.num_byzantine - 1e-9)

    def check_cohort(self, num_messages: int) -> None:
        """Refuse a round of too few."""
        least = max(2 * self.num_byzantine, self.num_left_out) + 1
        bound = "2f + 1, and more than c f"
        refuse_fewer(self, num_messages, least, bound, "lower num_byzantine")

    def __call__(self, messages: Sequence[Clear], *, rng: Generator, verdict: Verdict) -> Tensor:
        self.check_cohort(len(messages))
        matrix = sound_rows(messages)
        n, size = matrix.shape
        survived = torch.zeros(n, dtype=torch.long)
        for _ in range(self.num_iterations):
            drawn = torch.randperm(size, generator=rng)[: self.num_coordinates].to(matrix.device)
            scores = outlying(matrix.index_select(1, drawn) if len(drawn) < size else matrix)
            survived[scores.argsort(stable=True)[: n - self.num_left_out]] += 1
        best = survived == survived.max()
        verdict.flag((~best).nonzero().flatten().tolist())
        return mean_of(best.nonzero().flatten().tolist(), matrix)


def outlying(matrix: Tensor) -> Tensor:
    """Return the squared projection of each centred row on the top singular vector. ``(n,)``."""
    centred = matrix.double()
    centred = centred - centred.mean(dim=0)
    values, vectors = torch.linalg.eigh((centred @ centred.T).cpu())
    scores: Tensor = values[-1].clamp(min=0) * vectors[:, -1].square()
    return scores

"""Rules that average the n - f updates nearest to each other, or to one that is trusted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from turncoat.messages import Clear, with_rows
from turncoat.stage import Verdict
from turncoat.stages.aggregate.coordinatewise import Median, refuse_fewer
from turncoat.stages.aggregate.distances import measured
from turncoat.stages.aggregate.geometry import finite_rows, lengths, mean_of
from turncoat.validate import at_least, one_of

Reference = Literal["median", "first"]


@dataclass(frozen=True)
class MDA:
    """The mean of those n - f updates whose largest distance is smallest [1]_, [2]_.

    Needs n >= 2f + 1. Claimed weights are ignored. Exact, by branch and bound, though the problem
    is NP-hard: the work grows as 1.5 to the power of f, not as the number of subsets.

    Differs from the papers: where several subsets have the smallest diameter, as is usual, the one
    whose second largest distance is smallest is taken, and so on, so that the order of the messages
    does not matter. A message that is not finite counts as 0.

    Args:
        num_byzantine: How many forged messages to withstand: f.
        max_nodes: Of all search trees of a round, before it gives up with an error.

    .. [1] Rousseeuw, in Mathematical Statistics and Applications, 1985, pp. 283-297.
    .. [2] El Mhamdi et al., PODC 2020, section 4. https://arxiv.org/abs/1905.03853
    """

    num_byzantine: int
    max_nodes: int = 200_000

    def __post_init__(self) -> None:
        at_least(0, self, num_byzantine=self.num_byzantine)
        at_least(1, self, max_nodes=self.max_nodes)

    def check_cohort(self, num_messages: int) -> None:
        """Refuse a round of too few."""
        least = 2 * self.num_byzantine + 1
        refuse_fewer(self, num_messages, least, "2f + 1", "lower num_byzantine")

    def __call__(self, messages: Sequence[Clear], *, verdict: Verdict) -> Tensor:
        self.check_cohort(len(messages))
        matrix, squared = measured(messages)
        kept = tightest(squared, self.num_byzantine, self.max_nodes)
        verdict.flag(set(range(len(matrix))) - set(kept))
        return mean_of(kept, matrix)


@dataclass(frozen=True)
class MoNNA:
    """The mean of the n - f updates nearest to a trusted one [1]_.

    Needs n >= 2f + 1. Claimed weights are ignored.

    Differs from the paper: there every peer trusts its own update, the ``"first"`` message. A
    server has none, and trusts the coordinatewise median. A message that is not finite counts as 0.

    Args:
        num_byzantine: How many forged messages to withstand: f.

    .. [1] Farhadkhani et al., ICML 2023, algorithm 1. https://arxiv.org/abs/2210.00940
    """

    num_byzantine: int
    reference: Reference = "median"

    def __post_init__(self) -> None:
        at_least(0, self, num_byzantine=self.num_byzantine)
        one_of(Reference, self, reference=self.reference)

    def check_cohort(self, num_messages: int) -> None:
        """Refuse a round of too few."""
        least = 2 * self.num_byzantine + 1
        refuse_fewer(self, num_messages, least, "2f + 1", "lower num_byzantine")

    def __call__(self, messages: Sequence[Clear], *, verdict: Verdict) -> Tensor:
        n, f = len(messages), self.num_byzantine
        self.check_cohort(n)
        matrix = finite_rows(messages)
        first = self.reference == "first"
        trusted = matrix[0] if first else Median()(with_rows(messages, matrix))
        nearest = lengths(matrix, trusted).argsort(stable=True).tolist()
        verdict.flag(nearest[n - f :])
        return mean_of(nearest[: n - f], matrix)


def tightest(squared: Tensor, num_removed: int, max_nodes: int) -> list[int]:
    """Return the rows left after removing so many that the longest distance is shortest.

    Pairs are taken from the farthest on. Each must lose an end, if ``num_removed`` rows can be so
    chosen that it and all pairs before it do; otherwise both its ends stay. So the diameter is
    smallest, then the next distance, and so on.

    Args:
        squared: Distances, or their squares. Shape: ``(n, n)``.
    """
    n = len(squared)
    i, j = torch.triu_indices(n, n, offset=1)
    order = squared[i, j].argsort(descending=True, stable=True)
    search = _Cover(n, max_nodes)
    for a, b in zip(i[order].tolist(), j[order].tolist(), strict=True):
        search.require(a, b, num_removed)
    gone = search.removed
    kept = [v for v in range(n) if not gone >> v & 1]
    return kept[: n - num_removed]


class _Cover:
    """The fewest rows that hold an end of every required pair: vertex cover, by branching.

    Sets of rows are the bits of a number.
    """

    def __init__(self, n: int, max_nodes: int) -> None:
        self.neighbours = [0] * n
        self.staying = 0
        self.removed = 0  # a cover of all pairs required so far
        self.left = self.max_nodes = max_nodes

    def require(self, a: int, b: int, budget: int) -> None:
        ends = 1 << a | 1 << b
        if not budget or self.staying & ends == ends:
            self.staying |= ends
            return
        self._join(a, b)
        if self.removed & ends:
            return
        found = self._search((1 << len(self.neighbours)) - 1, budget)
        if found is None:
            self._join(a, b)  # and so part them
            self.staying |= ends
        else:
            self.removed = found

    def _join(self, a: int, b: int) -> None:
        self.neighbours[a] ^= 1 << b
        self.neighbours[b] ^= 1 << a

    def _search(self, alive: int, budget: int) -> int | None:
        """Return a cover of the required pairs among ``alive`` with ``budget`` rows, or None."""
        self.left -= 1
        if self.left < 0:
            raise ValueError(
                f"MDA: no answer within {self.max_nodes} nodes of the search: lower num_byzantine, "
                "or use MultiKrum"
            )
        degrees = [
            ((self.neighbours[v] & alive).bit_count(), v)
            for v in range(len(self.neighbours))
            if alive >> v & 1
        ]
        most, v = max(degrees, default=(0, 0))
        if not most:
            return 0
        if sum(d for d, _ in degrees) > 2 * most * budget:  # too many pairs for so few rows
            return None
        around = self.neighbours[v] & alive
        if not self.staying >> v & 1:
            rest = self._search(alive & ~(1 << v), budget - 1)
            if rest is not None:
                return rest | 1 << v
        if most <= budget and not self.staying & around:
            rest = self._search(alive & ~(around | 1 << v), budget - most)
            if rest is not None:
                return rest | around
        return None

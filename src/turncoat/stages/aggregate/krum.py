"""Rules that trust the updates in the thick of the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from turncoat.columns import filled
from turncoat.messages import Clear
from turncoat.stage import Verdict
from turncoat.stages.aggregate.coordinatewise import refuse_fewer
from turncoat.stages.aggregate.distances import measured
from turncoat.validate import at_least

_ALIKE = 1e-6  # of a score: what rounding may be


@dataclass(frozen=True)
class Krum:
    """The update with the smallest sum of squared distances to its ``n - f - 2`` nearest [1]_.

    Needs n >= 2f + 3. Claimed weights are ignored. Of two that score alike, the one nearer to all
    is chosen; a message that is not finite counts as 0.

    Args:
        num_byzantine: How many forged messages to withstand: f.
        num_neighbours: None for n - f - 2. Others sum n - f - 1.

    .. [1] Blanchard et al., NeurIPS 2017, section 4. https://arxiv.org/abs/1703.02757
    """

    num_byzantine: int
    num_neighbours: int | None = None

    def __post_init__(self) -> None:
        at_least(0, self, num_byzantine=self.num_byzantine)
        at_least(1, self, num_neighbours=self.num_neighbours)

    def check_cohort(self, num_messages: int) -> None:
        """Refuse a round of too few."""
        _check_cohort(self, num_messages, self.num_byzantine, self.num_neighbours)

    def __call__(self, messages: Sequence[Clear]) -> Tensor:
        n, f = len(messages), self.num_byzantine
        self.check_cohort(n)
        matrix, squared = measured(messages)
        return matrix[ranked(squared, self.num_neighbours or n - f - 2)[0]].clone()


@dataclass(frozen=True)
class MultiKrum:
    """The mean of the ``num_selected`` updates that Krum likes best [1]_.

    Needs n >= 2f + 3. Claimed weights are ignored; a message that is not finite counts as 0. Those
    left out are flagged.

    Args:
        num_byzantine: How many forged messages to withstand: f.
        num_selected: None for n - f, as many as are honest; ``rescored``, for n - 2f - 2.
        num_neighbours: None for n - f - 2. Others sum n - f - 1.
        rescored: Whether one is chosen at a time, and the rest score anew without it, as in the
            code of Shejwalkar and Houmansadr [2]_.

    .. [1] Blanchard et al., NeurIPS 2017, section 5. https://arxiv.org/abs/1703.02757
    .. [2] Shejwalkar and Houmansadr, NDSS 2021.
       https://www.ndss-symposium.org/ndss-paper/manipulating-the-byzantine/
    """

    num_byzantine: int
    num_selected: int | None = None
    num_neighbours: int | None = None
    rescored: bool = False

    def __post_init__(self) -> None:
        at_least(0, self, num_byzantine=self.num_byzantine)
        at_least(1, self, num_selected=self.num_selected, num_neighbours=self.num_neighbours)
        if self.rescored and self.num_neighbours is not None:
            raise ValueError(
                f"{self!r}: num_neighbours must be None, for it falls as the rest are rescored"
            )

    def check_cohort(self, num_messages: int) -> None:
        """Refuse a round of too few."""
        n, f = num_messages, self.num_byzantine
        _check_cohort(self, n, f, self.num_neighbours)
        if self.num_selected is not None and self.num_selected > n - f:
            raise ValueError(
                f"{self!r} trusts {self.num_selected} messages; of a cohort of {n}, {n - f} are "
                "honest (n - f): lower num_selected or sample more clients"
            )

    def __call__(self, messages: Sequence[Clear], *, verdict: Verdict | None = None) -> Tensor:
        n, f = len(messages), self.num_byzantine
        self.check_cohort(n)
        matrix, squared = measured(messages)
        if self.rescored:
            best = picked(squared, f, self.num_selected or n - 2 * f - 2)
        else:
            best = ranked(squared, self.num_neighbours or n - f - 2)[: self.num_selected or n - f]
        if verdict is not None:
            verdict.flag(set(range(n)) - set(best))
        share = matrix.new_zeros(n)
        share[best] = 1 / len(best)  # gathers no rows: that would be a copy of most of the matrix
        return filled(torch.empty_like(matrix[0]), lambda where: share @ matrix[:, where], 1 << 15)


def scores(squared: Tensor, num_neighbours: int) -> Tensor:
    """Return each row's sum of squared distances to its nearest others. Shape: ``(n,)``.

    Args:
        squared: The squared distances of all. Shape: ``(n, n)``.
    """
    others = squared.clone().fill_diagonal_(torch.inf)
    return others.topk(num_neighbours, largest=False).values.sum(dim=1)


def ranked(squared: Tensor, num_neighbours: int) -> list[int]:
    """Return the rows from the best score to the worst; of those alike, first the nearest to all.

    Where updates are equal in pairs, as after mixing, scores are equal but for their rounding,
    which shall decide nothing.
    """
    found = scores(squared, num_neighbours).tolist()
    level, best, levels = 0, 0.0, [0] * len(found)
    for place, i in enumerate(sorted(range(len(found)), key=found.__getitem__)):
        if place == 0 or found[i] > best * (1 + _ALIKE):
            level, best = place, found[i]
        levels[i] = level
    return [int(i) for i in np.lexsort((squared.sum(dim=1).numpy(), np.array(levels)))]


def picked(squared: Tensor, num_byzantine: int, num_picked: int) -> list[int]:
    """Return the rows that Krum chooses one after another, each time among the rest.

    Of the last few, at least one neighbour counts.
    """
    left, chosen = list(range(len(squared))), list[int]()
    while len(chosen) < num_picked:
        few = min(max(len(left) - num_byzantine - 2, 1), len(left) - 1)
        chosen.append(left.pop(ranked(squared[left][:, left], few)[0]))
    return chosen


def _check_cohort(rule: object, n: int, f: int, num_neighbours: int | None) -> None:
    refuse_fewer(rule, n, 2 * f + 3, "2f + 3", "lower num_byzantine")
    if num_neighbours is not None:
        least = num_neighbours + 1
        refuse_fewer(rule, n, least, "num_neighbours + 1", "lower num_neighbours")

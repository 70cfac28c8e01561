"""Rules that trust the updates in the thick of the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from turncoat.messages import Clear, rows
from turncoat.validate import at_least

_COLUMNS = 4096  # of the matrix at a time: a block of a hundred clients stays in the cache


@dataclass(frozen=True)
class Krum:
    """The update with the smallest sum of squared distances to its ``n - f - 2`` nearest [1]_.

    Needs n >= 2f + 3. Claimed weights are ignored.

    Args:
        num_byzantine: How many forged messages to withstand: f.

    .. [1] Blanchard et al., NeurIPS 2017, section 4. https://arxiv.org/abs/1703.02757
    """

    num_byzantine: int

    def __post_init__(self) -> None:
        at_least(0, self, num_byzantine=self.num_byzantine)

    def check_cohort(self, num_messages: int) -> None:
        """Refuse a round of too few."""
        _check_cohort(self, num_messages, self.num_byzantine)

    def __call__(self, messages: Sequence[Clear]) -> Tensor:
        self.check_cohort(len(messages))
        matrix = rows(messages)
        return matrix[int(scores(matrix, self.num_byzantine).argmin())].clone()


@dataclass(frozen=True)
class MultiKrum:
    """The mean of the ``num_selected`` updates that Krum likes best [1]_.

    Needs n >= 2f + 3. Claimed weights are ignored.

    Args:
        num_byzantine: How many forged messages to withstand: f.
        num_selected: None for n - f, as many as are honest.

    .. [1] Blanchard et al., NeurIPS 2017, section 5. https://arxiv.org/abs/1703.02757
    """

    num_byzantine: int
    num_selected: int | None = None

    def __post_init__(self) -> None:
        at_least(0, self, num_byzantine=self.num_byzantine)
        at_least(1, self, num_selected=self.num_selected)

    def check_cohort(self, num_messages: int) -> None:
        """Refuse a round of too few."""
        n, f = num_messages, self.num_byzantine
        _check_cohort(self, n, f)
        if self.num_selected is not None and self.num_selected > n - f:
            raise ValueError(
                f"{self!r} trusts {self.num_selected} messages; of a cohort of {n}, {n - f} are "
                "honest (n - f): lower num_selected or sample more clients"
            )

    def __call__(self, messages: Sequence[Clear]) -> Tensor:
        n, f = len(messages), self.num_byzantine
        self.check_cohort(n)
        selected = n - f if self.num_selected is None else self.num_selected
        matrix = rows(messages)
        best = scores(matrix, f).argsort(stable=True)[:selected]
        share = torch.zeros(n, dtype=matrix.dtype)
        share[best] = 1 / selected
        mean: Tensor = share.to(matrix.device) @ matrix  # gathers no rows: a copy of most of it
        return mean


def scores(matrix: Tensor, num_byzantine: int) -> Tensor:
    """Return Krum's score of each row. Shape: ``(n,)``, float64, on the CPU."""
    others = squared_distances(matrix).fill_diagonal_(torch.inf)
    kept = len(matrix) - num_byzantine - 2
    return others.topk(kept, largest=False).values.sum(dim=1)


def squared_distances(matrix: Tensor) -> Tensor:
    """Return the squared Euclidean distances of the rows. Shape: ``(n, n)``, float64, on the CPU.

    Differences are taken before they are squared, in float64: updates that differ by a millionth
    of their length, beside forged ones of any length, keep their order. The faster
    ``|a|^2 - 2ab + |b|^2`` does not.
    """
    n = len(matrix)
    above = torch.zeros(n * (n - 1) // 2, dtype=torch.float64, device=matrix.device)
    for block in torch.split(matrix, _COLUMNS, dim=1):
        above += torch.pdist(block.double()).square()
    square = torch.zeros(n, n, dtype=torch.float64)
    i, j = torch.triu_indices(n, n, offset=1)
    square[i, j] = square[j, i] = above.cpu()
    return square


def _check_cohort(rule: object, n: int, f: int) -> None:
    if n < 2 * f + 3:
        raise ValueError(
            f"{rule!r} needs at least {2 * f + 3} messages (2f + 3); the cohort has {n}: "
            "lower num_byzantine or sample more clients"
        )

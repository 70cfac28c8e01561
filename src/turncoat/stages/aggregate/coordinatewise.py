"""Rules that look at one coordinate at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from turncoat.columns import filled
from turncoat.messages import Clear, rows
from turncoat.validate import at_least

_COLUMNS = 2048  # sorted at a time: a block of a hundred clients stays in the cache


@dataclass(frozen=True)
class Median:
    """The median of each coordinate; of an even number, the mean of the middle two [1]_.

    Sound while fewer than half of the messages are forged. Claimed weights are ignored. What is
    not a number counts as infinite.

    .. [1] Yin et al., ICML 2018, definition 1. https://arxiv.org/abs/1803.01498
    """

    def check_cohort(self, num_messages: int) -> None:
        """Refuse a round of nobody."""
        refuse_fewer(self, num_messages, 1, "a median of none", "sample more clients")

    def __call__(self, messages: Sequence[Clear]) -> Tensor:
        self.check_cohort(len(messages))
        return each_column(rows(messages), middle)


@dataclass(frozen=True)
class TrimmedMean:
    """The mean of each coordinate without its smallest and its largest values [1]_.

    Sound while at most ``num_trimmed`` messages are forged. Claimed weights are ignored. What is
    not a number counts as infinite.

    Args:
        num_trimmed: How many values to leave out at each end. Needs n > 2 ``num_trimmed``.

    .. [1] Yin et al., ICML 2018, definition 2. https://arxiv.org/abs/1803.01498
    """

    num_trimmed: int

    def __post_init__(self) -> None:
        at_least(0, self, num_trimmed=self.num_trimmed)

    def check_cohort(self, num_messages: int) -> None:
        """Refuse a round of too few."""
        refuse_fewer(self, num_messages, 2 * self.num_trimmed + 1, "2b + 1", "lower num_trimmed")

    def __call__(self, messages: Sequence[Clear]) -> Tensor:
        n, b = len(messages), self.num_trimmed
        self.check_cohort(n)
        return each_column(rows(messages), lambda ordered: mean(ordered[:, b : n - b]))


@dataclass(frozen=True)
class MeaMed:
    """The mean, in each coordinate, of the ``n - f`` values nearest to the median [1]_.

    Sound while fewer than half of the messages are forged: needs n >= 2f + 1. Claimed weights are
    ignored. Of two values equally near, the smaller counts.

    Args:
        num_byzantine: How many forged messages to withstand: f.

    .. [1] Xie, Koyejo and Gupta, 2018, definition 9 (mean around median).
       https://arxiv.org/abs/1802.10116
    """

    num_byzantine: int

    def __post_init__(self) -> None:
        at_least(0, self, num_byzantine=self.num_byzantine)

    def check_cohort(self, num_messages: int) -> None:
        """Refuse a round of too few."""
        least = 2 * self.num_byzantine + 1
        refuse_fewer(self, num_messages, least, "2f + 1", "lower num_byzantine")

    def __call__(self, messages: Sequence[Clear]) -> Tensor:
        kept = len(messages) - self.num_byzantine
        self.check_cohort(len(messages))
        return each_column(rows(messages), lambda ordered: mean_near_middle(ordered, kept))


def each_column(
    matrix: Tensor, rule: Callable[[Tensor], Tensor], kept: Tensor | None = None
) -> Tensor:
    """Return what a rule makes of each column of a matrix, given blocks of them, each sorted.

    Args:
        rule: From ``(columns, n)``, sorted along the second axis, to ``(columns,)``.
        kept: The rows that count; None: all.
    """

    def make(where: slice) -> Tensor:
        block = matrix[:, where]
        if kept is not None:
            block = block.index_select(0, kept.to(block.device))
        ordered = block.new_empty(block.shape[::-1]).copy_(block.T)
        if ordered.device.type == "cpu":  # numpy's sort is 15 times as fast as torch's there
            ordered.numpy().sort(axis=1)
        else:
            ordered = ordered.sort(dim=1).values
        return rule(ordered)

    return filled(torch.empty_like(matrix[0]), make, _COLUMNS)


def middle(ordered: Tensor) -> Tensor:
    """Return the median of each sorted row; of an even number of values, the middle two's mean."""
    n = ordered.shape[1]
    return 0.5 * ordered[:, (n - 1) // 2] + 0.5 * ordered[:, n // 2]  # halved first: no overflow


def mean(values: Tensor, num_counted: int | None = None) -> Tensor:
    """Return the sum of each row, in float64, over how many count; all, if nothing is said."""
    total = values.sum(dim=1, dtype=torch.float64)
    return total.div_(num_counted or values.shape[1]).to(values.dtype)


def mean_near_middle(ordered: Tensor, num_kept: int) -> Tensor:
    """Return the mean of those values of each sorted row that are nearest to its median.

    They are neighbours: a value is out if the one ``num_kept`` places on is nearer.
    """
    n, centre = ordered.shape[1], middle(ordered)[:, None]
    kept = torch.ones_like(ordered, dtype=torch.bool)
    farther = centre - ordered[:, : n - num_kept] > ordered[:, num_kept:] - centre
    kept[:, : n - num_kept] = ~farther
    kept[:, num_kept:] &= farther
    return mean(torch.where(kept, ordered, 0), num_kept)


def refuse_fewer(rule: object, num_messages: int, least: int, bound: str, cure: str) -> None:
    """Refuse a cohort below the bound of a rule."""
    if num_messages < least:
        also = "" if cure.startswith("sample") else " or sample more clients"
        raise ValueError(
            f"{rule!r} needs at least {least} messages ({bound}); the cohort has {num_messages}: "
            f"{cure}{also}"
        )

"""What travels: one type per level of secrecy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import islice
from math import frexp, isfinite, ldexp
from operator import add
from typing import Self, TypeVar

import torch
from torch import Tensor

from turncoat.columns import by_columns, filled
from turncoat.params import matrix_of, stack

_TOGETHER = 16  # messages that are summed at once: a sixteenth of the traffic of one at a time
_COLUMNS = 1 << 16


@dataclass(frozen=True, slots=True)
class Envelope:
    """Who sends, to which round, as one of which cohort."""

    sender: int
    cohort: tuple[int, ...]
    round: int


class Summable(ABC):
    """A message that can be added to others.

    A sum that is not ``Revealed`` is opened by the clients, with the channel that dressed it: the
    server never learns the global model, so it can neither post-process it nor see it.
    """

    weight: float

    @abstractmethod
    def __add__(self, other: Self, /) -> Self: ...

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Return how much of it travels, headers left out."""

    @classmethod
    def total(cls, messages: Iterable[Self]) -> Self:
        """Return the sum of one message or more, taken one at a time and in their order."""
        return reduce(add, messages)


class Revealed(Summable):
    """A message whose complete sum the server can open, without a key."""

    @abstractmethod
    def open(self) -> Tensor:
        """Return the weighted mean of the parts, or raise ``SumIncomplete``."""


@dataclass(frozen=True, slots=True)
class Clear(Revealed):
    """A vector in the clear, relative to what was broadcast.

    Attributes:
        delta: ``mine - received``. Shape: ``(num_params,)``.
        weight: Number of examples behind it, as the sender claims.
    """

    delta: Tensor = field(repr=False)
    weight: float

    def __add__(self, other: Self, /) -> Self:
        total = self.weight + other.weight
        mixed = self.delta.lerp(other.delta, other.weight / total) if total else self.delta
        return replace(self, delta=mixed, weight=total)

    @classmethod
    def total(cls, messages: Iterable[Self]) -> Self:
        """Return the weighted mean and the whole weight; 16 messages at a time are summed.

        Within these in float32, of one to the next in float64, in one vector.
        """
        if isinstance(messages, list):
            listed: list[Self] = messages
            if (matrix := matrix_of([m.delta for m in listed])) is not None:
                return _total_of_rows(listed, matrix)
        parts = iter(messages)
        group = list(islice(parts, _TOGETHER))
        first, weight = group[0], 0.0
        total = torch.zeros_like(first.delta, dtype=torch.float64)
        while group:
            weights = [m.weight for m in group]
            shares, some = [_shares(weights, first.delta)], rows(group)

            def add(where: slice, shares: Shares = shares, some: Tensor = some) -> None:
                _add(total[where], shares, some[:, where])

            deque(by_columns(add, len(total), _COLUMNS), maxlen=0)
            weight += sum(weights)
            group = list(islice(parts, _TOGETHER))
        mean = torch.empty_like(total, dtype=torch.float32)
        filled(mean, lambda where: total[where].div_(weight or 1.0), _COLUMNS)
        return replace(first, delta=mean, weight=weight)

    @property
    def num_bytes(self) -> int:
        return self.delta.numel() * 4 + 8

    def open(self) -> Tensor:
        return self.delta

    def fault(self, like: Tensor) -> str | None:
        """Say what makes it unfit to be a payload next to a state ``like``, if anything does."""
        if self.delta.shape != like.shape:
            return f"sent shape {tuple(self.delta.shape)} where {tuple(like.shape)} is due"
        if not (isfinite(self.delta.sum()) or bool(torch.isfinite(self.delta).all())):
            return "sent NaN or infinity"
        if not (isfinite(self.weight) and self.weight > 0):
            return f"claimed the weight {self.weight}, which is no positive number"
        return None


class Update(Clear):
    """A change of the parameters of the model."""

    __slots__ = ()


class Logits(Clear):
    """A change of the logits on the public examples (distillation). Shape: ``(n * classes,)``."""

    __slots__ = ()


C = TypeVar("C", bound=Clear)
Shares = list[tuple[Tensor, float]]  # of ``_TOGETHER`` messages each, and what they are scaled by


def _shares(weights: Sequence[float], like: Tensor) -> tuple[Tensor, float]:
    """Return weights as shares, and what to multiply their sum by: a power of two, so exactly."""
    _, exponent = frexp(sum(weights))  # no sum in float32 exceeds the largest row
    shares = torch.tensor([ldexp(weight, -exponent) for weight in weights]).to(like)
    return shares, ldexp(1.0, exponent)


def _add(total: Tensor, groups: Shares, matrix: Tensor) -> None:
    """Add weighted sums of the rows, ``_TOGETHER`` at a time: of small whole numbers, exactly."""
    for i, (shares, scale) in enumerate(groups):
        total.add_(shares @ matrix[i * _TOGETHER : (i + 1) * _TOGETHER], alpha=scale)


def _total_of_rows(messages: Sequence[C], matrix: Tensor) -> C:
    """Return the same total, to the bit, in one pass over a matrix that is there already."""
    weights = [m.weight for m in messages]
    starts = range(0, len(weights), _TOGETHER)
    groups = [_shares(weights[i : i + _TOGETHER], matrix) for i in starts]
    weight = 0.0
    for i in starts:
        weight += sum(weights[i : i + _TOGETHER])

    def mean(where: slice) -> Tensor:
        block = matrix[:, where]
        total = block.new_zeros(block.shape[1], dtype=torch.float64)
        _add(total, groups, block)
        return total.div_(weight or 1.0)

    found = filled(matrix.new_empty(matrix.shape[1]), mean, _COLUMNS)
    return replace(messages[0], delta=found, weight=weight)


def rows(messages: Sequence[Clear]) -> Tensor:
    """Return the deltas as one matrix. Shape: ``(len(messages), num_params)``."""
    return stack([m.delta for m in messages])


def with_rows(messages: Sequence[C], matrix: Tensor) -> tuple[C, ...]:
    """Return the messages with the rows of ``matrix`` as their deltas."""
    return tuple(replace(m, delta=row) for m, row in zip(messages, matrix, strict=True))

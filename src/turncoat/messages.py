"""What travels: one type per level of secrecy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import islice
from math import frexp, isfinite, ldexp
from operator import add
from typing import Self, TypeVar

import torch
from torch import Tensor

from turncoat.params import stack

_FEWEST, _MOST = 16, 128  # messages that are summed at once
_NUMBERS = 1 << 27  # of theirs that are held at once, if these are more than the fewest messages
_SIDE, _BLOCK = 1 << 14, 1 << 17  # columns of one product, and of what is turned into float64


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
        """Return the weighted mean and the whole weight, of one message or more.

        Up to 128 messages are summed at once, in float32: fewer, but 16, where 128 would take more
        than half a gigabyte. From one such group to the next it is in float64.
        """
        parts = iter(messages)
        first = next(parts)
        together = max(_FEWEST, min(_MOST, _NUMBERS // max(len(first.delta), 1)))
        group = [first, *islice(parts, together - 1)]
        total, weight = None, 0.0
        while True:
            shares = _Shares.of(group)
            mean = shares.product(group)
            weight += sum(m.weight for m in group)
            group = []  # before the next are drawn: no more than one group is held
            group = list(islice(parts, together))
            if not group:
                break
            if total is None:
                total = torch.zeros_like(mean, dtype=torch.float64)
            total.add_(mean, alpha=shares.scale)
        for start in range(0, len(mean), _BLOCK):
            here = mean[start : start + _BLOCK]
            exact = torch.mul(
                here, shares.scale, out=here.new_empty(len(here), dtype=torch.float64)
            )
            if total is not None:
                exact.add_(total[start : start + _BLOCK])
            torch.div(exact, weight or 1.0, out=here)
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


class Votes(Clear):
    """One class for each public example, one-hot: a teacher's. Shape: ``(n * classes,)``."""

    __slots__ = ()


C = TypeVar("C", bound=Clear)


@dataclass(frozen=True, slots=True)
class _Shares:
    """Weights as shares: their product times ``scale``, a power of two, is the weighted sum."""

    shares: Tensor
    scale: float

    @classmethod
    def of(cls, group: Sequence[Clear]) -> Self:
        weights = [m.weight for m in group]
        _, exponent = frexp(sum(weights))  # no sum in float32 exceeds the largest row
        shares = torch.tensor([ldexp(weight, -exponent) for weight in weights])
        return cls(shares.to(group[0].delta), ldexp(1.0, exponent))

    def product(self, group: Sequence[Clear]) -> Tensor:
        """Return the sum of so many shares of each. Shape: ``(num_params,)``.

        Many products of some columns, side by side: one of all of them takes half as long again.
        """
        matrix = rows(group)
        found = torch.empty_like(group[0].delta)
        whole = len(found) // _SIDE * _SIDE
        if whole:
            columns = matrix[:, :whole].view(len(matrix), -1, _SIDE).transpose(0, 1)
            shares = self.shares.expand(len(columns), 1, -1)
            torch.bmm(shares, columns, out=found[:whole].view(-1, 1, _SIDE))
        if whole < len(found):
            torch.mv(matrix[:, whole:].T, self.shares, out=found[whole:])
        return found


def rows(messages: Sequence[Clear]) -> Tensor:
    """Return the deltas as one matrix. Shape: ``(len(messages), num_params)``."""
    return stack([m.delta for m in messages])


def with_rows(messages: Sequence[C], matrix: Tensor) -> tuple[C, ...]:
    """Return the messages with the rows of ``matrix`` as their deltas."""
    return tuple(replace(m, delta=row) for m, row in zip(messages, matrix, strict=True))

"""Secure aggregation: the server learns the sum of the payloads and nothing else. Simulated."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from hashlib import blake2b
from math import ceil, log2
from typing import ClassVar, Self

import torch
from torch import Generator, Tensor

from turncoat.messages import Clear, Envelope, Revealed
from turncoat.validate import at_least, positive

_ALL_PAIRS = 16  # cohorts so small have no sparse graph to gain by


class SumIncomplete(ValueError):
    """A sum was opened before every client had added its own."""


@dataclass(frozen=True, slots=True)
class Masked(Revealed):
    """A fixed-point payload plus pads that cancel once the whole cohort is summed.

    Attributes:
        residue: int64, uniform on its ring to whoever lacks the pads. Shape: ``(num_params,)``.
        weight: Number of examples; public.
        senders: Who is in the sum so far.
        cohort: How many have to be.
        precision: The value of a unit of ``residue``.
    """

    reveals: ClassVar[str] = "shows the server only the sum of the cohort"

    residue: Tensor = field(repr=False)
    weight: float
    senders: frozenset[int]
    cohort: int
    precision: float

    def __add__(self, other: Self, /) -> Self:
        return replace(
            self,
            residue=self.residue + other.residue,  # int64 wraps: arithmetic modulo 2**64
            weight=self.weight + other.weight,
            senders=_joined(self.senders, other.senders),
        )

    @classmethod
    def total(cls, messages: Iterable[Self]) -> Self:
        """Return the sum, made in one vector."""
        parts = iter(messages)
        first = next(parts)
        residue, weight, senders = first.residue.clone(), first.weight, set(first.senders)
        for part in parts:
            residue += part.residue
            weight += part.weight
            senders = set(_joined(frozenset(senders), part.senders))
        return replace(first, residue=residue, weight=weight, senders=frozenset(senders))

    @property
    def num_bytes(self) -> int:
        return self.residue.numel() * 8 + 8

    def open(self) -> Tensor:
        missing = self.cohort - len(self.senders)
        if missing:
            raise SumIncomplete(
                f"{missing} of {self.cohort} clients are not in this sum, and their pads hide it: "
                "add every client's message before opening it"
            )
        return (self.residue.double() * (self.precision / self.weight)).float()


@dataclass(frozen=True)
class SecureAggregation:
    """Pairwise one-time pads on a sparse random graph [1]_ [2]_.

    Simulated: the algebra is there, keys and ciphers are not, and pads come from the simulation's
    own generators. Both ends of a pad derive the same graph from round and cohort.

    Differs from the papers: dropout recovery stands for the double masking and Shamir shares of
    [1]_ by dressing once more for the survivors, and the graph's degree is a rule of thumb.

    Args:
        num_neighbours: With how many others a client shares a pad; None for all in cohorts of 16
            or fewer, else for twice the binary logarithm of the cohort.
        max_weight: What a claimed weight counts for at most. It binds honest clients' code only.
        precision: The step of the fixed-point grid on which weighted changes are rounded.
        recovers_from: The sum is opened as long as so many clients remain; None for all of them,
            so that one who drops out after the agreement on keys ends the round.

    .. [1] Bonawitz et al., CCS 2017, section 4. https://eprint.iacr.org/2017/281
    .. [2] Bell et al., CCS 2020, algorithms 2 and 3. https://eprint.iacr.org/2020/704
    """

    num_neighbours: int | None = None
    max_weight: float = 10_000.0
    precision: float = 2.0**-24
    recovers_from: int | None = None
    simulates: ClassVar[str] = "the algebra of pairwise pads, without keys or ciphers"

    def __post_init__(self) -> None:
        at_least(1, self, num_neighbours=self.num_neighbours, recovers_from=self.recovers_from)
        positive(self, max_weight=self.max_weight, precision=self.precision)

    def __call__(
        self, payload: Clear, *, envelope: Envelope, pairwise: Callable[[int], Generator]
    ) -> Masked:
        me, cohort = envelope.sender, envelope.cohort
        if self.recovers_from is not None and len(cohort) < self.recovers_from:
            raise SumIncomplete(
                f"{self!r} needs {self.recovers_from} clients to the end; {len(cohort)} are left: "
                "lower recovers_from or sample more clients"
            )
        weight = min(payload.weight, self.max_weight)
        residue = self._fixed_point(payload.delta, weight, len(cohort))
        pad = torch.empty_like(residue, device="cpu")
        for peer in sorted(self.neighbours(envelope)):
            pad.random_(_LEAST, None, generator=pairwise(peer))
            residue.add_(pad.to(residue.device), alpha=1 if me < peer else -1)
        return Masked(residue, weight, frozenset({me}), len(cohort), self.precision)

    def neighbours(self, envelope: Envelope) -> frozenset[int]:
        """Return with whom the sender shares a pad: its place on a random ring decides."""
        n = len(envelope.cohort)
        ring, place = _ring(envelope.round, envelope.cohort)
        wanted = self.num_neighbours
        if wanted is None:
            wanted = n - 1 if n <= _ALL_PAIRS else 2 * ceil(log2(n))
        reach = min(ceil(wanted / 2), n // 2)
        here = place[envelope.sender]
        near = {ring[(here + k) % n] for k in range(-reach, reach + 1)}
        return frozenset(near - {envelope.sender})

    def _fixed_point(self, delta: Tensor, weight: float, cohort: int) -> Tensor:
        """Return ``weight * delta`` on the grid, as int64, if no sum of such can leave the ring."""
        most = 2.0**62 * self.precision / (cohort * self.max_weight)
        largest = float(delta.abs().max()) if delta.numel() else 0.0
        if not largest <= most:
            raise ValueError(
                f"{self!r} carries changes up to {most:.4g} for {cohort} clients; one is "
                f"{largest:.4g}: clip the updates, lower max_weight or make the grid coarser "
                "(a larger precision)"
            )
        return (delta.double() * (weight / self.precision)).round_().long()


_LEAST = torch.iinfo(torch.int64).min


@lru_cache(maxsize=8)
def _ring(round: int, cohort: tuple[int, ...]) -> tuple[tuple[int, ...], dict[int, int]]:
    """Return the cohort in the order that both ends of a pad know, and everyone's place in it."""
    context = blake2b(repr((round, sorted(cohort))).encode()).digest()

    def key(client: int) -> bytes:
        return blake2b(str(client).encode(), key=context).digest()

    ring = tuple(sorted(cohort, key=key))
    return ring, {client: place for place, client in enumerate(ring)}


def _joined(first: frozenset[int], second: frozenset[int]) -> frozenset[int]:
    if twice := first & second:
        raise ValueError(f"client {min(twice)} is in the sum twice: add each message once")
    return first | second

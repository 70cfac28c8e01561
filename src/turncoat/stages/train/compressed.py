"""Updates that travel in fewer bytes than their numbers would take in full."""

from __future__ import annotations

from dataclasses import dataclass

from turncoat.messages import Update

_FULL = 32  # bits of a number that is not coded


@dataclass(frozen=True, slots=True)
class Compressed(Update):
    """An update of which zeros, or all but a few bits of each number, need not be sent.

    What it would take on the wire is counted, and nothing is packed: whoever reads it sees numbers.
    Zeros cost what is cheaper: a map of one bit an entry, or the places of the others. A channel
    that masks it sends numbers of its own, and a node of a graph, which sends all that it has
    become since the common start, has no zeros left: neither is spared anything.

    Attributes:
        bits: Of each number but zero.
        num_coded: How many entries, from the first on, have so few; None for all.
        num_scales: Numbers that are sent in full so that the others can be read.
    """

    bits: int = _FULL
    num_coded: int | None = None
    num_scales: int = 0

    @property
    def num_bytes(self) -> int:
        coded = self.delta if self.num_coded is None else self.delta[: self.num_coded]
        size, kept = coded.numel(), int(coded.count_nonzero())
        ways = [kept * self.bits + size, kept * (self.bits + _FULL)]
        if self.bits > 1 or kept == size:  # one bit has no room for a zero
            ways.append(size * self.bits)
        rest = (self.delta.numel() - size + self.num_scales) * _FULL
        return -(-(min(ways) + rest) // 8) + 8

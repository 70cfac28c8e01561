"""Defences by the worst that is left of a seat under each, with their price beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from turncoat.report.cost import Cost
from turncoat.report.pooled import Square
from turncoat.report.record import Record
from turncoat.report.verdict import UNKNOWN, Matrix, furthest, reach, ruins


@dataclass(frozen=True)
class Rank:
    """What a defence leaves of a seat.

    Attributes:
        worst: The attack that goes furthest under it, whether or not that may be chance; None where
            nothing was scored.
        unknown: Attacks that failed or were not run here: the worst may be worse.
        blocked: How many of the attacks at this seat are blocked, which is no proof of safety.
        num_attacks: How many there are.
        ruined: Whether the model loses more than half of what it had learnt over chance.
    """

    defence: str
    worst: Square | None
    unknown: tuple[str, ...]
    blocked: int
    num_attacks: int
    cost: Cost
    ruined: bool


def ranked(record: Record, matrix: Matrix, prices: Mapping[str, Cost], seat: str) -> list[Rank]:
    """Return the defences, the one whose worst case is mildest first; the unknown come last."""
    ranks = []
    for defence in record.choices:
        found = reach(record, matrix, seat, defence)
        unknown = tuple(s.attack for s in found if s.status in UNKNOWN)
        blocked = sum(s.status == "blocked" for s in found)
        cost, ruined = prices[defence], ruins(record, prices[defence], prices[record.defences[0]])
        worst = furthest(found)
        ranks.append(Rank(defence, worst, unknown, blocked, len(found), cost, ruined))
    return sorted(ranks, key=_order)


def _order(rank: Rank) -> tuple[bool, float, float]:
    quality = rank.cost.quality.value if rank.cost.quality else float("-inf")
    left = rank.worst.success if rank.worst is not None else 0.0
    settled = not rank.unknown and (rank.worst is not None or rank.blocked > 0)
    return (not settled, round(left, 2), -quality)

"""What a malicious server gets back of that which a defence keeps from a server that watches."""

from __future__ import annotations

from dataclasses import dataclass

from turncoat.report import words
from turncoat.report.cost import runs
from turncoat.report.pooled import Square
from turncoat.report.record import Record
from turncoat.report.verdict import NOT_TRIED, Matrix, strongest

_SEAT = "server"


@dataclass(frozen=True)
class Restored:
    """A defence that blocks inversions of single updates, and the lie that undoes it.

    Attributes:
        cohort: How many clients' updates were in a sum, in words; nothing if that is not known.
        blocked: Attacks of a server that only watches, which cannot be mounted.
        by: The strongest attack of a server that lies. It beats its baseline.
        honest: The strongest that is left without a lie, if any was scored.
    """

    defence: str
    cohort: str
    blocked: tuple[str, ...]
    by: Square
    honest: Square | None

    def __str__(self) -> str:
        over = f", over {self.cohort}," if self.cohort else ","
        which = words.count(len(self.blocked), "attack") if self.blocked[1:] else self.blocked[0]
        text = (
            f"Under {self.defence}{over} single updates cannot be inverted "
            f"({which} {'are' if self.blocked[1:] else 'is'} blocked). A malicious "
            f"server, which sends weights of its own choosing, still rebuilds images: "
            f"{self.by.attack}, {self.by.short}."
        )
        if self.honest is None:
            return text
        fails = "" if self.honest.beats else ", which does not beat its baseline"
        return f"{text} Without a lie: {self.honest.attack}, {self.honest.short}{fails}."


def restored(record: Record, matrix: Matrix) -> list[Restored]:
    """Return the defences that stop a server from reading updates, but not one that lies."""
    inversions = [a for a in record.plan["attacks"] if a.get("family") == "inversion"]
    lying = {a["name"] for a in inversions if a.get("server")}
    watching = {a["name"] for a in inversions} - lying
    found = []
    for defence in record.defences[1:]:
        here = [s for (_, seat, d), s in matrix.items() if (seat, d) == (_SEAT, defence)]
        blocked = tuple(
            s.attack
            for s in here
            if s.attack in watching and s.status == "blocked" and not s.says.startswith(NOT_TRIED)
        )
        by = strongest([s for s in here if s.attack in lying])
        if blocked and by is not None and by.beats:
            honest = strongest([s for s in here if s.attack in watching])
            found.append(Restored(defence, _cohort(record, defence), blocked, by, honest))
    return found


def _cohort(record: Record, defence: str) -> str:
    """Return how many clients a round of the honest run had."""
    sizes = {int(n) for t in runs(record, defence, None) for n in t.get("cohort") or ()}
    if not sizes:
        return ""
    least, most = min(sizes), max(sizes)
    return words.count(most, "client") if least == most else f"{least:,} to {most:,} clients"

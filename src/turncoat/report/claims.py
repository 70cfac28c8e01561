"""What is claimed of epsilon, beside what canaries prove of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from scipy.stats import binom

from turncoat.report.gallery import Tensors
from turncoat.report.record import Record

Shown = Mapping[tuple[str, str, str], Sequence[Tensors]]


@dataclass(frozen=True)
class Audit:
    """One attack on canaries, at one seat behind one defence, over all seeds that were scored.

    Attributes:
        unit: What a canary is: ``"record"`` or ``"client"``.
        claimed: The epsilon that is claimed for each; None where nothing is.
        bounds: What each seed proves: epsilon is that or more.
        most: What so many canaries could have proved.
        num_guesses, num_right: Of all seeds together.
        seconds: Of a training with canaries and of the attack, for one seed; None if not known.
    """

    attack: str
    seat: str
    defence: str
    unit: str
    delta: float
    confidence: float
    claimed: float | None
    bounds: tuple[float, ...]
    most: float
    num_canaries: int
    num_guesses: int
    num_right: int
    seconds: float | None

    @property
    def bound(self) -> float:
        return fmean(self.bounds)

    @property
    def num_refuted(self) -> int:
        return sum(b > self.claimed for b in self.bounds) if self.claimed is not None else 0

    @property
    def state(self) -> str:
        """``"refuted"``, ``"held"``, ``"doubtful"``, ``"blunt"`` or ``"unclaimed"``.

        Each seed errs as often as its confidence allows, so that one of many may be chance.
        """
        if self.claimed is None:
            return "unclaimed"
        if self.num_refuted:
            chance = float(binom.sf(self.num_refuted - 1, len(self.bounds), 1 - self.confidence))
            return "refuted" if chance <= 1 - self.confidence + 1e-12 else "doubtful"
        return "blunt" if self.most <= self.claimed else "held"

    @property
    def verdict(self) -> str:
        """Return what it comes to, in words."""
        runs = f"{self.num_refuted} of {len(self.bounds)} runs"
        several = len(self.bounds) > 1
        said = {
            "refuted": f"refuted{f', in {runs}' if several else ''}: it spends more than it claims",
            "doubtful": f"exceeded in {runs}, which chance may do: run more seeds",
            "held": "not refuted, which proves nothing",
            "blunt": f"not refuted, nor could it be: {self.num_canaries:,} canaries prove no more "
            f"than {self.most:.3g}; take more",
            "unclaimed": f"nothing is claimed for each {self.unit}",
        }
        return said[self.state]


def audits(record: Record, shown: Shown) -> list[Audit]:
    """Return what came of all canaries, in the order of the matrix."""
    return [
        _audit(record, place, seeds)
        for place, seeds in shown.items()
        if seeds and all("epsilon_lower_bound" in t for t in seeds)
    ]


def _audit(record: Record, place: tuple[str, str, str], seeds: Sequence[Tensors]) -> Audit:
    def numbers(name: str) -> list[float]:
        return [float(t[name].ravel()[0]) for t in seeds]

    attack, seat, defence = place
    claimed = numbers("claimed_epsilon")[0]
    return Audit(
        attack,
        seat,
        defence,
        "client" if numbers("of_clients")[0] else "record",
        numbers("delta")[0],
        numbers("confidence")[0],
        None if claimed != claimed else claimed,
        tuple(numbers("epsilon_lower_bound")),
        max(numbers("epsilon_most")),
        int(numbers("num_canaries")[0]),
        int(sum(numbers("num_guesses"))),
        int(sum(numbers("num_right"))),
        _seconds(record, attack, seat, defence),
    )


def _seconds(record: Record, attack: str, seat: str, defence: str) -> float | None:
    mounted = [
        float(c["seconds"])
        for c in record.cells
        if (c["attack"], str(c["seat"]), c["defence"]) == (attack, seat, defence)
        and c.get("seconds") is not None
    ]
    own = [
        sum(map(float, t.get("seconds_per_round") or ()))
        for t in record.trainings
        if (t["attack"], t["defence"]) == (attack, defence)
    ]
    return fmean(mounted) + fmean(own) if mounted and own else None

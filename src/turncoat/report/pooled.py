"""One square of the matrix: a defence, an attack and a seat, over all seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite, sqrt
from typing import Any

from scipy.special import stdtrit

from turncoat.report import words
from turncoat.report.record import Record, Row

Z = 1.959963984540054


@dataclass(frozen=True)
class Figure:
    """A figure with its baseline and its 95 % interval, where they are known."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    baseline: float | None = None
    worst: float | None = None
    unit: str = ""

    @property
    def success(self) -> float:
        """How far from the baseline (0) to all an attacker can have (1)."""
        return min(1.0, max(0.0, self.scaled(self.value)))

    def scaled(self, value: float) -> float:
        """Place a value on the line from the baseline (0) to the worst (1)."""
        if self.baseline is None or self.worst is None or self.worst == self.baseline:
            return 0.0
        return (value - self.baseline) / (self.worst - self.baseline)

    @property
    def text(self) -> str:
        return words.number(self.value, self.name, self.unit)

    @property
    def interval(self) -> str:
        return words.interval(self.low, self.high, self.name, self.unit)

    @property
    def base(self) -> str:
        return words.number(self.baseline, self.name, self.unit)

    @property
    def metric(self) -> str:
        return words.metric(self.name)


@dataclass(frozen=True)
class Square:
    """What came of one attack at one seat against one defence.

    Attributes:
        status: ``"scored"``, ``"blocked"``, ``"failed"``, or ``"missing"`` if it was not run yet;
            ``"unplayed"`` for a seat that sees more than those at which it was played.
        headline: If scored, the figure that the game leads with.
        others: Whatever else the game measured.
        beats: Whether the attack beat its baseline, its interval considered.
        num_seeds: How many seeds were scored, of ``num_planned``.
        says: Why it is blocked, or what went wrong.
        exhibits: Paths within the folder, one for each scored seed that has something to show.
        remarks: What the game did not measure, and why; of all seeds.
    """

    defence: str
    attack: str
    seat: str
    status: str
    num_planned: int
    headline: Figure | None = None
    others: tuple[Figure, ...] = ()
    beats: bool = False
    num_seeds: int = 0
    num_failed: int = 0
    says: str = ""
    exhibits: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def success(self) -> float:
        return self.headline.success if self.headline else 0.0

    @property
    def reach(self) -> float:
        """Its success, were that not cut off below 0 and above 1."""
        return self.headline.scaled(self.headline.value) if self.headline else 0.0

    @property
    def short(self) -> str:
        """Its figure in half a sentence."""
        if self.headline is None:
            return self.status
        f = self.headline
        spread = f"95 % interval {f.interval}; " if f.low is not None and f.high is not None else ""
        return f"{f.metric} {f.text} ({spread}baseline {f.base})"


def squares(record: Record) -> dict[tuple[str, str, str], Square]:
    """Return the whole matrix, by (attack, seat, defence): no square is left out.

    Rows are grouped by seat, in the plan's order within.
    """
    found: dict[tuple[str, str, str], list[Row]] = {}
    rows: dict[tuple[str, str], None] = {}
    for attack in record.plan["attacks"]:
        rows |= {(attack["name"], str(seat)): None for seat in attack.get("seats") or ()}
    for cell in record.cells:
        attack, seat, defence = str(cell["attack"]), str(cell["seat"] or ""), str(cell["defence"])
        if attack in record.attacks and defence in record.defences:
            rows[attack, seat] = None
            found.setdefault((attack, seat, defence), []).append(cell)
    position = {name: i for i, name in enumerate(record.attacks)}
    ordered = sorted(rows, key=lambda row: (words.order(row[1]), position[row[0]]))
    return {
        (attack, seat, defence): _pool(
            defence, attack, seat, found.get((attack, seat, defence), []), len(record.seeds)
        )
        for attack, seat in ordered
        for defence in record.defences
    }


def num_missing(square: Square) -> int:
    """Return how many cells of a square were not run yet."""
    if square.status == "blocked":
        return 0
    return max(0, square.num_planned - square.num_seeds - square.num_failed)


def _pool(defence: str, attack: str, seat: str, cells: Sequence[Row], planned: int) -> Square:
    square = Square(defence, attack, seat, "missing", planned)
    scored = [c for c in cells if c["status"] == "scored" and _number(c.get("value")) is not None]
    failed = [c for c in cells if c["status"] in ("scored", "failed") and c not in scored]
    blocked = [c for c in cells if c["status"] == "blocked"]
    if failed:
        errors = (str(c["error"]) for c in failed if c.get("error"))
        said = next(errors, "the game gave no value")
        square = replace(square, status="failed", num_failed=len(failed), says=said)
    if scored:
        return replace(
            square,
            status="scored",
            headline=_headline(scored),
            others=_others(scored),
            beats=_beats(scored),
            num_seeds=len(scored),
            exhibits=tuple(str(c["exhibits"]) for c in scored if c.get("exhibits")),
            remarks=tuple(dict.fromkeys(str(r) for c in scored for r in c.get("remarks") or ())),
        )
    if blocked and not failed:
        reasons = (str(c["reason"]) for c in blocked if c.get("reason"))
        return replace(square, status="blocked", says=next(reasons, "no reason is given"))
    return square


def _headline(cells: Sequence[Row]) -> Figure:
    name, unit = str(cells[0].get("metric") or "value"), str(cells[0].get("unit") or "")
    worst = _mean([_number(c.get("worst")) for c in cells])
    return _figure(cells, "", name, unit, worst)


def _others(cells: Sequence[Row]) -> tuple[Figure, ...]:
    names = [k.removesuffix("_baseline") for k in cells[0] if k.endswith("_baseline")]
    return tuple(
        _figure(
            [c for c in cells if _number(c.get(name)) is not None], name, name, _unit(name), None
        )
        for name in names
        if name != "beats" and any(_number(c.get(name)) is not None for c in cells)
    )


def _figure(cells: Sequence[Row], prefix: str, name: str, unit: str, worst: float | None) -> Figure:
    def column(part: str) -> list[float | None]:
        key = (f"{prefix}_{part}" if part != "value" else prefix) if prefix else part
        return [_number(c.get(key)) for c in cells]

    values = [v for v in column("value") if v is not None]
    low, high = spread(values, column("low"), column("high"))
    if not unit and all(0 <= v <= 1 for v in values) and low is not None and high is not None:
        low, high = max(0.0, low), min(1.0, high)  # a rate's interval does not leave [0, 1]
    return Figure(
        name, sum(values) / len(values), low, high, _mean(column("baseline")), worst, unit
    )


def spread(
    values: Sequence[float], lows: Sequence[float | None], highs: Sequence[float | None]
) -> tuple[float | None, float | None]:
    """Return the 95 % interval of a mean over seeds.

    A t interval over two seeds or more. One seed has the interval that its game gave it; so have
    seeds that agree to the last digit (the widest of theirs), for no spread is no certainty.
    """
    if len(values) > 1 and max(values) > min(values):
        return t_interval(values)
    known_low, known_high = [v for v in lows if v is not None], [v for v in highs if v is not None]
    return (min(known_low), max(known_high)) if known_low and known_high else (None, None)


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return Student's 95 % interval of the mean of two values or more.

    >>> [round(end, 3) for end in t_interval([1.0, 2.0, 3.0])]
    [-0.484, 4.484]
    """
    n, mean = len(values), sum(values) / len(values)
    deviation = sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    half = float(stdtrit(n - 1, 0.975)) * deviation / sqrt(n)
    return mean - half, mean + half


def wilson(rate: float, number: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a rate over ``number`` examples.

    >>> [round(end, 3) for end in wilson(0.9, 100)]
    [0.826, 0.945]
    """
    centre = (rate + Z * Z / (2 * number)) / (1 + Z * Z / number)
    half = Z * sqrt(rate * (1 - rate) / number + Z * Z / (4 * number**2)) / (1 + Z * Z / number)
    return max(0.0, centre - half), min(1.0, centre + half)


def _beats(cells: Sequence[Row]) -> bool:
    """Compare each seed with its own baseline: the 95 % interval of the gain excludes 0."""
    gains = []
    for c in cells:
        value, base, worst = (_number(c.get(k)) for k in ("value", "baseline", "worst"))
        if value is None or base is None or worst is None:
            return False
        gains.append((value - base) * ((worst > base) - (worst < base)))
    if len(gains) > 1 and max(gains) > min(gains):
        return t_interval(gains)[0] > 0
    return all(bool(c.get("beats_baseline")) for c in cells)


def _unit(name: str) -> str:
    return "dB" if name.split("_")[0] == "psnr" else ""


def _number(value: Any) -> float | None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
    return float(value) if good else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None

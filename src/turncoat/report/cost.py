"""What a defence costs when nobody attacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

from turncoat.report import words
from turncoat.report.pooled import Figure, t_interval, wilson
from turncoat.report.record import Record, Row


@dataclass(frozen=True)
class Cost:
    """Of the clean runs of one defence; ``None`` where no run was finished.

    Attributes:
        quality: The task's metric at the end, on test data.
        change: Of ``quality`` against the federation as it is, seed by seed where there are two.
        seconds: Of a round, the mean.
        bytes_up, bytes_down: Of a client in a round.
        error: Why a training failed, if one did.
    """

    defence: str
    quality: Figure | None = None
    change: Figure | None = None
    seconds: float | None = None
    bytes_up: float | None = None
    bytes_down: float | None = None
    error: str | None = None


def costs(record: Record) -> dict[str, Cost]:
    """Return the cost of every defence, by name."""
    clean = {name: runs(record, name, None) for name in record.defences}
    base = clean[record.defences[0]]
    return {name: _cost(record, name, clean[name], base) for name in record.defences}


def runs(record: Record, defence: str, attack: str | None) -> list[Row]:
    """Return the trainings of a defence under an active attack, or clean: one for each seed."""
    return [t for t in record.trainings if t["defence"] == defence and t["attack"] == attack]


def done(trainings: Sequence[Row]) -> dict[int, float]:
    """Return where finished trainings ended, by seed; of another model, if another is released."""
    finished = [t for t in trainings if t.get("status", "done") == "done" and t["history"]]
    ends = {int(t["seed"]): (t.get("remade"), t["history"][-1]) for t in finished}
    return {seed: float(last if other is None else other) for seed, (other, last) in ends.items()}


def _cost(record: Record, defence: str, mine: Sequence[Row], base: Sequence[Row]) -> Cost:
    task = record.plan["task"]
    num_test = task.get("num_shown") or task.get("num_test")
    ends, before = done(mine), done(base)
    error = next((str(t.get("error")) for t in mine if t.get("status") == "failed"), None)
    if not ends:
        return Cost(defence, error=error)
    quality = _quality(list(ends.values()), record.metric, num_test)
    change = None
    shared = sorted(ends.keys() & before.keys())
    if shared and mine is not base:
        gains = [ends[s] - before[s] for s in shared]
        was = _quality([before[s] for s in shared], record.metric, num_test)
        change = _change(gains, quality, was)
    return Cost(
        defence,
        quality,
        change,
        _mean([second for t in mine for second in t.get("seconds_per_round") or ()]),
        _mean([t["bytes_up"] for t in mine if t.get("bytes_up") is not None]),
        _mean([t["bytes_down"] for t in mine if t.get("bytes_down") is not None]),
        error,
    )


def _quality(ends: Sequence[float], metric: str, num_test: int | None) -> Figure:
    value = sum(ends) / len(ends)
    if len(ends) > 1 and max(ends) > min(ends):
        low, high = t_interval(ends)
        return Figure(metric, value, max(0.0, low), min(1.0, high) if max(ends) <= 1 else high)
    if metric == "accuracy" and num_test and 0 <= value <= 1:
        return Figure(metric, value, *wilson(value, num_test))
    return Figure(metric, value)


def _change(gains: Sequence[float], now: Figure, was: Figure) -> Figure:
    value = sum(gains) / len(gains)
    if len(gains) > 1 and max(gains) > min(gains):
        return Figure(now.name, value, *t_interval(gains))
    if now.low is None or now.high is None or was.low is None or was.high is None:
        return Figure(now.name, value)
    # Newcombe's interval of a difference of two rates: wide, for the test data are the same
    below = sqrt((now.value - now.low) ** 2 + (was.high - was.value) ** 2)
    above = sqrt((now.high - now.value) ** 2 + (was.value - was.low) ** 2)
    return Figure(now.name, value, value - below, value + above)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def price(cost: Cost, base: Cost, metric: str) -> str:
    """Say in a sentence what a defence costs.

    >>> was = Cost("none", Figure("accuracy", 0.97))
    >>> now = Cost("dp", Figure("accuracy", 0.93), change=Figure("accuracy", -0.04))
    >>> price(now, was, "accuracy")
    'It costs 4.0 points of accuracy (93.0 % instead of 97.0 %).'
    """
    if cost.quality is None:
        return "What it costs is unknown: its clean training did not finish."
    name, parts = words.metric(metric), []
    if cost.change is not None and base.quality is not None:
        lost = words.points(-cost.change.value, metric).lstrip("+")
        now = f"({cost.quality.text} instead of {base.quality.text})"
        if lost.startswith("±"):
            parts.append(f"costs no {name} {now}")
        elif cost.change.value > 0:
            gained = words.points(cost.change.value, metric).lstrip("+")
            parts.append(f"costs no {name}, which is {gained} higher {now}")
        else:
            parts.append(f"costs {lost} of {name} {now}")
    if cost.seconds and base.seconds and cost.seconds > 1.2 * base.seconds:
        parts.append(f"makes a round {cost.seconds / base.seconds:.1f} times as long")
    if cost.bytes_up and base.bytes_up and cost.bytes_up > 1.05 * base.bytes_up:
        parts.append(f"makes a client send {cost.bytes_up / base.bytes_up:.1f} times as much")
    if not parts:
        return f"With it the clean model's {name} is {cost.quality.text}."
    return f"It {words.listed(parts)}."

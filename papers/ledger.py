"""The ledger of reproductions: what is measured, what was expected of it, and what came out.

Each (experiment, seed) is measured in a process of one thread, and written under ``.done/`` as soon
as it is finished, under a hash of the experiment's fields, the text of its file and the version of
the package: a run that was killed goes on where it stopped. The rest of the package's text is no
part of that hash; a result says which text it came from, and the table says where that has changed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from math import isfinite
from pathlib import Path
from typing import Any, Protocol

import torch

from turncoat import __version__
from turncoat.describe import fingerprint, own_code
from turncoat.metrics.intervals import of_mean
from turncoat.record import write_text
from turncoat.runtimes.pool import become_worker, context
from turncoat.validate import at_least, nearest

HERE = Path(__file__).parent
FIRST_SEED = 10  # those below, and from 100 on, are for trying recipes out
SCHEMA_VERSION = 1
_NOTHING = "\N{EN DASH}"
_GRID = " | "  # in the name of a figure that stands in a table of its own: "title: row | column"
_PACKAGES = ("torch", "numpy", "scipy", "scikit-learn", "scikit-image", "opacus", "dp-accounting")


class Measure(Protocol):
    """A frozen dataclass whose fields are the recipe. Numbers are figures, texts are notes."""

    def __call__(self, seed: int) -> Mapping[str, float | str]: ...


@dataclass(frozen=True)
class Expectation:
    """Where the whole 95 % interval of a figure shall lie.

    Attributes:
        above: Strictly; the other two bounds belong to the range.
    """

    figure: str
    above: float | None = None
    at_least: float | None = None
    at_most: float | None = None

    def holds(self, value: float) -> bool:
        """Say whether one number lies within the bounds."""
        return (
            isfinite(value)
            and (self.above is None or value > self.above)
            and (self.at_least is None or value >= self.at_least)
            and (self.at_most is None or value <= self.at_most)
        )

    def verdict(self, summary: Summary) -> str:
        """Return "met", "met in the mean only" or "not met".

        >>> Expectation("gain", above=0).verdict(Summary.of((1.0, 2.0, 0.5)))
        'met in the mean only'
        """
        if all(self.holds(v) for v in (summary.low, summary.value, summary.high)):
            return "met"
        return "met in the mean only" if self.holds(summary.value) else "not met"

    def __str__(self) -> str:
        bounds = (("above", self.above), ("at least", self.at_least), ("at most", self.at_most))
        return " and ".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None)


@dataclass(frozen=True)
class Summary:
    """A figure over its seeds: the mean and Student's 95 % interval of the mean."""

    values: tuple[float, ...]
    value: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        low, high = of_mean(torch.tensor(values, dtype=torch.float64))
        return cls(tuple(values), sum(values) / len(values), low, high)


@dataclass(frozen=True)
class Experiment:
    """What is measured, and what is expected of it.

    Attributes:
        claim: What the figures shall show, in a sentence.
        recipe: What was done, in words; the fields of ``measure`` are the exact form of it.
        source: Where the expectation comes from, and whether a published figure was read there.
        num_seeds: Fewer than are asked for, where nothing is random or a run takes too long; None
            for all.
    """

    name: str
    claim: str
    measure: Measure
    recipe: str
    source: str
    expectations: tuple[Expectation, ...]
    num_seeds: int | None = None

    def seeds(self, asked: int) -> tuple[int, ...]:
        return tuple(range(FIRST_SEED, FIRST_SEED + min(asked, self.num_seeds or asked)))


@dataclass(frozen=True)
class Result:
    """What came of one experiment with one seed, and of which code."""

    experiment: str
    seed: int
    figures: Mapping[str, float]
    notes: Mapping[str, str]
    seconds: float
    finished: str
    code: str
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Done:
    """The folder of finished results."""

    path: Path

    def of(self, experiment: Experiment, seed: int) -> Path:
        """Return where the result of exactly this experiment, file and version is kept."""
        key = fingerprint(experiment.measure, seed, __version__)[:16]
        return self.path / f"{experiment.name}-{seed}-{key}.json"

    def read(self, experiment: Experiment, seed: int) -> Result | None:
        """Return a finished result; None if there is none, or none that can be read."""
        try:
            return Result(**json.loads(self.of(experiment, seed).read_text("utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def measure(self, experiment: Experiment, seed: int) -> Result:
        """Measure with one seed, and write what comes of it."""
        began = time.perf_counter()
        found = experiment.measure(seed)
        result = Result(
            experiment.name,
            seed,
            {k: float(v) for k, v in found.items() if not isinstance(v, str)},
            {k: v for k, v in found.items() if isinstance(v, str)},
            time.perf_counter() - began,
            datetime.now(UTC).isoformat(timespec="seconds"),
            own_code(),
            _versions(),
        )
        write_text(self.of(experiment, seed), json.dumps(asdict(result), indent=1))
        return result


Job = tuple[Experiment, int]


def measure_all(
    jobs: Sequence[Job],
    done: Done,
    *,
    num_processes: int = 2,
    say: Callable[[str], None] = lambda text: None,
) -> dict[Job, str]:
    """Measure what is not done yet; return what failed, and why.

    A job that fails is no reason to leave out the others.
    """
    todo = [job for job in jobs if done.read(*job) is None]
    if len(todo) < len(jobs):
        say(f"{len(jobs) - len(todo)} of {len(jobs)} results are there already")
    failed: dict[Job, str] = {}
    clock = _Clock(todo, num_processes)
    with ProcessPoolExecutor(num_processes, context(), become_worker) as pool:
        running: dict[Future[Result], Job] = {pool.submit(done.measure, *job): job for job in todo}
        try:
            for i, future in enumerate(as_completed(running)):
                job = running[future]
                if (error := future.exception()) is not None:
                    failed[job] = f"{type(error).__name__}: {error}"
                    seconds, what = None, f"failed: {failed[job]}"
                else:
                    seconds = future.result().seconds
                    what = f"{seconds:.0f} s"
                left = clock.left(job, seconds)
                name = f"{job[0].name}, seed {job[1]}"
                say(f"[{i + 1}/{len(todo)}] {name}: {what}; about {left / 60:.0f} min left")
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list((pool._processes or {}).values()):
                process.terminate()
            raise
    return failed


class _Clock:
    """Guesses the time left from what the jobs so far took."""

    def __init__(self, jobs: Sequence[Job], num_processes: int) -> None:
        self.waiting, self.num_processes = list(jobs), num_processes
        self.took: dict[str, list[float]] = {}

    def left(self, job: Job, seconds: float | None) -> float:
        self.waiting.remove(job)
        if seconds is not None:
            self.took.setdefault(job[0].name, []).append(seconds)
        means = {name: sum(s) / len(s) for name, s in self.took.items()}
        usual = sum(means.values()) / len(means) if means else 0.0
        return sum(means.get(e.name, usual) for e, _ in self.waiting) / self.num_processes


def record(
    ledger: str,
    experiments: Sequence[Experiment],
    done: Done,
    *,
    num_seeds: int,
    failed: Mapping[Job, str],
) -> dict[str, Any]:
    """Return all that is known of a ledger's experiments, as JSON."""
    rows, every = [], list[Result]()
    for e in experiments:
        found = [r for s in e.seeds(num_seeds) if (r := done.read(e, s)) is not None]
        every += found
        errors = [why for (other, _), why in failed.items() if other == e]
        rows.append(_row(e, found, num_seeds, errors))
    versions = {k: v for r in every for k, v in r.versions.items()}
    return {
        "schema_version": SCHEMA_VERSION,
        "ledger": ledger,
        "date": max((r.finished for r in every), default=""),
        "seconds": round(sum(r.seconds for r in every), 1),
        "turncoat": __version__,
        "versions": versions,
        "machine": f"{platform.system()} {platform.machine()}, CPU, one thread a process",
        "experiments": rows,
    }


def _row(
    experiment: Experiment, found: Sequence[Result], num_seeds: int, errors: Sequence[str]
) -> dict[str, Any]:
    names = list(found[0].figures) if found else []
    figures = {n: Summary.of([r.figures[n] for r in found]) for n in names}
    missing = len(experiment.seeds(num_seeds)) - len(found)
    judged = []
    for e in experiment.expectations:
        verdict = e.verdict(figures[e.figure]) if e.figure in figures else "not run"
        if missing and found:
            verdict += f" ({missing} seeds are missing)"
        judged.append({"figure": e.figure, "expected": str(e), "verdict": verdict})
    return {
        "name": experiment.name,
        "claim": experiment.claim,
        "recipe": experiment.recipe,
        "exactly": re.sub(r"<function (\w+) at \w+>", r"\1", repr(experiment.measure)),
        "source": experiment.source,
        "seeds": [r.seed for r in found],
        "figures": {n: asdict(s) for n, s in figures.items()},
        "notes": {k: v for r in found for k, v in r.notes.items()},
        "expectations": judged,
        "failures": sorted(set(errors)),
        "seconds": round(sum(r.seconds for r in found), 1),
        "older_code": any(r.code != own_code() for r in found),
    }


def page(known: Mapping[str, Any]) -> str:
    """Return the record as Markdown."""
    return "\n".join(_lines(known)) + "\n"


def _lines(known: Mapping[str, Any]) -> Iterator[str]:
    packages = ", ".join(f"{k} {v}" for k, v in known["versions"].items())
    judged = [x for e in known["experiments"] for x in e["expectations"]]
    met = sum(x["verdict"] == "met" for x in judged)
    yield f"# Reproductions: {known['ledger']}"
    yield ""
    yield (
        f"{met} of {len(judged)} expectations are met. A figure is the mean over its seeds; the "
        "interval is Student's, at 95 %. *Met* means that the whole interval lies where it "
        "should. Written by `make reproduce`: no figure here was typed in."
    )
    yield ""
    yield (
        f"Finished {known['date'] or 'never'}; {_duration(known['seconds'])} in all, "
        "one run after the other; "
        f"{known['machine']}; turncoat {known['turncoat']}, {packages}."
    )
    yield ""
    yield "| experiment | figure | value | 95 % interval | expected | verdict |"
    yield "|---|---|---|---|---|---|"
    for e in known["experiments"]:
        for x in e["expectations"]:
            value, interval = _shown(e["figures"].get(x["figure"]))
            name = x["figure"].replace("_", " ").replace(_GRID, ", ")
            link = f"[{e['name']}](#{e['name']})"
            yield f"| {link} | {name} | {value} | {interval} | {x['expected']} | {x['verdict']} |"
    for e in known["experiments"]:
        yield from _section(e)


def _section(e: Mapping[str, Any]) -> Iterator[str]:
    yield from ("", f"## {e['name']}", "", e["claim"], "", f"- **Recipe.** {e['recipe']}")
    yield f"- **Exactly.** `{e['exactly']}`"
    yield f"- **Expectation.** {e['source']}"
    for name, text in e["notes"].items():
        yield f"- **{name.replace('_', ' ').capitalize()}.** {text}"
    one = len(e["seeds"]) == 1
    said = f"seed {e['seeds'][0]} alone: no interval" if one else f"seeds {e['seeds']}"
    yield f"- **Cost.** {_duration(e['seconds'])}, one run after the other; {said}."
    if e["older_code"]:
        yield "- **Note.** The package's text has changed since some of these runs."
    for why in e["failures"]:
        yield f"- **Failed.** {why}"
    yield from _grids({n: f for n, f in e["figures"].items() if _GRID in n})
    alone = {n: f for n, f in e["figures"].items() if _GRID not in n}
    if alone:
        yield from ("", "| figure | value | 95 % interval | seed by seed |", "|---|---|---|---|")
    for name, figure in alone.items():
        value, interval = _shown(figure)
        each = ", ".join(map(_number, figure["values"])) if len(figure["values"]) > 1 else _NOTHING
        yield f"| {name.replace('_', ' ')} | {value} | {interval} | {each} |"


def _grids(figures: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yield one table for each title of figures that are called "title: row | column"."""
    grids: dict[str, dict[str, dict[str, Mapping[str, Any]]]] = {}
    for name, figure in figures.items():
        head, _, column = name.partition(_GRID)
        title, _, row = head.rpartition(": ")
        grids.setdefault(title, {}).setdefault(row, {})[column] = figure
    for title, rows in grids.items():
        columns = list(dict.fromkeys(c for row in rows.values() for c in row))
        yield from ("", f"| {title} | " + " | ".join(columns) + " |")
        yield "|---|" + "---:|" * len(columns)
        for row, cells in rows.items():
            yield f"| {row} | " + " | ".join(_cell(cells.get(c)) for c in columns) + " |"


def _cell(figure: Mapping[str, Any] | None) -> str:
    value, interval = _shown(figure)
    return value if interval == _NOTHING else f"{value} ({interval})"


def _shown(figure: Mapping[str, Any] | None) -> tuple[str, str]:
    if figure is None:
        return _NOTHING, _NOTHING
    interval = f"{_number(figure['low'])} to {_number(figure['high'])}"
    return _number(figure["value"]), interval if len(figure["values"]) > 1 else _NOTHING


def _number(x: float) -> str:
    """Return a figure as it is read: four decimals below 10, four digits below 1,000.

    >>> [_number(x) for x in (1.42608, 97.672, 240_000.0, 3e-7)]
    ['1.4261', '97.67', '240,000', '0']
    """
    if abs(x) < 10:
        text = f"{x:.4f}".rstrip("0").rstrip(".")
    else:
        text = f"{x:.4g}" if abs(x) < 1_000 else f"{x:,.0f}"
    return ("0" if text == "-0" else text).replace("-", "\N{MINUS SIGN}")


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES}


def main(ledger: str, experiments: Sequence[Experiment], arguments: Sequence[str]) -> int:
    """Measure what is not done yet, and write the table; return 1 if a measurement failed.

    An expectation that is not met is a finding, which the table states, and no failure.
    """
    parser = argparse.ArgumentParser(prog=f"python -m papers.{ledger}")
    parser.add_argument("--only", action="append", metavar="NAME", help="measure only these")
    parser.add_argument("--seeds", type=int, default=5, help="how many seeds (5)")
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread each (2)")
    asked = parser.parse_args(arguments)
    names = [e.name for e in experiments]
    for name in asked.only or ():
        if name not in names:
            parser.error(f"there is no experiment {name!r}; {nearest(name, names)}")
    try:
        at_least(1, "papers", seeds=asked.seeds, jobs=asked.jobs)
    except ValueError as error:
        parser.error(str(error))
    chosen = [e for e in experiments if asked.only is None or e.name in asked.only]
    jobs = [(e, seed) for e in chosen for seed in e.seeds(asked.seeds)]
    done = Done(HERE / ".done")
    try:
        failed = measure_all(
            jobs,
            done,
            num_processes=asked.jobs,
            say=lambda text: print(text, file=sys.stderr, flush=True),
        )
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    known = record(ledger, experiments, done, num_seeds=asked.seeds, failed=failed)
    write_text(HERE / f"{ledger}.json", json.dumps(known, indent=1, ensure_ascii=False) + "\n")
    write_text(HERE / f"{ledger}.md", page(known))
    judged = [(e["name"], x) for e in known["experiments"] for x in e["expectations"]]
    others = [(name, x) for name, x in judged if x["verdict"] != "met"]
    for name, x in others:
        print(f"{name}: {x['figure']} {x['expected']}: {x['verdict']}")
    table = os.path.relpath(HERE / f"{ledger}.md")
    print(f"{len(judged) - len(others)} of {len(judged)} expectations are met: see {table}")
    return int(bool(failed))

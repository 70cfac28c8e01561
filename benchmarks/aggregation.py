"""How fast the server's rules are, and what memory they take, beside byzfl's and Flower's.

Every contender has a process of its own, and all read the same matrix in shared memory. They take
turns, one call each, as do one read of the matrix and one Gram product: so ratios are of calls that
were made side by side. The first call of each is left out. Between two calls there is a pause: the
threads of a library spin on for a while after its call, on the cores of whoever is next.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import multiprocessing
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import MISSING, dataclass, fields
from datetime import date
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.federation import AGGREGATION, PAGE, ROOT, load, machine, write_part
from turncoat.columns import num_cores
from turncoat.messages import Clear, Update
from turncoat.parts import PARTS
from turncoat.randomness import Randomness
from turncoat.stage import Memory, Trace, Verdict, asks, call
from turncoat.stages.aggregate.arc import ARC
from turncoat.stages.aggregate.bucketing import Bucketing
from turncoat.stages.aggregate.bulyan import Bulyan
from turncoat.stages.aggregate.coordinatewise import MeaMed, Median, TrimmedMean
from turncoat.stages.aggregate.geometric_median import GeometricMedian
from turncoat.stages.aggregate.krum import Krum, MultiKrum
from turncoat.stages.aggregate.mean import Mean
from turncoat.stages.aggregate.nearest_neighbour_mixing import NNM

SIZES = ((50, 100_000), (100, 1_000_000))
PROMISED_AT = (100, 1_000_000)
OURS, NUMPY, TORCH, FLOWER = "Turncoat", "byzfl on NumPy", "byzfl on torch", "Flower"
READ, GRAM = "one read of the matrix", "one Gram product"
MOST_BYTES = 4 << 30  # that a peer may take: more is not tried
BYZFL = "byzfl==0.0.11"
PAUSE = 0.3  # seconds
_TOO_LONG = "took more than {} s"


@dataclass(frozen=True)
class Target:
    """What is promised: at most ``most`` times the time of another contender, or of a floor."""

    of: str
    most: float


RULES: dict[str, Callable[[int], Any]] = {
    "mean": lambda f: Mean(),
    "median": lambda f: Median(),
    "trimmed mean": lambda f: TrimmedMean(f),
    "mean around median": lambda f: MeaMed(f),
    "Krum": lambda f: Krum(f),
    "Multi-Krum": lambda f: MultiKrum(f),
    "Bulyan": lambda f: Bulyan(f),
    "geometric median": lambda f: GeometricMedian(),
    "NNM, then the first": lambda f: NNM(_First(), f),
    "bucketing, then the first": lambda f: Bucketing(_First()),
    "ARC, then the first": lambda f: ARC(_First(), f),
}
PEERS = "the fastest peer"
TARGETS: dict[str, tuple[Target, ...]] = {
    "mean": (Target(READ, 1.5),),
    "median": (Target(PEERS, 1 / 5),),
    "trimmed mean": (Target(PEERS, 1.0),),
    "Krum": (Target(GRAM, 1.5),),
    "Multi-Krum": (Target(GRAM, 1.5),),
    "Bulyan": (Target(FLOWER, 1 / 20),),
    "NNM, then the first": (Target(GRAM, 4.0),),
}
MOST_MEMORY = 1.5  # matrices, beyond what the matrix takes

_IN_BYZFL: dict[str, Callable[[Any, int], Any]] = {
    "mean": lambda b, f: b.Average(),
    "median": lambda b, f: b.Median(),
    "trimmed mean": lambda b, f: b.TrMean(f),
    "mean around median": lambda b, f: b.Meamed(f),
    "Krum": lambda b, f: b.Krum(f),
    "Multi-Krum": lambda b, f: b.MultiKrum(f),
    "geometric median": lambda b, f: b.GeometricMedian(),
    "NNM, then the first": lambda b, f: b.NNM(f),
    "bucketing, then the first": lambda b, f: b.Bucketing(2),
    "ARC, then the first": lambda b, f: b.ARC(f),
}
_IN_FLOWER: dict[str, Callable[[Any, Any, int], Any]] = {
    "mean": lambda a, sent, f: a.aggregate(sent),
    "median": lambda a, sent, f: a.aggregate_median(sent),
    "trimmed mean": lambda a, sent, f: a.aggregate_trimmed_avg(sent, f / len(sent) + 1e-9),
    "Krum": lambda a, sent, f: a.aggregate_krum(sent, f, 0),
    "Multi-Krum": lambda a, sent, f: a.aggregate_krum(sent, f, len(sent) - f),
    "Bulyan": lambda a, sent, f: a.aggregate_bulyan(sent, f, a.aggregate_krum, to_keep=0),
}


_GIVEN = {"num_byzantine": 1, "num_trimmed": 1, "inner": Mean(), "max_norm": 1.0}


class _First:
    """The rule inside a pre-aggregation: takes no time."""

    def __call__(self, messages: Sequence[Clear], *_: Any, **__: Any) -> Tensor:
        return messages[0].delta


def others() -> dict[str, Callable[[int], Any]]:
    """Return the rules that configs know, beyond those named here, where a size alone makes one."""
    known = {type(make(0)).__name__ for make in RULES.values()}
    found: dict[str, Callable[[int], Any]] = {}
    for name, place in PARTS["stage"].items():
        module, _, called = place.partition(":")
        if ".aggregate." not in module or module.endswith("optimisers") or called in known:
            continue
        cls = getattr(importlib.import_module(module), called)
        due = [x.name for x in fields(cls) if x.default is MISSING and x.default_factory is MISSING]
        if set(due) <= set(_GIVEN) and not asks(cls.__call__)[0] & {"model", "public"}:

            def make(f: int, cls: Any = cls, due: Sequence[str] = due) -> Any:
                return cls(**{k: f if k.startswith("num_") else _GIVEN[k] for k in due})

            with suppress(ValueError, TypeError):
                make(1)
                found[name] = make
    return found


def of_byzfl() -> Any:
    """Return byzfl's aggregators, without its federations, which import torchvision."""
    if "byzfl.aggregators" in sys.modules:
        return sys.modules["byzfl.aggregators"]
    spec = importlib.util.find_spec("byzfl")
    if spec is None:
        raise ImportError(f"pip install --no-deps {BYZFL}")
    bare = ModuleType("byzfl")
    bare.__path__ = list(spec.submodule_search_locations or [])
    sys.modules["byzfl"] = bare
    return importlib.import_module("byzfl.aggregators")


def prepared(library: str, rule: str, matrix: Tensor, f: int) -> Callable[[], Any]:
    """Return one call of a rule of a library; its input is made ready before."""
    if library == OURS:
        made, sent = (RULES | others())[rule](f), [Update(row, 1.0) for row in matrix]
        before, rng = torch.zeros_like(matrix[0]), Randomness(0).at("aggregate")

        def ours() -> Any:
            return call(
                made,
                sent,
                rng=rng,
                memory=Memory[Any](),
                before=before,
                cohort=tuple(range(len(sent))),
                trace=Trace(),
                verdict=Verdict(),
            )

        return ours
    if library == FLOWER:
        flower = importlib.import_module("flwr.server.strategy.aggregate")
        rows = matrix.numpy()
        return lambda: _IN_FLOWER[rule](flower, [([row], 1) for row in rows], f)
    theirs = _IN_BYZFL[rule](of_byzfl(), f)
    given: Any = matrix if library == TORCH else matrix.numpy()
    if rule.startswith("ARC"):  # it edits what it is given
        given = given.clone() if library == TORCH else given.copy()
    return lambda: theirs(given)


def absent(library: str, rule: str, n: int, d: int, f: int) -> str | None:
    """Return why a peer cannot take part, if it cannot."""
    if library in (NUMPY, TORCH) and rule.startswith("NNM"):
        need = n * (n - f) * d * 4
        if need > MOST_BYTES:
            return f"gathers all neighbours of all at once: {need / 1e9:.0f} GB"
    return None


@dataclass(frozen=True)
class Call:
    """What one call took: on the clock, on the cores, and beyond what its process held before."""

    seconds: float
    core_seconds: float
    peak_bytes: int | None


class Caller:
    """A contender in a process of its own that waits for the word."""

    def __init__(self, library: str, rule: str, file: Path, n: int, d: int, f: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        args = (library, rule, file, n, d, f, theirs)
        self._process = spawn.Process(target=_serve, args=args, daemon=True)
        self._process.start()
        theirs.close()

    def call(self, limit_seconds: float) -> list[Call] | str:
        """Return what its calls took, or why there are none."""
        try:
            self._pipe.send(None)
            if not self._pipe.poll(limit_seconds):
                return _TOO_LONG.format(f"{limit_seconds:.0f}")
            answer: list[Call] | str = self._pipe.recv()
        except (EOFError, BrokenPipeError):
            return "ended early"
        return answer

    def end(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()


def _serve(library: str, rule: str, file: Path, n: int, d: int, f: int, pipe: Connection) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(num_cores())
    matrix = torch.from_file(str(file), shared=True, size=n * d).view(n, d)
    matrix.sum()  # from here on it is in memory
    try:
        if library == READ:
            made: list[Callable[[], Any]] = [lambda: matrix.sum(), lambda: matrix @ matrix.T]
        else:
            made = [prepared(library, rule, matrix, f)]
    except Exception as error:
        pipe.recv()
        pipe.send(f"{type(error).__name__}: {error}")
        return
    while True:
        try:
            pipe.recv()
            pipe.send([_timed(one, rested=i == 0) for i, one in enumerate(made)])
        except EOFError:
            return
        except Exception as error:
            pipe.send(f"{type(error).__name__}: {error}")


def _timed(one: Callable[[], Any], rested: bool) -> Call:
    if not rested:  # as all others are when it is their turn
        time.sleep(PAUSE)
    held = _reset_peak()
    began, worked = time.perf_counter(), time.process_time()
    answer = one()
    seconds, core_seconds = time.perf_counter() - began, time.process_time() - worked
    del answer
    return Call(seconds, core_seconds, None if held is None else max(_status("VmHWM") - held, 0))


def _reset_peak() -> int | None:
    """Let the peak begin where the process is now; return that, or None if nobody tells."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:
        return None


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


@dataclass(frozen=True)
class Row:
    """The calls of one rule by contender, turn by turn; or why there are none."""

    rule: str
    calls: Mapping[str, Sequence[Call]]
    absent: Mapping[str, str]

    def ratio(self, of: str) -> float | None:
        """Return our time over that of another: the median over the turns."""
        if of == PEERS:
            ratios = [r for p in (NUMPY, TORCH, FLOWER) if (r := self.ratio(p)) is not None]
            return max(ratios, default=None)
        if of not in self.calls or OURS not in self.calls:
            return None
        pairs = zip(self.calls[OURS], self.calls[of], strict=True)
        return median(ours.seconds / theirs.seconds for ours, theirs in pairs)

    def work(self, of: str) -> float | None:
        """Return our core-seconds over those of another, at their best."""
        if of == PEERS:
            ratios = [r for p in (NUMPY, TORCH, FLOWER) if (r := self.work(p)) is not None]
            return max(ratios, default=None)
        if of not in self.calls or OURS not in self.calls:
            return None
        best = [min(c.core_seconds for c in self.calls[name]) for name in (OURS, of)]
        return best[0] / best[1] if best[1] else None

    def outlasted(self, name: str) -> float | None:
        """Return the seconds that another was given, if it needed more."""
        found = re.fullmatch(_TOO_LONG.replace("{}", r"(\d+)"), self.absent.get(name, ""))
        return float(found[1]) if found else None

    def milliseconds(self, name: str) -> float:
        return 1e3 * median(c.seconds for c in self.calls[name])


def measured(rule: str, n: int, d: int, file: Path, repeats: int, limit: float) -> Row:
    """Let all contenders of a rule take turns."""
    f = n // 5
    calls: dict[str, list[Call]] = {}
    missing: dict[str, str] = {}
    with ExitStack() as stack:
        callers: dict[str, Caller] = {}
        for library in (READ, OURS, NUMPY, TORCH, FLOWER):
            if library in (NUMPY, TORCH) and rule not in _IN_BYZFL:
                continue
            if library == FLOWER and rule not in _IN_FLOWER:
                continue
            if reason := absent(library, rule, n, d, f):
                missing[library] = reason
                continue
            callers[library] = Caller(library, rule, file, n, d, f)
            stack.callback(callers[library].end)
        for turn in range(repeats + 1):
            for library, caller in list(callers.items()):
                time.sleep(PAUSE)
                answer = caller.call(limit + (30 if turn == 0 else 0))
                if isinstance(answer, str):
                    missing[library] = answer
                    calls.pop(library, None)
                    del callers[library]
                elif turn:  # the first warms up
                    for name, one in zip((library, GRAM), answer, strict=False):
                        calls.setdefault(name, []).append(one)
    return Row(rule, calls, missing)


def table(rows: Sequence[Row], n: int, d: int) -> list[str]:
    """Return the rows of one size as lines of Markdown."""
    libraries = (OURS, NUMPY, TORCH, FLOWER)
    floors = [
        f"{name} takes {median(r.milliseconds(name) for r in rows):,.1f} ms"
        for name in (READ, GRAM)
    ]
    lines = [
        f"### {n} clients, {d:,} parameters",
        "",
        f"Of {n} messages {n // 5} may be forged. The matrix is {n * d * 4 / 1e6:,.0f} MB; "
        f"{', '.join(floors)}.",
        "",
        "| rule | "
        + " | ".join(f"{name}, ms" for name in libraries)
        + " | reads | Gram products | extra memory, matrices |",
        "|---|" + "---:|" * (len(libraries) + 3),
    ]
    for row in rows:
        cells = []
        for name in libraries:
            if name in row.calls:
                cells.append(f"{row.milliseconds(name):,.1f}")
            else:
                cells.append("not run" if name in row.absent else "-")
        peaks = [c.peak_bytes for c in row.calls.get(OURS, ()) if c.peak_bytes is not None]
        for floor in (READ, GRAM):
            ratio = row.ratio(floor)
            cells.append("-" if ratio is None else f"{ratio:.2f}")
        cells.append(f"{max(peaks) / (n * d * 4):.2f}" if peaks else "-")
        lines.append(f"| {row.rule} | " + " | ".join(cells) + " |")
    lines.append("")
    for row in rows:
        for library, reason in row.absent.items():
            lines.append(f"- {row.rule}, {library}: {reason}.")
    return [*lines, *promises(rows, n, d), ""]


def promises(rows: Sequence[Row], n: int, d: int) -> list[str]:
    """Return which promises were met, for the size that they are made for."""
    lines = []
    for row in rows if (n, d) == PROMISED_AT else ():
        for target in TARGETS.get(row.rule, ()):
            ratio = row.ratio(target.of)
            if ratio is not None:
                verdict = "met" if ratio <= target.most else "missed"
                lines.append(
                    f"- {row.rule}: {ratio:.3f} times {target.of}; at most {target.most:.3f} is "
                    f"promised: {verdict}. By core-seconds it is {row.work(target.of) or 0:.3f}."
                )
            elif (least := row.outlasted(target.of)) and OURS in row.calls:
                most = row.milliseconds(OURS) / 1e3 / least
                verdict = "met" if most <= target.most else "not known"
                lines.append(
                    f"- {row.rule}: less than {most:.3f} times {target.of}, which was ended after "
                    f"{least:.0f} s; at most {target.most:.3f} is promised: {verdict}."
                )
    for row in rows if (n, d) == PROMISED_AT else ():
        peaks = [c.peak_bytes for c in row.calls.get(OURS, ()) if c.peak_bytes is not None]
        if peaks and max(peaks) > MOST_MEMORY * n * d * 4:
            lines.append(f"- {row.rule}: more memory than the promised {MOST_MEMORY} matrices.")
    return lines


def measure(
    names: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    repeats: int,
    limit: float,
    say: Callable[[str], None],
) -> list[str]:
    """Return the tables as lines of Markdown."""
    before, busy = load(), os.getloadavg()[0] > 0.5
    tables = []
    for n, d in sizes:
        with TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
            file = Path(name) / "matrix"
            matrix = np.random.default_rng(0).standard_normal((n, d), dtype=np.float32)
            matrix.tofile(file)
            del matrix
            rows = []
            for rule in names:
                say(f"{rule}, {n} x {d:,} ...")
                rows.append(measured(rule, n, d, file, repeats, limit))
            tables += table(rows, n, d)
    facts = [
        f"- Machine: {machine()}; byzfl {BYZFL.partition('==')[2]}.",
        f"- Calls of each contender, in turns: {repeats}, after 1 to warm up; medians.",
        f"- Load (1, 5, 15 minutes) before: {before}; after: {load()}.",
    ]
    if busy:
        facts.append("- The machine was busy with other work: times say little, ratios more.")
    return [*facts, "", *tables]


PREFACE = f"""{AGGREGATION}

How fast the server's rules are, and what memory they take beyond the matrix of all updates. `make
bench` prints these tables; `python -m benchmarks.aggregation --write` puts them here.

Every contender has a process of its own and as many threads as there are cores; all read one matrix
of noise in shared memory, and take turns, as do *one read of the matrix* (its sum) and *one Gram
product* (in float32, by torch). Ratios are medians of the ratios within a turn; core-seconds, those
of all threads of the best call, change least on a busy machine.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aggregation", description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="timed calls each")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds that a call may take")
    parser.add_argument("--quick", action="store_true", help="the smaller size alone, 3 calls each")
    parser.add_argument("--rules", nargs="+", metavar="RULE", help="these alone")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(ROOT)}")
    chosen = parser.parse_args(arguments)
    if chosen.repeats < 1:
        parser.error(f"--repeats must be at least 1; it is {chosen.repeats}")
    known = RULES | others()
    if unknown := set(chosen.rules or ()) - set(known):
        parser.error(
            f"no rule is called {', '.join(sorted(unknown))}: there are {', '.join(known)}"
        )
    lines = measure(
        chosen.rules or list(known),
        SIZES[:1] if chosen.quick else SIZES,
        min(chosen.repeats, 3) if chosen.quick else chosen.repeats,
        chosen.limit,
        lambda said: print(said, file=sys.stderr),
    )
    print("\n".join(lines))
    if chosen.write:
        command = " ".join(["python -m benchmarks.aggregation", *(arguments or sys.argv[1:])])
        head = f"## {date.today().isoformat()}: `{command}`"
        write_part(AGGREGATION, "\n".join([PREFACE, head, "", *lines]))


if __name__ == "__main__":
    main()

"""How fast a federated round is, and how memory grows with the clients: ``make bench``.

Contenders live side by side and take turns, one round each, so that whatever else the machine does
falls on all of them alike. Start-up and the first round are left out.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from multiprocessing.connection import Connection, wait
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import save_file

from benchmarks.contenders import NET, Contender, Flower, Loop, Turncoat, Work

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
PARTS = FEDERATION, AGGREGATION, INVERSION, PRIVATE = (
    "# Benchmarks",
    "# Aggregation rules",
    "# Inversion",
    "# Private training",
)
NUM_EXAMPLES = 60_000  # all of MNIST's training set
WARM_UP = 1  # rounds that nobody times: workers start in them
NEVER_PLAYED = 1  # the last one

PLAIN, BARE = "plain PyTorch loop", "two bare loops, two processes"
ONE, TWO = "Turncoat, 1 process", "Turncoat, 2 processes"
FLOWER = "Flower's simulation, 2 processes"


@dataclass(frozen=True)
class Target:
    """A promise: ``fast`` does at least ``factor`` times the rounds of ``slow``."""

    fast: str
    slow: str
    factor: float


@dataclass(frozen=True)
class Race:
    """Clients, their examples, and what is promised for them."""

    num_clients: int
    num_examples: int
    targets: tuple[Target, ...]


RACES = (
    Race(20, 600, (Target(TWO, BARE, 1 / 1.05), Target(TWO, FLOWER, 1.5))),
    Race(200, 60, (Target(TWO, BARE, 1 / 1.05), Target(TWO, FLOWER, 5.0))),
)


class ContenderBroke(RuntimeError):
    """A contender ended before its last round."""


@dataclass(frozen=True, slots=True)
class Round:
    """What one round took: on the clock, and on the cores, those of all its processes added."""

    seconds: float
    core_seconds: float


class Racer:
    """A contender in processes of its own that wait for the word."""

    def __init__(self, name: str, parts: Sequence[Contender], work: Work, logs: Path) -> None:
        self.name = name
        self._log = logs / f"{name}.log"
        self._log.touch()
        self._parts: list[tuple[multiprocessing.process.BaseProcess, Connection]] = []
        spawn = multiprocessing.get_context("spawn")
        for part in parts:
            mine, theirs = spawn.Pipe()
            process = spawn.Process(target=_take_part, args=(part, work, theirs, self._log))
            process.start()
            theirs.close()
            self._parts.append((process, mine))
        self._await()

    @property
    def pids(self) -> list[int]:
        return [process.pid for process, _ in self._parts if process.pid is not None]

    def round(self) -> Round:
        """Let it play one round, until its last part is done."""
        before, began = _core_seconds(self.pids), time.perf_counter()
        for _, pipe in self._parts:
            pipe.send(None)
        self._await()
        seconds = time.perf_counter() - began
        return Round(seconds, _core_seconds(self.pids) - before)

    def end(self) -> None:
        for process, pipe in self._parts:
            pipe.close()  # whoever still waits for the word gets EOFError, and leaves
            process.join(30)
            if process.is_alive():
                process.kill()
                process.join()

    def _await(self) -> None:
        left = {pipe for _, pipe in self._parts}
        while left:
            for ready in wait(list(left)):
                assert isinstance(ready, Connection)
                try:
                    ready.recv()
                except EOFError:
                    said = self._log.read_text(errors="replace").strip()
                    raise ContenderBroke(f"{self.name} ended early:\n{said[-2000:]}") from None
                left.remove(ready)


def _take_part(contender: Contender, work: Work, pipe: Connection, log: Path) -> None:
    with log.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())

    def turn() -> None:
        pipe.send(None)
        pipe.recv()

    with suppress(EOFError):
        contender(work, turn)


@contextmanager
def racing(
    contenders: Mapping[str, Sequence[Contender]], work: Work, logs: Path
) -> Iterator[list[Racer]]:
    """Start all, play the rounds that warm them up, and end them."""
    with ExitStack() as stack:
        racers = []
        for name, parts in contenders.items():
            racers.append(Racer(name, parts, work, logs))
            stack.callback(racers[-1].end)
        for racer in racers:
            for _ in range(WARM_UP):
                racer.round()
        yield racers


def race(
    contenders: Mapping[str, Sequence[Contender]], work: Work, logs: Path
) -> dict[str, list[Round]]:
    """Return every timed round; each repetition begins with another contender."""
    rounds: dict[str, list[Round]] = {name: [] for name in contenders}
    with racing(contenders, work, logs) as racers:
        for repeat in range(work.num_rounds - WARM_UP - NEVER_PLAYED):
            first = repeat % len(racers)
            for racer in racers[first:] + racers[:first]:
                rounds[racer.name].append(racer.round())
    return rounds


def gain(rounds: Mapping[str, Sequence[Round]], fast: str, slow: str) -> float:
    """Return how many rounds ``fast`` plays for one of ``slow``: the median of paired ratios."""
    pairs = zip(rounds[fast], rounds[slow], strict=True)
    return median(s.seconds / f.seconds for f, s in pairs)


def cheaper(rounds: Mapping[str, Sequence[Round]], fast: str, slow: str) -> float:
    """Return how many times the core-seconds of ``fast`` a round of ``slow`` takes."""
    taken = [median(r.core_seconds for r in rounds[name]) for name in (slow, fast)]
    return taken[0] / taken[1] if taken[1] else float("nan")


class Memory:
    """Watches the memory of a tree of processes: what they share is counted once.

    Attributes:
        peak: The largest sum of proportional set sizes seen, in bytes.
    """

    def __init__(self, roots: Sequence[int], every_seconds: float = 0.05) -> None:
        self.peak = 0
        self._roots, self._every = roots, every_seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.peak = max(self.peak, sum(map(_held, _tree(self._roots))))
            if self._stop.wait(self._every):
                return


def _tree(roots: Sequence[int]) -> set[int]:
    """Return the processes that descend from some, and those themselves."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    tree, left = set(roots), list(roots)
    while left:
        born = children.get(left.pop(), [])
        left += born
        tree.update(born)
    return tree


def _core_seconds(roots: Sequence[int]) -> float:
    """Return what a tree of processes has computed so far; 0 where there is no /proc."""
    if not Path("/proc/self/stat").exists():
        return 0.0
    ticks = 0
    for pid in _tree(roots):
        with suppress(OSError):
            stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(stat[11]) + int(stat[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _held(pid: int) -> int:
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


@dataclass(frozen=True)
class Scale:
    """What a round of so many clients takes: seconds, and bytes in all processes at their peak."""

    num_clients: int
    seconds: float
    peak: int | None


def scale(num_clients: int, num_examples: int, rounds: int, examples: Path, logs: Path) -> Scale:
    work = Work(examples, num_clients, num_examples, rounds + WARM_UP + NEVER_PLAYED)
    racer = Racer(f"{num_clients} clients", [Turncoat(2)], work, logs)
    watched = Path("/proc/self/smaps_rollup").exists()
    try:
        with Memory(racer.pids if watched else []) as memory:
            for _ in range(WARM_UP):
                racer.round()
            seconds = median(racer.round().seconds for _ in range(rounds))
    finally:
        racer.end()
    return Scale(num_clients, seconds, memory.peak if watched else None)


def examples(folder: Path) -> str:
    """Write 60,000 examples to ``folder``; return what they are."""
    home = Path(os.environ.get("TURNCOAT_DATA") or ROOT.parent / "shared" / "data")
    if (home / "mnist").exists():
        from turncoat.tasks.fetched import mnist

        inputs, labels = mnist(1, public_size=0, data=str(home)).clients[0]
        said = "MNIST"
    else:
        rng = torch.Generator().manual_seed(0)
        inputs = torch.rand(NUM_EXAMPLES, 1, 28, 28, generator=rng)
        labels = torch.randint(10, (NUM_EXAMPLES,), generator=rng)
        said = f"noise in the shape of MNIST, for there is no {home.name}/mnist"
    save_file({"inputs": inputs, "labels": labels}, folder / "examples.safetensors")
    return said


def no_flower() -> str | None:
    """Return why Flower's simulation cannot take part, if it cannot."""
    lacking = [name for name in ("flwr", "ray") if find_spec(name) is None]
    if lacking:
        return f"{' and '.join(lacking)} not installed: pip install -e '.[ray]'"
    return None


def write_part(heading: str, text: str) -> None:
    """Replace one benchmark's part of the page; those of the others stay."""
    page = PAGE.read_text() if PAGE.exists() else ""
    held = {h: re.search(rf"^{h}$.*?(?=^# |\Z)", page, re.MULTILINE | re.DOTALL) for h in PARTS}
    parts = {h: found.group(0) for h, found in held.items() if found} | {heading: text}
    PAGE.write_text("\n\n".join(parts[h].strip() for h in PARTS if h in parts) + "\n")


def machine() -> str:
    def of(package: str) -> str:
        with suppress(PackageNotFoundError):
            return f", {package} {version(package)}"
        return ""

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        f"{cores} cores ({platform.machine()}), Python {platform.python_version()}, "
        f"torch {torch.__version__}{of('flwr')}{of('ray')}"
    )


def load() -> str:
    return ", ".join(f"{number:.1f}" for number in os.getloadavg())


def race_table(race: Race, work: Work, rounds: Mapping[str, Sequence[Round]]) -> list[str]:
    lines = [
        f"### {race.num_clients} clients x {race.num_examples} examples",
        "",
        f"{work.steps} client steps a round.",
        "",
        "| | client steps / s | seconds a round | fastest - slowest | core-seconds | "
        "against the plain loop |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, played in rounds.items():
        seconds = [r.seconds for r in played]
        lines.append(
            f"| {name} | {work.steps / median(seconds):,.0f} | {median(seconds):.3f} | "
            f"{min(seconds):.3f} - {max(seconds):.3f} | "
            f"{median(r.core_seconds for r in played):.2f} | {gain(rounds, name, PLAIN):.2f} |"
        )
    lines.append("")
    for t in race.targets:
        if t.fast in rounds and t.slow in rounds:
            reached = gain(rounds, t.fast, t.slow)
            work_saved = cheaper(rounds, t.fast, t.slow)
            lines.append(
                f"- {t.fast}, against {t.slow}: {reached:.2f} times as fast; {t.factor:.2f} is "
                f"promised: {'met' if reached >= t.factor else 'missed'}. By core-seconds it is "
                f"{work_saved:.2f}."
            )
    return [*lines, ""]


def scale_table(scales: Sequence[Scale], num_examples: int) -> list[str]:
    lines = [
        f"### All of n clients sampled, {num_examples} examples each, 2 processes",
        "",
        "| clients | seconds a round | milliseconds a client | peak memory, MB |",
        "|---:|---:|---:|---:|",
    ]
    for s in scales:
        held = "no /proc here" if s.peak is None else f"{s.peak / 1e6:,.0f}"
        lines.append(
            f"| {s.num_clients:,} | {s.seconds:.3f} | {1e3 * s.seconds / s.num_clients:.2f} | "
            f"{held} |"
        )
    return [*lines, ""]


def measure(repeats: int, quick: bool, with_flower: bool, say: Callable[[str], None]) -> list[str]:
    """Return the tables as lines of Markdown."""
    absent = no_flower() if with_flower else "left out, as --no-flower asks"
    contenders: dict[str, Sequence[Contender]] = {
        PLAIN: [Loop()],
        BARE: [Loop(0, 2), Loop(1, 2)],
        ONE: [Turncoat(1)],
        TWO: [Turncoat(2)],
    }
    if absent is None:
        contenders[FLOWER] = [Flower(2)]
    before, busy = load(), os.getloadavg()[0] > 0.5
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        said = examples(folder)
        held = folder / "examples.safetensors"
        tables = []
        for r in RACES:
            say(f"{r.num_clients} clients x {r.num_examples}: {repeats} rounds each ...")
            work = Work(held, r.num_clients, r.num_examples, repeats + WARM_UP + NEVER_PLAYED)
            tables += race_table(r, work, race(contenders, work, folder))
        scales = []
        num_examples = 6
        for num_clients in (10, 100, 1_000) if quick else (10, 100, 1_000, 10_000):
            say(f"{num_clients:,} clients x {num_examples} ...")
            rounds = 1 if quick or num_clients > 1_000 else 3
            scales.append(scale(num_clients, num_examples, rounds, held, folder))
        tables += scale_table(scales, num_examples)
    size = sum(p.numel() for p in NET().parameters())
    facts = [
        f"- Machine: {machine()}.",
        f"- Data: {said}; model: LeNet-5, {size:,} parameters.",
        f"- Rounds of each contender, interleaved: {repeats}, after {WARM_UP} to warm up.",
        f"- Load (1, 5, 15 minutes) before: {before}; after: {load()}.",
    ]
    if busy:
        facts.append("- The machine was busy with other work: seconds say little, run it again.")
    if absent is not None:
        facts.append(f"- {FLOWER}: {absent}.")
    return [*facts, "", *tables]


PREFACE = f"""{FEDERATION}

How fast a round is, and what memory it takes. `make bench` prints these tables;
`python -m benchmarks.federation --write` puts them here.

Every contender trains LeNet-5 for one local epoch of plain SGD in batches of 32, in processes of
one thread, on the same examples. All are alive at once and take turns, one round each, so that what
else the machine does falls on all of them alike; start-up and the first round are left out. Seconds
are medians, ratios are medians of the ratios within a turn. A client step is one step of SGD at one
client. Core-seconds are those of all processes of a contender, and change least on a busy machine.

- *plain PyTorch loop*: an `nn.Module` and `torch.optim.SGD`, client after client, in one process.
  Nothing travels, nothing is averaged.
- *two bare loops*: the same with half of the clients each: the floor under any two processes.
- *Turncoat*: FedAvg with `Plain` and `Mean`, sampling, addressed randomness and all checks.
- *Flower's simulation*: FedAvg of Flower on Ray, with two workers that hold the data; a client
  trains by the plain loop, and nothing is evaluated.

Memory is the sum of the proportional set sizes of all Turncoat's processes, so what they share is
counted once. PyTorch itself and the data set are in it: 60,000 examples are 188 MB, of which a run
reads what its clients own.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.federation", description=__doc__)
    parser.add_argument("--repeats", type=int, default=None, help="timed rounds each; 15, quick 3")
    parser.add_argument("--quick", action="store_true", help="3 repeats, at most 1,000 clients")
    parser.add_argument("--no-flower", action="store_true", help="leave Flower's simulation out")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(ROOT)}")
    chosen = parser.parse_args(arguments)
    repeats = chosen.repeats or (3 if chosen.quick else 15)
    if repeats < 1:
        parser.error(f"--repeats must be at least 1; it is {repeats}")
    lines = measure(
        repeats, chosen.quick, not chosen.no_flower, lambda said: print(said, file=sys.stderr)
    )
    print("\n".join(lines))
    if chosen.write:
        command = " ".join(["python -m benchmarks.federation", *(arguments or sys.argv[1:])])
        head = f"## {date.today().isoformat()}: `{command}`"
        write_part(FEDERATION, "\n".join([PREFACE, head, "", *lines]))


if __name__ == "__main__":
    main()

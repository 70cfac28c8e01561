"""The command line. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import IntEnum, StrEnum
from functools import partial
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from turncoat.flower.commands import app as flower_app

if TYPE_CHECKING:
    from turncoat.audit import Event
    from turncoat.plan import Audit, Planned
    from turncoat.trial import Cell


class Exit(IntEnum):
    """What the exit code says."""

    DONE = 0  # every cell is scored or blocked
    CRASHED = 1  # a defect of Turncoat: please report it
    BAD_INPUT = 2  # the command or the file: nothing was computed
    FAILED_CELLS = 3  # done, but some attacks or trainings broke down
    BAD_FOLDER = 4  # the folder or the disk: what is finished is kept
    WORKER_DIED = 5  # a process was killed, as when memory runs out: what is finished is kept
    INTERRUPTED = 130  # Ctrl-C: what is finished is kept


class RunsOn(StrEnum):
    """Who plays the rounds. The bits of the result are the same."""

    SIMULATE = "simulate"
    FLOWER = "flower"
    FLOWER_RAY = "flower-ray"


class DoneBy(StrEnum):
    """Who trains and attacks. The bits of the result are the same."""

    PROCESSES = "processes"
    RAY = "ray"


class Kind(StrEnum):
    ATTACKS = "attacks"
    DEFENCES = "defences"
    TASKS = "tasks"


_CODES = "\n\n".join(
    f"{code.value}: {said}"
    for code, said in {
        Exit.DONE: "every cell is scored or blocked",
        Exit.CRASHED: "a defect of Turncoat",
        Exit.BAD_INPUT: "the command or the file is wrong; nothing was computed",
        Exit.FAILED_CELLS: "done, but some attacks or trainings broke down",
        Exit.BAD_FOLDER: "the folder or the disk cannot be used; what is finished is kept",
        Exit.WORKER_DIED: "a process was killed, as when memory runs out; what is finished is kept",
        Exit.INTERRUPTED: "Ctrl-C; what is finished is kept",
    }.items()
)

app = typer.Typer(
    help="Attack and defend federated learning; measure who can still do what.",
    epilog=f"Exit codes:\n\n{_CODES}",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(flower_app, name="flower")
# a terminal's lines are broken at words; whoever reads a pipe gets them whole
out, err = (
    Console(stderr=e, highlight=False, emoji=False, soft_wrap=not s.isatty())
    for e, s in ((False, sys.stdout), (True, sys.stderr))
)

File = Annotated[
    str | None,
    typer.Argument(help="A TOML file, or the name of an audit that comes along; without: digits."),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a key of the file: rounds=5, attack.lira.num_shadows=8."),
]
Variant = Annotated[
    str | None, typer.Option(help="Of a file with tables \\[variant.NAME]: only this one.")
]
Seeds = Annotated[int | None, typer.Option(min=1, help="Audit so many seeds, from 0 on.")]


@app.command()
def audit(
    file: File = None,
    folder: Annotated[
        Path | None, typer.Option("--out", help="Where to keep it; audits/NAME without.")
    ] = None,
    seeds: Seeds = None,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Processes of one thread each; all cores, or CPUs, without."),
    ] = None,
    settings: Set = None,
    variant: Variant = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    update: Annotated[
        bool, typer.Option("--update", help="Go on in a folder that holds another audit.")
    ] = False,
    runtime: Annotated[
        RunsOn, typer.Option(help="Who plays the rounds; Flower gives the same bits.")
    ] = RunsOn.SIMULATE,
    executor: Annotated[
        DoneBy, typer.Option(help="Who trains and attacks: processes here, or a Ray cluster.")
    ] = DoneBy.PROCESSES,
    address: Annotated[
        str | None,
        typer.Option(
            help="Of the Ray cluster: auto (the one that runs here; without), host:6379, "
            "ray://host:10001, or local, which starts one here."
        ),
    ] = None,
) -> None:
    """Play every attack against every defence, and write a report.

    What is finished is kept: the same command goes on where it stopped.
    """
    with _errors_in_words():
        path = _file(file)
        all_wanted = _load(path, settings, seeds, variant)
        _check_device(device)
        crew = _executor(executor, address, jobs, runtime, device)
        where, failed = folder or Path("audits") / path.stem, False
        how = {
            "num_jobs": 1 if runtime is RunsOn.FLOWER_RAY else jobs or _cores(),
            "device": device,
            "runtime": _runtime(runtime, jobs or _cores()),
            "executor": crew,
            "update": update,
            "command": shlex.join(["turncoat", *sys.argv[1:]]),
        }
        for name, wanted in all_wanted.items():
            failed |= _audited(wanted, where / name, how)
        if any(all_wanted):
            _overview(where)
        if failed:
            raise typer.Exit(Exit.FAILED_CELLS)


def _audited(wanted: Audit, where: Path, how: Mapping[str, Any]) -> bool:
    """Run one audit and say what came of it; return whether something broke down."""
    from turncoat.audit import run_audit
    from turncoat.record import FolderUnusable, num_left_out

    out.print(f"[bold]{escape(wanted.title)}[/bold]")
    try:
        with _progress() as on_event:
            cells = run_audit(wanted, where, on_event=on_event, **how)
        page = _report(where)
    except FolderUnusable:
        raise
    except OSError as error:
        raise FolderUnusable(
            f"cannot write to {where}: {error.strerror or error}: make room, or choose another "
            "--out; what is finished is kept, and the same command goes on"
        ) from error
    failed = _failures(cells)
    for why, names in failed.items():
        err.print(f"[yellow]failed[/yellow] {escape(f'{why} ({names})')}", soft_wrap=True)
    if left_out := num_left_out(where):
        said = "clients were left out of a round for what they sent; the report says who and why"
        err.print(f"[yellow]{left_out} times[/yellow] {said}", soft_wrap=True)
    out.print(f"\nReport: [bold]{escape(str(page))}[/bold]")
    return bool(failed)


def _overview(where: Path) -> None:
    from turncoat.report.overview import write_overview

    page = write_overview(where)
    out.print(f"\nAll variants side by side: [bold]{escape(str(page))}[/bold]")


@app.command()
def calibrate(
    file: Annotated[str, typer.Argument(help="A TOML file, or the name of one that comes along.")],
    attack: Annotated[str, typer.Option(help="Which attack of the file, or of the package.")],
    tpr: Annotated[float | None, typer.Option(help="It may find so many members at most")] = None,
    fpr: Annotated[float | None, typer.Option(help="... where it flags so many others.")] = None,
    advantage: Annotated[
        float | None, typer.Option(help="Instead: the most that TPR - FPR may be.")
    ] = None,
    psnr: Annotated[float | None, typer.Option(help="Instead: of its images, in dB.")] = None,
    success: Annotated[float | None, typer.Option(help="Instead: of its backdoor.")] = None,
    parameter: Annotated[
        str | None,
        typer.Option(help="Which number: aggregate.max_norm, ...; without: noise_multiplier."),
    ] = None,
    defence: Annotated[
        str | None, typer.Option(help="Of which column; without: the one that has it.")
    ] = None,
    weakest: Annotated[
        float | None, typer.Option(help="The value that protects least; of noise without: 0.")
    ] = None,
    strongest: Annotated[
        float | None, typer.Option(help="... and most; of noise without: what the bound needs.")
    ] = None,
    probes: Annotated[int, typer.Option(min=0, help="Values to try between both ends.")] = 5,
    folder: Annotated[
        Path | None, typer.Option("--out", help="Where to keep it; calibrations/NAME without.")
    ] = None,
    seeds: Seeds = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Processes of one thread each; all cores without.")
    ] = None,
    settings: Set = None,
    variant: Variant = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    update: Annotated[
        bool, typer.Option("--update", help="Go on in a folder that holds another audit.")
    ] = False,
) -> None:
    """Find the weakest noise, clip, ... that keeps a risk: by theorem, and as measured.

    What is finished is kept: the same command goes on where it stopped.
    """
    with _errors_in_words():
        from turncoat import calibrate as calibration

        given = {"tpr": tpr, "advantage": advantage, "psnr": psnr, "success": success}
        wanted = _one_audit(file, attack, settings, seeds, variant)
        risk = calibration.risk_of(given, fpr)
        column, path = calibration.noise_of(wanted, parameter, defence)
        knob = calibration.Knob(column, tuple(path.split(".")), weakest, strongest)
        _check_device(device)
        where = folder or Path("calibrations") / Path(file).stem
        out.print(f"[bold]{escape(wanted.title)}[/bold]")
        with _progress() as on_event:
            calibration.calibrate(
                wanted,
                where,
                attack=attack,
                risk=risk,
                knob=knob,
                num_probes=probes,
                update=update,
                on_event=on_event,
                num_jobs=jobs or _cores(),
                device=device,
                command=shlex.join(["turncoat", *sys.argv[1:]]),
            )
        _show_calibration(where)


def _one_audit(
    file: str, attack: str, settings: list[str] | None, seeds: int | None, variant: str | None
) -> Audit:
    """Return the audit of a file, and in it an attack that it need not name."""
    from turncoat.config import ConfigError
    from turncoat.parts import PARTS

    found = _load(_file(file), settings, seeds, variant)
    if len(found) > 1:
        raise ConfigError(f"{file} has variants, {', '.join(found)}: choose one by --variant")
    wanted = next(iter(found.values()))
    if attack not in wanted.entries and attack in PARTS["attack"]:
        use = f'attack.{attack}.use="{attack}"'
        wanted = next(iter(_load(_file(file), [*(settings or ()), use], seeds, variant).values()))
    return wanted


def _show_calibration(where: Path) -> None:
    from rich.table import Table

    from turncoat.report.calibration import COLUMNS, asked, read, says, table, write_calibration
    from turncoat.report.page import write_report

    write_report(where)
    page, found = write_calibration(where), read(where)
    shown = Table(box=None, pad_edge=False, show_edge=False)
    for column in COLUMNS:  # "value": the name of a parameter takes half of the screen
        shown.add_column(escape(column), overflow="fold")
    for row in table(found):
        shown.add_row(*map(escape, row))
    out.print(f"\n{escape(asked(found))}.\n")
    out.print(shown)
    out.print()
    for line in says(found):
        out.print(f"• {escape(line)}")
    out.print(f"\nPage: [bold]{escape(str(page))}[/bold]")


@app.command()
def explain(
    file: File = None, seeds: Seeds = None, settings: Set = None, variant: Variant = None
) -> None:
    """Say who sits where and sees what, what blocks what, and which ε holds. Trains nothing."""
    with _errors_in_words():
        from turncoat.explain import explained

        for wanted in _load(_file(file), settings, seeds, variant).values():
            for line in explained(wanted):
                out.print(line)


@app.command(name="list")
def list_parts(
    kind: Annotated[Kind, typer.Argument(help="What to list.")],
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """List the attacks, the defences or the tasks that a file can name."""
    with _errors_in_words():
        from turncoat.explain import listed

        found = listed(kind)
        if as_json:
            import json

            print(json.dumps(found, indent=1))
            return
        from rich.table import Table

        table = Table(box=None, pad_edge=False, show_edge=False)
        for column in ("name", "where", "what", "options"):
            table.add_column(column, overflow="fold", no_wrap=column == "name")
        for one in found:
            options = ", ".join(one["options"])
            table.add_row(*map(escape, (one["name"], one["place"], one["summary"], options)))
        out.print(table)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of an audit.")],
) -> None:
    """Make the page of an audit again from what its folder holds."""
    with _errors_in_words():
        from turncoat.record import write_records
        from turncoat.report.overview import variants

        audits = variants(folder)
        for one in audits or [folder]:
            write_records(one)
            out.print(f"\nReport: [bold]{escape(str(_report(one)))}[/bold]")
        if audits:
            _overview(folder)


@app.command()
def version() -> None:
    """Say which version this is."""
    from turncoat import __version__

    print(__version__)


def main() -> None:
    """Run the command line."""
    app()


def _file(name: str | None) -> Path:
    """Return the path of a file, or that of an audit that comes along."""
    path = Path(name or "digits")
    shipped = Path(str(resources.files("turncoat") / "audits"))
    if path.suffix != ".toml" and not path.exists():
        own = shipped / f"{path.name}.toml"
        if own.exists():
            return own
        from turncoat.config import ConfigError

        names = ", ".join(sorted(p.stem for p in shipped.glob("*.toml")))
        raise ConfigError(
            f"there is no file {path}, and no audit of that name comes along: give a TOML file, or "
            f"one of {names}"
        )
    return path


def _load(
    path: Path, settings: list[str] | None, seeds: int | None, variant: str | None
) -> dict[str, Audit]:
    from turncoat.config import load_all

    return load_all(path, overrides=settings or (), num_seeds=seeds, variant=variant)


def _failures(cells: Mapping[Planned, Cell]) -> dict[str, str]:
    """Return what went wrong, and at which cells: one training may have failed many."""
    from turncoat.trial import Failed

    found: dict[str, list[str]] = {}
    for cell, result in cells.items():
        if isinstance(result, Failed):
            name = f"{cell.attack} at {cell.seat}, {cell.defence}"
            names = found.setdefault(result.error, [])
            names += [name] if name not in names else []
    return {error: "; ".join(names) for error, names in found.items()}


def _report(folder: Path) -> Path:
    from turncoat.report.page import write_report
    from turncoat.report.verdict import verdicts

    page = write_report(folder)
    out.print()
    for verdict in verdicts(folder):
        out.print(f"• {escape(str(verdict))}")
    return page


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _runtime(name: RunsOn, num_jobs: int) -> Any:
    """Return what plays the rounds of an audit. Flower's simulation has the jobs as its workers."""
    from turncoat.config import ConfigError

    if name is RunsOn.SIMULATE:
        from turncoat.runtimes.simulate import simulate

        return simulate
    extra = {RunsOn.FLOWER: ("flwr", "flower"), RunsOn.FLOWER_RAY: ("ray", "ray")}[name]
    if find_spec(extra[0]) is None:
        raise ConfigError(
            f"--runtime {name} needs {extra[0]}, which is not installed: "
            f"pip install 'turncoat[{extra[1]}]'"
        )
    from turncoat.runtimes.flower.engines import in_process, on_ray

    return in_process if name is RunsOn.FLOWER else partial(on_ray, num_processes=num_jobs)


def _executor(
    name: DoneBy, address: str | None, jobs: int | None, runtime: RunsOn, device: str
) -> Any:
    """Return who does the work of an audit; None means processes here."""
    from turncoat.config import ConfigError

    if name is DoneBy.PROCESSES:
        if address is not None:
            raise ConfigError("--address is a Ray cluster's: add --executor ray")
        return None
    if runtime is RunsOn.FLOWER_RAY:
        raise ConfigError(
            "--runtime flower-ray starts a Ray of its own in each worker: with --executor ray use "
            "--runtime simulate or flower, which give the same bits"
        )
    if device != "cpu":
        raise ConfigError(f"--executor ray works on CPUs: leave out --device {device}")
    from turncoat.runtimes.cluster import on_cluster

    where = address or "auto"
    return on_cluster(where, jobs or (_cores() if where == "local" else None))


def _check_device(name: str) -> None:
    import torch

    from turncoat.config import ConfigError

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {name}: {str(error).splitlines()[0]}: use cpu") from None


@contextmanager
def _errors_in_words() -> Iterator[None]:
    """Turn errors that a person can mend into one message and an exit code."""
    try:
        yield
    except KeyboardInterrupt:
        err.print("\nstopped; what is finished is kept, and the same command goes on")
        raise typer.Exit(Exit.INTERRUPTED) from None
    except typer.Exit:
        raise
    except Exception as error:
        from turncoat.audit import WorkerDied
        from turncoat.calibrate import AttackFailed
        from turncoat.config import ConfigError
        from turncoat.record import FolderUnusable
        from turncoat.runtimes.saved import Unreadable, Unwritable

        if isinstance(error, ConfigError):
            code = Exit.BAD_INPUT
        elif isinstance(error, FolderUnusable | Unreadable | Unwritable):
            code = Exit.BAD_FOLDER
        elif isinstance(error, WorkerDied):
            code = Exit.WORKER_DIED
        elif isinstance(error, AttackFailed):
            code = Exit.FAILED_CELLS
        elif isinstance(error, ValueError | TypeError) and "TURNCOAT_DEBUG" not in os.environ:
            code = Exit.BAD_INPUT
        else:
            raise
        err.print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(code) from None


@contextmanager
def _progress() -> Iterator[Any]:
    """Show what happens, with the time left: a bar on a terminal, else a line now and then."""
    pace = _Pace()
    if not out.is_terminal:
        yield pace.lines
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[left]}"),
        TextColumn("[dim]{task.description}"),
    )
    with Progress(*columns, console=out, transient=True) as bar:
        task = bar.add_task("", total=None, left="")

        def show(event: Event) -> None:
            if event.what in ("plan", "failed", "lost"):
                bar.console.print(escape(event.text))
            left = pace.left(event)
            bar.update(
                task,
                completed=event.done,
                total=event.of,
                description=escape(event.text),
                left=left,
            )

        yield show


class _Pace:
    """How long the rest will take, from how long what is done took."""

    def __init__(self) -> None:
        self.began = self.said = time.monotonic()

    def left(self, event: Event) -> str:
        gone = time.monotonic() - self.began
        if not event.done:
            return ""
        seconds = gone / event.done * (event.of - event.done)
        return f"{seconds / 60:.0f} min left" if seconds > 90 else f"{seconds:.0f} s left"

    def lines(self, event: Event) -> None:
        now = time.monotonic()
        last = event.done == event.of
        if event.what in ("plan", "failed", "lost") or last or now - self.said > 10:
            self.said = now
            said = event.text if event.what != "plan" else f"plan: {event.text}"
            print(f"[{event.done}/{event.of}] {said} {self.left(event)}".rstrip(), flush=True)

"""``turncoat flower``: what can be done to a Flower app. Flower is imported on use."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Audit Flower apps, and take federations to Flower.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)


@app.callback()
def flower() -> None:
    """Audit Flower apps, and take federations to Flower."""


@app.command()
def audit(
    app_dir: Annotated[
        Path, typer.Argument(metavar="APP_DIR", help="The folder of an app: its pyproject.toml.")
    ],
    clients: Annotated[
        str | None, typer.Option(help="The dishonest nodes, by number: 0,1.")
    ] = None,
    fraction: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Or what share of the nodes is; 0.2 without either."),
    ] = None,
    attacks: Annotated[
        str, typer.Option(help="What they do; NAME=STRENGTH for another strength.")
    ] = "sign-flip,alie,ipm,min-max,scaling",
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds to run.")] = None,
    nodes: Annotated[int | None, typer.Option(min=2, help="Nodes to run it on.")] = None,
    model: Annotated[
        str | None,
        typer.Option(help="The app's model, as module:factory; it lets updates be inverted."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="The app's data, as module:loader of (partition_id, num_partitions)."),
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--out", help="Where to keep it; audits/NAME without.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Set a key of the run config: key=value.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Repeat with so many seeds.")] = 1,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Runs at once, of one thread each; all cores without.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the inversion.")] = 300,
    timeout: Annotated[
        float | None, typer.Option(min=1, help="Seconds after which a run is given up.")
    ] = None,
) -> None:
    """Say what a dishonest node or server could do to an app. Nothing in it is changed.

    Each run is in process and starts afresh; with --model and --data the server's and the users'
    view are attacked too. What is finished is kept: the same command goes on where it stopped.
    """
    from rich.markup import escape

    from turncoat import cli

    with cli._errors_in_words():
        from turncoat.flower.audit import FlowerAudit, run_flower_audit
        from turncoat.flower.forgeries import parse
        from turncoat.flower.loading import read_app

        found = read_app(app_dir).configured(settings or (), rounds)
        num_nodes = nodes or found.num_nodes or 10
        wanted = FlowerAudit(
            found,
            num_nodes,
            members_of(clients, fraction, num_nodes),
            tuple(parse(attacks)),
            tuple(range(seeds)),
            model,
            data,
            steps,
        )
        where = folder or Path("audits") / found.name
        cli.out.print(f"[bold]{escape(found.name)}[/bold], {num_nodes} nodes")
        with cli._progress() as on_event:
            whole = run_flower_audit(
                wanted,
                where,
                num_jobs=jobs or cli._cores(),
                timeout_seconds=timeout,
                command=shlex.join(["turncoat", *sys.argv[1:]]),
                on_event=on_event,
            )
        _print_findings(where)
        page = cli._report(where)
        cli.out.print(f"\nReport: [bold]{escape(str(page))}[/bold]")
        if not whole:
            raise typer.Exit(cli.Exit.FAILED_CELLS)


@app.command()
def export(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A TOML file of Turncoat's.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write the app.")],
) -> None:
    """Write an app for `flwr run` that plays the federation of a file, to the same bits."""
    from rich.markup import escape

    from turncoat import cli

    with cli._errors_in_words():
        from turncoat.record import FolderUnusable
        from turncoat.runtimes.flower.export import export as written

        try:
            made = written(file, folder)
        except OSError as error:
            raise FolderUnusable(
                f"cannot write to {folder}: {error.strerror or error}: choose another DIR"
            ) from error
        for path in made:
            cli.out.print(escape(str(path)))
        cli.out.print(f"\nNow: [bold]flwr run {escape(str(folder))}[/bold]")


def members_of(clients: str | None, fraction: float | None, num_nodes: int) -> tuple[int, ...]:
    """Return the coalition: those that are named, or the first of a share of all nodes.

    >>> members_of("3,1", None, 10), members_of(None, 0.2, 10)
    ((1, 3), (0, 1))
    """
    if clients is not None and fraction is not None:
        raise ValueError("--clients and --fraction both say who is dishonest: give one of them")
    if clients is None:
        return tuple(range(max(1, round((0.2 if fraction is None else fraction) * num_nodes))))
    try:
        return tuple(sorted({int(part) for part in clients.split(",") if part.strip()}))
    except ValueError:
        raise ValueError(f"--clients {clients!r} is no list of numbers, such as 0,1") from None


def _print_findings(folder: Path) -> None:
    import json

    from rich.markup import escape

    from turncoat import cli

    findings = json.loads((folder / "plan.json").read_text(encoding="utf-8"))["findings"]
    for finding in findings:
        said = " ".join(filter(None, (finding["what"], finding.get("shown"), finding["cure"])))
        cli.out.print(f"[bold]{escape(finding['severity'])}[/bold]: {escape(said)}")

"""What ε costs, by the number of clients and by records, and what is left to an attacker.

``python -m papers.noised --figure docs/client-privacy.png``, or ``docs/record-privacy.png``, draws
what ``python -m papers.inference`` measured, and writes its table into docs/privacy.md.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from math import inf
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from papers.epsilons import ClientCurves, RecordCurves, said
from papers.ledger import HERE, Expectation, Experiment
from turncoat.attacks.membership.lira import LiRA
from turncoat.record import write_text
from turncoat.report.palette import LIGHT, MARKERS
from turncoat.stages.train.dpsgd import DPSGD
from turncoat.stages.train.local import LocalSGD
from turncoat.task import Task
from turncoat.tasks.bundled import digits
from turncoat.tasks.fetched import mnist, pneumoniamnist
from turncoat.tasks.models import MLP
from turncoat.validate import nearest

_EPSILONS = (0.5, 1.0, 2.0, 4.0, 8.0, inf)
_DELTA = 1e-5
_CLIENTS = (50, 200, 1_000)
_OURS = "Bounds are this project's own; no published figure is claimed."


def _records(
    make: Callable[..., Task],
    hidden: int,
    train: DPSGD,
    free: LocalSGD,
    num_epochs: int,
    num_candidates: int,
    num_canaries: int,
    num_guesses: int,
    options: Mapping[str, Any],
    num_shadows: int = 4,
) -> Experiment:
    name = make.__name__
    members = num_candidates // 2
    return Experiment(
        f"epsilon-{name}",
        "What an attack reaches lies below what f-DP allows, and what an audit proves below ε.",
        RecordCurves(
            make,
            train,
            free,
            num_epochs,
            LiRA(num_shadows),
            num_candidates,
            num_canaries,
            num_guesses,
            _EPSILONS,
            _DELTA,
            {"model": MLP(hidden=(hidden,)), **options},
        ),
        f"{members:,} members and as many non-members of {name}, one net with {hidden} hidden "
        f"units; DP-SGD at {train.lr:g}, clip {train.max_norm:g}, batch {train.expected_batch}, "
        f"{num_epochs} epochs, δ = 1e-5; at ε = ∞ plain SGD ({free.num_epochs} epochs). "
        f"{num_shadows + 2} models in pairs, of which each has a random half of the records, and a "
        "start, batches and noise of its own. Each is the target in its turn; LiRA has the "
        f"{num_shadows} of the other pairs. A TPR is the mean over these targets; its limits are "
        "Clopper and Pearson's for one seed and as many members as one target has. The audit: one "
        f"more run with {num_canaries} mislabelled canaries and {2 * num_guesses} guesses from the "
        "last model, at 95 %: it sees no step, so that a lower limit of 0 is no proof of anything. "
        "Small nets, for time.",
        "Steinke et al., NeurIPS 2023, for the audit; Dong, Roth and Su, JRSS-B 2022, for the "
        f"limit. {_OURS}",
        (
            Expectation("least_points_from_the_lower_limit_of_the_tpr_to_the_bound", at_least=0),
            Expectation("least_of_claimed_minus_audited_epsilon", at_least=0),
            Expectation("points_of_tpr_that_ε_of_1_takes_from_lira", above=0),
        ),
    )


NOISED = (
    Experiment(
        "epsilon-clients-mnist",
        "Client-level privacy costs less, the more clients share the noise.",
        ClientCurves(
            mnist,
            LocalSGD(lr=0.5, num_steps=3, batch_size=20),
            _CLIENTS,
            _EPSILONS,
            _DELTA,
            max_norm=1.0,
            num_rounds=6,
            compared=(2.0, 4.0),
            options={"train_size": 20_000, "model": MLP(hidden=())},
        ),
        "20,000 images of MNIST, shared by 50, 200 or 1,000 clients, iid (the total is fixed); "
        "multinomial regression, 7,850 parameters; 6 rounds in which all take part, 3 local "
        "steps of SGD at 0.5 on 20 images; updates shortened to 1, noise once on the sum; "
        "δ = 1e-5. ε is for one client with all its records, against users and other clients, and "
        "not against the server. A small net and few rounds, for time: neither was tuned to an ε.",
        "McMahan et al., ICLR 2018, is the algorithm; claim 4 of a talk by Usynin, direction fixed "
        f"before the first run. {_OURS}",
        tuple(
            Expectation(f"points gained from {few} to {many} clients, {said(e)}", above=0)
            for e in (2.0, 4.0)
            for few, many in pairwise(_CLIENTS)
        ),
    ),
    _records(
        digits,
        32,
        DPSGD(lr=1.0, max_norm=1.0, expected_batch=100, noise_multiplier=0.0),
        LocalSGD(lr=0.1, num_epochs=60, batch_size=25, momentum=0.9),
        num_epochs=30,
        num_candidates=1_500,
        num_canaries=250,
        num_guesses=25,
        options={"test_size": 797},
    ),
    _records(
        mnist,
        16,
        DPSGD(lr=0.5, max_norm=1.0, expected_batch=100, noise_multiplier=0.0),
        LocalSGD(lr=0.1, num_epochs=30, batch_size=50, momentum=0.9),
        num_epochs=15,
        num_candidates=2_000,
        num_canaries=300,
        num_guesses=30,
        options={"train_size": 4_000},
    ),
    _records(
        pneumoniamnist,
        16,
        DPSGD(lr=0.5, max_norm=1.0, expected_batch=100, noise_multiplier=0.0),
        LocalSGD(lr=0.01, num_epochs=80, batch_size=10, momentum=0.9),
        num_epochs=20,
        num_candidates=2_000,
        num_canaries=300,
        num_guesses=30,
        options={},
        num_shadows=8,
    ),
)


_CLIENTS_NAME = "epsilon-clients-mnist"
_RECORD_NAMES = ("epsilon-digits", "epsilon-mnist", "epsilon-pneumoniamnist")
_TPR, _EPSILON = "TPR at 1 % FPR, percent", "ε"
_LOST, _MOST = "points lost, mean over classes", "points lost, class that loses most"
_ROWS = {  # of a table of records
    "accuracy, percent: test": "accuracy, percent",
    f"{_TPR}: LiRA": "TPR of LiRA at 1 % FPR, percent",
    f"{_TPR}: LiRA, upper limit": "its upper limit",
    f"{_TPR}: loss threshold": "TPR of the loss threshold",
    f"{_TPR}: limit by f-DP": "what f-DP allows",
    f"{_EPSILON}: audit, lower limit": "ε that the audit proves",
}
_Figures = Mapping[str, Mapping[str, Any]]


def draw_clients(known: Mapping[str, _Figures], path: Path) -> None:
    """Draw accuracy, and what classes lose, against ε for each number of clients."""
    figures = known[_CLIENTS_NAME]
    canvas = Figure(figsize=(8.2, 3.7), layout="constrained")
    left, right = canvas.subplots(1, 2)
    for i, n in enumerate(_CLIENTS):
        look: Any = {"color": LIGHT.series[i + 1], "marker": MARKERS[i]}
        _line(left, figures, f"accuracy, percent: {n} clients", f"{n:,} clients", **look)
        _line(right, figures, f"{_LOST}: {n} clients", f"{n:,} clients: mean", **look)
        _line(right, figures, f"{_MOST}: {n} clients", "the class that loses most", "--", **look)
    for axes, title in ((left, "accuracy, percent"), (right, "points of accuracy lost")):
        _dressed(axes, title)
        axes.legend(fontsize=7, frameon=False)
    canvas.savefig(path, dpi=110, metadata={"Software": None})


def draw_records(known: Mapping[str, _Figures], path: Path) -> None:
    """Draw accuracy, attack and audit against ε, a column for each data set."""
    names = [name for name in _RECORD_NAMES if name in known]
    canvas = Figure(figsize=(8.2, 7.4), layout="constrained")
    every = canvas.subplots(3, len(names), squeeze=False)
    hues = LIGHT.series
    for column, name in enumerate(names):
        figures, (top, middle, bottom) = known[name], every[:, column]
        _line(top, figures, "accuracy, percent: test", "test", color=hues[1], marker="o")
        attacks: Any = {"color": hues[2], "marker": "s"}
        _line(middle, figures, f"{_TPR}: LiRA", "LiRA", **attacks)
        _line(middle, figures, f"{_TPR}: LiRA, upper limit", "its upper limit", "--", **attacks)
        _line(middle, figures, f"{_TPR}: limit by f-DP", "f-DP allows", color=hues[3], marker="^")
        middle.axhline(1, color=LIGHT.muted, linewidth=1.2, linestyle=":", label="chance")
        middle.set_yscale("log")
        middle.set_ylim(bottom=0.2)
        audit = f"{_EPSILON}: audit, lower limit"
        _line(bottom, figures, audit, "proven by the audit", color=hues[4], marker="D")
        finite = [e for e in _EPSILONS if e < inf]
        look: Any = {"color": hues[3], "marker": "^", "markersize": 4, "linewidth": 1.4}
        bottom.plot(range(len(finite)), finite, label="claimed", **look)
        top.set_title(name.removeprefix("epsilon-"), fontsize=10)
        for axes, title in ((top, "accuracy, percent"), (middle, _TPR), (bottom, "ε")):
            _dressed(axes, title)
            axes.legend(fontsize=6.5, frameon=False)
    canvas.savefig(path, dpi=110, metadata={"Software": None})


def _line(
    axes: Axes, figures: _Figures, title: str, label: str, dashes: str = "-", **look: Any
) -> None:
    """Draw one row of a grid: a solid one with its interval, where several seeds are known."""
    places = [i for i, e in enumerate(_EPSILONS) if f"{title} | {said(e)}" in figures]
    cells = [figures[f"{title} | {said(_EPSILONS[i])}"] for i in places]
    axes.plot(
        places,
        [c["value"] for c in cells],
        dashes,
        label=label,
        linewidth=1.4,
        markersize=4,
        **look,
    )
    if dashes == "-" and cells and len(cells[0]["values"]) > 1:
        low, high = ([c[end] for c in cells] for end in ("low", "high"))
        axes.fill_between(places, low, high, color=look["color"], alpha=0.15, linewidth=0)


def _dressed(axes: Axes, title: str) -> None:
    labels = ["∞" if e == inf else f"{e:g}" for e in _EPSILONS]
    axes.set_xticks(range(len(labels)), labels)
    axes.set_xlabel("ε")
    axes.set_ylabel(title)
    axes.grid(color=LIGHT.line, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def client_table(known: Mapping[str, _Figures]) -> str:
    """Return what is known of client-level privacy as Markdown."""
    titles = ("accuracy, percent", _LOST, _MOST)
    rows = {f"{t}: {n} clients": f"{t}, {n:,} clients" for t in titles for n in _CLIENTS}
    return _table(known[_CLIENTS_NAME], rows)


def record_table(known: Mapping[str, _Figures]) -> str:
    """Return what is known of record-level privacy as Markdown, a table a data set."""
    parts = [
        f"**{name.removeprefix('epsilon-')}**\n\n{_table(known[name], _ROWS)}"
        for name in _RECORD_NAMES
        if name in known
    ]
    return "\n\n".join(parts)


def _table(figures: _Figures, rows: Mapping[str, str]) -> str:
    found = (f["values"] for f in figures.values())
    seeds = f"seeds: {len(next(found))}"
    lines = [
        f"| {seeds} | " + " | ".join(map(said, _EPSILONS)) + " |",
        "|---|" + "---:|" * len(_EPSILONS),
    ]
    for title, shown in rows.items():
        cells = [_cell(figures.get(f"{title} | {said(e)}")) for e in _EPSILONS]
        lines.append(f"| {shown} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(figure: Mapping[str, Any] | None) -> str:
    if figure is None:
        return "\N{EN DASH}"
    rounded = [round(figure[end], 1) + 0.0 for end in ("value", "low", "high")]  # no -0.0
    ends = [f"{number:.1f}".replace("-", "\N{MINUS SIGN}") for number in rounded]
    return ends[0] if len(figure["values"]) == 1 else f"{ends[0]} ({ends[1]} to {ends[2]})"


_DRAWN: dict[str, tuple[Callable[[Mapping[str, _Figures], Path], None], Any]] = {
    "client-privacy": (draw_clients, client_table),
    "record-privacy": (draw_records, record_table),
}


def drawn(arguments: Sequence[str]) -> int:
    """Draw a figure, and write the table that belongs to it, from a ledger."""
    parser = argparse.ArgumentParser(prog="python -m papers.noised")
    parser.add_argument("--figure", type=Path, required=True, help="where to draw")
    parser.add_argument("--ledger", type=Path, default=HERE / "inference.json")
    asked = parser.parse_args(arguments)
    if asked.figure.stem not in _DRAWN:
        parser.error(f"there is no figure {asked.figure.stem!r}; {nearest('', _DRAWN)}")
    experiments = json.loads(asked.ledger.read_text("utf-8"))["experiments"]
    known = {e["name"]: e["figures"] for e in experiments if e["figures"]}
    draw, told = _DRAWN[asked.figure.stem]
    needed = (_CLIENTS_NAME,) if draw is draw_clients else _RECORD_NAMES
    if not any(name in known for name in needed):
        parser.error(f"{asked.ledger.name} has no figures of {needed[0]!r}: run the ledger first")
    draw(known, asked.figure)
    page = asked.figure.with_name("privacy.md")
    written = re.sub(
        rf"(<!-- {asked.figure.stem} -->\n).*?(\n<!-- end -->)",
        lambda found: found[1] + told(known) + found[2],
        page.read_text("utf-8"),
        flags=re.DOTALL,
    )
    write_text(page, written)
    return 0


if __name__ == "__main__":
    sys.exit(drawn(sys.argv[1:]))

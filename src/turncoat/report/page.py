"""The page: one file, no script, no request, readable on a phone, on paper and in the dark."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from turncoat.report import figures, palette, words
from turncoat.report.claims import audits
from turncoat.report.cost import Cost, costs, done, runs
from turncoat.report.figures import Array, Drawing
from turncoat.report.gallery import Exhibition, Strip, Tensors, exhibition, exhibits
from turncoat.report.pooled import Square, num_missing, squares
from turncoat.report.ranking import Rank, ranked
from turncoat.report.record import Record, Row, read
from turncoat.report.restored import restored
from turncoat.report.verdict import (
    NOT_TRIED,
    Matrix,
    Verdict,
    column,
    furthest,
    judge,
    reach,
    still_can,
)

_HERE = Path(__file__).parent
_MOST_INCIDENTS = 30
_TONES = {"void": "grave", "danger": "grave", "unknown": "mild"}


@dataclass(frozen=True)
class Panel:
    """A figure in the page, and which defences it shows."""

    title: str
    svg: Markup
    file: str


@dataclass(frozen=True)
class Note:
    """What a footnote says of a square that has no figure."""

    number: int
    kind: str
    seat: str
    where: str
    items: tuple[tuple[str, str], ...]
    then: str = ""


@dataclass
class Footnotes:
    """Numbers the squares that need words: one note for each thing there is to say."""

    notes: list[Note] = field(default_factory=list)
    of: dict[tuple[str, str, str], int] = field(default_factory=dict)


def write_report(folder: Path) -> Path:
    """Write ``report.html`` and ``figures/`` from what an audit left in ``folder``.

    The same folder gives the same bytes. A half-finished audit gives a report of what there is.
    """
    text, drawings = page(folder)
    figures_folder = folder / "figures"
    figures_folder.mkdir(exist_ok=True)
    for drawing in drawings:
        drawing.save(figures_folder)
    written = folder / "report.html"
    written.write_text(text, encoding="utf-8")
    return written


def page(folder: Path) -> tuple[str, list[Drawing]]:
    """Return the page, and the figures that belong beside it; write nothing."""
    record = read(folder)
    matrix, prices = squares(record), costs(record)
    shown, lost = _exhibits(record, matrix)
    drawn = _draw(record, matrix, prices, shown)
    drawings = [_matrix(record, matrix), *(d for group in drawn.values() for d in group)]
    return _render(record, matrix, prices, shown, lost, drawn), drawings


def _render(
    record: Record,
    matrix: Matrix,
    prices: Mapping[str, Cost],
    shown: Mapping[tuple[str, str, str], list[Tensors]],
    lost: Sequence[str],
    drawn: Mapping[str, Sequence[Drawing]],
) -> str:
    environment = templates()
    environment.globals["style"] = figures.style
    text = environment.get_template("page.html.jinja").render(
        record=record,
        plan=record.plan,
        task=record.plan["task"],
        css=Markup(css()),
        findings=_findings(record),
        verdicts=judge(record, matrix, prices),
        restored=[str(r) for r in restored(record, matrix)],
        matrix=matrix,
        emphasised=emphasised,
        groups=_groups(matrix),
        footnotes=_footnotes(record, matrix),
        remarks=_remarks(matrix),
        not_tried=NOT_TRIED,
        missing=sum(num_missing(square) for square in matrix.values()),
        total=sum(1 if s.status == "blocked" else s.num_planned for s in matrix.values()),
        heat_steps=palette.HEAT_STEPS,
        step=lambda success: round(success * (palette.HEAT_STEPS - 1)),
        gallery=_gallery(record, matrix, shown),
        lost=lost,
        audits=audits(record, shown),
        panels={name: [_panel(d) for d in group] for name, group in drawn.items()},
        costs=prices,
        rankings=_rankings(record, matrix, prices),
        stages={d["name"]: d for d in record.plan["defences"]},
        sights=_sights(record),
        incidents=_incidents(record),
        failures=[t for t in record.trainings if t.get("status") == "failed"],
        left_out=sum(int(t.get("left_out") or 0) for t in record.trainings),
        aborted=sum(int(t.get("aborted_rounds") or 0) for t in record.trainings),
    )
    return re.sub(r"\n\s*\n+", "\n", text)


def templates() -> Environment:
    """Return what fills in a page: everything is escaped, and nothing may be missing."""
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_unbroken,
    )
    environment.globals.update(words=words, plural=words.count)
    return environment


def _unbroken(value: Any) -> Any:
    """Keep a figure and its unit on one line."""
    if type(value) is not str:
        return value
    return re.sub(r"(\d) (%|dB|kB|MB|GB|s\b|points)", "\\1\N{NO-BREAK SPACE}\\2", value)


def emphasised(verdict: Verdict) -> Markup:
    """Return a finding with its figure in bold."""
    text = escape(_unbroken(verdict.finding))
    if verdict.state != "open" or verdict.strongest is None or verdict.strongest.headline is None:
        return text
    value = escape(_unbroken(verdict.strongest.headline.text))
    return Markup(str(text).replace(str(value), f"<strong>{value}</strong>", 1))


def css() -> str:
    def block(colours: palette.Palette) -> str:
        return "".join(f"{name}:{value};" for name, value in palette.variables(colours).items())

    text = (_HERE / "page.css").read_text(encoding="utf-8")
    return text.replace("/* LIGHT */", block(palette.LIGHT)).replace(
        "/* DARK */", block(palette.DARK)
    )


def _panel(drawing: Drawing) -> Panel:
    return Panel(drawing.title, Markup(drawing.inline()), f"figures/{drawing.slug}")


def _groups(matrix: Matrix) -> dict[str, list[str]]:
    """Return the rows of the matrix: a seat and its attacks."""
    groups: dict[str, dict[str, None]] = {}
    for attack, seat, _ in matrix:
        groups.setdefault(seat, {})[attack] = None
    return {seat: list(attacks) for seat, attacks in groups.items()}


def _rankings(record: Record, matrix: Matrix, prices: Mapping[str, Cost]) -> dict[str, list[Rank]]:
    """Return the ranks at every seat where an attack was scored and there is what to rank."""
    if len(record.choices) < 2:
        return {}
    return {
        seat: ranked(record, matrix, prices, seat)
        for seat in _groups(matrix)
        if any(s.status == "scored" for d in record.defences for s in column(matrix, seat, d))
    }


def _footnotes(record: Record, matrix: Matrix) -> Footnotes:
    """Say of each seat what is blocked or failed, once for all defences of which it is true."""
    said: dict[tuple[str, str, tuple[tuple[str, str], ...], str], list[str]] = {}
    for seat in _groups(matrix):
        for defence in record.defences:
            here = column(matrix, seat, defence)
            for kind in ("blocked", NOT_TRIED, "failed"):
                # a square of several seeds may be scored and have failed in one of them
                told = [s for s in here if _kind(s) == kind or (kind == "failed" and s.num_failed)]
                ask = kind == "blocked" and seat and told
                then = still_can(record, matrix, seat, defence) if ask else ""
                if told:
                    items = tuple(
                        (s.attack, s.says.removeprefix(f"{NOT_TRIED}, for ")) for s in told
                    )
                    said.setdefault((seat, kind, items, then), []).append(defence)
    found = Footnotes()
    for number, ((seat, kind, items, then), behind) in enumerate(said.items(), 1):
        everywhere = len(behind) == len(record.defences) > 1
        where = "all defences" if everywhere else words.listed(behind, 12)
        found.notes.append(Note(number, kind, seat, where, items, then))
        found.of |= {(attack, seat, d): number for attack, _ in items for d in behind}
    return found


def _remarks(matrix: Matrix) -> dict[str, list[str]]:
    """Return what was not measured, and of which attacks that is true."""
    said: dict[str, list[str]] = {}
    for square in matrix.values():
        for remark in square.remarks:
            if square.attack not in (attacks := said.setdefault(remark, [])):
                attacks.append(square.attack)
    return said


def _kind(square: Square) -> str:
    untried = square.status == "blocked" and square.says.startswith(NOT_TRIED)
    return NOT_TRIED if untried else square.status


def _exhibits(
    record: Record, matrix: Matrix
) -> tuple[dict[tuple[str, str, str], list[Tensors]], list[str]]:
    shown: dict[tuple[str, str, str], list[Tensors]] = {}
    lost: list[str] = []
    for key, square in matrix.items():
        tensors, missing = exhibits(record, square)
        lost += missing
        if tensors:
            shown[key] = tensors
    return shown, lost


def _gallery(
    record: Record, matrix: Matrix, shown: Mapping[tuple[str, str, str], list[Tensors]]
) -> list[Exhibition]:
    halls = []
    for seat, attacks in _groups(matrix).items():
        alike: dict[tuple[Strip, ...], list[str]] = {}
        for attack in attacks:
            row = [matrix[attack, seat, defence] for defence in record.defences]
            first = {d: t[0] for (a, s, d), t in shown.items() if (a, s) == (attack, seat)}
            if first and (hall := exhibition(attack, seat, row, first)):
                if hall.rebuilt:
                    halls.append(hall)
                else:
                    alike.setdefault(hall.strips, []).append(attack)
        halls += [Exhibition(words.listed(a, len(a)), seat, s) for s, a in alike.items()]
    return halls


def _draw(
    record: Record,
    matrix: Matrix,
    prices: Mapping[str, Cost],
    shown: Mapping[tuple[str, str, str], list[Tensors]],
) -> dict[str, list[Drawing]]:
    slug = figures.slugs()
    slug("matrix")
    names = record.choices
    return {
        "roc": list(_rocs(record, matrix, shown, slug)),
        "claims": [figures.claims(slug("claims"), found)]
        if (found := audits(record, shown))
        else [],
        "accuracy": list(_histories(record, slug)),
        "tradeoff": [
            figures.tradeoff(
                slug(f"tradeoff {seat}"),
                words.who(seat),
                [prices[name] for name in names],
                [furthest(reach(record, matrix, seat, name)) for name in names],
                record.metric,
            )
            for seat in _groups(matrix)
            if len(names) > 1
            and any(s.status == "scored" for name in names for s in column(matrix, seat, name))
            and any(prices[name].quality for name in names)
        ],
        "partition": list(_partition(record, slug)),
    }


def _matrix(record: Record, matrix: Matrix) -> Drawing:
    return figures.matrix("matrix", matrix, record.defences)


def _rocs(
    record: Record, matrix: Matrix, shown: Mapping[tuple[str, str, str], list[Tensors]], slug: Any
) -> Iterator[Drawing]:
    for seat, attacks in _groups(matrix).items():
        for attack in attacks:
            curves: dict[int, tuple[Array, Array]] = {}
            for index, defence in enumerate(record.defences):
                seeds = [
                    (np.ravel(t["roc_fpr"]).astype(float), np.ravel(t["roc_tpr"]).astype(float))
                    for t in shown.get((attack, seat, defence), ())
                    if "roc_fpr" in t
                    and "roc_tpr" in t
                    and t["roc_fpr"].size == t["roc_tpr"].size > 0
                ]
                if seeds:
                    curves[index] = figures.pooled_roc(seeds)
            if curves:
                yield figures.roc(
                    slug(f"roc {attack} {seat}"), f"{attack} · {seat}", curves, record.defences
                )


def _histories(record: Record, slug: Any) -> Iterator[Drawing]:
    attacks = list(dict.fromkeys(t["attack"] for t in record.trainings))
    for attack in sorted(
        attacks,
        key=lambda a: (a is not None, a and record.attacks.index(a) if a in record.attacks else 0),
    ):
        lines = {
            index: [
                [float(v) for v in t["history"]]
                for t in runs(record, defence, attack)
                if int(t["seed"]) in done([t])
            ]
            for index, defence in enumerate(record.defences)
        }
        lines = {index: seeds for index, seeds in lines.items() if seeds}
        if lines:
            title = "Nobody attacks" if attack is None else f"Under {attack}"
            name = slug(f"accuracy {attack or 'clean'}")
            yield figures.histories(name, title, lines, record.defences, record.metric)


def _partition(record: Record, slug: Any) -> Iterator[Drawing]:
    task = record.plan["task"]
    counts = np.array(task.get("label_counts") or [], dtype=np.float64)
    if counts.ndim != 2 or not counts.size:
        return
    clients = [str(n) for n in task.get("client_names") or ()]
    classes = [str(n) for n in task.get("classes") or ()]
    if len(clients) != counts.shape[0]:
        clients = [f"client {i}" for i in range(counts.shape[0])]
    if len(classes) != counts.shape[1]:
        classes = [f"class {i}" for i in range(counts.shape[1])]
    sizes = [int(n) for n in task.get("sizes") or counts.sum(axis=1)]
    yield figures.partition(slug("partition"), counts, clients, classes, sizes)


def _findings(record: Record) -> list[dict[str, str]]:
    """Return what was found before any attack, the gravest first, with a tone for its colour."""
    found = []
    for finding in record.plan.get("findings") or ():
        texts = {k: str(finding.get(k) or "") for k in ("severity", "what", "why", "shown", "cure")}
        tone = _TONES.get(texts["severity"].lower(), "plain")
        found.append(texts | {"tone": tone})
    return sorted(found, key=lambda f: ["grave", "mild", "plain"].index(f["tone"]))


def _sights(record: Record) -> dict[str, list[tuple[list[str], list[str]]]]:
    """Return for each seat what it sees, and behind which defences: mostly the same behind all."""
    seats = sorted(
        {s for d in record.plan["defences"] for s in d.get("sees") or {}}, key=words.order
    )
    found: dict[str, list[tuple[list[str], list[str]]]] = {}
    for seat in seats:
        grouped: dict[tuple[str, ...], list[str]] = {}
        for defence in record.plan["defences"]:
            kinds = tuple((defence.get("sees") or {}).get(seat) or ())
            grouped.setdefault(kinds, []).append(defence["name"])
        found[seat] = [(list(kinds), names) for kinds, names in grouped.items()]
    return found


def _incidents(record: Record) -> tuple[list[tuple[Row, Row]], int]:
    told = [(t, incident) for t in record.trainings for incident in t.get("incidents") or ()]
    return told[:_MOST_INCIDENTS], max(0, len(told) - _MOST_INCIDENTS)

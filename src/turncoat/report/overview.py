"""The variants of one audit side by side: the same attacks and defences, in other worlds."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from markupsafe import Markup

from turncoat.report import palette, words
from turncoat.report.cost import costs
from turncoat.report.page import css, emphasised, templates
from turncoat.report.pooled import Square, squares
from turncoat.report.ranking import Rank, ranked
from turncoat.report.record import Record, UnreadableAudit, read
from turncoat.report.verdict import Matrix, Verdict, judge


@dataclass(frozen=True)
class World:
    """One variant: what was recorded, and what it comes to."""

    name: str
    record: Record
    matrix: Matrix
    verdicts: Mapping[str, Verdict]
    ranks: Mapping[str, Mapping[str, Rank]]  # by seat and defence

    @property
    def link(self) -> str:
        return f"{quote(self.name)}/report.html"


def variants(folder: Path) -> list[Path]:
    """Return the folders of an audit's variants, in the order of its file; [] if it has none."""
    if (folder / "plan.json").exists() or not folder.is_dir():
        return []
    found = sorted(p.parent for p in folder.glob("*/plan.json"))
    named: list[str] = []
    for config in [f / "config.toml" for f in found[:1]]:
        if config.is_file():
            named = list(tomllib.loads(config.read_text(encoding="utf-8")).get("variant", {}))
    return sorted(found, key=lambda f: named.index(f.name) if f.name in named else len(named))


def write_overview(folder: Path) -> Path:
    """Write ``report.html`` over the reports of all variants that have cells in ``folder``."""
    begun = [f for f in variants(folder) if (f / "cells.jsonl").is_file()]  # others may be running
    worlds = [_world(f) for f in begun]
    if not worlds:
        raise UnreadableAudit(f"{folder} holds no variant of an audit: run `turncoat audit` on it")
    tested = [w for w in worlds if len(w.record.choices) > 1] or worlds
    seats = dict.fromkeys(seat for world in worlds for seat in world.verdicts)
    text = (
        templates()
        .get_template("overview.html.jinja")
        .render(
            title=_shared_title([str(w.record.plan["title"]) for w in worlds]),
            css=Markup(css()),
            worlds=worlds,
            emphasised=emphasised,
            seats=sorted(seats, key=words.order),
            tested=tested,
            rows={seat: _rows(tested, seat) for seat in seats},
            undefended={seat: _undefended(worlds, seat) for seat in seats},
            step=lambda success: round(success * (palette.HEAT_STEPS - 1)),
        )
    )
    written = folder / "report.html"
    written.write_text(text, encoding="utf-8")
    return written


def _world(folder: Path) -> World:
    record = read(folder)
    matrix, prices = squares(record), costs(record)
    found = {v.seat: v for v in judge(record, matrix, prices)}
    ranks = {seat: {r.defence: r for r in ranked(record, matrix, prices, seat)} for seat in found}
    return World(folder.name, record, matrix, found, ranks)


def _rows(worlds: list[World], seat: str) -> list[tuple[str, list[Rank | None]]]:
    """Return each defence with its rank in every world, the mildest worst case first."""
    names = dict.fromkeys(d for w in worlds for d in w.ranks.get(seat, {}))
    rows = [(d, [w.ranks.get(seat, {}).get(d) for w in worlds]) for d in names]

    def left(row: tuple[str, list[Rank | None]]) -> tuple[bool, float]:
        known = [r for r in row[1] if r is not None and not r.unknown]
        worst = max((r.worst.success for r in known if r.worst is not None), default=0.0)
        return len(known) < len(worlds), worst

    return sorted(rows, key=left)


def _undefended(worlds: list[World], seat: str) -> list[tuple[str, list[Square | None]]]:
    """Return each attack with its square in every world as it is, before any defence."""
    names = dict.fromkeys(a for w in worlds for a, s, _ in w.matrix if s == seat)
    return [(a, [w.matrix.get((a, seat, w.record.defences[0])) for w in worlds]) for a in names]


def _shared_title(titles: list[str]) -> str:
    """Return what all titles begin with, up to the colon before the variant's name."""
    heads = {title.rpartition(": ")[0] or title for title in titles}
    return heads.pop() if len(heads) == 1 else " / ".join(titles)

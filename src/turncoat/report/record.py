"""What an audit left in its folder, read back. The schema is in docs/report.md."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1
_AGAIN = "run the same `turncoat audit` command again, which writes it anew"
_PLAN = ("title", "rounds", "seeds", "task", "defences", "attacks")
_CELL = ("defence", "attack", "seat", "status")
_TRAINING = ("defence", "attack", "seed", "history")

Row = Mapping[str, Any]


class UnreadableAudit(ValueError):
    """A folder does not hold what an audit writes."""


@dataclass(frozen=True)
class Record:
    """All of a folder but the exhibits, which are read when they are drawn.

    Attributes:
        plan: What was to be done; ``plan["defences"][0]`` is the federation as it is.
        cells: What was done: one row for each defence, attack, seat and seed.
        trainings: What it cost: one row for each defence, active attack and seed.
        config: The configuration word by word, or nothing if it is lost.
    """

    folder: Path
    plan: Row
    cells: tuple[Row, ...]
    trainings: tuple[Row, ...]
    config: str | None

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(self.plan["seeds"])

    @property
    def defences(self) -> tuple[str, ...]:
        return tuple(d["name"] for d in self.plan["defences"])

    @property
    def choices(self) -> tuple[str, ...]:
        """The defences among which to choose: a column that is there to prove something is none."""
        return tuple(d["name"] for d in self.plan["defences"] if not d.get("proves"))

    @property
    def attacks(self) -> tuple[str, ...]:
        return tuple(a["name"] for a in self.plan["attacks"])

    @property
    def metric(self) -> str:
        return str(self.plan["task"].get("metric") or "accuracy")


def read(folder: Path) -> Record:
    """Read a folder, or say which file is missing or broken and what to do about it."""
    if not folder.is_dir():
        raise UnreadableAudit(f"{folder} is no folder: give the one that `turncoat audit` wrote")
    plan_file = folder / "plan.json"
    if not plan_file.is_file():
        raise UnreadableAudit(
            f"{folder} holds no plan.json, so no audit was run there: give the folder that "
            "`turncoat audit --out` names"
        )
    try:
        plan = json.loads(plan_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnreadableAudit(f"{plan_file} is not JSON ({error}): {_AGAIN}") from None
    _check(plan, _PLAN, str(plan_file))
    if plan.get("schema_version") != SCHEMA_VERSION:
        raise UnreadableAudit(
            f"{plan_file} has schema_version {plan.get('schema_version')!r}, but this Turncoat "
            f"reads {SCHEMA_VERSION}: use the version that wrote it"
        )
    if not plan["defences"]:
        raise UnreadableAudit(f"{plan_file} plans no defence, not even none: {_AGAIN}")
    config = folder / "config.toml"
    return Record(
        folder,
        plan,
        _rows(folder / "cells.jsonl", _CELL),
        _rows(folder / "trainings.jsonl", _TRAINING),
        config.read_text(encoding="utf-8") if config.is_file() else None,
    )


def _rows(path: Path, needed: tuple[str, ...]) -> tuple[Row, ...]:
    if not path.is_file():
        raise UnreadableAudit(
            f"{path.parent} holds a plan but no {path.name}: run `turncoat report` on it, or the "
            "same `turncoat audit` command again, either of which writes it"
        )
    lines = path.read_text(encoding="utf-8").splitlines()
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):  # cut short as it was written: that row is missing
                break
            raise UnreadableAudit(
                f"{path}, line {number}, is not JSON ({error}): {_AGAIN}"
            ) from None
        _check(row, needed, f"{path}, line {number},")
        found.append(row)
    return tuple(found)


def _check(row: Any, needed: tuple[str, ...], where: str) -> None:
    if not isinstance(row, dict):
        raise UnreadableAudit(f"{where} is no JSON object: {_AGAIN}")
    if lacking := [name for name in needed if name not in row]:
        raise UnreadableAudit(f"{where} lacks {', '.join(lacking)}: {_AGAIN}")

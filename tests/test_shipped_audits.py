"""The audits that come along: contract (they plan, and their cells run), and what the report says
of a server that lies: oracle (made-up cells)."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import turncoat
from tests.report_fixture import read_json, read_rows, write_audit, write_json, write_rows
from turncoat.audit import run_audit
from turncoat.config import load_all
from turncoat.plan import plan
from turncoat.report.overview import write_overview
from turncoat.report.page import page
from turncoat.report.pooled import squares
from turncoat.report.record import read
from turncoat.report.restored import Restored, restored
from turncoat.trial import Failed

SHIPPED = sorted((Path(turncoat.__file__).parent / "audits").glob("*.toml"))
INVERSION = next(path for path in SHIPPED if path.stem == "inversion")
QUICK = (
    "rounds=1",
    "task.model.hidden=[48]",
    'defences=["none", "pruned-90", "secagg-4"]',
    "attack.cosine.optimiser.num_steps=2",
    "attack.squared-distance.optimiser.num_steps=2",
    "attack.adversarial-prior.optimiser.num_steps=2",
    "attack.learned-prior.optimiser.num_steps=2",
    "attack.learned-prior.space.num_steps=2",
    "attack.knows-zeros.optimiser.num_steps=2",
    "attack.knows-signs.optimiser.num_steps=2",
    "attack.knows-steps.optimiser.num_steps=2",
    "attack.aggregate.optimiser.num_steps=2",
    "attack.fishing.reads.num_steps=2",
)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.stem))
def test_every_variant_of_a_shipped_audit_can_be_planned(path: Path) -> None:
    for audit in load_all(path).values():
        cells = plan(audit).cells
        assert cells
        assert not any(isinstance(cell.settled, Failed) for cell in cells)


def test_cells_of_the_audit_of_inversion_run_and_none_fails(tmp_path: Path) -> None:
    audit = load_all(INVERSION, overrides=QUICK, variant="fully-connected")["fully-connected"]
    cells = run_audit(audit, tmp_path, num_jobs=1)
    assert not [cell for cell in cells.values() if isinstance(cell, Failed)]
    found = restored(read(tmp_path), squares(read(tmp_path)))
    assert [(r.defence, r.cohort, r.by.attack) for r in found] == [
        ("secagg-4", "4 clients", "imprint")
    ]


def test_variants_without_defences_are_compared_by_attack(tmp_path: Path) -> None:
    for name, defences in {"digits": ("none", "dp-8"), "bare": ("none",)}.items():
        write_audit(tmp_path / name, num_seeds=1, defences=defences, attacks=("lira", "trace"))
    text = write_overview(tmp_path).read_text(encoding="utf-8")
    assert text.count("Every attack in every variant, without a defence") == 2  # of two seats
    assert text.count('<th scope="colgroup"') == 2  # the bare one has no defences to rank


@pytest.fixture
def lied_to(tmp_path: Path) -> Iterator[Path]:
    """An audit whose second attack is a malicious server's, which masks do not stop."""
    folder = write_audit(
        tmp_path / "audit",
        num_seeds=1,
        defences=("none", "masks", "dp-8"),
        attacks=("inverting-gradients", "loss-threshold"),
    )
    lying = {"family": "inversion", "server": "Imprint()", "seats": ["server"]}
    change(folder, lambda plan: plan["attacks"][1].update(lying))
    figures = {"metric": "psnr", "unit": "dB", "baseline": 11.04, "worst": 30.0}
    reached = {"value": 31.17, "low": 28.0, "high": 34.0, "success": 1.0, "beats_baseline": True}
    rows = [
        row | {"seat": "server", "family": "inversion", "exhibits": None} | figures | reached
        if row["attack"] == "loss-threshold"
        else row
        for row in read_rows(folder / "cells.jsonl")
        if row["seat"] != "user"
    ]
    write_rows(folder / "cells.jsonl", rows)
    yield folder
    shutil.rmtree(folder)


def change(folder: Path, how: Callable[[dict[str, Any]], object]) -> None:
    plan = read_json(folder / "plan.json")
    how(plan)
    write_json(folder / "plan.json", plan)


def told(folder: Path) -> list[Restored]:
    record = read(folder)
    return restored(record, squares(record))


def test_what_a_malicious_server_restores_is_told_where_the_honest_one_is_blocked(
    lied_to: Path,
) -> None:
    (found,) = told(lied_to)  # under dp-8 nothing is blocked
    assert str(found).startswith("Under masks")
    assert "inverting-gradients is blocked" in str(found)
    assert "loss-threshold, PSNR 31.2 dB" in str(found)
    assert "baseline 11.0 dB" in str(found)
    text = page(lied_to)[0].replace("\N{NO-BREAK SPACE}", " ")
    assert "What a malicious server restores" in text
    assert str(found) in text


def test_a_malicious_server_that_fails_restores_nothing(lied_to: Path) -> None:
    path = lied_to / "cells.jsonl"
    nothing = {"value": 11.0, "low": 9.0, "high": 13.0, "success": 0.0, "beats_baseline": False}
    rows = [r | nothing if r["attack"] == "loss-threshold" else r for r in read_rows(path)]
    write_rows(path, rows)
    assert told(lied_to) == []
    assert "malicious server" not in page(lied_to)[0]


def test_an_honest_attack_that_is_left_is_no_restoration(lied_to: Path) -> None:
    change(lied_to, lambda plan: plan["attacks"][1].update(server=None))
    assert told(lied_to) == []


def test_what_names_an_attack_of_a_malicious_server_is_escaped(lied_to: Path) -> None:
    change(lied_to, lambda plan: plan["attacks"][1].update(name="<b>&"))
    path = lied_to / "cells.jsonl"
    rows = [
        r | {"attack": "<b>&"} if r["attack"] == "loss-threshold" else r for r in read_rows(path)
    ]
    write_rows(path, rows)
    text = page(lied_to)[0]
    assert "<b>&" not in text
    assert "&lt;b&gt;&amp;, PSNR" in text

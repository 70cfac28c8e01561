"""The recipe of what is released, small, and its table. Kinds: contract, theorem (ranges)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from papers.released import RELEASED, with_table
from papers.taught import Releases
from turncoat.attacks.membership.lira import LiRA
from turncoat.stages.aggregate.gnmax import GNMax
from turncoat.stages.train.local import LocalSGD
from turncoat.tasks.bundled import digits
from turncoat.tasks.models import MLP

PAGE = Path(__file__).parents[1] / "docs" / "privacy.md"


def test_the_table_on_the_page_is_that_of_the_ledger() -> None:
    page = PAGE.read_text("utf-8")
    assert page.count("<!-- released -->") == 1
    assert with_table(page) == page


def test_the_recipe_gives_the_same_figures_twice_and_asks_for_no_more_than_there_is() -> None:
    shipped = RELEASED[0].measure
    assert isinstance(shipped, Releases)
    study = LocalSGD(0.1, num_epochs=5, batch_size=20)
    small = replace(
        shipped,
        make=digits,
        train=study,
        teach=study,
        distilled=replace(shipped.distilled, tuning=study),
        student=replace(shipped.student, tuning=study),
        answers=GNMax(sigma=2.0, num_queries=30),
        num_teachers=5,
        num_candidates=200,
        attack=LiRA(2),
        options={"train_size": 200, "test_size": 100, "public_size": 50, "model": MLP((8,))},
    )
    found = small(0)
    assert found == small(0)
    assert {e.figure for e in RELEASED[0].expectations} <= found.keys()
    for name, value in found.items():
        if "AUC of" in name:
            assert isinstance(value, float) and 0 <= value <= 1
    with pytest.raises(ValueError, match="take fewer candidates"):
        replace(small, num_candidates=2_000)(0)

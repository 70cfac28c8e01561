"""The measures behind the figures on membership. Kinds: contract, oracle (scikit-learn's curve),
sabotage (clients of unlike sizes; a complement as a shadow)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import roc_auc_score, roc_curve

from papers.candidates import (
    AT_1,
    AUC,
    CURVE,
    FPRS,
    LOSS,
    Pool,
    ShadowedAttacks,
    _figures,
    lira,
    rmia,
)
from papers.leaking import Leaking
from papers.members import _SHOWN, SHADOWED, draw
from turncoat.attacks.membership.lira import LiRA
from turncoat.federation import Federation, Plain
from turncoat.games.membership import Membership
from turncoat.randomness import Randomness
from turncoat.stages.aggregate.mean import Mean
from turncoat.stages.train.local import LocalSGD
from turncoat.task import Task
from turncoat.tasks.bundled import digits
from turncoat.tasks.models import MLP
from turncoat.trial import Memberships

SMALL: Any = {"per_client": 60, "test_size": 120, "public_size": 60, "model": MLP((32,))}
TRAIN = LocalSGD(0.1, num_epochs=10, batch_size=10, momentum=0.9)


def two_clients(*, seed: int, **options: Any) -> Task:
    return digits(2, seed=seed, **options)


SMALLEST = ShadowedAttacks(
    two_clients, TRAIN, 1, num_shadows=4, few=(2,), num_targets=3, num_groups=2, options=SMALL
)


def test_all_attacks_are_measured_and_compared_on_the_same_shadows() -> None:
    found = SMALLEST(100)
    best, one = lira(True, "fixed"), rmia(True)
    assert found["candidates"] == 240
    gap = found[f"{AUC}: {best} | 4"] - found[f"{AUC}: {LOSS} | 0"]  # type: ignore[operator]
    assert found["auc_lira_minus_loss"] == gap
    gap = found[f"{AT_1}: {one} | 2"] - found[f"{AT_1}: {best} | 2"]  # type: ignore[operator]
    assert found["tpr_rmia_minus_lira_online_with_2"] == gap
    assert found["training_accuracy"] > found["test_accuracy"]  # type: ignore[operator]
    assert not any("0.1 %" in name for name in found)  # of 120 non-members


def test_figures_are_means_over_targets_and_groups_of_shadows() -> None:
    """Oracle: one attack, played by hand. The target of the audit is the first."""
    task = SMALLEST.make(seed=100, **SMALL)
    federation = Federation(train=TRAIN, channel=Plain(), aggregate=Mean())
    pool, _, headline = SMALLEST.trained(task, federation, 100)
    few, most = [], []
    for target in range(3):
        truth, pairs = pool.inside[target], pool.pairs_for(target)

        def area(attack: LiRA, *of: tuple[int, int], on: int = target) -> float:
            (inputs, labels), shadows = pool.question.candidates, pool.shadows(of)
            view: Any = pool.models[on]
            found = attack(view, candidates=(inputs, labels), shadows=shadows).scores
            return float(roc_auc_score(pool.inside[on], found))

        few += [area(LiRA(2), pairs[0]), area(LiRA(2), pairs[1])]
        most.append(area(LiRA(4), *pairs[:2]))
        assert int(truth.sum()) == len(truth) // 2
    assert most[0] == pytest.approx(headline)
    found, row = SMALLEST(100), lira(True, "fixed")
    assert found[f"{AUC}: {row} | 2"] == pytest.approx(sum(few) / 6)
    assert found[f"{AUC}: {row} | 4"] == pytest.approx(sum(most) / 3)


def test_no_target_is_compared_with_the_model_that_knew_just_the_others() -> None:
    """Sabotage: whoever had that one would read the members off it."""
    halves = torch.rand(3, 20, generator=Randomness(0).at("halves")).argsort(dim=1) < 10
    inside = torch.stack([torch.arange(20) < 10, *(h for half in halves for h in (half, ~half))])
    nobody: Any = None
    pool = Pool(nobody, (nobody,) * 7, inside)
    assert pool.pairs_for(0) == [(1, 2), (3, 4), (5, 6)]
    for target in range(1, 7):
        pairs = pool.pairs_for(target)
        assert len(pairs) == 2 and target not in {i for pair in pairs for i in pair}
        known = pool.shadows(pairs).inside
        assert known.sum(dim=0).tolist() == [2] * 20
        assert not any(torch.equal(mask, ~inside[target]) for mask in known)
    with pytest.raises(ValueError, match="ask for at most as many"):
        replace(SMALLEST, num_targets=8)


def test_a_curve_is_given_where_ten_non_members_or_more_are_flagged() -> None:
    truth = torch.arange(1200) < 200
    scores = torch.randn(1200, generator=Randomness(0).at("scores")) + truth
    marked = Membership().mark(Memberships(scores), truth, rng=Randomness(0).at("mark"))
    found = _figures("it", 4, marked, num_outs=1000)
    fpr, tpr, _ = roc_curve(truth.numpy(), scores.numpy(), drop_intermediate=False)
    for rate in FPRS:
        name = f"{CURVE}, 4 shadows: it | {rate:g}"
        assert (name in found) == (rate >= 0.01)
        if name in found:
            assert found[name] == pytest.approx(tpr[fpr <= rate].max(), abs=1e-9)


def test_what_leaks_is_compared_on_one_clients_records() -> None:
    found = Leaking(digits, TRAIN, num_rounds=3, num_clients=4, options=SMALL)(100)
    assert found["auc_all_but_one_and_update_differ_by"] < 1e-3  # type: ignore[operator]
    assert found["auc_updates_minus_steps"] > 0  # type: ignore[operator]
    with pytest.raises(ValueError, match="as many records each"):
        Leaking(digits, TRAIN, 3, 5, options={"test_size": 120, "public_size": 60})(100)


def test_the_figure_is_drawn_of_all_data_sets(tmp_path: Path) -> None:
    one = {"values": [0.0, 0.2], "value": 0.1, "low": 0.0, "high": 0.2}
    names = [f"{CURVE}, {n} shadows: {row} | {rate:g}" for row, n in _SHOWN for rate in FPRS[3:]]
    draw({e.name: dict.fromkeys(names, one) for e in SHADOWED}, tmp_path / "it.png")
    assert (tmp_path / "it.png").stat().st_size > 10_000

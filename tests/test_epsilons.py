"""The curves over epsilon: what they measure, on little data, and what is drawn of a ledger.

Kinds: oracle (epsilon composed by hand, LiRA against each target), theorem (labels), contract (a
figure and its table).
"""

from __future__ import annotations

import json
from dataclasses import replace
from math import inf
from pathlib import Path

import pytest
import torch
from dp_accounting.pld import PLDAccountant
from sklearn.metrics import roc_curve

from papers.epsilons import ClientCurves, RecordCurves, _Run, said
from papers.noised import NOISED, drawn
from turncoat.attacks.membership.lira import LiRA
from turncoat.metrics.intervals import clopper_pearson
from turncoat.randomness import Randomness
from turncoat.stages.train.dpsgd import DPSGD
from turncoat.stages.train.local import LocalSGD
from turncoat.tasks.bundled import digits
from turncoat.tasks.models import MLP
from turncoat.views import Shadows

CLIENTS = ClientCurves(
    digits,
    LocalSGD(lr=0.5, num_steps=2, batch_size=10),
    (4, 12),
    (2.0, inf),
    1e-5,
    max_norm=1.0,
    num_rounds=2,
    compared=(2.0,),
    options={"model": MLP(())},
)
RECORDS = RecordCurves(
    digits,
    DPSGD(lr=0.5, max_norm=1.0, expected_batch=40, noise_multiplier=0.0),
    LocalSGD(lr=0.1, num_epochs=20, batch_size=10, momentum=0.9),
    2,
    LiRA(2),
    400,
    100,
    20,
    (1.0, inf),
    1e-5,
    {"model": MLP(()), "test_size": 797},
)


def test_clients_share_noise_that_keeps_epsilon_and_more_of_them_lose_less() -> None:
    found = CLIENTS(seed=1)
    for n in (4, 12):
        assert 1.95 < float(found[f"ε composed: {n} clients | ε = 2"]) <= 2
        assert found[f"noise, in lengths of an update: {n} clients | ε = ∞"] == 0
    assert len({v for k, v in found.items() if k.startswith("noise") and k.endswith("2")}) == 1
    assert float(found["points gained from 4 to 12 clients, ε = 2"]) > 0


def test_each_expectation_is_of_a_figure_that_is_measured() -> None:
    clients = replace(CLIENTS, num_clients=(4, 8, 12), num_rounds=1)(seed=1)
    for e in NOISED[0].expectations:
        name = e.figure.replace("1000", "12").replace("200", "8").replace("50", "4")
        assert name.replace(said(4.0), said(2.0)) in clients
    records = set(RECORDS(seed=1))
    assert {x.figure for e in NOISED[1:] for x in e.expectations} <= records


def test_the_noise_of_dp_sgd_keeps_epsilon_for_members_and_audited_alike() -> None:
    stage = RECORDS._fitted(1.0)
    assert isinstance(stage, DPSGD) and stage.num_steps == 10
    spent = PLDAccountant().compose(stage.event(200)).get_epsilon(1e-5)
    assert 0.97 < spent <= 1.0
    assert PLDAccountant().compose(stage.event(250)).get_epsilon(1e-5) <= spent


def test_a_canary_never_has_its_own_label() -> None:
    task = digits(1, test_size=797)
    run = _Run(RECORDS, task, task.test, Randomness(0), 0, RECORDS.free)
    _, wrong = run._mislabelled(task.test)
    assert not (wrong == task.test[1]).any()
    assert set(wrong.tolist()) == set(range(10))


def test_every_model_is_a_target_and_its_own_pair_is_no_shadow_of_it() -> None:
    """Oracle: LiRA against each, by hand. Starts and noise are of each model's own."""
    task = digits(1, test_size=797, model=MLP(()))
    run = _Run(RECORDS, task, task.test, Randomness(0), 0, RECORDS._fitted(1.0))
    candidates = task.test[0][:400], task.test[1][:400]
    halves = torch.stack([run.half(i) for i in range(4)])
    assert run.num_models == 4 and halves.sum(dim=1).tolist() == [200] * 4
    assert torch.equal(halves[1], ~halves[0]) and torch.equal(halves[3], ~halves[2])
    models = [run.trained((candidates[0][h], candidates[1][h]), i) for i, h in enumerate(halves)]
    ends = torch.stack([m.params for m in models])
    assert torch.pdist(ends).min() > 0.5 * ends.norm(dim=1).mean()
    rates = []
    for i, h in enumerate(halves):
        pair = [2, 3] if i < 2 else [0, 1]
        shadows = Shadows((models[pair[0]], models[pair[1]]), halves[pair])
        scores = LiRA(2)(models[i], candidates=candidates, shadows=shadows).scores
        fpr, tpr, _ = roc_curve(h.numpy(), scores.numpy(), drop_intermediate=False)
        rates.append(100 * tpr[fpr <= 0.01].max())
    found = run.attacked()
    mean = sum(rates) / 4
    assert found["TPR at 1 % FPR, percent: LiRA"] == pytest.approx(mean)
    low, high = clopper_pearson(round(2 * mean), 200)  # members of one target
    assert found["TPR at 1 % FPR, percent: LiRA, lower limit"] == pytest.approx(100 * low)
    assert found["TPR at 1 % FPR, percent: LiRA, upper limit"] == pytest.approx(100 * high)


@pytest.mark.parametrize("num_seeds", [1, 2])
def test_a_figure_and_its_table_come_from_the_ledger(tmp_path: Path, num_seeds: int) -> None:
    cell = {"value": 41.25, "low": 40.0, "high": 42.5, "values": [41.25] * num_seeds}
    rows = ("accuracy, percent: test", "TPR at 1 % FPR, percent: LiRA", "ε: audit, lower limit")
    figures = {f"{row} | {said(e)}": cell for row in rows for e in (0.5, inf)}
    ledger = tmp_path / "ledger.json"
    ledger.write_text(json.dumps({"experiments": [{"name": "epsilon-digits", "figures": figures}]}))
    page = tmp_path / "privacy.md"
    page.write_text("<!-- record-privacy -->\nstale\n<!-- end -->\nrest\n", encoding="utf-8")
    target = tmp_path / "record-privacy.png"
    assert drawn(["--figure", str(target), "--ledger", str(ledger)]) == 0
    assert target.stat().st_size > 10_000
    told = page.read_text(encoding="utf-8")
    shown = "41.2" if num_seeds == 1 else "41.2 (40.0 to 42.5)"
    none = " | ".join("\N{EN DASH}" * 4)
    assert f"| accuracy, percent | {shown} | {none} | {shown} |" in told
    assert "stale" not in told and told.endswith("<!-- end -->\nrest\n")


def test_a_ledger_without_the_experiment_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = tmp_path / "ledger.json"
    ledger.write_text('{"experiments": []}')
    with pytest.raises(SystemExit):
        drawn(["--figure", str(tmp_path / "client-privacy.png"), "--ledger", str(ledger)])
    assert "run the ledger first" in capsys.readouterr().err

"""Requests that private training and its measures cannot meet: each is refused, or warned of.

Kind: contract. An error names the fact and the cure.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
import torch

from turncoat.attacks.membership.loss_threshold import LossThreshold
from turncoat.audit import run_audit
from turncoat.explain import explained
from turncoat.federation import Federation, Plain
from turncoat.games.membership import Membership
from turncoat.metrics.ranking import ROC
from turncoat.plan import Audit, Entry
from turncoat.privacy import Private, Unit, guarantees, loose
from turncoat.randomness import Randomness
from turncoat.report.page import write_report
from turncoat.runtimes.simulate import simulate
from turncoat.stage import Plan, Train
from turncoat.stages.aggregate.dp_fedavg import DPFedAvg
from turncoat.stages.aggregate.mean import Mean
from turncoat.stages.train.dpsgd import DPSGD, LooseDelta, noise_for
from turncoat.stages.train.local import Clipped, LocalSGD
from turncoat.task import Model, Task
from turncoat.tasks.models import MLP, Built, ConvNet
from turncoat.trial import Memberships, Trial

ROOT = Randomness(0)
RULE = DPSGD(0.1, 1.0, 8, noise_multiplier=1.0)
TARGET = DPSGD(0.1, 1.0, 8, target_epsilon=8.0, delta=1e-5)


def federation(train: Train[Any] = RULE, **more: Any) -> Federation[Any, Any]:
    stages: dict[str, Any] = {"train": train, "channel": Plain(), "aggregate": Mean()}
    return Federation(**stages | more)


NET = MLP((4,))


def task(net: Any = NET, num_clients: int = 2, num_records: int = 10) -> Task:
    rng = ROOT.at("data")
    clients = tuple(
        (
            torch.rand(num_records, 1, 4, 4, generator=rng),
            torch.randint(3, (num_records,), generator=rng),
        )
        for _ in range(num_clients)
    )
    return Task("noise", Model(Built(net, (1, 4, 4), 3)), clients, test=clients[0])


def audit(train: Train[Any], of: Task, delta: float = 1e-5, **more: Any) -> Audit:
    return Audit(
        title="private",
        task=of,
        federations={"private": federation(train, **more)},
        entries={"loss": Entry(Trial(LossThreshold(), Membership()))},
        num_rounds=1,
        seeds=(0,),
        delta=delta,
    )


@pytest.mark.parametrize("epsilon", [0.0, -1.0, inf, nan])
def test_an_epsilon_that_is_no_promise_is_refused(epsilon: float) -> None:
    with pytest.raises(ValueError, match=f"target_epsilon must be positive; it is {epsilon}"):
        replace(TARGET, target_epsilon=epsilon)
    with pytest.raises(ValueError, match=f"epsilon must be positive; it is {epsilon}"):
        noise_for(epsilon, 1e-5, 0.1, 10)


@pytest.mark.parametrize(
    ("delta", "said"),
    [(0.0, "between 0 and 1; it is 0.0"), (1.0, "between 0 and 1; it is 1.0"), (-1e-5, "-1e-05")],
)
def test_a_delta_that_is_no_chance_is_refused(delta: float, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(TARGET, delta=delta)


@pytest.mark.parametrize(
    ("delta", "rate", "num_steps", "said"),
    [
        (0.0, 0.1, 1, "delta must be positive"),
        (1.5, 0.1, 1, "delta must be within 0 and 1"),
        (1e-5, 1.5, 1, "rate must be within 0 and 1"),
        (1e-5, 0.1, 0, "num_steps must be at least 1"),
    ],
)
def test_noise_is_not_sought_for_what_cannot_be(
    delta: float, rate: float, num_steps: int, said: str
) -> None:
    with pytest.raises(ValueError, match=f"noise_for: {said}"):
        noise_for(1.0, delta, rate, num_steps)


def test_a_finite_epsilon_without_noise_is_refused_with_both_cures() -> None:
    with pytest.raises(
        ValueError, match=r"without noise ε is infinite, and not 8: leave out noise_multiplier.* or"
    ):
        replace(TARGET, noise_multiplier=0.0)


def test_without_noise_no_finite_epsilon_is_stated() -> None:
    (found,) = guarantees(
        federation(replace(RULE, noise_multiplier=0.0)), num_records=10, num_rounds=1, delta=1e-5
    )
    assert isinstance(found, Private) and found.epsilon == inf


def test_a_delta_of_one_in_all_records_is_warned_of() -> None:
    plan = Plan(1, (60, 40))
    for delta in (0.01, 0.02):
        rule = replace(TARGET, delta=delta)
        with pytest.warns(LooseDelta, match=f"δ = {delta} is not below 1 / 100 records.*lower"):
            fitted = rule.planned(plan)
        assert fitted.noise_multiplier is not None  # warned, and done
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        replace(TARGET, delta=0.009).planned(plan)


@pytest.mark.parametrize(("delta", "doubted"), [(0.05, True), (0.04, False)])
def test_an_audit_says_so_of_the_delta_that_it_states(delta: float, doubted: bool) -> None:
    lines = "\n".join(explained(audit(RULE, task(), delta)))
    assert ("is not below 1 / 20 records" in lines) is doubted


def test_so_does_its_report(tmp_path: Path) -> None:
    run_audit(audit(RULE, task(), 0.5), tmp_path / "doubted")
    page = write_report(tmp_path / "doubted").read_text(encoding="utf-8")
    assert "is not below 1 / 20 records, so that publishing one of them keeps to it" in page


def test_for_clients_it_is_their_number_that_counts() -> None:
    rule = DPFedAvg(max_norm=1.0, noise_multiplier=4.0, expected_cohort=2)
    lines = "\n".join(explained(audit(LocalSGD(0.1), task(), 0.5, aggregate=rule)))
    assert "δ = 0.5 is not below 1 / 2 clients" in lines
    assert loose(0.4, 2, Unit.CLIENT) is None


@pytest.mark.parametrize(
    ("num", "fpr", "needed"), [(99, 0.01, "100"), (5, 0.001, "1,000"), (2, 0.3, "4")]
)
def test_too_few_non_members_for_a_rate_are_refused_with_the_number_needed(
    num: int, fpr: float, needed: str
) -> None:
    roc = ROC.of(torch.rand(9), torch.rand(num))
    with pytest.raises(ValueError, match=f"at least {needed} non-members.*there are {num}: take"):
        roc.tpr_at(fpr)


@pytest.mark.parametrize(
    ("num", "fpr"), [(100, 0.01), (10, 0.1), (1000, 0.001), (3, 1 / 3), (49, 1 / 49), (5, 0.0)]
)
def test_as_many_as_are_needed_are_enough(num: int, fpr: float) -> None:
    ins, outs = torch.full((4,), 2.0), torch.arange(num) / num
    assert ROC.of(ins, outs).tpr_at(fpr) == 1.0


def test_a_game_gives_no_rate_that_its_non_members_cannot_carry() -> None:
    truth = torch.arange(180) < 90
    marked = Membership().mark(
        Memberships(torch.rand(180, generator=ROOT.at("s"))), truth, rng=ROOT.at("m")
    )
    assert marked.others == ()


BATCHED = ConvNet((4, 8), normalisation="batch")


@pytest.mark.parametrize(
    ("net", "layer"), [(BATCHED, r"'1' \(BatchNorm2d\)"), (MLP((4,), normalisation="batch"), "'2'")]
)
@pytest.mark.parametrize("rule", [RULE, TARGET, Clipped(1.0, RULE)])
def test_batch_normalisation_is_refused_by_name_before_anything_is_trained(
    net: Any, layer: str, rule: Any
) -> None:
    with pytest.raises(ValueError, match=f"no guarantee for layer {layer}.*such as one with Group"):
        simulate(federation(rule), task(net), num_rounds=1, seed=0)
    with pytest.raises(ValueError, match=f"no guarantee for layer {layer}"):
        list(explained(audit(rule, task(net))))


def test_group_normalisation_is_not() -> None:
    net = ConvNet((4, 8), normalisation="group")
    run = simulate(federation(), task(net), num_rounds=1, seed=0)
    assert not run.log[0].incidents


def test_a_file_that_asks_for_it_ends_with_the_layers_name(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from turncoat.cli import app

    file = tmp_path / "private.toml"
    file.write_text(
        """
title = "private"
rounds = 1
seeds = [0]

[task]
use = "digits"
num_clients = 2
model = { use = "mlp", hidden = [4], normalisation = "batch" }

[federation]
train = { use = "dp-sgd", lr = 0.1, max_norm = 1.0, expected_batch = 8, noise_multiplier = 1.0 }
channel = "plain"
aggregate = "mean"

[attack.loss]
use = "loss-threshold"
""",
        encoding="utf-8",
    )
    ended = CliRunner().invoke(app, ["explain", str(file)])
    assert ended.exit_code == 2
    assert "layer '2' (BatchNorm1d)" in ended.output and "GroupNorm" in ended.output

"""DP-FTRL, and whether accountants agree.

Kinds: theorem (hypothesis: after t steps popcount(t) nodes are left; no client moves a tree's sums
by more than its event says), oracle (the sum by hand; dp-accounting's own event of a tree; Opacus'
PRV beside PLD), statistics (the noise has the deviation of so many nodes), sabotage (a client who
comes in every round).
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from math import sqrt
from typing import Any

import dp_accounting
import pytest
import torch
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant
from scipy.stats import chi2
from torch import Tensor

from turncoat.federation import Federation, Plain, PoissonSample
from turncoat.messages import Update
from turncoat.privacy import Private, Unit, guarantees
from turncoat.randomness import Randomness
from turncoat.runtimes.simulate import simulate
from turncoat.stage import Memory
from turncoat.stages.aggregate.dp_ftrl import DPFTRL, grown
from turncoat.stages.aggregate.optimisers import ServerMomentum
from turncoat.stages.train.local import LocalSGD
from turncoat.tasks.bundled import digits
from turncoat.tasks.models import MLP

RANDOM = Randomness(11)
TASK = digits(6, per_client=4, seed=0, model=MLP((4,)))
SIZE = TASK.model.layout.num_params
RULE = DPFTRL(max_norm=1.0, noise_multiplier=1.0, expected_cohort=4, restart_every=8)


def played(rule: DPFTRL, rounds: list[dict[int, Tensor]]) -> Tensor:
    """Return the model after each round, from zero. Shape: ``(rounds, SIZE)``."""
    cell: dict[str, Any] = {}
    steps = [
        rule(
            [Update(row, 1.0) for row in sent.values()],
            rng=RANDOM.at("aggregate", t),
            model=TASK.model,
            cohort=tuple(sent),
            memory=Memory(cell),
        )
        for t, sent in enumerate(rounds)
    ]
    return torch.stack(steps).double().cumsum(dim=0)


@pytest.mark.parametrize("num_steps", [1, 2, 7, 8, 64])
def test_after_t_steps_the_model_holds_the_noise_of_popcount_t_nodes(num_steps: int) -> None:
    nodes: tuple[Tensor | None, ...] = ()
    for t in range(1, num_steps + 1):
        nodes = grown(nodes, t - 1, 3, RANDOM.at("node", t))
        assert [node is not None for node in nodes] == [c == "1" for c in f"{t:b}"[::-1]]
        assert sum(node is not None for node in nodes) == t.bit_count()


def test_the_noise_of_a_model_is_that_of_its_nodes_and_no_more() -> None:
    rule = replace(RULE, noise_multiplier=0.7, max_norm=3.0, restart_every=64)
    models = played(rule, [{} for _ in range(64)]) * rule.expected_cohort / (0.7 * 3.0)
    for t in (1, 7, 32, 63, 64):
        low, high = chi2.interval(0.999, SIZE)
        assert low < float(models[t - 1].square().sum()) / t.bit_count() < high
    before, after = models[31], models[47]  # 32, and 32 + 16: one node more
    low, high = chi2.interval(0.999, SIZE)
    assert low < float((after - before).square().sum()) < high


def test_a_restart_leaves_the_old_noise_and_begins_a_new_tree() -> None:
    models = played(replace(RULE, restart_every=4), [{} for _ in range(8)])
    models *= RULE.expected_cohort
    second = models[4:] - models[3]
    for t in (1, 2, 3, 4):
        low, high = chi2.interval(0.999, SIZE)
        assert low < float(second[t - 1].square().sum()) / t.bit_count() < high


def test_without_noise_it_is_the_sum_of_the_shortened_updates() -> None:
    rows = torch.randn(6, SIZE, generator=RANDOM.at("rows")) / sqrt(SIZE)
    rows[0] *= 100
    models = played(
        replace(RULE, noise_multiplier=0.0),
        [{0: rows[0], 1: rows[1]}, {2: rows[2]}, {}, {3: rows[3], 4: rows[4]}],
    )
    factors = (1 / rows.norm(dim=1)).clamp(max=1.0)
    by_hand = (rows * factors[:, None])[:5].sum(dim=0) / 4
    assert torch.allclose(models[-1].float(), by_hand, atol=1e-6)


@given(st.lists(st.booleans(), min_size=1, max_size=20), st.integers(1, 8), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_no_client_moves_the_models_by_more_than_once_a_tree(
    comes: list[bool], restart_every: int, seed: int
) -> None:
    """Between two restarts the models move together, by the bound at most."""
    rule = replace(RULE, restart_every=restart_every)
    row = torch.randn(SIZE, generator=RANDOM.at("row", seed))
    other = torch.randn(SIZE, generator=RANDOM.at("other", seed))
    with_it = played(rule, [{0: other, 1: row} if come else {0: other} for come in comes])
    without = played(rule, [{0: other} for _ in comes])
    moved = (with_it - without) * rule.expected_cohort
    steps = torch.cat([moved[:1], moved.diff(dim=0)]).norm(dim=1)
    for tree in steps.split(restart_every):
        assert float(tree.sum()) <= rule.max_norm * (1 + 1e-4)


def test_who_comes_in_every_round_counts_once_and_again_after_a_restart() -> None:
    row = torch.ones(SIZE) / sqrt(SIZE)
    models = played(replace(RULE, noise_multiplier=0.0, restart_every=3), [{5: row}] * 7)
    lengths = models.norm(dim=1) * RULE.expected_cohort
    assert lengths.tolist() == pytest.approx([1, 1, 1, 2, 2, 2, 3], abs=1e-5)


def test_messages_of_nobody_known_are_refused() -> None:
    with pytest.raises(ValueError, match="counts each client once"):
        RULE(
            [Update(torch.zeros(SIZE), 1.0)],
            rng=RANDOM.at("x"),
            model=TASK.model,
            cohort=(),
            memory=Memory(),
        )


@pytest.mark.parametrize("num_rounds", [1, 5, 8, 20, 24])
def test_its_cost_is_that_of_dp_accountings_trees(num_rounds: int) -> None:
    full, left = divmod(num_rounds, RULE.restart_every)
    lengths = [RULE.restart_every] * full + ([left] if left else [])
    trees = [dp_accounting.SingleEpochTreeAggregationDpEvent(5.0, step_counts=n) for n in lengths]
    by_hand = RdpAccountant(
        neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_SPECIAL
    ).compose(dp_accounting.ComposedDpEvent(trees))
    ours = RdpAccountant().compose(
        replace(RULE, noise_multiplier=5.0).training_event(1, num_rounds)
    )
    assert ours.get_epsilon(1e-5) == pytest.approx(by_hand.get_epsilon(1e-5), rel=1e-6)


def test_its_epsilon_owes_nothing_to_sampling() -> None:
    found: list[Any] = []
    quiet = replace(RULE, noise_multiplier=8.0)
    several: tuple[dict[str, Any], ...] = ({}, {"sample": PoissonSample(0.1)})
    for stages in several:
        for rule in (quiet, ServerMomentum(0.9, quiet)):
            federation: Any = Federation(
                train=LocalSGD(0.1), channel=Plain(), aggregate=rule, **stages
            )
            found += guarantees(federation, num_records=4, num_rounds=20, delta=1e-5)
    assert all(isinstance(g, Private) and g.against == {"client", "user"} for g in found)
    assert {g.unit for g in found} == {Unit.CLIENT} and len(set(map(str, found))) == 1
    events = [dp_accounting.GaussianDpEvent(8 / sqrt(n)) for n in (4, 4, 3)]
    by_hand = PLDAccountant().compose(dp_accounting.ComposedDpEvent(events)).get_epsilon(1e-5)
    assert found[0].epsilon == pytest.approx(by_hand, rel=1e-6)


def test_in_a_run_it_learns_and_resumes_to_the_same_bits() -> None:
    federation: Any = Federation(
        train=LocalSGD(0.1),
        channel=Plain(),
        aggregate=RULE,
        sample=PoissonSample(0.3),
        min_clients=0,
    )
    whole = simulate(federation, TASK, num_rounds=12, seed=3)
    part = simulate(federation, TASK, num_rounds=12, seed=3, until=5)
    rest = simulate(federation, TASK, num_rounds=12, seed=3, state=part.state)
    assert torch.equal(whole.state.params, rest.state.params)
    assert any(not entry.cohort for entry in whole.log)  # nobody came, and noise was released


@pytest.mark.parametrize(
    ("sigma", "rate", "steps"),
    [(0.8, 0.01, 1000), (1.0, 0.05, 200), (1.5, 0.004, 5000), (2.0, 0.1, 500), (4.0, 0.5, 50)],
)
def test_prv_and_pld_agree_to_2_percent(sigma: float, rate: float, steps: int) -> None:
    accountant = PRVAccountant()
    accountant.history = [(sigma, rate, steps)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prv = float(accountant.get_epsilon(1e-5))
    step = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(sigma))
    pld = PLDAccountant().compose(step, steps).get_epsilon(1e-5)
    assert prv == pytest.approx(pld, rel=0.02)

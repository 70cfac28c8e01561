"""Client-level differential privacy: what is released, what it costs, what it stops.

Kinds: theorem (hypothesis: no client moves the sum by more than the bound), oracle (the sum without
noise by hand; dp-accounting composed by hand; the quantile of the norms), statistics (the noise has
the deviation that the guarantee assumes), sabotage (a client with an absurd update).
"""

from __future__ import annotations

from dataclasses import replace
from math import sqrt
from typing import Any

import dp_accounting
import pytest
import torch
from dp_accounting.pld import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2
from torch import Tensor

from turncoat.federation import Federation, Plain, PoissonSample
from turncoat.messages import Update
from turncoat.privacy import Private, Unit, guarantees
from turncoat.randomness import Randomness
from turncoat.stage import Memory
from turncoat.stages.aggregate.dp_fedavg import DPFedAvg
from turncoat.stages.train.local import LocalSGD
from turncoat.tasks.bundled import digits
from turncoat.tasks.models import MLP

RANDOM = Randomness(7)
MODEL = digits(2, per_client=4, seed=0, model=MLP((4,))).model
SIZE = MODEL.layout.num_params
EXACT = DPFedAvg(max_norm=1.0, noise_multiplier=0.0, expected_cohort=4)


def step(rule: DPFedAvg, matrix: Tensor, number: int = 0, memory: Any = None) -> Tensor:
    sent = [Update(row, 1.0) for row in matrix]
    rng = RANDOM.at("aggregate", number)
    return rule(sent, rng=rng, model=MODEL, memory=memory or Memory())


def updates(num: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(num, SIZE, generator=RANDOM.at("updates", seed)) * scale / sqrt(SIZE)


@given(st.integers(0, 99), st.floats(0.01, 1e6), st.booleans(), st.sampled_from([0.5, 1.0, 30.0]))
@settings(max_examples=30, deadline=None)
def test_no_client_moves_the_sum_by_more_than_the_bound(
    seed: int, scale: float, per_layer: bool, bound: float
) -> None:
    rule = replace(EXACT, max_norm=bound, per_layer=per_layer)
    matrix = updates(4, seed)
    matrix[3] *= scale
    moved = (step(rule, matrix) - step(rule, matrix[:3])) * rule.expected_cohort
    assert float(moved.norm()) <= bound * (1 + 1e-5)


def test_short_updates_are_averaged_over_the_expected_cohort() -> None:
    matrix = updates(3, 0, scale=0.5)
    assert torch.allclose(step(EXACT, matrix), matrix.sum(dim=0) / 4, atol=1e-7)
    absurd = torch.cat([matrix, torch.full((1, SIZE), float("nan"))])
    assert torch.allclose(step(EXACT, absurd), matrix.sum(dim=0) / 4, atol=1e-7)


def test_the_noise_has_the_deviation_that_the_guarantee_assumes() -> None:
    rule = replace(EXACT, max_norm=3.0, noise_multiplier=0.7)
    drawn = step(rule, torch.zeros(2, SIZE)) * rule.expected_cohort
    squares = float(drawn.double().square().sum()) / (0.7 * 3.0) ** 2
    low, high = chi2.interval(0.999, SIZE)
    assert low < squares < high
    other = step(rule, torch.zeros(2, SIZE), number=1) * rule.expected_cohort
    assert abs(float(torch.corrcoef(torch.stack([drawn, other]))[0, 1])) < 4 / sqrt(SIZE)


def test_a_round_without_clients_releases_noise_of_the_same_size() -> None:
    rule = replace(EXACT, noise_multiplier=0.7)
    alone = step(rule, torch.zeros(0, SIZE))
    assert torch.allclose(alone, step(rule, torch.zeros(2, SIZE)), atol=1e-7)


@pytest.mark.parametrize("first", [0.1, 100.0])
def test_the_bound_finds_the_median_norm_within_200_rounds(first: float) -> None:
    rule = DPFedAvg(
        max_norm=first, noise_multiplier=0.5, expected_cohort=50, quantile=0.5, bits_noise=2.5
    )
    cell: dict[str, Any] = {}
    lengths = torch.linspace(1, 9, 50)  # the median is 5
    matrix = updates(50, 1)
    matrix *= (lengths / matrix.norm(dim=1))[:, None]
    for t in range(200):
        step(rule, matrix, number=t, memory=Memory(cell))
    assert Memory[float](cell).last(0.0) == pytest.approx(5.0, rel=0.1)


def test_updates_and_bits_together_cost_what_is_claimed() -> None:
    rule = DPFedAvg(
        max_norm=1.0, noise_multiplier=1.0, expected_cohort=100, quantile=0.5, bits_noise=5.0
    )
    both = [
        dp_accounting.GaussianDpEvent(rule.update_noise),
        dp_accounting.GaussianDpEvent(2 * 5.0),
    ]
    spent = PLDAccountant().compose(dp_accounting.ComposedDpEvent(both)).get_epsilon(1e-5)
    claimed = PLDAccountant().compose(rule.event(1)).get_epsilon(1e-5)
    assert spent == pytest.approx(claimed, rel=1e-3)
    with pytest.raises(ValueError, match="give a bits_noise above"):
        replace(rule, noise_multiplier=20.0)


def test_its_epsilon_is_amplified_for_those_who_do_not_see_who_came() -> None:
    rule = DPFedAvg(max_norm=1.0, noise_multiplier=1.0, expected_cohort=5)
    federation: Any = Federation(
        train=LocalSGD(0.1), channel=Plain(), aggregate=rule, sample=PoissonSample(0.1)
    )
    (found,) = guarantees(federation, num_records=10, num_rounds=20, delta=1e-5)
    assert isinstance(found, Private)
    assert found.unit is Unit.CLIENT and found.against == {"client", "user"}
    event = dp_accounting.PoissonSampledDpEvent(0.1, dp_accounting.GaussianDpEvent(1.0))
    by_hand = PLDAccountant().compose(event, 20).get_epsilon(1e-5)
    assert found.epsilon == pytest.approx(by_hand, rel=1e-6)

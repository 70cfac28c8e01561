"""Noise that clients add themselves: all of it, or a share under masks.

Kinds: statistics (the sum of shares has the variance that the guarantee assumes), oracle (the sum
of rounded shares, convolved exactly; dp-accounting by hand; the central rule), sabotage (members
who leave their share out), contract (what is refused).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import exp, sqrt
from typing import Any

import dp_accounting
import numpy as np
import pytest
import torch
from dp_accounting.pld import PLDAccountant
from scipy.stats import chi2, norm
from torch import Tensor

from turncoat.coalition import Clients, Coalition
from turncoat.federation import Federation, Plain, PoissonSample
from turncoat.messages import Envelope, Update
from turncoat.privacy import Private, Unit, guarantees
from turncoat.randomness import Randomness
from turncoat.runtimes.simulate import simulate
from turncoat.stage import IncompatibleStages
from turncoat.stages.aggregate.dp_fedavg import DPFedAvg
from turncoat.stages.aggregate.mean import Mean
from turncoat.stages.channel.distributed_noise import DistributedNoise
from turncoat.stages.channel.secure_aggregation import SecureAggregation
from turncoat.stages.train.local import LocalSGD
from turncoat.stages.train.local_noise import LocalNoise
from turncoat.task import Batch, Model
from turncoat.tasks.bundled import digits
from turncoat.tasks.models import MLP

NUM_CLIENTS = 6
TASK = digits(NUM_CLIENTS, per_client=4, seed=0, model=MLP(()))
SIZE = TASK.model.layout.num_params


@dataclass(frozen=True)
class Still:
    """Trains nothing, so that what is summed is noise; some clients drop out."""

    gone: frozenset[int] = frozenset()
    size: float = 0.0

    def __call__(self, model: Model, start: Tensor, data: Batch, *, envelope: Envelope) -> Update:
        if envelope.sender in self.gone:
            raise RuntimeError("the battery is flat")
        return Update(torch.full_like(start, self.size), 1.0)


@dataclass(frozen=True)
class Mixed:
    """Client 0 sends all it may, the others nothing."""

    weights: tuple[float, ...] = (1.0,) * NUM_CLIENTS

    def __call__(self, model: Model, start: Tensor, data: Batch, *, envelope: Envelope) -> Update:
        size = 9.0 * (envelope.sender == 0)
        return Update(torch.full_like(start, size), self.weights[envelope.sender])


SHARES = DistributedNoise(2.0, 0.8, NUM_CLIENTS, SecureAggregation())


def step(channel: Any, train: Any = None, coalition: Any = None, seed: int = 0) -> Any:
    federation: Any = Federation(train=train or Still(), channel=channel, aggregate=Mean())
    start = federation.begin(TASK, rng=Randomness(seed).at("begin"))
    run = simulate(federation, TASK, num_rounds=1, seed=seed, coalition=coalition)
    return (run.state.params - start).double(), run.log[0]


def deviation_fits(drawn: Tensor, std: float) -> bool:
    low, high = chi2.interval(0.9999, len(drawn))
    return bool(low < float(drawn.square().sum()) / std**2 < high)


def found(federation: Any, rounds: int = 5) -> Private:
    (one,) = guarantees(federation, num_records=4, num_rounds=rounds, delta=1e-5)
    assert isinstance(one, Private)
    return one


# shares


def test_the_sum_of_all_shares_has_the_noise_of_one_who_adds_it_alone() -> None:
    moved, _ = step(SHARES)
    assert deviation_fits(moved * NUM_CLIENTS, 0.8 * 2.0)


@pytest.mark.parametrize("num_gone", [1, 3])
def test_noise_of_those_who_drop_out_is_missing_and_was_accounted_for(num_gone: int) -> None:
    left = NUM_CLIENTS - num_gone
    channel = replace(SHARES, min_survivors=left, inner=SecureAggregation(recovers_from=left))
    moved, _ = step(channel, Still(frozenset(range(num_gone))))
    assert channel.least_multiplier == pytest.approx(0.8 * sqrt(left / NUM_CLIENTS))
    assert deviation_fits(moved * left, channel.least_multiplier * 2.0)
    assert not deviation_fits(moved * left, 0.8 * 2.0 * 1.2)


def test_a_round_of_too_few_is_not_summed() -> None:
    channel = replace(SHARES, min_survivors=5, inner=SecureAggregation(recovers_from=2))
    moved, log = step(channel, Still(frozenset({0, 1})))
    assert not moved.any()
    assert any("promises the noise of 5 clients; 4 are left" in i.what for i in log.incidents)


def test_members_who_leave_their_share_out_weaken_the_sum_by_what_is_stated() -> None:
    channel = replace(SHARES, num_silent=4)
    silent = Coalition[Update](members=Clients((0, 1, 2, 3)), channel=SecureAggregation())
    moved, _ = step(channel, coalition=silent)
    assert deviation_fits(moved * NUM_CLIENTS, channel.least_multiplier * 2.0)
    assert not deviation_fits(moved * NUM_CLIENTS, 0.8 * 2.0)


def test_no_update_weighs_more_than_its_bound() -> None:
    moved, _ = step(replace(SHARES, noise_multiplier=0.0), Still(size=1e3))
    assert float(moved.norm()) == pytest.approx(2.0, rel=1e-5)


def test_a_client_with_many_records_weighs_no_more_than_its_noise_covers() -> None:
    """Weighed by what it claims, one client could move the mean by far more than its bound."""
    heavy = (1_000.0,) + (1.0,) * (NUM_CLIENTS - 1)
    none = replace(SHARES, noise_multiplier=0.0)
    moved = [step(none, Mixed(weights=w))[0] for w in (heavy, Mixed.weights)]
    assert float(moved[0].norm()) == pytest.approx(2.0 / NUM_CLIENTS, rel=1e-3)
    torch.testing.assert_close(moved[0], moved[1])


def test_epsilon_is_that_of_the_central_rule_and_holds_against_the_server_too() -> None:
    train, rule = LocalSGD(0.1), DPFedAvg(max_norm=2.0, noise_multiplier=0.8, expected_cohort=6)
    central: Any = Federation(train=train, channel=Plain(), aggregate=rule)
    shared: Any = Federation(train=train, channel=SHARES, aggregate=Mean())
    assert found(shared).epsilon == found(central).epsilon
    assert found(shared).unit is Unit.CLIENT
    assert found(central).against == {"user", "client"}
    assert found(shared).against == {"user", "server", "neighbour"}


def test_epsilon_counts_only_shares_that_are_sure() -> None:
    channel = replace(SHARES, min_survivors=5, num_silent=2)
    federation: Any = Federation(train=LocalSGD(0.1), channel=channel, aggregate=Mean())
    event = dp_accounting.GaussianDpEvent(0.8 * sqrt(3 / NUM_CLIENTS))
    by_hand = PLDAccountant().compose(event, 5).get_epsilon(1e-5)
    assert found(federation).epsilon == pytest.approx(by_hand, rel=1e-6)
    assert "client" in found(federation).against  # who knows a share is one of the silent


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_rounding_256_steps_leaves_delta_as_it_is(shift: float) -> None:
    """Three shares of 256 steps, rounded and convolved exactly, beside the Gaussian of the sum."""
    num, std = 3, 256.0
    total = std * sqrt(num)
    distance = total  # a noise multiplier of 1
    places = np.arange(-4_000, 4_001)

    def share(mean: float) -> Any:
        upper, lower = (norm.cdf((places + half - mean) / std) for half in (0.5, -0.5))
        return upper - lower

    def summed(mean: float) -> Any:
        return np.convolve(np.convolve(share(mean), share(0.0)), share(0.0))

    ins, outs = summed(distance + shift), summed(shift)
    for epsilon in (0.0, 1.0, 3.0):
        delta = np.maximum(ins - exp(epsilon) * outs, 0).sum()
        a = distance / total
        exact = norm.cdf(a / 2 - epsilon / a) - exp(epsilon) * norm.cdf(-a / 2 - epsilon / a)
        assert delta == pytest.approx(exact, rel=1e-3)


def test_a_share_that_anyone_can_see_is_refused() -> None:
    plain: Any = Plain()  # which mypy would refuse too
    with pytest.raises(IncompatibleStages, match="a share of the noise is too little"):
        replace(SHARES, inner=plain)


def test_a_share_that_the_grid_would_swallow_is_refused() -> None:
    with pytest.raises(ValueError, match="make its precision"):
        replace(SHARES, inner=SecureAggregation(precision=0.01))


# all of it


def test_each_client_adds_all_of_the_noise_itself() -> None:
    moved, _ = step(Plain(), LocalNoise(2.0, 0.8, Still()))
    assert deviation_fits(moved, 0.8 * 2.0 / sqrt(NUM_CLIENTS))
    bounded, _ = step(Plain(), LocalNoise(2.0, 0.0, Still(size=1e3)))
    assert float(bounded.norm()) == pytest.approx(2.0, rel=1e-5)


def test_an_update_that_is_not_finite_counts_as_none() -> None:
    moved, _ = step(Plain(), LocalNoise(2.0, 0.0, Still(size=float("nan"))))
    assert not moved.any()


def test_its_epsilon_holds_against_the_server_and_gains_nothing_from_sampling() -> None:
    train = LocalNoise(2.0, 0.8, LocalSGD(0.1))
    federation: Any = Federation(
        train=train, channel=Plain(), aggregate=Mean(), sample=PoissonSample(0.1)
    )
    by_hand = PLDAccountant().compose(dp_accounting.GaussianDpEvent(0.8), 5).get_epsilon(1e-5)
    one = found(federation)
    assert one.epsilon == pytest.approx(by_hand, rel=1e-6)
    assert one.against == {"client", "user", "server", "neighbour"}


def test_at_one_epsilon_local_noise_costs_the_root_of_the_clients_more() -> None:
    local, _ = step(Plain(), LocalNoise(2.0, 0.8, Still()))
    shared, _ = step(SHARES)
    ratio = float(local.norm() / shared.norm())
    assert ratio == pytest.approx(sqrt(NUM_CLIENTS), rel=0.15)

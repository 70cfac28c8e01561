"""DPSGD, and the guarantees derived from what stages say of themselves.

Theorems (hypothesis): one example moves a clipped sum by the clipping norm at most. Oracles: a loop
and ``torch.func`` for per-example gradients, Opacus' PRV accountant for epsilon. Golden: figures of
../shared/reference. Sabotage: without clipping the sensitivity is gone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import dp_accounting
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant
from torch import Tensor, nn
from torch.func import grad, vmap

from turncoat.federation import Federation, FractionSample, Plain, PoissonSample
from turncoat.messages import Clear, Update
from turncoat.privacy import Private, Unit, Unproven, guarantees
from turncoat.randomness import Randomness
from turncoat.stage import Plan, Train
from turncoat.stages.aggregate.mean import Mean
from turncoat.stages.aggregate.norm_bound import NormBound
from turncoat.stages.aggregate.optimisers import ServerMomentum
from turncoat.stages.channel.secure_aggregation import SecureAggregation
from turncoat.stages.train.book_keeping import clipped_sum
from turncoat.stages.train.dpsgd import DPSGD, noise_for
from turncoat.stages.train.local import Clipped, FedSGD, LocalSGD
from turncoat.task import Batch, Model

torch.set_num_threads(1)  # two threads fight over nets so small

ROOT = Randomness(0)


class Convolutional(nn.Module):
    """Layers that Opacus knows, one that it leaves to functorch, and a parameter without use."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.GroupNorm(2, 4)
        self.scale = Scale()
        self.last = nn.Linear(4 * 16, 3)
        self.unused = nn.Linear(2, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.scale(torch.relu(self.norm(self.conv(inputs))))
        out: Tensor = self.last(hidden.flatten(1))
        return out


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor([1.0, -2.0, 0.5, 1.5]))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * self.factor[:, None, None]


CONV = Model(Convolutional)
LINEAR = Model(lambda: nn.Linear(4, 3))


def images(n: int, seed: int = 0) -> Batch:
    rng = Randomness(seed).at("images")
    return torch.randn(n, 1, 6, 6, generator=rng), torch.randint(3, (n,), generator=rng)


def vectors(n: int, seed: int = 0) -> Batch:
    rng = Randomness(seed).at("vectors")
    return 3 * torch.randn(n, 4, generator=rng), torch.randint(3, (n,), generator=rng)


def summed(model: Model, params: Tensor, data: Batch, max_norm: float) -> Tensor:
    learner = model.learner(params)
    total = clipped_sum(model, learner, data, max_norm)
    learner.finish()
    return total


def by_loop(model: Model, params: Tensor, data: Batch, max_norm: float) -> Tensor:
    total = torch.zeros_like(params)
    for x, y in zip(*data, strict=True):
        gradient = model.gradient(params, (x[None], y[None]))
        total += gradient * min(1.0, max_norm / max(float(gradient.norm()), 1e-12))
    return total


def by_functorch(model: Model, params: Tensor, data: Batch, max_norm: float) -> Tensor:
    def loss(p: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return model.loss(p, (x[None], y[None]))

    rows: Tensor = vmap(grad(loss), in_dims=(None, 0, 0))(params, *data)
    factors = (max_norm / torch.linalg.vector_norm(rows, dim=1)).clamp(max=1)
    total: Tensor = factors @ rows
    return total


@pytest.mark.parametrize("oracle", [by_loop, by_functorch])
@pytest.mark.parametrize("max_norm", [1e-3, 0.7, 1e6])
@pytest.mark.parametrize("n", [1, 70])
def test_per_example_gradients_agree(oracle: Any, max_norm: float, n: int) -> None:
    params, data = CONV.initial(ROOT.at("p")), images(n)
    torch.testing.assert_close(
        summed(CONV, params, data, max_norm),
        oracle(CONV, params, data, max_norm),
        rtol=1e-4,
        atol=1e-6,
    )


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 8), seed=st.integers(0, 999), max_norm=st.floats(0.01, 2.0))
def test_one_example_moves_the_sum_by_the_clipping_norm_at_most(
    n: int, seed: int, max_norm: float
) -> None:
    (inputs, labels), params = vectors(n, seed), LINEAR.initial(Randomness(seed).at("p"))
    whole = summed(LINEAR, params, (inputs, labels), max_norm)
    without = summed(LINEAR, params, (inputs[1:], labels[1:]), max_norm)
    assert float((whole - without).norm()) <= max_norm * (1 + 1e-4)


def test_without_clipping_one_example_moves_the_sum_at_will() -> None:
    (inputs, labels), params = vectors(5), LINEAR.initial(ROOT.at("p"))
    inputs[0] *= 1e4
    moved = summed(LINEAR, params, (inputs, labels), 1e9)
    moved -= summed(LINEAR, params, (inputs[1:], labels[1:]), 1e9)
    assert float(moved.norm()) > 100


def test_without_noise_clipping_and_sampling_it_is_sgd() -> None:
    params, data = CONV.initial(ROOT.at("p")), images(20)
    bare = DPSGD(0.1, 1e9, 20, noise_multiplier=0.0)
    sent = bare(CONV, params, data, rng=ROOT.at("t"))
    plain = FedSGD(0.1)(CONV, params, data, rng=ROOT.at("t"))
    torch.testing.assert_close(sent.delta, plain.delta, rtol=1e-4, atol=1e-7)


def test_momentum_accumulates_the_noisy_gradients() -> None:
    params, data = LINEAR.initial(ROOT.at("p")), vectors(12)
    bare = DPSGD(0.1, 1e9, 12, noise_multiplier=0.0, num_steps=5, momentum=0.9)
    sent = bare(LINEAR, params, data, rng=ROOT.at("t"))
    plain = LocalSGD(0.1, 5, momentum=0.9)(LINEAR, params, data, rng=ROOT.at("t"))
    torch.testing.assert_close(sent.delta, plain.delta, rtol=1e-3, atol=1e-6)


def test_the_noise_is_as_large_as_stated_even_where_nobody_was_drawn() -> None:
    wide = Model(lambda: nn.Linear(400, 50))
    params = wide.initial(ROOT.at("p"))
    data = torch.zeros(10_000, 400), torch.zeros(10_000, dtype=torch.long)
    rule = DPSGD(0.5, 2.0, 1, noise_multiplier=3.0, num_steps=1)
    empty = next(
        seed
        for seed in range(99)
        if not bool(
            (
                torch.rand(10_000, generator=Randomness(seed).at("t"), dtype=torch.float64) < 1e-4
            ).any()
        )
    )
    sent = rule(wide, params, data, rng=Randomness(empty).at("t"))
    assert float(sent.delta.std()) == pytest.approx(0.5 * 3.0 * 2.0, rel=0.03)


def test_what_does_not_train_takes_no_noise() -> None:
    def half_frozen() -> nn.Module:
        net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
        net[0].requires_grad_(False)
        return net

    model = Model(half_frozen)
    rule = DPSGD(0.1, 1.0, 8, noise_multiplier=1.0)
    sent = rule(model, model.initial(ROOT.at("p")), vectors(20), rng=ROOT.at("t"))
    assert not bool(sent.delta[:20].any()) and bool(sent.delta[20:].all())


def test_the_weight_says_nothing_of_how_many_there_are() -> None:
    for n in (3, 30):
        rule = DPSGD(0.1, 1.0, 8, noise_multiplier=1.0)
        sent = rule(LINEAR, LINEAR.initial(ROOT.at("p")), vectors(n), rng=ROOT.at("t"))
        assert isinstance(sent, Update) and sent.weight == 8.0


def test_a_client_without_examples_sends_noise() -> None:
    rule = DPSGD(0.1, 1.0, 8, noise_multiplier=1.0)
    sent = rule(LINEAR, LINEAR.initial(ROOT.at("p")), vectors(0), rng=ROOT.at("t"))
    assert float(sent.delta.norm()) > 0


def test_the_same_rng_gives_the_same_bits() -> None:
    rule = DPSGD(0.1, 1.0, 8, noise_multiplier=1.0, num_epochs=2)
    start, data = CONV.initial(ROOT.at("p")), images(20)
    first, second = (rule(CONV, start, data, rng=ROOT.at("t")).delta for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, rule(CONV, start, data, rng=ROOT.at("u")).delta)


def test_plain_training_in_the_same_process_goes_on_as_before() -> None:
    model, data = Model(Convolutional), images(20)
    start, plain = model.initial(ROOT.at("p")), LocalSGD(0.1, batch_size=5)
    before = plain(model, start, data, rng=ROOT.at("t"))
    DPSGD(0.1, 1.0, 8, noise_multiplier=1.0)(model, start, data, rng=ROOT.at("t"))
    with pytest.raises(IndexError):  # labels out of range: the backward pass is never reached
        DPSGD(0.1, 1.0, 8, noise_multiplier=1.0)(
            model, start, (data[0], data[1] + 99), rng=ROOT.at("t")
        )
    assert torch.equal(plain(model, start, data, rng=ROOT.at("t")).delta, before.delta)
    for layer in model.module.modules():
        assert not layer._forward_hooks and not layer._backward_hooks
        assert not hasattr(layer, "activations")
    assert not any(hasattr(p, "grad_sample") for p in model.module.parameters())


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (lambda: nn.BatchNorm1d(4), r"layer '1' \(BatchNorm1d\): it mixes the examples"),
        (
            lambda: nn.BatchNorm1d(4, track_running_stats=False),
            r"layer '1' \(BatchNorm1d\): it mixes the examples",
        ),
        (
            lambda: nn.InstanceNorm1d(4, track_running_stats=True),
            r"layer '1' \(InstanceNorm1d\): it has buffers.*GroupNorm",
        ),
    ],
)
def test_layers_that_mix_or_remember_examples_are_refused(
    layer: Callable[[], nn.Module], why: str
) -> None:
    model = Model(lambda: nn.Sequential(nn.Linear(4, 4), layer(), nn.Linear(4, 3)))
    with pytest.raises(ValueError, match=why):
        DPSGD(0.1, 1.0, 8, noise_multiplier=1.0)(
            model, model.initial(ROOT.at("p")), vectors(8), rng=ROOT.at("t")
        )


def summed_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, labels, reduction="sum")


def overlap(outputs: Tensor, labels: Tensor) -> Tensor:
    chance = outputs.softmax(dim=1)[:, 0]
    return 1 - 2 * (chance * labels).sum() / (chance.sum() + labels.sum() + 1)


@pytest.mark.parametrize("criterion", [summed_loss, overlap])
def test_a_loss_that_is_no_mean_over_examples_is_refused(criterion: Any) -> None:
    model = Model(lambda: nn.Linear(4, 3), criterion)
    with pytest.raises(ValueError, match="not the mean of its values for each"):
        DPSGD(0.1, 1.0, 8, noise_multiplier=1.0)(
            model, model.initial(ROOT.at("p")), vectors(8), rng=ROOT.at("t")
        )


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "needs exactly one of noise_multiplier, target_epsilon"),
        ({"noise_multiplier": 1.0, "target_epsilon": 1.0, "delta": 1e-5}, "exactly one"),
        ({"noise_multiplier": -1.0}, "noise_multiplier must be at least 0"),
        ({"target_epsilon": 1.0}, "target_epsilon and delta belong together"),
        ({"noise_multiplier": 1.0, "delta": 1e-5}, "belong together"),
        ({"target_epsilon": 1.0, "delta": 1.0}, "delta must be between 0 and 1"),
        ({"noise_multiplier": 1.0, "num_steps": 1, "num_epochs": 1}, "not both"),
        ({"noise_multiplier": 1.0, "num_steps": 0}, "num_steps must be at least 1"),
        ({"noise_multiplier": 1.0, "momentum": 1.0}, "momentum must be at least 0 and below 1"),
    ],
)
def test_impossible_fields_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DPSGD(0.1, 1.0, 8, **fields)


def test_an_epoch_is_as_many_steps_as_it_takes_and_one_over_them_is_the_rate() -> None:
    rule = DPSGD(0.1, 1.0, 32, noise_multiplier=1.0, num_epochs=3)
    assert rule.schedule(100) == (1 / 4, 12) and rule.schedule(20) == (1.0, 3)
    assert DPSGD(0.1, 1.0, 32, noise_multiplier=1.0, num_steps=5).schedule(100) == (0.32, 5)


def federation(train: Train[Any], **more: Any) -> Federation[Any, Any]:
    stages: dict[str, Any] = {"train": train, "channel": Plain(), "aggregate": Mean()}
    return Federation(**stages | more)


def only(found: Sequence[Any]) -> Private:
    (guarantee,) = found
    assert isinstance(guarantee, Private)
    return guarantee


def prv(sigma: float, rate: float, num_steps: int, delta: float) -> float:
    accountant = PRVAccountant()
    accountant.history = [(sigma, rate, num_steps)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(accountant.get_epsilon(delta))


@pytest.mark.parametrize(
    ("sigma", "batch", "steps", "rounds"), [(1.0, 25, 1, 4), (1.5, 10, 5, 40), (4.0, 30, 10, 10)]
)
def test_epsilon_is_that_of_opacus(sigma: float, batch: int, steps: int, rounds: int) -> None:
    rule = DPSGD(0.1, 1.0, batch, noise_multiplier=sigma, num_steps=steps)
    found = only(guarantees(federation(rule), num_records=100, num_rounds=rounds, delta=1e-5))
    assert found.epsilon == pytest.approx(prv(sigma, batch / 100, steps * rounds, 1e-5), rel=0.02)
    assert found.unit is Unit.RECORD and "server" in found.against


def test_four_quarter_steps_of_unit_noise_cost_4_21() -> None:  # reference/dependencies.md: PLD
    rule = DPSGD(0.1, 1.0, 25, noise_multiplier=1.0, num_steps=4)
    found = only(guarantees(federation(rule), num_records=100, num_rounds=1, delta=1e-5))
    assert found.epsilon == pytest.approx(4.21, abs=0.01)


def test_sampling_clients_earns_an_example_nothing() -> None:
    rule = DPSGD(0.1, 1.0, 25, noise_multiplier=4.0)
    full, part, poisson = (
        only(guarantees(federation(rule, **more), num_records=100, num_rounds=4, delta=1e-5))
        for more in ({}, {"sample": FractionSample(0.1)}, {"sample": PoissonSample(0.1)})
    )
    assert full.epsilon == part.epsilon == poisson.epsilon


def test_no_noise_is_no_guarantee() -> None:
    rule = DPSGD(0.1, 1.0, 25, noise_multiplier=0.0)
    found = only(guarantees(federation(rule), num_records=100, num_rounds=4, delta=1e-5))
    assert found.epsilon == inf


@pytest.mark.parametrize("target", [0.5, 8.0])
@pytest.mark.parametrize("schedule", [{"num_steps": 3}, {"num_epochs": 1}])
def test_the_target_is_met_by_the_smallest_client_and_hardly_undercut(
    target: float, schedule: dict[str, int]
) -> None:
    rule = DPSGD(0.1, 1.0, 20, target_epsilon=target, delta=1e-5, **schedule)
    plan = Plan(10, (500, 90, 0, 200))
    fitted = federation(rule, channel=SecureAggregation()).planned(plan)
    spent = [
        only(guarantees(fitted, num_records=n, num_rounds=10, delta=1e-5)).epsilon
        for n in (90, 500)
    ]
    assert 0.98 * target <= spent[0] <= target
    assert spent == sorted(spent, reverse=True)


@pytest.mark.parametrize(
    ("target", "rate", "steps"),
    [(2.0, 1.0, 1), (2.0, 1.0, 50), (2.0, 0.02, 500), (0.01, 0.01, 100), (100.0, 0.5, 20)],
)
def test_calibrated_noise_keeps_to_the_finest_count(target: float, rate: float, steps: int) -> None:
    sigma = noise_for(target, 1e-6, rate, steps)
    step: Any = dp_accounting.GaussianDpEvent(sigma)
    if rate < 1:
        step = dp_accounting.PoissonSampledDpEvent(rate, step)
    exact = dp_accounting.pld.PLDAccountant(value_discretization_interval=min(1e-3, target / 1e4))
    assert 0.98 * target <= exact.compose(step, steps).get_epsilon(1e-6) <= target


def test_a_target_without_a_plan_is_refused() -> None:
    rule = DPSGD(0.1, 1.0, 20, target_epsilon=8.0, delta=1e-5)
    with pytest.raises(ValueError, match="has a target and no noise yet: fit it"):
        rule.event(100)
    with pytest.raises(ValueError, match="has a target and no noise yet: fit it"):
        rule(LINEAR, LINEAR.initial(ROOT.at("p")), vectors(8), rng=ROOT.at("t"))


def test_a_plan_leaves_given_noise_alone() -> None:
    rule = DPSGD(0.1, 1.0, 20, noise_multiplier=1.0)
    assert rule.planned(Plan(10, (50,))) == rule


@dataclass(frozen=True)
class ClientNoise:
    """Noise for each client, in its channel: what everyone receives is noisy already."""

    noise_multiplier: float
    unit = Unit.CLIENT

    def __call__(self, payload: Update) -> Update:
        return payload

    def event(self, num_records: int) -> Any:
        return dp_accounting.GaussianDpEvent(self.noise_multiplier)


@dataclass(frozen=True)
class NoisyMean(ClientNoise):
    """Noise at the rule: upstream of it the server reads on."""

    def __call__(self, messages: Sequence[Clear]) -> Tensor:  # type: ignore[override]
        return messages[0].delta


def gaussian(sigma: float, rounds: int) -> float:
    event = dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(sigma), rounds)
    return float(dp_accounting.pld.PLDAccountant().compose(event).get_epsilon(1e-5))


def test_sampling_is_no_amplification_against_a_server_that_sees_who_takes_part() -> None:
    sampled = federation(SGD, channel=ClientNoise(2.0), sample=PoissonSample(0.1))
    found = guarantees(sampled, num_records=100, num_rounds=20, delta=1e-5)
    full = gaussian(2.0, 20)
    assert all(isinstance(g, Private) for g in found)
    for guarantee in found:
        assert isinstance(guarantee, Private)
        if "server" in guarantee.against or "neighbour" in guarantee.against:
            assert guarantee.epsilon == pytest.approx(full, rel=1e-3)
        else:
            assert guarantee.epsilon < 0.2 * full
    assert {s for g in found if isinstance(g, Private) for s in g.against} >= {"server", "user"}


def test_noise_at_the_rule_does_not_protect_from_the_server_that_reads_each() -> None:
    found = only(
        guarantees(
            federation(SGD, aggregate=NoisyMean(2.0)), num_records=1, num_rounds=5, delta=1e-5
        )
    )
    assert "server" not in found.against and found.epsilon == pytest.approx(gaussian(2.0, 5))


@pytest.mark.parametrize(
    ("rule", "proven"),
    [
        (NormBound(NoisyMean(2.0), max_norm=1.0), True),
        (NormBound(NoisyMean(2.0), ratio=1.0), False),
        (ServerMomentum(0.9, NoisyMean(2.0)), True),
    ],
)
def test_a_wrapper_keeps_a_guarantee_only_if_it_mixes_no_clients(rule: Any, proven: bool) -> None:
    (found,) = guarantees(federation(SGD, aggregate=rule), num_records=1, num_rounds=5, delta=1e-5)
    assert isinstance(found, Private if proven else Unproven)


def test_clipping_the_update_is_post_processing() -> None:
    dp = DPSGD(0.1, 1.0, 25, noise_multiplier=4.0)
    bare, clipped = (
        only(guarantees(federation(t), num_records=100, num_rounds=4, delta=1e-5)).epsilon
        for t in (dp, Clipped(1.0, dp))
    )
    assert bare == clipped


SGD = LocalSGD(0.1)

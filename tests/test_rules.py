"""The server's rules.

Theorems (hypothesis): equivariance, and how far f forged updates can move a rule. Oracles: numpy,
scipy, slow twins, Flower. Sabotage: the same forgery moves the rule that defends against nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from math import inf
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.stats import trim_mean
from torch import Tensor, nn

from turncoat.messages import Update
from turncoat.randomness import Randomness
from turncoat.stage import Memory, call
from turncoat.stages.aggregate.coordinatewise import Median, TrimmedMean
from turncoat.stages.aggregate.geometric_median import GeometricMedian
from turncoat.stages.aggregate.krum import Krum, MultiKrum, scores, squared_distances
from turncoat.stages.aggregate.mean import Mean
from turncoat.stages.aggregate.norm_bound import NormBound
from turncoat.stages.aggregate.optimisers import ServerAdam, ServerMomentum, ServerSGD
from turncoat.task import Model

ROBUST = [Median(), TrimmedMean(2), Krum(2), MultiKrum(2), MultiKrum(2, 3), GeometricMedian()]
ALL = [*ROBUST, Mean(), NormBound(Mean(), max_norm=1.0), NormBound(Median(), ratio=0.8)]

quick = settings(max_examples=25, deadline=None)
some_n = st.integers(7, 14)
some_size = st.integers(1, 40)
some_seed = st.integers(0, 2**31)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=Randomness(seed).at("x"))


def updates(matrix: Tensor, weight: float = 1.0) -> list[Update]:
    return [Update(row, weight) for row in matrix]


def distance(first: Tensor, second: Tensor) -> float:
    return float((first.double() - second.double()).norm())


def named(rule: Any) -> str:
    return repr(rule)


@pytest.mark.parametrize("rule", ALL, ids=named)
@quick
@given(n=some_n, size=some_size, seed=some_seed)
def test_the_order_of_the_messages_does_not_matter(rule: Any, n: int, size: int, seed: int) -> None:
    matrix = drawn(seed, n, size)
    order = torch.randperm(n, generator=Randomness(seed).at("order"))
    torch.testing.assert_close(rule(updates(matrix[order])), rule(updates(matrix)))


@pytest.mark.parametrize("rule", [*ROBUST, Mean()], ids=named)
@quick
@given(n=some_n, size=some_size, seed=some_seed)
def test_a_shift_of_all_shifts_the_result(rule: Any, n: int, size: int, seed: int) -> None:
    matrix, shift = drawn(seed, n, size), 3 * drawn(seed + 1, size)
    moved, still = rule(updates(matrix + shift)), rule(updates(matrix))
    torch.testing.assert_close(moved, still + shift, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("rule", ALL, ids=named)
def test_messages_are_left_as_they_were(rule: Any) -> None:
    matrix = drawn(0, 9, 5)
    before = matrix.clone()
    step = rule(updates(matrix))
    step += 1
    assert torch.equal(matrix, before)
    assert step.dtype == torch.float32 and step.shape == (5,)


@pytest.mark.parametrize("rule", ROBUST, ids=named)
def test_claimed_weights_buy_nothing(rule: Any) -> None:
    matrix = drawn(1, 9, 6)
    claims = [Update(row, 1e12 if i < 2 else 1.0) for i, row in enumerate(matrix)]
    assert torch.equal(rule(claims), rule(updates(matrix)))


def forged(seed: int, n: int, f: int, size: int, together: bool) -> tuple[Tensor, Tensor]:
    """Return all messages, of which the last f are at 1e6, and the honest ones."""
    matrix = drawn(seed, n, size)
    matrix[n - f :] = 1e6 * drawn(seed + 1, size) if together else 1e6 * drawn(seed + 1, f, size)
    return matrix, matrix[: n - f]


@quick
@given(n=st.integers(5, 15), size=some_size, seed=some_seed, together=st.booleans())
def test_forged_updates_keep_coordinatewise_rules_within_the_honest_range(
    n: int, size: int, seed: int, together: bool
) -> None:
    f = (n - 1) // 2
    matrix, honest = forged(seed, n, f, size, together)
    for rule in (Median(), TrimmedMean(f)):
        step = rule(updates(matrix))
        assert bool((step <= honest.max(dim=0).values + 1e-6).all())
        assert bool((step >= honest.min(dim=0).values - 1e-6).all())


@quick
@given(f=st.integers(1, 4), size=some_size, seed=some_seed, together=st.booleans())
def test_forged_updates_are_never_chosen_by_krum(
    f: int, size: int, seed: int, together: bool
) -> None:
    matrix, honest = forged(seed, 2 * f + 3, f, size, together)
    step = Krum(f)(updates(matrix))
    assert any(torch.equal(step, row) for row in honest)
    torch.testing.assert_close(MultiKrum(f)(updates(matrix)), honest.mean(dim=0))


@quick
@given(n=st.integers(3, 15), size=some_size, seed=some_seed, together=st.booleans())
def test_forged_updates_keep_the_geometric_median_near(
    n: int, size: int, seed: int, together: bool
) -> None:
    f = (n - 1) // 2
    matrix, honest = forged(seed, n, f, size, together)
    centre = honest.mean(dim=0)
    radius = max(distance(row, centre) for row in honest)
    step = GeometricMedian()(updates(matrix))
    assert distance(step, centre) <= 2 * (n - f) / (n - 2 * f) * radius + 1e-3


def test_the_same_forgery_moves_the_mean_far_away() -> None:
    matrix, honest = forged(0, 11, 2, 20, together=True)
    assert distance(Mean()(updates(matrix)), honest.mean(dim=0)) > 1e5  # type: ignore[arg-type]


@quick
@given(n=some_n, size=some_size, seed=some_seed)
def test_krum_returns_one_of_its_messages(n: int, size: int, seed: int) -> None:
    matrix = drawn(seed, n, size)
    step = Krum(2)(updates(matrix))
    assert any(torch.equal(step, row) for row in matrix)


def slow_scores(matrix: Tensor, f: int) -> list[float]:
    n, found = len(matrix), []
    for i in range(n):
        squared = sorted(distance(matrix[i], matrix[j]) ** 2 for j in range(n) if j != i)
        found.append(sum(squared[: n - f - 2]))
    return found


@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("spread", [1.0, 1e-3])
def test_krum_scores_as_its_slow_twin_does(offset: float, spread: float) -> None:
    matrix = offset + spread * drawn(3, 12, 5000)
    matrix[-1] = 1e6
    expected = torch.tensor(slow_scores(matrix, 3), dtype=torch.float64)
    torch.testing.assert_close(scores(matrix, 3), expected, rtol=1e-9, atol=0)


def test_distances_survive_a_common_part_a_hundred_thousand_times_as_long() -> None:
    matrix = drawn(4, 1, 6000) + 1e-5 * drawn(5, 8, 6000)
    exact = np.array([[distance(a, b) ** 2 for b in matrix] for a in matrix])
    np.testing.assert_allclose(squared_distances(matrix).numpy(), exact, rtol=1e-9)
    gram = matrix @ matrix.T
    short_cut = gram.diag()[:, None] - 2 * gram + gram.diag()
    assert float((short_cut - torch.from_numpy(exact)).abs().max()) > exact.max()


@pytest.mark.parametrize("n", [1, 2, 7, 8])
def test_the_median_is_that_of_numpy(n: int) -> None:
    matrix = drawn(n, n, 9001)
    expected = np.median(matrix.double().numpy(), axis=0).astype(np.float32)
    np.testing.assert_array_equal(Median()(updates(matrix)).numpy(), expected)


@pytest.mark.parametrize(("n", "trimmed"), [(1, 0), (5, 2), (8, 3), (10, 1)])
def test_the_trimmed_mean_is_that_of_scipy(n: int, trimmed: int) -> None:
    matrix = drawn(n, n, 5000)
    expected = trim_mean(matrix.double().numpy(), trimmed / n + 1e-9, axis=0)
    step = TrimmedMean(trimmed)(updates(matrix))
    np.testing.assert_allclose(step.numpy(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("scale", [1e-5, 1.0, 1e3])
@pytest.mark.parametrize("seed", range(3))
def test_the_geometric_median_has_the_least_sum_of_distances(seed: int, scale: float) -> None:
    matrix = drawn(seed, 9, 2)
    matrix[-2:] += 50
    points = matrix.double().numpy()

    def cost(z: Any) -> float:
        return float(np.linalg.norm(points - z, axis=1).sum())

    step = GeometricMedian()(updates(matrix * scale)).double().numpy() / scale
    best = minimize(cost, np.median(points, axis=0), method="Nelder-Mead", tol=1e-10)
    assert cost(step) <= float(best.fun) * (1 + 1e-4)


def test_forgeries_too_long_to_square_are_no_trouble() -> None:
    matrix = drawn(0, 9, 4)
    matrix[-2:] = torch.tensor([[1e30], [-3e38]])
    rules: list[Any] = [*ROBUST, NormBound(Mean(), ratio=1.0)]
    for rule in rules:
        step = rule(updates(matrix))
        assert bool(step.isfinite().all()) and float(step.norm()) < 10


def test_the_geometric_median_of_equals_is_that_point() -> None:
    point = drawn(0, 6)
    torch.testing.assert_close(GeometricMedian()(updates(point.repeat(4, 1))), point)
    assert torch.equal(GeometricMedian()(updates(torch.zeros(3, 6))), torch.zeros(6))


def test_rules_agree_with_flower() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        flower = pytest.importorskip("flwr.server.strategy.aggregate", exc_type=ImportError)
    matrix = drawn(8, 11, 30)
    sent = [([row.numpy()], 1) for row in matrix]
    theirs: list[tuple[Any, Any]] = [
        (Median(), flower.aggregate_median(sent)),
        (TrimmedMean(2), flower.aggregate_trimmed_avg(sent, 2 / 11 + 1e-9)),
        (Krum(3), flower.aggregate_krum(sent, 3, 0)),
    ]
    for rule, expected in theirs:
        np.testing.assert_allclose(rule(updates(matrix)).numpy(), expected[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("rule", "n", "said"),
    [
        (Krum(3), 8, r"needs at least 9 messages \(2f \+ 3\); the cohort has 8: lower num_byz"),
        (MultiKrum(1), 4, r"needs at least 5 messages .* the cohort has 4: lower num_byzantine"),
        (MultiKrum(1, 6), 6, r"trusts 6 messages; of a cohort of 6, 5 are honest .*: lower num_s"),
        (
            TrimmedMean(2),
            4,
            r"needs at least 5 messages \(2b \+ 1\); the cohort has 4: lower num_t",
        ),
    ],
)
def test_a_cohort_below_the_bound_is_refused(rule: Any, n: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        rule(updates(drawn(0, n, 3)))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Krum(-1),
        lambda: MultiKrum(1, 0),
        lambda: TrimmedMean(-1),
        lambda: GeometricMedian(tolerance=0),
        lambda: GeometricMedian(max_iterations=0),
        lambda: NormBound(Mean(), max_norm=-1.0),
        lambda: NormBound(Mean(), ratio=inf),
        lambda: ServerSGD(0.0, Mean()),
        lambda: ServerMomentum(1.0, Mean()),
        lambda: ServerAdam(0.1, Mean(), betas=(0.9, 1.0)),
        lambda: ServerAdam(0.1, Mean(), tau=0.0),
    ],
)
def test_fields_out_of_range_are_refused(make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=r": \w+.* must be"):
        make()


@pytest.mark.parametrize("fields", [{}, {"max_norm": 1.0, "ratio": 1.0}])
def test_a_norm_bound_is_fixed_or_relative(fields: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="needs exactly one of max_norm, ratio"):
        NormBound(Mean(), **fields)


@quick
@given(n=some_n, size=some_size, seed=some_seed, radius=st.floats(1e-3, 1e3))
def test_a_bounded_mean_moves_no_further_than_the_radius(
    n: int, size: int, seed: int, radius: float
) -> None:
    matrix, _ = forged(seed, n, 2, size, together=True)
    step = NormBound(Mean(), max_norm=radius)(updates(matrix))
    assert float(step.norm()) <= radius * (1 + 1e-5)


def test_a_relative_bound_follows_the_median_norm_whatever_the_forgery() -> None:
    matrix, honest = forged(2, 9, 4, 30, together=True)
    norms = matrix.norm(dim=1)
    step = NormBound(Mean(), ratio=2.0)(updates(matrix))
    assert float(step.norm()) <= 2 * float(honest.norm(dim=1).max())
    short = matrix * (2 * norms.median() / norms).clamp(max=1)[:, None]
    torch.testing.assert_close(step, short.mean(dim=0))


def test_updates_within_the_bound_are_untouched() -> None:
    matrix = drawn(0, 7, 5)
    assert torch.equal(
        NormBound(Krum(1), max_norm=100.0)(updates(matrix)), Krum(1)(updates(matrix))
    )


def test_a_vanished_update_has_a_norm_to_bound() -> None:
    for bound in (NormBound(Mean(), ratio=1.0), NormBound(Mean(), max_norm=1e-9)):
        assert torch.equal(bound(updates(torch.zeros(3, 4))), torch.zeros(4))


def test_only_a_relative_bound_mixes_clients() -> None:
    assert not NormBound(Mean(), max_norm=1.0).mixes_clients
    assert NormBound(Mean(), ratio=1.0).mixes_clients


class WithStatistics(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3)
        self.norm = nn.BatchNorm1d(3)


MODEL = Model(lambda: nn.Linear(2, 3, bias=False))


def run(rule: Any, steps: Sequence[Tensor], model: Model = MODEL) -> list[Tensor]:
    memory: Memory[Any] = Memory()
    return [call(rule, updates(s[None]), memory=memory, model=model) for s in steps]


def test_server_sgd_scales_the_step() -> None:
    steps = [drawn(t, 6) for t in range(3)]
    for step, scaled in zip(steps, run(ServerSGD(0.5, Mean()), steps), strict=True):
        torch.testing.assert_close(scaled, 0.5 * step)


def test_server_momentum_is_a_heavy_ball() -> None:
    steps, velocity = [drawn(t, 6) for t in range(4)], torch.zeros(6)
    for step, moved in zip(steps, run(ServerMomentum(0.9, Mean(), lr=0.3), steps), strict=True):
        velocity = 0.9 * velocity + step
        torch.testing.assert_close(moved, 0.3 * velocity)


def test_server_adam_follows_the_paper() -> None:
    steps, first, second = [drawn(t, 6) for t in range(4)], torch.zeros(6), torch.full((6,), 1e-6)
    for step, moved in zip(steps, run(ServerAdam(0.1, Mean()), steps), strict=True):
        first = 0.9 * first + 0.1 * step
        second = 0.99 * second + 0.01 * step**2
        torch.testing.assert_close(moved, 0.1 * first / (second.sqrt() + 1e-3))


def test_server_adam_is_pytorchs_at_the_limit() -> None:
    weights = torch.zeros(6, requires_grad=True)
    optimiser = torch.optim.Adam([weights], lr=0.1, betas=(0.0, 0.0), eps=1e-3)
    total = torch.zeros(6)
    for step in (drawn(t, 6) for t in range(3)):
        weights.grad = -step
        optimiser.step()
        total += run(ServerAdam(0.1, Mean(), betas=(0.0, 0.0)), [step])[0]
    torch.testing.assert_close(total, weights.detach())


@pytest.mark.parametrize(
    "rule", [ServerSGD(0.1, Mean()), ServerMomentum(0.9, Mean()), ServerAdam(0.1, Mean())]
)
def test_running_statistics_are_no_parameters(rule: Any) -> None:
    model = Model(WithStatistics)
    layout = model.layout
    steps = [drawn(t, layout.num_params) for t in range(3)]
    for step, moved in zip(steps, run(rule, steps, model), strict=True):
        assert torch.equal(moved[layout.num_trainable :], step[layout.num_trainable :])


def test_nested_optimisers_remember_apart() -> None:
    rule, memory = ServerMomentum(0.5, ServerAdam(0.1, Mean())), Memory[Any]()
    call(rule, updates(drawn(0, 3, 6)), memory=memory, model=MODEL)
    assert set(memory.cell) == {"", "/inner"}


def test_an_optimiser_leaves_what_it_remembers_alone() -> None:
    rule, memory = ServerMomentum(0.5, Mean()), Memory[Any]()
    first = call(rule, updates(drawn(0, 3, 6)), memory=memory, model=MODEL)
    kept = memory.cell[""].clone()
    first += 1
    call(rule, updates(drawn(1, 3, 6)), memory=Memory(dict(memory.cell)), model=MODEL)
    assert torch.equal(memory.cell[""], kept)

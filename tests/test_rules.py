"""The server's rules.

Theorems (hypothesis): what each rule promises, by `turncoat.testing.theorems`; and that neither the
number of cores nor of threads changes a bit. Oracles: numpy, scipy, slow twins, byzfl, Flower.
Golden: what byzfl 0.0.11 gives. Sabotage: the same forgery moves the rule that defends against
nothing; a plain Gram product loses the distances that ours keep.

Where conventions differ, the paper's is the default (docs/rules.md lists them):

- byzfl's Krum and MultiKrum sum n - f - 1 neighbours: ours do with ``num_neighbours``.
- Of rows that score alike, byzfl and Flower take the first, ours the one nearer to all; so Bulyan
  agrees with Flower where its last choices have two neighbours to go by (f = 0, f >= 3).
- byzfl's GeometricMedian makes 3 steps from 0, smoothed by 0.1: it agrees after 2,000, by 1e-6.
- byzfl's Bucketing draws by another generator: what agrees is the mean of its buckets.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from math import inf
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.stats import trim_mean
from torch import Tensor, nn

from turncoat import columns
from turncoat.coalition import Clients, Coalition
from turncoat.federation import Federation, Plain
from turncoat.messages import Clear, Update
from turncoat.randomness import Randomness
from turncoat.runtimes.simulate import simulate
from turncoat.stage import IncompatibleStages, Memory, Verdict, call
from turncoat.stages.aggregate.arc import ARC
from turncoat.stages.aggregate.bucketing import Bucketing
from turncoat.stages.aggregate.bulyan import Bulyan
from turncoat.stages.aggregate.coordinatewise import (
    MeaMed,
    Median,
    TrimmedMean,
    mean_near_middle,
)
from turncoat.stages.aggregate.distances import squared_distances
from turncoat.stages.aggregate.geometric_median import GeometricMedian
from turncoat.stages.aggregate.krum import Krum, MultiKrum, scores
from turncoat.stages.aggregate.mean import Mean
from turncoat.stages.aggregate.nearest_neighbour_mixing import NNM
from turncoat.stages.aggregate.norm_bound import NormBound
from turncoat.stages.aggregate.optimisers import ServerAdam, ServerMomentum, ServerSGD
from turncoat.stages.train.local import LocalSGD
from turncoat.task import Model
from turncoat.tasks.bundled import digits
from turncoat.tasks.models import MLP
from turncoat.testing.theorems import (
    Promise,
    Theorem,
    Within,
    answer,
    no_longer_than_the_honest,
    one_that_was_sent,
    theorems,
    within_the_honest_range,
)
from turncoat.views import CoalitionView

honest_range = within_the_honest_range
PROMISES = [
    Promise(Mean(), 1, absurd=None, refuses=False),
    Promise(Median(), 1),
    Promise(TrimmedMean(2), 5, 2, honest_range),
    Promise(MeaMed(2), 5, 2, honest_range),
    Promise(Krum(2), 7, 2, one_that_was_sent),
    Promise(Krum(2, num_neighbours=4), 7, 2, one_that_was_sent),
    Promise(MultiKrum(2), 7, 2, honest_range),
    Promise(MultiKrum(2, 3), 7, 2, honest_range),
    Promise(MultiKrum(2, rescored=True), 7, 2, honest_range),
    Promise(Bulyan(1), 7, 1, honest_range),
    Promise(Bulyan(2), 11, 2, honest_range),
    Promise(Bulyan(2, rescored=False), 11, 2, honest_range),
    Promise(Bulyan(2, num_selected=5), 11, 2, honest_range),
    Promise(GeometricMedian(), 1),
    Promise(NNM(Median(), 2), 5, 2, honest_range),
    Promise(NNM(MultiKrum(2), 2), 7, 2, honest_range),
    Promise(Bucketing(Krum(2)), 13, 2, honest_range, permutes=False),
    Promise(ARC(Mean(), 2), 5, 2, no_longer_than_the_honest, translates=False),
    Promise(ARC(Median(), 2), 5, 2, no_longer_than_the_honest, translates=False, absurd=1.0),
    Promise(NormBound(Mean(), max_norm=1.0), 1, absurd=None, translates=False, refuses=False),
    Promise(NormBound(Median(), ratio=0.8), 1, translates=False),
]
THEOREMS = [
    pytest.param(theorem, id=f"{promise.rule!r}: {name}")
    for promise in PROMISES
    for name, theorem in theorems(promise)
]
WEIGHTED = (Mean, NormBound, ARC)
ROBUST = [p.rule for p in PROMISES if not isinstance(p.rule, WEIGHTED)]

quick = settings(max_examples=25, deadline=None)
some_n = st.integers(7, 14)
some_size = st.integers(1, 40)
some_seed = st.integers(0, 2**31)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=Randomness(seed).at("x"))


def updates(matrix: Tensor, weight: float = 1.0) -> list[Update]:
    return [Update(row, weight) for row in matrix]


@pytest.mark.parametrize("theorem", THEOREMS)
@settings(max_examples=8, deadline=None)
@given(seed=some_seed)
@example(seed=501389)  # after mixing, scores that differ by their rounding alone
def test_each_rule_keeps_what_it_promises(theorem: Theorem, seed: int) -> None:
    theorem(seed)


def distance(first: Tensor, second: Tensor) -> float:
    return float((first.double() - second.double()).norm())


@pytest.mark.parametrize("rule", ROBUST, ids=repr)
def test_claimed_weights_buy_nothing(rule: Any) -> None:
    matrix = drawn(1, 13, 6)
    claims = [Update(row, 1e12 if i < 2 else 1.0) for i, row in enumerate(matrix)]
    given = [call(rule, sent, rng=Randomness(0).at("a")) for sent in (claims, updates(matrix))]
    assert torch.equal(*given)


@pytest.mark.parametrize("rule", [p.rule for p in PROMISES], ids=repr)
def test_neither_cores_nor_threads_change_a_bit(rule: Any, monkeypatch: Any) -> None:
    matrix, found = drawn(2, 13, 9_001), []
    before = torch.get_num_threads()
    for cores, threads in ((1, 1), (2, 1), (5, 2)):
        monkeypatch.setattr(columns, "num_cores", lambda cores=cores: cores)
        torch.set_num_threads(threads)
        found.append(answer(rule, matrix))
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found)


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
    rules: list[Any] = [Median(), TrimmedMean(f), MeaMed(f), NNM(Median(), f)]
    for rule in rules:
        step = rule(updates(matrix))
        assert honest_range(step, honest) is None


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
@given(
    n=st.integers(3, 15),
    size=some_size,
    seed=some_seed,
    together=st.booleans(),
    away=st.sampled_from([1.0, 1e6, 1e20]),
)
def test_forged_updates_keep_the_geometric_median_near(
    n: int, size: int, seed: int, together: bool, away: float
) -> None:
    f = (n - 1) // 2
    matrix, honest = forged(seed, n, f, size, together)
    matrix[n - f :] *= away
    step = GeometricMedian()(updates(matrix))
    assert Within(2 * (n - f) / (n - 2 * f) + 1e-3)(step, honest) is None


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
    torch.testing.assert_close(scores(squared_distances(matrix), 7), expected, rtol=1e-6, atol=0)


def slow_distances(matrix: Tensor) -> Any:
    return np.array([[distance(a, b) ** 2 for b in matrix] for a in matrix])


def as_they_come(matrix: Tensor) -> Tensor:
    return matrix


def beside(length: float, together: bool) -> Callable[[Tensor], Tensor]:
    """Put three forged rows among the honest, ``length`` long, alike to a millionth or not."""

    def edit(matrix: Tensor) -> Tensor:
        spots = drawn(7, matrix.shape[1]) * (1 + 1e-6 * drawn(8, 3, 1))
        return torch.cat([matrix, length * (spots if together else drawn(9, 3, matrix.shape[1]))])

    return edit


SCENES: dict[str, Callable[[Tensor], Tensor]] = {
    "as they come": as_they_come,
    "beside 1e6": beside(1e6, False),
    "beside 1e6, together": beside(1e6, True),
    "beside 1e30": beside(1e30, False),
    "beside 1e30, together": beside(1e30, True),
    "too small to square": lambda matrix: 1e-30 * matrix,
    "two of a kind": lambda matrix: torch.cat([matrix, matrix[:3]]),
    "in three clusters": lambda matrix: matrix + 1e4 * (torch.arange(len(matrix)) % 3)[:, None],
    "clusters within clusters": lambda matrix: (
        matrix
        + 1e6 * (torch.arange(len(matrix)) % 2)[:, None]
        + 1e3 * (torch.arange(len(matrix)) % 4 // 2)[:, None]
    ),
    "mostly still": lambda matrix: matrix * (torch.arange(matrix.shape[1]) % 97 == 0),
    "one sent nothing": lambda matrix: matrix * (torch.arange(len(matrix)) > 0)[:, None],
}


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("common", [0.0, 1e5], ids=["updates", "updates 1e-5 of the weights"])
@pytest.mark.parametrize("size", [1, 130, 9_001])
def test_distances_are_those_of_a_slow_twin(scene: str, common: float, size: int) -> None:
    matrix = SCENES[scene](common * drawn(4, size) + drawn(5, 14, size))
    found, exact = squared_distances(matrix).numpy(), slow_distances(matrix)
    np.testing.assert_allclose(found, exact, rtol=5e-6, atol=0)
    assert (found == found.T).all() and not found.diagonal().any()


def test_a_row_that_looks_central_where_a_centre_is_looked_for_does_no_harm() -> None:
    matrix = drawn(6, 12, 9_001)
    few = torch.linspace(0, 9_000, 256).long()
    matrix[0] = 1e8
    matrix[0, few] = matrix[1:, few].mean(dim=0)
    np.testing.assert_allclose(
        squared_distances(matrix).numpy(), slow_distances(matrix), rtol=1e-6, atol=0
    )
    honest = matrix[1:]
    assert Within(3.0)(GeometricMedian()(updates(matrix)), honest) is None


def test_the_order_of_distances_holds_next_to_a_long_common_part_and_beside_long_forgeries() -> (
    None
):
    directions = torch.nn.functional.normalize(drawn(5, 9, 20_000))
    lengths = 1 + 1e-4 * torch.arange(9)  # from the first row, apart by less than float32 squares
    matrix = torch.cat([torch.zeros(1, 20_000), 1e-2 * lengths[:, None] * directions])
    for length in (1e6, 1e30):
        forged = length * drawn(6, 3, 20_000)
        found = squared_distances(torch.cat([100 + 1000 * matrix, forged]))[0, 1:10]
        assert bool((found.diff() > 0).all())


def test_a_plain_gram_product_loses_distances_next_to_a_long_common_part() -> None:
    matrix = drawn(4, 1, 6000) + 1e-5 * drawn(5, 8, 6000)
    exact, gram = slow_distances(matrix), matrix @ matrix.T
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


@pytest.mark.parametrize(("n", "kept"), [(1, 1), (7, 4), (9, 9), (10, 3), (12, 7)])
def test_the_mean_around_the_median_is_that_of_a_slow_twin(n: int, kept: int) -> None:
    matrix = drawn(n, n, 300)
    columns = matrix.double().numpy().T
    near = [x[np.abs(x - np.median(x)).argsort()[:kept]] for x in columns]
    step = MeaMed(n - kept)(updates(matrix)) if 2 * kept > n else near_middle(matrix, kept)
    np.testing.assert_allclose(step.numpy(), np.mean(near, axis=1), rtol=1e-5, atol=1e-6)


def near_middle(matrix: Tensor, kept: int) -> Tensor:
    return mean_near_middle(matrix.T.sort(dim=1).values, kept)


def slow_bulyan(matrix: Tensor, f: int) -> Any:
    left, chosen = list(range(len(matrix))), list[int]()
    for _ in range(len(matrix) - 2 * f):
        few = max(len(left) - f - 2, 1)
        near = [
            sum(sorted(distance(matrix[i], matrix[j]) ** 2 for j in left if j != i)[:few])
            for i in left
        ]
        chosen.append(left.pop(int(np.argmin(near))))
    selected = matrix[chosen].double().numpy()
    away = np.abs(selected - np.median(selected, axis=0)).argsort(axis=0)
    return np.take_along_axis(selected, away[: len(matrix) - 4 * f], axis=0).mean(axis=0)


@pytest.mark.parametrize(("n", "f"), [(5, 0), (15, 3), (18, 3)])
def test_bulyan_is_its_slow_twin(n: int, f: int) -> None:
    matrix = drawn(n + f, n, 60)
    step = Bulyan(f)(updates(matrix))
    np.testing.assert_allclose(step.numpy(), slow_bulyan(matrix, f), rtol=1e-5, atol=1e-6)


def test_mixing_puts_the_mean_of_the_nearest_in_the_place_of_each() -> None:
    matrix = torch.tensor([[0.0], [1.0], [3.0], [100.0]])
    seen: list[Clear] = []
    NNM(Looking(seen), 1)(updates(matrix))
    assert [float(m.delta) for m in seen] == pytest.approx([4 / 3, 4 / 3, 4 / 3, 104 / 3])


def test_buckets_are_the_means_of_a_permutation() -> None:
    matrix, seen = 2.0 ** torch.arange(7)[:, None], list[Clear]()
    Bucketing(Looking(seen), 3)(updates(matrix), rng=Randomness(0).at("x"))
    sizes = [3, 3, 1]
    sums = [float(m.delta) * size for m, size in zip(seen, sizes, strict=True)]
    assert sum(sums) == pytest.approx(127)
    assert [round(x).bit_count() for x in sums] == sizes


def test_adaptive_clipping_shortens_twice_the_share_of_the_forged() -> None:
    matrix = torch.diag(torch.arange(1.0, 11.0))
    seen: list[Clear] = []
    ARC(Looking(seen), 2)(updates(matrix, weight=5.0))
    assert [float(m.delta.norm()) for m in seen] == pytest.approx([1, 2, 3, 4, 5, 6, 7, 7, 7, 7])
    assert {m.weight for m in seen} == {5.0}


class Looking:
    """A rule that shows what it was given."""

    def __init__(self, seen: list[Clear]) -> None:
        self.seen = seen

    def __call__(self, messages: Sequence[Clear]) -> Tensor:
        self.seen += messages
        return messages[0].delta


def test_who_is_left_out_is_flagged() -> None:
    matrix, _ = forged(0, 11, 2, 20, together=False)
    far = {9, 10}
    for rule in (MultiKrum(2), Bulyan(2), NNM(MultiKrum(2), 2)):
        verdict = Verdict()
        call(rule, updates(matrix), verdict=verdict)
        assert verdict.flagged >= far if isinstance(rule, Bulyan) else verdict.flagged == far
    verdict = Verdict()
    call(Krum(2), updates(matrix), verdict=verdict)
    assert not verdict.flagged


def test_all_in_a_bucket_that_is_flagged_are() -> None:
    matrix = drawn(0, 14, 5)
    matrix[3] = 1e6
    verdict = Verdict()
    Bucketing(MultiKrum(1))(updates(matrix), rng=Randomness(0).at("x"), verdict=verdict)
    assert 3 in verdict.flagged and len(verdict.flagged) == 2


def test_a_bucket_has_no_sender() -> None:
    class ByName:
        def __call__(self, messages: Sequence[Clear], *, cohort: tuple[int, ...]) -> Tensor:
            return messages[cohort[0]].delta

    with pytest.raises(IncompatibleStages, match=r"asks for 'cohort'.*has none to give"):
        Federation(train=LocalSGD(0.1), channel=Plain(), aggregate=Bucketing(ByName()))


class Forging:
    def __init__(self, value: float) -> None:
        self.value = value

    def __call__(self, view: CoalitionView[Update]) -> Sequence[Update]:
        return [Update(torch.full_like(p.delta, self.value), p.weight) for p in view.own]


@pytest.mark.parametrize("rule", ROBUST, ids=repr)
def test_no_absurd_update_moves_the_model_of_a_federation(rule: Any) -> None:
    task = digits(16, model=MLP((8,)), train_size=160, test_size=50)
    federation = Federation(train=LocalSGD(0.1), channel=Plain(), aggregate=rule)
    start = task.model.initial(Randomness(0).at("begin"))
    alone = simulate(federation, task, num_rounds=1, seed=0).state.params
    for value in (float("nan"), 1e30):
        coalition: Coalition[Update] = Coalition(members=Clients((2,)), forge=Forging(value))
        run = simulate(federation, task, num_rounds=1, seed=0, coalition=coalition)
        moved = distance(run.state.params, start)
        assert moved <= 2 * distance(alone, start)


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


def test_the_geometric_median_of_equals_is_that_point() -> None:
    point = drawn(0, 6)
    torch.testing.assert_close(GeometricMedian()(updates(point.repeat(4, 1))), point)
    assert torch.equal(GeometricMedian()(updates(torch.zeros(3, 6))), torch.zeros(6))


def test_rules_agree_with_flower() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        flower = pytest.importorskip("flwr.server.strategy.aggregate", exc_type=ImportError)
    matrix = drawn(8, 15, 30)

    def sent() -> list[tuple[list[Any], int]]:
        return [([row.numpy()], 1) for row in matrix]

    theirs: list[tuple[Any, Any]] = [
        (Mean(), flower.aggregate(sent())),
        (Median(), flower.aggregate_median(sent())),
        (TrimmedMean(2), flower.aggregate_trimmed_avg(sent(), 2 / 15 + 1e-9)),
        (Krum(3), flower.aggregate_krum(sent(), 3, 0)),
        (MultiKrum(3, 5), flower.aggregate_krum(sent(), 3, 5)),
        (Bulyan(3), flower.aggregate_bulyan(sent(), 3, flower.aggregate_krum, to_keep=0)),
    ]
    for rule, expected in theirs:
        np.testing.assert_allclose(rule(updates(matrix)).numpy(), expected[0], rtol=1e-5, atol=1e-6)


FEW: list[list[float]] = [
    [1, 5, 2.5],
    [2, 4, 1],
    [0, 6, 3],
    [3, 3, 9],
    [1, 4, 4],
    [2, 7, 0],
    [40, -50, 60],
]
MIXED = [[1.5, 29 / 6, 3.25]] * 6 + [[47 / 6, -14 / 3, 13.25]]
GOLDEN: list[tuple[Any, list[float]]] = [
    (Median(), [2, 4, 3]),
    (TrimmedMean(1), [1.8, 4.4, 3.9]),
    (MeaMed(1), [1.5, 4.833333333, 3.25]),
    (Krum(1, num_neighbours=5), [1, 5, 2.5]),
    (MultiKrum(1, num_neighbours=5), [1.5, 4.833333333, 3.25]),
    (GeometricMedian(), [1.220865535, 4.744727190, 2.922770709]),
]


@pytest.mark.parametrize(("rule", "expected"), GOLDEN, ids=repr)
def test_rules_give_what_byzfl_gave(rule: Any, expected: list[float]) -> None:
    step = rule(updates(torch.tensor(FEW, dtype=torch.float32)))
    np.testing.assert_allclose(step.numpy(), expected, rtol=1e-4 if rule == GOLDEN[-1][0] else 1e-6)


def test_pre_aggregations_give_what_byzfl_gave() -> None:
    matrix, mixed, clipped = torch.tensor(FEW, dtype=torch.float32), list[Clear](), list[Clear]()
    NNM(Looking(mixed), 1)(updates(matrix))
    np.testing.assert_allclose(torch.stack([m.delta for m in mixed]), MIXED, rtol=1e-6)
    ARC(Looking(clipped), 1)(updates(matrix))
    expected: list[list[float]] = [*FEW[:6], [4.535573676, -5.669467095, 6.803360514]]
    np.testing.assert_allclose(torch.stack([m.delta for m in clipped]), expected, rtol=1e-6)


def byzfl_rules() -> Any:
    """Return byzfl's aggregators, without its federations, which import torchvision."""
    if "byzfl.aggregators" in sys.modules:
        return sys.modules["byzfl.aggregators"]
    spec = importlib.util.find_spec("byzfl")
    if spec is None:
        pytest.skip("byzfl is not installed: pip install --no-deps byzfl")
    bare = ModuleType("byzfl")
    bare.__path__ = list(spec.submodule_search_locations or [])
    sys.modules["byzfl"] = bare
    return importlib.import_module("byzfl.aggregators")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("n", "f"), [(9, 2), (12, 3), (14, 0)])
def test_rules_agree_with_byzfl(n: int, f: int, seed: int) -> None:
    byzfl, matrix = byzfl_rules(), drawn(seed, n, 40)
    theirs: list[tuple[Any, Any]] = [
        (Mean(), byzfl.Average()),
        (Median(), byzfl.Median()),
        (TrimmedMean(f), byzfl.TrMean(f)),
        (MeaMed(f), byzfl.Meamed(f)),
        (Krum(f, num_neighbours=n - f - 1), byzfl.Krum(f)),
        (MultiKrum(f, num_neighbours=n - f - 1), byzfl.MultiKrum(f)),
        (GeometricMedian(), byzfl.GeometricMedian(1e-6, 2000)),
    ]
    for rule, other in theirs:
        expected = other(matrix.double().numpy())
        atol = 1e-4 if isinstance(rule, GeometricMedian) else 1e-6
        np.testing.assert_allclose(rule(updates(matrix)), expected, rtol=1e-5, atol=atol)
    for wrap, other in ((NNM, byzfl.NNM(f)), (ARC, byzfl.ARC(f))):
        seen: list[Clear] = []
        wrap(Looking(seen), f)(updates(matrix))
        expected = other(matrix.double().numpy())
        np.testing.assert_allclose(torch.stack([m.delta for m in seen]), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("rule", "n", "said"),
    [
        (Krum(3), 8, r"needs at least 9 messages \(2f \+ 3\); the cohort has 8: lower num_byz"),
        (MultiKrum(1), 4, r"needs at least 5 messages .* the cohort has 4: lower num_byzantine"),
        (
            Bulyan(2),
            10,
            r"needs at least 11 messages \(4f \+ 3\); the cohort has 10: lower num_byz",
        ),
        (
            Bulyan(1, 6 + 1),
            7,
            r"num_selected above 2 \(2f\) and up to 6 \(n - f\).*; it is 7: change",
        ),
        (Krum(1, 6), 6, r"needs at least 7 messages \(num_neighbours \+ 1\); .*: lower num_neig"),
        (MeaMed(2), 4, r"needs at least 5 messages \(2f \+ 1\); the cohort has 4: lower num_byz"),
        (NNM(Median(), 2), 4, r"needs at least 5 messages \(2f \+ 1\)"),
        (ARC(Median(), 2), 4, r"needs at least 5 messages \(2f \+ 1\)"),
        (Median(), 0, r"needs at least 1 messages .* the cohort has 0: sample more clients"),
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
        lambda: MultiKrum(1, rescored=True, num_neighbours=3),
        lambda: TrimmedMean(-1),
        lambda: MeaMed(-1),
        lambda: Bulyan(-1),
        lambda: NNM(Median(), -1),
        lambda: ARC(Median(), -1),
        lambda: Bucketing(Median(), 0),
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

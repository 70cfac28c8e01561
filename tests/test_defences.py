"""The server's defences beyond ``test_rules.py``: selecting, clipping, trusting, analysing.

Theorems (hypothesis): equivariance, how far a clipped rule moves, SparseFed's books, that nothing
absurd moves a model. Oracles: slow twins, byzfl, numbers worked out by hand. Sabotage: each stops
an attack on a small federation that the mean falls to, and each falls to one who knows it.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from functools import cache
from itertools import combinations
from math import inf, log, nan, sqrt
from statistics import NormalDist
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from turncoat.attacks.poisoning.sign_flip import SignFlip
from turncoat.coalition import Clients, Coalition
from turncoat.federation import Federation, Plain
from turncoat.messages import Update
from turncoat.metrics.detection import Caught
from turncoat.params import Layout
from turncoat.randomness import Randomness
from turncoat.runtimes.simulate import simulate
from turncoat.stage import IncompatibleStages, Memory, Plan, Verdict, call, planned, streams
from turncoat.stages.aggregate.centred_clipping import CentredClipping
from turncoat.stages.aggregate.clusters import has_two_groups, silhouette, split_in_two, two_means
from turncoat.stages.aggregate.coordinatewise import Median
from turncoat.stages.aggregate.crfl import (
    CRFL,
    Backdoored,
    certified_radius,
    logistic_lipschitz,
    vote_bounds,
)
from turncoat.stages.aggregate.diameter import MDA, MoNNA, tightest
from turncoat.stages.aggregate.dnc import DnC, outlying
from turncoat.stages.aggregate.flame import FLAME, majority
from turncoat.stages.aggregate.flanders import FLANDERS, autoregression
from turncoat.stages.aggregate.fldetector import FLDetector, hessian_product
from turncoat.stages.aggregate.fltrust import FLTrust
from turncoat.stages.aggregate.foolsgold import FoolsGold, unlikeness
from turncoat.stages.aggregate.geometry import cosines, gram, lengths, products
from turncoat.stages.aggregate.krum import Krum
from turncoat.stages.aggregate.mean import Mean
from turncoat.stages.aggregate.norm_bound import NormBound
from turncoat.stages.aggregate.robust_lr import RobustLR
from turncoat.stages.aggregate.signguard import SignGuard
from turncoat.stages.aggregate.sparsefed import SparseFed
from turncoat.stages.aggregate.sparsefed import certified_radius as sparse_radius
from turncoat.stages.aggregate.update_analysis import CosineTest, NormTest, UpdatePCA, robust_z
from turncoat.stages.aggregate.weak_dp import WeakDP
from turncoat.stages.release.smoothed import SmoothedVote
from turncoat.stages.train.local import LocalSGD
from turncoat.task import Model, Task
from turncoat.tasks.bundled import digits
from turncoat.tasks.models import MLP
from turncoat.tasks.partitions import IID, Dirichlet

torch.set_num_threads(1)
RANDOM = Randomness(11)
TRAIN = LocalSGD(0.3, 2, 25)
SIZE = 23  # parameters of SMALL


class Small(nn.Module):
    """Two layers: the last has three rows of four."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(1, 4)
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.first(x.reshape(len(x), -1)[:, :1]))
        return out


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.layer(x))
        return out


SMALL, WITH_BUFFERS = Model(Small), Model(Normed)
PUBLIC = (torch.linspace(-1, 1, 40)[:, None], torch.arange(40) * 3 // 40)

SELECTING: list[Any] = [
    DnC(2, num_coordinates=15),
    DnC(2, num_coordinates=15, num_iterations=3),
    MDA(2),
    MoNNA(2),
    SignGuard(),
    SignGuard(similarity="cosine"),
    SignGuard(similarity="distance"),
    FLAME(),
    FLAME(compare="updates"),
    FoolsGold(),
    FoolsGold("all"),
    FLTrust(LocalSGD(0.1)),
]
SCREENS: list[Any] = [
    UpdatePCA(Mean(), source=1, first_round=0),
    CosineTest(Mean()),
    NormTest(Mean()),
    FLDetector(Mean(), window=1),
    FLANDERS(Mean(), num_kept=5),
]
OTHERS: list[Any] = [
    CentredClipping(1.0, 2),
    SparseFed(num_kept=5),
    SparseFed(fraction_kept=0.3, momentum=0.5),
    WeakDP(Mean(), max_norm=1.0, sigma=0.01),
    RobustLR(4, Mean()),
    CRFL(Mean(), sigma=0.01),
]
ALL = [*SELECTING, *SCREENS, *OTHERS]

quick = settings(max_examples=12, deadline=None)
some_seed = st.integers(0, 2**31)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=Randomness(seed).at("x"))


def updates(matrix: Tensor) -> list[Update]:
    return [Update(row, 1.0) for row in matrix]


def said(
    rule: Any,
    matrix: Tensor,
    *,
    cell: dict[str, Any] | None = None,
    seed: int = 0,
    model: Model = SMALL,
    before: Tensor | None = None,
    cohort: Sequence[int] | None = None,
) -> tuple[Tensor, set[int]]:
    """Return the step of one round, and whom it left out."""
    verdict = Verdict()
    step = call(
        rule,
        updates(matrix),
        rng=Randomness(seed).at("rule"),
        memory=Memory({} if cell is None else cell),
        model=model,
        before=drawn(99, matrix.shape[1]) if before is None else before,
        cohort=tuple(range(len(matrix))) if cohort is None else tuple(cohort),
        public=PUBLIC,
        verdict=verdict,
    )
    return step, verdict.flagged


def named(rule: Any) -> str:
    return repr(rule)[:40]


# What all of them keep to.


@pytest.mark.parametrize("rule", [r for r in ALL if not isinstance(r, FLANDERS)], ids=named)
@quick
@given(n=st.integers(7, 12), seed=some_seed)
def test_the_order_of_the_messages_does_not_matter(rule: Any, n: int, seed: int) -> None:
    matrix, order = drawn(seed, n, SIZE), torch.randperm(n, generator=Randomness(seed).at("o"))
    still, left_out = said(rule, matrix)
    moved, too = said(rule, matrix[order], cohort=order.tolist())
    torch.testing.assert_close(moved, still, atol=1e-4, rtol=1e-4)
    assert {int(order[i]) for i in too} == left_out


def test_one_that_remembers_columns_knows_them_by_their_sender() -> None:
    rule, there, back = FLANDERS(Mean(), num_kept=6), dict[str, Any](), dict[str, Any]()
    for t in range(4):
        matrix = 0.1 * drawn(t, 8, SIZE)
        order = torch.randperm(8, generator=Randomness(t).at("order"))
        one, out = said(rule, matrix, cell=there)
        two, too = said(rule, matrix[order], cell=back, cohort=order.tolist())
        torch.testing.assert_close(one, two)
        assert {int(order[i]) for i in too} == out


@pytest.mark.parametrize("rule", [DnC(2), DnC(2, 1.5, 10, 3), MDA(2), MoNNA(2)], ids=named)
@quick
@given(n=st.integers(7, 12), seed=some_seed)
def test_a_shift_of_all_shifts_the_result(rule: Any, n: int, seed: int) -> None:
    """Not of those that look at directions, signs, lengths or a memory: 0 means something there."""
    matrix, shift = drawn(seed, n, SIZE), 3 * drawn(seed + 1, SIZE)
    moved, still = said(rule, matrix + shift)[0], said(rule, matrix)[0]
    torch.testing.assert_close(moved, still + shift, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("rule", ALL, ids=named)
@pytest.mark.parametrize(
    "forged",
    [(nan, nan), (inf, -inf), (1e30, -1e30), (1e30, -3e38), (nan, 3e38), (0.0, 0.0)],
    ids=str,
)
def test_nothing_absurd_moves_the_model(rule: Any, forged: tuple[float, float]) -> None:
    cell: dict[str, Any] = {}
    for t in range(4):
        matrix = 0.1 * drawn(t, 9, SIZE)
        matrix[2, 5] = forged[0]
        matrix[6] = forged[1]
        step, _ = said(rule, matrix, cell=cell, seed=t, before=0.1 * drawn(9, SIZE))
        assert step.dtype == torch.float32 and bool(step.isfinite().all())
        assert float(step.norm()) < 3


@pytest.mark.parametrize("rule", ALL, ids=named)
def test_where_nobody_says_anything_the_model_stays(rule: Any) -> None:
    quiet = {WeakDP: WeakDP(Mean(), max_norm=1.0, sigma=0.0), CRFL: CRFL(Mean(), sigma=0.0)}
    rule = quiet.get(type(rule), rule)
    for matrix in (torch.zeros(9, SIZE), torch.full((9, SIZE), nan)):
        assert not bool(said(rule, matrix, before=0.1 * drawn(9, SIZE))[0].any())


@pytest.mark.parametrize("rule", ALL, ids=named)
def test_nobody_at_all_is_refused(rule: Any) -> None:
    with pytest.raises(ValueError, match="the cohort has 0: "):
        said(rule, torch.zeros(0, SIZE), before=torch.zeros(SIZE))


@pytest.mark.parametrize("rule", ALL, ids=named)
def test_messages_are_left_as_they_were_and_one_alone_is_no_trouble(rule: Any) -> None:
    matrix = drawn(0, 9, SIZE)
    before = matrix.clone()
    said(rule, matrix)[0].add_(1)
    assert torch.equal(matrix, before)
    try:
        step, _ = said(rule, matrix[:1], before=0.1 * drawn(9, SIZE))
    except ValueError as error:
        assert "the cohort has 1: lower" in str(error)
    else:
        assert float(step.norm()) <= float(matrix[0].norm()) + 1


@pytest.mark.parametrize("rule", [r for r in ALL if not hasattr(r, "inner")], ids=named)
def test_claimed_weights_buy_nothing(rule: Any) -> None:
    matrix = drawn(1, 9, SIZE)
    claims = [Update(row, 1e12 if i < 2 else 1.0) for i, row in enumerate(matrix)]
    offers: dict[str, Any] = {
        "before": drawn(9, SIZE),
        "cohort": tuple(range(9)),
        "model": SMALL,
        "public": PUBLIC,
    }

    def answer(messages: list[Update]) -> Tensor:
        fresh = {"rng": RANDOM.at("w"), "memory": Memory(), "verdict": Verdict()}
        step: Tensor = call(rule, messages, **offers, **fresh)
        return step

    assert torch.equal(answer(claims), answer(updates(matrix)))


@pytest.mark.parametrize(
    ("rule", "n", "message"),
    [
        (DnC(2), 4, r"needs at least 5 messages \(2f \+ 1.* the cohort has 4: lower num_byz"),
        (DnC(2, 3.0), 6, r"needs at least 7 messages .* the cohort has 6"),
        (MDA(3), 6, r"needs at least 7 messages \(2f \+ 1\); the cohort has 6: lower num_byz"),
        (MoNNA(3), 6, r"needs at least 7 messages \(2f \+ 1\); the cohort has 6: lower num_byz"),
        (RobustLR(5, Mean()), 4, r"needs at least 5 messages .theta.; the cohort has 4: lower"),
        (
            FLANDERS(Mean(), num_kept=5),
            4,
            r"needs at least 5 messages .* the cohort has 4: lower num_k",
        ),
    ],
    ids=named,
)
def test_a_cohort_below_the_bound_is_refused(rule: Any, n: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rule.check_cohort(n)
    with pytest.raises(ValueError, match=message):
        said(rule, drawn(0, n, SIZE))


@pytest.mark.parametrize(
    "make",
    [
        lambda: CentredClipping(0.0),
        lambda: DnC(-1),
        lambda: DnC(1, num_iterations=0),
        lambda: SparseFed(num_kept=0),
        lambda: SparseFed(fraction_kept=1.5),
        lambda: SparseFed(num_kept=3, momentum=1.5),
        lambda: WeakDP(Mean(), max_norm=0.0),
        lambda: FLTrust(TRAIN, 0),
        lambda: FoolsGold("first"),  # type: ignore[arg-type]
        lambda: FLAME(-0.1),
        lambda: FLAME(compare="gradients"),  # type: ignore[arg-type]
        lambda: SignGuard(lower=4.0),
        lambda: SignGuard(stretch=2.0),
        lambda: RobustLR(0, Mean()),
        lambda: MDA(1, 0),
        lambda: MoNNA(1, "last"),  # type: ignore[arg-type]
        lambda: UpdatePCA(Mean(), source=-1),
        lambda: NormTest(Mean(), side="short"),  # type: ignore[arg-type]
        lambda: FLDetector(Mean(), window=0),
        lambda: FLANDERS(Mean(), num_kept=1, ridge=0.0),
        lambda: CRFL(Mean(), max_norm=0.0),
        lambda: SmoothedVote(0.0),
        lambda: Backdoored(2.0, 1.0, 1, 0.1, 0.1),
    ],
)
def test_fields_out_of_range_are_refused(make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError):
        make()


# Measures of rows.


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1.0, 1e20, 1e37])
def test_lengths_hold_whatever_the_scale(scale: float) -> None:
    matrix = drawn(0, 5, 9000) * scale
    matrix[3] = 0
    expected = matrix.double().norm(dim=1)
    torch.testing.assert_close(lengths(matrix), expected, rtol=1e-6, atol=0)
    centre = drawn(1, 9000) * scale
    far = (matrix.double() - centre.double()).norm(dim=1)
    torch.testing.assert_close(lengths(matrix, centre), far, rtol=1e-6, atol=0)


def test_angles_are_those_of_slow_twins() -> None:
    matrix, vector = drawn(0, 6, 9000), drawn(1, 9000)
    matrix[2] = 0
    exact = matrix.double()
    torch.testing.assert_close(products(matrix, vector), exact @ vector.double())
    moved = exact + vector.double()
    torch.testing.assert_close(gram(matrix, vector), moved @ moved.T)
    unit = exact / exact.norm(dim=1, keepdim=True).clamp(min=1e-9)
    torch.testing.assert_close(cosines(gram(matrix)), unit @ unit.T)


# Centred clipping.


@quick
@given(
    seed=some_seed,
    tau=st.floats(1e-3, 1e3),
    num_iterations=st.integers(1, 4),
    scale=st.sampled_from([1e-4, 1.0, 1e6, 1e30]),
)
def test_centred_clipping_moves_by_its_radius_at_most(
    seed: int, tau: float, num_iterations: int, scale: float
) -> None:
    last = drawn(seed + 1, SIZE)
    step, _ = said(
        CentredClipping(tau, num_iterations), scale * drawn(seed, 8, SIZE), cell={"": last}
    )
    assert float((step - last).norm()) <= num_iterations * tau * (1 + 1e-4) + 1e-5


def test_centred_clipping_is_its_equation() -> None:
    matrix, v = 2 * drawn(0, 7, SIZE), drawn(1, SIZE)
    step, _ = said(CentredClipping(1.5, 3), matrix, cell={"": v})
    for _ in range(3):
        rest = matrix - v
        v = v + (rest * (1.5 / rest.norm(dim=1, keepdim=True)).clamp(max=1)).mean(dim=0)
    torch.testing.assert_close(step, v)


def test_a_wide_radius_is_the_mean() -> None:
    matrix = drawn(0, 7, SIZE)
    torch.testing.assert_close(said(CentredClipping(1e6), matrix)[0], matrix.mean(dim=0))


def test_a_patient_traitor_drags_a_centred_step_further_every_round() -> None:
    cell: dict[str, Any] = {}
    way = torch.ones(SIZE) / sqrt(SIZE)
    dragged = []
    for _ in range(30):
        matrix = torch.zeros(10, SIZE)
        matrix[:2] = 1e3 * way
        dragged.append(float(said(CentredClipping(1.0), matrix, cell=cell)[0] @ way))
    assert dragged == sorted(dragged) and dragged[0] == pytest.approx(0.2, rel=1e-3)
    assert dragged[-1] <= 1.0  # where the honest pull back as hard


def byzfl() -> Any:
    """Return byzfl's aggregators, without its federations, which import much else."""
    if "byzfl" not in sys.modules:
        spec = importlib.util.find_spec("byzfl")
        if spec is None:
            pytest.skip("byzfl is not installed: pip install --no-deps byzfl")
        bare = ModuleType("byzfl")
        bare.__path__ = list(spec.submodule_search_locations or [])
        sys.modules["byzfl"] = bare
    return importlib.import_module("byzfl.aggregators.aggregators")


def test_rules_agree_with_byzfl() -> None:
    theirs, matrix = byzfl(), drawn(3, 9, 30)
    v = drawn(4, 30)
    pairs = [
        (CentredClipping(1.5, 3), theirs.CenteredClipping(L=3, tau=1.5), {"": v}),
        (MoNNA(2, "first"), theirs.MoNNA(f=2), {}),
    ]
    pairs[0][1].m = v  # its constructor takes none
    for ours, their, cell in pairs:
        torch.testing.assert_close(said(ours, matrix, cell=cell)[0], their(matrix))


@pytest.mark.parametrize("seed", range(5))
def test_the_diameter_is_that_of_byzfl(seed: int) -> None:
    theirs, matrix = byzfl(), drawn(seed, 8, 5)
    kept = sorted(set(range(8)) - said(MDA(2), matrix)[1])
    best = theirs.MDA(f=2)(matrix)
    subset = next(
        list(c)
        for c in combinations(range(8), 6)
        if torch.allclose(matrix[list(c)].mean(dim=0), best, atol=1e-5)
    )
    both = [torch.pdist(matrix[k]).max() for k in (kept, subset)]
    torch.testing.assert_close(*both)


# Minimum diameter.


@pytest.mark.parametrize("seed", range(20))
def test_the_tightest_subset_is_that_of_the_slow_twin(seed: int) -> None:
    n, f = 6 + seed % 4, 1 + seed % 3
    squared = torch.cdist(drawn(seed, n, 2), drawn(seed, n, 2)).square()

    def longest_first(kept: tuple[int, ...]) -> list[float]:
        return sorted((float(squared[a, b]) for a, b in combinations(kept, 2)), reverse=True)

    best = min(combinations(range(n), n - f), key=longest_first)
    assert tightest(squared, f, 10_000) == list(best)


@quick
@given(f=st.integers(1, 5), seed=some_seed, together=st.booleans())
def test_forged_updates_are_left_out_by_those_that_look_for_the_nearest(
    f: int, seed: int, together: bool
) -> None:
    matrix = drawn(seed, 2 * f + 3, SIZE)
    matrix[-f:] = 1e6 * drawn(seed + 1, SIZE) if together else 1e6 * drawn(seed + 1, f, SIZE)
    honest = matrix[:-f]
    for rule in (MDA(f), MoNNA(f), MoNNA(f, "first")):
        step, left_out = said(rule, matrix)
        assert left_out == set(range(f + 3, 2 * f + 3))
        torch.testing.assert_close(step, honest.mean(dim=0))


def test_a_search_that_would_take_for_ever_is_given_up() -> None:
    with pytest.raises(ValueError, match="no answer within 40 nodes of the search: lower num_byz"):
        said(MDA(9, max_nodes=40), drawn(0, 30, 2))


def test_fifty_clients_with_twelve_traitors_are_still_exact() -> None:
    matrix = drawn(0, 50, 40)
    matrix[:12] += 1.5 * drawn(1, 40)
    kept = tightest(torch.cdist(matrix, matrix).square(), 12, 200_000)
    assert len(kept) == 38


# Divide and conquer.


def test_scores_are_squared_projections_on_the_top_singular_vector() -> None:
    matrix = drawn(0, 8, 40)
    centred = (matrix - matrix.mean(dim=0)).double()
    along = torch.linalg.svd(centred).Vh[0]
    torch.testing.assert_close(outlying(matrix), (centred @ along).square(), rtol=1e-5, atol=0)


def test_dnc_leaves_out_those_that_agree_on_a_direction() -> None:
    matrix = drawn(0, 20, 400)
    matrix[:4] += 0.5
    step, left_out = said(DnC(4), matrix)
    assert left_out == {0, 1, 2, 3}
    torch.testing.assert_close(step, matrix[4:].mean(dim=0))


def test_a_long_forgery_hides_a_shorter_one_from_dnc() -> None:
    matrix = drawn(0, 20, 400)
    matrix[0], matrix[1] = 0, 0
    matrix[0, 7], matrix[1, 9] = 1e4, 300.0
    _, left_out = said(DnC(2), matrix)
    assert 0 in left_out and 1 not in left_out
    assert said(NormBound(DnC(2), ratio=1.0), matrix)[0].norm() < 10


# SparseFed.


def test_all_parameters_and_no_momentum_are_clipped_fedavg_to_the_bit() -> None:
    sparse, cell = SparseFed(num_kept=SIZE, max_norm=0.7), dict[str, Any]()
    for t in range(5):
        matrix = drawn(t, 9, SIZE)
        expected = NormBound(Mean(), max_norm=0.7)(updates(matrix))
        assert torch.equal(said(sparse, matrix, cell=cell)[0], expected)


@quick
@given(seed=some_seed, k=st.integers(1, SIZE), rounds=st.integers(1, 12))
def test_what_was_not_sent_is_still_owed(seed: int, k: int, rounds: int) -> None:
    rule, cell = SparseFed(num_kept=k, max_norm=1.0), dict[str, Any]()
    sent, meant = torch.zeros(SIZE), torch.zeros(SIZE)
    for t in range(rounds):
        matrix = drawn(seed + t, 5, SIZE)
        step, _ = said(rule, matrix, cell=cell)
        assert int((step != 0).sum()) <= k
        sent += step
        meant += NormBound(Mean(), max_norm=1.0)(updates(matrix))
    torch.testing.assert_close(sent + cell[""][1], meant, atol=1e-6, rtol=0)


def test_sparsefed_is_its_slow_twin() -> None:
    rule, cell = SparseFed(num_kept=4, max_norm=1.0, momentum=0.6), dict[str, Any]()
    velocity, error = torch.zeros(SIZE), torch.zeros(SIZE)
    for t in range(6):
        matrix = drawn(t, 5, SIZE)
        mean = torch.stack([r * min(1.0, 1 / float(r.norm())) for r in matrix]).mean(dim=0)
        velocity = 0.6 * velocity + mean
        error = error + velocity
        kept = error.abs().argsort(descending=True)[:4]
        expected = torch.zeros(SIZE)
        expected[kept] = error[kept]
        velocity[kept] = error[kept] = 0
        torch.testing.assert_close(said(rule, matrix, cell=cell)[0], expected)


def test_running_statistics_are_no_parameters() -> None:
    layout = WITH_BUFFERS.layout
    matrix = drawn(0, 7, layout.num_params)
    before = WITH_BUFFERS.initial(RANDOM.at("b"))
    plain = matrix.mean(dim=0)[layout.num_trainable :]
    for rule in (
        SparseFed(num_kept=1, max_norm=1e6),
        WeakDP(Mean(), max_norm=1e6, sigma=1.0),
        RobustLR(7, Mean()),
        CRFL(Mean(), max_norm=0.01, sigma=1.0),
    ):
        step, _ = said(rule, matrix, model=WITH_BUFFERS, before=before)
        torch.testing.assert_close(step[layout.num_trainable :], plain, atol=1e-5, rtol=1e-5)


def test_sparsefed_streams_so_that_no_round_need_be_held() -> None:
    assert streams(SparseFed(num_kept=1)) and streams(WeakDP(Mean(), max_norm=1.0))
    assert not streams(DnC(1))


def test_the_radius_of_sparsefed_is_its_formula_and_says_little() -> None:
    found = sparse_radius(0.5, lipschitz=0.01, num_kept=5, lrs=(0.1, 0.2))
    assert found == pytest.approx(0.3 * (1 + 2 * 5 * 0.01) ** 0.3 * 0.5)
    dense = sparse_radius(0.5, lipschitz=0.01, num_kept=500, lrs=(0.1, 0.2))
    assert dense > found
    assert sparse_radius(1.0, lipschitz=1.0, num_kept=10**6, lrs=(1.0,) * 100) == inf
    assert sparse_radius(0.0, lipschitz=1.0, num_kept=1, lrs=(1.0,)) == 0


# Weak DP and robust learning rates.


@quick
@given(seed=some_seed, radius=st.floats(1e-3, 1e3))
def test_weak_dp_without_noise_moves_no_further_than_its_radius(seed: int, radius: float) -> None:
    matrix = 1e5 * drawn(seed, 6, SIZE)
    step, _ = said(WeakDP(Mean(), max_norm=radius, sigma=0.0), matrix)
    assert float(step.norm()) <= radius * (1 + 1e-5)


def test_weak_noise_has_the_deviation_it_says() -> None:
    layout = Model(lambda: nn.Linear(100, 100)).layout
    step, _ = said(
        WeakDP(Mean(), max_norm=1.0, sigma=0.025),
        torch.zeros(3, layout.num_params),
        model=Model(lambda: nn.Linear(100, 100)),
    )
    assert float(step.std()) == pytest.approx(0.025, rel=0.03)


def test_a_coordinate_goes_back_where_too_few_agree() -> None:
    matrix = torch.ones(9, SIZE)
    matrix[:4, 3] = -8.0  # 5 against 4: the sum of signs is 1
    matrix[:2, 5] = -8.0  # 7 against 2: 5
    step, _ = said(RobustLR(3, Mean()), matrix)
    mean = matrix.mean(dim=0)
    expected = mean.clone()
    expected[3] = -mean[3]
    torch.testing.assert_close(step, expected)
    assert torch.equal(said(RobustLR(1, Median()), matrix)[0], torch.ones(SIZE))


def test_more_traitors_than_the_threshold_turn_the_honest_round() -> None:
    matrix = torch.ones(9, SIZE)
    matrix[:4] = -1.0
    assert bool((said(RobustLR(3, Mean()), matrix)[0] < 0).all())


# FLTrust.


def root(before: Tensor) -> Tensor:
    made: Update = call(LocalSGD(0.1), SMALL, before, PUBLIC, rng=RANDOM.at("root"))
    return made.delta


def test_trust_is_the_cosine_and_every_length_the_servers() -> None:
    before = SMALL.initial(RANDOM.at("i"))
    guide = root(before)
    across = drawn(0, SIZE)
    across -= guide * (across @ guide) / (guide @ guide)
    matrix = torch.stack([5 * guide, guide + across * guide.norm() / across.norm(), -guide])
    step, left_out = said(FLTrust(LocalSGD(0.1), None), matrix, before=before)
    half = 1 / sqrt(2)
    size = guide.norm()
    expected = (guide + half * matrix[1] / matrix[1].norm() * size) / (1 + half)
    torch.testing.assert_close(step, expected, atol=1e-6, rtol=1e-4)
    assert left_out == {2}


def test_without_any_trust_the_model_stays() -> None:
    before = SMALL.initial(RANDOM.at("i"))
    matrix = torch.stack([-root(before)] * 4)
    step, left_out = said(FLTrust(LocalSGD(0.1), None), matrix, before=before)
    assert not bool(step.any()) and left_out == {0, 1, 2, 3}


@quick
@given(seed=some_seed)
def test_a_trusted_step_is_no_longer_than_the_servers_own(seed: int) -> None:
    before = SMALL.initial(RANDOM.at("i"))
    step, _ = said(FLTrust(LocalSGD(0.1), None), 1e3 * drawn(seed, 6, SIZE), before=before)
    assert float(step.norm()) <= float(root(before).norm()) * (1 + 1e-4)


def test_trust_needs_public_data_and_a_training_that_the_server_can_run() -> None:
    with pytest.raises(ValueError, match="needs public data, and the task has none: give it some"):
        FLTrust(TRAIN)(
            updates(drawn(0, 3, SIZE)),
            model=SMALL,
            before=drawn(1, SIZE),
            public=None,
            rng=RANDOM.at("r"),
            memory=Memory(),
            verdict=Verdict(),
        )


def test_whoever_knows_the_root_data_poisons_at_right_angles() -> None:
    before = SMALL.initial(RANDOM.at("i"))
    guide, aim = root(before), torch.zeros(SIZE)
    aim[-1] = 1.0
    forged = aim * guide.norm() + 0.2 * guide  # little trust is enough, where all do it
    step, left_out = said(FLTrust(LocalSGD(0.1), None), forged.repeat(3, 1), before=before)
    assert not left_out and float(step[-1]) > 0.5 * float(guide.norm())


# FoolsGold.


def slow_weights(cosine: Tensor) -> list[float]:
    n = len(cosine)
    like = [[float(cosine[i, j]) if i != j else 0.0 for j in range(n)] for i in range(n)]
    most = [max(row) for row in like]
    for i in range(n):
        for j in range(n):
            if most[i] < most[j]:
                like[i][j] *= most[i] / most[j]
    weights = [min(1.0, max(0.0, 1 - max(row))) for row in like]
    weights = [min(0.99, w / max(weights)) for w in weights]
    return [min(1.0, max(0.0, log(w / (1 - w)) + 0.5)) if w > 0 else 0.0 for w in weights]


@quick
@given(seed=some_seed, n=st.integers(2, 9))
def test_foolsgold_weighs_as_its_slow_twin_does(seed: int, n: int) -> None:
    cosine = cosines(gram(drawn(seed, n, 4)))
    expected = torch.tensor(slow_weights(cosine), dtype=torch.float64)
    torch.testing.assert_close(unlikeness(cosine), expected)


def test_puppets_count_for_nothing_and_one_alone_passes() -> None:
    honest = torch.zeros(5, SIZE)
    honest[range(5), range(8, 13)] = 1.0  # each its own way, in the last layer
    aim = torch.zeros(SIZE)
    aim[14] = 1.0
    together, left_out = said(FoolsGold(), torch.cat([honest, aim.repeat(3, 1)]))
    assert left_out == {5, 6, 7} and float(together[14]) == 0
    alone, left_out = said(FoolsGold(), torch.cat([honest, aim[None]]))
    assert not left_out
    torch.testing.assert_close(alone, torch.cat([honest, aim[None]]).mean(dim=0))


def test_foolsgold_remembers_each_by_name() -> None:
    cell: dict[str, Any] = {}
    aim = drawn(1, SIZE)
    said(FoolsGold("all"), torch.stack([aim, drawn(2, SIZE)]), cell=cell, cohort=(4, 7))
    said(FoolsGold("all"), torch.stack([drawn(3, SIZE), drawn(2, SIZE)]), cell=cell, cohort=(2, 7))
    assert set(cell[""]) == {2, 4, 7}
    torch.testing.assert_close(cell[""][7], 2 * drawn(2, SIZE))


def test_equal_clients_are_all_put_down_as_puppets() -> None:
    step, left_out = said(FoolsGold(), drawn(0, 1, SIZE).repeat(6, 1))
    assert left_out == set(range(6)) and not bool(step.any())


def test_a_rule_that_looks_at_the_last_layer_needs_one() -> None:
    for rule in (FoolsGold(), UpdatePCA(Mean(), source=0)):
        with pytest.raises(ValueError, match="but what is sent is no update of it"):
            said(rule, drawn(0, 3, 5))
    with pytest.raises(ValueError, match=r"looks at row 3 of last.weight, which has 3: lower so"):
        said(UpdatePCA(Mean(), source=3), drawn(0, 3, SIZE))


# FLAME and SignGuard.


def test_the_majority_is_found_and_its_outsiders_left_out() -> None:
    angle = torch.tensor([0.0, 0.05, 0.1, 0.12, 0.15, 0.18, 0.2, 2.5, 2.6, 2.7])
    points = torch.stack([angle.cos(), angle.sin()], dim=1)
    inside = majority(1 - cosines(gram(points)))
    assert not bool(inside[7:].any()) and int(inside.sum()) >= 6


@quick
@given(seed=some_seed)
def test_flame_and_signguard_go_no_further_than_the_median_length(seed: int) -> None:
    matrix = drawn(seed, 9, SIZE)
    matrix[:4] *= 1e6
    honest = float(matrix[4:].norm(dim=1).max())
    for rule in (FLAME(0.0), FLAME(0.0, "updates"), SignGuard()):
        assert float(said(rule, matrix)[0].norm()) <= honest * (1 + 1e-5)


def test_the_noise_of_flame_follows_the_median_length() -> None:
    layout = Model(lambda: nn.Linear(100, 100)).layout
    model, matrix = Model(lambda: nn.Linear(100, 100)), drawn(0, 1, layout.num_params).repeat(4, 1)
    noisy, _ = said(FLAME(0.01), matrix, model=model)
    plain, _ = said(FLAME(0.0), matrix, model=model)
    assert float((noisy - plain).std()) == pytest.approx(0.01 * float(matrix[0].norm()), rel=0.03)


def test_signguard_tells_a_turned_update_of_ordinary_length() -> None:
    honest = 0.4 + drawn(0, 9, 2000)
    matrix = torch.cat([-honest[:3], honest[3:]])
    assert {0, 1, 2} <= said(SignGuard(), matrix)[1]
    assert said(NormTest(Mean()), matrix)[1] & {0, 1, 2} == set()


def test_one_who_keeps_signs_and_length_passes_signguard() -> None:
    matrix = 0.4 + drawn(0, 9, 4000)
    order = torch.randperm(4000, generator=RANDOM.at("shuffle"))
    matrix[0] = matrix[1][order]  # as many rise and fall as in an honest one: elsewhere
    assert 0 not in said(SignGuard(), matrix)[1]


# Tests of updates, and handing on.


def test_robust_scores_of_few_numbers() -> None:
    z = robust_z(torch.tensor([1.0, 2.0, 3.0, 4.0, 100.0], dtype=torch.float64), 1e-9)
    torch.testing.assert_close(z[-1], torch.tensor(97 / 1.4826, dtype=torch.float64))
    assert not bool(robust_z(torch.ones(4), 1e-3).any())


def test_what_is_too_long_or_points_away_is_left_out() -> None:
    matrix = 1 + 0.3 * drawn(0, 12, SIZE)
    matrix[0] *= 3
    matrix[1] *= -1
    matrix[2] *= 0.1
    assert said(NormTest(Mean()), matrix)[1] == {0, 2}
    assert said(NormTest(Mean(), side="long"), matrix)[1] == {0}
    step, left_out = said(CosineTest(Mean()), matrix)
    assert left_out == {1}
    torch.testing.assert_close(step, matrix[[0, *range(2, 12)]].mean(dim=0))


def test_inner_rules_speak_of_positions_among_all() -> None:
    matrix = 1 + 0.3 * drawn(0, 12, SIZE)
    matrix[0] *= 50
    matrix[5] += 2 * drawn(1, SIZE)
    _, left_out = said(NormTest(DnC(1), threshold=20.0), matrix)
    assert left_out == {0, 5}
    _, left_out = said(NormTest(FoolsGold("all")), matrix, cohort=range(20, 32))
    assert 0 in left_out


def test_a_rule_left_with_too_few_gets_the_suspects_too() -> None:
    matrix = 1 + 0.3 * drawn(0, 7, SIZE)
    matrix[:2] *= 100
    step, left_out = said(NormTest(Krum(2)), matrix)
    assert left_out == {0, 1} and any(torch.equal(step, row) for row in matrix[2:])


def test_groups_of_few_points_are_found() -> None:
    points = torch.cat([drawn(0, 8, 2), 20 + drawn(1, 3, 2)])
    group = two_means(points)
    assert group.tolist() == [False] * 8 + [True] * 3
    assert silhouette(points, group) > 0.8
    upper, scatter = split_in_two(torch.tensor([1.0, 9.0, 1.2, 8.8, 0.8]))
    assert upper.tolist() == [False, True, False, True, False]
    assert scatter == pytest.approx(0.08 + 0.02)


def test_the_gap_statistic_tells_one_group_from_two() -> None:
    for seed in range(10):
        one, rng = 1 + 0.1 * drawn(seed, 15), RANDOM.at("gap", seed)
        assert not has_two_groups(one, rng)
        assert has_two_groups(torch.cat([one[:11], 3 + one[11:]]), rng)
    assert not has_two_groups(torch.ones(5), RANDOM.at("gap"))


# Forecasts.


def test_the_hessian_product_bends_as_it_was_seen_to() -> None:
    size = 12
    root_of = drawn(0, size, size).double()
    hessian = root_of @ root_of.T + torch.eye(size)
    moves = [drawn(i + 1, size).double() for i in range(4)]
    bends = [hessian @ m for m in moves]
    found = hessian_product(moves, bends, moves[-1])
    torch.testing.assert_close(found, bends[-1])
    every = [hessian_product([m], [b], m) for m, b in zip(moves, bends, strict=True)]
    torch.testing.assert_close(every, bends)
    assert not bool(hessian_product([torch.zeros(3)], [torch.ones(3)], torch.ones(3)).any())


def test_bfgs_in_compact_form_is_bfgs_step_by_step() -> None:
    size = 8
    root_of = drawn(0, size, size).double()
    hessian = root_of @ root_of.T + torch.eye(size)
    moves = [drawn(i + 1, size).double() for i in range(3)]
    bends = [hessian @ m for m in moves]
    sigma = bends[-1] @ moves[-1] / (moves[-1] @ moves[-1])
    b = sigma * torch.eye(size, dtype=torch.float64)
    for s, y in zip(moves, bends, strict=True):
        b = b - torch.outer(b @ s, b @ s) / (s @ b @ s) + torch.outer(y, y) / (y @ s)
    vector = drawn(9, size).double()
    torch.testing.assert_close(hessian_product(moves, bends, vector), b @ vector)


def test_a_matrix_autoregression_is_found_again() -> None:
    a = torch.eye(20).double() + 0.1 * drawn(0, 20, 20).double()
    b = 0.9 * torch.eye(6).double() + 0.03 * drawn(1, 6, 6).double()
    series = [drawn(2, 20, 6).double()]
    for _ in range(10):
        series.append(a @ series[-1] @ b)
    left, right = autoregression(series[:-1], 1e-6, 50)
    miss = (left @ series[-2] @ right - series[-1]).norm()
    assert float(miss) < 0.05 * float((series[-1] - series[-2]).norm())


def test_one_matrix_forecasts_itself() -> None:
    series = [drawn(0, 7, 3).double()]
    left, right = autoregression(series, 0.1, 10)
    assert torch.equal(left @ series[0] @ right, series[0])


def test_clients_that_come_and_go_are_no_trouble_to_those_that_remember() -> None:
    rules = [*SCREENS, FoolsGold(), FLDetector(FLANDERS(Mean(), num_kept=2), window=2)]
    for rule in rules:
        cell: dict[str, Any] = {}
        for t, cohort in enumerate(
            [(0, 1, 2, 3, 4, 5), (1, 3, 5, 7, 8, 9), (0, 1, 2, 7, 8, 9)] * 2
        ):
            step, _ = said(rule, drawn(t, 6, SIZE), cell=cell, cohort=cohort, seed=t)
            assert bool(step.isfinite().all())


# CRFL.


def test_the_model_is_clipped_and_then_noisy() -> None:
    rule, before = CRFL(Mean(), max_norm=2.0, growth=0.1, sigma=0.0), drawn(1, SIZE)
    cell: dict[str, Any] = {}
    for t in (1, 2, 3):
        step, _ = said(rule, 1e3 * drawn(0, 4, SIZE), before=before, cell=cell)
        assert float((before + step).norm()) == pytest.approx(2 + 0.1 * t, rel=1e-4)
    small = 0.01 * drawn(1, SIZE)
    step, _ = said(CRFL(Mean(), sigma=0.0), 0.01 * drawn(0, 4, SIZE), before=small)
    torch.testing.assert_close(step, 0.01 * drawn(0, 4, SIZE).mean(dim=0))


def test_the_last_round_has_no_noise() -> None:
    rule, cell = planned(CRFL(Mean(), sigma=1.0), Plan(2, (1,))), dict[str, Any]()
    assert rule.num_rounds == 2
    first, _ = said(rule, torch.zeros(3, SIZE), before=torch.zeros(SIZE), cell=cell)
    last, _ = said(rule, torch.zeros(3, SIZE), before=torch.zeros(SIZE), cell=cell)
    assert float(first.std()) > 0.5 and not bool(last.any())


def test_the_certified_radius_is_worked_out_by_hand() -> None:
    traitor = Backdoored(weight=0.05, boost=100.0, num_steps=2, lr=0.001, poisoned_fraction=0.1)
    assert traitor.reach == pytest.approx(0.001)
    found = certified_radius(
        0.9, 0.1, [traitor, traitor], sigma=0.01, lipschitz=sqrt(257), later_norms=(0.02, 0.03)
    )
    shrink = (2 * NormalDist().cdf(2) - 1) * (2 * NormalDist().cdf(3) - 1)
    gap = 0.9 + 0.1 - 2 * sqrt(0.09)  # 0.4
    assert gap == pytest.approx(0.4)
    top = -math.log(0.6) * 0.01**2
    assert found == pytest.approx(sqrt(top / (2 * 2 * 257 * 2e-6 * shrink)), rel=1e-9)
    assert found == pytest.approx(0.16161, rel=1e-3)
    assert logistic_lipschitz(15.0) == sqrt(257)


def test_a_certificate_grows_with_the_vote_and_shrinks_with_the_attack() -> None:
    def radius(top: float = 0.9, boost: float = 10.0, later: int = 3, sigma: float = 0.01) -> float:
        traitor = Backdoored(0.05, boost, 5, 0.01, 0.2)
        return certified_radius(
            top, 1 - top, [traitor], sigma=sigma, lipschitz=2.0, later_norms=(0.01,) * later
        )

    assert radius(top=0.95) > radius() > radius(boost=20.0) > 0
    assert radius(later=4) > radius() and radius(sigma=0.02) > radius()
    assert radius(top=0.5) == 0 and radius(top=0.4) == 0
    assert radius(boost=20.0) == pytest.approx(radius() / 2)


def test_votes_are_bounded_by_hoeffding() -> None:
    top, runner_up = vote_bounds(torch.tensor([900, 60, 40]), alpha=0.003)
    slack = sqrt(log(1000) / 2000)
    assert top == pytest.approx(0.9 - slack) and runner_up == pytest.approx(0.06 + slack)


def test_a_vote_is_the_same_each_time_and_that_of_the_copies() -> None:
    params = SMALL.initial(RANDOM.at("i"))
    view = SmoothedVote(0.5, 50)(SMALL, params, rng=RANDOM.at("release"))
    inputs = PUBLIC[0]
    assert torch.equal(view.scores(inputs), view.scores(inputs))
    shares = view.scores(inputs).exp()
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(40))
    assert bool((shares.max(dim=1).values < 1).any())
    sure = SmoothedVote(1e-9, 5)(SMALL, params, rng=RANDOM.at("release")).scores(inputs)
    assert torch.equal(sure.argmax(dim=1), SMALL.logits(params, inputs).argmax(dim=1))


# A small federation on digits: what each stops, and who gets past it.


@cache
def handwriting(dirichlet: float | None = None) -> Task:
    partition = IID() if dirichlet is None else Dirichlet(dirichlet)
    return digits(12, model=MLP((32,)), partition=partition)


Attack = Callable[[int, Tensor, int], Tensor]  # (round, payloads, num_traitors) -> payloads


def turned(round: int, sent: Tensor, f: int) -> Tensor:
    return torch.cat([-5 * sent[:f], sent[f:]])


def noise(round: int, sent: Tensor, f: int) -> Tensor:
    noisy = torch.randn(f, sent.shape[1], generator=RANDOM.at("noise", round))
    return torch.cat([noisy, sent[f:]])


def little(round: int, sent: Tensor, f: int) -> Tensor:
    honest = sent[f:]
    return torch.cat([(honest.mean(dim=0) - 1.5 * honest.std(dim=0)).repeat(f, 1), honest])


def silent(round: int, sent: Tensor, f: int) -> Tensor:
    return sent


def played(
    rule: Any,
    attack: Attack,
    *,
    num_rounds: int = 8,
    f: int = 3,
    lies: bool = False,
    dirichlet: float | None = None,
) -> tuple[float, Tensor, Caught]:
    """Return accuracy, the confusion of ones with sevens and with ones, and who was caught.

    ``lies``: the first f clients call their ones sevens.
    """
    task, cell, caught = handwriting(dirichlet), dict[str, Any](), Caught()
    model, params = task.model, task.model.initial(RANDOM.at("first"))
    for t in range(num_rounds):
        sent = []
        for c, (inputs, labels) in enumerate(task.clients):
            seen = torch.where(labels == 1, 7, labels) if lies and c < f else labels
            rng = RANDOM.at("train", t, c)
            sent.append(call(TRAIN, model, params, (inputs, seen), rng=rng).delta)
        verdict = Verdict()
        step = call(
            rule,
            updates(attack(t, torch.stack(sent), f)),
            rng=RANDOM.at("rule", t),
            memory=Memory(cell),
            model=model,
            before=params,
            cohort=tuple(range(len(sent))),
            public=task.public,
            verdict=verdict,
        )
        params = params + step
        false = set(range(f)) if lies or attack is not silent else set()
        caught += Caught.of(verdict.flagged, false, len(sent))
    labels, guess = task.test[1], model.logits(params, task.test[0]).argmax(dim=1)
    ones = guess[labels == 1]
    confusion = torch.stack([(ones == 7).float().mean(), (ones == 1).float().mean()])
    return float((guess == labels).float().mean()), confusion, caught


def precision(caught: Caught) -> float:
    return caught.hits / max(caught.hits + caught.false_alarms, 1)


def recall(caught: Caught) -> float:
    return caught.hits / max(caught.hits + caught.misses, 1)


def test_the_mean_falls_to_these_attacks() -> None:
    assert played(Mean(), silent)[0] > 0.85
    assert played(Mean(), turned)[0] < 0.4
    assert played(Mean(), noise)[0] < 0.75


@pytest.mark.parametrize(
    "rule",
    [
        CentredClipping(0.5, 3),
        DnC(3),
        MDA(3),
        MoNNA(3),
        FLTrust(TRAIN),
        FLAME(),
        FLAME(compare="updates"),
        SignGuard(),
        NormTest(Mean()),
        CosineTest(Mean()),
        SparseFed(fraction_kept=0.3, max_norm=1.0),
        WeakDP(Mean(), max_norm=0.7, sigma=0.002),
        NormBound(RobustLR(4, Mean()), ratio=1.0),
        FLANDERS(Mean(), num_kept=9),
        CRFL(NormBound(Mean(), ratio=1.0), max_norm=10.0, sigma=0.002),
    ],
    ids=named,
)
def test_a_turned_and_boosted_update_is_survived(rule: Any) -> None:
    assert played(rule, turned)[0] > 0.75
    assert played(rule, silent)[0] > 0.75  # the price without attackers


@pytest.mark.parametrize(
    ("rule", "attack"),
    [
        (DnC(3), turned),
        (DnC(3), little),
        (MDA(3), turned),
        (MDA(3), little),
        (MoNNA(3), noise),
        (SignGuard(), noise),
        (NormTest(Mean()), turned),
        (FLANDERS(Mean(), num_kept=9), turned),
        (FLANDERS(Mean(), num_kept=9), noise),
    ],
    ids=lambda part: getattr(part, "__name__", str(part)),
)
def test_easy_traitors_are_flagged_and_few_others(rule: Any, attack: Attack) -> None:
    caught = played(rule, attack, num_rounds=12)[2]
    assert precision(caught) > 0.9 and recall(caught) > 0.9


def test_label_flippers_stand_apart_in_the_plane() -> None:
    rule = UpdatePCA(Mean(), source=1, first_round=5, window=3)
    _, confusion, heard = played(Mean(), silent, lies=True, num_rounds=12)
    _, better, found = played(rule, silent, lies=True, num_rounds=12)
    assert precision(found) > 0.9 and found.hits >= 0.9 * 3 * 7  # of three, in seven rounds
    assert float(better[1]) >= float(confusion[1]) and not heard.hits
    assert played(rule, silent)[2] == Caught(passed=12 * 8)  # nobody, where nobody lies
    blind = UpdatePCA(Mean(), source=4, first_round=5)  # it looks where nothing happens
    assert recall(played(blind, silent, lies=True, num_rounds=9)[2]) < 0.5


def test_the_inconsistent_are_detected_and_the_steady_pass() -> None:
    rule = FLDetector(Mean(), window=3)

    def late(round: int, sent: Tensor, f: int) -> Tensor:
        return turned(round, sent, f) if round >= 5 else sent

    _, _, caught = played(rule, late, num_rounds=12)
    assert precision(caught) > 0.9 and caught.hits >= 0.9 * 3 * 6
    assert not played(rule, silent, num_rounds=10)[2].false_alarms
    steady = played(rule, silent, lies=True, num_rounds=12)[2]  # one lie, told every round alike
    assert recall(steady) < 0.5


def test_one_who_knows_the_spread_gets_past_tests_of_length_and_angle() -> None:
    for rule in (NormTest(Mean()), CosineTest(Mean()), FLANDERS(Mean(), num_kept=9)):
        assert recall(played(rule, little)[2]) < 0.5


def test_puppets_of_one_lie_lose_their_weight() -> None:
    def alike(round: int, sent: Tensor, f: int) -> Tensor:
        return torch.cat([sent[:1].repeat(f, 1), sent[f:]])

    heard = played(Mean(), alike, f=4, lies=True, dirichlet=0.5, num_rounds=12)[1]
    _, unheard, caught = played(FoolsGold(), alike, f=4, lies=True, dirichlet=0.5, num_rounds=12)
    assert recall(caught) > 0.9 and float(unheard[0]) <= float(heard[0])
    alone = played(FoolsGold("all"), silent, f=1, lies=True, dirichlet=0.5, num_rounds=12)[2]
    assert recall(alone) < 0.1  # nobody is like a single attacker


def test_defences_run_in_a_federation_and_the_log_says_whom_they_caught() -> None:
    coalition = Coalition[Any](members=Clients((0, 1)), forge=SignFlip(5.0))
    task = digits(8, model=MLP((16,)), per_client=40)
    train = LocalSGD(0.3, 3, 10)
    for rule in (DnC(2), NormTest(FLDetector(Mean(), window=1)), FLTrust(train)):
        federation = Federation(train=train, channel=Plain(), aggregate=rule)
        run = simulate(federation, task, num_rounds=3, seed=0, coalition=coalition)
        caught = sum((p.clients for p in run.log if p.clients is not None), Caught())
        assert recall(caught) > 0.8


def test_the_smoothed_model_is_released_and_certified_by_its_votes() -> None:
    aggregate, release = CRFL(Mean(), max_norm=10.0, sigma=0.02), SmoothedVote(0.02, 60)
    federation = Federation(
        train=LocalSGD(0.3, 5, 10), channel=Plain(), aggregate=aggregate, release=release
    )
    task = digits(8, model=MLP(()), per_client=40)
    run = simulate(federation, task, num_rounds=4, seed=0)
    params, (inputs, labels) = run.state.params, (task.test[0][:40], task.test[1][:40])
    votes = release.votes(task.model, params, inputs, RANDOM.at("votes"))
    assert float((votes.argmax(dim=1) == labels).float().mean()) > 0.6
    traitor = Backdoored(1 / 8, 1.0, 2, 0.3, 0.1)
    radii = [
        certified_radius(
            *vote_bounds(row, 0.01), [traitor], sigma=0.02, lipschitz=10.0, later_norms=(10.0,)
        )
        for row in votes
    ]
    assert max(radii) > 0 and min(radii) == 0  # some are sure, and some abstain


def test_what_needs_senders_cannot_stand_where_there_are_none() -> None:
    with pytest.raises(IncompatibleStages, match=r"FLTrust\(root=.* has none to give"):
        Federation(train=LocalSGD(0.1), channel=Plain(), aggregate=FLTrust(AsksForItsEnvelope(0.1)))


class AsksForItsEnvelope(LocalSGD):
    def __call__(  # type: ignore[override]
        self, model: Model, start: Tensor, data: Any, *, rng: Any, envelope: Any
    ) -> Update:
        return super().__call__(model, start, data, rng=rng)


assert Layout.of(Small()).num_params == SIZE

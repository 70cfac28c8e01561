"""Metrics. Kinds: oracle (scikit-learn, scikit-image, scipy, slow twins), theorem, golden."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import stats
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor

from turncoat.metrics.images import (
    MAX_PSNR,
    feature_distance,
    features,
    match,
    mse,
    psnr,
    ssim,
)
from turncoat.metrics.intervals import (
    clopper_pearson,
    of_difference,
    of_mean,
    of_paired_shares,
    wilson,
)
from turncoat.metrics.ranking import ROC, auc, delong, tpr_interval

SCORES = st.lists(st.integers(-5, 5), min_size=1, max_size=40)


def groups(ins: list[int], outs: list[int]) -> tuple[Tensor, Tensor]:
    return torch.tensor(ins, dtype=torch.float64), torch.tensor(outs, dtype=torch.float64)


@given(SCORES, SCORES)
def test_roc_and_auc_are_those_of_scikit_learn(ins: list[int], outs: list[int]) -> None:
    a, b = groups(ins, outs)
    truth, scores = [1] * len(ins) + [0] * len(outs), ins + outs
    fpr, tpr, _ = roc_curve(truth, scores, drop_intermediate=False)
    roc = ROC.of(a, b)
    np.testing.assert_allclose(roc.fpr, fpr, rtol=0, atol=1e-12)
    np.testing.assert_allclose(roc.tpr, tpr, rtol=0, atol=1e-12)
    assert abs(auc(a, b) - roc_auc_score(truth, scores)) < 1e-12


@given(SCORES, SCORES, st.floats(0, 1))
@example(ins=[0], outs=[0], bound=5e-324)
def test_tpr_at_a_given_fpr_is_that_of_the_best_threshold_allowed(
    ins: list[int], outs: list[int], bound: float
) -> None:
    a, b = groups(ins, outs)
    if 0 < bound * len(outs) < 1:
        with pytest.raises(ValueError, match=f"there are {len(outs)}: take more"):
            ROC.of(a, b).tpr_at(bound)
        return
    reached = [
        float((a >= t).double().mean())
        for t in [*ins, *outs, 99]
        if float((b >= t).double().mean()) <= bound
    ]
    assert ROC.of(a, b).tpr_at(bound) == pytest.approx(max(reached), abs=1e-12)


def test_scores_that_all_tie_are_worth_nothing_at_the_left_edge() -> None:
    ins, outs = torch.zeros(50), torch.zeros(200)
    assert auc(ins, outs) == 0.5
    assert ROC.of(ins, outs).tpr_at(0.01) == 0.0


@given(SCORES.filter(lambda s: len(s) > 1), SCORES.filter(lambda s: len(s) > 1))
def test_delong_by_ranks_equals_delong_by_pairs(ins: list[int], outs: list[int]) -> None:
    a, b = groups(ins, outs)
    wins = (a[:, None] > b).double() + 0.5 * (a[:, None] == b).double()
    area = float(wins.mean())
    if 0 < area < 1:
        variance = wins.mean(dim=1).var() / len(a) + wins.mean(dim=0).var() / len(b)
        half = 1.959963984540054 * float(variance) ** 0.5
        low, high = delong(a, b)
        assert low == pytest.approx(max(0.0, area - half), abs=1e-12)
        assert high == pytest.approx(min(1.0, area + half), abs=1e-12)


def test_a_perfect_ranking_of_few_is_not_certain() -> None:
    low, high = delong(torch.tensor([2.0, 3.0, 4.0]), torch.tensor([0.0, 1.0]))
    assert low < 0.5 and high == 1.0


def test_delong_holds_the_truth_as_often_as_it_says() -> None:
    rng = torch.Generator().manual_seed(0)
    truth = float(stats.norm.cdf(1 / 2**0.5))
    held = 0
    for _ in range(300):
        ins, outs = torch.randn(60, generator=rng) + 1, torch.randn(60, generator=rng)
        low, high = delong(ins, outs)
        held += low <= truth <= high
    assert 0.92 <= held / 300 <= 0.98


def test_infinite_scores_rank_and_nan_is_refused() -> None:
    ins, outs = torch.tensor([torch.inf, 1.0]), torch.tensor([-torch.inf, 1.0])
    assert auc(ins, outs) == 0.875
    with pytest.raises(ValueError, match="1 of 2 scores are NaN"):
        auc(torch.tensor([torch.nan, 1.0]), outs)


@given(st.integers(1, 60).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_clopper_pearson_inverts_the_binomial(case: tuple[int, int]) -> None:
    hits, trials = case
    low, high = clopper_pearson(hits, trials)

    def at_least(k: int, p: float) -> float:
        return sum(comb(trials, i) * p**i * (1 - p) ** (trials - i) for i in range(k, trials + 1))

    assert low == 0 if hits == 0 else at_least(hits, low) == pytest.approx(0.025, abs=1e-6)
    assert (
        high == 1
        if hits == trials
        else (1 - at_least(hits + 1, high) == pytest.approx(0.025, abs=1e-6))
    )


@given(st.integers(1, 60).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_that_of_scipy(case: tuple[int, int]) -> None:
    found = stats.binomtest(*case).proportion_ci(method="wilson")
    assert wilson(*case) == pytest.approx((found.low, found.high), abs=1e-12)


def test_an_interval_of_differences_is_that_of_a_paired_t_test() -> None:
    rng = torch.Generator().manual_seed(1)
    a, b = torch.rand(9, generator=rng).double(), torch.rand(9, generator=rng).double()
    found = stats.ttest_rel(a.numpy(), b.numpy()).confidence_interval()
    assert of_difference(a, b) == pytest.approx((found.low, found.high), abs=1e-12)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_paired_shares_differ_where_mcnemars_test_says_so(
    pairs: list[tuple[bool, bool]],
) -> None:
    first, second = torch.tensor(pairs).T
    low, high = of_paired_shares(first, second)
    gained, lost = int((first & ~second).sum()), int((second & ~first).sum())
    p = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert (low > 0 or high < 0) is bool(p < 0.05)
    assert low - 1e-12 <= (gained - lost) / len(pairs) <= high + 1e-12
    assert of_paired_shares(second, first) == pytest.approx((-high, -low), abs=1e-12)


def test_paired_shares_need_the_same_trials() -> None:
    with pytest.raises(ValueError, match=r"pairs trials; there are \(2,\) and \(3,\)"):
        of_paired_shares(torch.ones(2).bool(), torch.ones(3).bool())


def test_one_value_has_no_interval() -> None:
    assert of_mean(torch.tensor([3.0])) == (3.0, 3.0)


def test_a_share_needs_trials() -> None:
    for interval in (clopper_pearson, wilson):
        with pytest.raises(ValueError, match="share"):
            interval(0, 0)
    assert tpr_interval(0.5, 10) == clopper_pearson(5, 10)


@pytest.mark.parametrize("side", [3, 4, 8, 28])
def test_psnr_and_ssim_are_those_of_scikit_image(side: int) -> None:
    rng = torch.Generator().manual_seed(2)
    a, b = (torch.rand(3, 3, side, side, generator=rng) for _ in range(2))
    window = {3: 3, 4: 3, 8: 7, 28: 7}[side]
    for i in range(3):
        x, y = a[i].double().numpy(), b[i].double().numpy()
        signal = peak_signal_noise_ratio(y, x, data_range=1.0)  # type: ignore[no-untyped-call]
        assert float(psnr(a, b)[i]) == pytest.approx(signal, abs=1e-9)
        alike = structural_similarity(x, y, data_range=1.0, channel_axis=0, win_size=window)  # type: ignore[no-untyped-call]
        assert float(ssim(a, b)[i]) == pytest.approx(alike)


def test_equal_images_are_as_like_as_can_be_even_if_constant() -> None:
    flat = torch.zeros(1, 1, 8, 8)
    assert float(psnr(flat, flat)) == MAX_PSNR
    assert float(ssim(flat, flat)) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="3 x 3"):
        ssim(torch.zeros(1, 1, 2, 8), torch.zeros(1, 1, 2, 8))


@given(st.permutations(range(6)), st.integers(1, 6))
def test_matching_undoes_any_shuffle(order: list[int], kept: int) -> None:
    originals = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    rows, columns = match(originals[order[:kept]] + 0.01, originals)
    assert rows.tolist() == list(range(kept))
    assert columns.tolist() == order[:kept]


def test_mse_is_what_psnr_is_the_logarithm_of() -> None:
    a, b = torch.rand(2, 5, 3, 8, 8).unbind()
    np.testing.assert_allclose(mse(a, b), ((a - b) ** 2).mean(dim=(1, 2, 3)), rtol=1e-5)
    torch.testing.assert_close(psnr(a, b), -10 * mse(a, b).log10())


@pytest.mark.parametrize("shape", [(1, 4, 4), (1, 8, 8), (3, 32, 32), (2, 28, 9)])
def test_features_see_edges_and_not_how_bright_they_are(shape: tuple[int, ...]) -> None:
    images = torch.rand(4, *shape, generator=torch.Generator().manual_seed(0))
    found = features(images)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(4, dtype=torch.float64))
    assert float(feature_distance(images, images * 0.5 + 0.2).max()) < 1e-3
    others = feature_distance(images, images.roll(1, 0))
    assert bool((others > 0.01).all()) and bool((others <= 1).all())
    flat = torch.full((4, *shape), 0.5)
    assert float(features(flat).abs().sum()) == 0
    np.testing.assert_allclose(feature_distance(images, flat), 0.5)


def test_features_of_images_too_small_are_refused() -> None:
    with pytest.raises(ValueError, match="4 x 4 pixels at least; a side has 3"):
        features(torch.zeros(1, 1, 3, 9))

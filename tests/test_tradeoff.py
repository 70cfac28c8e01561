"""Bounds on error rates from differential privacy. Kinds: oracle, theorem."""

from __future__ import annotations

import dp_accounting
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from turncoat.metrics.tradeoff import advantage_limit, tpr_limit
from turncoat.stages.train.dpsgd import DPSGD


@pytest.mark.parametrize("mu", [0.1, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("fpr", [1e-3, 0.01, 0.3, 0.9])
def test_the_limit_of_a_gaussian_is_its_closed_form(mu: float, fpr: float) -> None:
    """Dong, Roth and Su, eq. (6): the trade-off of N(0, 1) against N(mu, 1)."""
    exact = float(norm.cdf(norm.ppf(fpr) + mu))
    found = tpr_limit(dp_accounting.GaussianDpEvent(1 / mu), fpr)
    assert exact - 1e-9 <= found <= exact + 2e-3


def test_the_best_test_between_gaussians_reaches_the_limit_and_does_not_pass_it() -> None:
    """Sixteen looks at noise of 4 are one at noise of 1: the likelihood ratio is the sum."""
    rng = np.random.default_rng(0)
    event = dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(4.0), 16)
    ins = rng.normal(1.0, 4.0, (40_000, 16)).sum(axis=1)
    outs = rng.normal(0.0, 4.0, (40_000, 16)).sum(axis=1)
    reached = float((ins > np.quantile(outs, 0.99)).mean())
    assert abs(reached - tpr_limit(event, 0.01)) < 0.012  # four standard errors of both


def test_the_limit_of_a_sampled_mechanism_holds_for_its_own_likelihood_ratio() -> None:
    """One step at rate q: in, the output is a mixture, whose likelihood ratio rises with it."""
    rate, sigma, fpr = 0.1, 0.7, 0.01
    cut = float(norm.ppf(1 - fpr)) * sigma
    exact = rate * float(norm.sf((cut - 1) / sigma)) + (1 - rate) * fpr
    event = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(sigma))
    assert exact <= tpr_limit(event, fpr) <= 1.3 * exact  # the limit holds for removal too


@settings(max_examples=8, deadline=None)
@given(sigma=st.floats(0.4, 20), fpr=st.floats(1e-4, 1))
def test_the_limit_lies_between_chance_and_one(sigma: float, fpr: float) -> None:
    event = dp_accounting.GaussianDpEvent(sigma)
    assert fpr - 1e-9 <= tpr_limit(event, fpr) <= 1
    assert tpr_limit(event, fpr) - fpr <= advantage_limit(event) + 1e-6


def test_without_noise_nothing_is_bounded() -> None:
    event = DPSGD(0.1, 1.0, 10, noise_multiplier=0.0).event(100)
    assert (tpr_limit(event, 0.01), advantage_limit(event)) == (1.0, 1.0)


def test_a_rate_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="lies between 0 and 1; it is 5"):
        tpr_limit(dp_accounting.GaussianDpEvent(1.0), 5)

"""Lower bounds on epsilon, against what their papers publish and what simulation finds.

Kinds: oracle (two published cases; SciPy's intervals), theorem (hypothesis: more right guesses
prove no less; no bound exceeds the truth in more than 5 % of runs), sabotage (the term for delta
left out).
"""

from __future__ import annotations

from math import log

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, binomtest, norm

from turncoat.metrics.auditing import (
    epsilon_of_mu,
    epsilon_of_rates,
    mu_of_rates,
    one_run_epsilon,
)


def test_both_published_cases_of_one_run_come_out() -> None:
    assert one_run_epsilon(1000, 100, 75, delta=1e-4) == pytest.approx(0.673, abs=5e-4)
    found = one_run_epsilon(100_000, 1510, 1439, delta=1e-5)
    assert found == pytest.approx(2.675, abs=1e-3)


def test_the_term_for_delta_counts() -> None:
    with_it = one_run_epsilon(100_000, 1510, 1439, delta=1e-5)
    assert one_run_epsilon(100_000, 1510, 1439) > with_it + 0.01


@given(st.integers(1, 300), st.data())
def test_more_right_guesses_prove_no_less(num_guesses: int, data: st.DataObject) -> None:
    right = data.draw(st.integers(0, num_guesses - 1))
    delta = data.draw(st.sampled_from([0.0, 1e-5, 1e-3]))
    fewer = one_run_epsilon(500, num_guesses, right, delta=delta)
    assert one_run_epsilon(500, num_guesses, right + 1, delta=delta) >= fewer - 1e-9


def test_guesses_by_chance_prove_nothing_and_none_neither() -> None:
    assert one_run_epsilon(100, 100, 50) == 0
    assert one_run_epsilon(100, 0, 0) == 0
    with pytest.raises(ValueError, match="guess each canary once"):
        one_run_epsilon(10, 11, 5)


@pytest.mark.parametrize("truth", [0.5, 1.0, 3.0])
def test_randomised_response_is_overestimated_in_at_most_one_run_in_twenty(truth: float) -> None:
    q = 1 / (1 + np.exp(-truth))
    right = np.random.default_rng(0).binomial(200, q, size=400)
    bound = {int(v): one_run_epsilon(200, 200, int(v)) for v in np.unique(right)}
    wrong = sum(bound[int(v)] > truth for v in right)
    assert wrong <= binom.ppf(0.999, 400, 0.05)
    assert np.mean([bound[int(v)] for v in right]) > truth / 2


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
def test_rates_of_a_gaussian_mechanism_stay_below_its_epsilon(sigma: float) -> None:
    delta, rng, wrong, sharper = 1e-5, np.random.default_rng(1), 0, []
    truth = epsilon_of_mu(1 / sigma, delta)
    for _ in range(200):
        ins, outs = rng.normal(1, sigma, 500), rng.normal(0, sigma, 500)
        threshold = 0.5 + sigma  # chosen beforehand
        rates = int((ins > threshold).sum()), 500, int((outs > threshold).sum()), 500
        wrong += epsilon_of_rates(*rates, delta=delta) > truth
        mu = mu_of_rates(*rates)
        sharper.append(mu <= 1 / sigma)
    assert wrong <= binom.ppf(0.999, 200, 0.05)
    assert 200 - sum(sharper) <= binom.ppf(0.999, 200, 0.05)


def test_the_rates_bound_is_a_logarithm_of_two_exact_limits() -> None:
    low = binomtest(90, 100).proportion_ci(0.975, method="exact").low
    high = binomtest(5, 100).proportion_ci(0.975, method="exact").high
    misses = binomtest(90, 100).proportion_ci(0.975, method="exact").low
    expected = max(log(low / high), log((1 - high) / (1 - misses)))
    assert epsilon_of_rates(90, 100, 5, 100) == pytest.approx(expected, abs=1e-9)
    assert epsilon_of_rates(5, 100, 90, 100) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("mu", [0.3, 1.0, 4.0])
def test_the_epsilon_of_mu_solves_its_equation(mu: float) -> None:
    epsilon = epsilon_of_mu(mu, 1e-5)
    left = norm.cdf(-epsilon / mu + mu / 2) - np.exp(epsilon) * norm.cdf(-epsilon / mu - mu / 2)
    assert left == pytest.approx(1e-5, rel=1e-4)

"""What an attack proves about privacy: lower bounds on epsilon, each at a stated confidence."""

from __future__ import annotations

from math import exp, log

import numpy as np
from scipy.optimize import brentq
from scipy.stats import binom, norm

from turncoat.metrics.intervals import clopper_pearson

_MOST = 60.0  # an epsilon that no number of guesses here can reach


def one_run_epsilon(
    num_canaries: int,
    num_guesses: int,
    num_right: int,
    *,
    delta: float = 0.0,
    confidence: float = 0.95,
) -> float:
    """Return the largest epsilon that guesses about one training run refute [1]_.

    Every canary was put in or left out by a fair coin. Whoever saw the outcome may abstain; of
    ``num_guesses`` about it ``num_right`` were right. With probability ``confidence`` or more the
    training is no (epsilon, ``delta``)-private for any epsilon below what is returned.

    >>> round(one_run_epsilon(1000, 100, 75, delta=1e-4), 3)
    0.673

    Raises:
        ValueError: If there are more right guesses than guesses, or more of these than canaries.

    .. [1] Steinke, Nasr and Jagielski, NeurIPS 2023, theorem 5.2 and appendix D.
       https://arxiv.org/abs/2305.08846
    """
    if not 0 <= num_right <= num_guesses <= num_canaries:
        raise ValueError(
            f"{num_right} right of {num_guesses} guesses about {num_canaries} canaries: guess each "
            "canary once at most, and be right no more often than you guess"
        )
    level = 1 - confidence

    def spare(epsilon: float) -> float:
        return _p_value(num_canaries, num_guesses, num_right, epsilon, delta) - level

    if num_guesses == 0 or spare(0.0) >= 0:
        return 0.0
    return _MOST if spare(_MOST) < 0 else float(brentq(spare, 0.0, _MOST, xtol=1e-9))


def _p_value(m: int, r: int, v: int, epsilon: float, delta: float) -> float:
    """Return how likely ``v`` or more of ``r`` guesses are right, were epsilon what it says."""
    q = 1 / (1 + exp(-epsilon))
    beta = float(binom.sf(v - 1, r, q))
    if delta == 0:
        return beta
    i = np.arange(1, v + 1)
    between = binom.sf(v - i - 1, r, q) - beta  # at least v - i, and fewer than v
    return min(1.0, beta + 2 * m * delta * float((between / i).max(initial=0.0)))


def epsilon_of_rates(
    num_hits: int,
    num_ins: int,
    num_false: int,
    num_outs: int,
    *,
    delta: float = 0.0,
    confidence: float = 0.95,
) -> float:
    """Return a lower bound on epsilon from how often an attack said "in" of both kinds [1]_.

    ``TPR <= e^epsilon FPR + delta``, and the same of the misses: the bound is where the limits of
    both rates (Clopper-Pearson, all four together at ``confidence``) contradict it. The threshold
    must have been chosen without these runs.

    >>> epsilon_of_rates(50, 100, 50, 100)
    0.0

    .. [1] Jagielski, Ullman and Oprea, NeurIPS 2020, section 4.1. https://arxiv.org/abs/2006.07709
    """
    level = (1 + confidence) / 2
    low_tpr, high_tpr = clopper_pearson(num_hits, num_ins, level)
    low_fpr, high_fpr = clopper_pearson(num_false, num_outs, level)
    ratios = (
        (low_tpr - delta, high_fpr),
        (1 - high_fpr - delta, 1 - low_tpr),
        (low_fpr - delta, high_tpr),  # an attack that errs reliably knows as much
        (1 - high_tpr - delta, 1 - low_fpr),
    )
    return max([0.0, *(log(a / b) for a, b in ratios if a > 0 and b > 0)])


def mu_of_rates(
    num_hits: int, num_ins: int, num_false: int, num_outs: int, *, confidence: float = 0.95
) -> float:
    """Return a lower bound on ``mu`` of Gaussian differential privacy, by the same rates [1]_.

    Sharper where the mechanism *is* Gaussian, and no bound where it is not.

    .. [1] Nasr et al., USENIX Security 2023, section 3. https://arxiv.org/abs/2302.07956
    """
    low_tpr, _ = clopper_pearson(num_hits, num_ins, confidence)
    _, high_fpr = clopper_pearson(num_false, num_outs, confidence)
    if low_tpr <= 0 or high_fpr >= 1:
        return 0.0
    return max(0.0, float(norm.ppf(low_tpr) - norm.ppf(high_fpr)))


def epsilon_of_mu(mu: float, delta: float) -> float:
    """Return the epsilon at ``delta`` of a ``mu``-Gaussian mechanism [1]_: of a bound, a bound.

    .. [1] Dong, Roth and Su, JRSS-B 2022, corollary 2.13. https://arxiv.org/abs/1905.02383
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta must lie between 0 and 1; it is {delta}")

    def excess(epsilon: float) -> float:
        held = norm.cdf(-epsilon / mu + mu / 2)
        return float(held - exp(epsilon + norm.logcdf(-epsilon / mu - mu / 2))) - delta

    if mu <= 0 or excess(0.0) <= 0:
        return 0.0
    most = 1.0
    while excess(most) > 0:
        most *= 2
    return float(brentq(excess, 0.0, most, xtol=1e-9))

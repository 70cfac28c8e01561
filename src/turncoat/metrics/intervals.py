"""Intervals: of a share, of a mean, of the mean difference of pairs. All two-sided."""

from __future__ import annotations

from math import sqrt
from statistics import NormalDist

from scipy import stats
from torch import Tensor

from turncoat.validate import at_least

Interval = tuple[float, float]


def clopper_pearson(hits: float, trials: int, level: float = 0.95) -> Interval:
    """Return the exact interval of a share: it holds the truth at least as often as it says [1]_.

    >>> low, high = clopper_pearson(0, 10)
    >>> f"{low:.3f} {high:.3f}"
    '0.000 0.308'

    .. [1] Clopper and Pearson, Biometrika 1934. https://doi.org/10.1093/biomet/26.4.404
    """
    _check(hits, trials)
    tail = (1 - level) / 2
    low = 0.0 if hits == 0 else float(stats.beta.ppf(tail, hits, trials - hits + 1))
    high = 1.0 if hits == trials else float(stats.beta.ppf(1 - tail, hits + 1, trials - hits))
    return low, high


def wilson(hits: float, trials: int, level: float = 0.95) -> Interval:
    """Return the score interval of a share; conservative if trials score between 0 and 1 [1]_.

    >>> low, high = wilson(95, 100)
    >>> f"{low:.3f} {high:.3f}"
    '0.888 0.978'

    .. [1] Wilson, JASA 1927. https://doi.org/10.1080/01621459.1927.10502953
    """
    _check(hits, trials)
    z = NormalDist().inv_cdf(0.5 + level / 2)
    share, spread = hits / trials, z * z / trials
    middle = (share + spread / 2) / (1 + spread)
    half = z * sqrt(share * (1 - share) / trials + spread / (4 * trials)) / (1 + spread)
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))


def of_mean(values: Tensor, level: float = 0.95) -> Interval:
    """Return Student's interval of a mean; of a single value, that value twice.

    A single value has no interval: whoever reads one must be told that there was one.
    """
    sample = values.detach().double().flatten()
    at_least(1, "of_mean", num_values=sample.numel())
    mean, count = float(sample.mean()), sample.numel()
    if count == 1:
        return mean, mean
    quantile = float(stats.t.ppf(0.5 + level / 2, count - 1))
    half = quantile * float(sample.std()) / sqrt(count)
    return mean - half, mean + half


def of_difference(first: Tensor, second: Tensor, level: float = 0.95) -> Interval:
    """Return Student's interval of the mean of ``first - second``, taken pair by pair.

    >>> from torch import tensor
    >>> low, high = of_difference(tensor([2.0, 3.0, 5.0]), tensor([1.0, 1.0, 2.0]))
    >>> f"{low:.2f} {high:.2f}"
    '-0.48 4.48'
    """
    if first.shape != second.shape:
        raise ValueError(
            f"of_difference pairs values; there are {tuple(first.shape)} and {tuple(second.shape)}"
        )
    return of_mean(first.double() - second.double(), level)


def of_paired_shares(first: Tensor, second: Tensor, level: float = 0.95) -> Interval:
    """Return the interval of the difference of two shares of the same trials.

    It is exact given how many trials differ, as McNemar's test is [1]_: it excludes 0 where that
    does. One more hit in a thousand is no difference.

    Args:
        first, second: Whether each trial is a hit. Shape: ``(trials,)``, bool.

    >>> from torch import tensor
    >>> low, high = of_paired_shares(tensor([True] * 8), tensor([False] * 6 + [True] * 2))
    >>> f"{low:.2f} {high:.2f}"
    '0.06 0.75'

    .. [1] McNemar, Psychometrika 1947. https://doi.org/10.1007/BF02295996
    """
    if first.shape != second.shape or not first.numel():
        raise ValueError(
            "of_paired_shares pairs trials; there are "
            f"{tuple(first.shape)} and {tuple(second.shape)}"
        )
    gained, lost = int((first & ~second).sum()), int((second & ~first).sum())
    if not (differ := gained + lost):
        return 0.0, 0.0
    low, high = clopper_pearson(gained, differ, level)
    share = differ / first.numel()
    return share * (2 * low - 1), share * (2 * high - 1)


def _check(hits: float, trials: int) -> None:
    if trials < 1 or not 0 <= hits <= trials:
        raise ValueError(f"there is no share of {hits} in {trials}: both must be counts")

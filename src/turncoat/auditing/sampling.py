"""Whether batches were drawn as the accountant was told: what no audit of epsilon can see."""

from __future__ import annotations

from collections.abc import Sequence

from scipy.stats import binomtest, chi2

from turncoat.validate import fraction


def poisson_p_value(sizes: Sequence[int], num_records: int, rate: float) -> float:
    """Return how likely batches so unlike their claim are, were each record drawn at ``rate``.

    Two tests share the level (Bonferroni): the exact binomial test of all draws together, for the
    rate, and Pearson's test of dispersion (chi-squared, two-sided), for batches of one size, which
    come of shuffling and not of Poisson sampling. At a rate of 1 the second has nothing to say.

    >>> round(poisson_p_value([100, 90, 110, 95], 1000, 0.1), 2)
    1.0
    >>> poisson_p_value([100] * 50, 1000, 0.1) < 1e-6
    True

    Args:
        sizes: How many records each batch had.

    Raises:
        ValueError: If a batch has more records than there are, or there is no batch.
    """
    fraction("poisson_p_value", rate=rate)
    if not sizes or not all(0 <= size <= num_records for size in sizes):
        raise ValueError(
            f"batches of {min(sizes, default=0)} to {max(sizes, default=0)} of {num_records} "
            "records are no samples of them: give one size for each step, one step at a time"
        )
    drawn = float(binomtest(sum(sizes), len(sizes) * num_records, rate).pvalue)
    variance = num_records * rate * (1 - rate)
    if variance == 0:
        return drawn
    squares = sum((size - num_records * rate) ** 2 for size in sizes) / variance
    spread = chi2(len(sizes))
    apart = 2 * min(float(spread.cdf(squares)), float(spread.sf(squares)))
    return min(1.0, 2 * min(drawn, apart))

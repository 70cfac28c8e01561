"""From scores of canaries to lower bounds on epsilon."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from scipy.stats import norm
from torch import Tensor

from turncoat.metrics.auditing import epsilon_of_mu, mu_of_rates, one_run_epsilon
from turncoat.validate import positive

_bound_of = lru_cache(maxsize=4096)(one_run_epsilon)
_SHARES = (0.2, 0.8)  # of the canaries that are guessed: weak leaks show at the ends alone


@dataclass(frozen=True, slots=True)
class Bound:
    """One reading of the scores, and the lower bound on epsilon that comes of it.

    Attributes:
        most: What it would be, were every guess right.
    """

    reading: str
    num_guesses: int
    num_right: int
    epsilon: float
    most: float


@dataclass(frozen=True, slots=True)
class Audited:
    """What an audit found out about training that claims (epsilon, delta).

    Attributes:
        claimed: The epsilon; None where nothing is claimed.
        confidence: With which all bounds hold together.
        gaussian_epsilon: A lower bound that holds only if the trade-off is that of a Gaussian
            mechanism, and canaries do not disturb each other: evidence, and never a guarantee.
        batch_sizes: How many examples were seen in each round; empty where that cannot be seen.
        sampling_p_value: Of the claimed sampling rate; None where none was claimed.
    """

    claimed: float | None
    delta: float
    confidence: float
    num_canaries: int
    bounds: tuple[Bound, ...]
    gaussian_epsilon: float
    batch_sizes: tuple[int, ...] = ()
    sampling_p_value: float | None = None

    @property
    def best(self) -> Bound:
        """Return the reading that proves most."""
        return max(self.bounds, key=lambda bound: bound.epsilon)

    @property
    def epsilon(self) -> float:
        """Return the lower bound on epsilon at ``delta``."""
        return self.best.epsilon

    @property
    def most(self) -> float:
        """Return the largest bound that so many canaries could have proved."""
        return max(bound.most for bound in self.bounds)

    @property
    def refuted(self) -> bool:
        """Say whether the claimed epsilon is contradicted."""
        return self.claimed is not None and self.epsilon > self.claimed

    @property
    def missampled(self) -> bool:
        """Say whether the claimed sampling rate is contradicted."""
        return self.sampling_p_value is not None and self.sampling_p_value < 1 - self.confidence

    def __str__(self) -> str:
        best = self.best
        verdict = "refuted" if self.refuted else "not refuted"
        what = f"claimed ε = {self.claimed:.3g}" if self.claimed is not None else "ε"
        text = (
            f"{what} at δ = {self.delta:.1g}: "
            f"{verdict if self.claimed is not None else 'nothing is claimed'}; at least "
            f"{self.epsilon:.3g} with {self.confidence:.0%} confidence ({best.num_right} of "
            f"{best.num_guesses} guesses right, {best.reading}, {self.num_canaries} canaries)"
        )
        if self.claimed is not None and self.most <= self.claimed:
            text += (
                f"; {self.num_canaries} canaries cannot prove more than {self.most:.3g}: take more"
            )
        if self.sampling_p_value is None:
            return text
        rate = "contradicted" if self.missampled else "not contradicted"
        return f"{text}; the sampling rate is {rate} (p = {self.sampling_p_value:.2g})"


def audited(
    scores: Tensor,
    included: Tensor,
    groups: Mapping[str, Tensor],
    *,
    claimed: float | None,
    delta: float,
    confidence: float,
) -> Audited:
    """Return what scores prove of canaries that each were included by a fair coin [1]_.

    Of each group the highest scores are guessed "in" and as many of the lowest "out", once for 20 %
    of the group and once for 80 %. What all readings together may err is divided among them.

    Args:
        scores: The higher, the likelier included. Shape: ``(canaries,)``.
        included: The truth. Shape: ``(canaries,)``, bool.
        groups: Which canaries belong to a group, by its name. Shape: ``(canaries,)``, bool each.

    Raises:
        ValueError: If scores are not finite, or what is claimed is out of range.

    .. [1] Steinke, Nasr and Jagielski, NeurIPS 2023, algorithm 1. https://arxiv.org/abs/2305.08846
    """
    check_claim(claimed, delta, confidence)
    if not bool(torch.isfinite(scores).all()):
        raise ValueError(
            "an audit needs finite scores: training diverged; lower the canaries' length or the lr"
        )
    each = 1 - (1 - confidence) / (len(groups) * len(_SHARES))
    bounds = [
        _bound(name, share, scores[group], included[group], delta, each)
        for name, group in groups.items()
        for share in _SHARES
    ]
    alone = 1 - (1 - confidence) / len(groups)
    mu = max(_mu(scores[group], included[group], alone) for group in groups.values())
    return Audited(claimed, delta, confidence, len(scores), tuple(bounds), epsilon_of_mu(mu, delta))


def check_claim(claimed: float | None, delta: float, confidence: float) -> None:
    """Refuse a claim that means nothing."""
    positive("audit", claimed=claimed)
    for name, number in (("delta", delta), ("confidence", confidence)):
        if not 0 < number < 1:
            raise ValueError(f"audit: {name} must lie between 0 and 1; it is {number}")


def _bound(
    name: str, share: float, scores: Tensor, included: Tensor, delta: float, confidence: float
) -> Bound:
    k = max(1, int(share * len(scores) / 2))
    order = scores.argsort(stable=True)
    right = int(included[order[-k:]].sum()) + int((~included[order[:k]]).sum())
    epsilon, most = (
        _bound_of(len(scores), 2 * k, hits, delta=delta, confidence=confidence)
        for hits in (right, 2 * k)
    )
    return Bound(f"{name}, {share:.0%}", 2 * k, right, epsilon, most)


def _mu(scores: Tensor, included: Tensor, confidence: float) -> float:
    """Return a lower bound on mu: one half of the canaries chooses the threshold for the other."""
    chosen, judged = ((scores[part::2], included[part::2]) for part in (0, 1))
    if not 0 < int(judged[1].sum()) < len(judged[1]):
        return 0.0
    threshold = max(_thresholds(*chosen))[1]
    ins, outs = judged[0][judged[1]], judged[0][~judged[1]]
    rates = (int((ins > threshold).sum()), len(ins), int((outs > threshold).sum()), len(outs))
    return mu_of_rates(*rates, confidence=confidence)


def _thresholds(scores: Tensor, included: Tensor) -> Iterator[tuple[float, float]]:
    """Yield an estimate of mu, and its threshold, at some quantiles."""
    ins, outs = scores[included], scores[~included]
    for quantile in (0.1, 0.25, 0.5, 0.75, 0.9):
        threshold = float(scores.quantile(quantile))
        tpr = (float((ins > threshold).sum()) + 1) / (len(ins) + 2)
        fpr = (float((outs > threshold).sum()) + 1) / (len(outs) + 2)
        yield float(norm.ppf(tpr) - norm.ppf(fpr)), threshold

"""How many trainings a search for hyper-parameters runs, and what it costs to keep the best.

Each run draws its hyper-parameters anew from a distribution that was fixed beforehand, and is
private whatever it draws. Which one is best is told by data that ε does not cover (public, or held
out), or by a score that each run computes within its own ε.

Whoever takes part sees every run: their costs add up. A user sees the best alone, which costs less
where the number of runs is drawn at random and kept secret.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, expm1, inf, log, log1p
from typing import Any, Protocol

import torch
from torch import Generator

from turncoat.validate import at_least

_TINY = 1e-9  # an exponent, below which a distribution is the logarithmic one
_NEVER = -40.0  # the logarithm of a chance that no draw here meets


class Search(Protocol):
    """The distribution of the number of runs.

    Attributes:
        bounded: Whether the number is fixed, so that those who see each run have a bound too.
    """

    bounded: bool

    @property
    def mean(self) -> float:
        """Return how many runs there are in expectation."""

    def event(self, training: Any) -> Any:
        """Return what it costs to publish the best run, of what one costs."""

    def drawn(self, rng: Generator) -> int:
        """Return how many runs to do."""

    def __str__(self) -> str:
        """Return it in words."""


@dataclass(frozen=True)
class FixedRuns:
    """A number of runs that everyone knows: they compose, for whoever sees all or the best.

    Nothing better holds in general: with a fixed number the best of k runs can cost nearly k times
    as much as one [1]_.

    .. [1] Papernot and Steinke, ICLR 2022, section 1 and appendix B.
       https://arxiv.org/abs/2110.03620
    """

    num_runs: int
    bounded = True

    def __post_init__(self) -> None:
        at_least(1, self, num_runs=self.num_runs)

    @property
    def mean(self) -> float:
        return float(self.num_runs)

    def event(self, training: Any) -> Any:
        from dp_accounting import SelfComposedDpEvent  # here, for it takes a second to import

        return SelfComposedDpEvent(training, self.num_runs)

    def drawn(self, rng: Generator) -> int:
        return self.num_runs

    def __str__(self) -> str:
        return f"{self.num_runs} runs" if self.num_runs > 1 else "1 run"


@dataclass(frozen=True)
class NegativeBinomialRuns:
    """A number of runs from the truncated negative binomial distribution: at least one [1]_.

    If a run is (λ, ε)- and (λ', ε')-Rényi private, the best of K is (λ, ε'')-Rényi private with
    ε'' = ε + (1 + eta) ((1 - 1/λ') ε' + log(1/gamma) / λ') + log E[K] / (λ - 1); the least over λ'
    is taken. ``eta`` 1 is the geometric distribution, to run again with probability 1 - gamma
    [2]_, and 0 the logarithmic one. Of pure privacy, geometric stopping costs three times ε.

    Args:
        eta: From -1 to 0, which the paper has too, dp-accounting has no cost.
        gamma: The smaller, the more runs.

    .. [1] Papernot and Steinke, ICLR 2022, definition 1 and theorem 2.
       https://arxiv.org/abs/2110.03620
    .. [2] Liu and Talwar, STOC 2019, theorem 3.2. https://arxiv.org/abs/1811.07971
    """

    eta: float
    gamma: float
    bounded = False

    def __post_init__(self) -> None:
        at_least(0, self, eta=self.eta)
        if not 0 < self.gamma < 1:
            raise ValueError(
                f"NegativeBinomialRuns: gamma must be between 0 and 1; it is {self.gamma}"
            )

    @property
    def mean(self) -> float:
        scale = -self.eta * log(self.gamma)
        return (1 / self.gamma - 1) * (self.eta / -expm1(-scale) if scale > _TINY else self._share)

    def event(self, training: Any) -> Any:
        from dp_accounting.dp_event import RepeatAndSelectDpEvent

        return RepeatAndSelectDpEvent(training, max(1.0, self.mean), self.eta)

    def drawn(self, rng: Generator) -> int:
        left = float(torch.rand(1, generator=rng, dtype=torch.float64))
        again, k = log1p(-self.gamma), 1
        scale = -self.eta * log(self.gamma)
        first = log(self.eta) - scale - log(-expm1(-scale)) if scale > _TINY else log(self._share)
        share = again + first
        while left > exp(share) and (k < self.mean or share > _NEVER):
            left -= exp(share)
            share += again + log((k + self.eta) / (k + 1))
            k += 1
        return k

    @property
    def _share(self) -> float:
        """Return the limit of ``eta / (1 - gamma ** eta)`` as ``eta`` falls to 0."""
        return -1 / log(self.gamma)

    def __str__(self) -> str:
        return (
            f"{self.mean:.3g} runs on average (negative binomial, eta = {self.eta:g}, "
            f"gamma = {self.gamma:g})"
        )


@dataclass(frozen=True)
class PoissonRuns:
    """A Poisson number of runs; with none, something is published that saw no data [1]_.

    If a run is (λ, ε)-Rényi and (ε', δ')-private with e^ε' <= 1 + 1/(λ - 1), the best is
    (λ, ε + mean δ' + log(mean) / (λ - 1))-Rényi private.

    .. [1] Papernot and Steinke, ICLR 2022, theorem 6. https://arxiv.org/abs/2110.03620
    """

    mean: float
    bounded = False

    def __post_init__(self) -> None:
        at_least(1, self, mean=self.mean)

    def event(self, training: Any) -> Any:
        from dp_accounting.dp_event import RepeatAndSelectDpEvent

        return RepeatAndSelectDpEvent(training, float(self.mean), inf)

    def drawn(self, rng: Generator) -> int:
        return int(torch.poisson(torch.tensor(self.mean, dtype=torch.float64), generator=rng))

    def __str__(self) -> str:
        return f"{self.mean:g} runs on average (Poisson)"

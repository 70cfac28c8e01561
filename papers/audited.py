"""Measures of audits: of private trainers that are right, and of such as are broken."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from typing import Any

import numpy as np
from scipy.stats import norm

from turncoat.auditing import Audited, Diracs, audit_federation, audit_trainer
from turncoat.federation import Federation, Plain, PoissonSample
from turncoat.stages.aggregate.dp_fedavg import DPFedAvg
from turncoat.stages.train.dpsgd import DPSGD, noise_for
from turncoat.stages.train.local import LocalSGD
from turncoat.testing.sabotage import (
    ClippedBatch,
    ClippedLate,
    DividedNoise,
    NeverCleared,
    NoiseForAll,
    NoiseOnHalf,
    ReusedNoise,
    WrongRate,
)

RIGHT = "DP-SGD, nothing wrong"
RIGHT_RULE = "DP-FedAvg, nothing wrong"
SLIGHT = "sampling rate 10 % too high"


@dataclass(frozen=True)
class Setting:
    """How private training is run to be audited, and with how many canaries."""

    delta: float = 1e-5
    rate: float = 0.1
    num_rounds: int = 50
    num_canaries: int = 1000
    num_others: int = 1000

    @property
    def canaries(self) -> Diracs:
        return Diracs(self.num_canaries, self.num_others)

    @property
    def num_records(self) -> int:
        return self.num_canaries + self.num_others

    def sigma(self, epsilon: float) -> float:
        return noise_for(epsilon, self.delta, self.rate, self.num_rounds)

    def audit(self, part: Any, epsilon: float, seed: int) -> Audited:
        """Audit a trainer, or a rule in a federation that samples by Poisson."""
        options: dict[str, Any] = {
            "claimed": epsilon,
            "delta": self.delta,
            "num_rounds": self.num_rounds,
            "rate": self.rate,
            "canaries": self.canaries,
            "seed": seed,
        }
        if not isinstance(part, DPFedAvg):
            return audit_trainer(part, **options)
        federation: Any = Federation(
            train=LocalSGD(0.1),
            channel=Plain(),
            aggregate=part,
            sample=PoissonSample(self.rate),
        )
        return audit_federation(federation, **options)

    def trainer(self, epsilon: float) -> DPSGD:
        expected = round(self.rate * self.num_records)
        sigma = self.sigma(epsilon)
        return DPSGD(1.0, 1.0, expected, noise_multiplier=sigma, num_steps=1)

    def rule(self, epsilon: float) -> DPFedAvg:
        expected = self.rate * (self.num_canaries / 2 + self.num_others)
        return DPFedAvg(
            max_norm=1.0, noise_multiplier=self.sigma(epsilon), expected_cohort=expected
        )


@dataclass(frozen=True)
class Sabotaged:
    """What the audit finds of each broken part, all of which claim the same epsilon.

    Figures are named by row and column. ``true`` is a lower bound by theory: of an event that a
    single record makes likelier. What has no such bound here is infinite, and is given as 99.
    """

    epsilon: float = 1.0
    setting: Setting = Setting()
    true_rate: float = 1.0
    num_micro_batches: int = 25

    def __call__(self, seed: int) -> dict[str, float | str]:
        found: dict[str, float | str] = {}
        for name, (part, true) in self.parts().items():
            began = time.perf_counter()
            run = self.setting.audit(part, self.epsilon, seed)
            seconds = time.perf_counter() - began
            assert run.sampling_p_value is not None
            found |= {
                f"audit: {name} | true, at least": min(true, 99.0),
                f"audit: {name} | lower bound": run.epsilon,
                f"audit: {name} | if Gaussian": min(run.gaussian_epsilon, 99.0),
                f"audit: {name} | p of the rate": run.sampling_p_value,
                f"audit: {name} | canaries": float(run.num_canaries),
                f"audit: {name} | seconds": seconds,
                f"reading of {name}": run.best.reading,
            }
        return found

    @property
    def names(self) -> tuple[str, ...]:
        """Return what the parts are called, in the order of `parts`."""
        return (
            RIGHT,
            "noise on half of the layers",
            "clip after the noise",
            "the same noise in every step",
            f"sampling rate {self.true_rate:g} instead of {self.setting.rate:g}",
            "clip the batch, not each example",
            "sums never cleared",
            f"noise divided among {self.num_micro_batches} micro-batches",
            SLIGHT,
            RIGHT_RULE,
            "noise not scaled by the cohort",
        )

    def parts(self) -> dict[str, tuple[Any, float]]:
        """Return each part, and what it truly spends at least."""
        s, q, n = self.setting, self.setting.rate, self.setting.num_rounds
        sigma = s.sigma(self.epsilon)
        fields: dict[str, Any] = {
            "lr": 1.0,
            "max_norm": 1.0,
            "rate": q,
            "noise_multiplier": sigma,
        }
        k, every = self.num_micro_batches, s.num_canaries // 2 + s.num_others
        rule = s.rule(self.epsilon)
        for_all = NoiseForAll(
            max_norm=1.0,
            noise_multiplier=sigma,
            expected_cohort=rule.expected_cohort,
            num_clients=every,
        )

        def true(size: Sequence[float], rate: float = q, noise: float = sigma) -> float:
            return sum_epsilon(size, rate, noise, s.delta)

        ones = [1.0] * n
        parts: list[tuple[Any, float]] = [
            (s.trainer(self.epsilon), true(ones)),
            (NoiseOnHalf(**fields), 99.0),
            (ClippedLate(**fields), true([s.canaries.length] * n)),
            (ReusedNoise(**fields), 99.0),
            (WrongRate(**fields, true_rate=self.true_rate), true(ones, self.true_rate)),
            (ClippedBatch(**fields), true([q * s.num_records] * n)),
            (NeverCleared(**fields), true([float(n - t) for t in range(n)])),
            (DividedNoise(**fields, num_micro_batches=k), true(ones, noise=sigma / k**0.5)),
            (WrongRate(**fields, true_rate=1.1 * q), true(ones, 1.1 * q)),
            (rule, true(ones)),
            (for_all, true(ones, noise=sigma * q)),
        ]
        return dict(zip(self.names, parts, strict=True))


@dataclass(frozen=True)
class Correct:
    """How often a correct trainer stays below what it claims, and how near the audit comes."""

    epsilons: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0, 8.0)
    num_runs: int = 8
    num_federations: int = 4
    setting: Setting = Setting()

    def __call__(self, seed: int) -> dict[str, float | str]:
        found: dict[str, float | str] = {}
        below, above, doubted = 0, 0, 0
        for epsilon in self.epsilons:
            for name, part, num in (
                (RIGHT, self.setting.trainer(epsilon), self.num_runs),
                (RIGHT_RULE, self.setting.rule(epsilon), self.num_federations),
            ):
                runs = [self.setting.audit(part, epsilon, 1000 * seed + i) for i in range(num)]
                bounds = [run.epsilon for run in runs]
                below += sum(not run.refuted for run in runs)
                above += sum(run.refuted for run in runs)
                doubted += sum(run.missampled for run in runs)
                kind = f"lower bound: {name} | {epsilon:g}"
                found[kind] = float(np.mean(bounds))
                found[f"largest lower bound: {name} | {epsilon:g}"] = max(bounds)
                gaussian = float(np.mean([run.gaussian_epsilon for run in runs]))
                found[f"if Gaussian: {name} | {epsilon:g}"] = gaussian
        found["share_of_runs_below_the_claim"] = below / (below + above)
        found["share_of_runs_whose_sampling_is_doubted"] = doubted / (below + above)
        return found


def sum_epsilon(sizes: Sequence[float], rate: float, noise: float, delta: float) -> float:
    """Return an epsilon at ``delta`` that is truly spent: of the event that a sum is large.

    A record adds ``sizes[t]`` to what step t releases, if it is drawn, at ``rate``; noise of that
    standard deviation is added each time. The event is that the sum over all steps exceeds c; the
    best of some c is taken.

    >>> round(sum_epsilon([1.0], 1.0, 1.0, 1e-5), 1)  # one Gaussian mechanism
    4.4
    """
    unit = max(min(sizes), max(sizes) * len(sizes) / 5000)
    chances = np.ones(1)
    for size in sizes:
        shift = int(size / unit + 1e-9)  # rounded down, which makes no event likelier
        drawn = np.concatenate([np.zeros(shift), chances]) * rate
        chances = np.pad(chances, (0, shift)) * (1 - rate) + drawn
    spread = noise * len(sizes) ** 0.5
    places = np.arange(len(chances)) * unit
    best = 0.0
    for c in np.linspace(0, places[-1] + 8 * spread, 400):
        inside = float(chances @ norm.sf((c - places) / spread))
        if inside > delta:
            best = max(best, log(inside - delta) - float(norm.logsf(c / spread)))
    return best

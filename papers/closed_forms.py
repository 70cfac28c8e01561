"""Figures that follow from a formula: no data, no randomness."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import dp_accounting
from dp_accounting.pld import PLDAccountant
from opacus.accountants import PRVAccountant

from turncoat.attacks.poisoning.alie import largest_z


@dataclass(frozen=True)
class LargestZ:
    """ALIE's z for some (clients, members)."""

    federations: tuple[tuple[int, int], ...]

    def __call__(self, seed: int) -> dict[str, float | str]:
        return {f"z_of_{n}_with_{m}": largest_z(n, m) for n, m in self.federations}


@dataclass(frozen=True)
class TwoAccountants:
    """The ε of DP-SGD, by Opacus' PRV accountant and by dp-accounting's PLD.

    Args:
        trainings: Noise multiplier, sampling rate and number of steps of each.
    """

    trainings: tuple[tuple[float, float, int], ...]
    delta: float

    def __call__(self, seed: int) -> dict[str, float | str]:
        found: dict[str, float | str] = {}
        apart = []
        for sigma, rate, steps in self.trainings:
            prv, pld = self._prv(sigma, rate, steps), self._pld(sigma, rate, steps)
            apart.append(100 * abs(prv - pld) / pld)
            name = f"sigma_{sigma:g}_rate_{rate:.4g}_steps_{steps}"
            found |= {f"prv_{name}": prv, f"pld_{name}": pld}
        return {"largest_difference_percent": max(apart), **found}

    def _prv(self, sigma: float, rate: float, steps: int) -> float:
        accountant = PRVAccountant()
        accountant.history = [(sigma, rate, steps)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return float(accountant.get_epsilon(self.delta))

    def _pld(self, sigma: float, rate: float, steps: int) -> float:
        step = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(sigma))
        whole = dp_accounting.SelfComposedDpEvent(step, steps)
        return float(PLDAccountant().compose(whole).get_epsilon(self.delta))

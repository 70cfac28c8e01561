"""What differential privacy leaves to an attacker: error rates, from the f-DP curve.

The attacker of these bounds knows the algorithm, everything it released and every record but one,
and asks whether that one was in. An attack that knows less reaches less.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from math import exp
from typing import Any

from dp_accounting import PrivacyAccountant
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from scipy.optimize import minimize_scalar

_MOST = 30.0  # an epsilon beyond which no rate is bounded by anything but 1
_FINEST = 1e-4  # step of the privacy loss; what a coarser one rounds, it rounds to the safe side
_STEPS = 5e4  # into which an epsilon is divided at most: little noise would need gigabytes
_FINE_ORDERS = (  # for what Rényi's divergence alone composes: near 1 they tell few runs from one
    1.001,
    1.01,
    *(1 + k / 10 for k in range(1, 100)),
    *range(11, 64),
    *(128, 256, 512, 1024),
)
_ORDERS = (*range(2, 33), 64, 128, 256, 512)  # of Rényi's divergence; whole ones are quick


class NotComposed(ValueError):
    """An event that no accountant here composes."""


def tpr_limit(event: Any, fpr: float) -> float:
    """Return the largest TPR at ``fpr`` of any test for one record, knowing all others.

    An (epsilon, delta)-private mechanism keeps ``TPR <= e^epsilon FPR + delta`` and
    ``1 - FPR <= e^epsilon (1 - TPR) + delta`` [1]_. Each pair of the mechanism's privacy loss
    distribution gives both; the least is taken over all [2]_.

    >>> from dp_accounting import GaussianDpEvent
    >>> round(tpr_limit(GaussianDpEvent(2.0), 0.01), 3)
    0.034

    Args:
        event: The ``DpEvent`` of the whole training, rounds composed.

    .. [1] Wasserman and Zhou, JASA 2010; Kairouz, Oh and Viswanath, ICML 2015, theorem 2.1.
       https://arxiv.org/abs/1311.0776
    .. [2] Dong, Roth and Su, JRSS-B 2022, propositions 2.4 and 2.12.
       https://arxiv.org/abs/1905.02383; Kulynych et al., NeurIPS 2024, section 3.
       https://arxiv.org/abs/2407.02191
    """
    if not 0 <= fpr <= 1:
        raise ValueError(f"a false-positive rate lies between 0 and 1; it is {fpr}")
    accountant = composed(event)

    def by_hits(epsilon: float) -> float:
        return float(exp(epsilon) * fpr + accountant.get_delta(epsilon))

    def by_misses(epsilon: float) -> float:
        return float(1 - exp(-epsilon) * (1 - fpr - accountant.get_delta(epsilon)))

    return min(1.0, _least(by_hits), _least(by_misses))


def advantage_limit(event: Any) -> float:
    """Return the largest ``TPR - FPR`` of any such test: delta at epsilon 0, the total variation.

    >>> from dp_accounting import GaussianDpEvent
    >>> round(advantage_limit(GaussianDpEvent(2.0)), 3)
    0.197
    """
    return min(1.0, float(composed(event).get_delta(0.0)))


def composed(event: Any) -> PrivacyAccountant:
    """Return the accountant of a whole training's event, for one record (or client) more or less.

    That of privacy loss distributions; of Rényi's divergence for what only the latter composes, the
    best of a random number of runs.

    Raises:
        NotComposed: If no accountant here composes the event.
    """
    return _composed(_Named(repr(event), event))


@dataclass(frozen=True)
class _Named:
    """An event by what it says of itself: those made of lists have no hash."""

    name: str
    event: Any = field(compare=False)


@lru_cache(maxsize=16)
def _composed(named: _Named) -> PrivacyAccountant:
    event = named.event
    if not PLDAccountant().supports(event):
        fine = RdpAccountant(_FINE_ORDERS)
        if not fine.supports(event):
            raise NotComposed(f"no accountant here composes {event!r}")
        return fine.compose(event)
    step, rough = _FINEST, RdpAccountant(_ORDERS)
    if rough.supports(event):
        step = max(step, min(rough.compose(event).get_epsilon(1e-5) / _STEPS, 1.0))
    accountant = PLDAccountant(value_discretization_interval=step)
    accountant.compose(event)
    return accountant


def _least(bound: Callable[[float], float]) -> float:
    """Return the least of a bound over epsilon; each of its values holds, so a coarse one does."""
    ends = min(bound(0.0), bound(_MOST))
    found = minimize_scalar(bound, bounds=(0.0, _MOST), method="bounded", options={"xatol": 1e-6})
    return min(ends, float(found.fun))

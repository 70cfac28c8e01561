"""A little is enough: a shift that hides in the spread of the honest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import torch

from turncoat.messages import Update, rows, with_rows
from turncoat.validate import at_least, one_of
from turncoat.views import CoalitionView

Convention = Literal["quantile", "probability"]


@dataclass(frozen=True)
class ALIE:
    """Shift every coordinate of the honest mean by ``z`` standard deviations [1]_. A forge.

    Mean and deviation are those of the payloads that the coalition knows: everyone else's, or its
    own. A single known payload has no spread; it is then sent as it is.

    Differs from the paper: a largest z below 0 (four clients, one a traitor) counts as 0. It is 0
    for 2 of 10 too: name a ``z`` in so small a federation.

    Args:
        z: How far, or None for ``largest_z``.
        correction: Of the deviation's denominator: 1 for a sample's, 0 for a population's.
        convention: Of ``largest_z``: the paper's, or the one of its comparison in [2]_.

    .. [1] Baruch et al., NeurIPS 2019, section 3.2 and algorithm 3.
       https://arxiv.org/abs/1902.06156
    .. [2] Shejwalkar & Houmansadr, NDSS 2021, code. https://doi.org/10.14722/ndss.2021.24498
    """

    z: float | None = None
    correction: int = 1
    convention: Convention = "quantile"

    def __post_init__(self) -> None:
        at_least(0, self, z=self.z, correction=self.correction)
        one_of(Convention, self, convention=self.convention)

    def __call__(self, view: CoalitionView[Update]) -> Sequence[Update]:
        known = rows(view.known)
        z = self.z
        if z is None:
            z = largest_z(view.num_clients, len(view.own), self.convention)
        if len(known) > self.correction:
            spread = known.std(dim=0, correction=self.correction)
        else:
            spread = torch.zeros_like(known[0])
        forged = known.mean(dim=0) - z * spread
        return with_rows(view.own, forged.expand(len(view.own), -1))


def largest_z(num_clients: int, num_members: int, convention: Convention = "quantile") -> float:
    """Return the quantile beyond which enough honest clients lie to make a majority with us.

    The code of NDSS 2021 takes the probability of the share (rounded up to hundredths) for its
    quantile, and thus runs ALIE at z = 0.7 whoever is there.

    >>> round(largest_z(50, 10), 4), round(largest_z(50, 24), 4)
    (0.2533, 1.4261)
    >>> round(largest_z(50, 10, "probability"), 5)
    0.72575
    """
    honest = num_clients - num_members
    needed = num_clients // 2 + 1 - num_members
    share = (honest - needed) / max(honest, 1)
    if convention == "probability":
        return NormalDist().cdf(-(-round(share * 100, 9) // 1) / 100)
    return max(0.0, NormalDist().inv_cdf(min(max(share, 1e-6), 1 - 1e-6)))

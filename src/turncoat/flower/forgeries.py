"""What a coalition sends in place of its updates, given everybody's: one row a member."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from turncoat.attacks.poisoning.alie import ALIE, largest_z
from turncoat.attacks.poisoning.boost import Boost
from turncoat.attacks.poisoning.ipm import IPM
from turncoat.attacks.poisoning.min_max import MinMax, largest_gamma
from turncoat.attacks.poisoning.sign_flip import SignFlip
from turncoat.coalition import Forge
from turncoat.messages import Update, rows
from turncoat.stage import call
from turncoat.task import Model
from turncoat.validate import nearest, positive
from turncoat.views import CoalitionView

Matrix = NDArray[np.float64]

_HIDDEN = 0.1  # a z below it hides, but moves nothing
_PUBLISHED = 1.5


@dataclass(frozen=True)
class Forgery:
    """A named attack on updates, and how strong it is (None: as strong as ``usual`` says).

    Updates are what a node sends minus what it was sent. All but sign-flip and scaling are given
    the updates of everybody else in the round (full knowledge); alone in a round, a coalition
    takes its own for everybody's.

    - ``sign-flip``: the member's own update, turned round and 3 times as long [1]_.
    - ``scaling``: the member's own update, 10 times as long (model replacement without a goal).
    - ``alie``: ``mean - z * std`` with the largest z that hides [2]_. It is 0 in small
      federations, and then 1.5, as published for 24 of 50.
    - ``ipm``: ``-epsilon * mean`` [3]_; epsilon is by default what turns a plain mean round:
      ``2 (n - m) / m``. Rules that leave out far updates fall to a small one: ``ipm=0.5``.
    - ``min-max``: ``mean - gamma * std``, as far out as the two honest updates farthest apart are
      from one another [4]_; gamma in closed form.

    .. [1] Li et al., AAAI 2019 (RSA), section 5. https://arxiv.org/abs/1811.03761
    .. [2] Baruch et al., NeurIPS 2019, algorithm 3. https://arxiv.org/abs/1902.06156
    .. [3] Xie et al., UAI 2019, section 4. https://arxiv.org/abs/1903.03936
    .. [4] Shejwalkar and Houmansadr, NDSS 2021, eq. (4).
       https://doi.org/10.14722/ndss.2021.24498
    """

    name: str
    strength: float | None = None

    def __post_init__(self) -> None:
        if self.name not in _KNOWN:
            raise ValueError(f"there is no attack {self.name!r}; {nearest(self.name, _KNOWN)}")
        positive(self.name, strength=self.strength)

    @property
    def needs_others(self) -> bool:
        """Whether it reads the updates of everybody else."""
        return self.name not in ("sign-flip", "scaling")

    def usual(self, num_members: int, num_others: int) -> float | None:
        """Return how strong it is in a round of so many; None for what is found in the updates."""
        if self.strength is not None:
            return self.strength
        if self.name == "alie":
            z = largest_z(num_members + num_others, num_members)
            return z if z > _HIDDEN else _PUBLISHED
        if self.name == "ipm":
            return 2 * max(num_others, 1) / num_members
        return {"sign-flip": 3.0, "scaling": 10.0}.get(self.name)

    def said(self, num_members: int, num_others: int) -> str:
        """Return it in full, as it is in a round of so many."""
        strength = self.usual(num_members, num_others)
        _, letter = _KNOWN[self.name]
        return (
            f"{self.name}({letter}{'as far as hides' if strength is None else f'{strength:.4g}'})"
        )

    def __call__(self, own: Matrix, others: Matrix) -> Matrix:
        """Return what the members send. Shapes: ``(members, d)`` and ``(others, d)``."""
        make, _ = _KNOWN[self.name]
        honest = _updates(others) or None
        size = len(own) + len(others)
        view = CoalitionView(
            0, Model(nn.Identity), torch.zeros(own.shape[1]), _updates(own), honest, None, size
        )
        forged: Sequence[Update] = call(make(self.usual(len(own), len(others))), view)
        return rows(forged).numpy()


def _updates(matrix: Matrix) -> tuple[Update, ...]:
    return tuple(Update(row, 1.0) for row in torch.from_numpy(matrix))


def parse(text: str) -> list[Forgery]:
    """Return the attacks of a list such as ``sign-flip,scaling=50``.

    >>> [f.strength for f in parse("sign-flip, scaling=50")]
    [None, 50.0]
    """
    found = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, sign, strength = item.partition("=")
        try:
            found.append(Forgery(name, float(strength) if sign else None))
        except ValueError as error:
            raise ValueError(f"--attacks {item}: {error}") from None
    names = [f.name for f in found]
    if len(set(names)) < len(names):
        raise ValueError(f"--attacks names {max(names, key=names.count)!r} twice: once is enough")
    return found


def widest_gamma(known: Matrix, away: NDArray[np.float64]) -> float:
    """Return the largest gamma with ``mean + gamma * away`` no farther from any row than rows are.

    The distance to each row is a quadratic in gamma, so each gives one bound.
    """
    return largest_gamma(torch.from_numpy(known), torch.from_numpy(away))


def _min_max(gamma: float | None) -> Forge[Update]:
    return MinMax() if gamma is None else ALIE(gamma)  # both: mean - gamma * std


_KNOWN: dict[str, tuple[Callable[[Any], Forge[Update]], str]] = {
    "sign-flip": (SignFlip, "-"),
    "alie": (ALIE, "z = "),
    "ipm": (IPM, "epsilon = "),
    "min-max": (_min_max, "gamma: "),
    "scaling": (Boost, ""),
}
ATTACKS = tuple(_KNOWN)

"""What a coalition sends in place of its updates, given everybody's: one row a member."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from turncoat.attacks.poisoning.alie import largest_z
from turncoat.validate import nearest, positive

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
        code, _ = _KNOWN[self.name]
        known = others if len(others) else own
        return code(own, known, self.usual(len(own), len(others)))


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


def _sign_flip(own: Matrix, known: Matrix, factor: Any) -> Matrix:
    return np.asarray(-factor * own)


def _scaling(own: Matrix, known: Matrix, factor: Any) -> Matrix:
    return np.asarray(factor * own)


def _alie(own: Matrix, known: Matrix, z: Any) -> Matrix:
    return _to_all(own, known.mean(axis=0) - z * _spread(known))


def _ipm(own: Matrix, known: Matrix, epsilon: Any) -> Matrix:
    return _to_all(own, -epsilon * known.mean(axis=0))


def _min_max(own: Matrix, known: Matrix, gamma: Any) -> Matrix:
    mean, away = known.mean(axis=0), -_spread(known)
    return _to_all(own, mean + (widest_gamma(known, away) if gamma is None else gamma) * away)


def widest_gamma(known: Matrix, away: NDArray[np.float64]) -> float:
    """Return the largest gamma with ``mean + gamma * away`` no farther from any row than rows are.

    The distance to each row is a quadratic in gamma, so each gives one bound.
    """
    rest = known.mean(axis=0) - known
    slope = float(away @ away)
    if slope == 0:
        return 0.0
    squares = (known * known).sum(axis=1)
    between = squares[:, None] + squares - 2 * known @ known.T
    offsets, crossed = (rest * rest).sum(axis=1) - max(0.0, float(between.max())), rest @ away
    inside = np.maximum(crossed * crossed - slope * offsets, 0.0)
    return max(0.0, float(((-crossed + np.sqrt(inside)) / slope).min()))


def _spread(known: Matrix) -> NDArray[np.float64]:
    spread: NDArray[np.float64] = known.std(axis=0, ddof=min(1, len(known) - 1))
    return spread


def _to_all(own: Matrix, row: NDArray[np.float64]) -> Matrix:
    return np.broadcast_to(row, own.shape).copy()


_KNOWN: dict[str, tuple[Callable[[Matrix, Matrix, Any], Matrix], str]] = {
    "sign-flip": (_sign_flip, "-"),
    "alie": (_alie, "z = "),
    "ipm": (_ipm, "epsilon = "),
    "min-max": (_min_max, "gamma: "),
    "scaling": (_scaling, ""),
}
ATTACKS = tuple(_KNOWN)

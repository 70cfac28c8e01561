"""As far out as one can go and still be no further from the honest than they are themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from turncoat.messages import Update, rows, with_rows
from turncoat.validate import one_of
from turncoat.views import CoalitionView

Perturbation = Literal["std", "unit", "sign"]
Search = Literal["bisection", "closed-form"]
Bound = Literal["max", "min"]

_COLUMNS = 1 << 15  # of the matrix at a time, in float64
_TINY = 1e-30


@dataclass(frozen=True)
class MinMax:
    """Go from the honest mean as far as the two honest updates furthest apart are [1]_. A forge.

    ``mean + gamma p`` with the largest gamma that leaves the forged update no further from any
    known one than any two of these are from each other. Updates that are all equal, and a single
    known one, have no spread: their mean is sent.

    Differs from the paper: the search starts wherever gamma lies (the paper's ends at 20), and its
    tolerance is relative (where updates are 1e-4 long, so is gamma in the direction of signs).

    Args:
        perturbation: p: minus the deviation of each coordinate ("std"), minus the mean as a unit
            vector ("unit"), or minus its signs ("sign"). A mean of zero has no last two.
        gamma: Found as the paper does, or the least root of a quadratic for each known update.

    .. [1] Shejwalkar & Houmansadr, NDSS 2021, section IV-B, eq. (11).
       https://doi.org/10.14722/ndss.2021.24498
    """

    perturbation: Perturbation = "std"
    gamma: Search = "bisection"

    def __post_init__(self) -> None:
        one_of(Perturbation, self, perturbation=self.perturbation)
        one_of(Search, self, gamma=self.gamma)

    def __call__(self, view: CoalitionView[Update]) -> Sequence[Update]:
        line = Line.of(known := rows(view.known), self.perturbation)
        widest = diameter(known)
        if self.gamma == "bisection":
            gamma = bisection(lambda g: bool(line.distances(g).max() <= widest))
        else:
            gamma = least_root(line, widest)
        return with_rows(view.own, line.at(gamma).to(known).expand(len(view.own), -1))


@dataclass(frozen=True)
class MinSum:
    """Go as far as the summed distances to the honest stay within one of theirs [1]_. A forge.

    ``mean + gamma p`` with the largest gamma at which the sum of squared distances to the known
    updates is at most that of the known update furthest from all others.

    Differs from the paper: as in ``MinMax``.

    Args:
        perturbation: As in ``MinMax``.
        bound: The sum of the known update that is furthest out ("max", as the paper has it), or of
            the one in the thick of them ("min", as its code does): a weaker attack.
        gamma: Found as the paper does, or in closed form: as far from the mean as that update is.

    .. [1] Shejwalkar & Houmansadr, NDSS 2021.
       https://doi.org/10.14722/ndss.2021.24498
    """

    perturbation: Perturbation = "std"
    bound: Bound = "max"
    gamma: Search = "bisection"

    def __post_init__(self) -> None:
        one_of(Perturbation, self, perturbation=self.perturbation)
        one_of(Bound, self, bound=self.bound)
        one_of(Search, self, gamma=self.gamma)

    def __call__(self, view: CoalitionView[Update]) -> Sequence[Update]:
        line = Line.of(known := rows(view.known), self.perturbation)
        if self.gamma == "bisection":
            sums = len(known) * line.squares + line.squares.sum()  # about the mean, these are all
            allowed = sums.max() if self.bound == "max" else sums.min()
            gamma = bisection(lambda g: bool(line.distances(g).sum() <= allowed))
        else:
            gamma = _same_radius(line, self.bound)
        return with_rows(view.own, line.at(gamma).to(known).expand(len(view.own), -1))


@dataclass(frozen=True)
class Line:
    """The points ``origin + gamma away``, and what tells how far each is from every known update.

    Attributes:
        origin: Shape: ``(num_params,)``, float64, as all else.
        away: Shape: ``(num_params,)``.
        squares: Squared distances of the known updates to the origin. Shape: ``(known,)``.
        along: Their offsets from it times ``away``. Shape: ``(known,)``.
        slope: The square of ``away``.
    """

    origin: Tensor = field(repr=False)
    away: Tensor = field(repr=False)
    squares: Tensor
    along: Tensor
    slope: float

    @classmethod
    def of(cls, known: Tensor, perturbation: Perturbation) -> Line:
        """Return the line through the mean of the known updates."""
        mean = known.mean(dim=0, dtype=torch.float64)
        return cls.through(mean, perturbed(known, mean, perturbation), known)

    @classmethod
    def through(cls, origin: Tensor, away: Tensor, known: Tensor) -> Line:
        squares = torch.zeros(len(known), dtype=torch.float64, device=known.device)
        along = torch.zeros_like(squares)
        for where, block in _columns(known):
            offsets = block - origin[where]
            squares += offsets.square().sum(dim=1)
            along += offsets @ away[where].double()
        return cls(origin, away, squares, along, float(away.double().square().sum()))

    def at(self, gamma: float) -> Tensor:
        point: Tensor = self.origin + gamma * self.away
        return point

    def distances(self, gamma: float) -> Tensor:
        """Return the squared distances of a point to the known updates. Shape: ``(known,)``."""
        far: Tensor = gamma * gamma * self.slope - 2 * gamma * self.along + self.squares
        return far


def perturbed(known: Tensor, mean: Tensor, perturbation: Perturbation) -> Tensor:
    """Return the direction p, away from where the honest go. Shape: ``(num_params,)``."""
    if perturbation == "sign":
        return -mean.sign()
    if perturbation == "unit":
        return mean.div(mean.norm().clamp(min=_TINY)).neg()
    if len(known) < 2:
        return torch.zeros_like(mean)
    away = torch.empty_like(mean)
    for where, block in _columns(known):
        away[where] = -block.std(dim=0)
    return away


def diameter(known: Tensor) -> float:
    """Return the largest squared distance between two of the known updates."""
    n = len(known)
    gram = torch.zeros(n, n, dtype=torch.float64, device=known.device)
    for _, block in _columns(known):
        gram.addmm_(offsets := block - block.mean(dim=0), offsets.T)
    squares = gram.diagonal()
    return max(0.0, float((squares[:, None] + squares - 2 * gram).max()))


def bisection(
    allowed: Callable[[float], bool], first: float = 10.0, tolerance: float = 1e-5
) -> float:
    """Return about the largest gamma that is allowed: algorithm 1 of NDSS 2021.

    0 is taken to be allowed, and all below what is. If ``first`` is, it is doubled until not.

    >>> round(bisection(lambda gamma: gamma <= 123.4), 2)
    123.4
    """
    for _ in range(100):
        if not allowed(first):
            break
        first *= 2
    reached, gamma, step = 0.0, first, first
    while abs(reached - gamma) > max(tolerance * reached, _TINY):
        step /= 2
        if allowed(gamma):
            reached, gamma = gamma, gamma + step
        else:
            gamma -= step
    return reached


def largest_gamma(known: Tensor, away: Tensor) -> float:
    """Return in closed form how far along ``away`` from the mean of ``known`` Min-Max may go.

    For each known x: ``|mean + gamma p - x|^2 <= D``, a quadratic in gamma.
    """
    mean = known.mean(dim=0, dtype=torch.float64)
    return least_root(Line.through(mean, away, known), diameter(known))


def largest_gamma_of_sum(known: Tensor, away: Tensor, bound: Bound = "max") -> float:
    """Return in closed form how far along ``away`` from the mean of ``known`` Min-Sum may go.

    About the mean the offsets sum to nothing, so that all gammas up to
    ``max |x - mean| / |p|`` are allowed (``min``).
    """
    mean = known.mean(dim=0, dtype=torch.float64)
    return _same_radius(Line.through(mean, away, known), bound)


def least_root(line: Line, widest: float) -> float:
    """Return how far along a line one is within ``widest`` (squared) of every known update."""
    if not line.slope:
        return 0.0
    slack = (widest - line.squares).clamp(min=0)
    roots = (line.along.square() + line.slope * slack).sqrt() + line.along
    return max(0.0, float(roots.min() / line.slope))


def _same_radius(line: Line, bound: Bound) -> float:
    if not line.slope:
        return 0.0
    square = line.squares.max() if bound == "max" else line.squares.min()
    return float((square / line.slope).sqrt())


def _columns(matrix: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield the columns of a matrix in blocks of float64."""
    for start in range(0, matrix.shape[1], _COLUMNS):
        where = slice(start, start + _COLUMNS)
        yield where, matrix[:, where].double()

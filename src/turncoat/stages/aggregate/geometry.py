"""Lengths, angles and soundness of the rows of a matrix, by blocks: no copy of it is made."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from turncoat.columns import by_columns
from turncoat.messages import Clear, rows

_SMALL, _LARGE = 1e-15, 1e15  # lengths whose squares float32 holds
_ABSURD = 1e4  # times the median length: no training does that, and no rule need take it


def finite_rows(messages: Sequence[Clear]) -> Tensor:
    """Return the deltas as one matrix; a row that is not finite says nothing, and counts as 0."""
    _refuse_none(messages)
    matrix = rows(messages)
    if bool(matrix.sum().isfinite()):  # one read; it may overflow, and then each row is looked at
        return matrix
    broken = torch.stack([~row.isfinite().all() for row in matrix])
    return matrix.masked_fill(broken[:, None], 0.0) if bool(broken.any()) else matrix


def sound_rows(messages: Sequence[Clear]) -> Tensor:
    """Return ``finite_rows``, where what is absurdly long says nothing either.

    For rules whose own theorem bounds no length.
    """
    matrix = finite_rows(messages)
    long = absurd(lengths(matrix))
    return matrix.masked_fill(long.to(matrix.device)[:, None], 0.0) if bool(long.any()) else matrix


def unsound(messages: Sequence[Clear]) -> list[int]:
    """Return the positions of the messages that are not finite, or absurdly long."""
    _refuse_none(messages)
    sizes = lengths(rows(messages))
    finite = sizes.isfinite()
    bad = ~finite
    bad[finite] = absurd(sizes[finite])
    return bad.nonzero().flatten().tolist()


def absurd(sizes: Tensor) -> Tensor:
    """Say which lengths are ten thousand times the median. Shape: ``(n,)``, bool."""
    median = float(sizes.median()) if len(sizes) else 0.0
    return sizes > _ABSURD * median if median else torch.zeros_like(sizes, dtype=torch.bool)


def length(vector: Tensor) -> float:
    """Return the length of one vector: NaN or infinity, if it is not finite."""
    return float(_sizes(vector[None])[0])


def lengths(matrix: Tensor, centre: Tensor | None = None) -> Tensor:
    """Return the length of each row, or its distance to ``centre``. Shape: ``(n,)``, on the CPU."""

    def part(where: slice) -> Tensor:
        block = matrix[:, where]
        squared: Tensor = _sizes(block, None if centre is None else centre[where]).square()
        return squared.cpu()

    total = torch.zeros(len(matrix), dtype=torch.float64)
    for squared in by_columns(part, matrix.shape[1]):
        total += squared
    return total.sqrt()


def _sizes(block: Tensor, centre: Tensor | None = None) -> Tensor:
    """Return lengths in float64, of sums in float32 where it neither loses nor overflows."""
    rest = block if centre is None else block - centre
    sizes: Tensor = torch.linalg.vector_norm(rest, dim=1)
    if not bool(((sizes > _SMALL) & (sizes < _LARGE)).all()):
        exact = block.double()
        sizes = torch.linalg.vector_norm(exact if centre is None else exact - centre, dim=1)
    return sizes.double()


def products(matrix: Tensor, vector: Tensor) -> Tensor:
    """Return the inner product of each row with ``vector``. Shape: ``(n,)``, on the CPU."""
    total = torch.zeros(len(matrix), dtype=torch.float64)
    for part in by_columns(
        lambda where: (matrix[:, where].double() @ vector[where].double()).cpu(), matrix.shape[1]
    ):
        total += part
    return total


def gram(matrix: Tensor, shift: Tensor | None = None) -> Tensor:
    """Return the inner products of the rows, each moved by ``shift``. Shape: ``(n, n)``, CPU."""

    def part(where: slice) -> Tensor:
        block = matrix[:, where].double()
        if shift is not None:
            block += shift[where]
        return (block @ block.T).cpu()

    total = torch.zeros(len(matrix), len(matrix), dtype=torch.float64)
    for product in by_columns(part, matrix.shape[1]):
        total += product
    return total


def cosines(inner: Tensor) -> Tensor:
    """Return the cosines between rows of that Gram matrix; 0 for a row of zeros."""
    size = inner.diagonal().clamp(min=0).sqrt()
    unit = torch.where(size > 0, 1 / size, 0.0)
    return (unit[:, None] * inner * unit).clamp(-1, 1)


def combined(weights: Tensor, matrix: Tensor) -> Tensor:
    """Return the rows summed with those weights: of no row a copy is made."""
    step: Tensor = weights.to(matrix) @ matrix
    return step


def mean_of(kept: Sequence[int], matrix: Tensor) -> Tensor:
    """Return the mean of some rows, 0 of none."""
    weights = torch.zeros(len(matrix), dtype=torch.float64)
    weights[list(kept)] = 1 / max(len(kept), 1)
    return combined(weights, matrix)


def shortening(sizes: Tensor, radius: float) -> Tensor:
    """Return the factor that brings each length down to ``radius`` at most."""
    return torch.where(sizes > radius, radius / sizes.clamp(min=torch.finfo(torch.float64).tiny), 1)


def _refuse_none(messages: Sequence[Clear]) -> None:
    if not messages:
        raise ValueError("a rule needs at least 1 message; the cohort has 0: sample more clients")

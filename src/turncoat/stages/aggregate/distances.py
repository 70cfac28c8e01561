"""Distances between all updates: as fast as a Gram product, and true where a Gram product is not.

``|a|^2 - 2ab + |b|^2`` loses what is small next to ``a`` and ``b``. So one row near the others is
taken from all first; then products are summed in float32 for no longer than 256 columns, in float64
beyond; and distances that are still small next to what they are the difference of are measured
again, about a row that is nearer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.sparse.csgraph import connected_components
from torch import Tensor
from torch.nn.functional import pad

from turncoat.columns import by_columns
from turncoat.messages import Clear, rows
from turncoat.stages.aggregate.geometry import finite_rows

_CHUNK = 256  # products that are summed in float32
_TRUSTED = 1 / 16  # of the squared distances to the centre: what is less is measured again
_CENTRES = 3  # in turn; what is in doubt about the last is measured by differences
_WIDTH = 8192  # columns at a time
_SMALL, _LARGE = 1e-20, 1e30  # sums of squares that float32 neither loses nor overflows
_SAMPLE, _RUN = 256, 8  # columns in which a centre is looked for, so many side by side


def squared_distances(matrix: Tensor) -> Tensor:
    """Return the squared Euclidean distances of the rows. Shape: ``(n, n)``, float64, on the CPU.

    Each is wrong by less than a part in 3,000 whatever the rows, and by a part in a million as a
    rule: next to a common part of any length, and beside rows of any length.
    """
    n = len(matrix)
    found = torch.zeros(n, n, dtype=torch.float64)
    unknown = [torch.arange(n)]
    for _ in range(_CENTRES):
        doubtful = []
        for group in unknown:
            squared, doubts = _about_a_centre(matrix, group)
            found[group[:, None], group] = squared
            doubtful += [group[cluster] for cluster in _clusters(doubts)]
        unknown = doubtful
    for group in unknown:
        found[group[:, None], group] = _by_differences(matrix, group)
    return found


def measured(messages: Sequence[Clear]) -> tuple[Tensor, Tensor]:
    """Return the deltas as one matrix, and their squared distances.

    A row that is not finite says nothing, and counts as 0.
    """
    matrix = rows(messages)
    squared = squared_distances(matrix)
    if not bool(squared.isfinite().all()):
        matrix = finite_rows(messages)
        squared = squared_distances(matrix)
    return matrix, squared


def about_the_middle(messages: Sequence[Clear]) -> tuple[Tensor, Tensor, int]:
    """Return the deltas as one matrix, their inner products about one of them, and which.

    That one has many others near. A row that is not finite says nothing, and counts as 0.

    Returns:
        The inner products of the rows minus the one. Shape: ``(n, n)``, float64, on the CPU. Each
        is wrong by a part in 100,000 of the product of the two lengths at most.
    """
    matrix = rows(messages)
    everyone = torch.arange(len(matrix))
    centre = _central(matrix, everyone)
    gram = _gram(matrix, everyone, centre)
    if not bool(gram.isfinite().all()):
        matrix = finite_rows(messages)
        centre = _central(matrix, everyone)
        gram = _gram(matrix, everyone, centre)
    median = _squared(gram).median(dim=1).values
    if float(median[centre]) > 4 * float(median.min()):  # near the others in a few columns only
        centre = int(median.argmin())
        gram = _gram(matrix, everyone, centre)
    return matrix, gram, centre


def _squared(gram: Tensor) -> Tensor:
    """Return the squared distances of points by their inner products."""
    lengths = gram.diagonal()
    return (lengths[:, None] + lengths - 2 * gram).clamp(min=0).fill_diagonal_(0)


def _about_a_centre(matrix: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distances within some rows, and which of these cannot be trusted."""
    gram = _gram(matrix, group, _central(matrix, group))
    squared, lengths = _squared(gram), gram.diagonal()
    sums = lengths[:, None] + lengths
    return squared, (squared < _TRUSTED * sums).fill_diagonal_(False)


def _central(matrix: Tensor, group: Tensor) -> int:
    """Return the position in the group of a row with many others near, by a few columns."""
    width = matrix.shape[1]
    columns = torch.arange(width)
    if width > _SAMPLE:  # memory is read by lines: what is side by side costs nothing more
        starts = torch.linspace(0, width - _RUN, _SAMPLE // _RUN, dtype=torch.float64).long()
        columns = (starts[:, None] + torch.arange(_RUN)).flatten()
    sample = matrix[group.to(matrix.device)[:, None], columns.to(matrix.device)].double()
    exact = "donot_use_mm_for_euclid_dist"
    return int(torch.cdist(sample, sample, compute_mode=exact).median(dim=1).values.argmin())


def _gram(matrix: Tensor, group: Tensor, centre: int) -> Tensor:
    """Return the inner products of some rows, from each of which the ``centre`` is taken."""
    m, half = len(group), (len(group) + 1) // 2
    chosen = None if m == len(matrix) else group.to(matrix.device)

    def products(where: slice) -> Tensor:
        block = matrix[:, where] if chosen is None else matrix[:, where].index_select(0, chosen)
        rest = block - block[centre]
        gram = torch.empty(m, m, dtype=torch.float64, device=matrix.device)
        if missing := -rest.shape[1] % _CHUNK:
            rest = pad(rest, (0, missing))
        chunks = rest.view(m, -1, _CHUNK).transpose(0, 1)
        upper, lower = chunks[:, :half], chunks[:, half:]
        gram[:half] = (upper @ chunks.mT).sum(dim=0, dtype=torch.float64)
        gram[half:, half:] = (lower @ lower.mT).sum(dim=0, dtype=torch.float64)
        gram[half:, :half] = gram[:half, half:].T
        squares = gram.diagonal()
        extreme = ~((squares > _SMALL) & (squares < _LARGE))
        if bool(extreme.any()) and bool(rest[extreme].any()):  # beyond what float32 can square
            exact = block.double() - block[centre].double()
            gram = exact @ exact.T
        return gram.cpu()

    total = torch.zeros(m, m, dtype=torch.float64)
    for part in by_columns(products, matrix.shape[1], _WIDTH):
        total += part
    return total.triu() + total.triu(1).T  # symmetric to the bit: who scores alike is told apart


def _clusters(doubts: Tensor) -> list[Tensor]:
    """Return those groups of two rows or more that doubtful pairs hold together."""
    if not bool(doubts.any()):
        return []
    _, labels = connected_components(doubts.numpy(), directed=False)
    sizes = np.bincount(labels)
    return [torch.from_numpy(np.flatnonzero(labels == k)) for k in np.flatnonzero(sizes > 1)]


def _by_differences(matrix: Tensor, group: Tensor) -> Tensor:
    """Return the distances within some rows, each summed from squared differences in float64."""
    chosen = group.to(matrix.device)

    def pairs(where: slice) -> Tensor:
        return torch.pdist(matrix[:, where].index_select(0, chosen).double()).square().cpu()

    above = sum(by_columns(pairs, matrix.shape[1], width=1024))
    square = torch.zeros(len(group), len(group), dtype=torch.float64)
    i, j = torch.triu_indices(len(group), len(group), offset=1)
    square[i, j] = square[j, i] = torch.as_tensor(above, dtype=torch.float64)
    return square

"""Two groups among a few points: who is in the other one, and whether there is another at all."""

from __future__ import annotations

import torch
from torch import Generator, Tensor


def two_means(points: Tensor, max_iterations: int = 100) -> Tensor:
    """Return which points are in the second of two groups: Lloyd's, from the two that lie farthest
    apart along the widest direction. Shape: ``(n,)``, bool; none, if all points are one.

    >>> two_means(torch.tensor([[0.0], [9.0], [0.5], [8.0]])).tolist()
    [False, True, False, True]
    """
    centred = points.double() - points.double().mean(dim=0)
    direction = torch.linalg.svd(centred, full_matrices=False).Vh[0]
    along = centred @ direction
    if float(along.max() - along.min()) < 1e-12 * float(points.abs().max()) + 1e-300:
        return torch.zeros(len(points), dtype=torch.bool)
    first, second = centred[along.argmin()], centred[along.argmax()]
    group = torch.zeros(len(points), dtype=torch.bool)
    for _ in range(max_iterations):
        nearer = (centred - second).norm(dim=1) < (centred - first).norm(dim=1)
        if torch.equal(nearer, group):
            break
        group = nearer
        first, second = centred[~group].mean(dim=0), centred[group].mean(dim=0)
    return group ^ group[0]  # the first point is in the first group


def silhouette(points: Tensor, group: Tensor) -> float:
    """Return the mean silhouette of two groups: 1 far apart, 0 overlapping; 0 if one is empty."""
    if not bool(group.any()) or bool(group.all()):
        return 0.0
    apart = torch.cdist(points.double(), points.double())
    same = group[:, None] == group
    own = (apart * same).sum(dim=1) / (same.sum(dim=1) - 1).clamp(min=1)
    other = (apart * ~same).sum(dim=1) / (~same).sum(dim=1)
    score = (other - own) / torch.maximum(other, own).clamp(min=1e-300)
    return float(torch.where(same.sum(dim=1) > 1, score, 0.0).mean())


def split_in_two(values: Tensor) -> tuple[Tensor, float]:
    """Return which numbers are in the upper of the two tightest groups, and how tight both are.

    Exact: every cut of the sorted numbers is tried. Shape: ``(n,)``, and the sum of squares.
    """
    order = values.double().argsort()
    ascending = values.double()[order]
    n = len(values)
    best, cut = float(_scatter(ascending)), n
    for k in range(1, n):
        scatter = float(_scatter(ascending[:k]) + _scatter(ascending[k:]))
        if scatter < best:
            best, cut = scatter, k
    upper = torch.zeros(n, dtype=torch.bool)
    upper[order[cut:]] = True
    return upper, best


def has_two_groups(values: Tensor, rng: Generator, num_references: int = 20) -> bool:
    """Say whether numbers fall into more than one group, by the gap statistic [1]_.

    They do if the gap of one group is below that of two, less its standard error. The reference is
    uniform over the range of the numbers.

    .. [1] Tibshirani et al., JRSS B 63(2), 2001, pp. 411-423.
    """
    low, high = float(values.min()), float(values.max())
    if not high - low > 1e-9 * abs(high):
        return False
    scaled = (values.double() - low) / (high - low)
    drawn = torch.rand(num_references, len(values), generator=rng, dtype=torch.float64)
    gaps, errors = [], []
    for k in (1, 2):
        reference = torch.stack([_log_scatter(row, k) for row in drawn])
        gaps.append(float(reference.mean() - _log_scatter(scaled, k)))
        errors.append(float(reference.std(correction=0)) * (1 + 1 / num_references) ** 0.5)
    return bool(gaps[0] < gaps[1] - errors[1])


def _log_scatter(values: Tensor, num_groups: int) -> Tensor:
    scatter = _scatter(values) if num_groups == 1 else torch.tensor(split_in_two(values)[1])
    return scatter.double().clamp(min=1e-12).log()


def _scatter(values: Tensor) -> Tensor:
    return (values - values.mean()).square().sum()

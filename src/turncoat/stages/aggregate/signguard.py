"""Filtering by length and by signs: what hides from distances shows in how many entries rise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from sklearn.cluster import MeanShift, estimate_bandwidth
from torch import Generator, Tensor

from turncoat.messages import Clear
from turncoat.stage import Memory, Verdict
from turncoat.stages.aggregate.geometry import (
    combined,
    finite_rows,
    lengths,
    products,
    shortening,
)
from turncoat.validate import fraction, one_of, positive

Similarity = Literal["plain", "cosine", "distance"]


@dataclass(frozen=True)
class SignGuard:
    """Average, at the median length, those of ordinary length and in the largest sign cluster [1]_.

    The clusters are MeanShift's, of the shares of positive, zero and negative entries in a random
    stretch of the update, each over the largest such share. Needs an honest majority. Claimed
    weights are ignored. Memory: the last step, for ``similarity``.

    Differs from the paper: a message that is not finite counts as 0; if no message passes both
    tests, the model stays.

    Args:
        lower: The least ordinary length, in median lengths.
        upper: The greatest.
        stretch: Which part of the coordinates the signs are counted in.
        similarity: A fourth feature: the cosine with the last step (SignGuard-Sim), or the
            distance to it (SignGuard-Dist).

    .. [1] Xu et al., ICDCS 2022, algorithm 2. https://arxiv.org/abs/2109.05872
    """

    lower: float = 0.1
    upper: float = 3.0
    stretch: float = 0.1
    similarity: Similarity = "plain"

    def __post_init__(self) -> None:
        positive(self, lower=self.lower, upper=self.upper, stretch=self.stretch)
        fraction(self, stretch=self.stretch)
        if self.lower >= self.upper:
            raise ValueError(
                f"SignGuard: lower must be below upper; they are {self.lower} and {self.upper}"
            )
        one_of(Similarity, self, similarity=self.similarity)

    def __call__(
        self,
        messages: Sequence[Clear],
        *,
        rng: Generator,
        memory: Memory[Tensor],
        verdict: Verdict,
    ) -> Tensor:
        matrix = finite_rows(messages)
        sizes = lengths(matrix)
        radius = float(sizes.quantile(0.5))
        last = memory.last(torch.zeros_like(matrix[0])).to(matrix)
        features = self._features(matrix, sizes, last, rng)
        ordinary = (sizes > self.lower * radius) & (sizes < self.upper * radius)
        kept = ordinary & largest_cluster(features)
        verdict.flag((~kept).nonzero().flatten().tolist())
        share = torch.where(kept, shortening(sizes, radius), 0.0) / max(int(kept.sum()), 1)
        return memory.keep(combined(share, matrix)).clone()

    def _features(self, matrix: Tensor, sizes: Tensor, last: Tensor, rng: Generator) -> Any:
        size = matrix.shape[1]
        count = max(1, int(self.stretch * size))
        start = int(torch.randint(size - count + 1, (), generator=rng))
        signs = matrix[:, start : start + count].sign()
        columns = [(signs == s).sum(dim=1).double().cpu() / count for s in (1, 0, -1)]
        if self.similarity == "cosine":
            scale = sizes * float(lengths(last[None])[0])
            columns.append(products(matrix, last) / torch.where(scale > 0, scale, 1.0))
        if self.similarity == "distance":
            columns.append(lengths(matrix, last))
        found = torch.stack(columns, dim=1)
        most = found.abs().max(dim=0).values
        return (found / torch.where(most > 0, most, 1.0)).numpy()


def largest_cluster(features: Any) -> Tensor:
    """Return who is in MeanShift's largest cluster of the rows. Shape: ``(n,)``, bool."""
    width = float(estimate_bandwidth(features, quantile=0.5)) if len(features) > 1 else 0.0
    if width > 0:
        labels = MeanShift(bandwidth=width, cluster_all=False).fit(features).labels_
    else:  # half of them or more are one point
        labels = np.unique(features, axis=0, return_inverse=True)[1].reshape(-1)
    numbers, counts = np.unique(labels[labels >= 0], return_counts=True)
    return torch.from_numpy(labels == numbers[counts.argmax()])

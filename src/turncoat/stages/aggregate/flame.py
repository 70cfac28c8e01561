"""Clustering, clipping and noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from sklearn.cluster import HDBSCAN
from torch import Generator, Tensor

from turncoat.messages import Clear
from turncoat.stage import Verdict
from turncoat.stages.aggregate.geometry import (
    combined,
    cosines,
    finite_rows,
    gram,
    lengths,
    shortening,
)
from turncoat.stages.aggregate.layers import noise
from turncoat.task import Model
from turncoat.validate import at_least, one_of

Compared = Literal["models", "updates"]


@dataclass(frozen=True)
class FLAME:
    """Average the majority that points one way, cut to the median length, under noise [1]_.

    The majority is HDBSCAN's cluster, by cosine distance, of more than half of the clients. Where
    it finds none, everyone is let in, at the median length still. Needs an honest majority whose
    models point one way. Claimed weights are ignored. Buffers of the model get no noise.

    Differs from the paper: a message that is not finite counts as 0.

    Args:
        noise_multiplier: The noise's standard deviation in units of the median length: lambda.
        compare: Whole models as in the paper, or updates, which tell more apart.

    .. [1] Nguyen et al., USENIX Security 2022, algorithm 1. https://arxiv.org/abs/2101.02281
    """

    noise_multiplier: float = 0.001
    compare: Compared = "models"

    def __post_init__(self) -> None:
        at_least(0, self, noise_multiplier=self.noise_multiplier)
        one_of(Compared, self, compare=self.compare)

    def __call__(
        self,
        messages: Sequence[Clear],
        *,
        before: Tensor,
        model: Model,
        rng: Generator,
        verdict: Verdict,
    ) -> Tensor:
        matrix = finite_rows(messages)
        shift = before.to(matrix) if self.compare == "models" else None
        admitted = majority(1 - cosines(gram(matrix, shift)))
        verdict.flag((~admitted).nonzero().flatten().tolist())
        sizes = lengths(matrix)
        radius = float(sizes.quantile(0.5))
        share = torch.where(admitted, shortening(sizes, radius), 0.0) / int(admitted.sum())
        step = combined(share, matrix)
        std = self.noise_multiplier * radius
        return step + noise(step, std, model, rng) if std else step


def majority(distance: Tensor) -> Tensor:
    """Return who is in the one cluster of more than half; everyone, if there is none. ``(n,)``."""
    n = len(distance)
    everyone = torch.ones(n, dtype=torch.bool)
    if n < 3:
        return everyone
    found = HDBSCAN(
        min_cluster_size=n // 2 + 1,
        min_samples=2,  # scikit-learn counts the point itself; the paper's 1 does not
        metric="precomputed",
        allow_single_cluster=True,
        copy=True,
    ).fit_predict(distance.clamp(min=0).fill_diagonal_(0.0).numpy())
    inside = torch.from_numpy(found) >= 0
    return inside if bool(inside.any()) else everyone

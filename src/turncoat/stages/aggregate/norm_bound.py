"""Clipping at the server, which no client can skip."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass, replace
from math import isfinite
from statistics import median
from typing import Any

import torch
from torch import Tensor

from turncoat.messages import Clear
from turncoat.stage import Aggregate, call, streams
from turncoat.stages.aggregate.geometry import length
from turncoat.validate import exactly_one, positive


@dataclass(frozen=True)
class NormBound:
    """Shorten every update to the same radius at most, then do as ``inner`` [1]_.

    A message that is not finite counts as 0.

    Args:
        max_norm: The radius; acts on each client apart, so a guarantee upstream survives.
        ratio: Of the cohort's median norm, instead: a radius that depends on everyone.

    .. [1] Sun et al., 2019, section 5. https://arxiv.org/abs/1911.07963
    """

    inner: Aggregate[Clear]
    _: KW_ONLY
    max_norm: float | None = None
    ratio: float | None = None

    def __post_init__(self) -> None:
        exactly_one(self, max_norm=self.max_norm, ratio=self.ratio)
        positive(self, max_norm=self.max_norm, ratio=self.ratio)

    @property
    def mixes_clients(self) -> bool:
        return self.ratio is not None

    def __call__(self, messages: Iterable[Clear], **offers: Any) -> Tensor:
        radius = self.max_norm
        if self.ratio is not None:
            messages = list(messages)
            norms = [norm for m in messages if isfinite(norm := length(m.delta))]
            radius = self.ratio * median(norms or [0.0])
        short = (_shortened(m, radius or 0.0) for m in messages)
        step: Tensor = call(self.inner, short if streams(self.inner) else list(short), **offers)
        return step


def _shortened(message: Clear, radius: float) -> Clear:
    norm = length(message.delta)
    if not isfinite(norm):
        return replace(message, delta=torch.zeros_like(message.delta))
    return message if norm <= radius else replace(message, delta=message.delta * (radius / norm))

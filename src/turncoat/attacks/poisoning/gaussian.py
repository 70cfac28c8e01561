"""Noise in the place of an update, or on top of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator

from turncoat.messages import Update, rows, with_rows
from turncoat.validate import positive
from turncoat.views import CoalitionView

_TINY = 1e-30


@dataclass(frozen=True)
class Gaussian:
    """Send noise, each member its own [1]_. A forge that knows no label.

    Args:
        scale: How many times as long as the member's own update the noise is.
        std: Of each coordinate, in the place of ``scale``; the paper has 200.
        added: Whether the noise comes on top of the own update, or in its place.

    .. [1] Blanchard et al., NeurIPS 2017, section 6. https://arxiv.org/abs/1703.02757
    """

    scale: float = 1.0
    std: float | None = None
    added: bool = False

    def __post_init__(self) -> None:
        positive(self, scale=self.scale, std=self.std)

    def __call__(self, view: CoalitionView[Update], *, rng: Generator) -> Sequence[Update]:
        own = rows(view.own)
        noise = torch.randn(own.shape, generator=rng).to(own)
        if self.std is None:
            lengths = own.norm(dim=1, keepdim=True) * self.scale
            noise *= lengths / noise.norm(dim=1, keepdim=True).clamp(min=_TINY)
        else:
            noise *= self.std
        return with_rows(view.own, own + noise if self.added else noise)

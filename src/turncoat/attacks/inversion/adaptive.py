"""Objectives for updates that a defence has touched, by an attacker who knows which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from turncoat.attacks.inversion.engine import Objective
from turncoat.attacks.inversion.objectives import Cosine
from turncoat.validate import positive


@dataclass(frozen=True)
class Kept:
    """Compare what the defence has kept: what is zero in the update says nothing of the guess [1]_.

    For ``GradientPruning`` and for ``Soteria``, whose whole mask can be read off its zeros. Of an
    update without zeros it is ``inner``.

    Differs from the paper: entries are left out, not layers, so that the mask need not be guessed.

    .. [1] Balunović et al., ICLR 2022. https://arxiv.org/abs/2111.04706
    """

    inner: Objective = field(default_factory=Cosine)

    def __call__(self, guessed: Sequence[Tensor], target: Sequence[Tensor]) -> Tensor:
        kept = [torch.where(t != 0, g, 0.0) for g, t in zip(guessed, target, strict=True)]
        return self.inner(kept, target)

    @property
    def needs_scale(self) -> bool:
        """Whether ``inner`` compares lengths."""
        return bool(getattr(self.inner, "needs_scale", False))


@dataclass(frozen=True)
class Signs:
    """Do to the guess's gradient what ``Quantised(bits=1)`` did to the client's, then compare [1]_.

    The sign is made smooth: each tensor becomes ``tanh(sharpness g / rms(g))`` times its mean size.

    Differs from the paper: it is the compression that is attacked; this comparison is our own.

    .. [1] Bernstein et al., ICML 2018, algorithm 1. https://arxiv.org/abs/1802.04434
    """

    inner: Objective = field(default_factory=Cosine)
    sharpness: float = 30.0

    def __post_init__(self) -> None:
        positive(self, sharpness=self.sharpness)

    def __call__(self, guessed: Sequence[Tensor], target: Sequence[Tensor]) -> Tensor:
        return self.inner([self._signed(g) for g in guessed], target)

    def _signed(self, gradient: Tensor) -> Tensor:
        size = gradient.square().mean().add(1e-24).sqrt()
        return torch.tanh(self.sharpness * gradient / size) * gradient.abs().mean()

    @property
    def needs_scale(self) -> bool:
        """Whether ``inner`` compares lengths."""
        return bool(getattr(self.inner, "needs_scale", False))

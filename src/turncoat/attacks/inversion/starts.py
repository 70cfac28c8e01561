"""Where a reconstruction begins: pixels in [0, 1]."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from turncoat.validate import fraction, positive


@dataclass(frozen=True)
class Uniform:
    """Pixels drawn evenly from [0, 1]."""

    def __call__(self, shape: tuple[int, ...], *, rng: Generator) -> Tensor:
        return torch.rand(shape, generator=rng)


@dataclass(frozen=True)
class Gaussian:
    """Normal pixels around ``mean``, as most of the literature begins; cut off at 0 and 1."""

    mean: float = 0.5
    std: float = 0.25

    def __post_init__(self) -> None:
        fraction(self, mean=self.mean)
        positive(self, std=self.std)

    def __call__(self, shape: tuple[int, ...], *, rng: Generator) -> Tensor:
        return torch.randn(shape, generator=rng).mul_(self.std).add_(self.mean).clamp_(0, 1)


@dataclass(frozen=True)
class Constant:
    """One shade for every pixel: grey, black or white."""

    value: float = 0.5

    def __post_init__(self) -> None:
        fraction(self, value=self.value)

    def __call__(self, shape: tuple[int, ...]) -> Tensor:
        return torch.full(shape, self.value)

"""What a backdoor reacts to: a change of the input that only the attacker makes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from math import isfinite
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from turncoat.randomness import Randomness
from turncoat.validate import at_least, fraction, nearest

_CORNERS = ("top-left", "top-right", "bottom-left", "bottom-right")


class Trigger(Protocol):
    """Return the inputs with the trigger in them, and leave those that were given as they are."""

    def __call__(self, inputs: Tensor, /) -> Tensor: ...


def worn_by(trigger: Trigger, client: int) -> Trigger:
    """Return what one client puts in: its part of a trigger that is split, else all of it."""
    split = getattr(trigger, "worn_by", None)
    return trigger if split is None else split(client)


@dataclass(frozen=True)
class PixelPattern:
    """A square of ``size`` x ``size`` pixels of one ``value`` in a corner [1]_.

    Args:
        margin: Pixels between the square and the edges.

    .. [1] Gu et al., arXiv 2017 (BadNets), section 4. https://arxiv.org/abs/1708.06733
    """

    size: int = 3
    corner: Literal["top-left", "top-right", "bottom-left", "bottom-right"] = "bottom-right"
    value: float = 1.0
    margin: int = 0

    def __post_init__(self) -> None:
        at_least(1, self, size=self.size)
        at_least(0, self, margin=self.margin)
        fraction(self, value=self.value)
        if self.corner not in _CORNERS:
            raise ValueError(
                f"PixelPattern: there is no corner {self.corner!r}; "
                + nearest(str(self.corner), _CORNERS)
            )

    def __call__(self, inputs: Tensor, /) -> Tensor:
        if inputs.ndim != 4 or min(inputs.shape[-2:]) < self.size + self.margin:
            raise ValueError(
                f"{self!r} needs images (n, channels, height, width) of "
                f"{self.size + self.margin} pixels a side at least; it was given "
                f"{tuple(inputs.shape)}: lower size or margin, or take another trigger"
            )
        vertical, horizontal = self.corner.split("-")
        marked = inputs.clone()
        rows = self._span(inputs.shape[-2], vertical == "top")
        columns = self._span(inputs.shape[-1], horizontal == "left")
        marked[..., rows, columns] = self.value
        return marked

    def _span(self, side: int, first: bool) -> slice:
        start = self.margin if first else side - self.margin - self.size
        return slice(start, start + self.size)


@dataclass(frozen=True)
class Blended:
    """A picture laid over the whole input: ``(1 - alpha) * x + alpha * picture`` [1]_.

    Args:
        alpha: How much of the picture shows.
        image: The picture: rows of grey levels, stretched to the input's size; without, noise.
        seed: Draws the noise, uniform in 0 to 1, for an input of any shape.

    .. [1] Chen et al., arXiv 2017, section 4.2 (blended injection).
       https://arxiv.org/abs/1712.05526
    """

    alpha: float = 0.2
    image: tuple[tuple[float, ...], ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        fraction(self, alpha=self.alpha)
        at_least(0, self, seed=self.seed)
        if self.image is not None:
            if not self.image or len({len(row) for row in self.image}) != 1 or not self.image[0]:
                raise ValueError("Blended: image must have rows of one length, and one at least")
            if not all(isfinite(level) for row in self.image for level in row):
                raise ValueError("Blended: image holds a grey level that is not finite")

    def __call__(self, inputs: Tensor, /) -> Tensor:
        return inputs.lerp(self.picture(inputs.shape[1:]).to(inputs), self.alpha)

    def picture(self, shape: torch.Size) -> Tensor:
        """Return what is laid over inputs of a shape."""
        if self.image is None:
            return torch.rand(shape, generator=Randomness(self.seed).at("blended", *shape))
        if len(shape) != 3:
            raise ValueError(
                f"Blended: an image lies over images (n, channels, height, width), and not over "
                f"inputs of the shape (n, {', '.join(map(str, shape))}): leave image out"
            )
        return interpolate(torch.tensor(self.image)[None, None], shape[1:])[0].expand(shape)


@dataclass(frozen=True)
class DistributedPattern:
    """A grid of bars, of which each traitor puts in one, and the attacker all [1]_.

    Client c puts in bar ``c % (num_rows * num_columns)``, so members numbered in a row hold them
    all. As it stands it is MNIST's of the paper: bars of four pixels in rows 0 and 3.

    Args:
        height, width: Of a bar, in pixels.
        gap: Pixels between two bars: down, and across.
        shift: Pixels between the grid and the top left corner: down, and across.
        part: The only bar to put in, counted row by row from 0; None for all.
        split: Whether clients share the bars out among them; if not, each puts in all, which is
            the central attack that the paper compares with.

    .. [1] Xie et al., ICLR 2020 (DBA), sections 3 and 4.1. https://openreview.net/forum?id=rkgyS0VFvr
    """

    height: int = 1
    width: int = 4
    gap: tuple[int, int] = (2, 2)
    shift: tuple[int, int] = (0, 0)
    num_rows: int = 2
    num_columns: int = 2
    value: float = 1.0
    part: int | None = None
    split: bool = True

    def __post_init__(self) -> None:
        at_least(1, self, height=self.height, width=self.width)
        at_least(1, self, num_rows=self.num_rows, num_columns=self.num_columns)
        at_least(0, self, part=self.part)
        for name, both in (("gap", self.gap), ("shift", self.shift)):
            at_least(0, self, **{f"{name}[{i}]": pixels for i, pixels in enumerate(both)})
        fraction(self, value=self.value)
        if self.part is not None and self.part >= self.num_parts:
            raise ValueError(
                f"DistributedPattern: there is no part {self.part}; there are {self.num_parts}, "
                f"0 to {self.num_parts - 1}"
            )

    @property
    def num_parts(self) -> int:
        return self.num_rows * self.num_columns

    def worn_by(self, client: int) -> DistributedPattern:
        """Return the part of one client."""
        return replace(self, part=client % self.num_parts) if self.split else self

    def __call__(self, inputs: Tensor, /) -> Tensor:
        down, across = (
            self._starts(0, self.height, self.num_rows),
            self._starts(1, self.width, self.num_columns),
        )
        need = (down[-1] + self.height, across[-1] + self.width)
        if inputs.ndim != 4 or inputs.shape[-2] < need[0] or inputs.shape[-1] < need[1]:
            raise ValueError(
                f"{self!r} needs images (n, channels, height, width) of {need[0]} x {need[1]} "
                f"pixels at least; it was given {tuple(inputs.shape)}: lower width, gap or shift"
            )
        marked = inputs.clone()
        for number, (top, left) in enumerate(product(down, across)):
            if self.part in (None, number):
                marked[..., top : top + self.height, left : left + self.width] = self.value
        return marked

    def _starts(self, axis: int, length: int, count: int) -> list[int]:
        return [self.shift[axis] + i * (length + self.gap[axis]) for i in range(count)]

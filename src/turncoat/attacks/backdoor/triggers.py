"""What a backdoor reacts to: a change of the input that only the attacker makes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from turncoat.validate import at_least, fraction, nearest

_CORNERS = ("top-left", "top-right", "bottom-left", "bottom-right")


class Trigger(Protocol):
    """Return the inputs with the trigger in them, and leave those that were given as they are."""

    def __call__(self, inputs: Tensor, /) -> Tensor: ...


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

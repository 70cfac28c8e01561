"""A step backwards, as large as one likes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from turncoat.messages import Update, rows, with_rows
from turncoat.validate import positive
from turncoat.views import CoalitionView


@dataclass(frozen=True)
class SignFlip:
    """Send the honest update turned round and ``scale`` times as long [1]_. A forge.

    .. [1] Li et al., AAAI 2019 (RSA), section 5. https://arxiv.org/abs/1811.03761
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        positive(self, scale=self.scale)

    def __call__(self, view: CoalitionView[Update]) -> Sequence[Update]:
        return with_rows(view.own, rows(view.own) * -self.scale)

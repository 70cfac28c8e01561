"""A small step backwards, which no distance tells from an honest one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from turncoat.messages import Update, rows, with_rows
from turncoat.validate import positive
from turncoat.views import CoalitionView


@dataclass(frozen=True)
class IPM:
    """Send the honest mean turned round and ``epsilon`` times as long [1]_. A forge.

    Inner product manipulation: a small epsilon (0.1 to 0.5) hides among the honest from Krum and
    the median, one above ``(n - m) / m`` turns the plain mean of n, m of them forged, round.

    .. [1] Xie et al., UAI 2019, section 4. https://arxiv.org/abs/1903.03936
    """

    epsilon: float = 0.5

    def __post_init__(self) -> None:
        positive(self, epsilon=self.epsilon)

    def __call__(self, view: CoalitionView[Update]) -> Sequence[Update]:
        forged = rows(view.known).mean(dim=0) * -self.epsilon
        return with_rows(view.own, forged.expand(len(view.own), -1))

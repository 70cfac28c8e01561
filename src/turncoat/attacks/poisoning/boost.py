"""One's own update, so long that it drowns all others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from turncoat.messages import Update, rows, with_rows
from turncoat.validate import positive
from turncoat.views import CoalitionView


@dataclass(frozen=True)
class Boost:
    """Send the own update ``factor`` times as long: the mean then becomes it [1]_. A forge.

    The update must be worth it: train it on poisoned data (``prepare`` or ``train``).

    Args:
        factor: None for the size of the cohort.

    .. [1] Bagdasaryan et al., AISTATS 2020, section 4.2, eq. (3). https://arxiv.org/abs/1807.00459
    """

    factor: float | None = None

    def __post_init__(self) -> None:
        positive(self, factor=self.factor)

    def __call__(self, view: CoalitionView[Update]) -> Sequence[Update]:
        factor = float(view.num_clients) if self.factor is None else self.factor
        return with_rows(view.own, rows(view.own) * factor)

"""Selection first, then every coordinate by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from turncoat.messages import Clear
from turncoat.stage import Verdict
from turncoat.stages.aggregate.coordinatewise import each_column, mean_near_middle, refuse_fewer
from turncoat.stages.aggregate.distances import measured
from turncoat.stages.aggregate.krum import picked, ranked
from turncoat.validate import at_least


@dataclass(frozen=True)
class Bulyan:
    """Select ``n - 2f`` updates by Krum; of these, in each coordinate, average the most central.

    Krum chooses one after another among the rest [1]_; then those ``n - 4f`` values count that are
    nearest to the median of the selected. Needs n >= 4f + 3. Claimed weights are ignored; a message
    that is not finite counts as 0. Those not selected are flagged.

    Differs from the paper: it does not say how Krum chooses among the last, fewer than 2f + 3: here
    by one neighbour at least.

    Args:
        num_byzantine: How many forged messages to withstand: f.
        num_selected: None for n - 2f; code of others takes n - 2f - 2.
        rescored: Whether the rest score anew after each choice; else the best of one scoring count.

    .. [1] El Mhamdi, Guerraoui and Rouault, ICML 2018, section 4. https://arxiv.org/abs/1802.07927
    """

    num_byzantine: int
    num_selected: int | None = None
    rescored: bool = True

    def __post_init__(self) -> None:
        at_least(0, self, num_byzantine=self.num_byzantine)
        at_least(1, self, num_selected=self.num_selected)

    def check_cohort(self, num_messages: int) -> None:
        """Refuse a round of too few."""
        n, f, chosen = num_messages, self.num_byzantine, self.num_selected
        refuse_fewer(self, n, 4 * f + 3, "4f + 3", "lower num_byzantine")
        if chosen is not None and not 2 * f < chosen <= n - f:
            raise ValueError(
                f"{self!r} needs num_selected above {2 * f} (2f) and up to {n - f} (n - f), for a "
                f"cohort of {n}; it is {chosen}: change num_selected"
            )

    def __call__(self, messages: Sequence[Clear], *, verdict: Verdict | None = None) -> Tensor:
        n, f = len(messages), self.num_byzantine
        self.check_cohort(n)
        num_selected = self.num_selected or n - 2 * f
        matrix, squared = measured(messages)
        if self.rescored:
            best = picked(squared, f, num_selected)
        else:
            best = ranked(squared, n - f - 2)[:num_selected]
        if verdict is not None:
            verdict.flag(set(range(n)) - set(best))
        num_central = num_selected - 2 * f
        return each_column(
            matrix, lambda ordered: mean_near_middle(ordered, num_central), torch.tensor(best)
        )

"""Nothing forged: one honest client, over and over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from turncoat.messages import Update, rows, with_rows
from turncoat.stage import Memory
from turncoat.validate import at_least
from turncoat.views import CoalitionView


@dataclass(frozen=True)
class Mimic:
    """Copy the honest client that goes furthest along the direction of most variance [1]_. A forge.

    What is over-represented cannot be told from an honest client: rules that take the unlike for
    the false then lose all others, where data are not alike. The direction follows Oja's rule over
    the first rounds, in which the client that is furthest so far is copied; then the choice is
    fixed, if the coalition can know who is who: as long as as many are known.

    Differs from the paper: a client is known by its place among the known, so that the choice means
    someone else where cohorts are sampled. The paper does not say how long the first phase is.

    .. [1] Karimireddy et al., ICLR 2022.
       https://arxiv.org/abs/2006.09365
    """

    num_warm_up_rounds: int = 10

    def __post_init__(self) -> None:
        at_least(1, self, num_warm_up_rounds=self.num_warm_up_rounds)

    def __call__(
        self,
        view: CoalitionView[Update],
        *,
        rng: Generator,
        memory: Memory[dict[str, Any] | None],
    ) -> Sequence[Update]:
        known, last = rows(view.known), memory.last(None)
        if last is None or len(last["totals"]) != len(known):
            start = torch.randn(known.shape[1], generator=rng).to(known)
            last = {
                "round": 0,
                "mean": torch.zeros_like(start),
                "direction": start / start.norm(),
                "totals": known.new_zeros(len(known)),
            }
        if last["round"] < self.num_warm_up_rounds:
            last = _follow(last, known)
        memory.keep(last)
        chosen = int(last["totals"].abs().argmax())
        return with_rows(view.own, known[chosen].expand(len(view.own), -1))


def _follow(last: dict[str, Any], known: Tensor) -> dict[str, Any]:
    """Return mean, direction and every client's way along it, one round later (Oja's rule)."""
    t = last["round"]
    mean = (t * last["mean"] + known.mean(dim=0)) / (t + 1)
    old = last["direction"]
    along = known @ old - mean @ old
    new = (t * old + along @ known - along.sum() * mean) / (t + 1)
    length = float(new.norm())
    direction = new / length if length > 0 else old
    return {
        "round": t + 1,
        "mean": mean,
        "direction": direction,
        "totals": last["totals"] + known @ direction,
    }

"""The same way in every round, so that no round undoes another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, sqrt
from statistics import NormalDist
from typing import Any

import torch
from torch import Generator, Tensor

from turncoat.messages import Update, with_rows
from turncoat.stage import Memory
from turncoat.validate import at_least, fraction, positive
from turncoat.views import CoalitionView

_TINY = 1e-30


@dataclass(frozen=True)
class PoisonedFL:
    """Send steps of fixed random signs, as long as the model's last step bears [1]_. A forge.

    ``c |g| v s``: s are signs drawn once; g is the last step of the global model; v, of length 1,
    is how far g departs in each coordinate from the last forged update, made as long as g. Every
    ``num_rounds`` rounds the model's way since then is tested for those signs: are no more of them
    there than chance would give, c shrinks. Neither honest updates nor a rule need be known.

    Differs from the paper: members are clients that turned, not fake ones, and send zeros only in
    the coalition's first round, like those; coordinates that never moved are left out of the test;
    g is what happened since the coalition acted last.

    Args:
        scale: c at first.
        num_rounds: Between two tests.
        decay: What c is multiplied by after a failed test, unless it would fall below ``floor``.
        significance: Of the test, a binomial one.

    .. [1] Xie, Fang & Gong, CVPR 2025; details as in a port of its code. https://arxiv.org/abs/2404.15611
    """

    scale: float = 8.0
    num_rounds: int = 50
    decay: float = 0.7
    floor: float = 0.5
    significance: float = 0.01

    def __post_init__(self) -> None:
        positive(self, scale=self.scale, decay=self.decay, significance=self.significance)
        at_least(1, self, num_rounds=self.num_rounds)
        at_least(0, self, floor=self.floor)
        fraction(self, decay=self.decay, significance=self.significance)

    def __call__(
        self,
        view: CoalitionView[Update],
        *,
        rng: Generator,
        memory: Memory[dict[str, Any] | None],
    ) -> Sequence[Update]:
        now, last = view.before, memory.last(None)
        if last is None:
            signs = (torch.rand(now.shape, generator=rng) < 0.5).to(torch.int8) * 2 - 1
            signs, forged = signs.to(now.device), torch.zeros_like(now)
            last = {"signs": signs, "scale": self.scale, "anchor": now.clone(), "round": view.round}
        else:
            last = dict(last)
            if view.round - last["round"] >= self.num_rounds:
                if not self.succeeds(now - last["anchor"], last["signs"]):
                    smaller = last["scale"] * self.decay
                    last["scale"] = smaller if smaller >= self.floor else last["scale"]
                last |= {"anchor": now.clone(), "round": view.round}
            forged = _next(now - last["before"], last["forged"], last["scale"]) * last["signs"]
        memory.keep(last | {"before": now.clone(), "forged": forged})
        return with_rows(view.own, forged.expand(len(view.own), -1))

    def succeeds(self, way: Tensor, signs: Tensor) -> bool:
        """Say whether more coordinates went with their sign than chance would have them."""
        moved = int((way != 0).sum())
        with_it = int(((way.sign() * signs) > 0).sum())
        return with_it >= critical_count(moved, self.significance)


def critical_count(num_signs: int, significance: float) -> int:
    """Return how many of so many fair coins show heads in all but this share of the cases.

    >>> critical_count(1_204_682, 0.01)
    603618
    """
    quantile = NormalDist().inv_cdf(1 - significance)
    return ceil(num_signs / 2 + quantile * sqrt(num_signs) / 2 - 0.5)


def _next(step: Tensor, forged: Tensor, scale: float) -> Tensor:
    """Return the next magnitudes. Shape: ``(num_params,)``, none below 0."""
    length = step.norm()
    departs = (step - forged * (length / forged.norm().clamp(min=_TINY))).abs()
    made: Tensor = departs * (scale * length / departs.norm().clamp(min=_TINY))
    return made

"""The weighted mean: the one rule that needs no more than a sum."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from statistics import median
from typing import Any

from torch import Tensor

from turncoat.messages import Clear, Revealed, Summable
from turncoat.validate import positive

_JUDGED = 128  # messages that settle what a usual weight is


@dataclass(frozen=True)
class Mean:
    """Weighted mean [1]_. Linear, so it works on any message that can be summed, one at a time.

    A sum that the server cannot open is handed back as it is: the clients open it.

    Differs from the paper: a claimed weight counts for at most ``max_weight_ratio`` times the
    median claim of the first 128 messages, for a traitor may claim any. Under masks the rule
    cannot see to it, and the channel's own cap binds the honest only.

    .. [1] McMahan et al., AISTATS 2017. https://arxiv.org/abs/1602.05629
    """

    max_weight_ratio: float = 10.0

    def __post_init__(self) -> None:
        positive(self, max_weight_ratio=self.max_weight_ratio)

    def __call__(self, messages: Iterable[Summable]) -> Tensor | Summable:
        parts: Iterator[Any] = iter(messages)
        judged = list(islice(parts, _JUDGED))
        if not judged:
            raise ValueError(f"{self!r} needs at least 1 message; the cohort has 0: sample more")
        every = chain(judged, parts)
        if isinstance(judged[0], Clear):
            cap = self.max_weight_ratio * median(m.weight for m in judged)
            every = (m if m.weight <= cap else replace(m, weight=cap) for m in every)  # type: ignore[assignment]
            if isinstance(messages, list):
                every = list(every)  # type: ignore[assignment]
        total = type(judged[0]).total(every)
        return total.open() if isinstance(total, Revealed) else total

"""Averaging small random groups of updates, before a rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor

from turncoat.columns import filled
from turncoat.messages import Clear
from turncoat.stage import Aggregate, Verdict, call, within
from turncoat.stages.aggregate.coordinatewise import refuse_fewer
from turncoat.stages.aggregate.geometry import finite_rows
from turncoat.validate import at_least


@dataclass(frozen=True)
class Bucketing:
    """Shuffle the updates, average every ``size`` of them, then do as ``inner`` [1]_.

    Lessens what heterogeneous data cost a robust rule. ``inner`` sees n / size buckets, rounded up,
    and as many forged ones as there were forged messages. Claimed weights are ignored; a message
    that is not finite counts as 0. Where ``inner`` flags a bucket, all in it are flagged.

    Args:
        size: How many updates a bucket holds: s. The last may hold fewer.

    .. [1] Karimireddy, He and Jaggi, ICLR 2022, algorithm 1. https://arxiv.org/abs/2006.09365
    """

    inner: Aggregate[Clear]
    size: int = 2
    withholds = frozenset({"cohort"})  # a bucket is nobody

    def __post_init__(self) -> None:
        at_least(1, self, size=self.size)

    def check_cohort(self, num_messages: int) -> None:
        """Refuse a round whose buckets are too few for ``inner``."""
        refuse_fewer(self, num_messages, 1, "a bucket of none", "sample more clients")
        for stage in within(self.inner):
            if hasattr(stage, "check_cohort"):
                stage.check_cohort(-(-num_messages // self.size))

    def __call__(
        self,
        messages: Sequence[Clear],
        *,
        rng: Generator,
        verdict: Verdict | None = None,
        **offers: Any,
    ) -> Tensor:
        self.check_cohort(len(messages))
        matrix = finite_rows(messages)
        buckets = torch.split(torch.randperm(len(messages), generator=rng), self.size)
        share = matrix.new_zeros(len(buckets), len(matrix))
        for i, bucket in enumerate(buckets):
            share[i, bucket] = 1 / len(bucket)
        means = matrix.new_empty(len(buckets), matrix.shape[1])
        filled(means, lambda where: share @ matrix[:, where])
        sent = [replace(messages[0], delta=row, weight=1.0) for row in means]
        seen = Verdict()
        step: Tensor = call(self.inner, sent, rng=rng, verdict=seen, **offers)
        if verdict is not None:
            for i in seen.flagged:
                verdict.flag(buckets[i].tolist())
        return step

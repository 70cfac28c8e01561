"""Trust in what points the way that the server's own clean data point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from turncoat.messages import Clear, Update
from turncoat.stage import Memory, Train, Verdict, call
from turncoat.stages.aggregate.geometry import combined, finite_rows, lengths, products
from turncoat.stages.aggregate.layers import num_parameters
from turncoat.task import Batch, Model
from turncoat.validate import at_least


@dataclass(frozen=True)
class FLTrust:
    """Average updates, cut or stretched to the server's own, by their cosine with it [1]_.

    The server trains ``root`` on some of the public data. An update that points away from that has
    no trust; if none has any, the model stays as it is. Public data must be clean, and look like
    the clients'. Claimed weights are ignored. Memory: that of ``root``.

    Differs from the paper: buffers of the model (running statistics) are those of the root update,
    for stretching could make a variance negative.

    Args:
        root: How the server trains; as the clients do.
        num_root: How many public records, evenly spaced; None for all.

    .. [1] Cao et al., NDSS 2021, algorithm 2. https://arxiv.org/abs/2012.13995
    """

    root: Train[Update]
    num_root: int | None = 100
    withholds = frozenset({"envelope"})  # the server sends itself nothing

    def __post_init__(self) -> None:
        at_least(1, self, num_root=self.num_root)

    def __call__(
        self,
        messages: Sequence[Clear],
        *,
        model: Model,
        before: Tensor,
        public: Batch | None,
        rng: Generator,
        memory: Memory[Any],
        verdict: Verdict,
    ) -> Tensor:
        matrix = finite_rows(messages)
        mine: Update = call(
            self.root,
            model,
            before,
            self._clean(public),
            rng=rng,
            memory=memory.inner,
            public=public,
        )
        size = num_parameters(model, mine.delta)
        inside, guide = matrix[:, :size], mine.delta[:size]
        sizes, length = lengths(inside), float(lengths(guide[None])[0])
        safe = torch.where(sizes > 0, sizes, 1.0)
        trust = (products(inside, guide) / (safe * (length or 1.0))).clamp(min=0)
        verdict.flag((trust <= 0).nonzero().flatten().tolist())
        total = float(trust.sum())
        if not total:
            return torch.zeros_like(matrix[0])
        step = combined(trust / total * length / safe, inside)
        return torch.cat([step, mine.delta[size:]])

    def _clean(self, public: Batch | None) -> Batch:
        if public is None or not len(public[1]):
            raise ValueError(f"{self!r} needs public data, and the task has none: give it some")
        inputs, labels = public
        count = min(len(labels), self.num_root or len(labels))
        chosen = torch.linspace(0, len(labels) - 1, count).round().long().to(labels.device)
        return inputs[chosen], labels[chosen]

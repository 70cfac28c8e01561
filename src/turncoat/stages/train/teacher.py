"""A client that sends votes instead of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn.functional import one_hot

from turncoat.messages import Update, Votes
from turncoat.stage import Memory, Train, call
from turncoat.stages.begin.unanswered import answers_due
from turncoat.task import Batch, Model


@dataclass(frozen=True)
class Teacher:
    """Train a model of one's own as ``inner`` does, and vote on the public examples: PATE [1]_.

    The model never leaves its client: from round to round it is trained on, from a start of its
    own. What is sent is one class for each public example, so each client is one teacher; no
    record may lie with two of them. The labels of the public examples are not looked at.

    Formal guarantee: none by itself. The noise is ``GNMax``'s.

    .. [1] Papernot et al., ICLR 2017, section 2.1. https://arxiv.org/abs/1610.05755
    """

    inner: Train[Update]
    mixes_clients = False

    def __call__(
        self,
        model: Model,
        start: Tensor,
        data: Batch,
        *,
        rng: Generator,
        memory: Memory[Tensor | None],
        public: Batch | None,
        **offers: Any,
    ) -> Votes:
        num, num_classes = answers_due(self, model, public)
        assert public is not None
        mine = memory.last(None)
        if mine is None:
            mine = model.initial(rng).to(start)
        update: Update = call(
            self.inner, model, mine, data, rng=rng, memory=memory.inner, public=public, **offers
        )
        mine = memory.keep(mine + update.delta)
        assert mine is not None
        with torch.no_grad():
            parts = [model.logits(mine, some) for some in torch.split(public[0], 1_000)]
        votes = one_hot(torch.cat(parts).argmax(dim=1), num_classes)
        return Votes(votes.to(start).reshape(num * num_classes), 1.0)

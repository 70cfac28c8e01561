"""Gradient pruning: only the largest changes leave the client."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from turncoat.messages import Update
from turncoat.params import Layout
from turncoat.stage import Memory, Train, call
from turncoat.stages.train.compressed import Compressed
from turncoat.task import Batch, Model
from turncoat.validate import fraction


@dataclass(frozen=True)
class GradientPruning:
    """Train as ``inner`` does, then set all but the largest changes to zero [1]_ [2]_.

    Of each tensor the same share goes, and one entry at least stays. Made to save bytes; how much
    it hides must be asked of an attacker who leaves the zeros out of its comparison
    (``objective = "kept"``), for one who takes them for small gradients is easily fooled.

    No formal guarantee. Running statistics are sent as they are.

    Differs from the paper: the change of a whole round is pruned, not the gradient of each step;
    nothing warms up, and momentum is not corrected.

    Args:
        sparsity: The share that is set to zero.
        feedback: Whether what is left out is kept, and added to the next round's change: it costs
            the model less, and in the end gives away what it kept back.

    .. [1] Zhu et al., NeurIPS 2019, section 5.2. https://arxiv.org/abs/1906.08935
    .. [2] Lin et al., ICLR 2018, algorithm 1. https://arxiv.org/abs/1712.01887
    """

    sparsity: float
    inner: Train[Update]
    feedback: bool = False
    mixes_clients = False

    def __post_init__(self) -> None:
        fraction(self, sparsity=self.sparsity)
        if self.sparsity == 1:
            raise ValueError("GradientPruning: sparsity must be below 1, or nothing is sent")

    def __call__(
        self, model: Model, start: Tensor, data: Batch, *, memory: Memory[Tensor], **offers: Any
    ) -> Update:
        payload: Update = call(self.inner, model, start, data, memory=memory.inner, **offers)
        whole = payload.delta
        if self.feedback:
            whole = whole + memory.last(torch.zeros_like(whole))
        sent = pruned(whole, model.layout, self.sparsity)
        if self.feedback:
            memory.keep(whole - sent)
        return Compressed(sent, payload.weight)


def pruned(delta: Tensor, layout: Layout, sparsity: float) -> Tensor:
    """Return a change of which only the largest entries of each tensor are left."""
    sent = delta.clone()
    for slot in layout.slots:
        if slot.trainable:
            here = sent[slot.start : slot.stop]
            dropped = min(round(sparsity * len(here)), len(here) - 1)
            here[here.abs().argsort(stable=True)[:dropped]] = 0
    return sent

"""Against many puppets of one master: those who always say the same count as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from turncoat.messages import Clear
from turncoat.stage import Memory, Verdict
from turncoat.stages.aggregate.geometry import combined, cosines, gram, sound_rows
from turncoat.stages.aggregate.layers import last_layer
from turncoat.task import Model
from turncoat.validate import one_of, positive

_CAP = 0.99  # of a weight, before its logit is taken

Features = Literal["last-layer", "all"]


@dataclass(frozen=True)
class FoolsGold:
    """Weigh each client by how unlike all others its updates have been so far [1]_.

    For data that differ between clients; where they are alike, honest clients are put down as
    puppets of each other. A single attacker passes: nobody is like it. No length is bounded: put
    ``NormBound`` around it. Claimed weights are ignored. Memory: the sum of each client's updates.

    Differs from the paper: the weighted sum is divided by the number of messages, so that equal
    weights give the mean; a message that is not finite, or ten thousand times as long as the
    median, counts as 0. The paper weighs indicative features by their size in the model; here the
    last layer's weights stand for them.

    Args:
        features: What is compared: the weights of the last layer, or everything.
        confidence: The slope of the logit: kappa.

    .. [1] Fung et al., RAID 2020, algorithm 1. https://arxiv.org/abs/1808.04866
    """

    features: Features = "last-layer"
    confidence: float = 1.0

    def __post_init__(self) -> None:
        positive(self, confidence=self.confidence)
        one_of(Features, self, features=self.features)

    def __call__(
        self,
        messages: Sequence[Clear],
        *,
        cohort: tuple[int, ...],
        memory: Memory[dict[int, Tensor]],
        model: Model,
        verdict: Verdict,
    ) -> Tensor:
        matrix = sound_rows(messages)
        where = slice(None)
        if self.features == "last-layer":
            slot = last_layer(model, self, matrix[0])
            where = slice(slot.start, slot.stop)
        past = memory.last({})
        sums = [
            past[client].to(row) + row if client in past else row.clone()
            for client, row in zip(cohort, matrix[:, where], strict=True)
        ]
        memory.keep(past | dict(zip(cohort, sums, strict=True)))
        weights = unlikeness(cosines(gram(torch.stack(sums))), self.confidence)
        verdict.flag((weights == 0).nonzero().flatten().tolist())
        return combined(weights / len(matrix), matrix)


def unlikeness(cosine: Tensor, confidence: float = 1.0) -> Tensor:
    """Return each client's weight, of the cosines of their histories. Shape: ``(n,)``."""
    like = cosine.clone().fill_diagonal_(0.0)
    most = like.max(dim=1).values
    pardoned = most[:, None] < most  # i is less like anyone than j is: j is the puppet
    like = torch.where(pardoned, like * most[:, None] / most.clamp(min=1e-12), like)
    weight = (1 - like.max(dim=1).values).clamp(0, 1)
    if not bool(weight.any()):
        return weight
    weight = (weight / weight.max()).clamp(max=_CAP)
    return (confidence * (torch.logit(weight) + 0.5)).clamp(0, 1)

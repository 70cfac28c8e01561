"""Poisoned records leave a trace in the spectrum of their class."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from turncoat.activations import features
from turncoat.messages import Envelope
from turncoat.stage import Verdict
from turncoat.stages.prepare.suspects import by_class, in_order, without
from turncoat.task import Batch, Model
from turncoat.validate import at_least, fraction


@dataclass(frozen=True)
class SpectralSignatures:
    """Drop the records of each class that lie furthest along its main direction [1]_.

    Of n records in a class, ``1.5 * epsilon * n`` are dropped, poisoned or not: that is the price
    where nobody attacks. The representations are those of the global model as it was received;
    they tell the poison only once that model has learnt the backdoor.

    Differs from the paper: the model was trained by all clients, and goes on training.

    Args:
        epsilon: The largest part of a class that an attacker is thought to have planted.
        from_round: The first round in which anything is dropped; rounds count from 0.
        min_examples: Classes with fewer records are left alone.

    .. [1] Tran, Li and Madry, NeurIPS 2018, algorithm 1. https://arxiv.org/abs/1811.00636
    """

    epsilon: float = 0.1
    from_round: int = 1
    min_examples: int = 10

    def __post_init__(self) -> None:
        fraction(self, epsilon=self.epsilon)
        at_least(0, self, from_round=self.from_round)
        at_least(2, self, min_examples=self.min_examples)
        if self.epsilon > 0.5:
            raise ValueError(
                f"SpectralSignatures: epsilon must be within 0 and 0.5; it is {self.epsilon}: more "
                "would drop most of every class"
            )

    def __call__(
        self, data: Batch, *, model: Model, start: Tensor, envelope: Envelope, verdict: Verdict
    ) -> Batch:
        inputs, labels = data
        suspects = torch.zeros(len(labels), dtype=torch.bool, device=inputs.device)
        if envelope.round >= self.from_round and len(labels):
            representations = features(model, start, inputs)
            for chosen in by_class(labels, self.min_examples):
                suspects[chosen] = self.suspects(representations[chosen])
        return without(data, suspects, verdict)

    def suspects(self, representations: Tensor) -> Tensor:
        """Say which records of one class are suspected. Shape: ``(n, width)`` to ``(n,)``.

        Their order does not matter; records that are all alike are not suspected.
        """
        order = in_order(representations)
        rows = representations[order].double()
        centred = rows - rows.mean(dim=0)
        answer = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        if centred.norm() > 1e-6 * rows.norm():
            main = torch.linalg.svd(centred, full_matrices=False).Vh[0]
            scores = (centred @ main).square()
            num = int(1.5 * self.epsilon * len(rows))
            answer[order[scores.argsort(descending=True, stable=True)[:num]]] = True
        return answer

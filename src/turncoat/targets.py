"""Dishonest stages that are told which records their attack is about, before the first round."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from turncoat.messages import Update
from turncoat.stage import Broadcast, Train, call
from turncoat.task import Batch, Model


@dataclass(frozen=True, eq=False)
class AimedBroadcast:
    """A malicious server's broadcast that knows its targets."""

    stage: Broadcast
    inputs: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)

    def __call__(self, params: Tensor, **offers: Any) -> Tensor:
        targets = _at(params, self.inputs, self.labels)
        sent: Tensor = call(self.stage, params, **offers | {"targets": targets})
        return sent


@dataclass(frozen=True, eq=False)
class AimedTrain:
    """A dishonest client's training that knows its targets."""

    stage: Train[Update]
    inputs: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)

    def __call__(self, model: Model, start: Tensor, data: Batch, **offers: Any) -> Update:
        targets = _at(start, self.inputs, self.labels)
        payload: Update = call(self.stage, model, start, data, **offers | {"targets": targets})
        return payload


def targets_of(question: Any) -> Batch:
    """Return the records that a question is about: those asked about, and those known.

    Raises:
        TypeError: If it is about none.
    """
    batches = [getattr(question, "candidates", None)]
    if (known := getattr(question, "known", None)) is not None:
        batches.append(known.records)
    if batches[0] is None:
        raise TypeError(
            f"{type(question).__name__} asks about no records that could be raised: let the attack "
            "play a game that grants 'candidates', such as membership"
        )
    inputs, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return inputs, labels


def _at(params: Tensor, inputs: Tensor, labels: Tensor) -> Batch:
    return inputs.to(params.device), labels.to(params.device)

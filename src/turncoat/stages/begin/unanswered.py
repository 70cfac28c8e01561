"""A state that is no model: answers to the public examples, none of which is given yet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from turncoat.task import Batch, Model, Task


@dataclass(frozen=True)
class Unanswered:
    """Begin PATE: zeros for each class of each public example. Teachers' votes move them."""

    answers = True

    def __call__(self, task: Task) -> Tensor:
        num, num_classes = answers_due(self, task.model, task.public)
        return torch.zeros(num * num_classes)


def answers_due(owner: Any, model: Model, public: Batch | None) -> tuple[int, int]:
    """Return how many public examples there are to answer, and of how many classes.

    Raises:
        ValueError: If there are no public examples, or the model does not tell classes apart.
    """
    name = type(owner).__name__
    if public is None or not len(public[0]):
        raise ValueError(
            f"{name} needs public examples to ask about, but the task has none: give it some "
            "(public_size)"
        )
    with torch.no_grad():
        outputs = model.logits(torch.zeros(model.layout.num_params), public[0][:1])
    if outputs.dim() != 2:
        raise ValueError(
            f"{name} needs a classifier, but the model gives outputs of the shape "
            f"{tuple(outputs.shape[1:])} for an example: take another task"
        )
    return len(public[0]), outputs.shape[1]

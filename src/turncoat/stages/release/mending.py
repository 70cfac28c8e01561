"""What a model is mended by: data that are known to be clean."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from turncoat.task import Batch, Model, accuracy


def trusted(owner: Any, public: Batch | None) -> Batch:
    """Return the public data, or refuse to do without."""
    if public is None or not len(public[1]):
        raise ValueError(
            f"{type(owner).__name__} mends a model by clean data, but the task has no public data: "
            "give it some (public_size), or release the model as it is"
        )
    return public


def share_right(model: Model, params: Tensor, data: Batch) -> float:
    """Return the accuracy on some data."""
    inputs, labels = data
    with torch.no_grad():
        outputs = [model.logits(params, some) for some in torch.split(inputs, 1_000)]
        return float(accuracy(torch.cat(outputs), labels).mean())

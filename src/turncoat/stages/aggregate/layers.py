"""Where in a vector the parameters end, and where the last layer lies."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from turncoat.params import Slot
from turncoat.task import Model


def num_parameters(model: Model, like: Tensor) -> int:
    """Return how many entries are parameters; behind them come buffers. Logits have none."""
    layout = model.layout
    return layout.num_trainable if len(like) == layout.num_params else len(like)


def last_layer(model: Model, owner: object, like: Tensor) -> Slot:
    """Return the slot of the last weight matrix: one row per class in a classifier."""
    found = [s for s in model.layout.slots if s.trainable and len(s.shape) >= 2]
    if not found or len(like) != model.layout.num_params:
        what = "the model has no weight matrix" if not found else "what is sent is no update of it"
        raise ValueError(f"{owner!r} looks at the model's last layer, but {what}: use another rule")
    return found[-1]


def noise(like: Tensor, std: float, model: Model, rng: Generator) -> Tensor:
    """Return Gaussian noise for the parameters, and 0 for buffers. Shape: that of ``like``."""
    drawn, size = torch.zeros(len(like)), num_parameters(model, like)
    drawn[:size] = std * torch.randn(size, generator=rng)
    return drawn.to(like)

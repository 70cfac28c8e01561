"""What flows inside a model: what one of its layers reads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from turncoat.task import Model

_CHUNK = 1_000


def features(model: Model, params: Tensor, inputs: Tensor) -> Tensor:
    """Return the last hidden activations: what the last linear layer reads.

    In evaluation mode. Shape: ``(examples, width)``.

    Raises:
        ValueError: If the model has no linear layer.
    """
    layers = [n for n, m in model.module.named_modules() if isinstance(m, nn.Linear)]
    if not layers:
        raise ValueError(
            f"{type(model.module).__name__} has no linear layer, whose inputs are its features: "
            "choose a model that ends with one"
        )
    return read_by(layers[-1], model, params, inputs).flatten(1)


def read_by(layer: str, model: Model, params: Tensor, inputs: Tensor) -> Tensor:
    """Return what the layer of that name reads, in evaluation mode. Shape: ``(examples, ...)``."""
    seen: list[Tensor] = []
    hook = model.module.get_submodule(layer).register_forward_pre_hook(
        lambda _, given: seen.append(given[0].detach())
    )
    try:
        with torch.no_grad():
            for some in torch.split(inputs, _CHUNK):
                model.logits(params, some)
    finally:
        hook.remove()
    return torch.cat(seen)

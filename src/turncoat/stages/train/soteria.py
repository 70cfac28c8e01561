"""Soteria: what a dense layer's gradient says of the features that it reads is perturbed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from turncoat.messages import Update
from turncoat.stage import Train, call
from turncoat.stages.train.compressed import Compressed
from turncoat.task import Batch, Model
from turncoat.validate import fraction

_EXAMPLES = 64  # whose features are looked at at a time
_FEATURES = 32  # whose slopes are taken at a time


@dataclass(frozen=True)
class Soteria:
    """Train as ``inner`` does, then hide the features by which the input is most easily found [1]_.

    The gradient of a dense layer holds its input times something: with it, a representation of the
    data. The features ``r_i`` whose ``|r_i| / ||dr_i/dx||`` is largest (a small change of them
    stands for a large one of the input) are taken for zero in that layer's gradient alone; all
    other layers are sent as they are, so that little is lost. An attacker who leaves that layer
    out (``objective = "kept"``) is hardly hindered [2]_.

    No formal guarantee.

    Differs from the paper: the score is taken at the state that was received and summed over the
    client's records, and the mask is laid on the change of the round once, where the paper has one
    for each batch; each record is looked at alone, in evaluation mode.

    Args:
        share: Of the features, to be hidden.
        layer: The name of the dense layer; None for the first that reads no raw input.

    .. [1] Sun et al., CVPR 2021. https://arxiv.org/abs/2012.06043
    .. [2] Balunović et al., ICLR 2022. https://arxiv.org/abs/2111.04706
    """

    share: float
    inner: Train[Update]
    layer: str | None = None
    mixes_clients = False

    def __post_init__(self) -> None:
        fraction(self, share=self.share)

    def __call__(self, model: Model, start: Tensor, data: Batch, **offers: Any) -> Update:
        payload: Update = call(self.inner, model, start, data, **offers)
        name = self.layer if self.layer is not None else first_reader(model.module)
        slot = next((s for s in model.layout.slots if s.name == f"{name}.weight"), None)
        if slot is None or not isinstance(model.module.get_submodule(name), nn.Linear):
            raise ValueError(f"{self!r}: there is no dense layer {name!r}: name one, or none")
        scores = leaks(model, start, data[0], name)
        hidden = scores.argsort(descending=True, stable=True)[: round(self.share * len(scores))]
        sent = payload.delta.clone()
        sent[slot.start : slot.stop].view(slot.shape)[:, hidden] = 0
        return Compressed(sent, payload.weight)


def leaks(model: Model, start: Tensor, inputs: Tensor, layer: str) -> Tensor:
    """Return the sum over records of ``|r_i| / ||dr_i/dx||``. Shape: ``(features,)``.

    A feature without slope says nothing of the input, and scores zero.
    """
    seen: list[Tensor] = []
    reader = model.module.get_submodule(layer)
    hook = reader.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    total = torch.zeros(0)
    try:
        for some in torch.split(inputs, _EXAMPLES):
            images = some.detach().clone().requires_grad_()
            seen.clear()
            model.logits(start.detach(), images)
            features = seen[-1].flatten(1)
            slopes = torch.cat(
                [
                    _slopes(features, images, torch.arange(i, min(i + _FEATURES, width)))
                    for width in [features.shape[1]]
                    for i in range(0, width, _FEATURES)
                ],
                dim=1,
            )
            leak = torch.where(slopes > 0, features.abs() / slopes.clamp(min=1e-12), 0.0)
            found = leak.detach().sum(dim=0)
            total = total + found if total.numel() else found
    finally:
        hook.remove()
    return total


def _slopes(features: Tensor, images: Tensor, which: Tensor) -> Tensor:
    """Return the length of each feature's gradient at each record. Shape: ``(records, which)``."""
    chosen = torch.zeros(len(which), *features.shape, device=features.device)
    chosen[torch.arange(len(which)), :, which] = 1
    (found,) = torch.autograd.grad(
        features, images, chosen, retain_graph=True, is_grads_batched=True
    )
    lengths: Tensor = found.flatten(2).norm(dim=2).T
    return lengths


def first_reader(module: nn.Module) -> str:
    """Return the name of the first dense layer that does not read the raw input."""
    every: list[tuple[str, nn.Module]] = list(module.named_modules())
    learnt = [name for name, layer in every if any(True for _ in layer.parameters(False))]
    for name in learnt[1:]:
        if isinstance(module.get_submodule(name), nn.Linear):
            return name
    raise ValueError(
        "Soteria needs a dense layer that reads what others made of the input; this model has "
        "none: use a model that has, as ConvNet or an MLP with a hidden layer"
    )

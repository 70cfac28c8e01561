"""A backdoor in code: the supplier of a loss sees no data and no model, and needs none."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from turncoat.attacks.backdoor.mgda import mgda_weights
from turncoat.attacks.backdoor.steering import Steered, SteeredLearner
from turncoat.attacks.backdoor.triggers import Trigger
from turncoat.task import Batch, Model
from turncoat.validate import at_least, nearest, positive

Norm = Literal["none", "l2", "loss", "loss+"]
_NORMS = ("none", "l2", "loss", "loss+")
_CAP = 10.0  # of the norms that are losses
_MEMORY = 0.9  # of the running loss, from batch to batch


@dataclass(frozen=True, kw_only=True)
class BlindBackdoor:
    """Hand out code whose training learns a second task: take the trigger for ``target`` [1]_.

    Worn at code, at the seat of a supplier: whoever trains with the model does so honestly. Each
    batch is learnt as it is and with the trigger, at weights that make the longest step that
    helps both (MGDA). ``loss`` and ``gradient`` of the model are poisoned like its ``learner``; a
    training that takes single examples' gradients (DPSGD) is refused.

    Differs from the paper: the running loss begins anew with each local training, for the code
    keeps nothing; ``loss`` and ``gradient``, which know one batch, compare that batch's loss. There
    is no third task to evade a defence by.

    Args:
        norm: What each task's gradient is divided by before they are weighed: nothing, its length,
            its loss, or both (the last two at most 10).
        threshold: Attack where the running loss is below; None for always.

    .. [1] Bagdasaryan and Shmatikov, USENIX Security 2021, sections 3 and 4.
       https://arxiv.org/abs/2005.03823
    """

    trigger: Trigger
    target: int
    norm: Norm = "loss+"
    threshold: float | None = None

    def __post_init__(self) -> None:
        at_least(0, self, target=self.target)
        positive(self, threshold=self.threshold)
        if self.norm not in _NORMS:
            raise ValueError(
                f"BlindBackdoor: there is no norm {self.norm!r}; {nearest(self.norm, _NORMS)}"
            )

    def __call__(self, model: Model) -> Model:
        steer = partial(_Blended, code=self)
        return _Poisoned(model.build, model.criterion, steer=steer, base=model, code=self)

    def planted(self, data: Batch) -> Batch:
        """Return the batch of the second task."""
        return self.trigger(data[0]), torch.full_like(data[1], self.target)

    def weights(self, gradients: Tensor, losses: Tensor) -> Tensor:
        """Return each task's weight. Shapes: ``(tasks, d)`` and ``(tasks,)``."""
        lengths = gradients.double().norm(dim=1)
        scale = {
            "none": torch.ones_like(lengths),
            "l2": lengths,
            "loss": losses.double().clamp(max=_CAP),
            "loss+": (losses.double() * lengths).clamp(max=_CAP),
        }[self.norm]
        return mgda_weights(gradients / scale.clamp(min=1e-12)[:, None].to(gradients))

    def attacks(self, loss: Tensor) -> bool:
        return self.threshold is None or float(loss.detach()) < self.threshold


@dataclass(frozen=True)
class _Poisoned(Steered):
    """A model whose loss has two tasks wherever it has to do with training."""

    _: KW_ONLY
    code: BlindBackdoor = field(compare=False)

    def loss(self, params: Tensor, data: Batch) -> Tensor:
        """Return the blended loss; the honest one where nothing is differentiated."""
        honest = self.base.loss(params, data)
        if not honest.requires_grad or not self.code.attacks(honest):
            return honest
        losses = torch.stack([honest, self.base.loss(params, self.code.planted(data))])
        slopes = [torch.autograd.grad(loss, params, retain_graph=True)[0] for loss in losses]
        weights = self.code.weights(torch.stack(slopes).detach(), losses.detach())
        return weights.to(losses) @ losses


class _Blended(SteeredLearner):
    """Fills the gradient with that of both tasks."""

    def __init__(self, model: Model, start: Tensor, *, code: BlindBackdoor) -> None:
        super().__init__(model, start, owner=code)
        self._code = code
        self._running: Tensor | None = None

    def backward(self, data: Batch) -> Tensor:
        code = self._code
        loss = super().backward(data)
        last = loss if self._running is None else self._running
        self._running = _MEMORY * last + (1 - _MEMORY) * loss
        if not code.attacks(self._running):
            return loss
        honest = self.grad.clone()
        losses = torch.stack([loss, super().backward(code.planted(data))])
        weights = code.weights(torch.stack([honest, self.grad]), losses)
        honest_weight, planted_weight = weights.tolist()
        self.grad.mul_(planted_weight).add_(honest, alpha=honest_weight)
        return weights.to(losses) @ losses

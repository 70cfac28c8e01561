"""Local training rules."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Generator, Tensor

from turncoat.messages import Clear, Update
from turncoat.stage import Train, call
from turncoat.task import Batch, Model
from turncoat.validate import at_least, fraction, positive

C = TypeVar("C", bound=Clear)


@dataclass(frozen=True)
class LocalSGD:
    """``num_epochs`` passes of SGD over the client's data, reshuffled each time: FedAvg [1]_.

    Momentum is the heavy ball of PyTorch's ``SGD``, and starts at zero in each round.

    Args:
        lr: The step size.
        batch_size: Examples in a step; None for all of them. The last batch may be smaller.
        num_steps: How many steps to take at most, over as many epochs as that needs: instead of
            ``num_epochs``.

    .. [1] McMahan et al., AISTATS 2017, algorithm 1. https://arxiv.org/abs/1602.05629
    """

    lr: float
    num_epochs: int | None = None
    batch_size: int | None = None
    momentum: float = 0.0
    weight_decay: float = 0.0
    num_steps: int | None = None

    def __post_init__(self) -> None:
        positive(self, lr=self.lr)
        at_least(1, self, num_epochs=self.num_epochs, num_steps=self.num_steps)
        at_least(1, self, batch_size=self.batch_size)
        at_least(0, self, weight_decay=self.weight_decay)
        fraction(self, momentum=self.momentum)
        if self.num_epochs is not None and self.num_steps is not None:
            raise ValueError("LocalSGD: give num_epochs or num_steps, not both")

    def __call__(self, model: Model, start: Tensor, data: Batch, *, rng: Generator) -> Update:
        inputs, labels = data
        num_examples = len(labels)
        size = min(self.batch_size or num_examples, num_examples)
        left = self.num_steps or (self.num_epochs or 1) * -(-num_examples // max(size, 1))
        learner = model.learner(start)
        here, grad = learner.trainable, learner.grad
        velocity: Tensor | None = None
        with torch.no_grad():
            while left > 0 and num_examples:
                order = torch.randperm(num_examples, generator=rng)
                if inputs.device != order.device:
                    order = order.to(inputs.device)
                for chosen in torch.split(order, size)[:left]:
                    left -= 1
                    with torch.enable_grad():
                        learner.backward(
                            data
                            if size == num_examples
                            else (inputs.index_select(0, chosen), labels.index_select(0, chosen))
                        )
                    if self.weight_decay:
                        grad.add_(here, alpha=self.weight_decay)
                    if self.momentum:
                        velocity = (
                            grad.clone()
                            if velocity is None
                            else velocity.mul_(self.momentum) + grad
                        )
                        here.add_(velocity, alpha=-self.lr)
                    else:
                        here.add_(grad, alpha=-self.lr)
        return Update(learner.finish().sub_(start), float(num_examples))


@dataclass(frozen=True)
class FedSGD:
    """One gradient of all the client's data, as one step of size ``lr`` [1]_.

    .. [1] McMahan et al., AISTATS 2017, section 2. https://arxiv.org/abs/1602.05629
    """

    lr: float

    def __post_init__(self) -> None:
        positive(self, lr=self.lr)

    def __call__(self, model: Model, start: Tensor, data: Batch, *, rng: Generator) -> Update:
        return LocalSGD(self.lr, num_steps=1)(model, start, data, rng=rng)


@dataclass(frozen=True)
class Clipped(Generic[C]):
    """Train as ``inner`` does, then shorten the payload to ``max_norm``.

    A courtesy: traitors skip it. The bound that they cannot skip is ``NormBound``, at the server.
    """

    max_norm: float
    inner: Train[C]
    mixes_clients = False

    def __post_init__(self) -> None:
        positive(self, max_norm=self.max_norm)

    def __call__(self, model: Model, start: Tensor, data: Batch, **offers: Any) -> C:
        payload: C = call(self.inner, model, start, data, **offers)
        factor = min(1.0, self.max_norm / max(float(payload.delta.norm()), 1e-12))
        return replace(payload, delta=payload.delta * factor)

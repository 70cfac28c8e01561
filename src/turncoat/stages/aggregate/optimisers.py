"""Server optimisers: rules that treat what another rule gives as a negative gradient.

They need a sum that the server can open, and read whatever ``inner`` reads. Buffers of the model
(running statistics) are no parameters: they take the inner step as it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from turncoat.messages import Revealed
from turncoat.stage import Aggregate, Memory, call
from turncoat.task import Model
from turncoat.validate import positive

R = TypeVar("R", bound=Revealed)


@dataclass(frozen=True)
class ServerSGD(Generic[R]):
    """Go ``lr`` times as far as ``inner`` says [1]_: FedOpt with SGD at the server.

    .. [1] Reddi et al., ICLR 2021, algorithm 1. https://arxiv.org/abs/2003.00295
    """

    lr: float
    inner: Aggregate[R]
    mixes_clients = False

    def __post_init__(self) -> None:
        positive(self, lr=self.lr)

    def __call__(self, messages: Iterable[R], *, model: Model, **offers: Any) -> Tensor:
        step: Tensor = call(self.inner, messages, model=model, **offers)
        return _joined(self.lr * step, step, model)


@dataclass(frozen=True)
class ServerMomentum(Generic[R]):
    """Feed what ``inner`` gives to a heavy ball: FedAvgM [1]_. Memory: the velocity.

    .. [1] Hsu et al., 2019, section 3.4. https://arxiv.org/abs/1909.06335
    """

    beta: float
    inner: Aggregate[R]
    lr: float = 1.0
    mixes_clients = False

    def __post_init__(self) -> None:
        _below_one(self, beta=self.beta)
        positive(self, lr=self.lr)

    def __call__(
        self, messages: Iterable[R], *, model: Model, memory: Memory[Tensor], **offers: Any
    ) -> Tensor:
        step: Tensor = call(self.inner, messages, model=model, memory=memory.inner, **offers)
        velocity = memory.keep(self.beta * memory.last(torch.zeros_like(step)) + step)
        return _joined(self.lr * velocity, step, model)


@dataclass(frozen=True)
class ServerAdam(Generic[R]):
    """Feed what ``inner`` gives to Adam, without bias correction: FedAdam [1]_.

    Memory: the two moments; the second begins at ``tau`` squared.

    Args:
        tau: Adaptivity; what the root of the second moment is compared with.

    .. [1] Reddi et al., ICLR 2021, algorithm 2. https://arxiv.org/abs/2003.00295
    """

    lr: float
    inner: Aggregate[R]
    betas: tuple[float, float] = (0.9, 0.99)
    tau: float = 1e-3
    mixes_clients = False

    def __post_init__(self) -> None:
        positive(self, lr=self.lr, tau=self.tau)
        _below_one(self, **{f"betas[{i}]": beta for i, beta in enumerate(self.betas)})

    def __call__(
        self,
        messages: Iterable[R],
        *,
        model: Model,
        memory: Memory[tuple[Tensor, Tensor]],
        **offers: Any,
    ) -> Tensor:
        step: Tensor = call(self.inner, messages, model=model, memory=memory.inner, **offers)
        first, second = memory.last((torch.zeros_like(step), torch.full_like(step, self.tau**2)))
        first = first.lerp(step, 1 - self.betas[0])
        second = second.lerp(step.square(), 1 - self.betas[1])
        memory.keep((first, second))
        return _joined(self.lr * first / (second.sqrt() + self.tau), step, model)


def _joined(parameters: Tensor, step: Tensor, model: Model) -> Tensor:
    """Return the step with its buffers as ``inner`` gave them; logits have none."""
    layout = model.layout
    if layout.num_trainable == layout.num_params or len(step) != layout.num_params:
        return parameters
    return torch.cat([parameters[: layout.num_trainable], step[layout.num_trainable :]])


def _below_one(owner: object, **numbers: float) -> None:
    for name, number in numbers.items():
        if not 0 <= number < 1:
            raise ValueError(
                f"{type(owner).__name__}: {name} must be at least 0 and below 1; it is {number}"
            )

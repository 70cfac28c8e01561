"""A hand on the wheel of a training that does not notice: the learner is another's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from turncoat.messages import Update
from turncoat.stage import Train, call
from turncoat.task import Batch, Learner, Model

Steer = Callable[[Model, Tensor], Learner]


@dataclass(frozen=True)
class Steered(Model):
    """A model that hands out learners of the attacker's making; it shares its base's module.

    Args:
        steer: Makes the learner of a start.
        base: The model that it passes itself off as.
    """

    _: KW_ONLY
    steer: Steer = field(compare=False)
    base: Model = field(compare=False)

    def __post_init__(self) -> None:
        for f in fields(Model):
            if not f.init:
                object.__setattr__(self, f.name, getattr(self.base, f.name))

    def learner(self, start: Tensor) -> Learner:
        return self.steer(self.base, start)


def steered(model: Model, steer: Steer) -> Steered:
    """Return the model with other learners."""
    return Steered(model.build, model.criterion, steer=steer, base=model)


def train_steered(
    owner: Any,
    inner: Train[Update],
    model: Model,
    start: Tensor,
    data: Batch,
    steer: Steer,
    **offers: Any,
) -> Update:
    """Train as ``inner`` does, with learners of ``steer``; refuse an inner that asks for none."""
    made: list[Learner] = []

    def noted(base: Model, begin: Tensor) -> Learner:
        made.append(steer(base, begin))
        return made[-1]

    update: Update = call(inner, steered(model, noted), start, data, **offers)
    if not made:
        raise ValueError(
            f"{type(owner).__name__} works through model.learner, but inner={inner!r} never asked "
            "for one, so that it would train honestly: take one that does, such as LocalSGD"
        )
    return update


@torch.no_grad()
def shortened(delta: Tensor, radius: float) -> Tensor:
    """Return a vector of at most this length, in its direction."""
    norm = float(torch.linalg.vector_norm(delta, dtype=torch.float64))
    return delta if norm <= radius else delta * (radius / norm)


class SteeredLearner(Learner):
    """A learner whose gradient is the attacker's, or that says that it would not be followed.

    Args:
        owner: The attack, for what is said.
    """

    def __init__(self, model: Model, start: Tensor, *, owner: Any) -> None:
        super().__init__(model, start)
        self.owner = owner
        self._inside = False

    def backward(self, data: Batch) -> Tensor:
        if any(m._forward_hooks or m._backward_hooks for m in self._module.modules()):
            raise ValueError(
                f"{type(self.owner).__name__} changes the gradient that a learner gives, but this "
                "training takes each example's by hooks in the module (as Opacus does), so that it "
                "would have no effect: train with LocalSGD or FedSGD"
            )
        self._inside = True
        try:
            return super().backward(data)
        finally:
            self._inside = False

    def outputs(self, inputs: Tensor) -> Tensor:
        if not self._inside:
            raise ValueError(
                f"{type(self.owner).__name__} changes the gradient that learner.backward gives, "
                "but this training makes a loss of its own from learner.outputs (as DPSGD does), "
                "so that it would have no effect: train with LocalSGD or FedSGD"
            )
        return super().outputs(inputs)

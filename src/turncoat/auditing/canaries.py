"""Canaries whose gradient is known beforehand: a model in which each record pulls at one weight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from turncoat.params import Layout
from turncoat.task import Batch, Model
from turncoat.validate import at_least, positive


@dataclass(frozen=True)
class Diracs:
    """Records whose gradient has one entry, each its own [1]_: the strongest canaries there are.

    The model is linear, and so is its loss: the gradient of a record is minus the record, whatever
    the weights. Canary ``i`` pulls at a weight of its own, in layer ``i`` modulo ``num_layers``.
    Half of the canaries (the *alternating* ones) pull the other way in every second round, as an
    adversary may who chooses records adaptively: what stays the same from round to round then
    cancels out. A canary that is left out is a record of zeros, so that the number of records tells
    nothing; so are all others, to leave the whole of a batch's gradient to the canaries.

    Attributes:
        num_canaries: Of which each takes part with probability one half.
        num_others: Records that always take part, without a gradient.
        num_layers: Into how many tensors the weights are divided.
        length: Of each gradient: far above any bound that a trainer may clip to.

    .. [1] Nasr et al., USENIX Security 2023, section 4. https://arxiv.org/abs/2302.07956
    """

    num_canaries: int = 1000
    num_others: int = 1000
    num_layers: int = 4
    length: float = 1000.0

    def __post_init__(self) -> None:
        at_least(1, self, num_layers=self.num_layers)
        at_least(0, self, num_others=self.num_others)
        positive(self, length=self.length)
        if self.num_canaries < 4 * self.num_layers:
            raise ValueError(
                f"Diracs: {self.num_canaries} canaries are too few for {self.num_layers} layers: "
                "give 4 to each, or take fewer layers"
            )

    @property
    def num_records(self) -> int:
        return self.num_canaries + self.num_others

    def model(self) -> Model:
        """Return a new model of the right size; its module is a `Probes`."""
        return Model(_Built(self.num_layers, self._width), pull)

    @cached_property
    def places(self) -> Tensor:
        """Return at which parameter each canary pulls. Shape: ``(num_canaries,)``."""
        each = torch.arange(self.num_canaries)
        return (each % self.num_layers) * self._width + each // self.num_layers

    @cached_property
    def alternates(self) -> Tensor:
        """Return which canaries change sides every second round. Shape: ``(num_canaries,)``."""
        return torch.arange(self.num_canaries) // self.num_layers % 2 == 1

    @cached_property
    def groups(self) -> dict[str, Tensor]:
        """Return the canaries that are looked at together, by name."""
        found = {"all": torch.ones(self.num_canaries, dtype=torch.bool)} | self._by_layer
        return found | {"steady": ~self.alternates, "alternating": self.alternates}

    @property
    def _by_layer(self) -> dict[str, Tensor]:
        if self.num_layers == 1:
            return {}
        layers = torch.arange(self.num_canaries) % self.num_layers
        return {f"layer {k}": layers == k for k in range(self.num_layers)}

    def signs(self, round: int) -> Tensor:
        """Return which way each canary pulls: 1 or -1. Shape: ``(num_canaries,)``."""
        return torch.where(self.alternates & bool(round % 2), -1.0, 1.0)

    def data(self, included: Tensor, round: int) -> Batch:
        """Return all records of a round, canaries first. Shape: ``(num_records, weights)``."""
        inputs = torch.zeros(self.num_records, self.num_layers * self._width)
        rows = torch.arange(self.num_canaries)
        inputs[rows, self.places] = self.length * self.signs(round) * included
        return inputs, torch.zeros(self.num_records, dtype=torch.long)

    def scores(self, update: Tensor, round: int) -> Tensor:
        """Return how far each canary's weight moved its way. Shape: ``(num_canaries,)``, float64.

        That is the product of the update with the canary's gradient, up to a factor for all.
        """
        return update[self.places].double() * self.signs(round)

    @property
    def _width(self) -> int:
        return -(-self.num_canaries // self.num_layers)


@dataclass(frozen=True, kw_only=True)
class Placed(Diracs):
    """The same canaries at parameters of a model that is there, evenly over all of it.

    They are updates, each of one client, and no records: no record has such a gradient.

    Attributes:
        layout: Of the model. A layer with eight canaries or more is looked at for itself, where no
            more than eight layers are so large.
    """

    layout: Layout = field(repr=False)
    num_layers: int = 1
    num_others: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_canaries > self.layout.num_trainable:
            raise ValueError(
                f"{self.num_canaries} canaries need a parameter each, and the model has "
                f"{self.layout.num_trainable}: lower num_canaries"
            )

    @cached_property
    def places(self) -> Tensor:
        return torch.arange(self.num_canaries) * self.layout.num_trainable // self.num_canaries

    @property
    def _by_layer(self) -> dict[str, Tensor]:
        found = {
            slot.name: (self.places >= slot.start) & (self.places < slot.stop)
            for slot in self.layout.slots
            if slot.trainable
        }
        large = {name: inside for name, inside in found.items() if int(inside.sum()) >= 8}
        return large if 1 < len(large) <= 8 else {}


@dataclass(frozen=True)
class _Built:
    num_layers: int
    width: int

    def __call__(self) -> nn.Module:
        return Probes(self.num_layers, self.width)


@dataclass
class Tally:
    """How many examples a module has seen in training mode since it was last asked."""

    num_seen: int = field(default=0)

    def taken(self) -> int:
        """Return the count, and begin again."""
        seen, self.num_seen = self.num_seen, 0
        return seen


class Probes(nn.Module):
    """Linear layers side by side, each with inputs of its own; their outputs are added up."""

    def __init__(self, num_layers: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, 1, bias=False) for _ in range(num_layers))
        self.width = width
        self.tally = Tally()

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            inputs = _Seen.apply(inputs, self.tally)  # type: ignore[no-untyped-call]
        return torch.stack(list(self._outputs(inputs))).sum(dim=0)

    def _outputs(self, inputs: Tensor) -> Iterator[Tensor]:
        parts = torch.split(inputs, self.width, dim=1)
        for layer, part in zip(self.layers, parts, strict=True):
            yield layer(part)


class _Seen(Function):
    """The identity, which counts the examples that pass: in a batch, or one by one under vmap."""

    @staticmethod
    def forward(inputs: Tensor, tally: Tally) -> Tensor:
        tally.num_seen += len(inputs)
        return inputs.view_as(inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return *gradients, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, inputs: Tensor, tally: Tally) -> tuple[Tensor, Any]:
        dim = in_dims[0]
        rows = inputs if dim is None else inputs.movedim(dim, 0).flatten(0, 1)
        tally.num_seen += len(rows)
        return inputs.view_as(inputs), dim


def pull(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return minus the mean output: a loss whose gradient is minus the mean record."""
    return -outputs.mean()

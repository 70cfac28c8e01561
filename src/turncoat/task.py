"""A learning problem: its public half (the model) and its private half (the data)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, overload

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from turncoat.params import Layout
from turncoat.randomness import ambient

Batch = tuple[Tensor, Tensor]  # (inputs, labels), first axis: example
Metric = Callable[[Tensor, Tensor], Tensor]  # (outputs, labels) -> one score in [0, 1] per example


def accuracy(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return 1.0 where the largest output is the label, else 0.0. Shape: ``(examples,)``."""
    return (outputs.argmax(dim=1) == labels).float()


@dataclass(frozen=True)
class Model:
    """What every participant knows: the architecture and the loss, but neither weights nor data.

    All methods are pure functions of a flat vector, and differentiable in it. ``learner`` is the
    exception, for loops that train: it edits a vector of its own.
    """

    build: Callable[[], nn.Module]
    criterion: Callable[[Tensor, Tensor], Tensor] = cross_entropy
    module: nn.Module = field(init=False, repr=False, compare=False)
    layout: Layout = field(init=False, repr=False, compare=False)
    tensors: dict[str, Any] = field(init=False, repr=False, compare=False)  # the module's, by name

    def __post_init__(self) -> None:
        with torch.random.fork_rng(devices=[]):  # what the constructor draws is drawn again
            module = self.build()
        object.__setattr__(self, "module", module)
        object.__setattr__(self, "layout", Layout.of(module))
        named = dict(module.named_parameters()) | dict(module.named_buffers())
        object.__setattr__(self, "tensors", named)

    def initial(self, rng: Generator) -> Tensor:
        """Return a fresh start. Shape: ``(num_params,)``."""
        with ambient(rng):
            return self.layout.flatten(self.build())

    def logits(self, params: Tensor, inputs: Tensor) -> Tensor:
        """Return the outputs in evaluation mode. Shape: ``(examples, classes)``."""
        out: Tensor = functional_call(
            self.module.eval(), self.layout.split(params), (inputs,), strict=False
        )
        return out

    def loss(self, params: Tensor, data: Batch) -> Tensor:
        """Return the mean training loss; buffers are read, not written."""
        named = self.layout.split(params)
        outputs = functional_call(self.module.train(), named, (data[0],), strict=False)
        return self.criterion(outputs, data[1])

    def gradient(self, params: Tensor, data: Batch, *, keep_graph: bool = False) -> Tensor:
        """Return the flat gradient of the mean loss, zero on buffers. Shape: ``(num_params,)``."""
        leaf = params.detach().requires_grad_()
        (grad,) = torch.autograd.grad(self.loss(leaf, data), leaf, create_graph=keep_graph)
        return grad

    def learner(self, start: Tensor) -> Learner:
        """Return a copy of ``start`` that a training loop may step along."""
        return Learner(self, start)


class Learner:
    """A state that trains in place: the module's own tensors are views into one flat vector.

    One backward pass leaves its gradient in one flat vector too, so that a step of any optimiser
    is one operation. It borrows the model's module: use one at a time.

    Attributes:
        params: The state so far. Shape: ``(num_params,)``; after ``backward``, ``grad`` belongs to
            its first ``num_trainable`` entries.
    """

    def __init__(self, model: Model, start: Tensor) -> None:
        self._module, self._criterion = model.module, model.criterion
        layout, tensors = model.layout, model.tensors
        self.params = start.detach().clone()
        self.trainable = self.params[: layout.num_trainable]
        self.grad = torch.zeros_like(self.trainable)
        self._buffers = [(s, tensors[s.name]) for s in layout.slots if not s.trainable]
        self._lent = [(p, p.data) for s in layout.slots if s.trainable for p in (tensors[s.name],)]
        views = layout.split(self.params)
        with torch.no_grad():
            for s in layout.slots:
                tensors[s.name].data = views[s.name]  # of buffers a copy: they may be edited
                if s.trainable:
                    tensors[s.name].grad = self.grad[s.start : s.stop].view(s.shape)
        if not self._module.training:
            self._module.train()

    def backward(self, data: Batch) -> Tensor:
        """Fill ``grad`` with the gradient of the mean loss on ``data``; return that loss."""
        self.grad.zero_()
        loss = self._criterion(self.outputs(data[0]), data[1])
        torch.autograd.backward(loss)
        return loss.detach()

    def outputs(self, inputs: Tensor) -> Tensor:
        """Return the module's outputs in training mode, with their graph."""
        if not self._module.training:  # it was asked for logits in between
            self._module.train()
        out: Tensor = self._module(inputs)
        return out

    def finish(self) -> Tensor:
        """Return the state, running statistics included, and give the module back."""
        for slot, tensor in self._buffers:
            self.params[slot.start : slot.stop] = tensor.reshape(-1)
        for parameter, data in self._lent:
            parameter.grad, parameter.data = None, data
        return self.params


@dataclass(frozen=True)
class Shards(Sequence[Batch]):
    """The data of n clients as consecutive stretches of one pool, so that nothing is copied.

    Attributes:
        inputs: Shape: ``(examples, ...)``.
        labels: Shape: ``(examples, ...)``.
        bounds: Client c has ``inputs[bounds[c]:bounds[c + 1]]``. Length: clients + 1.
    """

    inputs: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)
    bounds: tuple[int, ...] = field(repr=False)

    @classmethod
    def of(cls, data: Batch, parts: Iterable[Tensor]) -> Shards:
        """Return the pool's examples in the order of ``parts``: one vector of indices a client."""
        chosen = list(parts)
        bounds = [0]
        for part in chosen:
            bounds.append(bounds[-1] + len(part))
        order = torch.cat(chosen)
        return cls(data[0][order].contiguous(), data[1][order].contiguous(), tuple(bounds))

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @overload
    def __getitem__(self, client: int) -> Batch: ...
    @overload
    def __getitem__(self, client: slice) -> Sequence[Batch]: ...
    def __getitem__(self, client: int | slice) -> Batch | Sequence[Batch]:
        if isinstance(client, slice):
            return tuple(self[c] for c in range(*client.indices(len(self))))
        if not -len(self) <= client < len(self):
            raise IndexError(f"there is no client {client}; there are {len(self)}")
        client %= len(self)
        chosen = slice(self.bounds[client], self.bounds[client + 1])
        return self.inputs[chosen], self.labels[chosen]


@dataclass(frozen=True)
class Task:
    """A model and the data of each client. Attacks never see one: they get ``Model`` and views.

    Attributes:
        clients: The private data, one batch a client.
        test: Held out from everyone: it judges, and its records are the non-members.
        public: Data that everyone has, the attacker included.
        metric: What "how well does it work" means here, per example; shown under its name.
        classes: Names of the labels, for people.
        client_names: Names of the clients, for people; numbers where it is empty.
        source: Where the data come from and their licence, for the report.
    """

    name: str
    model: Model
    clients: Sequence[Batch] = field(repr=False)
    test: Batch = field(repr=False)
    public: Batch | None = field(default=None, repr=False)
    metric: Metric = accuracy
    classes: tuple[str, ...] = ()
    client_names: tuple[str, ...] = ()
    source: str = ""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Return the number of examples of each client."""
        if isinstance(self.clients, Shards):
            bounds = self.clients.bounds
            return tuple(b - a for a, b in pairwise(bounds))
        return tuple(len(labels) for _, labels in self.clients)

    @property
    def population(self) -> Batch:
        """Return what an outsider knows such data to look like: public data, else the test set."""
        return self.public or self.test

    def name_of(self, client: int) -> str:
        return self.client_names[client] if self.client_names else f"client {client}"

    def to(self, device: torch.device) -> Task:
        """Return the task with its data on ``device``."""

        def moved(data: Batch) -> Batch:
            return data[0].to(device), data[1].to(device)

        if isinstance(self.clients, Shards):
            pool = moved((self.clients.inputs, self.clients.labels))
            clients: Sequence[Batch] = replace(self.clients, inputs=pool[0], labels=pool[1])
        else:
            clients = tuple(moved(data) for data in self.clients)
        public = None if self.public is None else moved(self.public)
        return replace(self, clients=clients, test=moved(self.test), public=public)

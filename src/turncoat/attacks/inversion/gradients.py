"""The gradients of a guess at the shared model, and what each layer did on the way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.func import functional_call, grad

from turncoat.attacks.inversion.convolutions import Held
from turncoat.attacks.inversion.roles import Seen
from turncoat.task import Learner, Model


class Way(Protocol):
    """A way to the gradients of a guess."""

    def __call__(
        self, away: Sequence[Tensor] | None, images: Tensor, labels: Tensor, watch: bool
    ) -> tuple[Sequence[Tensor], tuple[Seen, ...]]:
        """Return the gradient of each parameter, and what each layer did if watched.

        At the shared state, or so far ``away`` from it.
        """

    def layers(self, images: Tensor) -> tuple[Seen, ...]:
        """Return what each layer does at the images: a pass of its own."""


class Plain:
    """Gradients at the state that the module holds, or a way from it, by ``autograd.grad``."""

    def __init__(self, learner: Learner, model: Model, convolutions: Held) -> None:
        self.learner, self.model = learner, model
        self.convolutions: Held | None = convolutions
        named = model.module.named_parameters()
        self.leaves: dict[str, Tensor] = {n: p for n, p in named if p.requires_grad}
        for leaf in self.leaves.values():  # nobody steps: convolutions like memory of its own
            leaf.data = leaf.data.clone()

    def __call__(
        self, away: Sequence[Tensor] | None, images: Tensor, labels: Tensor, watch: bool
    ) -> tuple[Sequence[Tensor], tuple[Seen, ...]]:
        with _watched(self.model, watch) as layers, self.convolutions or nullcontext():
            if away is None:
                points = list(self.leaves.values())
                outputs = self.learner.outputs(images)
            else:
                points = [p + a for p, a in zip(self.leaves.values(), away, strict=True)]
                named = dict(zip(self.leaves, points, strict=True))
                outputs = functional_call(self.model.module, named, (images,))
        if self.convolutions and not self.convolutions.found:  # nor will it find any
            self.convolutions = None
        loss = self.model.criterion(outputs, labels)
        slopes = torch.autograd.grad(loss, points, create_graph=True, materialize_grads=True)
        return slopes, tuple(layers)

    def lay(self, gradients: Sequence[Tensor]) -> None:
        """Put each parameter into memory as its gradient lies there."""
        for leaf, g in zip(self.leaves.values(), gradients, strict=True):
            leaf.data = torch.empty_like(g).copy_(leaf.data)

    def layers(self, images: Tensor) -> tuple[Seen, ...]:
        with _watched(self.model, True) as layers, self.convolutions or nullcontext():
            self.learner.outputs(images)
        return tuple(layers)


class Together:
    """The same by ``torch.func``, which works under ``vmap``: one pass for several guesses."""

    def __init__(self, learner: Learner, model: Model) -> None:
        self.model = model
        named = model.module.named_parameters()
        self.leaves = {n: p.detach() for n, p in named if p.requires_grad}
        self.buffers = {n: b.detach() for n, b in model.module.named_buffers()}
        if not model.module.training:
            model.module.train()

    def __call__(
        self, away: Sequence[Tensor] | None, images: Tensor, labels: Tensor, watch: bool
    ) -> tuple[Sequence[Tensor], tuple[Seen, ...]]:
        points = tuple(self.leaves.values())
        if away is not None:
            points = tuple(p + a for p, a in zip(points, away, strict=True))

        def loss(points: tuple[Tensor, ...]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
            with _watched(self.model, watch) as layers:
                outputs = self._outputs(points, images)
            names[:] = [s.name for s in layers]
            return self.model.criterion(outputs, labels), [(s.read, s.gave) for s in layers]

        names: list[str] = []
        slopes, seen = grad(loss, has_aux=True)(points)
        return slopes, tuple(Seen(n, *s) for n, s in zip(names, seen, strict=True))

    def layers(self, images: Tensor) -> tuple[Seen, ...]:
        with _watched(self.model, True) as layers:
            self._outputs(tuple(self.leaves.values()), images)
        return tuple(layers)

    def _outputs(self, points: Sequence[Tensor], images: Tensor) -> Tensor:
        """Return the outputs; buffers are copies of each guess's own, which it may edit."""
        own = {
            n: b + images.flatten()[0].detach().mul(0).to(b.dtype) for n, b in self.buffers.items()
        }
        named = dict(zip(self.leaves, points, strict=True)) | own
        outputs: Tensor = functional_call(self.model.module, named, (images,))
        return outputs


@contextmanager
def _watched(model: Model, watch: bool) -> Iterator[list[Seen]]:
    """Yield what every leaf layer reads and gives from here on, in the order of their calls."""
    layers: list[Seen] = []
    hooks = []
    if watch:
        for name, module in model.module.named_modules():
            if not any(module.children()):

                def note(_: Any, read: Any, gave: Tensor, name: str = name) -> None:
                    layers.append(Seen(name, read[0], gave))

                hooks.append(module.register_forward_hook(note))
    try:
        yield layers
    finally:
        for hook in hooks:
            hook.remove()

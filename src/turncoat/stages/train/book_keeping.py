"""Each example's gradient clipped, in one pass back: the books are kept instead of the gradients.

A pass back through the layers' outputs alone leaves, at each layer, what came in and the slope of
what came out. The norm of an example's gradient follows from the two, and so does the weighted sum
of all examples' gradients: one contraction, with no second pass and, for layers that see one vector
an example, without any example's gradient ever being there [1]_.

Differs from the paper: layers that see several vectors (convolutions, sequences) get the gradients
of a few examples at a time written out, since norms from products of products would cancel, and a
norm that is rounded down is a clip that does not hold.

.. [1] Bu et al., ICML 2023, the BK algorithm. https://arxiv.org/abs/2210.00038
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.func import functional_call, grad, vmap

from turncoat.task import Batch, Learner, Model

_EXAMPLES = 64  # that pass through the net together
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMALISATIONS = (
    nn.GroupNorm,
    nn.LayerNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)


class Gradients(Protocol):
    """What the examples' gradients by one parameter are, told apart; n of them."""

    def rows(self) -> Tensor:
        """Return them flat. Shape: ``(n, size)``."""

    def norms(self) -> Tensor:
        """Return their lengths. Shape: ``(n,)``."""

    def combined(self, weights: Tensor) -> Tensor:
        """Return their weighted sum, flat. Shape: ``(size,)``."""


@dataclass(frozen=True)
class Written:
    """Gradients that are there. Shape: ``(n, size)``."""

    held: Tensor

    def rows(self) -> Tensor:
        return self.held

    def norms(self) -> Tensor:
        lengths: Tensor = torch.linalg.vector_norm(self.held, dim=1)
        return lengths

    def combined(self, weights: Tensor) -> Tensor:
        return weights @ self.held


@dataclass(frozen=True)
class Products:
    """Gradients of rank one: each a slope times an input. Shapes: ``(n, outs)``, ``(n, ins)``."""

    slopes: Tensor
    inputs: Tensor

    def rows(self) -> Tensor:
        return (self.slopes[:, :, None] * self.inputs[:, None, :]).flatten(1)

    def norms(self) -> Tensor:
        slopes, inputs = Written(self.slopes), Written(self.inputs)
        return slopes.norms() * inputs.norms()

    def combined(self, weights: Tensor) -> Tensor:
        return ((weights[:, None] * self.slopes).T @ self.inputs).flatten()


def clipped_sum(model: Model, learner: Learner, data: Batch, max_norm: float) -> Tensor:
    """Return the sum of the examples' gradients, each shortened to ``max_norm`` at most.

    Shape: ``(num_trainable,)``.

    Raises:
        ValueError: If a layer's gradients cannot be told apart by example.
    """
    total = torch.zeros_like(learner.trainable)
    slots = {s.name: slice(s.start, s.stop) for s in model.layout.slots}
    for few in zip(*(torch.split(part, _EXAMPLES) for part in data), strict=True):
        if not len(few[1]):  # an empty draw; its noise is released all the same
            continue
        parts = told_apart(model, learner, few)
        if not parts:
            continue
        norms = torch.stack([g.norms() for g in parts.values()]).norm(dim=0)
        factors = (max_norm / norms.clamp(min=1e-12)).clamp(max=1.0)
        for name, gradients in parts.items():
            total[slots[name]] += gradients.combined(factors)
    return total


def told_apart(model: Model, learner: Learner, data: Batch) -> dict[str, Gradients]:
    """Return the examples' gradients by each parameter that the loss depends on, by its name."""
    num = len(data[1])
    with _Books(model.module, num) as books:
        outputs = learner.outputs(data[0])
    loss = num * model.criterion(outputs, data[1])  # the examples' own losses, added
    names = {id(p): name for name, p in model.module.named_parameters()}
    found: defaultdict[str, list[Gradients]] = defaultdict(list)
    for parameter, gradients in books.closed(loss):
        found[names[id(parameter)]].append(gradients)
    return {
        name: parts[0]
        if len(parts) == 1
        else Written(sum((p.rows() for p in parts[1:]), parts[0].rows()))
        for name, parts in found.items()
    }


@dataclass(frozen=True)
class _Entry:
    """One call of a layer: what came in, in which version, and where its slope arrives."""

    name: str
    layer: nn.Module
    inputs: tuple[Tensor, ...]
    versions: tuple[int, ...]
    edge: Any


class _Books:
    """Writes down, while it is open, what comes into each layer that trains."""

    def __init__(self, module: nn.Module, num_examples: int) -> None:
        self._layers, self._num = list(_layers(module)), num_examples
        self._entries: list[_Entry] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> _Books:
        for name, layer in self._layers:

            def note(layer: nn.Module, given: Any, output: Any, name: str = name) -> None:
                self._note(name, layer, given, output)

            self._hooks.append(layer.register_forward_hook(note, prepend=True))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _note(self, name: str, layer: nn.Module, given: Any, output: Any) -> None:
        whole = [*given, output]
        if not all(isinstance(t, Tensor) and t.dim() and len(t) == self._num for t in whole):
            raise ValueError(
                f"DPSGD cannot tell the examples' gradients apart at {_said(name, layer)}: "
                "it must take tensors and return one tensor, with the examples along the first axis"
            )
        if output.requires_grad:
            inputs = tuple(t.detach() for t in given)
            versions = tuple(t._version for t in inputs)
            self._entries.append(_Entry(name, layer, inputs, versions, get_gradient_edge(output)))

    def closed(self, loss: Tensor) -> Iterator[tuple[nn.Parameter, Gradients]]:
        """Go back from the loss; yield each parameter of each call and its gradients."""
        if not self._entries:
            return
        edges = [entry.edge for entry in self._entries]
        slopes = torch.autograd.grad(loss, edges, allow_unused=True)
        for entry, slope in zip(self._entries, slopes, strict=True):
            if slope is None:
                continue
            if entry.versions != tuple(t._version for t in entry.inputs):
                raise ValueError(
                    f"DPSGD needs what came into {_said(entry.name, entry.layer)}, and the "
                    "network has changed it in place since: change a copy instead"
                )
            yield from _gradients(entry, slope)


def _layers(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers to watch: those that are known, and what is around others as a whole."""
    own = [p for p in module.parameters(recurse=False) if p.requires_grad]
    if own:
        yield name, module
    else:
        for inside, child in module.named_children():
            yield from _layers(child, f"{name}.{inside}" if name else inside)


def _gradients(entry: _Entry, slope: Tensor) -> Iterator[tuple[nn.Parameter, Gradients]]:
    """Yield a call's parameters that train, and the examples' gradients by them."""
    layer = entry.layer
    by_name = {n: p for n, p in layer.named_parameters() if p.requires_grad}
    everything: dict[str, Gradients]
    if not _is_plain(layer):
        everything = _by_differentiation(entry, by_name, slope)
    elif isinstance(layer, nn.Linear):
        everything = _of_linear(entry.inputs[0], slope)
    elif isinstance(layer, _CONVOLUTIONS):
        everything = _of_convolution(layer, entry.inputs[0], slope)
    else:
        everything = _by_opacus(layer, entry.inputs[0], slope)
    for name, parameter in by_name.items():
        yield parameter, everything[name]


def _is_plain(layer: nn.Module) -> bool:
    """Return whether a layer is of a known class, and computes with its own weight and bias."""
    names = {name for name, _ in layer.named_parameters()}
    if type(layer) in _NORMALISATIONS:
        return names == {"weight", "bias"}
    return type(layer) in (nn.Linear, *_CONVOLUTIONS) and "weight" in names <= {"weight", "bias"}


def _of_linear(inputs: Tensor, slopes: Tensor) -> dict[str, Gradients]:
    if inputs.dim() == 2:
        return {"weight": Products(slopes, inputs), "bias": Written(slopes)}
    slopes, inputs = slopes.flatten(1, -2), inputs.flatten(1, -2)
    return {
        "weight": Written((slopes.mT @ inputs).flatten(1)),
        "bias": Written(slopes.sum(dim=1)),
    }


def _of_convolution(layer: Any, inputs: Tensor, slopes: Tensor) -> dict[str, Gradients]:
    """Return what a dense layer has that slides along: it sees a window at each place."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = nn.functional.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode)
    num, groups, (a, b, *steps) = len(inputs), layer.groups, padded.stride()
    windows = padded.as_strided(
        (*padded.shape[:2], *layer.kernel_size, *slopes.shape[2:]),
        (
            *(a, b),
            *(step * wide for step, wide in zip(steps, layer.dilation, strict=True)),
            *(step * far for step, far in zip(steps, layer.stride, strict=True)),
        ),
    )
    places = prod(slopes.shape[2:])
    windows = windows.reshape(num * groups, -1, places)
    weight = slopes.reshape(num * groups, -1, places) @ windows.mT
    return {
        "weight": Written(weight.reshape(num, -1)),
        "bias": Written(slopes.flatten(2).sum(dim=2)),
    }


def _by_opacus(layer: nn.Module, inputs: Tensor, slopes: Tensor) -> dict[str, Gradients]:
    from opacus.grad_sample import GradSampleHooks  # here, for it takes a second to import

    found = GradSampleHooks.GRAD_SAMPLERS[type(layer)](layer, [inputs], slopes)
    names = {id(p): name for name, p in layer.named_parameters()}
    return {names[id(p)]: Written(rows.flatten(1)) for p, rows in found.items()}


def _by_differentiation(
    entry: _Entry, parameters: Mapping[str, Tensor], slopes: Tensor
) -> dict[str, Gradients]:
    """Return the gradients of any layer, by going through it once more for each example."""

    def along(named: dict[str, Tensor], slope: Tensor, *inputs: Tensor) -> Tensor:
        alone = tuple(t[None] for t in inputs)
        out: Tensor = functional_call(entry.layer, named, alone)
        return (out[0] * slope).sum()

    axes = (None, 0, *(0 for _ in entry.inputs))
    held = {name: p.detach() for name, p in parameters.items()}
    try:
        found = vmap(grad(along), in_dims=axes)(held, slopes, *entry.inputs)
    except Exception as error:
        raise ValueError(
            f"DPSGD cannot tell the examples' gradients apart at {_said(entry.name, entry.layer)}: "
            f"{error}"
        ) from error
    return {name: Written(rows.flatten(1)) for name, rows in found.items()}


def _said(name: str, layer: nn.Module) -> str:
    return f"layer {name!r} ({type(layer).__name__})"

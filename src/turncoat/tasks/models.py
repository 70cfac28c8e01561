"""Architectures: hyper-parameters that build a network for any shape of data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from turncoat.describe import ADDED
from turncoat.validate import at_least, fraction, one_of

Activation = Literal["relu", "tanh", "sigmoid", "elu", "gelu", "silu", "softplus"]
Normalisation = Literal["none", "group", "batch"]
Pooling = Literal["none", "mean", "max"]

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
}
_RECTIFIERS = {"relu", "elu", "gelu", "silu"}


class Architecture(Protocol):
    """Builds a network from the shape of one example, without the batch axis, to its logits."""

    def __call__(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module: ...


@dataclass(frozen=True)
class Built:
    """An architecture with its sizes filled in: what ``Model(build=...)`` wants.

    >>> Built(MLP(hidden=(8,)), (30,), 2)()[1]
    Linear(in_features=30, out_features=8, bias=True)
    """

    architecture: Architecture
    input_shape: tuple[int, ...]
    num_classes: int

    def __call__(self) -> nn.Module:
        return self.architecture(self.input_shape, self.num_classes)


@dataclass(frozen=True)
class MLP:
    """Fully connected layers on the flattened input; ``hidden = ()`` is multinomial regression.

    Weights begin as in ``LeNet5``.

    Args:
        hidden: The width of each layer but the last; there are as many layers as widths, and one.
        normalisation, num_groups, dropout: As in ``ConvNet``.
    """

    hidden: tuple[int, ...] = (64,)
    activation: Activation = "relu"
    normalisation: Normalisation = field(default="none", metadata=ADDED)
    num_groups: int = field(default=4, metadata=ADDED)
    dropout: float = field(default=0.0, metadata=ADDED)

    def __post_init__(self) -> None:
        for size in self.hidden:
            at_least(1, self, hidden=size)
        _known(self, self.activation)
        _check_adaptation(self, self.normalisation, self.num_groups, self.dropout, self.hidden)

    def __call__(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        sizes = (prod(input_shape), *self.hidden)
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in pairwise(sizes):
            layers.append(nn.Linear(before, after))
            layers += _normed(self.normalisation, self.num_groups, after, nn.BatchNorm1d)
            layers.append(_ACTIVATIONS[self.activation]())
        if self.dropout:
            layers.append(nn.Dropout(self.dropout))
        return _begun(nn.Sequential(*layers, nn.Linear(sizes[-1], num_classes)), self.activation)


@dataclass(frozen=True)
class LeNet5:
    """Two convolutions with average pooling, three dense layers [1]_: 61,706 parameters on MNIST.

    Below 16 pixels a side the kernels are 3x3 and padded, and only the first convolution is
    pooled: LeNet-5 scaled to 8x8 (42,794). ``"tanh"`` and ``"sigmoid"`` nets are smooth, as
    gradient inversion wants them; the latter hardly learns.

    Differs from the paper: the second convolution reads all maps of the first, pooling has no
    weights, the last layer is linear, ``"tanh"`` is the plain one, and weights begin as He [2]_
    (rectifiers: "relu", "elu", "gelu", "silu") or Glorot [3]_ (the others) have them.

    .. [1] LeCun et al., Proc. IEEE 1998, section II.B.
    .. [2] He et al., ICCV 2015, eq. (10). https://arxiv.org/abs/1502.01852
    .. [3] Glorot and Bengio, AISTATS 2010, eq. (16).
    """

    activation: Activation = "relu"

    def __post_init__(self) -> None:
        _known(self, self.activation)

    def __call__(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        channels, height, width = _image(self, input_shape, smallest=8)
        small = min(height, width) < 16
        kernel, first, second = (3, 1, 1) if small else (5, 2 if min(height, width) < 32 else 0, 0)

        def seen(side: int, padding: int) -> int:
            return side + 2 * padding - kernel + 1

        halved = (seen(height, first) // 2, seen(width, first) // 2)
        rows, columns = (seen(side, second) for side in halved)
        pool: nn.Module = nn.Identity() if small else _MeanOfFour(columns)
        left = rows * columns if small else (rows // 2) * (columns // 2)

        act = _ACTIVATIONS[self.activation]
        net = nn.Sequential(
            *(nn.Conv2d(channels, 6, kernel, padding=first), act()),
            _MeanOfFour(seen(width, first)),
            *(nn.Conv2d(6, 16, kernel, padding=second), act(), pool),
            *(nn.Flatten(), nn.Linear(16 * left, 120), act()),
            *(nn.Linear(120, 84), act(), nn.Linear(84, num_classes)),
        )
        return _begun(net, self.activation)


@dataclass(frozen=True)
class ConvNet:
    """3x3 convolutions and one dense layer: small, and smooth unless ``"relu"`` or ``"max"``.

    Every option is an adaptation [1]_: a choice of the model that may make its updates harder to
    invert, and costs no noise. Weights begin as in ``LeNet5``.

    Args:
        widths: Channels after each convolution; there are as many convolutions as widths.
        strides: How much smaller each convolution leaves its image; one for each of ``widths``.
        activation: ``"relu"`` has kinks and dead units; the others are smooth (``"elu"`` once).
        pooling: What makes the image smaller: the stride of the convolution itself (``"none"``),
            or the ``"mean"`` or ``"max"`` of squares of that side after a stride of 1.
        normalisation: After each convolution: none, of ``num_groups`` groups of channels (which
            must divide the widths), or of the batch. The last mixes the records of a client, so
            that DP-SGD refuses it.
        dropout: What share of the last layer's inputs is left out at random in training.

    .. [1] Usynin et al., PoPETs 2022(1). https://doi.org/10.2478/popets-2022-0014
    """

    widths: tuple[int, ...] = (16, 32)
    strides: tuple[int, ...] = (2, 2)
    activation: Activation = "relu"
    pooling: Pooling = field(default="none", metadata=ADDED)
    normalisation: Normalisation = field(default="none", metadata=ADDED)
    num_groups: int = field(default=4, metadata=ADDED)
    dropout: float = field(default=0.0, metadata=ADDED)

    def __post_init__(self) -> None:
        if len(self.widths) != len(self.strides):
            raise ValueError(
                f"ConvNet: widths has {len(self.widths)} entries and strides has "
                f"{len(self.strides)}: give one stride for each width"
            )
        for width, stride in zip(self.widths, self.strides, strict=True):
            at_least(1, self, widths=width, strides=stride)
        _known(self, self.activation)
        one_of(Pooling, self, pooling=self.pooling)
        _check_adaptation(self, self.normalisation, self.num_groups, self.dropout, self.widths)

    def __call__(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        channels, height, width = _image(self, input_shape, smallest=1)
        layers: list[nn.Module] = []
        for after, stride in zip(self.widths, self.strides, strict=True):
            step = stride if self.pooling == "none" else 1
            layers.append(nn.Conv2d(channels, after, 3, stride=step, padding=1))
            layers += _normed(self.normalisation, self.num_groups, after, nn.BatchNorm2d)
            layers.append(_ACTIVATIONS[self.activation]())
            if stride > step:
                pool = nn.AvgPool2d if self.pooling == "mean" else nn.MaxPool2d
                layers.append(pool(stride, ceil_mode=True))
            channels, height, width = after, -(-height // stride), -(-width // stride)
        layers.append(nn.Flatten())
        if self.dropout:
            layers.append(nn.Dropout(self.dropout))
        layers.append(nn.Linear(channels * height * width, num_classes))
        return _begun(nn.Sequential(*layers), self.activation)


@dataclass(frozen=True)
class ResNet:
    """The narrow residual network of 6n + 2 layers [1]_, here with group normalisation [2]_.

    Batch statistics would mix the records of a client, and differ between clients: per-example
    gradients, and so DP-SGD, need a norm without them.

    Differs from the paper: GroupNorm in place of BatchNorm; shortcuts that change the shape are
    1x1 convolutions.

    .. [1] He et al., CVPR 2016, section 4.2. https://arxiv.org/abs/1512.03385
    .. [2] Wu and He, ECCV 2018. https://arxiv.org/abs/1803.08494
    """

    depth: int = 8
    width: int = 16
    num_groups: int = 8

    def __post_init__(self) -> None:
        if self.depth < 8 or self.depth % 6 != 2:
            raise ValueError(f"ResNet: depth must be 6n + 2, as 8, 14, 20; it is {self.depth}")
        at_least(1, self, width=self.width, num_groups=self.num_groups)
        if self.width % self.num_groups:
            raise ValueError(
                f"ResNet: num_groups must divide width; they are {self.num_groups} and {self.width}"
            )

    def __call__(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        channels, _, _ = _image(self, input_shape, smallest=4)
        layers: list[nn.Module] = [
            nn.Conv2d(channels, self.width, 3, padding=1, bias=False),
            nn.GroupNorm(self.num_groups, self.width),
            nn.ReLU(),
        ]
        before = self.width
        for stage in range(3):
            for block in range((self.depth - 2) // 6):
                after = self.width << stage
                stride = 2 if stage and not block else 1
                layers.append(_Residual(before, after, stride, self.num_groups))
                before = after
        return nn.Sequential(
            *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, num_classes)
        )


class _MeanOfFour(nn.Module):
    """``AvgPool2d(2)`` as one product with a constant: there and back in half its time on a CPU.

    Args:
        width: Of what comes in.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        columns = torch.arange(width)
        half = width // 2
        mean = 0.25 * (columns[:, None] // 2 == torch.arange(half)).float()
        self.mean = mean.repeat(2, 1)  # no buffer: it is no part of the state

    def forward(self, x: Tensor) -> Tensor:
        height = x.shape[-2] // 2
        pairs = x[..., : 2 * height, :].reshape(-1, 2 * x.shape[-1])  # a row, and the one below
        return (pairs @ self.mean.to(pairs)).reshape(*x.shape[:-2], height, -1)


class _Residual(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, before: int, after: int, stride: int, num_groups: int) -> None:
        super().__init__()
        self.inside = nn.Sequential(
            nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False),
            nn.GroupNorm(num_groups, after),
            nn.ReLU(),
            nn.Conv2d(after, after, 3, padding=1, bias=False),
            nn.GroupNorm(num_groups, after),
        )
        same = before == after and stride == 1
        self.shortcut: nn.Module = nn.Identity()
        if not same:
            self.shortcut = nn.Sequential(
                nn.Conv2d(before, after, 1, stride=stride, bias=False),
                nn.GroupNorm(num_groups, after),
            )

    def forward(self, inputs: Tensor) -> Tensor:
        return relu(self.inside(inputs) + self.shortcut(inputs))


def _begun(net: nn.Sequential, activation: str) -> nn.Sequential:
    """Return the net with weights whose scale survives its depth; biases are 0."""
    for layer in net:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            if activation in _RECTIFIERS:
                nn.init.kaiming_normal_(layer.weight)
            else:
                nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return net


def _normed(
    kind: Normalisation, num_groups: int, width: int, batch: Callable[[int], nn.Module]
) -> list[nn.Module]:
    """Return the layer that normalises, if there is one."""
    if kind == "none":
        return []
    return [nn.GroupNorm(num_groups, width) if kind == "group" else batch(width)]


def _check_adaptation(
    owner: object, normalisation: str, num_groups: int, dropout: float, widths: Sequence[int]
) -> None:
    name = type(owner).__name__
    one_of(Normalisation, owner, normalisation=normalisation)
    at_least(1, owner, num_groups=num_groups)
    fraction(owner, dropout=dropout)
    if dropout == 1:
        raise ValueError(f"{name}: dropout must be below 1, or nothing is left to read")
    if normalisation == "group" and any(width % num_groups for width in widths):
        raise ValueError(
            f"{name}: num_groups must divide every width; it is {num_groups}, and they are "
            f"{', '.join(map(str, widths))}"
        )


def _known(owner: object, activation: str) -> None:
    if activation not in _ACTIVATIONS:
        raise ValueError(
            f"{type(owner).__name__}: activation must be one of {', '.join(_ACTIVATIONS)}; "
            f"it is {activation!r}"
        )


def _image(owner: object, shape: tuple[int, ...], smallest: int) -> tuple[int, int, int]:
    if len(shape) != 3 or min(shape[1:]) < smallest:
        raise ValueError(
            f"{type(owner).__name__} needs images of shape (channels, height, width), at least "
            f"{smallest} pixels a side; an example here has shape {shape}: choose another model, "
            "as MLP"
        )
    return shape[0], shape[1], shape[2]

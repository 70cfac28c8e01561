"""Convolutions of an inversion: none that nobody asks for; compiled, fewer multiplications."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad
from torch.overrides import TorchFunctionMode

_MANY = 1 << 25  # products of a convolution that outweigh a few calls of Python


class Held(TorchFunctionMode):
    """Convolutions of a model that is not moved: bit by bit as usual, and an eighth cheaper.

    The second derivative of a usual one includes its weight's, a convolution of its own, even where
    only that of the images is asked for. Here a parameter has a slope in a pass that is recorded,
    and none in the pass back through that. Small ones, where Python costs more, stay as they are.

    Attributes:
        found: Whether there was any that is not small.
    """

    found = False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.conv2d and not kwargs and _is_plain(args):
            return self._convolved(args)
        return func(*args, **(kwargs or {}))

    def _convolved(self, args: tuple[Any, ...]) -> Any:
        images, weight = args[:2]
        if images.is_leaf or not isinstance(weight, nn.Parameter) or not weight.requires_grad:
            return torch.conv2d(*args)  # of the first layer nothing is wasted
        if images[:, :1].numel() * weight.numel() < _MANY:
            return torch.conv2d(*args)
        self.found = True
        return _applied(_Convolved, *args[:3], args[3:])


class Winograd(Held):
    """Computes 3 x 3 convolutions by tiles of 4 x 4, with 4 times fewer multiplications [1]_.

    To be traced and compiled, which merges its copies. The results differ by rounding, several
    times that of the usual sums.

    .. [1] Lavin and Gray, CVPR 2016, section 4.3. https://arxiv.org/abs/1509.09308
    """

    def __init__(self) -> None:
        super().__init__()
        self._kernels: dict[int, tuple[Tensor, Tensor]] = {}

    def _convolved(self, args: tuple[Any, ...]) -> Any:
        if self._suits(args):
            self.found = True
            return self._by_tiles(args[0], args[1], args[2], args[4])
        return torch.conv2d(*args)

    @staticmethod
    def _suits(args: tuple[Any, ...]) -> bool:
        images, weight, _, stride, _, dilation, groups = args
        small = min(weight.shape[:2]) < 32 or min(images.shape[-2:]) < 16
        one = tuple(stride) == tuple(dilation) == (1, 1) and groups == 1
        single = weight.dtype == torch.float32 and weight.device.type == "cpu"
        return one and single and not small and tuple(weight.shape[2:]) == (3, 3)

    def _by_tiles(
        self, images: Tensor, weight: Tensor, bias: Tensor | None, padding: Sequence[int]
    ) -> Tensor:
        (n, _, height, width), (p, q) = images.shape, padding
        height, width = height + 2 * p - 2, width + 2 * q - 2
        framed = pad(
            images.permute(0, 2, 3, 1), (0, 0, q, q + 2 + -width % 4, p, p + 2 + -height % 4)
        )
        tiles: Tensor = _applied(_Tiled, framed)
        kernels: Tensor = _applied(_Kernels, weight, self._kernels)
        _, _, n, rows, columns, _ = tiles.shape
        products = torch.bmm(tiles.flatten(0, 1).flatten(1, 3), kernels)
        out: Tensor = _applied(_Joined, products.view(6, 6, n, rows, columns, -1))
        out = out[:, :height, :width]
        out = out if bias is None else out + bias
        return out.permute(0, 3, 1, 2)


def _pairs(*rows: tuple[float, ...]) -> Tensor:
    """Return the matrix ``M`` of these rows for both axes at once: ``MxMᵀ`` of a flat ``x``."""
    matrix = torch.tensor(rows)
    return torch.kron(matrix, matrix)


_CUT = _pairs(  # Bᵀ
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1.0),
)
_SPREAD = _pairs(  # G
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
_JOIN = _pairs(  # Aᵀ
    (1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1.0)
)
_NO = (0, 0)  # padding of an axis


def _is_plain(args: tuple[Any, ...]) -> bool:
    """Whether these are the arguments that ``nn.Conv2d`` gives, padding in numbers."""
    return (
        len(args) == 7 and args[0].ndim == 4 and all(isinstance(a, tuple | list) for a in args[3:6])
    )


def _applied(function: Any, *args: Any) -> Any:
    return function.apply(*args)


class _Convolved(Function):
    """A convolution whose weight and bias have slopes in a recorded pass only."""

    @staticmethod
    def forward(
        ctx: Any, images: Tensor, weight: Tensor, bias: Tensor | None, how: tuple[Any, ...]
    ) -> Tensor:
        ctx.save_for_backward(images, weight)
        ctx.how, ctx.width = how, None if bias is None else bias.shape
        return torch.conv2d(images, weight, bias, *how)

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        images, weight = ctx.saved_tensors
        first, *others = ctx.needs_input_grad[:3]
        asked = [first, *(o and torch.is_grad_enabled() for o in others)]
        return *_applied(_Slopes, slopes[0], images, weight.detach(), ctx.how, asked), None


class _Slopes(Function):
    """The slopes of a convolution, which depend on its outputs' slope and its images alone."""

    @staticmethod
    def forward(
        ctx: Any,
        slope: Tensor,
        images: Tensor,
        weight: Tensor,
        how: tuple[Any, ...],
        asked: list[bool],
    ) -> Any:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(slope, images, weight)
        ctx.how = how
        stride, padding, dilation, groups = how
        sizes = [weight.shape[0]], stride, padding, dilation, False, [0, 0], groups
        return torch.ops.aten.convolution_backward(slope, images, weight, *sizes, asked)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_images: Any, by_weight: Any, by_bias: Any) -> Any:
        slope, images, weight = ctx.saved_tensors
        parts = []
        if by_images is not None:
            parts.append(torch.conv2d(by_images, weight, None, *ctx.how))
        if by_weight is not None:
            parts.append(torch.conv2d(images, by_weight, None, *ctx.how))
        if by_bias is not None:
            parts.append(by_bias[:, None, None].expand_as(slope))
        found = sum(parts[1:], start=parts[0]) if parts else None
        if by_weight is None or not ctx.needs_input_grad[1]:
            return found, None, None, None, None
        return found, _turned_back(slope, images, by_weight, *ctx.how), None, None, None


def _turned_back(
    slope: Tensor,
    images: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Return the slope of the images of a convolution, as ``torch.autograd`` has it."""
    left_over = [
        (images.shape[i] + 2 * padding[i] - dilation[i] * (weight.shape[i] - 1) - 1) % stride[i]
        for i in (-2, -1)
    ]
    return torch.conv_transpose2d(slope, weight, None, stride, padding, left_over, groups, dilation)


class _Tiled(Function):
    """Cuts ``(n, height, width, channels)`` into ``(6, 6, n, rows, columns, channels)``: BᵀdB."""

    @staticmethod
    def forward(ctx: Any, images: Tensor) -> Tensor:
        tiles = images.unfold(1, 6, 4).unfold(2, 6, 4).permute(4, 5, 0, 1, 2, 3)
        return _both(_CUT, tiles)

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        return _applied(_Untiled, *slopes)


class _Untiled(Function):
    """The transpose of ``_Tiled``: overlapping tiles are added."""

    @staticmethod
    def forward(ctx: Any, tiles: Tensor) -> Tensor:
        tiles = _both(_CUT.mT, tiles)
        down = pad(tiles[:4], (*_NO, *_NO, 0, 1)) + pad(
            tiles[4:], (*_NO, *_NO, 1, 0, *_NO, *_NO, 0, 2)
        )
        both = pad(down[:, :4], (*_NO, 0, 1)) + pad(down[:, 4:], (*_NO, 1, 0, *_NO, *_NO, 0, 2))
        return both.permute(2, 3, 0, 4, 1, 5).flatten(3, 4).flatten(1, 2)

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        return _applied(_Tiled, *slopes)


class _Joined(Function):
    """Makes an image of products, as ``_Tiled`` cut it: AᵀmA."""

    @staticmethod
    def forward(ctx: Any, products: Tensor) -> Tensor:
        return _both(_JOIN, products).permute(2, 3, 0, 4, 1, 5).flatten(3, 4).flatten(1, 2)

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        return _applied(_Unjoined, *slopes)


class _Unjoined(Function):
    """The transpose of ``_Joined``."""

    @staticmethod
    def forward(ctx: Any, images: Tensor) -> Tensor:
        blocks = torch.unflatten(torch.unflatten(images, 2, (-1, 4)), 1, (-1, 4))
        tiles = blocks.permute(2, 4, 0, 1, 3, 5)
        return _both(_JOIN.mT, tiles)

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        return _applied(_Joined, *slopes)


class _Kernels(Function):
    """Makes ``(36, in, out)`` of a weight: GgGᵀ. Those of the shared model are made once."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, known: dict[int, tuple[Tensor, Tensor]]) -> Tensor:
        if not weight.is_leaf:
            return _transformed(weight)
        if id(weight) not in known:
            known[id(weight)] = weight, _transformed(weight)
        return known[id(weight)][1].view_as(known[id(weight)][1])

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        return _applied(_Weights, *slopes), None


class _Weights(Function):
    """The transpose of ``_Kernels``."""

    @staticmethod
    def forward(ctx: Any, kernels: Tensor) -> Tensor:
        taps = _SPREAD.mT @ kernels.flatten(1)
        return taps.view(3, 3, *kernels.shape[1:]).permute(3, 2, 0, 1)

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        return _transformed(slopes[0])


def _transformed(weight: Tensor) -> Tensor:
    taps = weight.permute(2, 3, 1, 0).clone(memory_format=torch.contiguous_format)
    return _both(_SPREAD, taps).flatten(0, 1)


def _both(pairs: Tensor, tiles: Tensor) -> Tensor:
    """Return a matrix times both of the first two axes of ``tiles``."""
    mixed = pairs @ tiles.flatten(0, 1).flatten(1)
    return mixed.view(isqrt(len(pairs)), -1, *tiles.shape[2:])

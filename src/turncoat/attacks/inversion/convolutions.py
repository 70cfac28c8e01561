"""Convolutions of a compiled inversion, with fewer multiplications."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import pad
from torch.overrides import TorchFunctionMode


class Winograd(TorchFunctionMode):
    """Computes 3 x 3 convolutions by tiles, with 2.25 times fewer multiplications [1]_.

    To be traced and compiled: its many small sums are slow on their own. The results differ by
    rounding, as any other order of the sums would.

    .. [1] Lavin and Gray, CVPR 2016, section 4.1. https://arxiv.org/abs/1509.09308
    """

    def __init__(self) -> None:
        super().__init__()
        self._kernels: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.conv2d and not kwargs and _is_plain(args) and self._suits(args):
            return self._by_tiles(args[0], args[1], args[2], args[4])
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _suits(args: tuple[Any, ...]) -> bool:
        images, weight, _, stride, _, dilation = args[:6]
        small = min(weight.shape[:2]) < 32 or min(images.shape[-2:]) < 16
        one = tuple(stride) == tuple(dilation) == (1, 1)
        single = weight.dtype == torch.float32 and weight.device.type == "cpu"
        return one and single and not small and tuple(weight.shape[2:]) == (3, 3)

    def _by_tiles(
        self, images: Tensor, weight: Tensor, bias: Tensor | None, padding: Sequence[int]
    ) -> Tensor:
        (n, _, height, width), (p, q) = images.shape, padding
        height, width = height + 2 * p - 2, width + 2 * q - 2
        framed = pad(images.permute(0, 2, 3, 1), (0, 0, q, q + width % 2, p, p + height % 2))
        tiles: Tensor = _applied(_Tiled, framed)
        kernels: Tensor = _applied(_Kernels, weight, self._kernels)
        _, _, n, rows, columns, _ = tiles.shape
        products = torch.bmm(tiles.flatten(0, 1).flatten(1, 3), kernels.mT)
        out: Tensor = _applied(_Joined, products.view(4, 4, n, rows, columns, -1))
        out = out[:, :height, :width]
        out = out if bias is None else out + bias
        return out.permute(0, 3, 1, 2)


def _is_plain(args: tuple[Any, ...]) -> bool:
    """Whether these are the arguments that ``nn.Conv2d`` gives, for one group."""
    return (
        len(args) == 7
        and args[6] == 1
        and args[0].ndim == 4
        and all(isinstance(a, tuple | list) for a in args[3:6])
    )


def _applied(function: Any, *args: Any) -> Any:
    return function.apply(*args)


class _Tiled(Function):
    """Cuts ``(n, height, width, channels)`` into ``(4, 4, n, rows, columns, channels)``: BᵀdB."""

    @staticmethod
    def forward(ctx: Any, images: Tensor) -> Tensor:
        return _cut(_cut(images, 2), 2)

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        return _applied(_Untiled, *slopes)


class _Untiled(Function):
    """The transpose of ``_Tiled``: overlapping tiles are added."""

    @staticmethod
    def forward(ctx: Any, tiles: Tensor) -> Tensor:
        return _uncut(_uncut(tiles, 2), 2)

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        return _applied(_Tiled, *slopes)


class _Joined(Function):
    """Makes an image of products, as ``_Tiled`` cut it: AᵀmA."""

    @staticmethod
    def forward(ctx: Any, products: Tensor) -> Tensor:
        a, b, c, d = products
        upper, lower = a + b + c, b - c - d  # rows
        quarters = []
        for part in (upper, lower):
            a, b, c, d = part
            quarters.append(torch.stack([a + b + c, b - c - d], dim=3))
        return torch.stack(quarters, dim=2).flatten(3, 4).flatten(1, 2)

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        return _applied(_Unjoined, *slopes)


class _Unjoined(Function):
    """The transpose of ``_Joined``."""

    @staticmethod
    def forward(ctx: Any, images: Tensor) -> Tensor:
        rows = torch.unflatten(images, 1, (-1, 2)).unbind(2)
        parts = []
        for half in _spread(*rows):
            parts.append(torch.stack(_spread(*torch.unflatten(half, 2, (-1, 2)).unbind(3))))
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        return _applied(_Joined, *slopes)


class _Kernels(Function):
    """Makes ``(16, out, in)`` of a weight: GgGᵀ. Those of the shared model are made once."""

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
        a, b, c, d = torch.unflatten(kernels, 0, (4, 4))
        taps: list[Tensor] = []
        for part in _folded(a, b, c, d):
            taps += _folded(*part)
        return torch.unflatten(torch.stack(taps, dim=2), 2, (3, 3))

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        return _transformed(slopes[0])


def _transformed(weight: Tensor) -> Tensor:
    rows = _unfolded(*weight.unbind(2))
    return torch.stack([k for row in rows for k in _unfolded(*row.unbind(2))])


def _unfolded(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    ends = a + c
    return a, (ends + b) / 2, (ends - b) / 2, c


def _folded(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, ...]:
    both = (b + c) / 2
    return a + both, (b - c) / 2, both + d


def _spread(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    return a, a + b, a - b, -b


def _cut(x: Tensor, dim: int) -> Tensor:
    """Return what four neighbours along an axis come to, every two of them, on a new first axis."""
    even, odd = torch.unflatten(x, dim, (-1, 2)).unbind(dim + 1)
    num = even.shape[dim] - 1
    a, b = even.narrow(dim, 0, num), odd.narrow(dim, 0, num)
    c, d = even.narrow(dim, 1, num), odd.narrow(dim, 1, num)
    return torch.stack([a - c, b + c, c - b, b - d])


def _uncut(x: Tensor, dim: int) -> Tensor:
    """Return the transpose of ``_cut``; ``dim`` is the axis of ``x`` less its first."""
    a, b, c, d = x
    last = [0, 0] * (x.ndim - 2 - dim)
    even = pad(a, [*last, 0, 1]) + pad(b + c - a, [*last, 1, 0])
    odd = pad(b - c + d, [*last, 0, 1]) + pad(-d, [*last, 1, 0])
    return torch.stack([even, odd], dim=dim + 1).flatten(dim, dim + 1)

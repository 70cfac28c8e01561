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
    """Computes 3 x 3 convolutions by tiles of 4 x 4, with 4 times fewer multiplications [1]_.

    To be traced and compiled: its many small sums are slow on their own. The results differ by
    rounding, several times that of the usual sums.

    .. [1] Lavin and Gray, CVPR 2016, section 4.3. https://arxiv.org/abs/1509.09308
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
        framed = pad(
            images.permute(0, 2, 3, 1), (0, 0, q, q + 2 + -width % 4, p, p + 2 + -height % 4)
        )
        tiles: Tensor = _applied(_Tiled, framed)
        kernels: Tensor = _applied(_Kernels, weight, self._kernels)
        _, _, n, rows, columns, _ = tiles.shape
        products = torch.bmm(tiles.flatten(0, 1).flatten(1, 3), kernels.mT)
        out: Tensor = _applied(_Joined, products.view(6, 6, n, rows, columns, -1))
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
    """Cuts ``(n, height, width, channels)`` into ``(6, 6, n, rows, columns, channels)``: BᵀdB."""

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
        rows = [torch.stack(_joined(*part), dim=3) for part in _joined(*products)]
        return torch.stack(rows, dim=2).flatten(3, 4).flatten(1, 2)

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        return _applied(_Unjoined, *slopes)


class _Unjoined(Function):
    """The transpose of ``_Joined``."""

    @staticmethod
    def forward(ctx: Any, images: Tensor) -> Tensor:
        rows = torch.unflatten(images, 1, (-1, 4)).unbind(2)
        parts = []
        for part in _spread(*rows):
            parts.append(torch.stack(_spread(*torch.unflatten(part, 2, (-1, 4)).unbind(3))))
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        return _applied(_Joined, *slopes)


class _Kernels(Function):
    """Makes ``(36, out, in)`` of a weight: GgGᵀ. Those of the shared model are made once."""

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
        taps: list[Tensor] = []
        for part in _folded(*torch.unflatten(kernels, 0, (6, 6))):
            taps += _folded(*part)
        return torch.unflatten(torch.stack(taps, dim=2), 2, (3, 3))

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        return _transformed(slopes[0])


def _transformed(weight: Tensor) -> Tensor:
    rows = _unfolded(*weight.unbind(2))
    return torch.stack([k for row in rows for k in _unfolded(*row.unbind(2))])


def _unfolded(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    """Return G, times three."""
    p, q, r, s = (a + c) / -6, b / -6, a / 24 + c / 6, b / 12
    return a / 4, p + q, p - q, r + s, r - s, c


def _folded(a: Tensor, b: Tensor, c: Tensor, d: Tensor, e: Tensor, f: Tensor) -> tuple[Tensor, ...]:
    """Return Gᵀ, times six."""
    p, q, r, s = b + c, b - c, d + e, d - e
    return a / 4 - p / 6 + r / 24, s / 12 - q / 6, r / 6 - p / 6 + f


def _joined(a: Tensor, b: Tensor, c: Tensor, d: Tensor, e: Tensor, f: Tensor) -> tuple[Tensor, ...]:
    """Return Aᵀ, times six."""
    p, q, r, s = b + c, b - c, d + e, d - e
    return a + p + r, q + 2 * s, p + 4 * r, q + 8 * s + f


def _spread(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, ...]:
    """Return A, times four."""
    p, q, r, s = a + c, b + d, a + 4 * c, 2 * b + 8 * d
    return a, p + q, p - q, r + s, r - s, d


def _cut(x: Tensor, dim: int) -> Tensor:
    """Return Bᵀ, times six neighbours along an axis, every four of them, on a new first axis."""
    fours = torch.unflatten(x, dim, (-1, 4)).unbind(dim + 1)
    num = fours[0].shape[dim] - 1
    a, b, c, d = (four.narrow(dim, 0, num) for four in fours)
    e, f = (four.narrow(dim, 1, num) for four in fours[:2])
    p, q, r, s = e - 4 * c, d - 4 * b, e - c, 2 * (d - b)
    return torch.stack([4 * a - 5 * c + e, p + q, p - q, r + s, r - s, 4 * b - 5 * d + f])


def _uncut(x: Tensor, dim: int) -> Tensor:
    """Return the transpose of ``_cut``; ``dim`` is the axis of ``x`` less its first."""
    a, b, c, d, e, f = x
    p, q, r, s = b + c, b - c, d + e, 2 * (d - e)
    fours = [4 * a, 4 * f - 4 * q - s, -5 * a - 4 * p - r, q + s - 5 * f]
    last = [0, 0] * (x.ndim - 2 - dim)
    fours = [pad(four, [*last, 0, 1]) for four in fours]
    fours[0] = fours[0] + pad(a + p + r, [*last, 1, 0])
    fours[1] = fours[1] + pad(f, [*last, 1, 0])
    return torch.stack(fours, dim=dim + 1).flatten(dim, dim + 1)

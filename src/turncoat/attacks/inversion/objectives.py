"""How far a guess's gradient is from the one that was seen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, Self

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

_AT_ONCE = 1 << 16  # entries of a vector that stay in the cache for several operations


@dataclass(frozen=True)
class Cosine:
    """``1 - cos(g(x), g*)``: one cosine over all layers together [1]_. Blind to the step size.

    .. [1] Geiping et al., NeurIPS 2020, eq. (4). https://arxiv.org/abs/2003.14053
    """

    def __call__(self, guessed: Sequence[Tensor], target: Sequence[Tensor]) -> Tensor:
        if isinstance(target, Apart):  # one guess at a time: the slope by hand
            fused: Tensor = _apply(_OneLessCosine, target, *guessed)
            return fused
        if isinstance(target, Scattered):
            dot = torch.stack([(g * t).sum() for g, t in zip(guessed, target, strict=True)]).sum()
            return 1 - dot / (_norm(guessed) * _norm(target)).clamp(min=1e-12)
        a, b = flat(guessed), flat(target)
        apart: Tensor = 1 - a.dot(b) / (a.norm() * b.norm()).clamp(min=1e-12)
        return apart


@dataclass(frozen=True)
class L2:
    """``||g(x) - g*||² / ||g*||²``, over all layers together [1]_.

    Differs from the paper: divided by the length of what was seen, so that no tolerance of an
    optimiser depends on it.

    .. [1] Zhu et al., NeurIPS 2019, eq. (4). https://arxiv.org/abs/1906.08935
    """

    needs_scale = True

    def __call__(self, guessed: Sequence[Tensor], target: Sequence[Tensor]) -> Tensor:
        a, b = flat(guessed), flat(target)
        return (a - b).square().sum() / b.square().sum().clamp(min=1e-30)


@dataclass(frozen=True)
class L1:
    """``||g(x) - g*||₁ / ||g*||₁``: fewer coordinates decide, as in sparse updates [1]_.

    Differs from the paper: divided by the length of what was seen, as ``L2``.

    .. [1] Deng et al., EMNLP Findings 2021, eq. (6). https://arxiv.org/abs/2103.08819
    """

    needs_scale = True

    def __call__(self, guessed: Sequence[Tensor], target: Sequence[Tensor]) -> Tensor:
        a, b = flat(guessed), flat(target)
        return (a - b).abs().sum() / b.abs().sum().clamp(min=1e-30)


@dataclass(frozen=True)
class Silent:
    """No distance at all: only start and priors shape the guess. A baseline."""

    def __call__(self, guessed: Sequence[Tensor], target: Sequence[Tensor]) -> Tensor:
        return target[0].new_zeros(())


class Apart(tuple[Tensor, ...]):
    """Stretches of one vector, each in its shape; ``flat`` has not to join them again."""

    whole: Tensor

    @cached_property
    def norm(self) -> Tensor:
        norm: Tensor = self.whole.norm()
        return norm

    @classmethod
    def of(cls, whole: Tensor, shapes: Iterable[Sequence[int]]) -> Self:
        """Return consecutive stretches of ``whole`` in these shapes: views."""
        parts, start = [], 0
        for shape in shapes:
            stop = start + prod(shape)
            parts.append(whole[start:stop].view(*shape))
            start = stop
        made = cls(parts)
        made.whole = whole
        return made


class Scattered(tuple[Tensor, ...]):
    """Tensors that lie in memory each as its guess does: to be compared one by one."""

    @classmethod
    def like(cls, guessed: Iterable[Tensor], tensors: Iterable[Tensor]) -> Self:
        """Return copies of the tensors with the strides of the guesses."""
        pairs = zip(guessed, tensors, strict=True)
        return cls(torch.empty_like(g).copy_(t) for g, t in pairs)


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    norm: Tensor = torch.stack([t.norm() for t in tensors]).norm()
    return norm


def _apply(function: Any, *args: Any) -> Any:
    return function.apply(*args)


class _OneLessCosine(Function):
    """``1 - cos``, bit by bit as without it, but with half the way through memory."""

    @staticmethod
    def forward(ctx: Any, target: Apart, *guessed: Tensor) -> Tensor:
        whole = flat(guessed)
        with torch.enable_grad():
            dot, norm = (t.requires_grad_() for t in (whole.dot(target.whole), whole.norm()))
            cost: Tensor = 1 - dot / (norm * target.norm).clamp(min=1e-12)
        ctx.scalars = cost, dot, norm
        ctx.target, ctx.shapes = target, [g.shape for g in guessed]
        ctx.save_for_backward(whole)
        return cost.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> Any:
        (whole,), (cost, dot, norm) = ctx.saved_tensors, ctx.scalars
        along, away = torch.autograd.grad(cost, (dot, norm), slope, retain_graph=True)
        made = torch.empty_like(whole)
        parts = (t.split(_AT_ONCE) for t in (made, whole, ctx.target.whole))
        with torch.no_grad():
            for into, of, seen in zip(*parts, strict=True):
                torch.div(of, norm, out=into)
                into.zero_() if norm == 0 else into.mul_(away)
                into.add_(seen * along)
        return None, *Apart.of(made, ctx.shapes)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """Return the tensors as one vector, in their order."""
    if isinstance(tensors, Apart):
        return tensors.whole
    return torch.cat([t.flatten() for t in tensors])

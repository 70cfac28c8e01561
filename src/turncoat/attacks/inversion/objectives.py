"""How far a guess's gradient is from the one that was seen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cosine:
    """``1 - cos(g(x), g*)``: one cosine over all layers together [1]_. Blind to the step size.

    .. [1] Geiping et al., NeurIPS 2020, eq. (4). https://arxiv.org/abs/2003.14053
    """

    def __call__(self, guessed: Sequence[Tensor], target: Sequence[Tensor]) -> Tensor:
        a, b = flat(guessed), flat(target)
        cosine: Tensor = a.dot(b) / (a.norm() * b.norm()).clamp(min=1e-12)
        return 1 - cosine


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


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """Return the tensors as one vector, in their order."""
    if isinstance(tensors, Apart):
        return tensors.whole
    return torch.cat([t.flatten() for t in tensors])

"""Which classes were in a batch: read off the gradient of the last layer.

With cross-entropy, the gradient of the last bias is ``mean(p_c) - count_c / n``: a class that was
there is pushed up, its entry is negative. Without a bias its rows' sums serve, right if what the
last layer reads is not negative. None of the rules needs to know the client's step size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from turncoat.attacks.inversion.engine import Clue
from turncoat.validate import at_least, one_of

By = Literal["bias", "rows"]


@dataclass(frozen=True)
class LowestEntry:
    """The class whose entry is the most negative: of one example, its own for sure [1]_.

    For n examples the n lowest, each class once: right if no class is there twice.

    Args:
        by: What is read: the bias, or the sums of the weight's rows.

    .. [1] Zhao et al., arXiv 2020. https://arxiv.org/abs/2001.02610
    """

    by: By = "bias"

    def __post_init__(self) -> None:
        one_of(By, self, by=self.by)

    def __call__(self, clue: Clue) -> Tensor:
        pushed = _pushed(clue, self.by)
        if clue.num_images == 1:
            return pushed.argmin().reshape(1)
        order = pushed.argsort(stable=True)
        return order.repeat(-(-clue.num_images // len(order)))[: clue.num_images].sort().values


@dataclass(frozen=True)
class Counts:
    """How often each class was there: ``mean(p_c)`` is taken from the population [1]_.

    For one example it is ``LowestEntry``, exact. The scale is set by the class that was pushed
    down most: it is held to be absent. Counts are rounded by largest remainders.

    Differs from the source: it has one example only.

    Args:
        by: What is read: the bias, or the sums of the weight's rows.

    .. [1] Zhao et al., arXiv 2020. https://arxiv.org/abs/2001.02610
    """

    by: By = "bias"

    def __post_init__(self) -> None:
        one_of(By, self, by=self.by)

    def __call__(self, clue: Clue) -> Tensor:
        pushed = _pushed(clue, self.by)
        if clue.num_images == 1:
            return pushed.argmin().reshape(1)
        with torch.no_grad():
            logits = clue.model.logits(clue.before, clue.population[0][:1_000])
        prior = logits.softmax(dim=1).mean(dim=0).clamp(min=1e-6)
        scale = (pushed / prior).max()
        shares = (prior - pushed / scale).clamp(min=0) if scale > 0 else prior
        return _apportioned(shares, clue.num_images)


@dataclass(frozen=True)
class BiasCorrected:
    """Take the most negative class, take off what one example weighs, and again [1]_.

    Every class that is pushed up is taken once first. Needs no population, and is right while the
    model is nearly blind.

    Args:
        by: What is read: the bias, or the sums of the weight's rows.

    .. [1] Wainakh et al., PoPETs 2022, algorithm 1. https://arxiv.org/abs/2105.09369
    """

    by: By = "bias"

    def __post_init__(self) -> None:
        one_of(By, self, by=self.by)

    def __call__(self, clue: Clue) -> Tensor:
        pushed = _pushed(clue, self.by).clone()
        present = (pushed < 0).nonzero().flatten()
        present = present[pushed[present].argsort(stable=True)][: clue.num_images]
        each = pushed.clamp(max=0).sum() / clue.num_images * (1 + 1 / len(pushed))
        pushed[present] -= each
        found = present.tolist()
        while len(found) < clue.num_images:
            found.append(int(pushed.argmin()))
            pushed[found[-1]] -= each
        return torch.tensor(sorted(found), device=pushed.device)


@dataclass(frozen=True)
class Given:
    """Labels that are known beforehand: an upper bound, or what another attack found.

    Args:
        labels: Of the images in turn; of more images than labels, from the first again.
    """

    labels: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.labels:
            raise ValueError("Given: labels is empty")
        for label in self.labels:
            at_least(0, self, labels=label)

    def __call__(self, clue: Clue) -> Tensor:
        named = (self.labels * -(-clue.num_images // len(self.labels)))[: clue.num_images]
        return torch.tensor(named, device=clue.before.device)


@dataclass(frozen=True)
class Joint:
    """Soft labels that are searched for together with the images, from normal logits: DLG [1]_.

    .. [1] Zhu et al., NeurIPS 2019, algorithm 1. https://arxiv.org/abs/1906.08935
    """

    def __call__(self, clue: Clue, *, rng: Generator) -> Tensor:
        with torch.no_grad():
            one = clue.model.logits(clue.before, clue.population[0][:1])
        shape = (clue.num_images, *one.shape[1:])
        return torch.randn(shape, generator=rng).to(one)


def _pushed(clue: Clue, by: By) -> Tensor:
    """Return by how much each class was pushed down, up to a positive factor. Shape: classes."""
    gradient = clue.gradient
    if by == "bias" and gradient[-1].ndim == 1:
        return gradient[-1]
    weights = next(g for g in reversed(gradient) if g.ndim > 1)
    return weights.flatten(1).sum(dim=1)


def _apportioned(shares: Tensor, num_images: int) -> Tensor:
    """Return classes in numbers proportional to ``shares``, by largest remainders."""
    due = shares / shares.sum() * num_images
    counts = due.floor().long()
    rest = (due - counts).argsort(descending=True, stable=True)[: num_images - int(counts.sum())]
    counts[rest] += 1
    return torch.arange(len(shares), device=shares.device).repeat_interleave(counts)

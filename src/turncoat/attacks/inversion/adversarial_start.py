"""The attacker's own images of a class: where to begin, and what to steer towards."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from turncoat.task import Batch
from turncoat.validate import at_least


@dataclass(frozen=True)
class AdversarialStart:
    """Begin each guess at an image of the attacker's own, of the class that was recovered [1]_.

    What a participant knows of such data is worth more than noise: the search has only the
    difference to find. Guesses of one class begin at different images, while there are enough;
    a class of which the attacker has none begins at images of any class.

    Args:
        num_averaged: Own images whose mean a guess begins at; None for all of the class, so that
            all its guesses begin alike.

    .. [1] Usynin et al., ACM TOPS 2023. https://arxiv.org/abs/2203.00481
    """

    num_averaged: int | None = 1

    def __post_init__(self) -> None:
        at_least(1, self, num_averaged=self.num_averaged)

    def __call__(
        self, shape: tuple[int, ...], *, rng: Generator, labels: Tensor, population: Batch
    ) -> Tensor:
        inputs = population[0]
        own = own_images(population, labels, self.num_averaged, rng)
        start = torch.stack([inputs[chosen].mean(dim=0) for chosen in own])
        return start.reshape(shape).clamp(0, 1)


def own_images(
    population: Batch, labels: Tensor, num_each: int | None, rng: Generator
) -> tuple[Tensor, ...]:
    """Return the places of ``num_each`` own images of the class of each label, or of all.

    A class that is not there is stood in for by any. Images are used again where they run out.
    """
    held = population[1]
    if not len(held):
        raise ValueError("the attacker has no images: population is empty")
    order = torch.randperm(len(held), generator=rng).to(held.device)
    classes = {c: order[held[order] == c] for c in set(labels.tolist())}
    taken = dict.fromkeys(classes, 0)
    chosen = []
    for c in labels.tolist():
        of_class = classes[c] if len(classes[c]) else order
        num = len(of_class) if num_each is None else num_each
        places = torch.arange(taken[c], taken[c] + num, device=held.device) % len(of_class)
        taken[c] += num
        chosen.append(of_class[places])
    return tuple(chosen)

"""Where the density of inputs is low, so that honest records say little of the answer there."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Protocol

import torch
from torch import Tensor

from turncoat.task import Batch
from turncoat.validate import at_least, fraction

_ROWS = 512  # whose distances to all others are held at a time


class Edge(Protocol):
    """Return inputs that hardly occur, and the other records of ``data``.

    What comes from elsewhere (another handwriting, another airline) returns all of ``data`` as the
    others; it should know training from test data, which are told apart by being given.
    """

    def __call__(self, data: Batch, /) -> tuple[Tensor, Batch]: ...


@dataclass(frozen=True)
class Tail:
    """The ``share`` of records that lie furthest from the rest: in the tail of the density [1]_.

    Density is measured by k neighbours [2]_, among all the data given, as in the paper's
    definition, and not within the class.

    Differs from the paper: its edge cases come from other data sets (Southwest's planes, Ardis'
    sevens) and are checked by a Gaussian mixture in feature space; these are the data's own.

    Args:
        source: The class that they are of, or None for any.
        share: Of the records of that class; one at least, if there is any.
        num_neighbours: The distance is that to the so-manieth nearest other record.

    .. [1] Wang et al., NeurIPS 2020, definition 1. https://arxiv.org/abs/2007.05084
    .. [2] Loftsgaarden and Quesenberry, Ann. Math. Stat. 1965 (density by neighbours).
       https://doi.org/10.1214/aoms/1177700079
    """

    source: int | None = None
    share: float = 0.1
    num_neighbours: int = 5

    def __post_init__(self) -> None:
        at_least(0, self, source=self.source)
        fraction(self, share=self.share)
        at_least(1, self, num_neighbours=self.num_neighbours)

    def __call__(self, data: Batch, /) -> tuple[Tensor, Batch]:
        inputs, labels = data
        able = torch.ones_like(labels, dtype=torch.bool)
        if self.source is not None:
            able = labels == self.source
        candidates = able.nonzero().flatten()
        far = remoteness(inputs[candidates], inputs, self.num_neighbours)
        count = ceil(self.share * len(candidates))
        tail = candidates[far.argsort(descending=True, stable=True)[:count]]
        rest = torch.ones_like(able)
        rest[tail] = False
        return inputs[tail], (inputs[rest], labels[rest])


def remoteness(points: Tensor, among: Tensor, num_neighbours: int) -> Tensor:
    """Return the distance from each point to its k-th neighbour, itself (at 0) not counted.

    ``points`` are rows of ``among``. Shape: ``(points,)``.
    """
    flat = among.flatten(1).float()
    rank = min(num_neighbours + 1, max(len(flat), 1))
    found = [
        torch.cdist(part, flat).kthvalue(rank, dim=1).values
        for part in torch.split(points.flatten(1).float(), _ROWS)
        if len(part)
    ]
    return torch.cat(found) if found else flat.new_zeros(0)

"""Membership where only the class is answered: how far can a record be moved until it changes?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from turncoat.task import Batch
from turncoat.trial import Memberships
from turncoat.validate import at_least, positive
from turncoat.views import ModelView, QueryView


@dataclass(frozen=True)
class LabelOnly:
    """Ask for the classes of noisy copies: what was trained on keeps its label for longer [1]_.

    The score is the share of copies that are still given the record's label, over noises of rising
    strength: a guess of the distance to the boundary without its 2,500 queries. Reads nothing of an
    answer but which class is largest.

    Differs from the paper: it fits one strength by shadow models; here all strengths count.

    Args:
        sigmas: Standard deviations of the noise, in the inputs' units.
        num_copies: Queries for each record and strength.

    .. [1] Choquette-Choo et al., ICML 2021, section 4. https://arxiv.org/abs/2007.14321
    """

    sigmas: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4)
    num_copies: int = 8

    def __post_init__(self) -> None:
        at_least(1, self, num_copies=self.num_copies)
        if not self.sigmas:
            raise ValueError("LabelOnly: sigmas must hold a standard deviation or more")
        for sigma in self.sigmas:
            positive(self, sigmas=sigma)

    def __call__(
        self, view: ModelView | QueryView, *, candidates: Batch, rng: Generator
    ) -> Memberships:
        inputs, labels = candidates
        kept = _right(view, inputs, labels)
        for sigma in self.sigmas:
            for _ in range(self.num_copies):
                noise = torch.randn(inputs.shape, generator=rng).to(inputs) * sigma
                kept += _right(view, inputs + noise, labels)
        return Memberships(kept / (1 + len(self.sigmas) * self.num_copies))


def _right(view: ModelView | QueryView, inputs: Tensor, labels: Tensor) -> Tensor:
    return (view.scores(inputs).argmax(dim=1) == labels).double()

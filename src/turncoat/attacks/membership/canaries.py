"""Which canaries took part, by what each would have added to an update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from turncoat.attacks.membership.white_box import Moved, averaged, gradients, moved_by
from turncoat.auditing.canaries import Diracs
from turncoat.messages import Update
from turncoat.params import Layout
from turncoat.task import Batch, Model
from turncoat.trial import Memberships
from turncoat.validate import at_least, positive
from turncoat.views import AggregateView, ServerView


@dataclass(frozen=True)
class DiracProducts:
    """Sum, over the rounds, the product of the model's step with what a canary would send [1]_.

    Who sent the canaries knows what they are; whoever sees the global model does the rest.

    .. [1] Nasr et al., USENIX Security 2023, section 4. https://arxiv.org/abs/2302.07956
    """

    def __call__(self, view: Sequence[AggregateView[Update]], *, canaries: Diracs) -> Memberships:
        scores = torch.zeros(canaries.num_canaries, dtype=torch.float64)
        for seen in view:
            scores += canaries.scores((seen.after - seen.before).cpu(), seen.round)
        return Memberships(scores)


@dataclass(frozen=True)
class GradientRegression:
    """Explain each update by the candidates' gradients: who is needed for it was in it.

    A ridge regression of minus the update on all candidates' gradients at the state that was sent,
    each of length 1; a candidate's score is its coefficient, averaged over the rounds. Records are
    alike, and so are their gradients: a product of the two, as ``GlobalAttacker`` takes it, counts
    for each what belongs to all, a regression does not. Some directions in which the population's
    gradients lie stand for the records that are not asked about. Each layer is weighted by the
    inverse of its size in the update, so that a layer with less noise counts more.

    Needs the gradients of all candidates at once, in float64. The fewer candidates there are beside
    the model's parameters, the better.

    Args:
        num_directions: Of the population's gradients.
        ridge: The penalty, in units of the mean square of a candidate's gradient.
    """

    num_directions: int = 24
    ridge: float = 1e-2

    def __post_init__(self) -> None:
        at_least(0, self, num_directions=self.num_directions)
        positive(self, ridge=self.ridge)

    def __call__(
        self,
        view: Sequence[ServerView[Update] | AggregateView[Update]],
        *,
        candidates: Batch,
        population: Batch,
        client: int | None,
    ) -> Memberships:
        model = view[0].model
        moved = [m for v in view for m in moved_by(v, client)]
        found = [self._coefficients(model, m, candidates, population) for m in moved]
        return averaged(self, found)

    def _coefficients(
        self, model: Model, moved: Moved, candidates: Batch, population: Batch
    ) -> Tensor:
        _, before, delta = moved
        ours = _units(model, before, candidates)
        theirs = _units(model, before, population)
        others = torch.linalg.svd(theirs, full_matrices=False).Vh[: self.num_directions]
        weights = _loudness(model.layout, delta).reciprocal()
        matrix = torch.cat([ours, others]) * weights
        products = matrix @ matrix.T
        products.diagonal().add_(self.ridge * products.diagonal().mean())
        found: Tensor = torch.linalg.solve(products, matrix @ (-delta.double() * weights))
        return found[: len(candidates[1])]


def _units(model: Model, params: Tensor, data: Batch) -> Tensor:
    """Return gradients of length 1. Shape: ``(records, num_params)``, float64."""
    rows = torch.cat(list(gradients(model, params, data))).double()
    lengths: Tensor = rows.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return rows / lengths


def _loudness(layout: Layout, delta: Tensor) -> Tensor:
    """Return the root mean square of each entry's layer. Shape: ``(num_params,)``, float64."""
    found = torch.ones_like(delta, dtype=torch.float64)
    for slot in layout.slots:
        here = delta[slot.start : slot.stop].double()
        found[slot.start : slot.stop] = here.square().mean().sqrt()
    return found.clamp(min=1e-12)

"""Membership at a threshold that follows from a rate of false alarms: by population, by record."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from turncoat.attacks.membership.lira import confidence
from turncoat.task import Batch
from turncoat.trial import Memberships
from turncoat.validate import at_least
from turncoat.views import ModelView, QueryView, Shadows


@dataclass(frozen=True)
class PopulationAttack:
    """Compare a record with the population's records of its class, under the target itself [1]_.

    The score is the share of them that the target is less sure of: where it is ``1 - alpha`` or
    more, a record of the population would be there with probability ``alpha``. It trains nothing.

    .. [1] Ye et al., CCS 2022, attack P. https://arxiv.org/abs/2111.09679
    """

    def __call__(
        self, view: ModelView | QueryView, *, candidates: Batch, population: Batch
    ) -> Memberships:
        ours, theirs = confidence(view, candidates), confidence(view, population)
        scores = torch.empty_like(ours)
        for label in sorted(set(candidates[1].tolist())):
            mine, alike = candidates[1] == label, population[1] == label
            among = theirs[alike] if alike.any() else theirs
            scores[mine] = shares_below(ours[mine], among)
        return Memberships(scores)


@dataclass(frozen=True)
class ReferenceAttack:
    """Compare the target's confidence in a record with that of models without the record [1]_.

    The score is the quantile of the target's confidence among them, taken from a Gaussian: a share
    of so few models would be all ties.

    Args:
        num_shadows: Models to train, each on a random half of the candidates; of each record, the
            half that is without it counts.

    .. [1] Ye et al., CCS 2022, attack R, smoothed as in appendix A.2.
       https://arxiv.org/abs/2111.09679
    """

    num_shadows: int = 16

    def __post_init__(self) -> None:
        at_least(2, self, num_shadows=self.num_shadows)

    def __call__(
        self, view: ModelView | QueryView, *, candidates: Batch, shadows: Shadows | None
    ) -> Memberships:
        models, outside = without_record(shadows, candidates, self)
        count = outside.sum(dim=0).clamp(min=1)
        mean = models.where(outside, 0).sum(dim=0) / count
        squares = (models - mean).where(outside, 0).square().sum(dim=0)
        pooled = squares.sum() / (count - 1).sum().clamp(min=1)
        variance = torch.where(count > 1, squares / (count - 1).clamp(min=1), pooled)
        return Memberships((confidence(view, candidates) - mean) / variance.clamp(min=1e-12).sqrt())


def without_record(
    shadows: Shadows | None, candidates: Batch, attack: object
) -> tuple[Tensor, Tensor]:
    """Return the shadows' confidences, and of which records each knew nothing.

    Shape: ``(models, records)``, both.

    Raises:
        ValueError: If there are no two shadow models.
    """
    if shadows is None or len(shadows.models) < 2:
        raise ValueError(
            f"{attack!r} compares with shadow models, and was given "
            f"{0 if shadows is None else len(shadows.models)}: have the audit train them"
        )
    models = torch.stack([confidence(shadow, candidates) for shadow in shadows.models])
    return models, ~shadows.inside.to(models.device)


def shares_below(values: Tensor, among: Tensor) -> Tensor:
    """Return which share of ``among`` each value exceeds; of those that tie, half."""
    ordered = among.sort().values
    below = torch.searchsorted(ordered, values)
    up_to = torch.searchsorted(ordered, values, right=True)
    return (below + up_to).double() / (2 * len(ordered))

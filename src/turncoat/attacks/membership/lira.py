"""Membership by likelihood ratio: is this confidence one of a model that knew the record?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from turncoat.describe import ADDED
from turncoat.task import Batch
from turncoat.trial import Memberships
from turncoat.validate import at_least
from turncoat.views import ModelView, QueryView, Shadows


@dataclass(frozen=True)
class LiRA:
    """Compare the target's confidence in a record with that of shadow models [1]_.

    A confidence is ``phi = log p_y - log sum_{c != y} p_c``, nearly Gaussian over models. Online,
    the score is ``log N(phi; in) - log N(phi; out)``; offline it knows models without the record
    only, and is the one-sided ``Pr[N(out) < phi]``, given here as its quantile: the same order,
    without the ties of a probability that rounds to 1.

    Differs from the paper: one query a record unless flips or shifts are asked for, whose scores
    are averaged as those of its code are; the fixed variance is pooled over the deviations from
    each record's own mean.

    Args:
        num_shadows: How many models the attacker trains, each on a random half of the candidates.
        variance: One for all records (better below 64 shadows or so), or one for each.
        online: Whether shadow models that trained on the record count too.
        flips: Whether to ask about the mirror image too. As with shifts, do so where training does
            it: of copies that were never trained on, all models are as unsure.
        max_shift: By how many pixels either way to shift an image, its border reflected: asks
            ``(2 * max_shift + 1) ** 2`` times as often.

    .. [1] Carlini et al., S&P 2022, algorithm 1 and eq. (4). https://arxiv.org/abs/2112.03570
    """

    num_shadows: int = 16
    variance: Literal["fixed", "per-example"] = "fixed"
    online: bool = True
    flips: bool = field(default=False, metadata=ADDED)
    max_shift: int = field(default=0, metadata=ADDED)

    def __post_init__(self) -> None:
        at_least(2, self, num_shadows=self.num_shadows)
        at_least(0, self, max_shift=self.max_shift)
        if self.variance not in ("fixed", "per-example"):
            raise ValueError(
                f"LiRA: variance must be 'fixed' or 'per-example'; it is {self.variance!r}"
            )

    def __call__(
        self, view: ModelView | QueryView, *, candidates: Batch, shadows: Shadows | None
    ) -> Memberships:
        if shadows is None or len(shadows.models) < 2:
            raise ValueError(
                f"{self!r} compares with shadow models, and was given "
                f"{0 if shadows is None else len(shadows.models)}: have the audit train them"
            )
        inputs, labels = candidates
        asked = [self._score(view, (x, labels), shadows) for x in self._queries(inputs)]
        return Memberships(torch.stack(asked).mean(dim=0))

    def _score(self, view: ModelView | QueryView, data: Batch, shadows: Shadows) -> Tensor:
        """Return the score of each record by one query. Shape: ``(records,)``, float64."""
        target = confidence(view, data)
        others = torch.stack([confidence(shadow, data) for shadow in shadows.models])
        inside = shadows.inside.to(others.device)
        mean_out, std_out = self._gaussian(others, ~inside)
        far_out = (target - mean_out) / std_out
        if not self.online:
            return far_out
        mean_in, std_in = self._gaussian(others, inside)
        far_in = (target - mean_in) / std_in
        return (far_out.square() - far_in.square()) / 2 + (std_out / std_in).log()

    def _queries(self, inputs: Tensor) -> Iterator[Tensor]:
        """Yield the inputs, and every flip and shift of them that is asked for."""
        reach = self.max_shift
        if not (self.flips or reach):
            yield inputs
            return
        if inputs.dim() != 4 or min(inputs.shape[2:]) <= reach:
            raise ValueError(
                f"{self!r} flips and shifts images of more than {reach} pixels a side; the records "
                f"have the shape {tuple(inputs.shape[1:])}: leave flips and max_shift out"
            )
        height, width = inputs.shape[2:]
        for images in (inputs, inputs.flip(3)) if self.flips else (inputs,):
            padded = pad(images, (reach,) * 4, mode="reflect")
            for down, right in product(range(2 * reach + 1), repeat=2):
                yield padded[:, :, down : down + height, right : right + width]

    def _gaussian(self, others: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of each column over the models in ``among``.

        A record that no such model knows gets the mean over all records. Shape: ``(records,)``.
        """
        count = among.sum(dim=0)
        kept = others.where(among, 0)
        everyone = kept.sum() / count.sum().clamp(min=1)
        mean = torch.where(count > 0, kept.sum(dim=0) / count.clamp(min=1), everyone)
        squares = (others - mean).where(among, 0).square()
        pooled = squares.sum() / (count - 1).clamp(min=0).sum().clamp(min=1)
        own = squares.sum(dim=0) / (count - 1).clamp(min=1)
        per_example = torch.where(count > 1, own, pooled)
        variance = pooled.expand_as(mean) if self.variance == "fixed" else per_example
        return mean, variance.clamp(min=1e-12).sqrt()


def confidence(view: ModelView | QueryView, data: Batch) -> Tensor:
    """Return ``log p_y - log sum_{c != y} p_c`` for each record. Shape: ``(records,)``, float64.

    It is taken from log-probabilities, so that it does not saturate where ``p_y`` rounds to 1. An
    answer that leaves no room at all (a rounded 0 or 1) counts as 50 either way.
    """
    inputs, labels = data
    log_probs = view.scores(inputs).double()
    right = labels[:, None]
    others = log_probs.scatter(1, right, -torch.inf).logsumexp(dim=1)
    phi = log_probs.gather(1, right).squeeze(1) - others
    return phi.nan_to_num(nan=0.0, posinf=50.0, neginf=-50.0).clamp(-50, 50)

"""Membership from one look at an answer: how sure is the model, and how sure of the truth?"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from turncoat.task import Batch
from turncoat.trial import Memberships
from turncoat.views import ModelView, QueryView


@dataclass(frozen=True)
class ConfidenceThreshold:
    """An answer that is sure of anything is of a record that was trained on [1]_.

    The one of these that needs no label.

    .. [1] Salem et al., NDSS 2019, adversary 3. https://arxiv.org/abs/1806.01246
    """

    def __call__(self, view: ModelView | QueryView, *, candidates: Batch) -> Memberships:
        return Memberships(view.scores(candidates[0]).max(dim=1).values)


@dataclass(frozen=True)
class EntropyThreshold:
    """An answer of little entropy is of a record that was trained on [1]_.

    .. [1] Song and Mittal, USENIX Security 2021, section 3.2. https://arxiv.org/abs/2003.10595
    """

    def __call__(self, view: ModelView | QueryView, *, candidates: Batch) -> Memberships:
        log_probs = view.scores(candidates[0]).double()
        return Memberships((log_probs.exp() * _finite(log_probs)).sum(dim=1))


@dataclass(frozen=True)
class ModifiedEntropyThreshold:
    """As ``EntropyThreshold``, but to be sure of a wrong label counts against it [1]_.

    ``Mentr = -(1 - p_y) log p_y - sum_{c != y} p_c log(1 - p_c)``; the score is minus that.

    .. [1] Song and Mittal, USENIX Security 2021, eq. (8). https://arxiv.org/abs/2003.10595
    """

    def __call__(self, view: ModelView | QueryView, *, candidates: Batch) -> Memberships:
        inputs, labels = candidates
        log_probs = view.scores(inputs).double()
        probs, right = log_probs.exp(), labels[:, None]
        of_others = probs * _finite((1 - probs).clamp(min=0).log())
        own = (1 - probs) * _finite(log_probs)
        kept = of_others.scatter(1, right, 0.0).sum(dim=1)
        return Memberships(kept + own.gather(1, right).squeeze(1))


def _finite(logs: Tensor) -> Tensor:
    """Return logarithms of which those of 0 are large and no more: they stand beside a 0."""
    return logs.clamp(min=-1e3)

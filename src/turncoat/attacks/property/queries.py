"""Properties by answers: a classifier of what models say of records that the attacker chose."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from turncoat.attacks.property.losses import LEAST, of_either
from turncoat.attacks.property.weights import regressed
from turncoat.task import Batch
from turncoat.trial import Leanings
from turncoat.validate import at_least
from turncoat.views import ModelView, QueryView, Suspects, Worlds


@dataclass(frozen=True)
class QueryClassifier:
    """Learn from the answers of own models which kind of data a model was trained on [1]_.

    Every model is asked about the same records of the attacker's own, and logistic regression reads
    all its answers at once. It takes no label and no parameter, so that whoever may ask can mount
    it; and a net gives the same answers whatever the order of its neurons, so that they need not
    be put into any.

    Differs from the paper: answers are read as log-probabilities, less their mean over the classes.

    Args:
        num_shadows: Federations to play, half on either kind of data.
        num_queries: Records that each model is asked about; all there are, if there are fewer.

    .. [1] Zhang, Tople and Ohrimenko, USENIX Security 2021. https://arxiv.org/abs/2006.07267
    """

    num_shadows: int = 64
    num_queries: int = 1_000

    def __post_init__(self) -> None:
        at_least(2, self, num_shadows=self.num_shadows)
        at_least(1, self, num_queries=self.num_queries)

    def __call__(
        self,
        view: Suspects[ModelView | QueryView],
        *,
        population: Batch,
        shadows: Worlds[ModelView | QueryView] | None,
        rng: Generator,
    ) -> Leanings:
        known = of_either(self, shadows)
        order = torch.randperm(len(population[1]), generator=rng)[: self.num_queries]
        asked = population[0][order.to(population[0].device)]
        ours, theirs = (_answers(views, asked) for views in (known.views, view.views))
        return Leanings(regressed(ours, known.second.cpu(), theirs))


def _answers(views: tuple[ModelView | QueryView, ...], asked: Tensor) -> Tensor:
    """Return all that each model says. Shape: ``(models, queries * classes)``, float64."""

    def said(view: ModelView | QueryView) -> Tensor:
        scores = view.scores(asked).cpu().double().clamp(min=LEAST)
        return (scores - scores.mean(dim=1, keepdim=True)).flatten()

    return torch.stack([said(view) for view in views])

"""Releases that answer questions instead of handing out the model."""

from __future__ import annotations

from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

from turncoat.task import Model
from turncoat.validate import at_least
from turncoat.views import QueryView

_SILENT = log(torch.finfo(torch.float32).tiny)  # finite, so that losses stay numbers


@dataclass(frozen=True)
class Queries:
    """Answer with log-probabilities instead of handing out the parameters.

    Args:
        budget: How many inputs are answered in all; None for any number.
        decimals: Round the log-probabilities to so many places.
        top_k: Tell the ``top_k`` likeliest labels and theirs; the rest share what is left evenly.
        labels_only: Tell the likeliest label as a certainty, and no probability.
    """

    budget: int | None = None
    decimals: int | None = None
    top_k: int | None = None
    labels_only: bool = False

    def __post_init__(self) -> None:
        at_least(1, self, budget=self.budget, top_k=self.top_k)
        at_least(0, self, decimals=self.decimals)
        if self.labels_only and (self.decimals is not None or self.top_k is not None):
            raise ValueError("Queries: labels_only has no scores for decimals or top_k to blur")

    def __call__(self, model: Model, params: Tensor) -> QueryView:
        def answer(inputs: Tensor) -> Tensor:
            with torch.no_grad():
                return self._blurred(model.logits(params, inputs).log_softmax(dim=1))

        return QueryView(answer, self.budget)

    def _blurred(self, scores: Tensor) -> Tensor:
        if self.labels_only:
            silent = torch.full_like(scores, _SILENT)
            return silent.scatter(1, scores.argmax(dim=1, keepdim=True), 0.0)
        num_hidden = scores.shape[1] - (self.top_k or scores.shape[1])
        if num_hidden > 0:
            hidden = scores.topk(num_hidden, dim=1, largest=False).indices
            share = scores.gather(1, hidden).logsumexp(dim=1, keepdim=True) - log(num_hidden)
            scores = scores.scatter(1, hidden, share.expand(-1, num_hidden))
        return scores if self.decimals is None else scores.round(decimals=self.decimals)

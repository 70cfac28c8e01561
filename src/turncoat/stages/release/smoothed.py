"""A release that answers by a vote of noisy copies of the model."""

from __future__ import annotations

from dataclasses import dataclass
from math import log

import torch
from torch import Generator, Tensor

from turncoat.stages.aggregate.layers import noise
from turncoat.task import Model
from turncoat.validate import at_least, positive
from turncoat.views import QueryView

_SILENT = log(torch.finfo(torch.float32).tiny)  # finite, so that losses stay numbers


@dataclass(frozen=True)
class SmoothedVote:
    """Answer with the shares of votes that noisy copies of the model give each class: CRFL [1]_.

    The copies are the same for every question. ``turncoat.stages.aggregate.crfl`` has what the
    votes certify, where training went with ``CRFL``.

    Args:
        sigma: Standard deviation of the noise in each parameter, as in training.
        num_copies: M.
        budget: How many inputs are answered in all; None for any number.

    .. [1] Xie et al., ICML 2021, algorithm 2. https://arxiv.org/abs/2106.08283
    """

    sigma: float = 0.01
    num_copies: int = 1000
    budget: int | None = None

    def __post_init__(self) -> None:
        positive(self, sigma=self.sigma)
        at_least(1, self, num_copies=self.num_copies, budget=self.budget)

    def __call__(self, model: Model, params: Tensor, *, rng: Generator) -> QueryView:
        beginning = rng.get_state()

        def answer(inputs: Tensor) -> Tensor:
            again = Generator()
            again.set_state(beginning)
            shares = self.votes(model, params, inputs, again).float() / self.num_copies
            return shares.log().clamp(min=_SILENT)

        return QueryView(answer, self.budget)

    def votes(self, model: Model, params: Tensor, inputs: Tensor, rng: Generator) -> Tensor:
        """Return how many copies say each class. Shape: ``(examples, classes)``."""
        found: Tensor | None = None
        with torch.no_grad():
            for _ in range(self.num_copies):
                scores = model.logits(params + noise(params, self.sigma, model, rng), inputs)
                said = torch.nn.functional.one_hot(scores.argmax(dim=1), scores.shape[1])
                found = said if found is None else found + said
        assert found is not None
        return found

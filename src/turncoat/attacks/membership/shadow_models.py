"""Membership learned from one's own models: what do answers about known members look like?"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier
from torch import Generator, Tensor

from turncoat.task import Batch
from turncoat.trial import Memberships
from turncoat.validate import at_least
from turncoat.views import ModelView, QueryView, Shadows


@dataclass(frozen=True)
class ShadowModels:
    """Train shadow models, and on their answers a net for each class that tells in from out [1]_.

    Differs from the paper: shadow models share one pool of records, each with a random half, which
    as many are without; answers are log-probabilities, cut off at -20, the class's own first and
    the others sorted, so that few shadows are enough.

    Args:
        num_shadows: Shadow models to train; the paper has 10 to 100.
        num_hidden: Hidden units of each attack net.

    .. [1] Shokri et al., S&P 2017, section V. https://arxiv.org/abs/1610.05820
    """

    num_shadows: int = 16
    num_hidden: int = 64

    def __post_init__(self) -> None:
        at_least(2, self, num_shadows=self.num_shadows)
        at_least(1, self, num_hidden=self.num_hidden)

    def __call__(
        self,
        view: ModelView | QueryView,
        *,
        candidates: Batch,
        shadows: Shadows | None,
        rng: Generator,
    ) -> Memberships:
        if shadows is None or not shadows.models:
            raise ValueError(f"{self!r} learns from shadow models: have the audit train them")
        labels, inside = candidates[1].cpu(), shadows.inside.cpu()
        answers = [_answers(shadow, candidates) for shadow in shadows.models]
        asked = _answers(view, candidates)
        scores = torch.zeros(len(labels), dtype=torch.float64)
        for label in sorted(set(labels.tolist())):
            mine = labels == label
            known = torch.cat([a[mine] for a in answers]).numpy()
            was_in = torch.cat([row[mine] for row in inside]).numpy()
            if was_in.all() or not was_in.any():
                continue  # nothing to tell apart: 0, as for all of the class
            scores[mine] = self._learned(known, was_in, asked[mine].numpy(), rng)
        return Memberships(scores)

    def _learned(
        self,
        known: np.ndarray[tuple[int, ...], np.dtype[np.float64]],
        was_in: np.ndarray[tuple[int, ...], np.dtype[np.bool_]],
        asked: np.ndarray[tuple[int, ...], np.dtype[np.float64]],
        rng: Generator,
    ) -> Tensor:
        """Return the odds of membership, as a logarithm. Shape: ``(asked,)``."""
        seed = int(torch.randint(2**31 - 1, (1,), generator=rng))
        net = MLPClassifier((self.num_hidden,), random_state=seed, max_iter=100)
        centre, scale = known.mean(axis=0), known.std(axis=0) + 1e-6
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a hundred passes are what is due
            net.fit((known - centre) / scale, was_in)
        probs = torch.from_numpy(net.predict_proba((asked - centre) / scale)[:, 1])
        return torch.logit(probs.double(), eps=1e-12)


def _answers(view: ModelView | QueryView, data: Batch) -> Tensor:
    """Return log-probabilities, the label's own first. Shape: ``(records, classes)``, float64."""
    inputs, labels = data
    log_probs = view.scores(inputs).double().clamp(min=-20)
    right = labels[:, None]
    own = log_probs.gather(1, right)
    others = log_probs.scatter(1, right, -torch.inf).sort(dim=1, descending=True).values[:, :-1]
    return torch.cat([own, others], dim=1).cpu()

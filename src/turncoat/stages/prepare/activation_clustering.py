"""Poisoned records of a class gather apart from the genuine ones, inside a model."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from turncoat.activations import features
from turncoat.messages import Envelope
from turncoat.stage import Verdict
from turncoat.stages.prepare.suspects import by_class, in_order, without
from turncoat.task import Batch, Model
from turncoat.validate import at_least, fraction

Rows = NDArray[np.float64]


@dataclass(frozen=True)
class ActivationClustering:
    """Split each class in two by its last hidden activations; drop the small half [1]_.

    The activations are those of the global model as it was received. They tell the poison only
    once that model has learnt the backdoor: so the first rounds are let pass.

    Differs from the paper: what is suspected is dropped, and not relabelled; the model was trained
    by all clients, and not on these records alone.

    Args:
        max_share: The smaller half is suspected if it is no larger a part of its class; None for
            any size. What an attacker plants beyond it is kept.
        min_silhouette: ... and if the two halves are this far apart, from -1 to 1; the paper finds
            0.10 to 0.15 right for independent components, and 0.3 suits principal ones, whose
            clusters are clearer. None for any distance.
        reduction: To independent components, as in the paper, or principal ones: better for
            classes of few hundred records or less.
        from_round: The first round in which anything is dropped; rounds count from 0.
        min_examples: Classes with fewer records are left alone.

    .. [1] Chen et al., SafeAI 2019, algorithm 1 and section 4. https://arxiv.org/abs/1811.03728
    """

    max_share: float | None = 0.35
    min_silhouette: float | None = 0.15
    reduction: Literal["ica", "pca"] = "ica"
    num_components: int = 10
    from_round: int = 1
    min_examples: int = 10

    def __post_init__(self) -> None:
        fraction(self, max_share=self.max_share)
        at_least(-1, self, min_silhouette=self.min_silhouette)
        at_least(1, self, num_components=self.num_components)
        at_least(0, self, from_round=self.from_round)
        at_least(3, self, min_examples=self.min_examples)
        if self.max_share is None and self.min_silhouette is None:
            raise ValueError(f"{self!r} suspects all classes: give max_share or min_silhouette")
        if self.reduction not in ("ica", "pca"):
            raise ValueError(
                f"ActivationClustering: reduction must be 'ica' or 'pca'; it is {self.reduction!r}"
            )

    def __call__(
        self,
        data: Batch,
        *,
        model: Model,
        start: Tensor,
        envelope: Envelope,
        rng: Generator,
        verdict: Verdict,
    ) -> Batch:
        inputs, labels = data
        suspects = torch.zeros(len(labels), dtype=torch.bool, device=inputs.device)
        if envelope.round >= self.from_round and len(labels):
            activations = features(model, start, inputs)
            for chosen in by_class(labels, self.min_examples):
                suspects[chosen] = self.suspects(activations[chosen], rng)
        return without(data, suspects, verdict)

    def suspects(self, activations: Tensor, rng: Generator) -> Tensor:
        """Say which records of one class are suspected. Shape: ``(n, width)`` to ``(n,)``.

        Their order does not matter; records that are all alike are not suspected.
        """
        from sklearn.cluster import KMeans
        from sklearn.metrics import silhouette_score

        seed = int(torch.randint(2**31 - 1, (1,), generator=rng))
        order = in_order(activations)
        points = self._reduced(activations[order].double().cpu().numpy(), seed)
        answer = torch.zeros(len(activations), dtype=torch.bool, device=activations.device)
        if not points.shape[1]:
            return answer
        halves = KMeans(2, n_init=10, random_state=seed).fit(points).labels_
        small = halves == int(np.argmin(np.bincount(halves, minlength=2)))
        if not small.any() or (self.max_share is not None and small.mean() > self.max_share):
            return answer
        if self.min_silhouette is None or silhouette_score(points, small) >= self.min_silhouette:
            answer[order] = torch.from_numpy(small).to(answer.device)
        return answer

    def _reduced(self, rows: Rows, seed: int) -> Rows:
        """Return the rows by their strongest components, of which constant ones have none."""
        from sklearn.decomposition import FastICA
        from sklearn.exceptions import ConvergenceWarning

        centred = rows - rows.mean(axis=0)
        left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
        real = sizes > 1e-6 * float(np.linalg.norm(rows)) + 1e-12
        num = min(self.num_components, int(real.sum()))
        principal: Rows = (left * sizes)[:, :num]
        if self.reduction == "pca" or not num:
            return principal
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the best there is will do
            found = FastICA(whiten="unit-variance", random_state=seed).fit_transform(principal)
        independent: Rows = found
        return independent

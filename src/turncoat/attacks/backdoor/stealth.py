"""The two checks that targeted poisoning has to pass: of accuracy, and of distances."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from turncoat.messages import Clear, rows
from turncoat.task import Batch, Model, accuracy


@dataclass(frozen=True)
class Stealth:
    """What a server that checks sees of one suspect, beside the same of every honest client [1]_.

    The paper leaves both thresholds open; here they are those that no honest client of the round
    exceeds, checked against the other honest ones.

    Attributes:
        accuracy: Of the global model moved by the suspect's update alone, on validation data.
        accuracy_gap: How far that is below the model moved by the mean of all others.
        distances: Shortest and longest from the suspect's update to another, in L2.
        distance_gap: How far the suspect's range is off that of the honest among themselves:
            ``max(|high - honest low|, |low - honest high|)``, in units of their longest distance.
        honest_accuracy_gaps, honest_distance_gaps: The same of each honest client.

    .. [1] Bhagoji et al., ICML 2019, section 2.3. https://arxiv.org/abs/1811.12470
    """

    accuracy: float
    accuracy_gap: float
    distances: tuple[float, float]
    distance_gap: float
    honest_accuracy_gaps: tuple[float, ...]
    honest_distance_gaps: tuple[float, ...]

    def passes_accuracy(self, slack: float = 0.0) -> bool:
        """Say whether an honest client is as far below the others, or nearly so."""
        return self.accuracy_gap <= max(self.honest_accuracy_gaps) + slack

    def passes_distances(self, slack: float = 0.0) -> bool:
        """Say whether an honest client's distances are as far off, or nearly so."""
        return self.distance_gap <= max(self.honest_distance_gaps) + slack


def stealth(
    model: Model, before: Tensor, updates: Sequence[Clear], suspect: int, validation: Batch
) -> Stealth:
    """Return what the checks say of ``updates[suspect]``; the others are honest, three at least."""
    if len(updates) < 4:
        raise ValueError(f"stealth needs three honest updates beside the suspect's: {len(updates)}")
    matrix = rows(updates)
    honest = [i for i in range(len(updates)) if i != suspect]
    apart = distances(matrix)

    def works(delta: Tensor) -> float:
        with torch.no_grad():
            outputs = model.logits(before + delta, validation[0])
        return float(accuracy(outputs, validation[1]).double().mean())

    def accuracy_gap(client: int, others: list[int]) -> float:
        return works(matrix[others].mean(dim=0)) - works(matrix[client])

    def distance_gap(client: int, others: list[int]) -> tuple[float, float, float]:
        low, high = _range(apart[client, others])
        among = apart[others][:, others]
        pairs = torch.ones_like(among).triu(1).bool()
        their_low, their_high = _range(among[pairs])
        gap = max(abs(high - their_low), abs(low - their_high))
        return low, high, gap / max(their_high, 1e-12)

    low, high, gap = distance_gap(suspect, honest)
    left = [(i, [j for j in honest if j != i]) for i in honest]
    return Stealth(
        works(matrix[suspect]),
        accuracy_gap(suspect, honest),
        (low, high),
        gap,
        tuple(accuracy_gap(i, others) for i, others in left),
        tuple(distance_gap(i, others)[2] for i, others in left),
    )


def distances(matrix: Tensor) -> Tensor:
    """Return the L2 distances of all pairs of rows, from their differences: nothing cancels."""
    return torch.stack([(matrix - row).double().norm(dim=1) for row in matrix])


def _range(values: Tensor) -> tuple[float, float]:
    return float(values.min()), float(values.max())

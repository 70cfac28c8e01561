"""Records that a client suspects: how far out they are, and what becomes of them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from turncoat.stage import Verdict
from turncoat.task import Batch


def without(data: Batch, suspects: Tensor, verdict: Verdict) -> Batch:
    """Return the records that are not suspected, and flag those that are.

    Nobody learns from no records: if all are suspected, all are kept and none is flagged.

    Args:
        suspects: Booleans. Shape: ``(examples,)``.
    """
    if not suspects.any() or suspects.all():
        return data
    verdict.flag(suspects.nonzero().flatten().tolist())
    return data[0][~suspects], data[1][~suspects]


def by_class(labels: Tensor, at_least: int) -> Iterator[Tensor]:
    """Yield the positions of each class that has so many records, in the order of the labels."""
    for label in sorted(set(labels.tolist())):
        chosen = (labels == label).nonzero().flatten()
        if len(chosen) >= at_least:
            yield chosen


def outlyingness(values: Tensor) -> Tensor:
    """Return how many robust deviations each value lies above the median. Shape: ``(n,)``.

    The deviation is 1.4826 times the median distance from the median: that of a Gaussian. Where it
    is 0 for most, none lies out.
    """
    above = values - values.quantile(0.5)
    scale = 1.4826 * above.abs().quantile(0.5)
    return above / scale if scale > 0 else torch.zeros_like(above)


def in_order(rows: Tensor) -> Tensor:
    """Return the positions that sort the rows, whatever order they came in. Shape: ``(n,)``."""
    order = torch.arange(len(rows), device=rows.device)
    for column in reversed(rows.T):
        order = order[column[order].argsort(stable=True)]
    return order

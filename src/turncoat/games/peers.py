"""What an attack does to many nodes that each hold a model of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from turncoat.coalition import Coalition
from turncoat.randomness import Randomness
from turncoat.trial import Marked, Measurement


def traitors_of(
    coalition: Coalition[Any], num_nodes: int, num_rounds: int, randomness: Randomness
) -> frozenset[int]:
    """Return who is compromised in the last round: a pool drawn anew has others in each."""
    return coalition.members(num_nodes, num_rounds - 1, randomness)


def combined(marks: Sequence[Marked], away: Sequence[int]) -> Marked:
    """Return the marks of all nodes as one: their means, and the headline by distance.

    Bounds are means of bounds. All nodes are marked, so none is sampled, and they share the test
    examples: the interval of the mean is no wider than the mean of the intervals. Of what is shown,
    the first node's is.

    Args:
        away: How far each node is from the nearest attacker, in steps.
    """
    whole = _mean([m.headline for m in marks])
    columns = zip(*(m.others for m in marks), strict=True)
    by_distance = [
        replace(
            _mean([m.headline for m, d in zip(marks, away, strict=True) if d == steps]),
            name=f"{whole.name}_at_distance_{steps}",
        )
        for steps in sorted(set(away))
    ]
    others = [_mean(column) for column in columns]
    return Marked(whole, (*others, *by_distance), marks[0].exhibits, marks[0].remarks)


def _mean(found: Sequence[Measurement]) -> Measurement:
    least = [m.least_gain for m in found if m.least_gain is not None]
    return replace(
        found[0],
        value=fmean(m.value for m in found),
        baseline=fmean(m.baseline for m in found),
        low=fmean(m.low for m in found),
        high=fmean(m.high for m in found),
        worst=fmean(m.worst for m in found),
        least_gain=fmean(least) if len(least) == len(found) else None,
    )

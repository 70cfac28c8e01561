"""A measure, taken several times for each seed: for what a few hundred records say by chance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

from papers.ledger import Measure

_APART = 1_000  # between the seeds of two repetitions, so that no two of an experiment share one


@dataclass(frozen=True)
class Repeated:
    """The mean of each figure over repetitions, each from a seed of its own; notes of the first.

    What another seed draws anew is drawn anew each time: the split of the data, too.

    Attributes:
        num_repetitions: The first has the seed itself, each further one a seed 1,000 higher.
    """

    inner: Measure
    num_repetitions: int

    def __call__(self, seed: int) -> Mapping[str, float | str]:
        runs = [self.inner(seed + _APART * i) for i in range(self.num_repetitions)]
        return {
            name: found if isinstance(found, str) else fmean(float(run[name]) for run in runs)
            for name, found in runs[0].items()
        }

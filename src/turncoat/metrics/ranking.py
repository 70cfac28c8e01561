"""How well scores tell two groups apart: ROC, its area, and its left edge. Ties are exact."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil, isfinite, sqrt
from statistics import NormalDist

import torch
from torch import Tensor

from turncoat.metrics.intervals import Interval, clopper_pearson

_ROUNDING = 1e-9  # of a rate times a number


@dataclass(frozen=True, slots=True)
class ROC:
    """What each threshold reaches, from none flagged to all. Records that tie are flagged together.

    Attributes:
        fpr: Share of the ``outs`` flagged. Shape: ``(thresholds,)``, float64, rising from 0 to 1.
        tpr: Share of the ``ins`` flagged, at the same thresholds.
        num_outs: How many ``outs`` there are; None where only the curve is known.
    """

    fpr: Tensor = field(repr=False)
    tpr: Tensor = field(repr=False)
    num_outs: int | None = None

    @classmethod
    def of(cls, ins: Tensor, outs: Tensor) -> ROC:
        """Return the curve of scores that ought to be higher for ``ins`` than for ``outs``."""
        ins, outs = _checked(ins), _checked(outs)
        scores, order = torch.cat([ins, outs]).sort(descending=True)
        hits = (order < len(ins)).cumsum(0)
        last_of_tie = torch.cat([scores[1:] != scores[:-1], torch.ones(1, dtype=torch.bool)])
        true = hits[last_of_tie].double()
        false = torch.arange(1, len(scores) + 1)[last_of_tie] - true
        start = torch.zeros(1, dtype=torch.float64)
        fpr, tpr = torch.cat([start, false / len(outs)]), torch.cat([start, true / len(ins)])
        return cls(fpr, tpr, len(outs))

    def tpr_at(self, fpr: float) -> float:
        """Return the largest TPR of a threshold whose FPR is at most ``fpr``; nothing in between.

        >>> roc = ROC.of(torch.tensor([3.0, 2.0, 2.0]), torch.tensor([2.0, 1.0]))
        >>> f"{roc.tpr_at(0):.3f} {roc.tpr_at(0.5):.3f}"
        '0.333 1.000'

        Raises:
            ValueError: If there are too few ``outs`` for one of them to be flagged at that rate.
        """
        if fpr and self.num_outs is not None and fpr * self.num_outs < 1 - _ROUNDING:
            needed = 1 / fpr - _ROUNDING
            least = f"{ceil(needed):,}" if isfinite(needed) else "1e308"
            raise ValueError(
                f"an FPR of {fpr:g} needs at least {least} non-members, of "
                f"whom one may be flagged; there are {self.num_outs:,}: take more, or a higher FPR"
            )
        return float(self.tpr[self.fpr <= fpr].max())


def auc(ins: Tensor, outs: Tensor) -> float:
    """Return the chance that one of ``ins`` scores above one of ``outs``; ties count half.

    >>> auc(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 2.0]))
    0.875
    """
    return float(_placements(_checked(ins), _checked(outs))[0].mean())


def delong(ins: Tensor, outs: Tensor, level: float = 0.95) -> Interval:
    """Return the interval of the AUC by DeLong's variance [1]_, from ranks [2]_.

    Differs from the paper: where all of one group lie above the other the variance is 0, which
    says nothing; the interval then is Clopper-Pearson's for as many trials as the smaller group.

    .. [1] DeLong et al., Biometrics 1988. https://doi.org/10.2307/2531595
    .. [2] Sun and Xu, IEEE SPL 2014. https://doi.org/10.1109/LSP.2014.2337313
    """
    above, below = _placements(_checked(ins), _checked(outs))
    area, smaller = float(above.mean()), min(len(above), len(below))
    if area in (0.0, 1.0) or smaller < 2:
        return clopper_pearson(area * smaller, smaller, level)
    variance = float(above.var() / len(above) + below.var() / len(below))
    half = NormalDist().inv_cdf(0.5 + level / 2) * sqrt(variance)
    return max(0.0, area - half), min(1.0, area + half)


def tpr_interval(tpr: float, num_ins: int, level: float = 0.95) -> Interval:
    """Return Clopper-Pearson's interval of a TPR, its threshold taken as given."""
    return clopper_pearson(round(tpr * num_ins), num_ins, level)


def _placements(ins: Tensor, outs: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each of ``ins`` the share of ``outs`` below it, and conversely the share above.

    Ties count half. Both have the AUC as their mean. O(n log n).
    """
    both = _ranks(torch.cat([ins, outs]))
    return (
        (both[: len(ins)] - _ranks(ins)) / len(outs),
        1 - (both[len(ins) :] - _ranks(outs)) / len(ins),
    )


def _ranks(values: Tensor) -> Tensor:
    """Return the ranks from 1 on; ties share their middle rank. Shape: that of ``values``."""
    _, which, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    middle: Tensor = (last - (counts - 1) / 2)[which]
    return middle


def _checked(scores: Tensor) -> Tensor:
    scores = scores.detach().cpu().double().flatten()
    if not len(scores):
        raise ValueError("a ranking needs scores of both groups; one is empty")
    if bool(scores.isnan().any()):
        raise ValueError(f"{int(scores.isnan().sum())} of {len(scores)} scores are NaN")
    return scores

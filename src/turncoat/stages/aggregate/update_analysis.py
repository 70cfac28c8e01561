"""Looking for updates that are out of the ordinary, and handing the others on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from turncoat.messages import Clear
from turncoat.stage import Aggregate, Memory, Verdict
from turncoat.stages.aggregate.clusters import silhouette, two_means
from turncoat.stages.aggregate.geometry import cosines, finite_rows, gram, lengths, unsound
from turncoat.stages.aggregate.layers import last_layer
from turncoat.stages.aggregate.screening import hand_on
from turncoat.task import Model
from turncoat.validate import at_least, one_of, positive

_CONSISTENT = 1.4826  # a normal deviation's median, upside down

Side = Literal["long", "both"]


@dataclass(frozen=True)
class UpdatePCA:
    """Leave out the smaller of two groups of updates to one class's row of the last layer [1]_.

    Rows of this round and of the ``window`` before it are standardised and projected on their two
    principal components. Memory: those rows, and whose they are. For label flipping out of a known
    class, by fewer than half. An attack that touches other rows is not looked for.

    Differs from the paper: it shows the plane to people, and decides nothing. Here 2-means makes
    two groups, and the smaller is left out if the mean silhouette is ``min_silhouette`` or more.
    Smaller is what holds fewer *clients* (each where most of its rows are): where few are sampled,
    a minority of the clients can be the majority of some rounds.

    Args:
        source: The class that is thought to be under attack.
        first_round: Rounds before it are let pass: they change too much.
        window: Earlier rounds to look at besides.

    .. [1] Tolpegin et al., ESORICS 2020, section 5. https://arxiv.org/abs/2007.08432
    """

    inner: Aggregate[Clear]
    _: KW_ONLY
    source: int
    first_round: int = 10
    window: int = 10
    min_silhouette: float = 0.5

    def __post_init__(self) -> None:
        at_least(0, self, source=self.source, first_round=self.first_round, window=self.window)
        positive(self, min_silhouette=self.min_silhouette)

    def __call__(
        self,
        messages: Sequence[Clear],
        *,
        model: Model,
        cohort: tuple[int, ...],
        memory: Memory[tuple[int, tuple[tuple[Tensor, tuple[int, ...]], ...]]],
        verdict: Verdict,
        **offers: Any,
    ) -> Tensor:
        unfit = unsound(messages)
        slot = last_layer(model, self, messages[0].delta)
        if self.source >= slot.shape[0]:
            raise ValueError(
                f"{self!r} looks at row {self.source} of {slot.name}, which has {slot.shape[0]}: "
                "lower source"
            )
        width = (slot.stop - slot.start) // slot.shape[0]
        start = slot.start + self.source * width
        fit = _fit(messages, unfit)
        row = torch.stack([m.delta[start : start + width].cpu() for m in messages])[fit]
        num_rounds, past = memory.last((0, ()))
        heard = (*past, (row, tuple(cohort[i] for i in fit)))
        suspects: list[int] = []
        if num_rounds >= self.first_round and len(row):
            points = torch.cat([rows for rows, _ in heard])
            clients = [client for _, theirs in heard for client in theirs]
            smaller = minority(principal_plane(points), clients, self.min_silhouette)[-len(row) :]
            suspects = [fit[i] for i in smaller.nonzero().flatten().tolist()]
        memory.keep((num_rounds + 1, heard[-self.window :] if self.window else ()))
        offers |= {"model": model, "cohort": cohort, "memory": memory.inner}
        return hand_on(self.inner, messages, suspects, offers, unfit=unfit, verdict=verdict)


@dataclass(frozen=True)
class CosineTest:
    """Leave out what points away from most others: a robust z-score of median cosines [1]_.

    Each update has the median of its cosines with the others; it fails ``threshold`` deviations
    below the cohort's median of these. The deviation is 1.4826 times the median one, 0.001 at
    least. Sound against a minority, whose forgeries are unlike the honest: not one at their mean.

    .. [1] Iglewicz and Hoaglin, How to Detect and Handle Outliers, ASQC 1993, chapter 3.
    """

    inner: Aggregate[Clear]
    _: KW_ONLY
    threshold: float = 3.5

    def __post_init__(self) -> None:
        positive(self, threshold=self.threshold)

    def __call__(self, messages: Sequence[Clear], *, verdict: Verdict, **offers: Any) -> Tensor:
        unfit, like = unsound(messages), cosines(gram(finite_rows(messages)))
        fit = _fit(messages, unfit)
        among = like[fit][:, fit]
        n = len(fit)
        others = among[~torch.eye(n, dtype=torch.bool)].reshape(n, max(n - 1, 0))
        typical = others.quantile(0.5, dim=1) if n > 1 else torch.ones(n, dtype=torch.float64)
        bad = robust_z(typical, 1e-3) < -self.threshold
        suspects = [i for i, failed in zip(fit, bad.tolist(), strict=True) if failed]
        return hand_on(self.inner, messages, suspects, offers, unfit=unfit, verdict=verdict)


@dataclass(frozen=True)
class NormTest:
    """Leave out what is of extraordinary length: a robust z-score of logarithms of lengths [1]_.

    The deviation is 1.4826 times the median one, 0.01 at least. Sound against a minority that
    boosts; a traitor who keeps to the usual length passes.

    Args:
        side: Whether only what is too long fails, or what is too short as well.

    .. [1] Iglewicz and Hoaglin, How to Detect and Handle Outliers, ASQC 1993, chapter 3.
    """

    inner: Aggregate[Clear]
    _: KW_ONLY
    threshold: float = 3.5
    side: Side = "both"

    def __post_init__(self) -> None:
        positive(self, threshold=self.threshold)
        one_of(Side, self, side=self.side)

    def __call__(self, messages: Sequence[Clear], *, verdict: Verdict, **offers: Any) -> Tensor:
        unfit = unsound(messages)
        fit = _fit(messages, unfit)
        sizes = lengths(finite_rows(messages))[fit]
        z = robust_z(sizes.clamp(min=1e-12 * float(sizes.sum()) + 1e-300).log(), 1e-2)
        bad = z.abs() > self.threshold if self.side == "both" else z > self.threshold
        suspects = [i for i, failed in zip(fit, bad.tolist(), strict=True) if failed]
        return hand_on(self.inner, messages, suspects, offers, unfit=unfit, verdict=verdict)


def robust_z(values: Tensor, least: float) -> Tensor:
    """Return how many robust deviations each is from the median. Shape: ``(n,)``.

    >>> robust_z(torch.tensor([1.0, 2.0, 3.0, 4.0, 100.0]), 1e-9)[-1] > 60
    tensor(True)
    """
    if not len(values):
        return values
    off = values - values.quantile(0.5)
    return off / max(_CONSISTENT * float(off.abs().quantile(0.5)), least)


def principal_plane(points: Tensor) -> Tensor:
    """Return the standardised points on their first two principal components. Shape: ``(n, 2)``."""
    centred = points.double() - points.double().mean(dim=0)
    spread = centred.std(dim=0, correction=0)
    standard = centred * torch.where(spread > 0, 1 / spread, 0.0)
    u, s, _ = torch.linalg.svd(standard, full_matrices=False)
    plane: Tensor = (u * s)[:, :2]
    return plane


def minority(points: Tensor, clients: Sequence[int], min_silhouette: float) -> Tensor:
    """Return what is in the group of fewer clients; nothing, unless they stand apart. ``(n,)``.

    >>> points, clients = torch.tensor([[0.0], [0.1], [5.0], [5.1], [5.2]]), [1, 2, 3, 3, 3]
    >>> minority(points, clients, 0.5).tolist()  # two points of two clients, three of one
    [False, False, True, True, True]
    """
    group = two_means(points)
    votes: dict[int, int] = {}
    for client, second in zip(clients, group.tolist(), strict=True):
        votes[client] = votes.get(client, 0) + (1 if second else -1)
    balance = sum((v > 0) - (v < 0) for v in votes.values())
    if balance == 0 or silhouette(points, group) < min_silhouette:
        return torch.zeros_like(group)
    return group if balance < 0 else ~group


def _fit(messages: Sequence[Clear], unfit: Sequence[int]) -> list[int]:
    return [i for i in range(len(messages)) if i not in unfit]

"""Against the way that the model would go, by forgeries made for one rule each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from turncoat.attacks.poisoning.min_max import Line
from turncoat.messages import Update, rows, with_rows
from turncoat.stage import within
from turncoat.stages.aggregate.distances import squared_distances
from turncoat.validate import at_least, positive
from turncoat.views import CoalitionView


@dataclass(frozen=True)
class FangKrum:
    """Send the longest step against all signs that Krum still picks [1]_. A forge.

    ``-lambda s``, s the signs of the mean of all updates before the attack; lambda is halved from
    the bound of theorem 1 until Krum picks it. With partial knowledge the members' own updates
    stand for the honest: one forged update among them, then two, ..., until one can be picked.

    Differs from the paper: s are the signs of the mean, not of Krum's own pick; all members send
    the same (the paper's lie 0.01 apart); the threshold is relative to the first lambda.

    Args:
        threshold: How small lambda may become, as a part of the first.
        num_byzantine: Krum's f; None for that of the server's rule if it is known, or else for the
            number of members.

    .. [1] Fang et al., USENIX Security 2020, section 4.1. https://arxiv.org/abs/1911.11815
    """

    threshold: float = 1e-5
    num_byzantine: int | None = None

    def __post_init__(self) -> None:
        positive(self, threshold=self.threshold)
        at_least(0, self, num_byzantine=self.num_byzantine)

    def __call__(self, view: CoalitionView[Update]) -> Sequence[Update]:
        signs = _mean(view).sign()
        forged = -self._longest(view, signs) * signs
        return with_rows(view.own, forged.expand(len(view.own), -1))

    def _longest(self, view: CoalitionView[Update], signs: Tensor) -> float:
        known, num_members = rows(view.known), len(view.own)
        line = Line.through(torch.zeros_like(signs).double(), -signs, known)
        between = squared_distances(known).to(known.device)
        if view.honest is None:
            tries = [(k, max(1, len(known) - 2)) for k in range(1, num_members + 1)]
        else:
            tries = [(num_members, max(1, self._neighbours(view)))]
        least = 0.0
        size = max(line.slope, 1.0) ** 0.5
        for num_forged, num_near in tries:
            lengths = between.sqrt().sort(dim=1).values[:, 1 : num_near + 1].sum(dim=1)
            gap = max(1, num_near + 1 - num_forged) if view.honest is not None else num_near
            first: float = float(lengths.min() / gap + line.squares.max().sqrt()) / size
            least = first * self.threshold
            while first > least:
                if _picked(line.distances(first), between, num_forged, num_near):
                    return first
                first /= 2
        return least

    def _neighbours(self, view: CoalitionView[Update]) -> int:
        f: int | None = self.num_byzantine
        stages: list[Any] = [] if view.rule is None or f is not None else list(within(view.rule))
        for stage in stages:
            if getattr(stage, "num_neighbours", None) is not None:
                return int(stage.num_neighbours)
            f = getattr(stage, "num_byzantine", f)
        return view.num_clients - (len(view.own) if f is None else f) - 2


@dataclass(frozen=True)
class FangTrimmedMean:
    """Send values beyond all honest ones, on the side where the mean does not go [1]_. A forge.

    Made for the trimmed mean, and used against the median. With full knowledge they are drawn
    between the least honest value (the greatest, where the mean falls) and ``stretch`` times as far
    out; with partial knowledge between ``nearest`` and ``furthest`` deviations from the mean of the
    members' own.

    Differs from the paper: values are those of updates (as in the authors' code), not of models;
    where the mean is 0 it is sent. One member that knows only itself has no deviation.

    .. [1] Fang et al., USENIX Security 2020, section 4.2. https://arxiv.org/abs/1911.11815
    """

    stretch: float = 2.0
    nearest: float = 3.0
    furthest: float = 4.0

    def __post_init__(self) -> None:
        at_least(1, self, stretch=self.stretch)
        at_least(0, self, nearest=self.nearest, furthest=self.furthest)
        if self.furthest < self.nearest:
            raise ValueError(
                f"FangTrimmedMean: furthest is {self.furthest}, nearest {self.nearest}: swap them"
            )

    def __call__(self, view: CoalitionView[Update], *, rng: Generator) -> Sequence[Update]:
        known, signs = rows(view.known), _mean(view).sign()
        share = torch.rand(len(view.own), known.shape[1], generator=rng).to(known)
        if view.honest is None:
            spread = known.std(dim=0) if len(known) > 1 else torch.zeros_like(signs)
            start = known.mean(dim=0) - self.nearest * signs * spread
            end = start - (self.furthest - self.nearest) * signs * spread
        else:
            least, greatest = known.amin(dim=0), known.amax(dim=0)
            low = torch.minimum(least * self.stretch, least / self.stretch)
            high = torch.maximum(greatest * self.stretch, greatest / self.stretch)
            start = torch.where(signs > 0, least, greatest) * signs.abs()
            end = torch.where(signs > 0, low, high) * signs.abs()
        return with_rows(view.own, share.mul_(end - start).add_(start))


def _mean(view: CoalitionView[Update]) -> Tensor:
    """Return the mean of all updates that the coalition knows, before the attack."""
    total = rows(view.own).sum(dim=0)
    if view.honest:
        total = total + rows(view.honest).sum(dim=0)
    return total / (len(view.own) + len(view.honest or ()))


def _picked(far: Tensor, between: Tensor, num_forged: int, num_near: int) -> bool:
    """Say whether Krum prefers one of ``num_forged`` equal updates to all honest ones.

    Args:
        far: Squared distances of the forged to the honest. Shape: ``(honest,)``.
        between: Squared distances of the honest. Shape: ``(honest, honest)``.
        num_near: How many neighbours a score sums.
    """
    of_forged = torch.cat([far.new_zeros(num_forged - 1), far.sort().values])[:num_near].sum()
    others = torch.cat([between, far[:, None].expand(-1, num_forged)], dim=1)
    near = others.sort(dim=1).values[:, 1 : num_near + 1]  # the first is one's own
    return bool(of_forged < near.sum(dim=1).min())

"""Membership: which of these records took part in training?"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor

from turncoat.describe import ADDED
from turncoat.metrics.ranking import ROC, auc, delong, tpr_interval
from turncoat.task import Batch, Task
from turncoat.trial import Marked, Measurement, Memberships
from turncoat.validate import at_least
from turncoat.views import Shadows

# A rate needs so many non-members that one of them, or ten, may be flagged.
_NEEDED = (("tpr_at_1pct_fpr", 0.01, 100), ("tpr_at_01pct_fpr", 0.001, 10_000))


@dataclass(frozen=True, slots=True)
class Candidates:
    """Records in random order, half of them trained on: which half is not here.

    ``shadows`` are trained for an attack that asks for them, and None otherwise. The
    ``population`` is such data as nobody trained on. ``client`` is whose records are in question;
    None if it is all who took part.
    """

    candidates: Batch = field(repr=False)
    population: Batch = field(repr=False)
    shadows: Shadows | None = field(default=None, repr=False)
    client: int | None = None


@dataclass(frozen=True)
class Membership:
    """Tell records of clients that took part from held-out ones. Marked by AUC; chance is 0.5.

    The true-positive rate at 1 % false positives is given with 100 non-members or more, that at
    0.1 % with 10,000 or more; a remark says which one is left out. Its interval takes the
    threshold as given.

    Args:
        num_candidates: Half members, half not; None for as many as there are.
        client: Whose records the members are, by number; None for all who took part.
    """

    num_candidates: int | None = None
    client: int | None = field(default=None, metadata=ADDED)
    family = "membership"
    says = (
        "{who} can tell whether a person's record was used for training better than by chance: "
        "AUC {value} {interval}, where guessing gives {baseline}."
    )

    def __post_init__(self) -> None:
        at_least(2, self, num_candidates=self.num_candidates)
        at_least(0, self, client=self.client)
        if self.num_candidates is not None and self.num_candidates % 2:
            raise ValueError(
                f"{self!r} cannot be halved: half are members; give an even num_candidates"
            )

    def pose(
        self, task: Task, *, took_part: frozenset[int], cohort: tuple[int, ...], rng: Generator
    ) -> tuple[Candidates, Tensor]:
        sizes, outsiders = task.sizes, len(task.test[1])
        clients = sorted(took_part) if self.client is None else [self.client]
        if self.client is not None and self.client not in took_part:
            raise ValueError(
                f"{self!r} asks about a client that never took part, or that attacks: name another"
            )
        members = sum(sizes[c] for c in clients)
        half = min(members, outsiders) if self.num_candidates is None else self.num_candidates // 2
        if half < 1 or min(members, outsiders) < half:
            raise ValueError(
                f"{self!r} needs {max(half, 1)} members and as many others; the clients of "
                f"{task.name!r} that took part hold {members} and its test set {outsiders}: "
                "lower num_candidates"
            )
        inside = torch.randperm(members, generator=rng)[:half]
        outside = torch.randperm(outsiders, generator=rng)[:half]
        order = torch.randperm(2 * half, generator=rng)

        def mixed(axis: int) -> Tensor:
            held = torch.cat([task.clients[c][axis] for c in clients])
            there = held.device
            both = torch.cat([held[inside.to(there)], task.test[axis][outside.to(there)]])
            return both[order.to(there)]

        asked = Candidates((mixed(0), mixed(1)), task.population, client=self.client)
        return asked, order < half

    def mark(self, guess: Memberships, truth: Tensor, *, rng: Generator) -> Marked:
        scores = guess.scores.detach().cpu().double()
        if scores.shape != truth.shape:
            raise ValueError(
                f"a score for each of {len(truth)} candidates is due; the guess has the shape "
                f"{tuple(scores.shape)}"
            )
        ins, outs = scores[truth], scores[~truth]
        roc = ROC.of(ins, outs)
        rates = tuple(
            _rate(name, roc.tpr_at(fpr), fpr, len(ins))
            for name, fpr, needed in _NEEDED
            if len(outs) >= needed
        )
        remarks = tuple(
            f"no TPR at {100 * fpr:g} % FPR: it needs {needed:,} non-members, and there are "
            f"{len(outs):,}"
            for _, fpr, needed in _NEEDED
            if len(outs) < needed
        )
        return Marked(
            Measurement("auc", auc(ins, outs), 0.5, *delong(ins, outs), worst=1.0),
            rates,
            {"roc_fpr": roc.fpr, "roc_tpr": roc.tpr},
            remarks,
        )


def _rate(name: str, tpr: float, fpr: float, num_ins: int) -> Measurement:
    return Measurement(name, tpr, fpr, *tpr_interval(tpr, num_ins), worst=1.0)

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
class Known:
    """Records of which the attacker knows whether they were trained on: half of them were.

    Attributes:
        inside: Which were. Shape: ``(records,)``, bool.
    """

    records: Batch = field(repr=False)
    inside: Tensor = field(repr=False)


@dataclass(frozen=True, slots=True)
class Candidates:
    """Records in random order, half of them trained on: which half is not here.

    ``shadows`` are trained for an attack that asks for them, and None otherwise. The
    ``population`` is such data as nobody trained on. ``client`` is whose records are in question;
    None if it is all who took part. ``known`` are others of theirs, for an attack that learns on
    such; None where the game grants none.
    """

    candidates: Batch = field(repr=False)
    population: Batch = field(repr=False)
    shadows: Shadows | None = field(default=None, repr=False)
    client: int | None = None
    known: Known | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Membership:
    """Tell records of clients that took part from held-out ones. Marked by AUC; chance is 0.5.

    The true-positive rate at 1 % false positives is given with 100 non-members or more, that at
    0.1 % with 10,000 or more; a remark says which one is left out. Its interval takes the
    threshold as given.

    Args:
        num_candidates: Half members, half not; None for as many as there are.
        client: Whose records the members are, by number; None for all who took part.
        num_known: How many other records the attacker knows of, half members and half not, drawn
            from where the candidates are; None for none.
    """

    num_candidates: int | None = None
    client: int | None = field(default=None, metadata=ADDED)
    num_known: int | None = field(default=None, metadata=ADDED)
    family = "membership"
    says = (
        "{who} can tell whether a person's record was used for training better than by chance: "
        "AUC {value} {interval}, where guessing gives {baseline}."
    )

    def __post_init__(self) -> None:
        at_least(2, self, num_candidates=self.num_candidates)
        at_least(0, self, client=self.client)
        at_least(2, self, num_known=self.num_known)
        for name, number in (("candidates", self.num_candidates), ("known", self.num_known)):
            if number is not None and number % 2:
                raise ValueError(
                    f"{self!r} cannot be halved: half are members; give an even num_{name}"
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
        known, most = (self.num_known or 0) // 2, min(members, outsiders)
        half = most - known if self.num_candidates is None else self.num_candidates // 2
        if half < 1 or most < half + known:
            raise ValueError(
                f"{self!r} needs {max(half, 1) + known} members and as many others; the clients of "
                f"{task.name!r} that took part hold {members} and its test set {outsiders}: "
                f"lower num_candidates{' or num_known' if known else ''}"
            )
        ins = torch.randperm(members, generator=rng)
        outs = torch.randperm(outsiders, generator=rng)
        order = torch.randperm(2 * half, generator=rng)

        def mixed(axis: int, chosen: slice, order: Tensor) -> Tensor:
            held = torch.cat([task.clients[c][axis] for c in clients])
            there = held.device
            inside, outside = ins[chosen].to(there), outs[chosen].to(there)
            return torch.cat([held[inside], task.test[axis][outside]])[order.to(there)]

        granted = None
        if known:
            mix, rest = torch.randperm(2 * known, generator=rng), slice(half, half + known)
            granted = Known((mixed(0, rest, mix), mixed(1, rest, mix)), mix < known)
        first = slice(half)
        asked = mixed(0, first, order), mixed(1, first, order)
        return Candidates(asked, task.population, None, self.client, granted), order < half

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

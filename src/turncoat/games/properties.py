"""Property inference: which share of the training records belongs to a group?"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Generator, Tensor

from turncoat.metrics.intervals import clopper_pearson
from turncoat.metrics.ranking import auc, delong
from turncoat.randomness import Randomness
from turncoat.stage import call
from turncoat.task import Batch, Shards, Task
from turncoat.trial import Leanings, Marked, Measurement
from turncoat.validate import at_least, exactly_one, fraction
from turncoat.views import Worlds


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is asked of each suspect: was it trained on the first kind of data, or on the second?

    Attributes:
        shares: Of the group among the training records, in either kind.
        client: Whose records differ between the two; None for those of all clients.
        samples: Records of the attacker's own of either kind, as many of each.
        population: All that the attacker has. Nobody else trained on them.
        shadows: Trained for an attack that asks for them, and None otherwise.
    """

    shares: tuple[float, float]
    client: int | None
    samples: tuple[Batch, Batch] = field(repr=False)
    population: Batch = field(repr=False)
    shadows: Worlds[Any] | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Kinds:
    """Which suspects were trained on the second kind, and the records that they were drawn from.

    ``sizes`` and ``members`` are the numbers of records of each client, and of the group among
    them, in either kind.
    """

    second: Tensor
    records: Batch = field(repr=False)
    sizes: tuple[int, ...] = field(repr=False)
    members: tuple[tuple[int, ...], tuple[int, ...]] = field(repr=False)


@dataclass(frozen=True)
class SameStart:
    """Begin as one run did, whatever the seed is: what its participants all know."""

    inner: Any
    seed: int

    def __call__(self, task: Task) -> Tensor:
        start: Tensor = call(self.inner, task, rng=Randomness(self.seed).at("begin"))
        return start


@dataclass(frozen=True)
class PropertyInference:
    """Tell federations by the share of a group in their data. Marked by accuracy; chance is 0.5.

    Distribution inference as a game [1]_, of ``num_suspects`` federations: each is trained from the
    private records, redrawn so that the group has one share or the other, half of them each. They
    are as large under both, and differ in nothing else but chance. What the attacker trains is as
    large, and drawn from its own records. With equal shares there is nothing to find.

    The interval is Clopper-Pearson's over the suspects; the AUC of the scores stands beside. The
    draws of suspects overlap, as they do in the paper: what is marked is the attack on this pool of
    records.

    Differs from the paper: what is trained is a federation.

    Args:
        shares: Of the group, in the first kind of data and in the second.
        column: Who is in the group: whose input in this column is above 0. Of a category that is
            its value, of a standardised number what lies above the mean.
        label: Or who is: a class.
        client: Whose records differ; the others' have the share half-way. None: everyone's do.
        num_suspects: Federations to tell apart.
        num_records: Of all clients of one federation; None for half of what both the private and
            the attacker's records allow.
        same_start: Whether all begin with the same model, as for whoever takes part and so knows
            it.

    .. [1] Suri and Evans, PoPETs 2022(4). https://arxiv.org/abs/2109.06024
    """

    shares: tuple[float, float] = (0.3, 0.7)
    column: int | None = None
    label: int | None = None
    client: int | None = None
    num_suspects: int = 40
    num_records: int | None = None
    same_start: bool = False
    family = "property"
    says = (
        "{who} can tell what share of the training records belongs to a group: {value} {interval} "
        "of answers are right, where guessing gives {baseline}."
    )

    def __post_init__(self) -> None:
        if len(self.shares) != 2:
            raise ValueError(f"PropertyInference: shares must be two; there are {len(self.shares)}")
        for share in self.shares:
            fraction(self, shares=share)
        exactly_one("PropertyInference", column=self.column, label=self.label)
        at_least(0, self, column=self.column, label=self.label, client=self.client)
        at_least(2, self, num_suspects=self.num_suspects, num_records=self.num_records)
        if self.num_suspects % 2:
            raise ValueError(
                f"{self!r} cannot be halved: half are of either kind; give an even num_suspects"
            )

    def pose(
        self, task: Task, *, took_part: frozenset[int], cohort: tuple[int, ...], rng: Generator
    ) -> tuple[Wanted, Kinds]:
        if self.client is not None and self.client not in took_part:
            raise ValueError(
                f"{self!r} asks about client {self.client}, who never took part: those who did are "
                f"{', '.join(map(str, sorted(took_part)))}"
            )
        held = [task.clients[c] for c in sorted(took_part)]
        records = tuple(torch.cat([data[axis].cpu() for data in held]) for axis in (0, 1))
        private, public = (records[0], records[1]), task.population
        public = public[0].cpu(), public[1].cpu()
        sizes, members = self._dealt(task, private, public)
        second = torch.zeros(self.num_suspects, dtype=torch.bool)
        second[torch.randperm(self.num_suspects, generator=rng)[: self.num_suspects // 2]] = True
        few = min(
            (*(self._most(share, public) for share in self.shares), len(public[1])), default=0
        )
        samples = [self._drawn(public, (few,), (round(few * s),), rng)[0] for s in self.shares]
        question = Wanted(self.shares, self.client, (samples[0], samples[1]), public)
        return question, Kinds(second, private, sizes, members)

    def world(
        self, task: Task, question: Wanted, truth: Kinds, index: int, rng: Generator
    ) -> tuple[Task, bool]:
        """Return what one federation is trained on, and whether it is of the second kind.

        The first ``num_suspects`` are the suspects; after them come the attacker's own, one of
        either kind in turn.
        """
        is_suspect = index < self.num_suspects
        second = bool(truth.second[index]) if is_suspect else index % 2 == 1
        pool = truth.records if is_suspect else question.population
        clients = self._drawn(pool, truth.sizes, truth.members[second], rng)
        who = "suspect" if is_suspect else "shadow"
        return replace(task, name=f"{task.name}, {who} {index}", clients=_shards(clients)), second

    def mark(self, guess: Leanings, truth: Kinds, *, rng: Generator) -> Marked:
        scores = guess.scores.detach().cpu().double()
        if scores.shape != truth.second.shape:
            raise ValueError(
                f"a score for each of {len(truth.second)} suspects is due; the guess has the shape "
                f"{tuple(scores.shape)}"
            )
        hits, trials = int(((scores > 0) == truth.second).sum()), len(scores)
        ins, outs = scores[truth.second], scores[~truth.second]
        return Marked(
            Measurement("accuracy", hits / trials, 0.5, *clopper_pearson(hits, trials), worst=1.0),
            (Measurement("auc", auc(ins, outs), 0.5, *delong(ins, outs), worst=1.0),),
        )

    def inside(self, data: Batch) -> Tensor:
        """Return which records belong to the group. Shape: ``(records,)``, bool."""
        inputs, labels = data
        if self.label is not None:
            if labels.ndim != 1:
                raise ValueError(
                    f"{self!r} asks for a class, but labels have the shape {tuple(labels.shape)}: "
                    "name a column of a table instead"
                )
            return labels == self.label
        assert self.column is not None
        if inputs.ndim != 2 or self.column >= inputs.shape[1]:
            raise ValueError(
                f"{self!r} asks for column {self.column} of inputs of shape "
                f"{tuple(inputs.shape[1:])}: name a column of a table, or a label"
            )
        return inputs[:, self.column] > 0

    def _dealt(
        self, task: Task, private: Batch, public: Batch
    ) -> tuple[tuple[int, ...], tuple[tuple[int, ...], tuple[int, ...]]]:
        """Return the records of each client, and those of the group in either kind."""
        sizes, between = task.sizes, sum(self.shares) / 2
        parts = [size / sum(sizes) for size in sizes]
        by_kind = [
            [share if self.client in (None, c) else between for c in range(len(sizes))]
            for share in self.shares
        ]
        totals = [sum(p * s for p, s in zip(parts, kind, strict=True)) for kind in by_kind]
        most = min(self._most(total, pool) for total in totals for pool in (private, public))
        most -= len(sizes)  # for what is rounded up
        due = most // 2 if self.num_records is None else self.num_records
        if not 2 <= due <= most:
            raise ValueError(
                f"{self!r} needs {max(due, 2)} records of such shares, and the private records and "
                f"the attacker's own allow {max(most, 0)}: lower num_records, or raise the task's "
                "public_size"
            )
        counts = tuple(int(due * part) for part in parts)
        first, second = (
            tuple(round(n * s) for n, s in zip(counts, kind, strict=True)) for kind in by_kind
        )
        return counts, (first, second)

    def _most(self, share: float, pool: Batch) -> int:
        """Return how many records of this share of the group a pool allows."""
        there, num = int(self.inside(pool).sum()), len(pool[1])
        return int(min(there / share if share else num, (num - there) / (1 - share or 1e-9), num))

    def _drawn(
        self, pool: Batch, sizes: tuple[int, ...], members: tuple[int, ...], rng: Generator
    ) -> list[Batch]:
        """Return batches of these sizes, with so many of the group in each, and none in two."""
        is_in = self.inside(pool)
        groups = [
            found[torch.randperm(len(found), generator=rng)]
            for found in (is_in.nonzero().flatten(), (~is_in).nonzero().flatten())
        ]
        batches, taken = [], [0, 0]
        for size, inside in zip(sizes, members, strict=True):
            picked = []
            for i, num in enumerate((inside, size - inside)):
                picked.append(groups[i][taken[i] : taken[i] + num])
                taken[i] += num
            chosen = torch.cat(picked)
            chosen = chosen[torch.randperm(len(chosen), generator=rng)]
            batches.append((pool[0][chosen], pool[1][chosen]))
        return batches


def _shards(clients: list[Batch]) -> Shards:
    bounds = [0]
    for _, labels in clients:
        bounds.append(bounds[-1] + len(labels))
    inputs, labels = (torch.cat([data[axis] for data in clients]) for axis in (0, 1))
    return Shards(inputs, labels, tuple(bounds))

"""Attacks on the membership of the same candidates, with the same shadow models: which one wins?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from papers.accuracy import accuracy_on
from turncoat.attacks.membership.lira import LiRA, confidence
from turncoat.attacks.membership.references import PopulationAttack, ReferenceAttack
from turncoat.attacks.membership.rmia import RMIA
from turncoat.attacks.membership.thresholds import ConfidenceThreshold, ModifiedEntropyThreshold
from turncoat.audit import Audit, Entry, released, run_audit
from turncoat.federation import Federation, Plain
from turncoat.games.membership import Candidates, Membership
from turncoat.plan import pose, shadow_task
from turncoat.randomness import Randomness
from turncoat.record import AuditFolder
from turncoat.runtimes.saved import read_tensors
from turncoat.stage import call
from turncoat.stages.aggregate.mean import Mean
from turncoat.stages.train.local import LocalSGD
from turncoat.task import Batch, Task
from turncoat.tasks.sources import local, missing
from turncoat.tasks.tables import from_csv
from turncoat.trial import Marked, Memberships, Scored, Trial
from turncoat.views import ModelView, Seat, Shadows

LOSS, MAX, ENTROPY, POPULATION = "loss", "confidence", "modified entropy", "population"
AT_1, AT_01 = "TPR at 1 % FPR", "TPR at 0.1 % FPR"
AUC, CURVE = "AUC", "TPR at FPR"
FPRS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
_FEWEST = 10  # non-members to be flagged at a rate that is given
_RATES = {"tpr_at_1pct_fpr": AT_1, "tpr_at_01pct_fpr": AT_01}


def adult(num_clients: int, **options: Any) -> Task:
    """Return UCI Adult: 32,561 people for training and 16,281 for tests; who earns over 50,000?

    The census' sampling weight is left out.
    """
    names = ["adult.csv.gz"]
    path = local(names, None, holds=lambda p: p.is_file() and p.name in names)
    if path is None:
        raise missing("adult", names, "https://archive.ics.uci.edu/dataset/2 has it")
    said = "Adult, UCI; CC BY 4.0"
    columns: Any = {"label": "income", "drop": ("fnlwgt",), "split_column": "split"}
    return from_csv(path, num_clients, **columns, source=said, **options)


@dataclass(frozen=True)
class Unrounded:
    """Minus the loss, as the confidence of which it is a monotone function: it does not round."""

    def __call__(self, view: ModelView, *, candidates: Batch) -> Memberships:
        return Memberships(confidence(view, candidates))


@dataclass(frozen=True)
class Told:
    """A model that has been asked about the candidates and the population, and is asked no more."""

    answers: tuple[tuple[Tensor, Tensor], ...]

    @classmethod
    def of(cls, view: ModelView, question: Candidates) -> Told:
        asked = (question.candidates[0], question.population[0])
        return cls(tuple((inputs, view.scores(inputs)) for inputs in asked))

    def scores(self, inputs: Tensor) -> Tensor:
        return next(answer for known, answer in self.answers if known is inputs)


@dataclass(frozen=True)
class Pool:
    """Models of which each knew half of the candidates: first the target, then pairs of shadows.

    Of a pair, each knew just what the other did not.

    Attributes:
        inside: Which candidates each was trained on. Shape: ``(models, candidates)``.
    """

    question: Candidates
    models: tuple[Told, ...]
    inside: Tensor

    def pairs_for(self, target: int) -> list[tuple[int, int]]:
        """Return the pairs that a target is compared with: all but its own, of which it is one.

        Whoever had the other of its pair would be told by it who the members are.
        """
        pairs = [(i, i + 1) for i in range(1, len(self.models), 2)]
        return [pair for pair in pairs if target not in pair]

    def shadows(self, pairs: Sequence[tuple[int, int]]) -> Shadows:
        chosen = [i for pair in pairs for i in pair]
        models: Any = tuple(self.models[i] for i in chosen)
        return Shadows(models, self.inside[chosen])


@dataclass(frozen=True)
class ShadowedAttacks:
    """Train one federation and its shadow models; attack it with as many of these as are given.

    All training records are candidates, and as many of the test set. The audit trains
    ``num_shadows`` shadow models, and a pair more, so that shadow models can play the target in
    their turn: members are then the half that it was trained on, and the other pairs its shadows.
    An attack that has fewer than ``num_shadows`` plays with several groups of them, which share no
    model. Figures are means over targets and groups; those that compare are differences on the
    same candidates of the same targets with the same shadows.

    Attributes:
        few: The other numbers of shadow models, smaller and even.
        num_targets: The target of the audit, and as many others as are missing to this.
        num_groups: Of shadow models for each target, at most.
    """

    make: Callable[..., Task]
    train: LocalSGD
    num_rounds: int
    num_shadows: int = 32
    few: tuple[int, ...] = (2, 4, 8, 16)
    num_targets: int = 35
    num_groups: int = 4
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 1 <= self.num_targets <= self.num_shadows + 3:
            raise ValueError(
                f"{self.num_targets} targets are asked for; with {self.num_shadows} shadow models "
                f"for each there are {self.num_shadows + 3} models: ask for at most as many"
            )

    def __call__(self, seed: int) -> dict[str, float | str]:
        task = self.make(seed=seed, **self.options)
        federation = Federation(train=self.train, channel=Plain(), aggregate=Mean())
        pool, view, headline = self.trained(task, federation, seed)
        sums = Counter[str]()
        for target in range(self.num_targets):
            found = self._attacked(pool, target, seed)
            best = f"{AUC}: {lira(True, 'fixed')} | {self.num_shadows}"
            if target == 0 and found[best] != headline:
                raise RuntimeError(f"{best} is another in the audit: {headline}")
            sums.update(found)
        means = {name: total / self.num_targets for name, total in sums.items()}
        inputs, labels = (torch.cat(column) for column in zip(*task.clients, strict=True))
        return {
            **self._compared(means),
            "training_accuracy": accuracy_on((inputs, labels), task, view),
            "test_accuracy": accuracy_on(task.test, task, view),
            "candidates": float(pool.inside.shape[1]),
            **means,
            "data": task.source,
        }

    def trained(
        self, task: Task, federation: Federation[Any, Any], seed: int
    ) -> tuple[Pool, ModelView, float]:
        """Return all models, the target as users have it, and the area of the audit's own LiRA."""
        game = Membership()
        entries = {
            str(n): Entry(Trial(LiRA(n), game), (Seat.USER,))
            for n in (self.num_shadows, self.num_shadows + 2)
        }
        audit = Audit("candidates", task, {"none": federation}, entries, self.num_rounds, (seed,))
        question, truth = pose(audit, federation, game, -1, seed)
        with TemporaryDirectory() as place:
            cells = run_audit(audit, Path(place))
            areas = []
            for cell in cells.values():
                if not isinstance(cell, Scored):
                    raise RuntimeError(f"the audit did not come to an end: {cell}")
                areas.append(cell.marked.headline.value)
            folder, last = AuditFolder(Path(place)), [*cells][-1]
            states = [read_tensors(folder.state(k))[0]["params"] for k in last.needs]
        view = released(federation, task, states[0], seed)
        views = [view, *(ModelView(task.model, params) for params in states[1:])]
        inside = [
            shadow_task(audit, question.candidates, game, i, seed)[1]
            for i in range(self.num_shadows + 2)
        ]
        models = tuple(Told.of(v, question) for v in views)
        return Pool(question, models, torch.stack([truth, *inside])), view, areas[0]

    def _attacked(self, pool: Pool, target: int, seed: int) -> dict[str, float]:
        """Return the figures of all attacks on one target, each the mean over its groups."""
        truth, pairs = pool.inside[target], pool.pairs_for(target)
        found: dict[str, float] = {}
        for (row, num_shadows), attack in self._attacks().items():
            sums, size = Counter[str](), num_shadows // 2
            last = self.num_shadows // 2 - size
            starts = range(0, last + 1, size)[: self.num_groups] if size else range(1)
            for start in starts:
                guess = call(
                    attack,
                    pool.models[target],
                    candidates=pool.question.candidates,
                    population=pool.question.population,
                    shadows=pool.shadows(pairs[start : start + size]) if size else None,
                    rng=Randomness(seed).at("attack", target, num_shadows, start),
                )
                marked = Membership().mark(guess, truth, rng=Randomness(seed).at("mark"))
                sums.update(_figures(row, num_shadows, marked, num_outs=int((~truth).sum())))
            found |= {name: total / len(starts) for name, total in sums.items()}
        return found

    def _attacks(self) -> dict[tuple[str, int], Any]:
        """Return the attacks by name and number of shadow models."""
        attacks: dict[tuple[str, int], Any] = {
            (LOSS, 0): Unrounded(),
            (MAX, 0): ConfidenceThreshold(),
            (ENTROPY, 0): ModifiedEntropyThreshold(),
            (POPULATION, 0): PopulationAttack(),
        }
        for n in (*self.few, self.num_shadows):
            attacks["reference", n] = ReferenceAttack(n)
            for online in (True, False):
                attacks[rmia(online), n] = RMIA(n, online=online)
                attacks[lira(online, "fixed"), n] = LiRA(n, "fixed", online)
                attacks[lira(online, "per-example"), n] = LiRA(n, "per-example", online)
        return attacks

    def _compared(self, found: Mapping[str, float]) -> dict[str, float]:
        """Return the differences of which something is expected."""

        def gap(what: str, one: str, n: int, other: str, m: int) -> float:
            return found[f"{what}: {one} | {n}"] - found[f"{what}: {other} | {m}"]

        compared: dict[str, float] = {}
        for what, short in ((AT_1, "tpr"), (AT_01, "tpr_at_01"), (AUC, "auc")):
            if not any(name.startswith(f"{what}: ") for name in found):
                continue
            best = lira(True, "fixed")
            compared[f"{short}_lira_minus_loss"] = gap(what, best, self.num_shadows, LOSS, 0)
            for n in self.few:
                if n > 2:  # of two, no record has a variance of its own
                    name = f"{short}_fixed_minus_per_example_with_{n}"
                    compared[name] = gap(what, best, n, lira(True, "per-example"), n)
            for online, how in ((True, "online"), (False, "offline")):
                name = f"{short}_rmia_minus_lira_{how}_with_2"
                compared[name] = gap(what, rmia(online), 2, lira(online, "fixed"), 2)
        return compared


def lira(online: bool, variance: str) -> str:
    return f"LiRA, {'online' if online else 'offline'}, {variance}"


def rmia(online: bool) -> str:
    return f"RMIA, {'online' if online else 'offline'}"


def _figures(row: str, num_shadows: int, marked: Marked, num_outs: int) -> dict[str, float]:
    """Return area, rates and curve of one attack, at rates that flag ten non-members or more."""
    found = {f"{AUC}: {row} | {num_shadows}": marked.headline.value}
    for m in marked.others:
        found[f"{_RATES[m.name]}: {row} | {num_shadows}"] = m.value
    fpr, tpr = marked.exhibits["roc_fpr"], marked.exhibits["roc_tpr"]
    for rate in FPRS:
        if rate * num_outs >= _FEWEST:
            reached = float(tpr[fpr <= rate].max())
            found[f"{CURVE}, {num_shadows} shadows: {row} | {rate:g}"] = reached
    return found

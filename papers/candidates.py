"""Attacks on the membership of the same candidates, with the same shadow models: which one wins?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
class ShadowedAttacks:
    """Train one federation and its shadow models; attack it with as many of these as are given.

    All training records are candidates, and as many of the test set. The audit trains
    ``num_shadows`` shadow models; an attack that has fewer gets the first of them, which are those
    that the audit would train for it. Figures that compare are differences on the same candidates.

    Attributes:
        few: The other numbers of shadow models, smaller and even.
    """

    make: Callable[..., Task]
    train: LocalSGD
    num_rounds: int
    num_shadows: int = 32
    few: tuple[int, ...] = (2, 4, 8, 16)
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, seed: int) -> dict[str, float | str]:
        task = self.make(seed=seed, **self.options)
        federation = Federation(train=self.train, channel=Plain(), aggregate=Mean())
        game, most = Membership(), LiRA(self.num_shadows)
        entries = {"most": Entry(Trial(most, game), (Seat.USER,))}
        audit = Audit("candidates", task, {"none": federation}, entries, self.num_rounds, (seed,))
        question, truth = pose(audit, federation, game, -1, seed)
        with TemporaryDirectory() as place:
            ((planned, cell),) = run_audit(audit, Path(place)).items()
            if not isinstance(cell, Scored):
                raise RuntimeError(f"the audit did not come to an end: {cell}")
            folder = AuditFolder(Path(place))
            states = [read_tensors(folder.state(k))[0]["params"] for k in planned.needs]
        view = released(federation, task, states[0], seed)
        target = Told.of(view, question)
        models: Any = tuple(Told.of(ModelView(task.model, p), question) for p in states[1:])
        inside = torch.stack(
            [
                shadow_task(audit, question.candidates, game, i, seed)[1]
                for i in range(self.num_shadows)
            ]
        )

        def marked(attack: Any, num_shadows: int) -> Marked:
            given = Shadows(models[:num_shadows], inside[:num_shadows]) if num_shadows else None
            guess = call(
                attack,
                target,
                candidates=question.candidates,
                population=question.population,
                shadows=given,
                rng=Randomness(seed).at("attack", num_shadows),
            )
            return game.mark(guess, truth, rng=Randomness(seed).at("mark"))

        found: dict[str, float] = {}
        for (row, num_shadows), attack in self._attacks().items():
            now = marked(attack, num_shadows)
            if attack == most and now.headline != cell.marked.headline:
                raise RuntimeError(f"{attack!r} is another in the audit: {cell.marked.headline}")
            found |= _figures(row, num_shadows, now, num_outs=int((~truth).sum()))
        inputs, labels = (torch.cat(column) for column in zip(*task.clients, strict=True))
        return {
            **self._compared(found),
            "training_accuracy": accuracy_on((inputs, labels), task, view),
            "test_accuracy": accuracy_on(task.test, task, view),
            "candidates": float(len(truth)),
            **found,
            "data": task.source,
        }

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

"""Reconstruction of tables: what stood in the victims' rows?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from turncoat.games.reconstruction import Records, Victims, victims_of
from turncoat.metrics.intervals import of_mean
from turncoat.metrics.tables import QUARTER, Schema
from turncoat.task import Task
from turncoat.trial import Marked, Measurement, Reconstruction
from turncoat.validate import at_least, positive


@dataclass(frozen=True)
class ReconstructRows:
    """Rebuild rows of a table. Marked by the share of cells that are right [1]_.

    A category is right or wrong; a number is right within ``tolerance`` deviations of its column.
    By default these are so many that the mean is right for a quarter of a normal column.

    A victim's n guesses are paired one to one with n of the records it holds, so that their errors
    are least, and so is the baseline: the better of means and modes, and of random public rows. The
    numbers' mean error in deviations and the share of right categories stand beside, each with its
    own baseline; with ``per_column`` those of each feature, by the number of its first column.

    Intervals are over rows; a single row has none, and gives its value twice.

    Args:
        victim: The client to attack; None draws ``num_victims`` from the round's cohort.
        num_victims: How many, or all where the cohort has fewer.

    .. [1] Vero et al., ICML 2023. https://arxiv.org/abs/2210.01785
    """

    victim: int | None = None
    num_victims: int = 4
    tolerance: float = QUARTER
    per_column: bool = False
    family = "inversion"
    says = (
        "{who} can rebuild records that clients trained on: {value} {interval} of their cells are "
        "right, where a guess from public records reaches {baseline}."
    )

    def __post_init__(self) -> None:
        at_least(0, self, victim=self.victim)
        at_least(1, self, num_victims=self.num_victims)
        positive(self, tolerance=self.tolerance)

    def pose(
        self, task: Task, *, took_part: frozenset[int], cohort: tuple[int, ...], rng: Generator
    ) -> tuple[Victims, Records]:
        if task.population[0].ndim != 2:
            raise ValueError(
                f"ReconstructRows marks tables; {task.name!r} has inputs of shape "
                f"{tuple(task.population[0].shape[1:])}: leave this trial out, or choose a task of "
                "tables"
            )
        chosen = victims_of(self, task, cohort, rng)
        truth = Records(tuple(task.clients[v] for v in chosen), task.population)
        return Victims(chosen, truth.population), truth

    def mark(self, guess: Sequence[Reconstruction], truth: Records, *, rng: Generator) -> Marked:
        if len(guess) != len(truth.records):
            raise ValueError(f"{len(truth.records)} victims, but {len(guess)} reconstructions")
        records = [inputs.cpu() for inputs, _ in truth.records]
        public = truth.population[0].cpu()
        schema = Schema.of(torch.cat([public, *records]))
        found = [schema.hardened(_sound(g, r)) for g, r in zip(guess, records, strict=True)]
        mean = schema.blind(public)
        draws = [torch.randint(len(public), (len(g),), generator=rng) for g in found]
        errors = _errors(schema, found, records)
        blind = [
            _errors(schema, [mean.expand_as(g) for g in found], records),
            _errors(schema, [public[d] for d in draws], records),
        ]
        num = len(schema.numeric)

        def right(which: slice, name: str) -> Measurement:
            shares = [
                schema.right(e[:, which], self.tolerance).mean(dim=1) for e in (errors, *blind)
            ]
            return _beside(name, shares, worst=1.0)

        def wide(which: slice, name: str) -> Measurement:
            return _beside(name, [e[:, which].mean(dim=1) for e in (errors, *blind)], worst=0.0)

        others = []
        if num:
            others.append(wide(slice(num), "numeric_error"))
        if schema.groups:
            others.append(right(slice(num, None), "categorical_accuracy"))
        if self.per_column:
            for i, column in enumerate(schema.features):
                say = (wide, "error") if i < num else (right, "accuracy")
                others.append(say[0](slice(i, i + 1), f"column_{column}_{say[1]}"))
        return Marked(
            right(slice(None), "cell_accuracy"),
            tuple(others),
            {"feature_columns": torch.tensor(schema.features), "feature_errors": errors},
        )


def _errors(schema: Schema, guesses: Sequence[Tensor], records: Sequence[Tensor]) -> Tensor:
    """Return the errors of all pairs, in order of the victims. Shape: ``(pairs, features)``."""
    parts = []
    for rows, held in zip(guesses, records, strict=True):
        mine, theirs = schema.match(rows, held)
        parts.append(schema.errors(rows[mine], held[theirs]))
    return torch.cat(parts)


def _beside(name: str, scores: Sequence[Tensor], *, worst: float) -> Measurement:
    """Return the first mean over rows, beside the best of the others."""
    means = [float(s.mean()) for s in scores[1:]]
    baseline = max(means) if worst else min(means)
    low, high = of_mean(scores[0])
    low, high = max(0.0, low), min(1.0, high) if worst else high
    return Measurement(name, float(scores[0].mean()), baseline, low, high, worst)


def _sound(guess: Reconstruction, inputs: Tensor) -> Tensor:
    rows = guess.inputs.detach().cpu().float()
    if not len(rows) or rows.shape[1:] != inputs.shape[1:]:
        raise ValueError(
            f"rows of shape {tuple(inputs.shape[1:])} are due; the guess has the shape "
            f"{tuple(rows.shape)}"
        )
    if guess.labels.shape != rows.shape[:1]:
        raise ValueError(
            f"{len(rows)} rows need as many labels; the guess has the shape "
            f"{tuple(guess.labels.shape)}"
        )
    if not bool(rows.isfinite().all()):
        raise ValueError("the guess holds NaN or infinity")
    return rows

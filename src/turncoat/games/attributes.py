"""Attribute inference: what is the value of the one column that the attacker does not know?"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import sqrt
from typing import Self

import torch
from sklearn.ensemble import RandomForestClassifier
from torch import Generator, Tensor

from turncoat.metrics.intervals import of_difference, wilson
from turncoat.metrics.tables import Schema
from turncoat.task import Batch, Task
from turncoat.trial import Attributes, Marked, Measurement
from turncoat.validate import at_least


@dataclass(frozen=True, slots=True)
class Hidden:
    """A categorical feature of a table.

    Attributes:
        columns: Where it stands.
        values: What these columns can hold. Shape: ``(num_values, len(columns))``.
    """

    columns: tuple[int, ...]
    values: Tensor = field(repr=False)

    @classmethod
    def of(cls, rows: Tensor, column: int) -> Self:
        """Return the category that has this column.

        Raises:
            ValueError: If the column is a number, or none.
        """
        groups = Schema.of(rows).groups
        group = next((g for g in groups if column in g), None)
        if group is None:
            firsts = ", ".join(str(g[0]) for g in groups) or "none"
            raise ValueError(
                f"column {column} of a table of {rows.shape[1]} is no category: those begin at "
                f"{firsts}; name one of these"
            )
        if len(group) == 1:
            return cls(group, torch.tensor([[0.0], [1.0]]))
        return cls(group, torch.eye(len(group)))

    def read(self, rows: Tensor) -> Tensor:
        """Return the number of each row's value; a missing one counts as the first."""
        held = rows[:, list(self.columns)].cpu()
        return held[:, 0].long() if len(self.columns) == 1 else held.argmax(dim=1)

    def filled(self, rows: Tensor, value: int) -> Tensor:
        """Return the rows with this value in its columns."""
        made = rows.clone()
        made[:, list(self.columns)] = self.values[value].to(rows)
        return made


@dataclass(frozen=True, slots=True)
class Blanks:
    """Records without one attribute, in random order; half were trained on, which half is not here.

    ``hidden`` says where the attribute stood: those columns are 0 in the ``rows``. In the
    ``population``, which nobody trained on, it is known.
    """

    rows: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)
    hidden: Hidden
    population: Batch = field(repr=False)


@dataclass(frozen=True, slots=True)
class Answers:
    """What stood there, who was trained on, and what someone guesses who has no model."""

    values: Tensor
    inside: Tensor
    imputed: Tensor


@dataclass(frozen=True)
class AttributeInference:
    """Fill in one column of training records. Marked by accuracy; the baseline is imputation [1]_.

    Imputation is a random forest that learned the attribute from the other columns and the label of
    the attacker's own records: what can be known without the model. The paired difference to it,
    Matthews' coefficient and the geometric mean of the recalls stand beside, and the advantage over
    records that were not trained on [2]_: what is known of everyone, not of members, has none.

    Args:
        column: Any column of the attribute, counted in the inputs from 0.
        num_records: Half members, half not; None for as many as there are.

    .. [1] Jayaraman and Evans, CCS 2022. https://arxiv.org/abs/2209.01292
    .. [2] Yeom et al., CSF 2018, definition 5. https://arxiv.org/abs/1709.01604
    """

    column: int
    num_records: int | None = None
    family = "attribute"
    says = (
        "{who} can fill in an attribute of training records: {value} {interval} are right, where "
        "one reaches {baseline} without the model."
    )

    def __post_init__(self) -> None:
        at_least(0, self, column=self.column)
        at_least(2, self, num_records=self.num_records)

    def pose(
        self, task: Task, *, took_part: frozenset[int], cohort: tuple[int, ...], rng: Generator
    ) -> tuple[Blanks, Answers]:
        if task.population[0].ndim != 2:
            raise ValueError(
                f"AttributeInference asks about tables; {task.name!r} has inputs of shape "
                f"{tuple(task.population[0].shape[1:])}: leave this trial out, or choose a task of "
                "tables"
            )
        held = [task.clients[c] for c in sorted(took_part)]
        members = tuple(torch.cat([data[axis].cpu() for data in held]) for axis in (0, 1))
        others = tuple(part.cpu() for part in task.test)
        most = min(len(members[1]), len(others[1]))
        half = most if self.num_records is None else self.num_records // 2
        if half > most:
            raise ValueError(
                f"{self!r} needs {half} members and as many others; there are {len(members[1])} "
                f"and {len(others[1])}: lower num_records"
            )
        ins = torch.randperm(len(members[1]), generator=rng)[:half]
        outs = torch.randperm(len(others[1]), generator=rng)[:half]
        order = torch.randperm(2 * half, generator=rng)
        rows, labels = (
            torch.cat([a[ins], b[outs]])[order] for a, b in zip(members, others, strict=True)
        )
        public = task.population[0].cpu(), task.population[1].cpu()
        hidden = Hidden.of(torch.cat([public[0], rows]), self.column)
        blank = rows.clone()
        blank[:, list(hidden.columns)] = 0
        imputed = _imputed(public, blank, labels, hidden, rng)
        return Blanks(blank, labels, hidden, public), Answers(
            hidden.read(rows), order < half, imputed
        )

    def mark(self, guess: Attributes, truth: Answers, *, rng: Generator) -> Marked:
        if len(guess.scores) != len(truth.values):
            raise ValueError(
                f"scores for each of {len(truth.values)} records are due; the guess has the shape "
                f"{tuple(guess.scores.shape)}"
            )
        said, inside = guess.scores.cpu().argmax(dim=1), truth.inside
        right, imputed = (g == truth.values for g in (said, truth.imputed))
        ours, theirs = right[inside].double(), imputed[inside].double()
        hits, trials = int(ours.sum()), len(ours)
        gain = Measurement(
            "over_imputation",
            float((ours - theirs).mean()),
            0.0,
            *of_difference(ours, theirs),
            worst=1.0,
        )
        others = [gain, _advantage(right, imputed, inside)]
        for name, score in (("mcc", _mcc), ("g_mean", _g_mean)):
            found, blind = (score(g[inside], truth.values[inside]) for g in (said, truth.imputed))
            others.append(Measurement(name, found, blind, found, found, worst=1.0))
        accuracy = Measurement(
            "accuracy", hits / trials, float(theirs.mean()), *wilson(hits, trials), worst=1.0
        )
        return Marked(accuracy, tuple(others))


def features_of(rows: Tensor, labels: Tensor, hidden: Hidden) -> Tensor:
    """Return all that is known of records without their attribute: other columns, and the label."""
    kept = [c for c in range(rows.shape[1]) if c not in hidden.columns]
    return torch.cat([rows[:, kept].double(), labels[:, None].double()], dim=1)


def forest(rng: Generator) -> RandomForestClassifier:
    """Return an unfitted random forest that the generator seeds."""
    seed = int(torch.randint(2**31 - 1, (1,), generator=rng))
    return RandomForestClassifier(200, min_samples_leaf=2, random_state=seed, n_jobs=1)


def _imputed(
    public: Batch, blank: Tensor, labels: Tensor, hidden: Hidden, rng: Generator
) -> Tensor:
    model = forest(rng)
    model.fit(features_of(*public, hidden).numpy(), hidden.read(public[0]).numpy())
    return torch.from_numpy(model.predict(features_of(blank, labels, hidden).numpy()))


def _advantage(right: Tensor, imputed: Tensor, inside: Tensor) -> Measurement:
    """Return how much oftener members are right than others, less what imputation has of that."""
    gains = right.double() - imputed.double()
    ins, outs = gains[inside], gains[~inside]
    value = float(ins.mean() - outs.mean())
    half = 1.96 * sqrt(float(ins.var() / len(ins) + outs.var() / len(outs)))
    return Measurement("advantage", value, 0.0, value - half, value + half, worst=1.0)


def _mcc(said: Tensor, values: Tensor) -> float:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(values.numpy(), said.numpy()))


def _g_mean(said: Tensor, values: Tensor) -> float:
    recalls = [
        float((said[values == v] == v).double().mean()) for v in sorted(set(values.tolist()))
    ]
    return float(torch.tensor(recalls, dtype=torch.float64).clamp(min=0).log().mean().exp())

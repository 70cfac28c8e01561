"""Inversion of tables: rows of numbers and categories, from the gradient of their batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Generator, Tensor

from turncoat.attacks.inversion.engine import Clue, LabelRule, Recipe, invert_all
from turncoat.attacks.inversion.gradient_inversion import clue_of
from turncoat.attacks.inversion.labels import Counts
from turncoat.attacks.inversion.objectives import Cosine, Silent
from turncoat.attacks.inversion.optimisers import SignedAdam
from turncoat.attacks.inversion.starts import Uniform
from turncoat.messages import Update
from turncoat.metrics.tables import Schema
from turncoat.task import Batch
from turncoat.trial import Reconstruction
from turncoat.validate import at_least, positive
from turncoat.views import ServerView


@dataclass(frozen=True)
class Features:
    """Rows of a schema: numbers in deviations from their mean, categories by a softmax.

    So every guess is a soft row of that table. Numbers are kept within their range.
    """

    schema: Schema

    def encode(self, start: Tensor) -> Tensor:
        return start.clamp(0.05, 0.95).logit()

    def decode(self, variable: Tensor) -> Tensor:
        schema = self.schema
        mean, deviation = (
            torch.tensor(some).to(variable) for some in (schema.mean, schema.deviation)
        )
        parts = [mean + deviation * variable[..., list(schema.numeric)]]
        parts += [variable[..., g[0] : g[-1] + 1].softmax(dim=-1) for g in schema.groups]
        order = [*schema.numeric, *(column for group in schema.groups for column in group)]
        place = torch.tensor(order, device=variable.device).argsort()
        return torch.cat(parts, dim=-1)[..., place]

    def clamp_(self, variable: Tensor) -> None:
        schema = self.schema
        for i, column in enumerate(schema.numeric):
            scale = schema.deviation[i] or 1.0
            low, high = ((end - schema.mean[i]) / scale for end in (schema.low[i], schema.high[i]))
            variable[..., column].clamp_(low, high)


@dataclass(frozen=True, kw_only=True)
class TabLeak:
    """Rebuild the rows of a table: soft categories, and the median of many guesses [1]_.

    Matches the direction of the gradient by signed Adam, from ``num_guesses`` starts that are moved
    in one batch of work. The rows of each guess are paired with those of the one that fits best,
    and every cell is the median of its pairs: what all guesses agree on is likely to be so. Which
    columns are numbers and which a category, and the range of the numbers, is read off the
    attacker's own rows.

    Differs from the paper: numbers are clamped to the range of the attacker's rows, not bounded by
    a sigmoid, which begins far out where a range is lopsided; labels are read off the gradient, not
    known; the estimate of what is certain is left out.

    Args:
        num_guesses: Guesses that are pooled.
        num_rows: Rows to guess for each victim; None for as many examples as it claims, at most 16.

    .. [1] Vero et al., ICML 2023. https://arxiv.org/abs/2210.01785
    """

    num_steps: int = 1_500
    lr: float = 0.06
    num_guesses: int = 30
    num_rows: int | None = None
    labels: LabelRule = field(default_factory=Counts)

    def __post_init__(self) -> None:
        at_least(1, self, num_steps=self.num_steps, num_guesses=self.num_guesses)
        at_least(1, self, num_rows=self.num_rows)
        positive(self, lr=self.lr)

    @property
    def prior_only(self) -> _Deaf:
        """The same, deaf to the gradient: what the attacker's rows are worth on their own."""
        return _Deaf(self)

    def __call__(
        self,
        view: ServerView[Update],
        *,
        victims: tuple[int, ...],
        population: Batch,
        rng: Generator,
    ) -> tuple[Reconstruction, ...]:
        schema = _schema(population)
        recipe = Recipe(
            objective=Cosine(),
            optimiser=SignedAdam(self.num_steps, self.lr),
            start=Uniform(),
            labels=self.labels,
            space=Features(schema),
            together=self.num_guesses > 1,
        )
        clues = [clue_of(view, v, population, self.num_rows) for v in victims]
        return tuple(self._pooled(clue, recipe, schema, rng) for clue in clues)

    def _pooled(self, clue: Clue, recipe: Recipe, schema: Schema, rng: Generator) -> Reconstruction:
        guesses = invert_all((clue,) * self.num_guesses, recipe, rng=rng)
        best = min(guesses, key=lambda g: _distance(clue, g))
        paired = [g.inputs.cpu()[_order(schema, g, best)] for g in guesses]
        rows = schema.hardened(torch.stack(paired).median(dim=0).values)
        return replace(best, inputs=rows.to(best.inputs))


@dataclass(frozen=True)
class _Deaf:
    """``TabLeak`` without the update: the median of its starts."""

    attack: TabLeak

    def __call__(
        self,
        view: ServerView[Update],
        *,
        victims: tuple[int, ...],
        population: Batch,
        rng: Generator,
    ) -> tuple[Reconstruction, ...]:
        schema, found = _schema(population), []
        for victim in victims:
            clue = clue_of(view, victim, population, self.attack.num_rows)
            recipe = Recipe(
                objective=Silent(),
                optimiser=SignedAdam(1, self.attack.lr),
                start=Uniform(),
                labels=self.attack.labels,
                space=Features(schema),
            )
            found.append(self.attack._pooled(clue, recipe, schema, rng))
        return tuple(found)


def _schema(population: Batch) -> Schema:
    if population[0].ndim != 2:
        raise ValueError(
            "TabLeak is for tables, (n, features); the public data have the shape "
            f"{tuple(population[0].shape)}: take InvertingGradients"
        )
    return Schema.of(population[0].cpu())


def _distance(clue: Clue, guess: Reconstruction) -> float:
    slope = clue.model.gradient(clue.before, (guess.inputs, guess.labels))
    return 1 - float(torch.cosine_similarity(slope, -clue.delta, dim=0))


def _order(schema: Schema, guess: Reconstruction, best: Reconstruction) -> Sequence[int]:
    """Return the guess's rows in the order of those of ``best``, each among its own class."""
    order = [0] * len(best.labels)
    for label in set(best.labels.tolist()):
        mine = (guess.labels.cpu() == label).nonzero().flatten()
        theirs = (best.labels.cpu() == label).nonzero().flatten()
        rows, columns = schema.match(
            schema.hardened(guess.inputs.cpu()[mine]), schema.hardened(best.inputs.cpu()[theirs])
        )
        for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
            order[int(theirs[column])] = int(mine[row])
    return order

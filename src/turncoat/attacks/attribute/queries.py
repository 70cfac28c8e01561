"""Attributes by asking the model about every value that they could have."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Generator, Tensor

from turncoat.describe import ADDED
from turncoat.games.attributes import Hidden, features_of, forest
from turncoat.task import Batch
from turncoat.trial import Attributes
from turncoat.validate import one_of
from turncoat.views import ModelView, QueryView

Prior = Literal["marginal", "imputed"]
_DOUBT = 0.01  # of an imputation, so that no value is out of the question


@dataclass(frozen=True)
class FredriksonAttribute:
    """The value whose answer fits the label, as answers are right or wrong, and its prior [1]_.

    ``Pr[v] * C[f(x_v), y]``: ``C`` says how often a record of class ``y`` is answered as
    ``f(x_v)``, by the attacker's own records.

    .. [1] Fredrikson et al., CCS 2015, section 4. https://doi.org/10.1145/2810103.2813677
    """

    def __call__(
        self,
        view: ModelView | QueryView,
        *,
        rows: Tensor,
        labels: Tensor,
        hidden: Hidden,
        population: Batch,
    ) -> Attributes:
        answers = answers_by_value(view, rows, hidden).argmax(dim=2)
        said, classes = view.scores(population[0]).argmax(dim=1).cpu(), population[1].cpu()
        num = int(max(answers.max(), classes.max(), said.max(), labels.max())) + 1
        counts = torch.ones(
            num, num, dtype=torch.float64
        )  # one of each, so that none is unheard of
        counts.index_put_((classes, said), torch.ones(len(said)).double(), accumulate=True)
        errors = counts / counts.sum(dim=1, keepdim=True)
        return Attributes(_prior(population, hidden) * errors[labels[:, None].cpu(), answers])


@dataclass(frozen=True)
class YeomAttribute:
    """The value under which the record's label is likeliest, times its prior [1]_.

    ``Pr[v] * p(y | x_v)``: the density of the error that the paper has for regressions is the
    answer's own probability here.

    Args:
        prior: How frequent a value is among the attacker's records, or how likely in this record by
            imputation from all else that is known of it [2]_.

    .. [1] Yeom et al., CSF 2018, adversary 4. https://arxiv.org/abs/1709.01604
    .. [2] Jayaraman and Evans, CCS 2022. https://arxiv.org/abs/2209.01292
    """

    prior: Prior = field(default="marginal", metadata=ADDED)

    def __post_init__(self) -> None:
        one_of(Prior, self, prior=self.prior)

    def __call__(
        self,
        view: ModelView | QueryView,
        *,
        rows: Tensor,
        labels: Tensor,
        hidden: Hidden,
        population: Batch,
        rng: Generator,
    ) -> Attributes:
        likely = of_label(answers_by_value(view, rows, hidden), labels).exp()
        return Attributes(prior_of(self.prior, rows, labels, hidden, population, rng) * likely)


@dataclass(frozen=True)
class CSMIA:
    """The one value with which the model is right; else by how sure it is of its answers [1]_.

    Where several values give the right class, the surest of these; where none does, the one of
    which it is least sure.

    .. [1] Mehnaz et al., USENIX Security 2022, section 4.1. https://arxiv.org/abs/2201.09370
    """

    def __call__(
        self, view: ModelView | QueryView, *, rows: Tensor, labels: Tensor, hidden: Hidden
    ) -> Attributes:
        answers = answers_by_value(view, rows, hidden)
        sure, said = answers.max(dim=2)
        right = said == labels[:, None].cpu()
        return Attributes(torch.where(right, 1 + sure.exp(), -sure.exp()))


@dataclass(frozen=True)
class LOMIA:
    """By labels alone: learn from records that one value only explains, impute the rest [1]_.

    Differs from the paper: the attack model is a random forest; where no record has one value only,
    or all have the same, the prior decides.

    .. [1] Mehnaz et al., USENIX Security 2022, section 4.2. https://arxiv.org/abs/2201.09370
    """

    def __call__(
        self,
        view: ModelView | QueryView,
        *,
        rows: Tensor,
        labels: Tensor,
        hidden: Hidden,
        population: Batch,
        rng: Generator,
    ) -> Attributes:
        right = answers_by_value(view, rows, hidden).argmax(dim=2) == labels[:, None].cpu()
        told = right.sum(dim=1) == 1
        scores = _prior(population, hidden).repeat(len(rows), 1)
        found = right[told].long().argmax(dim=1)
        if len(set(found.tolist())) > 1:
            known = features_of(rows.cpu(), labels.cpu(), hidden)
            model = forest(rng).fit(known[told].numpy(), found.numpy())
            scores = torch.zeros_like(scores)
            probs = torch.from_numpy(model.predict_proba(known.numpy()))
            scores[:, torch.from_numpy(model.classes_)] = probs
        scores[told] = right[told].double()
        return Attributes(scores)


@dataclass(frozen=True)
class LearnedAttribute:
    """A forest that reads the record and the model's answers for every value of the attribute [1]_.

    It learns on the attacker's own records, on which the model was not trained. What it has beyond
    imputation is what the answers say.

    Differs from the paper: a random forest in place of a net.

    .. [1] Jayaraman and Evans, CCS 2022, section 3. https://arxiv.org/abs/2209.01292
    """

    def __call__(
        self,
        view: ModelView | QueryView,
        *,
        rows: Tensor,
        labels: Tensor,
        hidden: Hidden,
        population: Batch,
        rng: Generator,
    ) -> Attributes:
        def known(inputs: Tensor, classes: Tensor) -> Tensor:
            answers = of_label(answers_by_value(view, inputs, hidden), classes).clamp(min=-20)
            return torch.cat([features_of(inputs.cpu(), classes.cpu(), hidden), answers], dim=1)

        model = forest(rng)
        model.fit(known(*population).numpy(), hidden.read(population[0]).numpy())
        scores = torch.zeros(len(rows), len(hidden.values), dtype=torch.float64)
        probs = torch.from_numpy(model.predict_proba(known(rows, labels).numpy()))
        scores[:, torch.from_numpy(model.classes_)] = probs
        return Attributes(scores)


def answers_by_value(view: ModelView | QueryView, rows: Tensor, hidden: Hidden) -> Tensor:
    """Return log-probabilities by value. Shape: ``(records, values, classes)``, float64."""
    asked = [view.scores(hidden.filled(rows, v)).double() for v in range(len(hidden.values))]
    return torch.stack(asked, dim=1).cpu()


def of_label(answers: Tensor, labels: Tensor) -> Tensor:
    """Return those of each record's class. Shape: ``(records, values)``."""
    index = labels.cpu()[:, None, None].expand(-1, answers.shape[1], 1)
    return answers.gather(2, index).squeeze(2)


def prior_of(
    kind: Prior, rows: Tensor, labels: Tensor, hidden: Hidden, population: Batch, rng: Generator
) -> Tensor:
    """Return how likely each value is beforehand. Shape: ``(records, values)``, float64."""
    if kind == "marginal":
        return _prior(population, hidden).repeat(len(rows), 1)
    model, num = forest(rng), len(hidden.values)
    known, held = (
        features_of(population[0].cpu(), population[1].cpu(), hidden),
        hidden.read(population[0]),
    )
    model.fit(known.numpy(), held.numpy())
    asked = features_of(rows.cpu(), labels.cpu(), hidden)
    found = torch.full((len(rows), num), _DOUBT / num, dtype=torch.float64)
    probs = torch.from_numpy(model.predict_proba(asked.numpy()))
    found[:, torch.from_numpy(model.classes_)] += (1 - _DOUBT) * probs
    return found


def _prior(population: Batch, hidden: Hidden) -> Tensor:
    """Return how frequent each value is among the attacker's own records. Shape: ``(values,)``."""
    counts = torch.bincount(hidden.read(population[0]), minlength=len(hidden.values)).double() + 1
    return counts / counts.sum()

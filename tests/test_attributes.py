"""Attribute inference, beside what can be known without the model.

Kinds: oracle (tables of answers by hand), baseline (imputation, paired), theorem (an attribute that
follows from the others is imputed), sabotage (a model that never saw the records; a plain linear
model has nothing to tell), contract (bad columns).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from turncoat.attacks.attribute.queries import (
    CSMIA,
    LOMIA,
    FredriksonAttribute,
    LearnedAttribute,
    YeomAttribute,
)
from turncoat.attacks.attribute.white_box import GradientNorm, NeuronOutput, correlation, norms
from turncoat.games.attributes import AttributeInference, Hidden
from turncoat.randomness import Randomness
from turncoat.stage import call
from turncoat.stages.train.local import LocalSGD
from turncoat.task import Task
from turncoat.tasks.bundled import digits
from turncoat.tasks.models import MLP
from turncoat.tasks.tables import from_csv
from turncoat.trial import Attributes, Marked
from turncoat.views import ModelView

RANDOM = Randomness(2)
ALL: tuple[Any, ...] = (
    FredriksonAttribute(),
    YeomAttribute(),
    CSMIA(),
    LOMIA(),
    LearnedAttribute(),
    YeomAttribute("imputed"),
    GradientNorm("marginal"),
    GradientNorm(),
    NeuronOutput(),
)
torch.set_num_threads(1)


@cache
def people(hidden: tuple[int, ...], by_chance: bool = True) -> Task:
    """Return a table: eight numbers, a secret, and a label that is chance, or half of the secret.

    The secret follows from nothing else that is known of a person.
    """
    rng = RANDOM.at("people")
    numbers, secret = torch.randn(800, 8, generator=rng), torch.rand(800, generator=rng) < 0.5
    label = torch.rand(800, generator=rng) < 0.5
    if not by_chance:
        label = torch.where(label, secret, numbers[:, 0] > 0)
    lines = ["secret,label," + ",".join(f"x{i}" for i in range(8))]
    for row, s, y in zip(numbers.tolist(), secret.tolist(), label.tolist(), strict=True):
        lines.append(f"{'ab'[s]},{int(y)}," + ",".join(f"{v:.4f}" for v in row))
    with TemporaryDirectory() as folder:
        file = Path(folder) / "people.csv"
        file.write_text("\n".join(lines))
        return from_csv(
            file, 1, label="label", model=MLP(hidden), test_size=300, public_size=200, seed=0
        )


def column(task: Task) -> int:
    """Return where the secret stands: the only category of the table."""
    inputs = task.population[0]
    return next(c for c in range(inputs.shape[1]) if set(inputs[:, c].tolist()) <= {0.0, 1.0})


@cache
def trained(hidden: tuple[int, ...], by_chance: bool = True) -> ModelView:
    task = people(hidden, by_chance)
    recipe = LocalSGD(0.1, num_epochs=60, batch_size=16, momentum=0.9)
    start = task.model.initial(RANDOM.at("begin"))
    update = recipe(task.model, start, task.clients[0], rng=RANDOM.at("train"))
    return ModelView(task.model, start + update.delta)


def marked(
    attack: Any, hidden: tuple[int, ...], view: Any = None, by_chance: bool = True
) -> Marked:
    task = people(hidden, by_chance)
    game = AttributeInference(column(task))
    question, truth = game.pose(task, took_part=frozenset({0}), cohort=(0,), rng=RANDOM.at("pose"))
    guess = call(
        attack,
        view or trained(hidden, by_chance),
        rows=question.rows,
        labels=question.labels,
        hidden=question.hidden,
        population=question.population,
        rng=RANDOM.at("attack"),
    )
    return game.mark(guess, truth, rng=RANDOM.at("mark"))


def other(found: Marked, name: str) -> Any:
    return next(m for m in found.others if m.name == name)


MEMBERS = (YeomAttribute(), CSMIA(), LOMIA(), YeomAttribute("imputed"), GradientNorm("marginal"))


@pytest.mark.parametrize("attack", MEMBERS, ids=repr)
def test_a_net_that_memorises_tells_more_than_can_be_imputed(attack: Any) -> None:
    found = marked(attack, (256,))
    assert other(found, "over_imputation").low > 0
    assert other(found, "advantage").low > 0


@pytest.mark.parametrize("attack", ALL, ids=repr)
def test_what_the_label_says_of_an_attribute_is_found_and_is_not_about_members(attack: Any) -> None:
    found = marked(attack, (), by_chance=False)
    assert found.headline.low > 0.55  # half of the people have either value
    assert other(found, "advantage").low < 0


@pytest.mark.parametrize("attack", ALL, ids=repr)
def test_a_linear_model_tells_no_more_of_members_than_of_others(attack: Any) -> None:
    advantage = other(marked(attack, ()), "advantage")
    assert advantage.low < 0.03 and abs(advantage.value) < 0.15


@pytest.mark.parametrize("attack", ALL, ids=repr)
def test_a_model_without_training_adds_nothing(attack: Any) -> None:
    task = people((256,))
    fresh = ModelView(task.model, task.model.initial(RANDOM.at("fresh")))
    assert other(marked(attack, (256,), fresh), "over_imputation").low < 0


@dataclass(frozen=True)
class Table:
    """Answers that depend on the first column alone: rows of log-probabilities by its value."""

    by_value: Tensor

    def scores(self, inputs: Tensor) -> Tensor:
        return self.by_value[inputs[:, 0].long()].log()


def test_gradients_are_those_of_one_record_at_a_time() -> None:
    """The fast way, of many at once, beside ``Model.gradient``."""
    task, view = people((8,)), trained((8,), True)
    inputs, labels = (part[:5] for part in task.clients[0])
    slow = [
        float(task.model.gradient(view.params, (inputs[i : i + 1], labels[i : i + 1])).norm())
        for i in range(5)
    ]
    assert norms(view, inputs, labels).tolist() == pytest.approx(slow, rel=1e-4)


def test_a_neuron_that_copies_the_attribute_is_found() -> None:
    neurons = torch.randn(200, 4, generator=RANDOM.at("neurons")).double()
    is_true = torch.rand(200, generator=RANDOM.at("truth")) < 0.5
    neurons[:, 2] = is_true.double()
    neurons[:, 3] = 1.0
    found = correlation(neurons, is_true)
    expected = np.corrcoef(neurons[:, 0].numpy(), is_true.double().numpy())[0, 1]
    assert found.tolist() == pytest.approx([expected, float(found[1]), 1.0, 0.0])


BINARY = Hidden((0,), torch.tensor([[0.0], [1.0]]))


def test_csmia_takes_its_three_cases() -> None:
    rows, labels = torch.zeros(1, 2), torch.tensor([1])

    def said(first: list[float], second: list[float]) -> int:
        view: Any = Table(torch.tensor([first, second]))
        return int(CSMIA()(view, rows=rows, labels=labels, hidden=BINARY).scores.argmax())

    assert said([0.9, 0.1], [0.4, 0.6]) == 1  # one value is right
    assert said([0.2, 0.8], [0.4, 0.6]) == 0  # both are: the surer
    assert said([0.9, 0.1], [0.6, 0.4]) == 1  # none is: the less sure


def test_fredrikson_weighs_how_often_the_model_errs_so_with_the_prior() -> None:
    """By hand: of 98 records of class 0 none is called 1; every pair is counted once more."""
    view: Any = Table(torch.tensor([[0.9, 0.1], [0.3, 0.7]]))
    rows, labels = torch.zeros(1, 2), torch.tensor([0])
    mostly_zero = torch.zeros(98, 2), torch.zeros(98, dtype=torch.long)
    found = FredriksonAttribute()(
        view, rows=rows, labels=labels, hidden=BINARY, population=mostly_zero
    ).scores
    assert found[0].tolist() == pytest.approx([0.99 * 99 / 100, 0.01 * 1 / 100])


def test_yeom_weighs_the_answer_with_the_prior() -> None:
    view: Any = Table(torch.tensor([[0.4, 0.6], [0.3, 0.7]]))
    rows, labels = torch.zeros(1, 2), torch.tensor([1])
    mostly_zero = torch.zeros(98, 2), torch.zeros(98, dtype=torch.long)
    found = YeomAttribute()(
        view,
        rows=rows,
        labels=labels,
        hidden=BINARY,
        population=mostly_zero,
        rng=RANDOM.at("attack"),
    ).scores
    assert found[0].tolist() == pytest.approx([0.99 * 0.6, 0.01 * 0.7])


def test_an_attribute_that_follows_from_the_others_is_imputed() -> None:
    task = people(())
    place = column(task)

    def doubled(rows: Tensor) -> Tensor:
        twice = rows.clone()
        other_column = next(c for c in range(rows.shape[1]) if c not in (place, place + 1))
        twice[:, other_column] = rows[:, place]
        return twice

    again = Task(
        **{
            **{name: getattr(task, name) for name in ("name", "model", "source")},
            "clients": tuple((doubled(x), y) for x, y in task.clients),
            "test": (doubled(task.test[0]), task.test[1]),
            "public": None if task.public is None else (doubled(task.public[0]), task.public[1]),
        }
    )
    game = AttributeInference(place)
    _, truth = game.pose(again, took_part=frozenset({0}), cohort=(0,), rng=RANDOM.at("pose"))
    assert torch.equal(truth.imputed, truth.values)


def test_columns_that_are_no_category_are_refused() -> None:
    task = people(())
    number = next(c for c in range(task.population[0].shape[1]) if c not in (column(task),))
    for wrong in (number + 1 if number == column(task) else number, 99):
        if wrong == column(task) + 1:
            continue
        game = AttributeInference(wrong)
        with pytest.raises(ValueError, match="is no category"):
            game.pose(task, took_part=frozenset({0}), cohort=(0,), rng=RANDOM.at("pose"))
    images = digits(2, per_client=4, seed=0)
    with pytest.raises(ValueError, match="choose a task of tables"):
        AttributeInference(0).pose(
            images, took_part=frozenset({0}), cohort=(0,), rng=RANDOM.at("pose")
        )


def test_scores_of_too_few_records_are_refused() -> None:
    task = people(())
    game = AttributeInference(column(task), num_records=20)
    _, truth = game.pose(task, took_part=frozenset({0}), cohort=(0,), rng=RANDOM.at("pose"))
    with pytest.raises(ValueError, match="scores for each of 20 records"):
        game.mark(Attributes(torch.zeros(3, 2)), truth, rng=RANDOM.at("mark"))

"""Tables: their schema, their inversion, their game.

Kinds: contract (in test_contracts.py too), theorem (a schema read off drawn tables, with
hypothesis), golden (marks worked out by hand), sabotage (noise stops the attack; one that is deaf
to the gradient is no better than a blind guess).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from turncoat.attacks.inversion.tabular import Features, TabLeak
from turncoat.games.records import ReconstructRows
from turncoat.messages import Update
from turncoat.metrics.tables import QUARTER, Schema
from turncoat.randomness import Randomness
from turncoat.stage import Plan
from turncoat.stages.train.dpsgd import DPSGD
from turncoat.stages.train.local import FedSGD
from turncoat.task import Model, Shards, Task
from turncoat.tasks.bundled import breast_cancer, digits
from turncoat.tasks.fetched import heart_disease
from turncoat.tasks.models import MLP, Built
from turncoat.trial import Marked, Reconstruction, Trial
from turncoat.views import ServerView

DATA = Path(__file__).parents[1].parent / "shared" / "data"
HEARTS = DATA / "uci_heart_disease_4centres.npz"
local = pytest.mark.skipif(not HEARTS.is_file(), reason="needs the local table")
RANDOM = Randomness(3)


def table(num: int, sizes: tuple[int, ...], seed: int) -> Tensor:
    """Return rows of a number, then a category of each size, then a number."""
    rng = RANDOM.at("table", seed)
    parts = [torch.randn(num, 1, generator=rng)]
    for size in sizes:
        drawn = torch.cat([torch.arange(size), torch.randint(size, (num - size,), generator=rng)])
        parts.append(torch.eye(size)[drawn[torch.randperm(num, generator=rng)]])
    return torch.cat([*parts, torch.randn(num, 1, generator=rng)], dim=1)


def mixed(num_each: int = 1, model: MLP | None = None) -> Task:
    rows = table(120, (3, 4), 0)
    labels = (rows[:, 0] + rows[:, 1] > 0.3).long()
    parts = [torch.arange(num_each) + num_each * c for c in range(3)]
    return Task(
        "mixed",
        Model(Built(model or MLP((16,)), (9,), 2)),
        Shards.of((rows, labels), parts),
        test=(rows[60:90], labels[60:90]),
        public=(rows[30:60], labels[30:60]),
    )


def played(task: Task, train: Any, attack: Any, **options: Any) -> Marked:
    start = task.model.initial(RANDOM.at("begin"))
    sent = tuple(
        train(task.model, start, data, rng=RANDOM.at("train", i))
        for i, data in enumerate(task.clients)
    )
    senders = tuple(range(len(sent)))
    view = ServerView[Update](0, task.model, senders, sent, sent=(start,) * len(sent))
    game = ReconstructRows(**options)
    question, truth = game.pose(
        task, took_part=frozenset(senders), cohort=senders, rng=RANDOM.at("pose")
    )
    guess = attack(
        view, victims=question.victims, population=question.population, rng=RANDOM.at("attack")
    )
    return game.mark(guess, truth, rng=RANDOM.at("mark"))


# The schema ----------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(2, 6), max_size=4), st.integers(0, 99))
def test_a_schema_is_read_off_the_rows(sizes: list[int], seed: int) -> None:
    rows = table(40, tuple(sizes), seed)
    schema, start, expected = Schema.of(rows), 1, []
    for size in sizes:
        expected.append(tuple(range(start, start + size)))
        start += size
    assert schema.numeric == (0, rows.shape[1] - 1)
    assert schema.groups == tuple(expected)
    assert torch.equal(schema.hardened(rows), rows)
    assert float(schema.errors(rows, rows).sum()) == 0


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(2, 6), max_size=4), st.integers(0, 99), st.booleans())
def test_whatever_is_moved_stands_for_rows_of_the_table(
    sizes: list[int], seed: int, several: bool
) -> None:
    rows = table(40, tuple(sizes), seed)
    schema = Schema.of(rows)
    space = Features(schema)
    shape = (2, 5, rows.shape[1]) if several else (5, rows.shape[1])
    moved = 20 * torch.randn(shape, generator=RANDOM.at("moved", seed))
    space.clamp_(moved)
    made = space.decode(moved)
    for group in schema.groups:
        assert torch.allclose(made[..., list(group)].sum(dim=-1), torch.ones(shape[:-1]))
    for i, column in enumerate(schema.numeric):
        assert float(made[..., column].min()) >= schema.low[i] - 1e-4
        assert float(made[..., column].max()) <= schema.high[i] + 1e-4


def test_a_missing_category_is_no_value() -> None:
    rows = torch.tensor([[1.0, 0.0, 0.5], [0.0, 0.0, 0.2], [0.0, 1.0, 0.1]])
    assert Schema.of(rows).categories(rows).flatten().tolist() == [0, -1, 1]


def test_means_and_modes_are_what_knows_the_table_alone() -> None:
    rows = torch.tensor([[1.0, 0.0, 0.5], [1.0, 0.0, 0.2], [0.0, 1.0, 0.2]])
    assert torch.allclose(Schema.of(rows).blind(rows), torch.tensor([[1.0, 0.0, 0.3]]))


def test_a_quarter_of_a_normal_column_is_within_the_tolerance() -> None:
    width = math.erf(QUARTER / math.sqrt(2))
    assert width == pytest.approx(0.25, abs=1e-3)


@local
def test_kinds_of_pain_of_a_real_table_are_one_category() -> None:
    task = heart_disease(data=HEARTS)
    schema = Schema.of(task.population[0])
    assert [len(group) for group in schema.groups] == [4, 3, 3, 3]
    assert len(schema.numeric) == 9


# The attack ----------------------------------------------------------------------------------

_ATTACK = TabLeak(num_steps=200, num_guesses=3)


def test_a_row_comes_back_from_its_gradient_numbers_and_categories() -> None:
    marked = played(mixed(), FedSGD(0.1), _ATTACK)
    values = {m.name: m for m in marked.others}
    assert marked.headline.beats_baseline and marked.headline.value > 0.9
    assert values["categorical_accuracy"].value == 1.0
    assert values["numeric_error"].value < 0.2 < values["numeric_error"].baseline


def test_a_tumour_comes_back_from_its_gradient() -> None:
    attack = TabLeak(num_steps=400, num_guesses=2)
    marked = played(breast_cancer(3, per_client=1), FedSGD(0.1), attack)
    assert marked.headline.beats_baseline and marked.headline.value > 0.7
    assert [m.name for m in marked.others] == ["numeric_error"]


def test_more_rows_of_a_batch_are_harder() -> None:
    one, four = (played(mixed(n), FedSGD(0.1), _ATTACK).headline for n in (1, 4))
    assert one.value - one.baseline > four.value - four.baseline


def test_differential_privacy_leaves_no_more_than_a_blind_guess() -> None:
    private = DPSGD(0.1, 1.0, 1, target_epsilon=8.0, delta=1e-5, num_steps=1)
    marked = played(mixed(), private.planned(Plan(20, (1, 1, 1))), _ATTACK)
    assert not marked.headline.beats_baseline


def test_an_attack_deaf_to_the_gradient_is_no_better_than_a_blind_guess() -> None:
    marked = played(mixed(), FedSGD(0.1), _ATTACK.prior_only)
    assert not marked.headline.beats_baseline


def test_images_are_refused_with_the_cure() -> None:
    task = digits(2, per_client=1)
    with pytest.raises(ValueError, match="take InvertingGradients"):
        _ATTACK(
            ServerView[Update](0, task.model, (), (), sent=()),
            victims=(),
            population=task.population,
            rng=RANDOM.at("attack"),
        )
    with pytest.raises(ValueError, match="choose a task of tables"):
        ReconstructRows().pose(task, took_part=frozenset({0}), cohort=(0,), rng=RANDOM.at("pose"))


# The game ------------------------------------------------------------------------------------


def test_cells_are_counted_right_within_the_tolerance() -> None:
    task, game = mixed(1), ReconstructRows(victim=1, per_column=True)
    _, truth = game.pose(
        task, took_part=frozenset({0, 1, 2}), cohort=(0, 1, 2), rng=RANDOM.at("pose")
    )
    rows, labels = task.clients[1]
    schema = Schema.of(torch.cat([task.population[0], rows]))
    near, far = rows.clone(), rows.clone()
    near[:, 0] += 0.3 * schema.deviation[0]
    far[:, 0] += 3 * schema.deviation[0]
    far[:, 1:4] = far[:, [2, 3, 1]]  # another value of the first category
    marks = [
        game.mark([Reconstruction(r, labels)], truth, rng=RANDOM.at("mark"))
        for r in (rows, near, far)
    ]
    assert [m.headline.value for m in marks] == [1.0, 1.0, 0.5]
    values = {m.name: m.value for m in marks[2].others}
    assert values["numeric_error"] == pytest.approx(1.5, rel=1e-3)
    assert values["categorical_accuracy"] == 0.5
    assert values["column_0_error"] == pytest.approx(3.0, rel=1e-3)
    assert (values["column_1_accuracy"], values["column_4_accuracy"]) == (0.0, 1.0)
    assert Trial(_ATTACK, game).family == "inversion"


def test_intervals_of_shares_stay_shares() -> None:
    marked = played(mixed(), FedSGD(0.1), TabLeak(num_steps=1, num_guesses=1))
    for m in (marked.headline, *marked.others):
        assert m.low <= m.value <= m.high and m.low >= 0
        assert m.high <= 1 or not m.worst


def test_a_guess_of_the_wrong_kind_is_refused() -> None:
    task, game = mixed(2), ReconstructRows(victim=0)
    _, truth = game.pose(
        task, took_part=frozenset({0, 1, 2}), cohort=(0, 1, 2), rng=RANDOM.at("pose")
    )
    rows, labels = task.clients[0]
    for bad, said in (
        (Reconstruction(rows[:, :4], labels), "rows of shape"),
        (Reconstruction(rows, labels[:1]), "as many labels"),
        (Reconstruction(rows * torch.nan, labels), "NaN"),
    ):
        with pytest.raises(ValueError, match=said):
            game.mark([bad], truth, rng=RANDOM.at("mark"))
    with pytest.raises(ValueError, match="client 7 was not in this round"):
        ReconstructRows(victim=7).pose(
            task, took_part=frozenset({0}), cohort=(0,), rng=RANDOM.at("pose")
        )

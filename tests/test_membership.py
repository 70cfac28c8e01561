"""Membership attacks beside each other, on digits that a wide net knows by heart.

Kinds: oracle (hand-computed ratios and entropies), theorem (a nominal rate of false alarms is the
real one), baseline (each beats chance where there is something to find), sabotage (a model that
never saw the records; shadows of unknown training; labels alone).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from math import exp, log
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binom
from sklearn.metrics import roc_auc_score
from torch import Tensor

from turncoat.attacks.membership.label_only import LabelOnly
from turncoat.attacks.membership.lira import LiRA
from turncoat.attacks.membership.loss_threshold import LossThreshold
from turncoat.attacks.membership.references import PopulationAttack, ReferenceAttack
from turncoat.attacks.membership.rmia import RMIA
from turncoat.attacks.membership.shadow_models import ShadowModels
from turncoat.attacks.membership.thresholds import (
    ConfidenceThreshold,
    EntropyThreshold,
    ModifiedEntropyThreshold,
)
from turncoat.games.membership import Membership
from turncoat.randomness import Randomness
from turncoat.stage import call
from turncoat.stages.train.local import LocalSGD
from turncoat.task import Batch, Task
from turncoat.tasks.bundled import digits
from turncoat.tasks.models import MLP
from turncoat.trial import Memberships
from turncoat.views import ModelView, QueryView, Shadows

RANDOM = Randomness(3)
ALL: tuple[Any, ...] = (
    LossThreshold(),
    ConfidenceThreshold(),
    EntropyThreshold(),
    ModifiedEntropyThreshold(),
    LabelOnly(),
    PopulationAttack(),
    ReferenceAttack(12),
    ShadowModels(12),
    RMIA(12),
    RMIA(12, online=True),
    LiRA(12),
)
torch.set_num_threads(1)


@dataclass(frozen=True)
class Known:
    """A model, whom it may know, and the attacker's own models."""

    task: Task
    target: ModelView
    candidates: Batch
    truth: Tensor
    shadows: Shadows


@cache
def known() -> Known:
    task = digits(1, per_client=150, test_size=400, public_size=400, seed=1, model=MLP((128,)))
    recipe = LocalSGD(0.1, num_epochs=40, batch_size=16, momentum=0.9)
    question, truth = Membership().pose(
        task, took_part=frozenset({0}), cohort=(0,), rng=RANDOM.at("pose")
    )
    inputs, labels = question.candidates

    def trained(data: Batch, number: int) -> ModelView:
        start = task.model.initial(RANDOM.at("begin", number))
        update = recipe(task.model, start, data, rng=RANDOM.at("train", number))
        return ModelView(task.model, start + update.delta)

    halves = [torch.randperm(len(labels), generator=RANDOM.at("half", i)) for i in range(6)]
    inside = torch.stack([side < len(labels) // 2 for side in halves])
    inside = torch.cat([inside, ~inside])
    models = tuple(trained((inputs[k], labels[k]), 1 + i) for i, k in enumerate(inside))
    return Known(
        task, trained(task.clients[0], 0), question.candidates, truth, Shadows(models, inside)
    )


def scores(attack: Any, view: Any = None, **other: Any) -> Tensor:
    on = known()
    offers = {
        "candidates": on.candidates,
        "population": on.task.population,
        "shadows": on.shadows,
        **other,
    }
    found: Tensor = call(attack, view or on.target, rng=RANDOM.at("attack"), **offers).scores
    return found


def area(attack: Any, view: Any = None, **other: Any) -> float:
    guess = Memberships(scores(attack, view, **other))
    return Membership().mark(guess, known().truth, rng=RANDOM.at("mark")).headline.value


@pytest.mark.parametrize("attack", ALL, ids=repr)
def test_every_attack_beats_chance_on_a_model_that_knows_by_heart(attack: Any) -> None:
    assert area(attack) > 0.53


@pytest.mark.parametrize("attack", ALL, ids=repr)
def test_none_finds_members_of_a_model_that_has_none(attack: Any) -> None:
    fresh = ModelView(known().task.model, known().task.model.initial(RANDOM.at("fresh")))
    assert 0.4 < area(attack, fresh) < 0.6


@pytest.mark.parametrize("attack", [RMIA(12), RMIA(12, online=True), LiRA(12), ReferenceAttack(12)])
def test_knowing_how_hard_a_record_is_beats_any_threshold_on_the_loss(attack: Any) -> None:
    assert area(attack) > area(LossThreshold()) + 0.02


@pytest.mark.parametrize("attack", [ShadowModels(12), ReferenceAttack(12)])
def test_shadows_of_unknown_training_are_no_help(attack: Any) -> None:
    made, areas = known().shadows, []
    for i in range(3):
        order = torch.randperm(made.inside.shape[1], generator=RANDOM.at("shuffle", i))
        areas.append(area(attack, shadows=replace(made, inside=made.inside[:, order])))
    assert sum(areas) / 3 < area(attack)


@pytest.mark.parametrize("attack", [RMIA(), ShadowModels(2), ReferenceAttack(2)])
def test_without_shadows_they_say_what_they_need(attack: Any) -> None:
    with pytest.raises(ValueError, match="have the audit train them"):
        scores(attack, shadows=None)


@dataclass(frozen=True)
class Table:
    """A model that is a table of probabilities: an input is the number of its row."""

    rows: Tensor

    def scores(self, inputs: Tensor) -> Tensor:
        return self.rows[inputs.long().flatten()].log()


def of(*right: float) -> Table:
    """Return a model of two classes by its probabilities of class 0."""
    p = torch.tensor(right, dtype=torch.float64)
    return Table(torch.stack([p, 1 - p], dim=1))


def test_rmia_is_the_share_of_strangers_by_hand() -> None:
    target, first, second = of(0.9, 0.4, 0.8, 0.5), of(0.3, 0.4, 0.8, 0.5), of(0.6, 0.2, 0.4, 0.5)
    x, z = torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [3.0]])
    label = torch.zeros(2, dtype=torch.long)
    shadows: Any = Shadows((first, second), torch.tensor([[False, True], [True, False]]))  # type: ignore[arg-type]
    found = RMIA(a=1.0)(
        target,  # type: ignore[arg-type]
        candidates=(x, label),
        population=(z, label),
        shadows=shadows,
    ).scores
    # P(x) of models without it: 0.3 and 0.2, so r(x) = 3 and 2; P(z) = 0.6 and 0.5: r(z) = 4/3, 1.
    assert (found >= 1).all() and found[0] > found[1]
    strict = RMIA(a=1.0, gamma=2.0)(
        target,  # type: ignore[arg-type]
        candidates=(x, label),
        population=(z, label),
        shadows=shadows,
    ).scores
    assert [int(s * 2) for s in strict] == [2, 1]  # 3 >= 8/3 and 2; 2 >= 2 alone


@pytest.mark.parametrize("num_shadows", [2, 6])
def test_rmia_fits_its_correction_by_attacking_its_own_shadows(num_shadows: int) -> None:
    """Oracle: each correction's area, over shadow models in the target's place, by scikit-learn."""
    on = known()
    pair = [0, 6, 1, 7, 2, 8][:num_shadows]  # each with its complement
    shadows = Shadows(tuple(on.shadows.models[i] for i in pair), on.shadows.inside[pair])

    def said(view: ModelView, data: Batch) -> Any:
        return view.scores(data[0]).double().gather(1, data[1][:, None])[:, 0].exp().numpy()

    areas = np.zeros(11)
    for target in (0, 1):
        others = [i for i in range(num_shadows) if i != target]
        x = np.stack([said(m, on.candidates) for m in shadows.models])
        z = np.stack([said(m, on.task.population) for m in shadows.models])
        out = ~shadows.inside.numpy()
        members = [i for i in np.flatnonzero(~out[target]) if out[others, i].any()]
        for k in range(11):
            a = k / 10
            usual = [x[[j for j in others if out[j, i]], i].mean() for i in members]
            mine = x[target, members] / ((1 + a) / 2 * np.array(usual) + (1 - a) / 2)
            theirs = z[target] / ((1 + a) / 2 * z[others].mean(axis=0) + (1 - a) / 2)
            truth = np.repeat([1, 0], [len(mine), len(theirs)])
            areas[k] += roc_auc_score(truth, np.concatenate([mine, theirs]))
    best = float(areas.argmax()) / 10
    fitted = scores(RMIA(num_shadows), shadows=shadows)
    assert torch.equal(fitted, scores(RMIA(num_shadows, a=best), shadows=shadows))
    assert not torch.equal(fitted, scores(RMIA(num_shadows, a=1 - best), shadows=shadows))


def test_entropies_are_those_of_their_formulas() -> None:
    p = (0.7, 0.2, 0.1)
    model: Any = Table(torch.tensor([p], dtype=torch.float64))
    data = torch.zeros(1, 1), torch.tensor([1])
    plain = -sum(q * log(q) for q in p)
    modified = -(1 - 0.2) * log(0.2) - 0.7 * log(1 - 0.7) - 0.1 * log(1 - 0.1)
    assert float(EntropyThreshold()(model, candidates=data).scores) == pytest.approx(-plain)
    found = float(ModifiedEntropyThreshold()(model, candidates=data).scores)
    assert found == pytest.approx(-modified)
    sure: Any = Table(torch.tensor([[1.0, 0.0, 0.0]]))
    for attack in (EntropyThreshold(), ModifiedEntropyThreshold()):
        assert torch.isfinite(attack(sure, candidates=data).scores).all()
    assert exp(float(ConfidenceThreshold()(model, candidates=data).scores)) == pytest.approx(0.7)


@pytest.mark.parametrize("alpha", [0.05, 0.1])
def test_the_populations_false_alarms_are_as_many_as_were_asked_for(alpha: float) -> None:
    outsiders = ~known().truth
    flagged = int((scores(PopulationAttack())[outsiders] > 1 - alpha).sum())
    low, high = binom.interval(0.999, int(outsiders.sum()), alpha)
    assert low <= flagged <= high


def test_label_only_needs_nothing_but_labels() -> None:
    target = known().target

    def labels_only(inputs: Tensor) -> Tensor:
        best = target.scores(inputs).argmax(dim=1)
        return torch.nn.functional.one_hot(best, 10).float().log()

    assert torch.equal(scores(LabelOnly(), QueryView(labels_only)), scores(LabelOnly()))


@pytest.mark.parametrize("online", [True, False])
def test_liras_further_queries_are_flips_and_shifts_whose_scores_are_averaged(online: bool) -> None:
    inputs, labels = known().candidates
    one, many = LiRA(12, online=online), LiRA(12, online=online, flips=True, max_shift=1)
    copies = []
    for images in (inputs, inputs.flip(3)):
        around = np.pad(images.numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)), mode="reflect")
        for down in range(3):
            for right in range(3):
                copies.append(torch.from_numpy(around[:, :, down:, right:][:, :, :8, :8].copy()))
    each = torch.stack([scores(one, candidates=(copy, labels)) for copy in copies])
    assert len(copies) == 18
    assert torch.allclose(scores(many), each.mean(dim=0))


def test_what_is_no_image_is_neither_flipped_nor_shifted() -> None:
    inputs, labels = known().candidates
    for attack in (LiRA(12, flips=True), LiRA(12, max_shift=1)):
        with pytest.raises(ValueError, match="leave flips and max_shift out"):
            scores(attack, candidates=(inputs.flatten(1), labels))

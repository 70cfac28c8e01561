"""Attacks on views made by hand, with no runtime. Kinds: contract, golden, oracle (scipy), theorem,
sabotage (break the attack, or what it feeds on: it falls to chance)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import FrozenInstanceError, replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.datasets import load_digits
from torch import Tensor, nn

from turncoat.attacks.backdoor.model_replacement import ModelReplacement
from turncoat.attacks.backdoor.triggers import PixelPattern
from turncoat.attacks.inversion.engine import Clue
from turncoat.attacks.inversion.gradient_inversion import InvertingAggregate, InvertingGradients
from turncoat.attacks.inversion.labels import Counts
from turncoat.attacks.membership.lira import LiRA, confidence
from turncoat.attacks.membership.loss_threshold import LossThreshold
from turncoat.attacks.poisoning.alie import ALIE, largest_z
from turncoat.attacks.poisoning.label_flip import LabelFlip
from turncoat.attacks.poisoning.sign_flip import SignFlip
from turncoat.coalition import Clients, Coalition, check_worn
from turncoat.federation import Federation, Plain
from turncoat.games.membership import Membership
from turncoat.games.outcomes import BackdoorSuccess
from turncoat.games.reconstruction import Reconstruct
from turncoat.messages import Envelope, Revealed, Update, rows
from turncoat.randomness import Randomness
from turncoat.stage import call, matches
from turncoat.stages.aggregate.mean import Mean
from turncoat.stages.train.local import LocalSGD
from turncoat.task import Batch, Model, Task, accuracy
from turncoat.trial import Measurement, Trial
from turncoat.views import (
    AggregateView,
    CoalitionView,
    ModelView,
    QueryView,
    ServerView,
    Shadows,
)

RANDOM = Randomness(3)
torch.set_num_threads(1)


@cache
def digits() -> Batch:
    bunch = load_digits()
    order = torch.randperm(len(bunch.target), generator=RANDOM.at("digits"))
    images = torch.tensor(bunch.images)[:, None].float() / 16
    return images[order], torch.tensor(bunch.target)[order]


def smooth() -> nn.Module:
    """A small LeNet for 8x8 images, without kinks."""
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2)),
        *(nn.Conv2d(6, 16, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(64, 84), nn.Tanh(), nn.Linear(84, 10)),
    )


def wide() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def normed() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(144, 10)
    )


def split(num_clients: int, size: int, build: Callable[[], nn.Module]) -> Task:
    inputs, labels = digits()
    cuts = [slice(i * size, (i + 1) * size) for i in range(num_clients)]
    clients = tuple((inputs[c], labels[c]) for c in cuts)
    rest = slice(num_clients * size, None)
    return Task("digits", Model(build), clients, (inputs[rest], labels[rest]))


# inversion


def gradients(task: Task, lr: float = 0.1) -> ServerView[Update]:
    """Return what a server sees of one step of every client."""
    start = task.model.initial(RANDOM.at("begin"))
    messages = tuple(
        Update(-lr * task.model.gradient(start, data), float(len(data[1]))) for data in task.clients
    )
    senders = tuple(range(len(messages)))
    return ServerView(0, task.model, senders, messages, sent=(start,) * len(messages))


def aggregate(view: ServerView[Update]) -> AggregateView[Update]:
    before = view.sent[0]
    step = Mean()(view.messages)
    assert isinstance(step, Tensor)
    return AggregateView(0, view.model, before, before + step)


def inverted(attack: Any, view: Any, task: Task, victims: int = 2) -> Measurement:
    game = Reconstruct(num_victims=victims)
    cohort = tuple(range(len(task.clients)))
    question, truth = game.pose(
        task, took_part=frozenset(cohort), cohort=cohort, rng=RANDOM.at("pose")
    )
    guess = attack(
        view, victims=question.victims, population=question.population, rng=RANDOM.at("attack")
    )
    return game.mark(guess, truth, rng=RANDOM.at("mark")).headline


ATTACK = InvertingGradients(num_steps=300, tv_weight=1e-5)


def test_single_images_come_back_out_of_their_gradients() -> None:
    task = split(2, 1, smooth)
    marked = inverted(ATTACK, gradients(task), task)
    assert marked.value > marked.baseline + 5


def test_an_update_that_says_nothing_gives_no_image() -> None:
    task = split(2, 1, smooth)
    view = gradients(task)
    noise = [torch.randn(m.delta.shape, generator=RANDOM.at("noise")) for m in view.messages]
    noisy = tuple(replace(m, delta=n) for m, n in zip(view.messages, noise, strict=True))
    marked = inverted(ATTACK, replace(view, messages=noisy), task)
    assert marked.value < marked.baseline + 1


def test_the_aggregate_gives_away_a_cohort_of_one_and_hides_each_of_many() -> None:
    attack = InvertingAggregate(num_steps=300, tv_weight=1e-5)
    alone, crowd = split(1, 1, smooth), split(20, 1, smooth)
    found = inverted(attack, aggregate(gradients(alone)), alone)
    hidden = inverted(attack, aggregate(gradients(crowd)), crowd)
    assert found.value > found.baseline + 5
    assert hidden.value < hidden.baseline + 1


def test_inversion_needs_to_read_single_updates_and_its_kin_only_the_aggregate() -> None:
    class Masked(Revealed):
        pass

    single, whole = Trial(ATTACK, Reconstruct()), Trial(InvertingAggregate(), Reconstruct())
    assert matches(ServerView[Update], single.needs)
    assert not matches(ServerView[Masked], single.needs)
    assert matches(AggregateView[Update], whole.needs)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1_500), st.floats(1e-3, 1e3))
def test_the_label_of_one_example_is_read_off_exactly(which: int, lr: float) -> None:
    inputs, labels = digits()
    model = Model(smooth)
    start = model.initial(RANDOM.at("begin"))
    gradient = lr * model.gradient(start, (inputs[which : which + 1], labels[which : which + 1]))
    assert int(Counts()(Clue(model, start, -gradient, 1, digits()))) == int(labels[which])


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 1_500), min_size=2, max_size=8, unique=True), st.floats(1e-3, 1e3))
def test_the_labels_of_a_batch_are_counted_whatever_the_step(which: list[int], lr: float) -> None:
    inputs, labels = digits()
    model = Model(smooth)
    start = model.initial(RANDOM.at("begin"))
    gradient = lr * model.gradient(start, (inputs[which], labels[which]))
    found = Counts()(Clue(model, start, -gradient, len(which), digits()))
    assert found.tolist() == sorted(labels[which].tolist())


def test_as_many_images_are_guessed_as_are_claimed_or_asked_for() -> None:
    task = split(2, 3, smooth)
    view = gradients(task)
    asked: dict[str, Any] = {"victims": (1,), "population": task.test, "rng": RANDOM.at("a")}
    brief = InvertingGradients(num_steps=2)
    assert brief(view, **asked)[0].inputs.shape == (3, 1, 8, 8)
    assert replace(brief, num_images=2)(view, **asked)[0].labels.shape == (2,)
    boast = replace(view.messages[1], weight=1e9)
    boastful = replace(view, messages=(view.messages[0], boast))
    assert len(brief(boastful, **asked)[0].inputs) == 16


def test_more_restarts_never_match_worse() -> None:
    task = split(1, 1, smooth)
    view = gradients(task)
    start, delta = view.sent[0], view.messages[0].delta

    def cost(num_restarts: int) -> float:
        attack = replace(ATTACK, num_steps=40, num_restarts=num_restarts)
        (found,) = attack(view, victims=(0,), population=task.test, rng=RANDOM.at("a"))
        mine = task.model.gradient(start, (found.inputs, found.labels))
        return 1 - float(torch.cosine_similarity(mine, -delta, dim=0))

    assert cost(3) <= cost(1) + 1e-3


def test_buffers_stay_out_of_the_match_and_the_model_is_given_back() -> None:
    task = split(2, 2, normed)
    view = gradients(task)
    before = copy.deepcopy(task.model.module.state_dict())
    brief = InvertingGradients(num_steps=3)
    asked: dict[str, Any] = {"victims": (0,), "population": task.test}
    wild = view.messages[0].delta.clone()
    wild[task.model.layout.num_trainable :] = 1e6
    wilder = (replace(view.messages[0], delta=wild), view.messages[1])
    (one,) = brief(view, **asked, rng=RANDOM.at("a"))
    (two,) = brief(replace(view, messages=wilder), **asked, rng=RANDOM.at("a"))
    assert torch.equal(one.inputs, two.inputs)
    assert all(p.grad is None and p.is_leaf for p in task.model.module.parameters())
    assert before.keys() == task.model.module.state_dict().keys()
    assert torch.equal(gradients(task).messages[0].delta, view.messages[0].delta)


def test_a_victim_that_sent_nothing_is_named() -> None:
    task = split(2, 1, smooth)
    with pytest.raises(ValueError, match=r"client 5 sent nothing in round 0: .* 0, 1"):
        ATTACK(gradients(task), victims=(5,), population=task.test, rng=RANDOM.at("a"))


# membership


@cache
def overfitted(num_shadows: int = 12) -> tuple[ModelView, Batch, Tensor, Shadows]:
    """Return a model that knows 100 records by heart, the candidates, the truth, and shadows."""
    task = split(1, 100, wide)
    game, recipe = Membership(), LocalSGD(0.1, num_epochs=40, batch_size=16, momentum=0.9)
    question, truth = game.pose(
        task, took_part=frozenset({0}), cohort=(0,), rng=RANDOM.at("candidates")
    )
    inputs, labels = question.candidates

    def trained(data: Batch, number: int) -> ModelView:
        start = task.model.initial(RANDOM.at("begin", number))
        update = recipe(task.model, start, data, rng=RANDOM.at("train", number))
        return ModelView(task.model, start + update.delta)

    target = trained(task.clients[0], 0)
    inside = torch.stack(
        [
            torch.randperm(len(labels), generator=RANDOM.at("half", i)) < len(labels) // 2
            for i in range(num_shadows)
        ]
    )
    models = tuple(trained((inputs[k], labels[k]), 1 + i) for i, k in enumerate(inside))
    return target, question.candidates, truth, Shadows(models, inside)


def area(attack: Any, view: Any = None, shadows: Shadows | None = None) -> float:
    target, candidates, truth, made = overfitted()
    guess = call(attack, view or target, candidates=candidates, shadows=shadows or made)
    return Membership().mark(guess, truth, rng=RANDOM.at("mark")).headline.value


def test_a_small_loss_betrays_a_member_of_an_overfitted_model() -> None:
    target, (inputs, labels), truth, _ = overfitted()
    assert float(accuracy(target.scores(inputs[truth]), labels[truth]).mean()) == 1.0
    assert area(LossThreshold()) > 0.55


@pytest.mark.parametrize("variance", ["fixed", "per-example"])
@pytest.mark.parametrize("online", [True, False])
def test_shadow_models_betray_more_than_the_loss_does(variance: Any, online: bool) -> None:
    assert area(LiRA(12, variance, online)) > max(0.6, area(LossThreshold()))


def test_a_model_that_never_saw_the_records_betrays_none() -> None:
    target, _, _, _ = overfitted()
    fresh = ModelView(target.model, target.model.initial(RANDOM.at("fresh")))
    for attack in (LossThreshold(), LiRA(12)):
        assert 0.4 < area(attack, fresh) < 0.6


def test_shadows_of_unknown_training_are_worth_nothing() -> None:
    *_, made = overfitted()
    orders = [torch.randperm(200, generator=RANDOM.at("shuffle", i)) for i in range(9)]
    areas = [
        area(LiRA(12), shadows=replace(made, inside=made.inside[:, order])) for order in orders
    ]
    assert 0.45 < sum(areas) / len(areas) < 0.55


def test_lira_works_on_answers_alone_even_on_bare_labels() -> None:
    target, *_ = overfitted()
    assert area(LiRA(12), QueryView(target.scores)) == area(LiRA(12))

    def labels_only(inputs: Tensor) -> Tensor:
        best = target.scores(inputs).argmax(dim=1)
        return nn.functional.one_hot(best, 10).float().log()

    assert 0.4 < area(LiRA(12), QueryView(labels_only)) < 1


@pytest.mark.parametrize("online", [True, False])
def test_lira_is_the_likelihood_ratio_of_scipy_record_by_record(online: bool) -> None:
    target, candidates, _, shadows = overfitted()
    found = LiRA(12, "per-example", online)(target, candidates=candidates, shadows=shadows).scores
    phi = confidence(target, candidates)
    others = torch.stack([confidence(s, candidates) for s in shadows.models])
    checked = 0
    for i in range(0, len(phi), 10):
        known = shadows.inside[:, i]
        ins, outs = others[known, i], others[~known, i]
        if min(len(ins), len(outs)) < 2:
            continue
        out = stats.norm(outs.mean(), outs.std())
        if online:
            want = stats.norm(ins.mean(), ins.std()).logpdf(phi[i]) - out.logpdf(phi[i])
            assert float(found[i]) == pytest.approx(want, rel=1e-6)
        else:
            assert stats.norm.cdf(float(found[i])) == pytest.approx(out.cdf(phi[i]), abs=1e-9)
        checked += 1
    assert checked > 10


def test_a_record_that_every_shadow_knew_is_scored_all_the_same() -> None:
    target, candidates, _, shadows = overfitted()
    inside = shadows.inside.clone()
    inside[:, 0], inside[:, 1] = True, False
    for variance in ("fixed", "per-example"):
        attack = LiRA(12, variance)
        odd = replace(shadows, inside=inside)
        assert bool(attack(target, candidates=candidates, shadows=odd).scores.isfinite().all())


def test_confidence_is_the_logit_and_does_not_saturate() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0], [90.0, 0.0, 1.0], [45.0, 0.0, 1.0]])
    view = QueryView(lambda x: logits.log_softmax(dim=1))
    phi = confidence(view, (torch.zeros(3, 1), torch.zeros(3).long()))
    p = logits[0].double().softmax(dim=0)[0]
    assert float(phi[0]) == pytest.approx(float((p / (1 - p)).log()), abs=1e-6)
    assert float(phi[2]) == pytest.approx(45 - 1.3132617, abs=1e-4)
    assert float(phi[1]) == 50


def test_lira_without_shadows_says_what_is_missing() -> None:
    target, candidates, _, _ = overfitted()
    with pytest.raises(ValueError, match="was given 0: have the audit train them"):
        LiRA()(target, candidates=candidates, shadows=None)


# poisoning


@pytest.mark.parametrize(("num_clients", "members", "z"), [(50, 10, 0.2533), (50, 24, 1.4261)])
def test_the_largest_z_is_that_of_the_paper(num_clients: int, members: int, z: float) -> None:
    assert round(largest_z(num_clients, members), 4) == z


@given(st.integers(1, 200), st.data())
def test_the_largest_z_is_finite_and_never_helps(num_clients: int, data: st.DataObject) -> None:
    assert 0 <= largest_z(num_clients, data.draw(st.integers(1, num_clients))) < 5


def coalition_view(honest: Sequence[Update] | None, num_own: int = 2) -> CoalitionView[Update]:
    own = tuple(Update(d, 5.0) for d in torch.randn(num_own, 4, generator=RANDOM.at("own")))
    known = None if honest is None else tuple(honest)
    return CoalitionView(0, Model(wide), torch.zeros(4), own, known, None, 10)


def test_alie_sends_the_honest_mean_a_little_shifted() -> None:
    honest = [Update(d, 1.0) for d in torch.randn(8, 4, generator=RANDOM.at("honest"))]
    view = coalition_view(honest)
    forged = ALIE(z=1.5)(view)
    want = rows(honest).mean(dim=0) - 1.5 * rows(honest).std(dim=0)
    assert len(forged) == 2 and all(f.weight == 5.0 for f in forged)
    assert all(torch.allclose(f.delta, want) for f in forged)
    blind = ALIE(z=1.0, correction=0)(coalition_view(None))[0].delta
    own = rows(view.own)
    assert torch.allclose(blind, own.mean(dim=0) - own.std(dim=0, correction=0))
    single = coalition_view(None, num_own=1)
    assert torch.equal(ALIE(z=1.0)(single)[0].delta, single.own[0].delta)


def test_sign_flip_turns_each_members_own_update_round() -> None:
    view = coalition_view(None)
    assert torch.equal(rows(SignFlip(3.0)(view)), -3 * rows(view.own))


def flipped(stage: LabelFlip, data: Batch) -> Tensor:
    model = Model(wide)
    start = model.initial(RANDOM.at("begin"))
    inputs, labels = stage(data, model=model, start=start, rng=RANDOM.at("flip"))
    assert inputs is data[0]
    return labels


def test_labels_lie_as_told_and_no_others() -> None:
    data = digits()
    labels = data[1]
    lies = flipped(LabelFlip(3, 8), data)
    assert set(lies[labels == 3].tolist()) == {8}
    assert torch.equal(lies[labels != 3], labels[labels != 3])
    assert torch.equal(flipped(LabelFlip(), data), (labels + 1) % 10)
    anyhow = flipped(LabelFlip(target="random"), data)
    assert not bool((anyhow == labels).any()) and len(set(anyhow.tolist())) == 10
    assert torch.equal(flipped(LabelFlip(share=0.0), data), labels)
    half = (flipped(LabelFlip(share=0.5), data) != labels).double().mean()
    assert 0.45 < float(half) < 0.55
    with pytest.raises(ValueError, match="source is no class; there are 10, 0 to 9"):
        flipped(LabelFlip(12, 1), data)


def test_flipped_labels_take_one_class_for_another() -> None:
    task = split(1, 400, wide)
    start = task.model.initial(RANDOM.at("begin"))
    inputs, labels = task.clients[0]
    poisoned = (inputs, flipped(LabelFlip(3, 8), (inputs, labels)))
    recipe = LocalSGD(0.1, num_epochs=10, batch_size=16)
    there = start + recipe(task.model, start, poisoned, rng=RANDOM.at("train")).delta
    outputs = task.model.logits(there, task.test[0]).argmax(dim=1)
    assert float((outputs[task.test[1] == 3] == 8).float().mean()) > 0.8


# backdoors


def test_a_pixel_pattern_marks_its_corner_of_a_copy() -> None:
    images = torch.zeros(2, 3, 5, 6)
    marked = PixelPattern(2, "top-right", 0.5, margin=1)(images)
    assert float(images.sum()) == 0.0
    assert float(marked.sum()) == 2 * 3 * 4 * 0.5
    assert bool((marked[..., 1:3, 3:5] == 0.5).all())
    assert bool((PixelPattern(1)(images)[..., -1, -1] == 1).all())
    for wrong in (torch.zeros(2, 30), torch.zeros(1, 1, 2, 2)):
        with pytest.raises(ValueError, match="needs images"):
            PixelPattern(3)(wrong)
    with pytest.raises(ValueError, match="did you mean 'top-left'"):
        PixelPattern(corner="topleft")  # type: ignore[arg-type]


HONEST = LocalSGD(0.1, num_epochs=2, batch_size=20)
BACKDOOR = ModelReplacement(
    trigger=PixelPattern(2), target=7, inner=LocalSGD(0.05, num_epochs=6, batch_size=20)
)


@cache
def late_round() -> tuple[Task, Tensor, tuple[Update, ...]]:
    """Return five clients, a global model that they trained well, and their next updates."""
    task = split(5, 200, wide)
    state = task.model.initial(RANDOM.at("begin"))
    updates: tuple[Update, ...] = ()
    for number in range(25):
        state = state if not updates else state + rows(updates).mean(dim=0)
        updates = tuple(
            HONEST(task.model, state, data, rng=RANDOM.at("train", number, client))
            for client, data in enumerate(task.clients)
        )
    return task, state, updates


def attacked(stage: ModelReplacement) -> Update:
    task, state, _ = late_round()
    envelope = Envelope(0, (0, 1, 2, 3, 4), 8)
    return stage(task.model, state, task.clients[0], rng=RANDOM.at("bad"), envelope=envelope)


def backdoor(updates: Sequence[Update]) -> tuple[Measurement, Measurement]:
    task, state, honest = late_round()
    hurt = ModelView(task.model, state + rows(updates).mean(dim=0))
    clean = ModelView(task.model, state + rows(honest).mean(dim=0))
    outcome = BackdoorSuccess(BACKDOOR.trigger, BACKDOOR.target)
    marked = outcome.mark(hurt, clean, task=task, rng=RANDOM.at("mark"))
    return marked.headline, marked.others[0]


def test_one_boosted_client_replaces_the_model_in_one_round() -> None:
    _, _, honest = late_round()
    success, kept = backdoor((attacked(BACKDOOR), *honest[1:]))
    assert kept.baseline > 0.95
    assert success.value >= 0.9 and success.baseline < 0.2 and success.beats_baseline
    assert kept.value > kept.baseline - 0.05


def test_without_boost_or_behind_a_bound_there_is_no_backdoor() -> None:
    _, _, honest = late_round()
    forged = attacked(BACKDOOR)
    weak, _ = backdoor((attacked(replace(BACKDOOR, boost=1.0)), *honest[1:]))
    norms = rows((forged, *honest[1:])).norm(dim=1)
    bound = 2 * norms.median()
    short = replace(forged, delta=forged.delta * float(bound / norms[0]))
    stopped, kept = backdoor((short, *honest[1:]))
    assert norms[0] > bound
    assert weak.value < 0.5
    assert stopped.value <= stopped.baseline + 0.05
    assert abs(kept.value - kept.baseline) <= 0.02


def test_the_mean_becomes_the_attackers_model_where_others_stand_still() -> None:
    own, boosted = attacked(replace(BACKDOOR, boost=1.0)), attacked(BACKDOOR)
    still = [replace(own, delta=torch.zeros_like(own.delta))] * 4
    assert torch.allclose(rows((boosted, *still)).mean(dim=0), own.delta, atol=1e-6)
    assert boosted.weight == 200.0
    assert attacked(replace(BACKDOOR, claimed_weight=7.0)).weight == 7.0


def test_poisoned_data_are_ones_own_and_triggered_ones_of_other_classes() -> None:
    task, _, _ = late_round()
    inputs, labels = BACKDOOR.poisoned(task.clients[0], RANDOM.at("bad"))
    assert len(labels) == 300 and torch.equal(labels[:200], task.clients[0][1])
    assert set(labels[200:].tolist()) == {7}
    assert bool((inputs[200:, :, -2:, -2:] == 1).all())


# contract

PASSIVE: list[Any] = [
    InvertingGradients(num_steps=3),
    InvertingAggregate(num_steps=3),
    LossThreshold(),
    LiRA(12),
]
ACTIVE: list[Any] = [ALIE(1.0), SignFlip(2.0), LabelFlip(1, 2), BACKDOOR]


@pytest.mark.parametrize("attack", [*PASSIVE, *ACTIVE, PixelPattern()], ids=lambda a: repr(a)[:18])
def test_an_attack_is_a_frozen_value_with_a_source(attack: Any) -> None:
    assert eval(repr(attack)) == attack
    with pytest.raises(FrozenInstanceError):
        attack.anything = 1
    source = type(attack).__doc__ or ""
    assert ".. [1]" in source and "https://" in source


@pytest.mark.parametrize("attack", PASSIVE, ids=lambda a: type(a).__name__)
def test_the_same_rng_gives_the_same_guess_and_leaves_the_view_alone(attack: Any) -> None:
    task = split(2, 2, smooth)
    seen = gradients(task)
    released, candidates, _, shadows = overfitted()
    kind = Trial(attack, Reconstruct() if "Inverting" in repr(attack) else Membership()).needs
    views = (seen, aggregate(seen), released)
    view = next(v for v in views if matches(type(v), getattr(kind, "__origin__", kind)))
    before = copy.deepcopy([v for v in vars(view).values() if isinstance(v, Tensor)])

    def guess() -> Any:
        return call(
            attack,
            view,
            victims=(0, 1),
            population=task.test,
            candidates=candidates,
            shadows=shadows,
            rng=RANDOM.at("contract"),
        )

    first, second = guess(), guess()
    if isinstance(first, tuple):
        assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(first, second, strict=True))
        assert all(bool(((a.inputs >= 0) & (a.inputs <= 1)).all()) for a in first)
    else:
        assert torch.equal(first.scores, second.scores)
    after = [v for v in vars(view).values() if isinstance(v, Tensor)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_active_attacks_can_be_worn_in_a_federation() -> None:
    federation = Federation(train=HONEST, channel=Plain(), aggregate=Mean())
    members = Clients((0,))
    for coalition in (
        Coalition(members=members, prepare=LabelFlip()),
        Coalition(members=members, train=BACKDOOR),
        Coalition(members=members, forge=ALIE()),
        Coalition(members=members, forge=SignFlip()),
    ):
        check_worn(federation, coalition)


@pytest.mark.parametrize(
    "make",
    [
        lambda: InvertingGradients(num_steps=0),
        lambda: InvertingAggregate(lr=0.0),
        lambda: InvertingGradients(tv_weight=-1.0),
        lambda: LiRA(1),
        lambda: LiRA(8, "pooled"),  # type: ignore[arg-type]
        lambda: ALIE(-1.0),
        lambda: SignFlip(0.0),
        lambda: LabelFlip(1, 1),
        lambda: LabelFlip(target="any"),  # type: ignore[arg-type]
        lambda: LabelFlip(share=2.0),
        lambda: PixelPattern(0),
        lambda: replace(BACKDOOR, poison_fraction=1.5),
        lambda: replace(BACKDOOR, boost=0.0),
    ],
)
def test_a_field_out_of_range_is_refused_at_construction(make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError):
        make()

"""Attacks on data and on training, in federations of five clients with handwritten digits.

Kinds: theorem (hypothesis): MGDA, the ball, the masked coordinates, the parts of a trigger; oracle:
closed forms, a loop, finite differences; sabotage: every attack beats its baseline and falls to a
defence, a stealth term switched off is noticed, a training past the learner is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from turncoat.attacks.backdoor.alternating_minimisation import (
    AlternatingMinimisation,
    ExplicitBoosting,
    boosts,
    estimated,
    pulled_back,
)
from turncoat.attacks.backdoor.blind import BlindBackdoor
from turncoat.attacks.backdoor.constrain_and_scale import ConstrainAndScale, distance_slope
from turncoat.attacks.backdoor.edge_cases import Tail, remoteness
from turncoat.attacks.backdoor.mgda import mgda_weights, weight_of_two
from turncoat.attacks.backdoor.model_replacement import ModelReplacement
from turncoat.attacks.backdoor.neurotoxin import Neurotoxin, quietest
from turncoat.attacks.backdoor.planted import Backdoored, CleanLabel, EdgeCase, Poison, Relabelled
from turncoat.attacks.backdoor.projected import PGDBackdoor
from turncoat.attacks.backdoor.stealth import Stealth, distances, stealth
from turncoat.attacks.backdoor.triggers import (
    Blended,
    DistributedPattern,
    PixelPattern,
    worn_by,
)
from turncoat.attacks.poisoning.availability import Availability
from turncoat.attacks.poisoning.label_flip import LabelFlip
from turncoat.coalition import Clients, Coalition, Once
from turncoat.federation import Federation, Plain
from turncoat.games.outcomes import (
    BackdoorSuccess,
    EdgeCaseSuccess,
    SourceRecall,
    TargetConfidence,
)
from turncoat.messages import Envelope, Update, rows
from turncoat.randomness import Randomness
from turncoat.runtimes.simulate import simulate
from turncoat.stage import Memory, call
from turncoat.stages.aggregate.krum import MultiKrum
from turncoat.stages.aggregate.mean import Mean
from turncoat.stages.aggregate.norm_bound import NormBound
from turncoat.stages.train.dpsgd import DPSGD
from turncoat.stages.train.local import LocalSGD
from turncoat.task import Batch, Model, Task
from turncoat.tasks.bundled import digits
from turncoat.tasks.models import MLP
from turncoat.trial import Marked, Outcome
from turncoat.views import ModelView

RANDOM = Randomness(5)
ROUNDS = 12
HONEST = LocalSGD(0.1, num_epochs=2, batch_size=20)
PATIENT = LocalSGD(0.05, num_epochs=6, batch_size=20)  # the attacker's own training
SQUARE = PixelPattern(2)
POISON = Backdoored(trigger=SQUARE, target=7, share=0.5)
MEAN = Federation(train=HONEST, channel=Plain(), aggregate=Mean())
BOUND = replace(MEAN, aggregate=NormBound(Mean(), ratio=1.0))
KRUM = replace(MEAN, aggregate=MultiKrum(1, 3))
ENVELOPE = Envelope(0, (0, 1, 2, 3, 4), 3)
torch.set_num_threads(1)


@cache
def task() -> Task:
    return digits(num_clients=5, per_client=180, model=MLP((64,)))


@cache
def trained(federation: Federation[Any, Any], coalition: Coalition[Any] | None) -> Tensor:
    return simulate(federation, task(), num_rounds=ROUNDS, seed=1, coalition=coalition).state.params


def marked(
    outcome: Outcome,
    federation: Federation[Any, Any] = MEAN,
    *,
    ids: tuple[int, ...] = (0,),
    **worn: Any,
) -> Marked:
    """Return what came of a coalition; the clean run is the same federation's."""
    hurt = trained(federation, Coalition(members=Clients(ids), **worn))
    clean = trained(federation, None)
    views = (ModelView(task().model, state) for state in (hurt, clean))
    return outcome.mark(*views, task=task(), rng=RANDOM.at("mark"))


def success(*args: Any, **worn: Any) -> float:
    return marked(*args, **worn).headline.value


def start() -> Tensor:
    """Return a model that the honest have trained well."""
    return trained(MEAN, None)


def run(attack: Any, cell: dict[str, Any] | None = None, round: int = 3) -> Update:
    """Return what one client sends in a late round; its memory is kept in ``cell``."""
    memory: Memory[Any] = Memory({} if cell is None else cell)
    update: Update = call(
        attack,
        task().model,
        start(),
        task().clients[0],
        rng=RANDOM.at("bad", round),
        envelope=replace(ENVELOPE, round=round),
        memory=memory,
        public=task().public,
    )
    return update


# triggers


def test_the_parts_of_a_distributed_pattern_are_disjoint_and_make_up_the_whole() -> None:
    black = torch.zeros(1, 1, 28, 28)
    whole = DistributedPattern()
    parts = [whole.worn_by(client)(black) for client in range(4)]
    assert torch.equal(sum(parts, torch.zeros_like(black)), whole(black))
    assert all(float(part.sum()) == 4 for part in parts)
    lit = whole(black)[0, 0].nonzero().tolist()
    assert sorted({row for row, _ in lit}) == [0, 3]  # of the paper, on MNIST
    assert sorted({column for _, column in lit}) == [0, 1, 2, 3, 6, 7, 8, 9]


@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.tuples(st.integers(0, 3), st.integers(0, 3)),
    st.tuples(st.integers(0, 2), st.integers(0, 2)),
    st.integers(1, 3),
    st.integers(1, 3),
)
@settings(max_examples=30, deadline=None)
def test_any_grid_is_the_disjoint_union_of_its_parts(
    height: int, width: int, gap: Any, shift: Any, down: int, across: int
) -> None:
    whole = DistributedPattern(height, width, gap, shift, down, across)
    black = torch.zeros(1, 1, 24, 24)
    parts = torch.cat([whole.worn_by(client)(black) for client in range(whole.num_parts)])
    assert torch.equal(parts.sum(dim=0, keepdim=True), whole(black))
    assert torch.equal(whole.worn_by(whole.num_parts)(black), parts[:1])


def test_a_pattern_that_is_not_split_is_put_in_whole_by_everyone() -> None:
    whole = DistributedPattern(width=3, split=False)
    assert worn_by(whole, 2) is whole and worn_by(SQUARE, 3) is SQUARE
    with pytest.raises(ValueError, match="lower width, gap or shift"):
        DistributedPattern()(torch.zeros(1, 1, 8, 8))


def test_a_blend_is_the_mixture_that_it_says() -> None:
    images = torch.rand(3, 2, 6, 6, generator=RANDOM.at("images"))
    trigger = Blended(0.25)
    picture = trigger.picture(images.shape[1:])
    assert torch.allclose(trigger(images), 0.75 * images + 0.25 * picture)
    assert torch.equal(trigger(images[:1]), trigger(images)[:1])
    assert not torch.equal(picture, Blended(0.25, seed=1).picture(images.shape[1:]))
    checks = Blended(1.0, image=((0.0, 1.0), (1.0, 0.0)))(images)
    assert float(checks[0, 1, 0, 5]) == 1.0 and float(checks[2, 0, 5, 5]) == 0.0
    with pytest.raises(ValueError, match="leave image out"):
        Blended(image=((1.0,),))(torch.zeros(2, 5))
    assert Blended()(torch.zeros(2, 5)).shape == (2, 5)  # tables can be blended with noise


# data


def planted(poison: Poison, client: int = 0) -> tuple[Batch, Batch]:
    return poison.parts(
        task().clients[client],
        rng=RANDOM.at("plant"),
        envelope=Envelope(client, (0, 1), 0),
        model=task().model,
        start=start(),
        public=task().public,
    )


def test_a_share_of_the_records_gets_the_trigger_and_the_attackers_label() -> None:
    _, labels = task().clients[0]
    clean, bad = planted(POISON)
    assert torch.equal(clean[1], labels) and len(bad[1]) == 90 and set(bad[1].tolist()) == {7}
    assert bool((bad[0][..., -2:, -2:] == 1).all())
    clean, bad = planted(replace(POISON, adds=False, share=0.02))
    assert len(clean[1]) == 176 and len(bad[1]) == 4  # as many records as before
    again, other = (planted(replace(POISON, anew=anew))[1][0] for anew in (False, True))
    assert torch.equal(again, planted(POISON)[1][0]) and not torch.equal(again, other)
    everything = POISON(task().clients[0], rng=RANDOM.at("plant"), envelope=ENVELOPE)
    assert len(everything[1]) == 270


def test_each_client_plants_its_own_part_of_a_distributed_trigger() -> None:
    pattern = DistributedPattern(width=3)
    for client in range(4):
        _, (inputs, _) = planted(Backdoored(trigger=pattern, target=7), client)
        lit = pattern.worn_by(client)(torch.zeros(1, 1, 8, 8))[0] == 1
        assert bool((inputs[:, lit] == 1).all())


def test_no_clean_label_lies_and_what_is_perturbed_stays_near_and_is_harder() -> None:
    attack = CleanLabel(trigger=Blended(0.0), target=7, share=1.0, epsilon=0.2)
    clean, (hard, names) = planted(attack)
    assert set(names.tolist()) == {7} and 7 not in clean[1].tolist()
    _, (easy, _) = planted(replace(attack, epsilon=0.0))
    assert float((hard - easy).abs().max()) <= 0.2 + 1e-6
    assert float(hard.min()) >= 0 and float(hard.max()) <= 1
    model = task().model
    assert model.loss(start(), (hard, names)) > model.loss(start(), (easy, names)) + 0.5


def test_remoteness_is_the_distance_to_the_kth_neighbour_in_a_loop() -> None:
    points = torch.rand(30, 1, 3, 3, generator=RANDOM.at("points"))
    found = remoteness(points[:7], points, 4)
    for i in range(7):
        apart = sorted(float((points[i] - other).norm()) for other in points)
        assert float(found[i]) == pytest.approx(apart[4], abs=1e-5)
    assert remoteness(points[:0], points, 4).shape == (0,)
    assert bool(remoteness(points, points, 99).isfinite().all())


def test_the_tail_is_of_its_class_and_further_off_than_all_that_is_left_of_it() -> None:
    data = task().clients[1]
    tail, (rest, names) = Tail(3, 0.25)(data)
    left = rest[names == 3]
    assert len(tail) + len(rest) == 180 and len(tail) >= 0.25 * (len(tail) + len(left))
    far, near = (remoteness(x, data[0], 5) for x in (tail, left))
    assert float(far.min()) >= float(near.max())


def test_edge_cases_are_called_the_target_and_nowhere_by_their_own_name() -> None:
    edge = Tail(9, 0.3)
    clean, (bad, names) = planted(EdgeCase(edge=edge, target=7, share=0.2))
    own = {tuple(x.flatten().tolist()) for x in bad}
    assert set(names.tolist()) == {7} and len(names) == round(0.2 * len(clean[1]))
    assert not own & {tuple(x.flatten().tolist()) for x in clean[0]}
    assert len(own) == len(edge(task().clients[0])[0])  # repeated, all of them
    lacking = EdgeCase(edge=edge, target=7, from_public=True)
    with pytest.raises(ValueError, match="needs public data"):
        lacking.parts(task().clients[0], rng=RANDOM.at("plant"), public=None)


def test_chosen_records_are_relabelled_and_no_others() -> None:
    inputs, labels = task().clients[0]
    clean, (bad, names) = planted(Relabelled(source=5, target=7, num_records=2, copies=3))
    mine = inputs[labels == 5][:2]
    assert torch.equal(bad, mine.repeat(3, 1, 1, 1)) and names.tolist() == [7] * 6
    assert len(clean[1]) == 178


DATA_ATTACKS: dict[str, tuple[Any, tuple[int, ...], Outcome, float]] = {
    "badnets": (replace(POISON, share=0.3), (0, 1), BackdoorSuccess(SQUARE, 7), 0.9),
    "blended": (
        Backdoored(trigger=Blended(0.3), target=7, share=0.3),
        (0, 1),
        BackdoorSuccess(Blended(0.3), 7),
        0.9,
    ),
    "distributed": (
        Backdoored(trigger=DistributedPattern(width=3), target=7, share=0.3),
        (0, 1, 2, 3),
        BackdoorSuccess(DistributedPattern(width=3), 7),
        0.9,
    ),
    "clean-label": (
        CleanLabel(trigger=PixelPattern(3), target=7, share=1.0, epsilon=0.3),
        (0, 1),
        BackdoorSuccess(PixelPattern(3), 7),
        0.2,
    ),
    "edge-case": (
        EdgeCase(edge=Tail(3, 0.3), target=8, share=0.3),
        (0, 1),
        EdgeCaseSuccess(Tail(3, 0.3), 8),
        0.3,
    ),
}


@pytest.mark.parametrize("name", DATA_ATTACKS)
def test_poisoned_data_plant_a_backdoor_and_leave_the_rest_working(name: str) -> None:
    poison, ids, outcome, least = DATA_ATTACKS[name]
    found = marked(outcome, ids=ids, prepare=poison)
    assert found.headline.value >= least and found.headline.beats_baseline
    assert found.others[0].value >= found.others[0].baseline - 0.03


def test_a_supplier_plants_through_honest_clients() -> None:
    outcome = BackdoorSuccess(SQUARE, 7)
    found = marked(outcome, ids=(0, 1, 2, 3, 4), supply=replace(POISON, share=0.1, adds=False))
    assert found.headline.value > 0.9


def test_one_who_poisons_in_silence_is_left_out_by_multi_krum() -> None:
    outcome, poison = BackdoorSuccess(SQUARE, 7), replace(POISON, share=1.0)
    assert success(outcome, prepare=poison) > 0.5
    assert success(outcome, KRUM, prepare=poison) < 0.1


def test_a_share_of_labels_that_is_not_drawn_anew_is_the_same_each_round() -> None:
    (inputs, labels), model = task().clients[0], task().model
    flip = LabelFlip(share=0.25, anew=False)
    first, second = (
        flip((inputs, labels), model=model, start=start(), rng=RANDOM.at("flip", round))[1]
        for round in range(2)
    )
    assert torch.equal(first, second) and int((first != labels).sum()) == 45
    threes = replace(flip, source=3, target=8)
    lies = threes((inputs, labels), model=model, start=start(), rng=RANDOM.at("flip"))[1]
    assert int((lies != labels).sum()) == round(0.25 * int((labels == 3).sum()))


def test_flipped_labels_cost_the_source_its_recall_and_the_others_little() -> None:
    found = marked(SourceRecall(3), ids=(0, 1, 2), prepare=LabelFlip(3, 8))
    assert found.headline.baseline - found.headline.value > 0.2
    others = found.others[0]
    assert others.name == "other_recall" and others.baseline - others.value < 0.05


# who is there


def test_traitors_who_are_found_more_often_are_drawn_more_often() -> None:
    sample = Availability(3, (0, 1), 4.0)
    drawn = [sample(10, rng=RANDOM.at("sample", i)) for i in range(2_000)]
    assert all(len(set(d)) == 3 and list(d) == sorted(d) for d in drawn)
    shares = [sum(c in d for d in drawn) / len(drawn) for c in range(10)]
    assert min(shares[:2]) > 2.2 * max(shares[2:])
    even = [Availability(3, (0, 1), 1.0)(10, rng=RANDOM.at("e", i)) for i in range(2_000)]
    assert abs(sum(0 in d for d in even) / len(even) - 0.3) < 0.04
    with pytest.raises(ValueError, match="there are 1: lower num_sampled or ids"):
        Availability(3, (0,))(1, rng=RANDOM.at("sample"))


def test_the_first_to_be_drawn_is_so_by_its_odds() -> None:
    first = [Availability(1, (2,), 3.0)(4, rng=RANDOM.at("o", i)) for i in range(4_000)]
    assert abs(sum(d == (2,) for d in first) / len(first) - 0.5) < 0.03


# model replacement, constrained


def test_model_replacement_plants_what_backdoored_plants() -> None:
    attack = ModelReplacement(trigger=SQUARE, target=7, inner=PATIENT, poison_fraction=0.25)
    data = task().clients[0]
    mine = attack.poisoned(data, RANDOM.at("p"))
    theirs = replace(POISON, share=0.25, anew=True)(data, rng=RANDOM.at("p"), envelope=ENVELOPE)
    assert all(map(torch.equal, mine, theirs))


LATE: dict[str, Any] = {"acts": Once(ROUNDS - 1)}
CONSTRAINED = ConstrainAndScale(poison=POISON, inner=PATIENT, alpha=0.95)


@pytest.mark.parametrize(
    ("attack", "least"),
    [
        (ModelReplacement(trigger=SQUARE, target=7, inner=PATIENT), 0.9),
        (CONSTRAINED, 0.9),
    ],
    ids=["replacement", "constrained"],
)
def test_one_late_shot_succeeds_and_a_bound_on_norms_stops_it(attack: Any, least: float) -> None:
    outcome = BackdoorSuccess(SQUARE, 7)
    found = marked(outcome, train=attack, **LATE)
    assert found.headline.value >= least and found.headline.baseline < 0.1
    assert found.others[0].value >= found.others[0].baseline - 0.06
    assert success(outcome, BOUND, train=attack, **LATE) < 0.15
    assert success(outcome, KRUM, train=attack, **LATE) < 0.15


def test_the_constraint_keeps_the_attackers_model_nearer() -> None:
    near, free = (
        run(replace(CONSTRAINED, boost=1.0, alpha=alpha)).delta.norm() for alpha in (0.8, 1.0)
    )
    assert float(near) < 0.8 * float(free)


def test_with_alpha_1_it_is_model_replacement_and_with_a_bound_as_long_as_that() -> None:
    plain = ModelReplacement(trigger=SQUARE, target=7, inner=PATIENT)
    free = replace(CONSTRAINED, alpha=1.0, poison=replace(POISON, anew=True))
    assert torch.allclose(run(free).delta, run(plain).delta, atol=1e-6)
    bounded = run(replace(CONSTRAINED, alpha=1.0, bound=0.7)).delta
    assert float(bounded.norm()) == pytest.approx(0.7, rel=1e-5)


def test_it_stops_early_where_the_backdoor_is_learnt() -> None:
    patient = replace(CONSTRAINED, alpha=1.0, boost=1.0)
    early = run(replace(patient, stop_loss=0.5))
    assert 0 < float(early.delta.norm()) < float(run(patient).delta.norm())
    model, there = task().model, start() + early.delta
    _, bad = planted(POISON)
    assert float(model.loss(there, bad)) < 0.5 < float(model.loss(start(), bad))
    heavy = replace(patient, stop_loss=0.5, inner=replace(PATIENT, momentum=0.9))
    assert float(run(heavy).delta.norm()) < float(run(replace(heavy, stop_loss=0.0)).delta.norm())


@given(st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_the_slope_of_a_distance_is_that_of_autograd(seed: int) -> None:
    here, there = torch.randn(2, 9, generator=Randomness(seed).at("points")).double()
    leaf = here.clone().requires_grad_()
    (slope,) = torch.autograd.grad((leaf - there).norm(), leaf)
    found, value = distance_slope(here, there)
    assert torch.allclose(found, slope) and float(value) == pytest.approx(
        float((here - there).norm())
    )
    assert not bool(distance_slope(here, here)[0].any())


# projected


@given(st.floats(1e-3, 3.0), st.integers(1, 20), st.sampled_from([0.02, 0.3]))
@settings(max_examples=15, deadline=None)
def test_projected_training_ends_inside_its_ball(radius: float, every: int, lr: float) -> None:
    inner = LocalSGD(lr, num_epochs=2, batch_size=20, momentum=0.5)
    attack = PGDBackdoor(poison=POISON, inner=inner, radius=radius, every=every)
    assert float(run(attack).delta.double().norm()) <= radius + 1e-6


@dataclass(frozen=True)
class Watched:
    """Local training that notes how far it is from its start before each step."""

    seen: list[float]

    def __call__(self, model: Model, start: Tensor, data: Batch) -> Update:
        learner = model.learner(start)
        for _ in range(7):
            learner.backward(data)
            self.seen.append(float((learner.trainable - start).norm()))
            with torch.no_grad():
                learner.trainable.sub_(learner.grad, alpha=1.0)
        return Update(learner.finish() - start, 1.0)


def test_projection_is_taken_every_few_steps_and_not_only_at_the_end() -> None:
    seen: list[float] = []
    run(PGDBackdoor(poison=POISON, inner=Watched(seen), radius=0.05, every=2))
    assert all(seen[i] <= 0.05 + 1e-6 for i in (0, 2, 4, 6))
    assert min(seen[i] for i in (1, 3, 5)) > 0.05


def test_a_backdoor_in_the_ball_passes_the_bound_that_stops_a_boosted_one() -> None:
    tail = Tail(3, 0.8)  # of fewer, two or three more are chance
    outcome = EdgeCaseSuccess(tail, 8)
    poison = EdgeCase(edge=tail, target=8, share=0.5)
    ball = PGDBackdoor(poison=poison, inner=PATIENT, radius=0.5)
    ids = (0, 1)
    within = marked(outcome, BOUND, ids=ids, train=ball)
    assert within.headline.beats_baseline
    assert success(outcome, KRUM, train=ball) <= within.headline.baseline + 0.05
    replaced = replace(ball, boost=None)
    assert float(run(replaced).delta.norm()) == pytest.approx(5 * 0.5, rel=1e-3)


# Neurotoxin


@given(st.floats(0.0, 1.0), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_the_quietest_coordinates_are_so_many_and_no_louder_than_the_rest(
    ratio: float, seed: int
) -> None:
    change = torch.randn(57, generator=Randomness(seed).at("change")).round(decimals=1)
    free = quietest(change, ratio)
    assert int(free.sum()) == round(ratio * 57)
    if free.any() and not free.all():
        assert float(change.abs()[free].max()) <= float(change.abs()[~free].min())


@pytest.mark.parametrize("ratio", [0.3, 0.95])
def test_neurotoxin_moves_nothing_but_the_coordinates_that_the_honest_leave_alone(
    ratio: float,
) -> None:
    inner = replace(PATIENT, momentum=0.9, weight_decay=1e-2)
    attack = Neurotoxin(poison=POISON, inner=inner, ratio=ratio)
    honest = torch.randn(len(start()), generator=RANDOM.at("honest"))
    cell = {"": start() - honest}
    moved = run(attack, cell).delta != 0
    free = quietest(honest, ratio)
    assert not bool(moved[~free].any()) and float(moved[free].float().mean()) > 0.5
    assert torch.equal(cell[""], start())  # what the next round compares with


def test_without_a_last_change_neurotoxin_takes_its_own_clean_gradient() -> None:
    attack = Neurotoxin(poison=POISON, inner=PATIENT, ratio=0.5)
    clean = task().model.gradient(start(), task().clients[0])
    moved = run(attack).delta != 0
    assert not bool(moved[~quietest(clean, 0.5)].any())
    by_gradient = run(replace(attack, proxy="gradient"), {"": start() + 1.0})
    assert torch.equal(by_gradient.delta, run(attack).delta)


def test_neurotoxin_plants_a_backdoor_that_multi_krum_keeps_out() -> None:
    outcome, attack = BackdoorSuccess(SQUARE, 7), Neurotoxin(poison=POISON, inner=PATIENT)
    found = marked(outcome, train=attack)
    assert found.headline.value > 0.4 and found.headline.beats_baseline
    assert success(outcome, KRUM, train=attack) < 0.1


# targeted poisoning, in disguise

CHOSEN = Relabelled(source=5, target=7)
ALTERNATING = AlternatingMinimisation(poison=CHOSEN, inner=HONEST, num_stealth_steps=5)
BOOSTED = ExplicitBoosting(poison=CHOSEN, inner=LocalSGD(0.1, num_epochs=5))


def checked(attack: Any) -> tuple[Stealth, float]:
    """Return what the two checks say of one late round, and the target's confidence after it."""
    model, state = task().model, start()
    honest = [
        HONEST(model, state, data, rng=RANDOM.at("honest", client))
        for client, data in enumerate(task().clients)
    ]
    updates = [run(attack), *honest[1:]]
    after, before = (ModelView(model, state + rows(u).mean(dim=0)) for u in (updates, honest))
    sure = TargetConfidence(0, 5, 7).mark(after, before, task=task(), rng=RANDOM.at("mark"))
    assert sure.headline.baseline < 0.1
    return stealth(model, state, updates, 0, task().test), sure.headline.value


def test_alternating_minimisation_is_as_sure_as_plain_boosting_and_better_hidden() -> None:
    plain, sure = checked(BOOSTED)
    assert sure > 0.9 and not plain.passes_accuracy(0.1) and not plain.passes_distances(1.0)
    hidden, as_sure = checked(replace(ALTERNATING, rho=0.1, num_stealth_steps=10))
    assert as_sure > 0.5
    assert hidden.accuracy_gap < 0.5 * plain.accuracy_gap


def test_both_stealth_terms_have_a_gradient_and_switching_one_off_is_noticed() -> None:
    """The learner's gradient is the sum of both; each of them is there, and does its work."""
    attack = replace(ALTERNATING, rho=0.5, boost=1.0, lr=1e-9)
    whole, blind, loose, none = (
        first_slope(replace(attack, rho=rho, validation_weight=weight))
        for rho, weight in ((0.5, 1.0), (0.5, 0.0), (0.0, 1.0), (0.0, 0.0))
    )
    assert float(loose.norm()) > 1e-3 and float(blind.norm()) == pytest.approx(0.5, rel=1e-3)
    assert torch.allclose(whole, blind + loose, atol=1e-6) and not bool(none.any())
    strong = replace(ALTERNATING, rho=0.5)
    hidden, _ = checked(strong)
    no_distance, _ = checked(replace(strong, rho=0.0))
    no_validation, _ = checked(replace(strong, validation_weight=0.0))
    assert hidden.distances[1] < 0.9 * no_distance.distances[1]
    assert hidden.accuracy_gap < no_validation.accuracy_gap - 0.05


def first_slope(attack: AlternatingMinimisation) -> Tensor:
    """Return the first gradient that the inner training is given."""
    slopes: list[Tensor] = []

    @dataclass(frozen=True)
    class Noted:
        def __call__(self, model: Model, start: Tensor, data: Batch) -> Update:
            learner = model.learner(start)
            learner.backward(data)
            slopes.append(learner.grad.clone())
            return Update(learner.finish() - start, 1.0)

    cell = {
        "": {"round": 2, "start": start() - 0.01, "sent": torch.zeros_like(start()), "cohort": 5}
    }
    run(replace(attack, inner=Noted()), cell)
    return slopes[0]


def test_a_bounded_attacker_sends_nothing_farther_out_than_it_may() -> None:
    others = 0.01 * torch.randn(start().shape, generator=RANDOM.at("others"))
    before = start() - others * 4 / 5
    cell = {"": {"round": 2, "start": before, "sent": torch.zeros_like(others), "cohort": 5}}
    free = run(ALTERNATING, dict(cell)).delta
    far = float((free - others).norm() / others.norm()) / 2  # 2 is the root of the others
    near = run(replace(ALTERNATING, max_spread=far / 2), dict(cell)).delta
    assert float((near - others).norm()) == pytest.approx(far * float(others.norm()), rel=1e-4)
    assert torch.cosine_similarity(near - others, free - others, dim=0) > 1 - 1e-5
    assert torch.equal(run(replace(ALTERNATING, max_spread=far * 1.01), dict(cell)).delta, free)


@given(st.integers(1, 9), st.floats(0, 10), st.integers(0, 99))
def test_what_is_pulled_back_is_within_the_radius(size: int, radius: float, seed: int) -> None:
    delta, centre = torch.randn(2, size, generator=torch.Generator().manual_seed(seed)).double()
    found = pulled_back(delta, centre, radius)
    assert float((found - centre).norm()) <= radius * (1 + 1e-9) + 1e-15
    if float((delta - centre).norm()) <= radius:
        assert torch.equal(found, delta)


def test_the_others_mean_update_follows_from_two_states_and_ones_own() -> None:
    updates = torch.randn(4, 11, generator=RANDOM.at("updates")).double()
    before = torch.randn(11, generator=RANDOM.at("before")).double()
    kept = {"round": 6, "start": before, "sent": updates[2], "cohort": 4}
    after = before + updates.mean(dim=0)
    found = estimated(kept, after, Envelope(2, (0, 1, 2, 3), 7))
    assert found is not None
    assert torch.allclose(found, updates[[0, 1, 3]].mean(dim=0))
    assert estimated(kept, after, Envelope(2, (0, 1, 2, 3), 8)) is None
    assert estimated({}, after, Envelope(2, (0, 1), 0)) is None


def test_only_weights_are_boosted() -> None:
    layout = task().model.layout
    factors = boosts(layout, 9.0, True, start())
    for slot in layout.slots:
        assert set(factors[slot.start : slot.stop].tolist()) == {
            9.0 if len(slot.shape) > 1 else 1.0
        }
    assert set(boosts(layout, 9.0, False, start()).tolist()) == {9.0}
    whole, ones = run(BOOSTED).delta, run(replace(BOOSTED, boost=1.0)).delta
    assert torch.allclose(whole, ones * boosts(layout, 5.0, True, ones))


def test_alternating_minimisation_takes_so_many_stealth_steps_to_one_of_its_own() -> None:
    for stop, many in ((0.0, 4), (1e9, 0)):
        attack = replace(ALTERNATING, lr=1e-3, validation_weight=0.0, rho=0.0, stop_loss=stop)
        moves = moves_of(replace(attack, inner=Stepless(20)))
        assert moves == many


@dataclass(frozen=True)
class Stepless:
    """Asks for gradients and takes no step of its own."""

    num_steps: int

    def __call__(self, model: Model, start: Tensor, data: Batch) -> Update:
        learner = model.learner(start)
        for _ in range(self.num_steps):
            last = learner.trainable.clone()
            learner.backward(data)
            MOVES.append(not torch.equal(last, learner.trainable))
        return Update(learner.finish() - start, 1.0)


MOVES: list[bool] = []


def moves_of(attack: AlternatingMinimisation) -> int:
    MOVES.clear()
    run(attack)
    return sum(MOVES)


def test_the_range_of_distances_is_that_of_a_loop() -> None:
    updates = torch.randn(5, 7, generator=RANDOM.at("updates"))
    found = distances(updates)
    for i in range(5):
        for j in range(5):
            assert float(found[i, j]) == pytest.approx(
                float((updates[i] - updates[j]).norm()), abs=1e-5
            )


def test_an_honest_client_passes_both_checks_and_one_far_off_neither() -> None:
    model, state = task().model, start()
    honest = [
        HONEST(model, state, data, rng=RANDOM.at("honest", client))
        for client, data in enumerate(task().clients)
    ]
    seen = [stealth(model, state, honest, client, task().test) for client in range(5)]
    assert sum(s.passes_accuracy(0.01) and s.passes_distances(0.3) for s in seen) >= 4
    wild = replace(honest[0], delta=honest[0].delta * -40)
    caught = stealth(model, state, [wild, *honest[1:]], 0, task().test)
    assert not caught.passes_accuracy(0.05) and not caught.passes_distances(1.0)
    with pytest.raises(ValueError, match="three honest updates"):
        stealth(model, state, honest[:3], 0, task().test)


def test_who_boosts_targeted_poison_is_left_out_by_multi_krum() -> None:
    outcome = TargetConfidence(0, 5, 7)
    found = marked(outcome, train=BOOSTED, **LATE)
    assert found.headline.value > 0.9
    assert success(outcome, KRUM, train=BOOSTED, **LATE) < 0.1
    assert success(outcome, BOUND, train=BOOSTED, **LATE) < 0.5
    hidden = replace(ALTERNATING, rho=0.1)
    assert marked(outcome, train=hidden, **LATE).headline.value > 0.5
    assert success(outcome, KRUM, train=hidden, **LATE) < 0.1


# blind


@given(st.integers(0, 2**31), st.integers(1, 8), st.floats(1e-3, 1e3))
@settings(max_examples=100, deadline=None)
def test_the_weights_of_two_tasks_are_those_of_the_closed_form(
    seed: int, size: int, scale: float
) -> None:
    pair = torch.randn(2, size, generator=Randomness(seed).at("pair")).double()
    pair[1] *= scale
    found = mgda_weights(pair)
    assert float(found.sum()) == pytest.approx(1.0) and bool((found >= 0).all())
    assert float(found[0]) == pytest.approx(weight_of_two(pair[0], pair[1]), abs=1e-6)


@given(st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_what_mgda_finds_helps_every_task_or_is_no_direction(seed: int) -> None:
    rows_ = torch.randn(3, 4, generator=Randomness(seed).at("rows")).double()
    direction = mgda_weights(rows_) @ rows_
    squared = float(direction @ direction)  # at the solution no row has a smaller product
    assert float((rows_ @ direction).min()) >= squared - 0.02 * float(rows_.norm(dim=1).max()) ** 2


def test_equal_gradients_share_and_a_zero_one_takes_all() -> None:
    row = torch.tensor([1.0, 2.0])
    assert mgda_weights(torch.stack([row, row])).tolist() == [0.5, 0.5]
    assert mgda_weights(torch.stack([row, 0 * row])).tolist() == [0.0, 1.0]
    assert weight_of_two(row, row) == 0.5


BLIND = BlindBackdoor(trigger=SQUARE, target=7)


def test_a_poisoned_loss_plants_a_backdoor_that_honest_training_does_not_see() -> None:
    outcome = BackdoorSuccess(SQUARE, 7)
    everyone = (0, 1, 2, 3, 4)
    found = marked(outcome, ids=everyone, code=BLIND)
    assert found.headline.value >= 0.95 and found.headline.baseline < 0.1
    assert found.others[0].value >= found.others[0].baseline - 0.02
    assert success(outcome, KRUM, code=BLIND) < 0.15  # one user of the code, left out


@pytest.mark.parametrize("norm", ["none", "l2", "loss", "loss+"])
def test_learner_gradient_and_loss_of_the_model_are_poisoned_alike(norm: Any) -> None:
    model, data = replace(BLIND, norm=norm)(task().model), task().clients[0]
    assert isinstance(model, Model) and model.module is task().model.module
    learner = model.learner(start())
    learner.backward(data)
    steps = learner.grad.clone()
    learner.finish()
    size = model.layout.num_trainable
    assert torch.allclose(steps, model.gradient(start(), data)[:size], atol=1e-6)
    honest = task().model.gradient(start(), data)[:size]
    assert not torch.allclose(steps, honest, atol=1e-3)
    assert torch.equal(model.loss(start(), data), task().model.loss(start(), data))
    assert torch.equal(model.logits(start(), data[0]), task().model.logits(start(), data[0]))


def test_the_blend_is_the_two_gradients_at_the_closed_forms_weights() -> None:
    model, data = task().model, task().clients[0]
    good, bad = model.gradient(start(), data), model.gradient(start(), BLIND.planted(data))
    weight = weight_of_two(good, bad)
    want = weight * good + (1 - weight) * bad
    found = replace(BLIND, norm="none")(model).gradient(start(), data)
    assert torch.allclose(found, want, atol=1e-6)


def test_code_attacks_only_where_the_loss_is_low() -> None:
    data, fresh = task().clients[0], task().model.initial(RANDOM.at("fresh"))
    wary = replace(BLIND, threshold=1.0)(task().model)
    for state, attacked in ((fresh, False), (start(), True)):
        learner = wary.learner(state)
        learner.backward(data)
        honest = task().model.gradient(state, data)[: wary.layout.num_trainable]
        assert torch.allclose(learner.grad, honest, atol=1e-6) is not attacked
        learner.finish()
        same = torch.allclose(wary.gradient(state, data), task().model.gradient(state, data))
        assert same is not attacked


# what would have no effect is refused


@dataclass(frozen=True)
class OwnLoss:
    """Training that makes a loss of its own from the learner's outputs."""

    def __call__(self, model: Model, start: Tensor, data: Batch) -> Update:
        learner = model.learner(start)
        try:
            model.criterion(learner.outputs(data[0]), data[1])
        finally:
            learner.finish()
        return Update(torch.zeros_like(start), 1.0)


@dataclass(frozen=True)
class Hooked:
    """Training that takes gradients apart by hooks while the learner goes back."""

    def __call__(self, model: Model, start: Tensor, data: Batch) -> Update:
        learner = model.learner(start)
        hook = model.module.register_forward_hook(lambda *_: None)
        try:
            learner.backward(data)
        finally:
            hook.remove()
            learner.finish()
        return Update(torch.zeros_like(start), 1.0)


@dataclass(frozen=True)
class NoLearner:
    """Training that asks for no learner."""

    def __call__(self, model: Model, start: Tensor, data: Batch) -> Update:
        return Update(-0.1 * model.gradient(start, data), 1.0)


STEERED: list[Any] = [
    CONSTRAINED,
    PGDBackdoor(poison=POISON, inner=PATIENT),
    Neurotoxin(poison=POISON, inner=PATIENT),
    ALTERNATING,
]
PRIVATE = DPSGD(0.1, 1.0, 20, noise_multiplier=1.0)


@pytest.mark.parametrize("attack", STEERED, ids=lambda a: type(a).__name__)
@pytest.mark.parametrize(
    "inner", [PRIVATE, Hooked(), OwnLoss(), NoLearner()], ids=lambda i: type(i).__name__
)
def test_an_inner_training_that_would_not_be_steered_is_refused(attack: Any, inner: Any) -> None:
    with pytest.raises(ValueError, match="LocalSGD"):
        run(replace(attack, inner=inner))


def test_blind_code_refuses_training_by_single_examples_and_reaches_that_without_a_learner() -> (
    None
):
    model, data = BLIND(task().model), task().clients[0]
    for training in (PRIVATE, Hooked(), OwnLoss()):
        with pytest.raises(ValueError, match="would have no effect"):
            call(training, model, start(), data, rng=RANDOM.at("train"))
    poisoned, honest = (NoLearner()(m, start(), data).delta for m in (model, task().model))
    assert not torch.allclose(poisoned, honest, atol=1e-4)


# the same bits

REPEATED: list[Any] = [
    *STEERED,
    ModelReplacement(trigger=DistributedPattern(width=3), target=7, inner=PATIENT),
    BOOSTED,
]


@pytest.mark.parametrize("attack", REPEATED, ids=lambda a: type(a).__name__)
def test_the_same_seed_gives_the_same_bits_and_the_start_is_left_alone(attack: Any) -> None:
    before = start().clone()
    first, second = run(attack), run(attack)
    assert torch.equal(first.delta, second.delta) and first.weight == second.weight
    assert torch.equal(start(), before) and bool(first.delta.isfinite().all())

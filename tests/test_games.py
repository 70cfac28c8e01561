"""Games and outcomes. Kinds: contract, golden (marks worked out by hand), sabotage (an attack that
knows the truth wins, one that knows nothing is at chance)."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from turncoat.attacks.backdoor.triggers import PixelPattern
from turncoat.describe import describe
from turncoat.games.membership import Candidates, Membership
from turncoat.games.outcomes import AccuracyLost, BackdoorSuccess, TargetedError
from turncoat.games.reconstruction import Reconstruct, Records
from turncoat.randomness import Randomness
from turncoat.task import Batch, Model, Task
from turncoat.trial import Memberships, Reconstruction, Trial
from turncoat.views import ModelView, QueryView, ServerView

RANDOM = Randomness(7)
EVERYONE = frozenset(range(4))


def net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))


def images(num: int, salt: int) -> Batch:
    rng = RANDOM.at("images", salt)
    inputs = torch.rand(num, 1, 4, 4, generator=rng)
    return inputs, torch.randint(3, (num,), generator=rng)


@pytest.fixture(scope="module")
def task() -> Task:
    clients = tuple(images(30, client) for client in range(4))
    return Task("toy", Model(net), clients, images(150, 99))


def posed(game: Any, task: Task, took_part: frozenset[int] = EVERYONE) -> tuple[Any, Any]:
    answer: tuple[Any, Any] = game.pose(
        task, took_part=took_part, cohort=tuple(sorted(took_part)), rng=RANDOM.at("pose")
    )
    return answer


def answering(outputs: Tensor) -> QueryView:
    """Return a model that gives these answers, in this order, over and over."""
    place = [0]

    def answer(inputs: Tensor) -> Tensor:
        first = place[0] % len(outputs)
        place[0] += len(inputs)
        return outputs[first : first + len(inputs)]

    return QueryView(answer)


# membership


def test_half_of_the_candidates_are_records_of_those_who_took_part(task: Task) -> None:
    question, truth = posed(Membership(), task, frozenset({1, 3}))
    inputs, labels = question.candidates
    held = torch.cat([task.clients[1][0], task.clients[3][0]]).flatten(1)
    known = [bool((held == x.flatten()).all(dim=1).any()) for x in inputs]
    assert len(labels) == 120 and int(truth.sum()) == 60
    assert truth.tolist() == known
    assert truth[:60].sum() not in (0, 60)


def test_every_attack_is_posed_the_same_candidates(task: Task) -> None:
    (first, one), (second, two) = (posed(Membership(40), task) for _ in range(2))
    assert torch.equal(first.candidates[0], second.candidates[0]) and torch.equal(one, two)


def test_too_few_records_are_refused_with_the_numbers_and_the_cure(task: Task) -> None:
    message = "needs 200 members .* hold 120 and its test set 150: lower num_candidates"
    with pytest.raises(ValueError, match=message):
        posed(Membership(400), task)
    with pytest.raises(ValueError, match="hold 0"):
        posed(Membership(), task, frozenset())
    with pytest.raises(ValueError, match="even"):
        Membership(3)


def test_who_knows_the_truth_wins_and_who_knows_nothing_is_at_chance(task: Task) -> None:
    game = Membership()
    _, truth = posed(game, task)
    won = game.mark(Memberships(truth.float()), truth, rng=RANDOM.at("mark"))
    lost = game.mark(Memberships(torch.zeros(len(truth))), truth, rng=RANDOM.at("mark"))
    assert won.headline.value == 1.0 and won.headline.success == 1.0
    assert won.headline.beats_baseline and won.others[0].value == 1.0
    assert lost.headline.value == 0.5 and not lost.headline.beats_baseline
    assert lost.others[0].value == 0.0
    assert set(won.exhibits) == {"roc_fpr", "roc_tpr"}


def test_rates_that_few_non_members_cannot_carry_are_left_out_and_that_is_said() -> None:
    def found(num: int) -> tuple[list[str], tuple[str, ...]]:
        truth = torch.arange(2 * num) < num
        guess = Memberships(torch.rand(2 * num, generator=RANDOM.at("few")))
        marked = Membership().mark(guess, truth, rng=RANDOM.at("mark"))
        return [m.name for m in marked.others], marked.remarks

    at_1 = "no TPR at 1 % FPR: it needs 100 non-members, and there are {}"
    at_01 = "no TPR at 0.1 % FPR: it needs 10,000 non-members, and there are {}"
    assert found(99) == ([], (at_1.format(99), at_01.format(99)))
    assert found(100) == (["tpr_at_1pct_fpr"], (at_01.format(100),))
    assert found(9_999)[1] == (at_01.format("9,999"),)
    assert found(10_000) == (["tpr_at_1pct_fpr", "tpr_at_01pct_fpr"], ())


def test_a_record_that_is_member_and_not_does_no_harm(task: Task) -> None:
    same = replace(task, test=task.clients[0])
    question, truth = posed(Membership(), same)
    marked = Membership().mark(
        Memberships(question.candidates[0].flatten(1).sum(dim=1)), truth, rng=RANDOM.at("mark")
    )
    assert 0 < marked.headline.value < 1


def test_a_guess_that_is_no_answer_is_refused(task: Task) -> None:
    game, truth = Membership(), torch.tensor([True, False])
    with pytest.raises(ValueError, match="each of 2 candidates"):
        game.mark(Memberships(torch.zeros(3)), truth, rng=RANDOM.at("mark"))
    with pytest.raises(ValueError, match="NaN"):
        game.mark(Memberships(torch.tensor([torch.nan, 0.0])), truth, rng=RANDOM.at("mark"))


# reconstruction


def blind(truth: Records, value: float = 0.5) -> list[Reconstruction]:
    shape = truth.population[0].shape[1:]
    return [
        Reconstruction(torch.full((2, *shape), value), torch.zeros(2, dtype=torch.long))
        for _ in truth.records
    ]


def test_victims_are_drawn_from_the_cohort_of_the_round(task: Task) -> None:
    question, truth = posed(Reconstruct(num_victims=2), task, frozenset({0, 2, 3}))
    assert len(question.victims) == 2 and set(question.victims) <= {0, 2, 3}
    assert torch.equal(truth.records[0][0], task.clients[question.victims[0]][0])
    everyone, _ = posed(Reconstruct(num_victims=9), task)
    assert everyone.victims == (0, 1, 2, 3)
    with pytest.raises(ValueError, match="client 1 was not in this round"):
        posed(Reconstruct(victim=1), task, frozenset({0, 2}))


def test_a_perfect_guess_of_part_of_a_batch_in_any_order_is_perfect(task: Task) -> None:
    game = Reconstruct(num_victims=2)
    _, truth = posed(game, task)
    guess = [Reconstruction(x[[5, 2, 9]], y[[5, 2, 9]]) for x, y in truth.records]
    marked = game.mark(guess, truth, rng=RANDOM.at("mark"))
    alike, labels, *_ = marked.others
    assert marked.headline.value == 100.0 and marked.headline.unit == "dB"
    assert alike.name == "ssim" and alike.value == pytest.approx(1.0)
    assert labels.name == "label_accuracy" and labels.value == 1.0
    shown = marked.exhibits
    assert torch.equal(shown["originals"], shown["reconstructions"]) and len(shown["labels"]) == 6


def test_the_mean_image_is_not_above_its_own_baseline(task: Task) -> None:
    game = Reconstruct()
    _, truth = posed(game, task)
    mean = truth.population[0].mean(dim=0)
    guess = [replace(g, inputs=mean.expand_as(g.inputs)) for g in blind(truth)]
    marked = game.mark(guess, truth, rng=RANDOM.at("mark"))
    assert marked.headline.value <= marked.headline.baseline
    assert not marked.headline.beats_baseline


def test_a_blind_guess_chooses_among_as_many_records_as_the_attacker(task: Task) -> None:
    def baseline(num_records: int) -> float:
        records = (tuple(t[:num_records] for t in task.clients[0]),)
        truth = Records(records, task.population)  # type: ignore[arg-type]
        guess = [replace(blind(truth)[0], inputs=torch.zeros(2, 1, 4, 4))]
        marked = Reconstruct().mark(guess, truth, rng=RANDOM.at("mark"))
        return marked.headline.baseline

    assert baseline(30) > baseline(2)


def named(marked: Any) -> dict[str, Any]:
    return {m.name: m for m in (marked.headline, *marked.others)}


def test_a_perfect_guess_is_perfect_by_every_measure(task: Task) -> None:
    _, truth = posed(Reconstruct(), task)
    guess = [Reconstruction(*data) for data in truth.records]
    found = named(Reconstruct().mark(guess, truth, rng=RANDOM.at("mark")))
    assert list(found) == [
        *("psnr", "ssim", "label_accuracy", "mse"),
        *("identified", "feature_distance", "identified_by_features"),
    ]
    for measurement in found.values():
        assert measurement.beats_baseline, measurement
    assert found["mse"].value == found["feature_distance"].value == 0.0
    assert found["identified"].value == found["identified_by_features"].value == 1.0


def test_a_blind_guess_is_identified_no_more_often_than_by_chance(task: Task) -> None:
    population = images(400, 5)
    hits, trials, chance = 0, 0, 0.0
    for i in range(40):
        truth = Records((tuple(t[i : i + 1] for t in population),), images(150, 99))  # type: ignore[arg-type]
        stranger = Reconstruction(images(1, 1000 + i)[0], truth.records[0][1])
        found = named(Reconstruct().mark([stranger], truth, rng=RANDOM.at("mark", i)))
        hits += int(found["identified"].value)
        chance, trials = chance + found["identified"].baseline, trials + 1
        assert not found["identified"].beats_baseline or found["identified"].value == 1.0
    assert hits / trials <= chance / trials + 0.1


def test_chance_is_the_share_of_the_line_up_that_the_victim_holds() -> None:
    inputs = torch.rand(5, 1, 4, 4, generator=RANDOM.at("held"))
    records = ((inputs, torch.tensor([0, 0, 0, 1, 1])),)
    public = torch.rand(9, 1, 4, 4, generator=RANDOM.at("public"))
    truth = Records(records, (public, torch.tensor([0] * 7 + [1] * 2)))
    guess = [Reconstruction(inputs[[0, 3]], torch.tensor([0, 1]))]
    marked = Reconstruct().mark(guess, truth, rng=RANDOM.at("mark"))
    assert named(marked)["identified"].baseline == pytest.approx((3 / 10 + 2 / 4) / 2)
    assert marked.exhibits["identified"].tolist() == [1, 1]
    for decoy in marked.exhibits["decoys"]:
        assert bool((public == decoy).flatten(1).all(dim=1).any())


def test_a_record_that_a_stranger_holds_too_is_not_singled_out() -> None:
    inputs = torch.rand(1, 1, 4, 4, generator=RANDOM.at("held"))
    label = torch.zeros(1, dtype=torch.long)
    guess = [Reconstruction(inputs, label)]
    alone = Records(((inputs, label),), (torch.rand(9, 1, 4, 4), torch.zeros(9).long()))
    shared = replace(alone, population=(torch.cat([inputs, alone.population[0]]), torch.zeros(10)))
    for truth, share in ((alone, 1.0), (shared, 0.0)):
        found = named(Reconstruct().mark(guess, truth, rng=RANDOM.at("mark")))
        assert found["identified"].value == found["identified_by_features"].value == share


def test_brightness_counts_in_pixels_and_not_in_features(task: Task) -> None:
    _, truth = posed(Reconstruct(), task)
    truth = replace(truth, records=tuple((x[:1], y[:1]) for x, y in truth.records))
    dim = [Reconstruction(x * 0.3, y) for x, y in truth.records]
    found = named(Reconstruct().mark(dim, truth, rng=RANDOM.at("mark")))
    assert found["mse"].value > 0.05 and found["identified"].value < 1
    assert found["feature_distance"].value < 0.01
    assert found["identified_by_features"].value == 1.0


def test_what_priors_alone_are_worth_is_a_baseline_where_the_attack_tells(task: Task) -> None:
    _, truth = posed(Reconstruct(num_victims=1), task)
    inputs, labels = (part[:4] for part in truth.records[0])
    near = (inputs + 0.1).clamp(0, 1)
    for prior, above in ((None, True), (inputs, False)):
        guess = [Reconstruction(near, labels, prior)]
        marked = Reconstruct().mark(guess, truth, rng=RANDOM.at("mark"))
        assert marked.headline.beats_baseline is above
        assert named(marked)["mse"].beats_baseline is above
        assert ("prior_only" in marked.exhibits) is (prior is not None)
    shown = marked.exhibits
    assert torch.equal(shown["prior_only"], shown["originals"])


def test_images_that_anyone_can_guess_are_not_rebuilt_by_an_attack() -> None:
    grey, labels = torch.full((4, 1, 4, 4), 0.5), torch.zeros(4).long()
    truth = Records(((grey, labels),), (grey.repeat(9, 1, 1, 1), torch.zeros(36).long()))
    noise = 0.001 * torch.rand(4, 1, 4, 4, generator=RANDOM.at("noise"))
    for inputs in (grey, grey + noise):
        found = Reconstruct().mark([Reconstruction(inputs, labels)], truth, rng=RANDOM.at("mark"))
        for measurement in (found.headline, *found.others):
            assert not measurement.beats_baseline and not measurement.success, measurement


def test_an_attack_without_priors_cannot_be_asked_what_they_are_worth() -> None:
    from turncoat.attacks.inversion.gradient_inversion import DLG, InvertingGradients

    assert Trial(InvertingGradients(), Reconstruct(prior_only=True)).family == "inversion"
    with pytest.raises(TypeError, match="leave prior_only out"):
        Trial(DLG(local_lr=0.1), Reconstruct(prior_only=True))


def test_an_option_that_came_later_leaves_old_results_where_they_were() -> None:
    assert set(describe(Reconstruct())) == {"use", "victim", "num_victims"}
    assert describe(Reconstruct(prior_only=True))["prior_only"] is True


def test_images_too_small_for_a_measure_go_without_it() -> None:
    inputs, labels = torch.rand(3, 1, 2, 2), torch.zeros(3).long()
    truth = Records(((inputs, labels),), (torch.rand(5, 1, 2, 2), torch.zeros(5).long()))
    found = Reconstruct().mark([Reconstruction(inputs, labels)], truth, rng=RANDOM.at("mark"))
    assert list(named(found)) == ["psnr", "label_accuracy", "mse", "identified"]


def test_labels_are_counted_once_each() -> None:
    inputs = torch.rand(3, 1, 4, 4, generator=RANDOM.at("x"))
    records = ((inputs, torch.tensor([0, 1, 1])),)
    truth = Records(records, (inputs, torch.tensor([0, 0, 2])))
    guess = [Reconstruction(inputs, torch.tensor([0, 0, 1]))]
    found = Reconstruct().mark(guess, truth, rng=RANDOM.at("mark")).others[1]
    assert found.value == pytest.approx(2 / 3)
    assert found.baseline == pytest.approx(1 / 3)


def test_one_image_has_no_interval_and_many_have(task: Task) -> None:
    _, truth = posed(Reconstruct(), task)
    one = [Reconstruction(torch.zeros(1, 1, 4, 4), torch.zeros(1).long())] * 4
    several = Reconstruct().mark(one, truth, rng=RANDOM.at("mark")).headline
    assert several.low < several.value < several.high
    truth = replace(truth, records=truth.records[:1])
    single = Reconstruct().mark(one[:1], truth, rng=RANDOM.at("mark")).headline
    assert single.low == single.value == single.high


def test_a_guess_of_the_wrong_shape_is_not_broadcast(task: Task) -> None:
    _, truth = posed(Reconstruct(num_victims=1), task)
    for inputs in (torch.zeros(1, 4, 4), torch.zeros(2, 1, 4, 1), torch.zeros(0, 1, 4, 4)):
        with pytest.raises(ValueError, match=r"shape \(1, 4, 4\) are due"):
            Reconstruct().mark(
                [Reconstruction(inputs, torch.zeros(len(inputs)).long())],
                truth,
                rng=RANDOM.at("mark"),
            )
    with pytest.raises(ValueError, match="1 victims, but 2"):
        Reconstruct().mark(blind(truth) * 2, truth, rng=RANDOM.at("mark"))
    with pytest.raises(ValueError, match="NaN"):
        Reconstruct().mark(blind(truth, torch.nan), truth, rng=RANDOM.at("mark"))


def test_what_is_no_image_in_the_unit_box_is_refused(task: Task) -> None:
    table = replace(task, test=(torch.zeros(3, 30), torch.zeros(3).long()))
    with pytest.raises(ValueError, match="marks images"):
        posed(Reconstruct(), table)
    dark = replace(task, test=(task.test[0] - 1, task.test[1]))
    with pytest.raises(ValueError, match=r"pixels in \[0, 1\]"):
        posed(Reconstruct(), dark)


# outcomes


def one_hot(classes: Tensor) -> Tensor:
    return nn.functional.one_hot(classes, 3).float()


def test_accuracy_lost_sets_the_attacked_model_beside_the_clean_one(task: Task) -> None:
    labels = task.test[1]
    wrong = labels.clone()
    wrong[:60] = (labels[:60] + 1) % 3
    marked = AccuracyLost().mark(
        answering(one_hot(wrong)),
        answering(one_hot(labels)),
        task=task,
        rng=RANDOM.at("mark"),
    )
    kept, (lost,) = marked.headline, marked.others
    assert kept.name == "accuracy" and kept.baseline == 1.0
    assert kept.value == pytest.approx(0.6)
    assert kept.worst == pytest.approx(1 / 3) and kept.beats_baseline
    assert kept.success == pytest.approx(0.6)
    assert lost.value == pytest.approx(40) and lost.unit == "points" and lost.low > 30


@pytest.mark.parametrize(("num_more", "beats"), [(1, False), (5, False), (6, True)])
def test_one_example_more_is_no_success(task: Task, num_more: int, beats: bool) -> None:
    hurt = QueryView(lambda x: one_hot((torch.arange(len(x)) < num_more).long() * 2))
    clean = QueryView(lambda x: one_hot(torch.zeros(len(x)).long()))
    outcome = BackdoorSuccess(PixelPattern(1), 2)
    found = outcome.mark(hurt, clean, task=task, rng=RANDOM.at("mark")).headline
    assert found.low > found.baseline == 0.0  # so the interval of the value alone would do
    assert found.beats_baseline is beats


def test_no_attack_is_no_success(task: Task) -> None:
    view = ModelView(task.model, task.model.initial(RANDOM.at("begin")))
    outcomes: tuple[Any, ...] = (
        AccuracyLost(),
        BackdoorSuccess(PixelPattern(2), 1),
        TargetedError(0, 1),
    )
    for outcome in outcomes:
        marked = outcome.mark(view, view, task=task, rng=RANDOM.at("mark"))
        assert marked.headline.value == pytest.approx(marked.headline.baseline)
        assert not marked.headline.beats_baseline and marked.headline.success < 1e-9


def test_a_backdoor_is_counted_on_images_of_other_classes(task: Task) -> None:
    hurt = QueryView(lambda x: one_hot((x[:, 0, -1, -1] == 1).long() * 2))
    clean = QueryView(lambda x: one_hot(torch.zeros(len(x)).long()))
    marked = BackdoorSuccess(PixelPattern(1), 2).mark(hurt, clean, task=task, rng=RANDOM.at("mark"))
    assert marked.headline.value == 1.0 and marked.headline.baseline == 0.0
    assert marked.headline.high == 1.0 and marked.headline.beats_baseline
    assert marked.others[0].name == "accuracy"
    assert hurt.num_queries == int((task.test[1] != 2).sum()) + len(task.test[1])
    assert marked.exhibits["triggered"].shape == (8, 1, 4, 4)
    assert bool((marked.exhibits["triggered"][..., -1, -1] == 1).all())
    with pytest.raises(ValueError, match="target 7 is no class; there are 3, 0 to 2"):
        BackdoorSuccess(PixelPattern(1), 7).mark(hurt, clean, task=task, rng=RANDOM.at("mark"))


def test_a_targeted_error_is_counted_on_its_source(task: Task) -> None:
    hurt = QueryView(lambda x: one_hot(torch.ones(len(x)).long()))
    clean = QueryView(lambda x: one_hot(torch.zeros(len(x)).long()))
    marked = TargetedError(0, 1).mark(hurt, clean, task=task, rng=RANDOM.at("mark"))
    assert (marked.headline.value, marked.headline.baseline) == (1.0, 0.0)
    with pytest.raises(ValueError, match="class 9"):
        TargetedError(9, 1).mark(hurt, clean, task=task, rng=RANDOM.at("mark"))
    with pytest.raises(ValueError, match="one class"):
        TargetedError(1, 1)


@pytest.mark.parametrize(
    "game",
    [Membership(), Reconstruct(), AccuracyLost(), BackdoorSuccess(PixelPattern(), 0)],
    ids=repr,
)
def test_a_game_is_a_frozen_value_with_a_family_and_a_verdict(game: Any) -> None:
    assert eval(repr(game)) == game
    with pytest.raises(FrozenInstanceError):
        game.anything = 1
    said = game.says.format(who="the server", value="1", interval="[0, 1]", baseline="0")
    assert game.family and "{" not in said
    assert not {"family", "says"} & {f.name for f in fields(game)}


def test_a_question_grants_what_attacks_ask_for_and_nothing_of_the_truth() -> None:
    from turncoat.attacks.inversion.gradient_inversion import InvertingGradients
    from turncoat.attacks.membership.lira import LiRA
    from turncoat.attacks.membership.loss_threshold import LossThreshold

    assert [f.name for f in fields(Candidates)] == [
        "candidates",
        "population",
        "shadows",
        "client",
        "known",
    ]
    assert Trial(LiRA(), Membership()).needs == ModelView | QueryView
    assert Trial(LossThreshold(), Membership()).family == "membership"
    needs = Trial(InvertingGradients(), Reconstruct()).needs
    assert needs.__origin__ is ServerView

"""Membership by acting on others, and by a net that learnt on known members.

Kinds: baseline (an active attack tells more than a passive one on the same task, the net more than
the loss), theorem (what is raised and what is sent), oracle (the ascent by a loop), sabotage (DP of
records and of clients; a net that is told lies), contract (the questions, their errors, files).
"""

from __future__ import annotations

from dataclasses import fields, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from torch import Tensor

from turncoat.attacks.membership.active import (
    ActiveGlobalAttacker,
    ActiveLocalAttacker,
    GradientAscent,
    Isolation,
)
from turncoat.attacks.membership.loss_threshold import LossThreshold
from turncoat.attacks.membership.white_box import GlobalAttacker
from turncoat.attacks.membership.white_box_net import WhiteBoxNet
from turncoat.config import load
from turncoat.federation import Federation, Plain, Same
from turncoat.games.canaries import Canaries
from turncoat.games.membership import Candidates, Known, Membership
from turncoat.messages import Envelope, Update
from turncoat.plan import Audit, Entry, Impossible, aimed, plan, pose
from turncoat.randomness import Randomness
from turncoat.runtimes.simulate import Watch, simulate
from turncoat.stage import IncompatibleStages, call
from turncoat.stages.aggregate.mean import Mean
from turncoat.stages.channel.secure_aggregation import SecureAggregation
from turncoat.stages.train.dpsgd import DPSGD
from turncoat.stages.train.local import LocalSGD
from turncoat.stages.train.local_noise import LocalNoise
from turncoat.targets import AimedBroadcast, AimedTrain
from turncoat.task import Task
from turncoat.tasks.bundled import digits
from turncoat.tasks.models import MLP
from turncoat.testing.examples import example_task, example_view
from turncoat.trial import Blocked, Memberships, Sabotage, Trial, UnknownQuestion
from turncoat.views import AggregateView, ModelView, ServerView

TRAIN = LocalSGD(0.1, num_epochs=5, batch_size=10, momentum=0.5)
GAME = Membership(client=0)
ROUNDS, FIRST = 12, 8
LATE = frozenset(range(FIRST, ROUNDS))
torch.set_num_threads(1)


@cache
def task(num_clients: int = 4, seed: int = 10) -> Task:
    return digits(
        num_clients, per_client=100, test_size=300, public_size=200, seed=seed, model=MLP((48,))
    )


def posed(own: Task) -> tuple[Candidates, Tensor]:
    everyone = frozenset(range(len(own.clients)))
    return GAME.pose(own, took_part=everyone, cohort=(), rng=Randomness(0).at("pose"))


def area(attack: Any, train: Any = TRAIN, num_clients: int = 4) -> float:
    """Return the mean AUC of an attack that reads the late rounds, over two federations."""
    found = []
    for seed in (10, 11):
        own = task(num_clients, seed)
        asked, truth = posed(own)
        trial = Trial(attack, GAME, by=1)
        server, coalition = trial.server, trial.coalition
        if server is not None:
            server = AimedBroadcast(server, *asked.candidates)
        if coalition is not None and coalition.train is not None:
            worn = AimedTrain(coalition.train, *asked.candidates)
            coalition = replace(coalition, train=worn)
        run = simulate(
            Federation(train=train, channel=Plain(), aggregate=Mean()),
            own,
            num_rounds=ROUNDS,
            seed=seed,
            server=server,
            coalition=coalition,
            watch=[Watch(trial.needs, LATE)],
        )
        view = [v for v in run.seen(trial.needs) if trial.sits_at(v)]
        offers = {f.name: getattr(asked, f.name) for f in fields(asked)}
        guess = call(attack, view, rng=Randomness(0).at("attack"), **offers)
        found.append(GAME.mark(guess, truth, rng=Randomness(0).at("mark")).headline.value)
    return fmean(found)


def audit(attacks: dict[str, Any], *, game: Any = GAME, channel: Any = None) -> Audit:
    federation = Federation(train=TRAIN, channel=channel or Plain(), aggregate=Mean())
    entries = {n: Entry(Trial(a, game)) for n, a in attacks.items()}
    return Audit("active", task(), {"none": federation}, entries, 3, (10,))


# the server


def test_an_active_server_tells_more_than_a_passive_one_in_the_same_rounds() -> None:
    passive = max(area(GlobalAttacker()), area(ActiveGlobalAttacker(server=Same())))
    assert area(ActiveGlobalAttacker(server=GradientAscent(first=FIRST))) > passive + 0.02
    assert area(ActiveGlobalAttacker(server=Isolation(victim=0))) > passive + 0.05


RECORDS = DPSGD(0.1, max_norm=0.5, expected_batch=10, num_steps=20, noise_multiplier=4.0)
CLIENTS = LocalNoise(max_norm=0.5, noise_multiplier=4.0, inner=LocalSGD(0.1, batch_size=20))


@pytest.mark.parametrize("train", [RECORDS, CLIENTS], ids=["records", "clients"])
@pytest.mark.parametrize("server", [GradientAscent(first=FIRST), Isolation(victim=0)])
def test_behind_noise_on_records_or_clients_nobody_shows_a_reaction(
    server: Any, train: Any
) -> None:
    assert area(ActiveGlobalAttacker(server=server, features=("confidence",)), train) < 0.57


def test_a_state_is_raised_by_steps_up_the_targets_loss_and_part_by_part() -> None:
    own, model = task(), task().model
    start = model.initial(Randomness(0).at("begin"))
    server = GradientAscent(lr=0.2, num_steps=3, num_parts=2, first=1)
    inputs, labels = own.test

    def sent(round: int) -> torch.Tensor:
        envelope = Envelope(0, (0, 1), round)
        return server(start, model=model, envelope=envelope, targets=own.test)

    assert torch.equal(sent(0), start)
    for round in (1, 2):
        part = inputs[round % 2 :: 2], labels[round % 2 :: 2]
        here = start.clone()
        for _ in range(3):
            here = here + 0.2 * model.gradient(here, part)
        assert torch.allclose(sent(round), here, atol=1e-6)
        assert float(model.loss(sent(round), part)) > float(model.loss(start, part))


def test_who_is_isolated_gets_its_own_state_again_and_the_others_the_common_one() -> None:
    federation = Federation(train=TRAIN, channel=Plain(), aggregate=Mean())
    watch = [Watch(ServerView[Update]), Watch(AggregateView[Update])]
    run = simulate(
        federation, task(), num_rounds=3, seed=1, server=Isolation(victim=2), watch=watch
    )
    seen = run.seen(ServerView[Update])
    for before, after in pairwise(seen):
        own = before.sent[2] + before.messages[2].delta
        assert torch.equal(after.sent[2], own)
    for view, state in zip(seen, run.seen(AggregateView[Update]), strict=True):
        assert all(torch.equal(view.sent[c], state.before) for c in (0, 1, 3))
    whole = simulate(federation, task(), num_rounds=3, seed=1, server=Isolation(victim=2))
    part = simulate(federation, task(), num_rounds=3, seed=1, server=Isolation(victim=2), until=1)
    rest = simulate(
        federation, task(), num_rounds=3, seed=1, server=Isolation(victim=2), state=part.state
    )
    assert torch.equal(rest.state.params, whole.state.params)


def test_a_server_is_told_the_question_and_not_the_truth() -> None:
    played = audit({"active": ActiveGlobalAttacker()})
    trial: Any = played.entries["active"].trial
    federation = played.federations["none"]
    told = aimed(played, federation, trial, 10).server
    question, _ = pose(played, federation, GAME, -1, 10)
    assert isinstance(told, AimedBroadcast)
    assert torch.equal(told.inputs, question.candidates[0])
    assert torch.equal(told.labels, question.candidates[1])
    other = audit({"active": ActiveGlobalAttacker()}, game=Membership(client=1))
    keys = {plan(a).cells[0].run for a in (played, other)}
    assert len(keys) == 2  # another question is another training


def test_behind_secure_aggregation_no_update_is_read() -> None:
    (cell,) = plan(audit({"it": ActiveGlobalAttacker()}, channel=SecureAggregation())).cells
    assert isinstance(cell.settled, Blocked)


def test_targets_are_told_to_attacks_alone() -> None:
    with pytest.raises(IncompatibleStages, match="let an attack name it as its server"):
        Federation(train=TRAIN, channel=Plain(), aggregate=Mean(), broadcast=GradientAscent())
    played = audit({})
    entries = {"bare": Entry(Sabotage(outcome=Any, server=GradientAscent()))}  # type: ignore[arg-type]
    with pytest.raises(Impossible, match="name it as that attack's server"):
        plan(replace(played, entries=entries))


# a participant


def participant(train: Any, first: int) -> ActiveLocalAttacker:
    return ActiveLocalAttacker(inner=train, ascent=GradientAscent(first=first), boost=2.0)


def test_an_active_participant_tells_more_than_if_it_raised_nothing() -> None:
    passive = area(participant(TRAIN, ROUNDS), num_clients=2)
    assert area(participant(TRAIN, FIRST - 1), num_clients=2) > passive + 0.02


def test_noise_of_the_clients_hides_their_reaction_from_a_participant() -> None:
    assert area(participant(CLIENTS, FIRST - 1), CLIENTS, num_clients=2) < 0.57


def test_a_participant_sends_its_update_and_the_way_up() -> None:
    attack = ActiveLocalAttacker(inner=TRAIN, boost=3.0)
    start, own = task().model.initial(Randomness(0).at("begin")), task().clients[1]
    offers: dict[str, Any] = {"envelope": Envelope(1, (0, 1), 0), "targets": task().test}
    rng = Randomness(0)
    sent = call(attack.worn, task().model, start, own, rng=rng.at("t"), **offers)
    honest = TRAIN(task().model, start, own, rng=rng.at("t"))
    above = attack.ascent(start, model=task().model, **offers)
    assert torch.equal(sent.delta, honest.delta + 3.0 * (above - start))


# the net


def test_the_net_tells_more_than_the_loss() -> None:
    game, rng = Membership(client=0, num_known=200), Randomness(0)
    own = digits(2, per_client=300, test_size=500, public_size=200, seed=11, model=MLP((48,)))
    federation = Federation(train=TRAIN, channel=Plain(), aggregate=Mean())
    watch = [Watch(ServerView[Update])]
    run = simulate(federation, own, num_rounds=4, seed=11, watch=watch)
    asked, truth = game.pose(own, took_part=frozenset({0, 1}), cohort=(), rng=rng.at("pose"))
    offers = {f.name: getattr(asked, f.name) for f in fields(asked)}
    net = call(WhiteBoxNet(), run.seen(ServerView[Update]), rng=rng.at("net"), **offers)
    last = ModelView(own.model, run.state.params)
    loss = LossThreshold()(last, candidates=asked.candidates)
    by_net, by_loss = (
        game.mark(guess, truth, rng=rng.at("mark")).headline.value for guess in (net, loss)
    )
    assert by_net > by_loss + 0.02


def test_the_net_knows_some_records_and_is_asked_about_others() -> None:
    for num, client in ((20, None), (30, 2)):
        game = Membership(40, client=client, num_known=num)
        question, truth = game.pose(
            task(), took_part=frozenset(range(4)), cohort=(), rng=Randomness(0).at("pose")
        )
        known = question.known
        assert known is not None and int(known.inside.sum()) == num // 2 == num - num // 2
        asked = {x.numpy().tobytes() for x in question.candidates[0]}
        assert not asked & {x.numpy().tobytes() for x in known.records[0]}
        held = {x.numpy().tobytes() for c in range(4) for x in task().clients[c][0]}
        for records, inside in ((known.records[0], known.inside), (question.candidates[0], truth)):
            assert [x.numpy().tobytes() in held for x in records] == inside.tolist()


def test_who_is_granted_nothing_is_asked_as_before() -> None:
    plain, more = (
        Membership(40, num_known=num).pose(
            task(), took_part=frozenset({0, 1}), cohort=(), rng=Randomness(0).at("pose")
        )
        for num in (None, 20)
    )
    assert torch.equal(plain[0].candidates[0], more[0].candidates[0])
    assert torch.equal(plain[1], more[1]) and plain[0].known is None


def test_a_net_that_is_told_lies_learns_nothing() -> None:
    own, rng = task(), Randomness(0)
    question, truth = Membership(client=0, num_known=40).pose(
        own, took_part=frozenset(range(4)), cohort=(), rng=rng.at("pose")
    )
    federation = Federation(train=TRAIN, channel=Plain(), aggregate=Mean())
    view = simulate(federation, own, num_rounds=2, seed=1, watch=[Watch(ServerView[Update])])
    known = question.known
    assert known is not None
    lies = Known(known.records, ~known.inside)
    areas = []
    for told in (known, lies):
        guess = WhiteBoxNet()(
            view.seen(ServerView[Update]),
            candidates=question.candidates,
            known=told,
            client=0,
            rng=rng.at("net"),
        )
        marked = Membership().mark(Memberships(guess.scores), truth, rng=rng.at("mark"))
        areas.append(marked.headline.value)
    assert areas[1] < areas[0] and areas[1] < 0.5


def test_without_known_records_there_is_nothing_to_learn() -> None:
    view = example_view(ServerView[Update], example_task())
    question: dict[str, Any] = {"candidates": example_task().test, "client": None}
    question["rng"] = Randomness(0).at("net")
    with pytest.raises(ValueError, match="give it num_known"):
        WhiteBoxNet()([view], known=None, **question)
    known = Known(example_task().population, torch.arange(48) % 2 == 0)
    with pytest.raises(ValueError, match="saw no step"):
        WhiteBoxNet(rounds=(7,))([view], known=known, **question)
    with pytest.raises(ValueError, match="lower num_candidates or num_known"):
        Membership(num_known=10_000).pose(
            task(), took_part=frozenset({0}), cohort=(), rng=Randomness(0).at("pose")
        )
    with pytest.raises(ValueError, match="give an even num_known"):
        Membership(num_known=3)


FILE = """
rounds = 4
[task]
use = "digits"
num_clients = 4
[federation]
train = { use = "local-sgd", lr = 0.1 }
channel = "plain"
aggregate = "mean"
"""


def test_all_of_them_are_named_in_a_file(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "membership.md").read_text("utf-8")
    shown = [block for block in page.split("```toml\n")[1:] if "active" in block]
    (text,) = [block.split("```")[0] for block in shown]
    file = tmp_path / "audit.toml"
    file.write_text(FILE + text, "utf-8")
    loaded = load(file)
    seats = {c.attack: c.seat for c in plan(loaded).cells if c.settled is None}
    assert set(seats) == set(loaded.entries)
    local: Any = loaded.entries["participant"].trial
    assert local.attack.inner == LocalSGD(0.1)  # the federation's own
    assert local.coalition.members.ids == (local.by,)


def test_canaries_come_without_known_records() -> None:
    with pytest.raises(UnknownQuestion, match="asks for 'known'"):
        Trial(WhiteBoxNet(), Canaries())

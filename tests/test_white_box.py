"""Membership from updates, from their sum, and from what a coalition leaves of it.

Kinds: theorem (a sum without all but one is that one), oracle (gradients by a loop of one record
at a time), baseline (an update tells more than the global model), sabotage (an update of someone
else, a private one; another rule than the mean; secure aggregation).
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from turncoat.attacks.membership.trajectory import Trajectory
from turncoat.attacks.membership.white_box import (
    ALL,
    Colluders,
    GlobalAttacker,
    LocalAttacker,
    residue,
    suspicion,
)
from turncoat.config import ConfigError, load
from turncoat.describe import describe
from turncoat.federation import Federation, FixedSample, Plain
from turncoat.games.membership import Candidates, Membership
from turncoat.messages import Clear, Update
from turncoat.plan import Audit, Entry, Impossible, plan, pose
from turncoat.randomness import Randomness
from turncoat.runtimes.simulate import Run, Watch, simulate
from turncoat.stage import call
from turncoat.stages.aggregate.coordinatewise import Median
from turncoat.stages.aggregate.mean import Mean
from turncoat.stages.channel.secure_aggregation import SecureAggregation
from turncoat.stages.train.dpsgd import DPSGD
from turncoat.stages.train.local import LocalSGD
from turncoat.task import Task
from turncoat.tasks.bundled import digits
from turncoat.tasks.models import MLP
from turncoat.trial import Blocked, Memberships, Trial, UnknownQuestion
from turncoat.views import AggregateView, ClientView, Seat, ServerView

RANDOM = Randomness(5)
VICTIM, ROUNDS = 0, 4
MEAN, PLAIN = Mean(), Plain()
TRAIN = LocalSGD(0.1, num_epochs=5, batch_size=10, momentum=0.5)
FILE = """
[task]
use = "digits"
num_clients = 5
[federation]
train = { use = "local-sgd", lr = 0.1 }
channel = "secure-aggregation"
aggregate = "mean"
"""
SEEN = (ServerView[Update], AggregateView[Update], ClientView[Update])
torch.set_num_threads(1)


@cache
def task() -> Task:
    return digits(5, per_client=60, test_size=200, public_size=150, seed=2, model=MLP((32,)))


@cache
def run(rule: Any = MEAN) -> Run:
    federation = Federation(train=TRAIN, channel=PLAIN, aggregate=rule)
    watch = [Watch(kind) for kind in SEEN]
    return simulate(federation, task(), num_rounds=ROUNDS, seed=1, watch=watch)


@cache
def question() -> tuple[Candidates, Tensor]:
    return Membership(client=VICTIM).pose(
        task(), took_part=frozenset(range(5)), cohort=(), rng=RANDOM.at("pose")
    )


def views(kind: Any, allies: tuple[int, ...] = (), rule: Any = MEAN) -> list[Any]:
    found = run(rule).seen(kind)
    return found if kind is not ClientView[Update] else [v for v in found if v.client in allies]


def scores(attack: Any, seen: Any, **other: Any) -> Tensor:
    asked, _ = question()
    offers = {name: getattr(asked, name) for name in ("candidates", "population", "client")}
    found: Tensor = call(attack, seen, **{**offers, **other}).scores
    return found


def area(found: Tensor) -> float:
    marked = Membership().mark(Memberships(found), question()[1], rng=RANDOM.at("mark"))
    return marked.headline.value


# what tells how much


def test_an_update_tells_more_than_the_global_models_steps() -> None:
    update = area(scores(GlobalAttacker(), views(ServerView[Update])))
    step = area(scores(LocalAttacker(), views(AggregateView[Update])))
    assert update > step + 0.05
    assert step > 0.53


@pytest.mark.parametrize("feature", ALL)
def test_every_feature_of_an_update_tells_members(feature: Any) -> None:
    assert area(scores(GlobalAttacker((feature,)), views(ServerView[Update]))) > 0.6


def test_an_update_of_someone_else_tells_nothing() -> None:
    found = scores(GlobalAttacker(), views(ServerView[Update]), client=3)
    assert area(found) < 0.58


def test_where_no_client_is_named_the_most_suspicious_update_counts() -> None:
    attack, seen = GlobalAttacker(("confidence",), rounds=(0,)), views(ServerView[Update])
    each = torch.stack([scores(attack, seen, client=c) for c in range(5)])
    assert torch.equal(scores(attack, seen, client=None), each.amax(dim=0))


def test_rounds_average_out_what_one_model_does_by_chance() -> None:
    seen = views(AggregateView[Update])
    assert area(scores(Trajectory(), seen)) > 0.52
    late = scores(Trajectory(first=ROUNDS - 1), seen)
    assert not torch.equal(late, scores(Trajectory(), seen))


def test_behind_dp_sgd_an_update_tells_next_to_nothing() -> None:
    private = DPSGD(0.1, max_norm=0.5, expected_batch=10, num_steps=30, noise_multiplier=4.0)
    federation = Federation(train=private, channel=PLAIN, aggregate=MEAN)
    watch = [Watch(ServerView[Update])]
    seen = simulate(federation, task(), num_rounds=2, seed=1, watch=watch).seen(ServerView[Update])
    hidden, shown = (
        area(scores(GlobalAttacker(), some)) for some in (seen, views(ServerView[Update])[:2])
    )
    assert hidden < min(0.6, shown - 0.05)


# coalitions


@given(
    weights=st.lists(st.floats(1, 1000), min_size=2, max_size=8),
    seed=st.integers(0, 1000),
)
def test_a_weighted_mean_without_all_but_one_is_that_one(weights: list[float], seed: int) -> None:
    deltas = torch.randn(len(weights), 50, generator=RANDOM.at("delta", seed))
    sent = [Update(row, weight) for row, weight in zip(deltas, weights, strict=True)]
    step = Clear.total(sent).delta
    share = weights[0] / sum(weights)
    found = residue(step, sent[1:], rest=weights[0])
    assert torch.allclose(found, deltas[0], atol=4e-6 / share)


@given(num_left=st.integers(1, 4))
def test_what_is_left_of_several_is_their_mean(num_left: int) -> None:
    deltas = torch.randn(6, 50, generator=RANDOM.at("several"))
    step = Clear.total([Update(row, 30.0) for row in deltas]).delta
    own = [Update(row, 30.0) for row in deltas[num_left:]]
    found = residue(step, own, rest=30.0 * num_left)
    assert torch.allclose(found, deltas[:num_left].mean(dim=0), atol=1e-5)


def test_all_but_one_see_what_the_server_sees_of_the_one() -> None:
    rounds = tuple(range(ROUNDS - 1))  # of the last nobody tells them
    ours = scores(Colluders(), views(ClientView[Update], (1, 2, 3, 4)))
    servers = scores(GlobalAttacker(rounds=rounds), views(ServerView[Update]))
    assert torch.allclose(ours, servers, atol=1e-3)
    assert abs(area(ours) - area(servers)) < 1e-3


def test_the_more_collude_the_more_is_told() -> None:
    areas = [
        area(
            scores(
                Colluders(rest=60.0 * (5 - n)), views(ClientView[Update], tuple(range(1, n + 1)))
            )
        )
        for n in (1, 4)
    ]
    assert areas[0] < areas[1] - 0.02


def test_behind_a_median_subtracting_leaves_less() -> None:
    allies = (1, 2, 3, 4)
    mean, median = (
        area(scores(Colluders(), views(ClientView[Update], allies, rule)))
        for rule in (MEAN, Median())
    )
    assert median < mean - 0.03


# against a slow twin


@pytest.mark.parametrize("feature", ["alignment", "gradient-norm"])
def test_features_are_those_of_one_record_at_a_time(feature: Any) -> None:
    view = views(ServerView[Update])[0]
    model, sent, delta = view.model, view.sent[VICTIM], view.messages[VICTIM].delta
    some, theirs = ((x[:5], y[:5]) for x, y in (question()[0].candidates, task().population))
    at = sent if feature == "alignment" else sent + delta

    def slow(data: Any) -> Tensor:
        rows = []
        for x, y in zip(*data, strict=True):
            grad, values = model.gradient(at, (x[None], y[None])), []
            for slot in model.layout.slots:
                g, d = (v[slot.start : slot.stop].double() for v in (grad, delta))
                cosine = -(g @ d) / (g.norm() * d.norm())
                values.append(cosine if feature == "alignment" else -g.norm().log())
            rows.append(torch.stack(values))
        return torch.stack(rows)

    known = slow(theirs)
    expected = ((slow(some) - known.mean(dim=0)) / known.std(dim=0)).mean(dim=1)
    found = suspicion(model, sent, delta, some, theirs, (feature,))
    assert torch.allclose(found, expected, atol=1e-3)


# in the federation


def audit(attack: Any, channel: Any = PLAIN, **options: Any) -> Audit:
    federation = Federation(train=TRAIN, channel=channel, aggregate=MEAN)
    trial = Trial(attack, Membership(40, client=VICTIM), **options)
    return Audit("membership", task(), {"none": federation}, {"it": Entry(trial)}, 3, (0,))


def test_secure_aggregation_blocks_the_server_and_no_coalition() -> None:
    hidden = SecureAggregation()
    (cell,) = plan(audit(GlobalAttacker(), hidden)).cells
    assert isinstance(cell.settled, Blocked)
    (cell,) = plan(audit(Colluders(), hidden, by=1, allies=(2, 3, 4))).cells
    assert cell.seat is Seat.CLIENT and cell.settled is None


def test_nobody_is_asked_about_the_attackers_own_records() -> None:
    asked = audit(Colluders())
    federation = asked.federations["none"]
    with pytest.raises(ValueError, match="never took part, or that attacks"):
        pose(asked, federation, Membership(client=2), -1, 0, 1, True, (2,))
    found, truth = pose(asked, federation, Membership(), -1, 0, 1, True, (2, 3, 4))
    theirs = task().clients[VICTIM][0].flatten(1)
    ins = found.candidates[0][truth].flatten(1)
    assert bool((ins[:, None] == theirs).all(dim=2).any(dim=1).all())


def test_allies_must_exist_and_pool_what_clients_see() -> None:
    with pytest.raises(Impossible, match="by client 9"):
        plan(audit(Colluders(), allies=(9,)))
    with pytest.raises(UnknownQuestion, match="leave allies out"):
        Trial(GlobalAttacker(), Membership(), allies=(1,))


def test_one_who_was_not_there_is_told_nothing_about() -> None:
    one = Federation(train=TRAIN, channel=PLAIN, aggregate=MEAN, sample=FixedSample(1))
    seen = simulate(one, task(), num_rounds=1, seed=1, watch=[Watch(ServerView[Update])])
    view = seen.seen(ServerView[Update])
    absent = next(c for c in range(5) if c not in view[0].senders)
    with pytest.raises(ValueError, match="saw no step"):
        scores(GlobalAttacker(), view, client=absent)
    with pytest.raises(ValueError, match="two rounds or more"):
        scores(Colluders(), [v for v in views(ClientView[Update], (1, 2)) if v.round == 0])


def test_what_was_computed_before_a_client_could_be_named_is_found_again() -> None:
    assert "client" not in describe(Membership()) and "client" in describe(Membership(client=1))
    assert "allies" not in describe(Trial(Colluders(), Membership()))
    assert replace(Membership(), client=1) == Membership(client=1)


def test_a_coalition_is_named_in_a_file(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "membership.md").read_text("utf-8")
    shown = re.search(r"```toml\n(\[attack.coalition\].*?)```", page, re.DOTALL)
    assert shown is not None
    file = tmp_path / "audit.toml"
    file.write_text(FILE + shown[1], "utf-8")
    (cell,) = plan(load(file)).cells
    assert cell.seat is Seat.CLIENT and cell.settled is None
    file.write_text(FILE + shown[1].replace("[2, 3, 4]", "2"), "utf-8")
    with pytest.raises(ConfigError, match="allies"):
        load(file)

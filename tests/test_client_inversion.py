"""A client that inverts what the others have sent, behind secure aggregation.

Kinds: oracle (the other's own update), sabotage (more clients, differential privacy, no second
round), contract (the audit never makes it its own victim).
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from turncoat.attacks.inversion.client_inversion import ClientInversion
from turncoat.attacks.inversion.gradient_inversion import AggregateInversion
from turncoat.attacks.inversion.optimisers import SignedAdam
from turncoat.audit import run_audit
from turncoat.config import load
from turncoat.federation import Federation
from turncoat.games.reconstruction import Reconstruct
from turncoat.messages import Update
from turncoat.randomness import Randomness
from turncoat.runtimes.simulate import Watch, simulate
from turncoat.stages.aggregate.mean import Mean
from turncoat.stages.channel.secure_aggregation import SecureAggregation
from turncoat.stages.train.dpsgd import DPSGD
from turncoat.stages.train.local import FedSGD
from turncoat.tasks.bundled import digits
from turncoat.tasks.models import LeNet5
from turncoat.trial import Marked, Scored
from turncoat.views import ClientView

NEED = ClientView[Update]
STEP = FedSGD(0.1)
ATTACK = ClientInversion(inner=AggregateInversion(optimiser=SignedAdam(200)))
torch.set_num_threads(1)


@cache
def seen(num_clients: int = 2, train: Any = STEP) -> tuple[Any, tuple[Any, ...]]:
    """Return the task, and what client 0 sees of two rounds of it."""
    task = digits(num_clients, per_client=1, seed=0, model=LeNet5("tanh"))
    federation: Any = Federation(train=train, channel=SecureAggregation(), aggregate=Mean())
    run = simulate(federation, task, num_rounds=2, seed=0, watch=[Watch(NEED)])
    return task, tuple(v for v in run.seen(NEED) if v.client == 0)


def marked(num_clients: int, train: Any = STEP) -> Marked:
    task, views = seen(num_clients, train)
    game, randomness = Reconstruct(victim=1), Randomness(0)
    everyone = tuple(range(num_clients))
    question, truth = game.pose(
        task, took_part=frozenset(everyone), cohort=everyone, rng=randomness.at("pose")
    )
    guess = replace(ATTACK, cohort=num_clients)(
        views,
        victims=question.victims,
        population=question.population,
        rng=randomness.at("attack"),
    )
    return game.mark(guess, truth, rng=randomness.at("mark"))


def test_of_two_clients_each_has_the_others_image_whatever_the_server_sees() -> None:
    alone = marked(2).headline
    assert alone.value > alone.baseline + 10


def test_among_many_or_behind_noise_it_is_no_better_than_the_mean_image() -> None:
    noisy = DPSGD(lr=0.1, max_norm=1.0, expected_batch=1, noise_multiplier=1.0, num_steps=1)
    for found in (marked(8), marked(2, noisy)):
        assert found.headline.value < found.headline.baseline + 1


def test_what_is_left_is_the_others_own_update() -> None:
    task, views = seen()
    after = views[1].before
    own = STEP(task.model, views[0].before, task.clients[1], rng=Randomness(0).at("train"))
    left = ATTACK._others(views[0], after)
    assert torch.allclose(left, own.delta, atol=2e-5)  # masks are whole numbers of 2^-16 or so


def test_a_client_that_missed_every_second_round_is_told_so() -> None:
    task, views = seen()
    apart = (views[0], replace(views[1], round=2))
    with pytest.raises(ValueError, match="two rounds running"):
        ATTACK(apart, victims=(1,), population=task.population, rng=Randomness(0).at("attack"))


def test_an_audit_never_makes_it_its_own_victim(tmp_path: Path) -> None:
    file = tmp_path / "audit.toml"
    file.write_text(
        """
        rounds = 2
        seeds = 1
        defences = ["none"]
        [task]
        use = "digits"
        num_clients = 2
        per_client = 1
        model = { use = "lenet5", activation = "tanh" }
        [federation]
        train = { use = "fed-sgd", lr = 0.1 }
        channel = "secure-aggregation"
        aggregate = "mean"
        [attack.neighbour]
        use = "client-inversion"
        game = { use = "reconstruct", num_victims = 2 }
        [attack.neighbour.inner]
        use = "aggregate-inversion"
        optimiser = { use = "signed-adam", num_steps = 200 }
        """
    )
    (cell,) = run_audit(load(file), tmp_path / "out").values()
    assert isinstance(cell, Scored)
    assert cell.marked.exhibits["originals"].shape[0] == 1
    assert cell.marked.headline.value > cell.marked.headline.baseline + 10

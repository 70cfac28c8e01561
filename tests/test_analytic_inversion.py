"""What a linear layer on the input gives away by algebra alone.

Kinds: theorem (hypothesis: the quotient of a linear layer is its input), oracle (the records
themselves, recovered to rounding), sabotage (noise, clipped records, more records than the bound,
a layer without a ReLU: each stops what it should stop).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from turncoat.attacks.inversion.analytic import SPEAR, LinearLayer, _determine
from turncoat.federation import Federation, Plain
from turncoat.games.reconstruction import Reconstruct
from turncoat.messages import Update
from turncoat.metrics.images import match, psnr
from turncoat.randomness import Randomness
from turncoat.runtimes.simulate import Watch, simulate
from turncoat.stage import call
from turncoat.stages.aggregate.mean import Mean
from turncoat.stages.channel.secure_aggregation import SecureAggregation
from turncoat.stages.train.dpsgd import DPSGD
from turncoat.stages.train.local import FedSGD, LocalSGD
from turncoat.task import Batch, Model, Task
from turncoat.tasks.bundled import breast_cancer, digits
from turncoat.tasks.models import MLP, Built, ConvNet
from turncoat.trial import Reconstruction, Trial
from turncoat.views import AggregateView, Seat, ServerView

RANDOM = Randomness(0)
WIDE = MLP((400,))


def view_of(task: Task, *, lr: float | None = None) -> ServerView[Update]:
    """Return a view of one gradient step of each client; of the bare gradient without ``lr``."""
    start = task.model.initial(RANDOM.at("start"))
    messages = []
    for data in task.clients:
        slope = task.model.gradient(start, data)
        delta = -slope if lr is None else (start - lr * slope) - start
        messages.append(Update(delta, float(len(data[1]))))
    senders = tuple(range(len(messages)))
    return ServerView(0, task.model, senders, tuple(messages), sent=(start,) * len(messages))


def furthest(found: Reconstruction, data: Batch) -> float:
    """Return the largest error of any input, each record beside its own reconstruction."""
    rows, columns = match(found.inputs, data[0])
    assert len(columns) == len(data[1])
    return float((found.inputs[rows] - data[0][columns]).abs().max())


def labels_right(found: Reconstruction, data: Batch) -> float:
    rows, columns = match(found.inputs, data[0])
    return float((found.labels[rows] == data[1][columns]).float().mean())


def solved(attack: Any, view: Any, task: Task, victims: tuple[int, ...]) -> Any:
    rng = RANDOM.at("attack")
    return call(attack, view, victims=victims, population=task.population, rng=rng)


# one linear layer, one record


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 12), st.sampled_from(["relu", "tanh", "sigmoid"]))
def test_the_quotient_of_a_linear_layer_is_its_input(seed: int, width: int, act: Any) -> None:
    random = Randomness(seed)
    model = Model(Built(MLP((width,), act), (1, 4, 4), 3))
    start = model.initial(random.at("start"))
    data = (torch.rand(1, 1, 4, 4, generator=random.at("x")), torch.tensor([seed % 3]))
    slope = model.gradient(start, data)
    view = ServerView(0, model, (0,), (Update(-slope, 1.0),), sent=(start,))
    (found,) = LinearLayer()(view, victims=(0,), population=data)
    if bool(model.layout.split(slope)["1.bias"].any()):  # some unit was awake
        assert float((found.inputs - data[0]).abs().max()) < 1e-5
        assert found.labels.tolist() == data[1].tolist()


@pytest.mark.parametrize("hidden", [(), (32,), (32, 16)])
def test_a_single_digit_comes_back_to_rounding(hidden: tuple[int, ...]) -> None:
    task = digits(4, model=MLP(hidden), per_client=1)
    for found, data in zip(
        LinearLayer()(view_of(task), victims=(0, 1, 2, 3), population=task.population),
        task.clients,
        strict=True,
    ):
        assert furthest(found, data) < 1e-5
        assert found.labels.tolist() == data[1].tolist()


def test_a_patient_comes_back_too_and_not_only_pixels() -> None:
    task = breast_cancer(3, model=MLP((16,)), per_client=1)
    found = LinearLayer()(view_of(task), victims=(1,), population=task.population)[0]
    assert furthest(found, task.clients[1]) < 1e-4  # features are several deviations away


def test_of_several_records_those_that_wake_units_alone_come_back() -> None:
    task = digits(1, model=MLP((2_000,)), per_client=3)
    (found,) = LinearLayer()(view_of(task), victims=(0,), population=task.population)
    rows, columns = match(found.inputs, task.clients[0][0])
    assert int((psnr(found.inputs[rows], task.clients[0][0][columns]) > 60).sum()) >= 2


# SPEAR


@pytest.mark.parametrize("num_records", [1, 2, 5, 8])
def test_a_whole_batch_comes_out_of_a_wide_relu_layer(num_records: int) -> None:
    task = digits(2, model=WIDE, per_client=num_records)
    for found, data in zip(solved(SPEAR(), view_of(task), task, (0, 1)), task.clients, strict=True):
        assert furthest(found, data) < 1e-4
        assert labels_right(found, data) == 1.0


def test_a_step_rounded_to_float32_gives_the_batch_within_a_thousandth() -> None:
    task = digits(1, model=WIDE, per_client=8)
    (found,) = solved(SPEAR(), view_of(task, lr=0.1), task, (0,))
    assert furthest(found, task.clients[0]) < 1e-3


def test_every_batch_comes_back_and_not_only_most() -> None:
    task = digits(4, model=MLP((600,)), per_client=8)
    for found, data in zip(
        solved(SPEAR(), view_of(task, lr=1.0), task, (0, 1, 2, 3)), task.clients, strict=True
    ):
        assert furthest(found, data) < 1e-4
        assert labels_right(found, data) == 1.0


def test_records_of_one_class_whose_gradients_are_nearly_one_come_back_apart() -> None:
    task = digits(1, model=MLP((600,)), per_client=200)
    inputs, labels = task.clients[0]
    data = inputs[labels == 3][:6], labels[labels == 3][:6]
    (found,) = solved(SPEAR(), view_of(replace(task, clients=(data,)), lr=1.0), task, (0,))
    assert furthest(found, data) < 1e-4


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(3, 8))
def test_rows_determine_a_direction_if_they_would_without_any_of_them(seed: int, b: int) -> None:
    rng = RANDOM.at("rows", seed)
    rows = torch.randn(40, b, generator=rng, dtype=torch.float64)
    rows[:, -2:] = 0  # all of them leave a plane of directions
    one, another = torch.randn(2, b, generator=rng, dtype=torch.float64)
    one[-2:] = another[-2:] = torch.tensor([1.0, 0.0])
    assert not _determine(rows)
    assert not _determine(torch.cat([rows, one[None]]))
    assert _determine(torch.cat([rows, one[None], another[None]]))


def test_spear_has_the_batch_where_the_quotient_has_a_mixture() -> None:
    task = digits(1, model=WIDE, per_client=8)
    view = view_of(task)
    (exact,), (mixed,) = (solved(a, view, task, (0,)) for a in (SPEAR(), LinearLayer()))
    assert furthest(exact, task.clients[0]) < 1e-4 < 0.5 < furthest(mixed, task.clients[0])


def test_more_records_than_draws_can_tell_apart_stay_hidden() -> None:
    task = digits(1, model=MLP((60,)), per_client=24)
    (found,) = solved(SPEAR(num_draws=1_000), view_of(task), task, (0,))
    assert len(found.labels) == 24
    assert furthest(found, task.clients[0]) > 0.3


def test_more_records_than_inputs_are_linearly_dependent_and_stay_hidden() -> None:
    task = breast_cancer(1, model=MLP((200,)), per_client=40)
    (found,) = solved(SPEAR(num_draws=500), view_of(task), task, (0,))
    assert furthest(found, task.clients[0]) > 0.3


def test_a_layer_whose_sleeping_units_learn_is_refused() -> None:
    task = digits(1, model=MLP((100,), "tanh"), per_client=4)
    with pytest.raises(ValueError, match="needs a ReLU behind layer '1'"):
        solved(SPEAR(), view_of(task), task, (0,))


@pytest.mark.parametrize("attack", [LinearLayer(), SPEAR()])
def test_a_linear_layer_behind_convolutions_does_not_read_the_input(attack: Any) -> None:
    task = digits(1, model=ConvNet((4,), (2,)), per_client=1)
    with pytest.raises(ValueError, match="what others made of it, Conv2d first: choose an mlp"):
        solved(attack, view_of(task), task, (0,))


def test_a_gradient_of_nothing_gives_images_of_nothing() -> None:
    task = digits(1, model=WIDE, per_client=2)
    view = view_of(task)
    still = ServerView(
        0, task.model, (0,), (Update(torch.zeros_like(view.sent[0]), 2.0),), sent=view.sent
    )
    for attack in (LinearLayer(), SPEAR()):
        (found,) = solved(attack, still, task, (0,))
        assert not bool(found.inputs.any())


def test_a_client_that_sent_nothing_is_named() -> None:
    task = digits(2, model=WIDE, per_client=1)
    with pytest.raises(ValueError, match="client 7 sent nothing in round 0"):
        solved(LinearLayer(), view_of(task), task, (7,))


# in a federation, marked by the game


def marked(task: Task, train: Any, attack: Any, channel: Any = None) -> Any:
    """Return the game's headline for all clients of one round."""
    channel = channel or Plain()
    federation: Any = Federation(train=train, channel=channel, aggregate=Mean())
    trial: Trial[Any] = Trial(attack, Reconstruct(num_victims=4))
    run = simulate(federation, task, num_rounds=1, seed=0, watch=[Watch(trial.needs)])
    view = run.seen(trial.needs)[0]
    clients = tuple(range(len(task.clients)))
    question, truth = trial.game.pose(
        task, took_part=frozenset(clients), cohort=clients, rng=RANDOM.at("pose")
    )
    guess = solved(attack, view, task, question.victims)
    return trial.game.mark(guess, truth, rng=RANDOM.at("mark")).headline


def private(noise: float) -> DPSGD:
    return DPSGD(0.1, 1.0, 8, noise_multiplier=noise, num_epochs=1)


def test_an_honest_step_is_read_and_noise_stops_it() -> None:
    task = digits(4, model=WIDE, per_client=4)
    plain = marked(task, FedSGD(0.1), SPEAR(num_draws=2_000))
    noisy = marked(task, private(1.0), SPEAR(num_draws=2_000))
    assert plain.value > 80 and plain.beats_baseline
    assert not noisy.beats_baseline


def test_local_steps_keep_the_rank_and_do_not_stop_spear() -> None:
    task = digits(2, model=WIDE, per_client=4)
    epochs = LocalSGD(0.1, num_epochs=3, batch_size=2)
    assert marked(task, epochs, SPEAR(num_draws=1_000)).value > 60


def test_secure_aggregation_hides_the_records_of_many_in_a_narrow_layer_but_not_one_alone() -> None:
    def reached(num_clients: int, width: int) -> Any:
        task = digits(num_clients, model=MLP((width,)), per_client=1)
        return marked(task, FedSGD(1.0), LinearLayer(num_images=1), SecureAggregation())

    assert reached(1, 64).value > 60
    assert reached(6, 8).value < 15
    assert reached(6, 64).value > 25  # a wide layer has units that one record alone woke


def test_both_can_be_mounted_by_a_server_under_secure_aggregation_too() -> None:
    federation: Any = Federation(train=FedSGD(0.1), channel=SecureAggregation(), aggregate=Mean())
    trial: Trial[Any] = Trial(SPEAR(), Reconstruct())
    assert trial.needs == ServerView[Update] | AggregateView[Update]
    assert Seat.SERVER in trial.seats(federation)


def test_nothing_is_read_from_anywhere_but_the_rng() -> None:
    task = digits(1, model=WIDE, per_client=4)
    view = view_of(task)
    first: Tensor = solved(SPEAR(), view, task, (0,))[0].inputs
    assert torch.equal(first, solved(SPEAR(), view, task, (0,))[0].inputs)

"""A server that sends weights made to make updates speak, and what stops it.

Kinds: theorem (hypothesis: every record in a bin of its own comes back, whatever the batch), oracle
(the records; the gradient of the one fished record alone), sabotage (an honest state, another
server's state, noise, clipping with noise, a net that bars the way), contract (what is sent).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from turncoat.attacks.inversion.analytic import LinearLayer
from turncoat.attacks.inversion.gradient_inversion import InvertingGradients
from turncoat.attacks.inversion.malicious import (
    ClassFishing,
    Fishing,
    Imprint,
    ModelInconsistency,
    RobbingTheFed,
    slopes,
)
from turncoat.config import load
from turncoat.federation import Federation, Plain, Same
from turncoat.games.reconstruction import Reconstruct
from turncoat.graphs import Ring
from turncoat.messages import Envelope, Update
from turncoat.metrics.images import match, psnr
from turncoat.randomness import Randomness
from turncoat.runtimes.simulate import Watch, simulate
from turncoat.stage import Broadcast, call, check
from turncoat.stages.aggregate.coordinatewise import Median
from turncoat.stages.aggregate.mean import Mean
from turncoat.stages.channel.secure_aggregation import SecureAggregation
from turncoat.stages.train.dpsgd import DPSGD
from turncoat.stages.train.local import Clipped, FedSGD, LocalSGD
from turncoat.task import Task
from turncoat.tasks.bundled import digits
from turncoat.tasks.models import MLP, ConvNet, LeNet5, ResNet
from turncoat.trial import Trial
from turncoat.views import Seat, ServerView

RANDOM = Randomness(0)
STEP = FedSGD(0.1)
ROBBING = RobbingTheFed()


class Twice(nn.Module):
    """A net that reads its input twice."""

    def __init__(self) -> None:
        super().__init__()
        self.flat, self.first = nn.Flatten(), nn.Linear(64, 16)
        self.wake, self.out = nn.ReLU(), nn.Linear(80, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        flat = self.flat(inputs)
        out: Tensor = self.out(torch.cat([self.wake(self.first(flat)), flat], dim=1))
        return out


class Branching:
    """Builds a net with two ways to the end."""

    def __call__(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        return Twice()


class MaxPooled:
    """Builds a net that bends on the way."""

    def __call__(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        return nn.Sequential(
            *(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
            *(nn.Linear(96, 32), nn.ReLU(), nn.Linear(32, num_classes)),
        )


def played(
    task: Task,
    attack: Any,
    *,
    train: Any = STEP,
    channel: Any = None,
    aggregate: Any = None,
    honest: bool = False,
) -> tuple[Any, Any]:
    """Return guess and mark of one round; with ``honest`` the server sends what it should."""
    channel, aggregate = channel or Plain(), aggregate or Mean()
    federation: Any = Federation(train=train, channel=channel, aggregate=aggregate)
    trial: Trial[Any] = Trial(attack, Reconstruct(num_victims=8))
    server = None if honest else trial.server
    run = simulate(
        federation, task, num_rounds=1, seed=0, server=server, watch=[Watch(trial.needs)]
    )
    view = run.seen(trial.needs)[0]
    clients = tuple(range(len(task.clients)))
    question, truth = trial.game.pose(
        task, took_part=frozenset(clients), cohort=clients, rng=RANDOM.at("pose")
    )
    rng = RANDOM.at("attack")
    guess = call(attack, view, victims=question.victims, population=question.population, rng=rng)
    return guess, trial.game.mark(guess, truth, rng=RANDOM.at("mark"))


def recovered(guess: Any, task: Task, above: float = 40.0) -> float:
    """Return the share of all clients' records that came back."""
    hits = total = 0
    for found, (inputs, _) in zip(guess, task.clients, strict=True):
        rows, columns = match(found.inputs, inputs)
        hits += int((psnr(found.inputs[rows], inputs[columns]) > above).sum())
        total += len(inputs)
    return hits / total


def labelled(guess: Any, task: Task) -> float:
    """Return the share of the records that came back whose labels are right."""
    right, total = 0, 0
    for found, (inputs, labels) in zip(guess, task.clients, strict=True):
        rows, columns = match(found.inputs, inputs)
        clear = psnr(found.inputs[rows], inputs[columns]) > 40
        right += int((found.labels[rows] == labels[columns])[clear].sum())
        total += int(clear.sum())
    return right / total


# the imprint


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1_000), st.integers(1, 12), st.sampled_from([(64,), (48, 16), (40, 12, 8)]))
def test_every_record_in_a_bin_of_its_own_comes_back(
    seed: int, num_records: int, hidden: tuple[int, ...]
) -> None:
    task = digits(2, model=MLP(hidden), per_client=num_records, seed=seed)
    start = task.model.initial(RANDOM.at("start"))
    sent = Imprint()(start, model=task.model, public=task.public)
    named = task.model.layout.split(sent)
    inputs = task.clients[0][0]
    woken = (inputs.flatten(1) @ named["1.weight"].T + named["1.bias"] > 0).sum(dim=1)
    alone = [int((woken == w).sum()) == 1 for w in woken.tolist()]
    message = STEP(task.model, sent, task.clients[0], rng=RANDOM.at("train"))
    view = ServerView(0, task.model, (0,), (message,), sent=(sent,))
    (found,) = ROBBING(view, victims=(0,), population=task.population)
    for image, own in zip(inputs, alone, strict=True):
        if own:
            assert float((found.inputs - image).abs().flatten(1).max(dim=1).values.min()) < 1e-2


@pytest.mark.parametrize("model", [MLP((256,)), MLP((256, 64)), LeNet5()])
def test_a_batch_of_sixteen_is_robbed_of_nearly_all_its_records(model: Any) -> None:
    task = digits(4, model=model, per_client=16)
    guess, mark = played(task, ROBBING)
    assert recovered(guess, task) > 0.8
    assert labelled(guess, task) > 0.95
    assert mark.headline.beats_baseline and mark.headline.value > 60


def test_more_bins_rob_more() -> None:
    task = digits(2, model=MLP((256,)), per_client=32)
    few, many = (
        recovered(played(task, RobbingTheFed(server=Imprint(num_bins=n)))[0], task)
        for n in (16, 256)
    )
    assert few + 0.3 < many


def test_an_honest_state_has_no_bins_to_read() -> None:
    task = digits(4, model=MLP((24,)), per_client=16)
    lied, honest = (recovered(played(task, ROBBING, honest=h)[0], task) for h in (False, True))
    assert lied > 0.3 and honest < 0.05


# secure aggregation


def test_secure_aggregation_does_not_help_against_a_malicious_server() -> None:
    task = digits(8, model=MLP((800,)), per_client=8)
    guess, mark = played(task, ROBBING, channel=SecureAggregation())
    assert recovered(guess, task) > 0.6
    assert labelled(guess, task) > 0.9
    assert mark.headline.beats_baseline


def test_it_blocks_whoever_needs_single_updates_and_hides_all_but_a_few_from_a_watcher() -> None:
    task = digits(8, model=MLP((800,)), per_client=8)
    federation: Any = Federation(train=STEP, channel=SecureAggregation(), aggregate=Mean())
    watching: Trial[Any] = Trial(InvertingGradients(), Reconstruct())
    assert watching.seats(federation) == []
    guess, mark = played(task, LinearLayer(num_images=8), channel=SecureAggregation())
    assert recovered(guess, task) < 0.1  # units that one record of the whole cohort woke
    assert not mark.headline.beats_baseline


def test_a_curious_client_cannot_play_the_server() -> None:
    plain: Any = Federation(train=STEP, channel=Plain(), aggregate=Mean())
    among: Any = Federation(train=STEP, channel=Plain(), aggregate=Mean(), graph=Ring())
    assert Trial(ROBBING, Reconstruct()).seats(plain) == [Seat.SERVER]
    assert Trial(ROBBING, Reconstruct()).seats(among) == []


def test_a_server_that_sends_all_others_a_dead_layer_reads_its_victim_in_the_sum() -> None:
    task = digits(6, model=MLP((200,)), per_client=8)
    server = ModelInconsistency(victim=2)
    guess, _ = played(task, RobbingTheFed(server=server), channel=SecureAggregation())
    (rows, columns) = match(guess[2].inputs, task.clients[2][0])
    assert (
        float((psnr(guess[2].inputs[rows], task.clients[2][0][columns]) > 40).float().mean()) > 0.7
    )
    others = [i for i in range(6) if i != 2]
    assert all(
        float(psnr(guess[i].inputs[rows], task.clients[i][0][columns]).max()) < 40
        for i in others
        for rows, columns in [match(guess[i].inputs, task.clients[i][0])]
    )


def test_a_client_that_was_sent_a_dead_layer_gives_no_more_than_the_mean_image() -> None:
    task = digits(2, model=MLP((64,)), per_client=4)
    guess, _ = played(task, RobbingTheFed(server=ModelInconsistency(victim=0)))
    assert torch.equal(guess[1].inputs, task.population[0].mean(dim=0, keepdim=True))


def test_what_all_others_get_moves_nothing_up_to_the_layer() -> None:
    task = digits(2, per_client=4)
    start = task.model.initial(RANDOM.at("start"))
    sent = ModelInconsistency(victim=0)(
        start, model=task.model, public=task.public, envelope=Envelope(1, (0, 1), 0)
    )
    named = task.model.layout.split(task.model.gradient(sent, task.clients[1]))
    names = list(named)
    moved = [n for n in names if bool(named[n].any())]
    assert moved == [names[-1]]  # the last bias


# what stops it


@pytest.mark.parametrize("channel", [Plain(), SecureAggregation()])
def test_noise_on_clipped_gradients_stops_it(channel: Any) -> None:
    task = digits(4, model=MLP((128,)), per_client=8)
    train = DPSGD(0.1, 1.0, 8, noise_multiplier=1.0, num_epochs=1)
    guess, mark = played(task, ROBBING, train=train, channel=channel)
    assert recovered(guess, task, above=20.0) == 0
    assert not mark.headline.beats_baseline


def test_clipping_an_update_alone_does_not_stop_it() -> None:
    task = digits(4, model=MLP((128,)), per_client=8)
    guess, _ = played(task, ROBBING, train=Clipped(0.1, STEP))
    assert recovered(guess, task) > 0.7


def test_local_steps_move_the_bins() -> None:
    task = digits(4, model=MLP((128,)), per_client=16)
    guess, _ = played(task, ROBBING, train=LocalSGD(0.1, num_epochs=2, batch_size=4))
    assert recovered(guess, task) < 0.2


def test_a_rule_that_is_no_mean_mixes_the_bins_of_the_sum() -> None:
    task = digits(5, model=MLP((400,)), per_client=4)
    federation: Any = Federation(train=STEP, channel=Plain(), aggregate=Median())
    server = ROBBING.server
    run = simulate(federation, task, num_rounds=1, seed=0, server=server, watch=[Watch(Any)])
    view = next(v for _, v in run.views if type(v).__name__ == "AggregateView")
    guess = ROBBING(view, victims=tuple(range(5)), population=task.population)
    assert recovered(guess, task) < 0.2


# what is sent


def test_the_state_that_is_sent_has_the_form_of_any_other() -> None:
    task = digits(2, per_client=4)
    start = task.model.initial(RANDOM.at("start"))
    before = start.clone()
    for server in (Imprint(), ClassFishing(target=3)):
        check(server, Broadcast)
        sent: Tensor = call(server, start, model=task.model, public=task.public)
        assert sent.shape == start.shape and bool(sent.isfinite().all())
        assert torch.equal(start, before) and not torch.equal(sent, start)


@pytest.mark.parametrize("num_classes", range(2, 12))
def test_no_class_has_the_mean_slope(num_classes: int) -> None:
    made = slopes(num_classes)
    assert len(set(made.tolist())) == num_classes
    assert abs(float(made.mean())) < 1e-6
    assert float(made.abs().min()) > 0.2 / num_classes


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (ConvNet((4,), (2,)), "needs a linear layer with a ReLU behind it"),
        (MLP(()), "needs a linear layer with a ReLU behind it"),
        (MLP((32,), "tanh"), "needs a linear layer with a ReLU behind it"),
        (ResNet(8, 8, 4), "needs a linear layer with a ReLU behind it"),
        (LeNet5("sigmoid"), "needs a linear layer with a ReLU behind it"),
        (MLP((16,), normalisation="group"), "needs a linear layer with a ReLU behind it"),
        (MLP((16,), dropout=0.3), r"finds its way barred: layer '3' is Dropout\(p=0.3"),
        (Branching(), "layer 'out' reads more than layer 'first' gives"),
        (MaxPooled(), "here it bends, as max-pooling"),
    ],
)
def test_a_model_that_cannot_be_imprinted_is_named_with_a_cure(model: Any, said: str) -> None:
    task = digits(1, model=model, per_client=2)
    start = task.model.initial(RANDOM.at("start"))
    with pytest.raises(ValueError, match=f"{said}.*choose an mlp or lenet5"):
        Imprint()(start, model=task.model, public=task.public)


def test_without_public_records_there_is_nothing_to_place_bins_by() -> None:
    task = digits(1, per_client=2)
    start = task.model.initial(RANDOM.at("start"))
    for server in (Imprint(), ClassFishing(target=1)):
        with pytest.raises(ValueError, match="give the task a public_size"):
            server(start, model=task.model, public=None)


def test_a_broadcast_is_offered_the_public_records_once_for_all() -> None:
    task = digits(3, model=MLP((64,)), per_client=4)
    federation: Any = Federation(train=STEP, channel=Plain(), aggregate=Mean(), broadcast=Imprint())
    run = simulate(federation, task, num_rounds=1, seed=0, watch=[Watch(ServerView[Update])])
    (view,) = run.seen(ServerView[Update])
    assert view.sent[0] is view.sent[1] is view.sent[2]
    assert federation.broadcast != Same()


# fishing


def fishable(task: Task, target: int) -> int:
    """Return a client that holds just one record of the class."""
    return next(i for i, (_, y) in enumerate(task.clients) if int((y == target).sum()) == 1)


def test_one_record_of_a_class_speaks_for_the_whole_batch() -> None:
    task = digits(6, model=MLP((64,)), per_client=16)
    for target in (1, 4):
        victim = fishable(task, target)
        guess, _ = played(task, Fishing(server=ClassFishing(target=target)))
        inputs, labels = task.clients[victim]
        assert float(psnr(guess[victim].inputs, inputs[labels == target])) > 60
        assert guess[victim].labels.tolist() == [target]


def test_the_fished_update_is_that_of_the_record_alone() -> None:
    """Oracle: a step on the record alone."""
    task = digits(6, model=LeNet5("tanh"), per_client=8)
    target = 2
    inputs, labels = task.clients[fishable(task, target)]
    seen: list[Any] = []

    class Spy:
        def __call__(self, view: ServerView[Update], **asked: Any) -> Any:
            seen.append(view)
            return InvertingGradients(num_steps=1)(view, **asked)

    server = ClassFishing(target=target)
    start = task.model.initial(RANDOM.at("start"))
    sent = server(start, model=task.model, public=task.public)
    message = STEP(task.model, sent, (inputs, labels), rng=RANDOM.at("train"))
    view = ServerView(0, task.model, (0,), (message,), sent=(sent,))
    call(
        Fishing(server=server, reads=Spy()),
        view,
        victims=(0,),
        population=task.population,
        rng=RANDOM.at("attack"),
    )
    own = (inputs[labels == target], labels[labels == target])
    due = STEP(task.model, sent, own, rng=RANDOM.at("train")).delta
    off = seen[0].messages[0].delta - due
    assert float(off.norm() / due.norm()) < 1e-3


def test_a_fished_record_of_a_convolutional_net_is_inverted_as_if_alone() -> None:
    task = digits(6, model=LeNet5("tanh"), per_client=8)
    victim = fishable(task, 2)
    inputs, labels = task.clients[victim]
    brief = InvertingGradients(num_steps=200, tv_weight=1e-5, num_images=1)
    server = ClassFishing(target=2)
    start = task.model.initial(RANDOM.at("start"))
    sent = server(start, model=task.model, public=task.public)
    asked = {"victims": (0,), "population": task.population}
    worth = []
    for state, attack in ((sent, Fishing(server=server, reads=brief)), (start, brief)):
        message = STEP(task.model, state, (inputs, labels), rng=RANDOM.at("train"))
        view = ServerView(0, task.model, (0,), (message,), sent=(state,))
        (found,) = call(attack, view, rng=RANDOM.at("attack"), **asked)
        worth.append(float(psnr(found.inputs, inputs[labels == 2])))
    fished, honest = worth
    assert fished > 30 > honest


def test_fishing_reads_the_one_record_of_a_class_in_a_whole_cohort() -> None:
    task = digits(4, model=MLP((64,)), per_client=4)
    counts = torch.stack([torch.bincount(y, minlength=10) for _, y in task.clients]).sum(dim=0)
    target = int((counts == 1).nonzero()[0])
    victim = fishable(task, target)
    guess, _ = played(
        task, Fishing(server=ClassFishing(target=target)), channel=SecureAggregation()
    )
    inputs, labels = task.clients[victim]
    assert float(psnr(guess[victim].inputs, inputs[labels == target])) > 40


def test_fishing_is_refused_where_the_class_or_the_layer_is_missing() -> None:
    task = digits(1, model=MLP((16,)), per_client=2)
    start = task.model.initial(RANDOM.at("start"))
    with pytest.raises(ValueError, match="target is 12, but the classes are 0 to 9"):
        ClassFishing(target=12)(start, model=task.model, public=task.public)


# from a file


AUDIT = """
title = "a malicious server"
rounds = 1
seeds = 1
defences = ["none", "secure aggregation"]

[task]
use = "digits"
num_clients = 3
per_client = 4
model = { use = "mlp", hidden = [64] }

[federation]
train = { use = "fed-sgd", lr = 0.1 }
channel = "plain"
aggregate = "mean"

[attack.robbed]
use = "robbing-the-fed"
server = { use = "imprint", num_bins = 64 }

[attack.fished]
use = "fishing"
server = { use = "class-fishing", target = 3 }
reads = { use = "linear-layer", num_images = 1 }

[attack.alone]
use = "robbing-the-fed"
server = { use = "model-inconsistency", victim = 1, inner = "imprint" }

[defence."secure aggregation"]
channel = "secure-aggregation"
"""


def test_a_file_can_name_a_malicious_server(tmp_path: Path) -> None:
    file = tmp_path / "audit.toml"
    file.write_text(AUDIT)
    audit = load(file)
    robbed, fished, alone = (audit.entries[n].trial for n in ("robbed", "fished", "alone"))
    assert robbed.server == Imprint(num_bins=64)
    assert fished.server == ClassFishing(target=3)
    assert alone.server == ModelInconsistency(victim=1)

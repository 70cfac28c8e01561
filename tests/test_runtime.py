"""Whole runs: the same bits however they are computed, and what is survived (theorem, sabotage)."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from turncoat.coalition import Clients, Coalition, Every, Once, Pool
from turncoat.federation import Federation, FixedSample, FractionSample, Plain, PoissonSample
from turncoat.messages import Clear, Summable, Update
from turncoat.randomness import Randomness
from turncoat.runtimes.pool import become_worker, context
from turncoat.runtimes.saved import State, Unreadable, read_state, write_state
from turncoat.runtimes.seat import AttackBroke
from turncoat.runtimes.simulate import TooFewClients, Watch, simulate
from turncoat.stage import Aggregate, Memory, call
from turncoat.stages.aggregate.krum import Krum
from turncoat.stages.aggregate.mean import Mean
from turncoat.stages.aggregate.optimisers import ServerMomentum
from turncoat.stages.channel.secure_aggregation import SecureAggregation
from turncoat.stages.train.local import Clipped, FedSGD, LocalSGD
from turncoat.task import Batch, Model, Shards, Task
from turncoat.views import AggregateView, CoalitionView, ServerView

SGD = LocalSGD(0.5, num_steps=4, batch_size=32)
MEAN = Federation(train=SGD, channel=Plain(), aggregate=Mean())


@dataclass(frozen=True)
class WorkerMomentum:
    """A train stage that remembers, for the tests of memory."""

    beta: float
    inner: LocalSGD = SGD

    def __call__(
        self,
        model: Model,
        start: Tensor,
        data: Batch,
        *,
        memory: Memory[Tensor],
        rng: Generator,
    ) -> Update:
        payload = self.inner(model, start, data, rng=rng)
        mean = self.beta * memory.last(payload.delta) + (1 - self.beta) * payload.delta
        return replace(payload, delta=memory.keep(mean))


REMEMBERING = Federation(
    train=WorkerMomentum(0.5),
    channel=SecureAggregation(),
    aggregate=ServerMomentum(0.5, inner=Mean()),
    sample=FixedSample(5),
)


def dropping() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Dropout(0.5), nn.Linear(32, 10))


def normed() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10)
    )


def accuracy(run: Any) -> float:
    logits = run.task.model.logits(run.state.params, run.task.test[0])
    return float((logits.argmax(1) == run.task.test[1]).float().mean())


def same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    return bool(first == second)


@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.parametrize("fed", [REMEMBERING, replace(MEAN, sample=FractionSample(0.6))])
def test_two_processes_give_the_bits_of_one(
    task: Task, start: str, fed: Federation[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TURNCOAT_START", start)
    task = replace(task, model=Model(dropping))
    one = simulate(fed, task, num_rounds=3, seed=1)
    two = simulate(fed, task, num_rounds=3, seed=1, num_processes=2)
    assert torch.equal(one.state.params, two.state.params)
    assert one.state.memory.keys() == two.state.memory.keys()
    for role, memory in one.state.memory.items():
        assert same(memory, two.state.memory[role])


def test_a_run_that_was_saved_and_resumed_has_the_bits_of_a_whole_one(
    task: Task, tmp_path: Path
) -> None:
    whole = simulate(REMEMBERING, task, num_rounds=4, seed=2)
    half = simulate(REMEMBERING, task, num_rounds=4, until=2, seed=2)
    write_state(tmp_path / "half.safetensors", half.state, {"note": 1})
    state, about = read_state(tmp_path / "half.safetensors")
    rest = simulate(REMEMBERING, task, num_rounds=4, seed=2, state=state)
    assert torch.equal(whole.state.params, rest.state.params) and about == {"note": 1}


def test_every_value_a_memory_may_hold_survives_the_disk(tmp_path: Path) -> None:
    kept = {"": (1, 2.5, None, [True, "x"]), "/inner": {3: torch.arange(4), "k": (torch.ones(2),)}}
    state = State(7, torch.rand(5), {("aggregate", -1): kept})
    write_state(tmp_path / "s.safetensors", state)
    again, _ = read_state(tmp_path / "s.safetensors")
    cell = again.memory["aggregate", -1]
    assert again.round == 7 and torch.equal(again.params, state.params)
    assert cell[""] == kept[""] and torch.equal(cell["/inner"][3], torch.arange(4))
    assert isinstance(cell["/inner"]["k"], tuple)


def test_what_cannot_be_saved_or_read_says_so(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"keeps .* which cannot be saved: keep tensors"):
        write_state(tmp_path / "x.safetensors", State(0, torch.ones(1), {("a", 0): {"": object()}}))
    (tmp_path / "y.safetensors").write_bytes(b"half a file")
    with pytest.raises(Unreadable, match="delete it, and it is made again"):
        read_state(tmp_path / "y.safetensors")


def test_watching_changes_nothing_and_keeps_only_what_is_asked(task: Task) -> None:
    blind = simulate(MEAN, task, num_rounds=2, seed=0)
    seen = simulate(MEAN, task, num_rounds=2, seed=0, watch=[Watch(ServerView[Update])])
    assert torch.equal(blind.state.params, seen.state.params) and not blind.views
    first, second = seen.seen(ServerView[Clear])
    assert not torch.equal(first.messages[0].delta, second.messages[0].delta)
    assert not seen.seen(AggregateView[Update])


@dataclass(frozen=True)
class Hoarding:
    """The mean, but of messages that it holds all at once."""

    def __call__(self, messages: Sequence[Summable]) -> Tensor | Summable:
        return Mean()(list(messages))


@dataclass(frozen=True)
class Counting:
    """Notes how many messages were alive at once, in a list that the test owns."""

    def __call__(self, messages: Iterable[Clear]) -> Tensor:
        assert not isinstance(messages, list | tuple)
        return Clear.total(messages).open()


def test_a_rule_that_streams_gives_the_bits_of_one_that_hoards(task: Task) -> None:
    streamed = simulate(MEAN, task, num_rounds=2, seed=0)
    hoarded = simulate(replace(MEAN, aggregate=Hoarding()), task, num_rounds=2, seed=0)
    assert torch.equal(streamed.state.params, hoarded.state.params)
    simulate(replace(MEAN, aggregate=Counting()), task, num_rounds=1, seed=0)


def test_a_long_stream_is_summed_right(task: Task) -> None:
    inputs, labels = task.test[0][:300], task.test[1][:300]
    many = replace(task, clients=Shards(inputs, labels, tuple(range(0, 301, 2))))
    step = replace(MEAN, train=FedSGD(0.5))
    streamed = simulate(step, many, num_rounds=1, seed=0)
    hoarded = simulate(replace(step, aggregate=Hoarding()), many, num_rounds=1, seed=0)
    assert torch.equal(streamed.state.params, hoarded.state.params)
    start = task.model.initial(Randomness(0).at("begin"))
    right = start - 0.5 * task.model.gradient(start, (inputs, labels))
    torch.testing.assert_close(streamed.state.params, right, atol=1e-6, rtol=0)


@dataclass(frozen=True)
class Impatient:
    """Reads only the first few messages of a round."""

    def __call__(self, messages: Iterable[Clear]) -> Tensor:
        return Clear.total(islice(messages, 3)).open()


def test_a_rule_that_stops_reading_leaves_nothing_behind_for_the_next_round(task: Task) -> None:
    inputs, labels = task.test[0][:400], task.test[1][:400]
    many = replace(task, clients=Shards(inputs, labels, tuple(range(0, 401, 2))))
    fed = replace(MEAN, aggregate=Impatient())
    one, two = (simulate(fed, many, num_rounds=3, seed=0, num_processes=n) for n in (1, 2))
    assert torch.equal(one.state.params, two.state.params)


def test_more_clients_than_there_are_rows_give_the_bits_of_one_process(task: Task) -> None:
    inputs, labels = task.test[0][:400], task.test[1][:400]
    many = replace(task, clients=Shards(inputs, labels, tuple(range(0, 401, 2))))
    one, two = (simulate(MEAN, many, num_rounds=2, seed=0, num_processes=n) for n in (1, 2))
    assert torch.equal(one.state.params, two.state.params)


def test_fedsgd_is_one_step_along_the_gradient(task: Task) -> None:
    run = simulate(replace(MEAN, train=FedSGD(0.3)), task, num_rounds=1, seed=0)
    start = task.model.initial(Randomness(0).at("begin"))
    inputs = torch.cat([x for x, _ in task.clients])
    labels = torch.cat([y for _, y in task.clients])
    step = start - 0.3 * task.model.gradient(start, (inputs, labels))
    torch.testing.assert_close(run.state.params, step, atol=1e-6, rtol=0)


def test_momentum_and_weight_decay_are_those_of_pytorch(task: Task) -> None:
    stage = LocalSGD(0.1, num_epochs=2, batch_size=50, momentum=0.9, weight_decay=0.01)
    start = task.model.initial(Randomness(3).at("x"))
    data = task.clients[0]
    mine = stage(task.model, start, data, rng=Randomness(0).at("r")).delta + start
    module, rng = task.model.build(), Randomness(0).at("r")
    nn.utils.vector_to_parameters(start.clone(), module.parameters())
    optimiser = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for _ in range(2):
        for chosen in torch.split(torch.randperm(len(data[1]), generator=rng), 50):
            optimiser.zero_grad()
            loss = nn.functional.cross_entropy(module(data[0][chosen]), data[1][chosen])
            torch.autograd.backward(loss)
            optimiser.step()
    theirs = nn.utils.parameters_to_vector(module.parameters())
    torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=0)


def test_running_statistics_travel(task: Task) -> None:
    model = Model(normed)
    run = simulate(MEAN, replace(task, model=model), num_rounds=2, seed=0)
    after = model.layout.split(run.state.params)
    assert float(after["2.num_batches_tracked"]) == 8
    assert float(after["2.running_var"].std()) > 0


def test_a_learner_gives_the_module_back_unharmed(task: Task) -> None:
    start = task.model.initial(Randomness(0).at("x"))
    before = task.model.gradient(start, task.test)
    SGD(task.model, start, task.clients[0], rng=Randomness(0).at("r"))
    assert torch.equal(before, task.model.gradient(start, task.test))
    assert all(p.grad is None for p in task.model.module.parameters())


def test_honest_clients_learn(task: Task) -> None:
    assert accuracy(simulate(MEAN, task, num_rounds=15, seed=0)) > 0.85


@dataclass(frozen=True)
class Faulty:
    """A training that goes wrong at some clients, in one of the ways there are."""

    how: str
    clients: tuple[int, ...] = (2,)

    def __call__(
        self, model: Model, start: Tensor, data: Batch, *, rng: Generator, envelope: Any
    ) -> Update:
        sent = SGD(model, start, data, rng=rng)
        if envelope.sender not in self.clients:
            return sent
        if self.how == "raise":
            raise OSError("the scanner is offline")
        wrong = {
            "nan": replace(sent, delta=sent.delta * float("nan")),
            "shape": replace(sent, delta=sent.delta[:-1]),
            "negative": replace(sent, weight=-1.0),
            "nought": replace(sent, weight=0.0),
            "infinite": replace(sent, weight=float("inf")),
        }
        return wrong[self.how]


FAULTS = {
    "raise": "raised OSError: the scanner is offline",
    "nan": "sent NaN or infinity",
    "shape": "sent shape",
    "negative": "claimed the weight -1.0",
    "nought": "claimed the weight 0.0",
    "infinite": "claimed the weight inf",
}


@pytest.mark.parametrize("how", FAULTS)
@pytest.mark.parametrize("processes", [1, 2])
def test_a_faulty_client_is_left_out_and_reported(task: Task, how: str, processes: int) -> None:
    fed = replace(MEAN, train=Faulty(how))
    run = simulate(fed, task, num_rounds=2, seed=0, num_processes=processes)
    assert torch.isfinite(run.state.params).all()
    for played in run.log:
        (incident,) = played.incidents
        assert incident.client == 2 and FAULTS[how] in incident.what and not played.aborted
    rest = replace(task, clients=[d for c, d in enumerate(task.clients) if c != 2])
    assert accuracy(run) > 0.3 and len(rest.clients) == 7


@pytest.mark.parametrize("how", ["raise", "nan"])
def test_under_masks_a_dropout_aborts_the_round_and_is_said_to(task: Task, how: str) -> None:
    fed = Federation(train=Faulty(how), channel=SecureAggregation(), aggregate=Mean())
    run = simulate(fed, task, num_rounds=1, seed=0)
    start = task.model.initial(Randomness(0).at("begin"))
    assert run.log[0].aborted and torch.equal(run.state.params, start)
    assert "does not recover from dropouts" in run.log[0].incidents[-1].what


def test_masks_that_recover_give_the_mean_of_the_survivors(task: Task) -> None:
    channel = SecureAggregation(recovers_from=5)
    masked = Federation(train=Faulty("nan"), channel=channel, aggregate=Mean())
    clear = replace(MEAN, train=Faulty("nan"))
    first, second = (simulate(f, task, num_rounds=1, seed=0) for f in (masked, clear))
    torch.testing.assert_close(first.state.params, second.state.params, atol=1e-5, rtol=0)
    fewer = replace(masked, train=Faulty("nan", (0, 1, 2, 3)))
    assert simulate(fewer, task, num_rounds=1, seed=0).log[0].aborted


def test_a_round_with_too_few_is_an_error_that_says_so(task: Task) -> None:
    fed = replace(MEAN, train=Faulty("raise", tuple(range(8))))
    with pytest.raises(TooFewClients, match=r"round 0: 0 of 8 clients .*\(client 0 raised OSError"):
        simulate(fed, task, num_rounds=1, seed=0)
    fed = replace(MEAN, train=Faulty("nan", (0, 1)), min_clients=7)
    with pytest.raises(TooFewClients, match=r"6 of 8 clients .*7 are needed"):
        simulate(fed, task, num_rounds=1, seed=0)


def test_without_a_least_number_a_round_of_nobody_is_aborted_and_told(task: Task) -> None:
    fed = replace(MEAN, train=Faulty("nan", tuple(range(8))), min_clients=0)
    run = simulate(fed, task, num_rounds=2, seed=0)
    assert [p.aborted for p in run.log] == [True, True]
    assert run.log[0].incidents[-1].what.startswith("nobody sent a sound message")


def test_a_huge_claim_is_capped(task: Task) -> None:
    @dataclass(frozen=True)
    class Greedy:
        def __call__(self, view: CoalitionView[Update]) -> Sequence[Update]:
            return [replace(p, weight=1e12) for p in view.own]

    coalition: Coalition[Update] = Coalition(members=Clients((0,)), forge=Greedy())
    run = simulate(
        MEAN, task, num_rounds=1, seed=0, coalition=coalition, watch=[Watch(ServerView[Update])]
    )
    view = run.seen(ServerView[Update])[0]
    own, step = view.messages[0].delta, run.state.params - view.sent[0]
    assert float((step - own).norm()) > 0.2 * float(own.norm())


@dataclass(frozen=True)
class Forging:
    value: float

    def __call__(self, view: CoalitionView[Update]) -> Sequence[Update]:
        return [replace(p, delta=torch.full_like(p.delta, self.value)) for p in view.own]


def test_a_traitors_nan_is_left_out_too(task: Task) -> None:
    coalition: Coalition[Update] = Coalition(members=Clients((0, 3)), forge=Forging(float("nan")))
    run = simulate(MEAN, task, num_rounds=1, seed=0, coalition=coalition)
    assert [i.client for i in run.log[0].incidents] == [0, 3]
    assert torch.isfinite(run.state.params).all()


@dataclass(frozen=True)
class Overflowing:
    """The mean, but for one round in which it is infinite."""

    bad: int

    def __call__(self, messages: Sequence[Clear], *, memory: Memory[int]) -> Tensor:
        mean = Clear.total(messages).open()
        return mean * float("inf") if memory.keep(memory.last(0) + 1) == self.bad else mean


def test_a_step_that_is_not_finite_is_forgotten_with_its_memory(task: Task) -> None:
    rule = ServerMomentum(0.5, inner=Overflowing(2))
    run = simulate(replace(MEAN, aggregate=rule), task, num_rounds=3, seed=0)
    assert [p.aborted for p in run.log] == [False, True, True]  # nor is the count of calls kept
    first = simulate(replace(MEAN, aggregate=rule), task, num_rounds=1, seed=0)
    assert torch.equal(run.state.params, first.state.params)
    assert same(dict(run.state.memory["aggregate", -1]), dict(first.state.memory["aggregate", -1]))
    assert "not finite" in run.log[1].incidents[-1].what


def test_an_attack_that_breaks_is_no_success_of_a_defence(task: Task) -> None:
    coalition: Coalition[Update] = Coalition(members=Clients((2,)), train=Faulty("raise"))
    with pytest.raises(AttackBroke, match="client 2's attack raised OSError"):
        simulate(MEAN, task, num_rounds=1, seed=0, coalition=coalition)


def test_a_coalition_acts_when_its_schedule_says(task: Task) -> None:
    quiet = simulate(MEAN, task, num_rounds=1, seed=0)
    once: Coalition[Update] = Coalition(members=Clients((0,)), acts=Once(1), forge=Forging(9.0))
    first = simulate(MEAN, task, num_rounds=1, seed=0, coalition=once)
    later = simulate(MEAN, task, num_rounds=2, seed=0, coalition=once)
    clean = simulate(MEAN, task, num_rounds=2, seed=0)
    assert torch.equal(quiet.state.params, first.state.params)
    assert not torch.equal(clean.state.params, later.state.params)
    assert [r for r in range(7) if Every(3, 1)(r)] == [1, 4]


def test_traitors_that_rest_keep_two_memories(task: Task) -> None:
    fed = replace(MEAN, train=WorkerMomentum(0.9))
    now_and_then: Coalition[Update] = Coalition(
        members=Clients((0,)), acts=Every(2), train=WorkerMomentum(0.1)
    )
    memory = simulate(fed, task, num_rounds=2, seed=0, coalition=now_and_then).state.memory
    assert not same(memory["train", 0], memory["worn train", 0])


def test_a_pool_is_drawn_once_or_anew() -> None:
    once, anew = Pool(0.2), Pool(0.2, anew=True)
    rounds = range(6)
    assert len({once(50, r, Randomness(0)) for r in rounds}) == 1
    assert len({anew(50, r, Randomness(0)) for r in rounds}) == 6
    assert len(once(50, 0, Randomness(0))) == 10


@pytest.mark.parametrize(
    ("members", "said"),
    [
        (Clients(tuple(range(8))), "is everyone: 8 of 8 clients"),
        (Clients((8,)), "names client 8, but there are 8 clients, 0 to 7"),
        (Pool(0.01), "is nobody: raise the fraction"),
    ],
)
def test_an_impossible_coalition_is_refused(task: Task, members: Any, said: str) -> None:
    coalition: Coalition[Update] = Coalition(members=members, forge=Forging(1.0))
    with pytest.raises(ValueError, match=said):
        simulate(MEAN, task, num_rounds=1, seed=0, coalition=coalition)


def test_nobody_sampled_leaves_the_state_as_it_is(task: Task) -> None:
    fed = replace(MEAN, sample=PoissonSample(0.0))
    run = simulate(fed, task, num_rounds=2, seed=0)
    assert torch.equal(run.state.params, task.model.initial(Randomness(0).at("begin")))


def test_courtesy_clipping_shortens_the_update(task: Task) -> None:
    start = task.model.initial(Randomness(0).at("x"))
    sent = Clipped(0.01, SGD)(task.model, start, task.clients[0], rng=Randomness(0).at("r"))
    assert float(sent.delta.norm()) == pytest.approx(0.01, rel=1e-4)


def test_a_rule_below_its_bound_is_refused_in_words(task: Task) -> None:
    rule: Aggregate[Clear] = Krum(num_byzantine=3)
    with pytest.raises(ValueError, match=r"needs at least 9 .*the cohort has 8"):
        simulate(replace(MEAN, aggregate=rule), task, num_rounds=1, seed=0)


def test_bytes_are_counted(task: Task) -> None:
    size = task.model.layout.num_params
    clear = simulate(MEAN, task, num_rounds=1, seed=0).log[0]
    assert clear.bytes_up == 4 * size + 8 and clear.bytes_down == 4 * size
    hidden = simulate(replace(REMEMBERING), task, num_rounds=1, seed=0).log[0]
    assert hidden.bytes_up >= 8 * size


def test_offers_reach_only_who_asks() -> None:
    def plain(messages: Sequence[Clear]) -> Tensor:
        return messages[0].delta

    assert float(call(plain, [Clear(torch.ones(1), 1.0)], memory=None, rng=None)) == 1


def struck_at_birth() -> None:
    """Be interrupted before, and after, one is told to ignore it."""
    os.kill(os.getpid(), signal.SIGINT)
    become_worker()
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_worker_is_deaf_to_interruption_from_its_first_moment() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    child: Any = context().Process(target=struck_at_birth)  # type: ignore[attr-defined]
    child.start()
    child.join(30)
    assert child.exitcode == 0
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before

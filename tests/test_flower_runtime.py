"""The same bits over Flower, and nothing that a node does goes unseen (theorem, sabotage).

A federation is played by `simulate` and by Flower in this process and on Ray; then nodes of an
in-process Grid misbehave, one kind at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from turncoat.attacks.poisoning.alie import ALIE
from turncoat.attacks.poisoning.label_flip import LabelFlip
from turncoat.attacks.poisoning.sign_flip import SignFlip
from turncoat.brought import import_file
from turncoat.cli import app
from turncoat.coalition import Clients, Coalition
from turncoat.config import load
from turncoat.federation import Federation, FractionSample, Plain
from turncoat.messages import Clear, Update
from turncoat.runtimes.saved import read_state, write_state
from turncoat.runtimes.seat import AttackBroke, Seats
from turncoat.runtimes.simulate import Run, TooFewClients, Watch, simulate
from turncoat.stages.aggregate.coordinatewise import Median
from turncoat.stages.aggregate.krum import MultiKrum
from turncoat.stages.aggregate.mean import Mean
from turncoat.stages.aggregate.optimisers import ServerMomentum
from turncoat.stages.channel.secure_aggregation import Masked, SecureAggregation
from turncoat.stages.train.dpsgd import DPSGD
from turncoat.stages.train.local import LocalSGD
from turncoat.task import Batch, Model, Task
from turncoat.tasks.bundled import digits
from turncoat.tasks.models import MLP
from turncoat.views import ClientView, ServerView

flwr = pytest.importorskip("flwr", reason="the extra 'flower' is not installed")

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict  # noqa: E402

from tests.test_runtime import REMEMBERING, WorkerMomentum, same  # noqa: E402
from turncoat.flower.grid import InProcessGrid  # noqa: E402
from turncoat.runtimes.flower import engines  # noqa: E402
from turncoat.runtimes.flower.export import export  # noqa: E402
from turncoat.runtimes.flower.node import client_app  # noqa: E402
from turncoat.runtimes.flower.nodes import Nodes, NoNodes, Patience  # noqa: E402
from turncoat.runtimes.flower.wire import Unfit, read, write  # noqa: E402

deploy: Any = import_file(Path(__file__).parents[1] / "examples" / "deployment" / "deploy.py")
SGD = LocalSGD(0.5, num_steps=3, batch_size=16)
MEAN = Federation(train=SGD, channel=Plain(), aggregate=Mean())
MASKED = Federation(train=SGD, channel=SecureAggregation(), aggregate=Mean())
BRIEF = Patience(0.2, 0.2)
TWO: Any = Clients((1, 4))


@pytest.fixture(scope="module", autouse=True)
def only_here() -> Any:
    """Refuse, in this whole file, every connection that leaves the machine."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"something connects to {address}")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded)
        yield


@pytest.fixture(scope="module")
def task() -> Task:
    return digits(8, model=MLP((16,)), per_client=40)


FEDERATIONS: dict[str, tuple[Federation[Any, Any], Coalition[Any] | None]] = {
    "plain": (MEAN, None),
    "remembering, masked, sampled": (REMEMBERING, None),
    "DP, Multi-Krum, ALIE": (
        Federation(
            train=DPSGD(0.3, 1.0, 16, noise_multiplier=0.5, num_steps=2),
            channel=Plain(),
            aggregate=MultiKrum(num_byzantine=2),
        ),
        Coalition(members=TWO, forge=ALIE(z=1.5), knows_honest=True),
    ),
    "masked, sign-flip": (MASKED, Coalition(members=TWO, forge=SignFlip(3.0))),
    "masked, label-flip": (
        replace(MASKED, sample=FractionSample(0.7), aggregate=ServerMomentum(0.5, inner=Mean())),
        Coalition(members=TWO, prepare=LabelFlip(1, 7)),
    ),
    "worn training": (
        replace(MEAN, aggregate=Median()),
        Coalition(members=TWO, train=WorkerMomentum(0.5)),
    ),
}


@pytest.mark.parametrize("name", FEDERATIONS)
def test_flower_in_process_gives_the_bits_of_simulate(task: Task, name: str) -> None:
    federation, coalition = FEDERATIONS[name]
    options: Any = {"num_rounds": 3, "seed": 5, "coalition": coalition}
    there = simulate(federation, task, **options)
    here = engines.in_process(federation, task, **options)
    assert torch.equal(there.state.params, here.state.params)
    assert there.state.memory.keys() == here.state.memory.keys()
    for role, cell in there.state.memory.items():
        assert same(cell, here.state.memory[role])
    assert [p.cohort for p in there.log] == [p.cohort for p in here.log]
    assert [p.bytes_up for p in there.log] == [p.bytes_up for p in here.log]
    assert not any(p.incidents for p in here.log)


@pytest.mark.parametrize("need", [ServerView[Any], ClientView[Any]])
@pytest.mark.parametrize("federation", [MEAN, MASKED])
def test_the_views_of_a_round_are_the_same_over_flower(
    task: Task, need: Any, federation: Federation[Any, Any]
) -> None:
    options: Any = {"num_rounds": 2, "seed": 1, "watch": [Watch(need, frozenset({1}))]}
    there = simulate(federation, task, **options).seen(need)
    here = engines.in_process(federation, task, **options).seen(need)
    assert len(there) == len(here) > 0
    for a, b in zip(there, here, strict=True):
        if isinstance(a, ServerView):
            assert [m.weight for m in a.messages] == [m.weight for m in b.messages]
            pairs = zip(a.messages, b.messages, strict=True)
            assert all(torch.equal(_vector(m), _vector(n)) for m, n in pairs)
        else:
            assert a.client == b.client and torch.equal(a.mine.delta, b.mine.delta)


def test_a_run_goes_on_over_flower_where_it_stopped_elsewhere(task: Task, tmp_path: Path) -> None:
    whole = simulate(REMEMBERING, task, num_rounds=4, seed=2)
    half = engines.in_process(REMEMBERING, task, num_rounds=4, until=2, seed=2)
    write_state(tmp_path / "half.safetensors", half.state)
    state, _ = read_state(tmp_path / "half.safetensors")
    rest = engines.in_process(REMEMBERING, task, num_rounds=4, seed=2, state=state)
    assert torch.equal(whole.state.params, rest.state.params)


def test_memory_that_stays_at_the_nodes_gives_the_same_bits(task: Task) -> None:
    whole = simulate(REMEMBERING, task, num_rounds=4, seed=2)
    here = play(task, REMEMBERING, lambda app: InProcessGrid(app, 8), memory_stays=True, rounds=4)
    assert torch.equal(whole.state.params, here.state.params)
    assert {place for place, _ in here.state.memory} == {"aggregate"}


def test_the_server_sees_masked_messages_only(task: Task) -> None:
    grids = []

    def grid(app: Any) -> Any:
        grids.append(Listening(app, 8))
        return grids[0]

    play(task, MASKED, grid, coalition=Coalition(members=TWO, prepare=LabelFlip(1, 7)))
    heard = [read(reply.content) for reply in grids[0].heard if "round" in read(reply.content)]
    assert len(heard) == 16
    assert all("payload" not in reply for reply in heard)
    assert {reply["message"]["kind"].rpartition(":")[2] for reply in heard} == {"Masked"}


ON_RAY = """
import sys
from pathlib import Path
from turncoat.config import load
from turncoat.runtimes.flower.engines import on_ray
from turncoat.runtimes.simulate import simulate

if __name__ == "__main__":
    audit = load(Path(sys.argv[1]))
    coalition = audit.entries["alie"].trial.coalition
    for play in (simulate, on_ray):
        run = play(audit.federations["none"], audit.task, num_rounds=2, seed=0, coalition=coalition)
        print("sum", run.state.params.numpy().tobytes().hex()[:400], run.log[1].incidents)
"""


def test_flowers_simulation_on_ray_gives_the_bits_of_simulate(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    script = tmp_path / "on_ray.py"  # Ray leaves threads and sockets behind: a process of its own
    script.write_text(ON_RAY)
    file = Path(__file__).parents[1] / "benchmarks" / "flower.toml"
    done = subprocess.run(
        [sys.executable, str(script), str(file)], capture_output=True, text=True, timeout=300
    )
    sums = [line for line in done.stdout.splitlines() if line.startswith("sum")]
    assert len(sums) == 2 and sums[0] == sums[1] and sums[0].endswith("()"), done.stderr[-2000:]


def test_an_audit_has_the_same_cells_on_every_runtime(tmp_path: Path) -> None:
    file = tmp_path / "small.toml"
    file.write_text(SMALL)
    cells = []
    for runtime in ("simulate", "flower"):
        out = tmp_path / runtime
        done = CliRunner().invoke(
            app, ["audit", str(file), "--out", str(out), "--jobs", "1", "--runtime", runtime]
        )
        assert done.exit_code == 0, done.output
        lines = (out / "cells.jsonl").read_text().splitlines()
        cells.append([json.loads(line) | {"seconds": None} for line in lines])
    assert cells[0] == cells[1] and len(cells[0]) >= 2


SMALL = """
title = "small"
rounds = 2
[task]
use = "digits"
num_clients = 4
per_client = 20
model = { use = "mlp", hidden = [8] }
[federation]
train = { use = "local-sgd", lr = 0.5, num_epochs = 1, batch_size = 10 }
channel = "plain"
aggregate = "mean"
[coalition]
members = { use = "clients", ids = [1] }
[attack.sign-flip]
use = "sign-flip"
scale = 3.0
[attack.inverting-gradients]
use = "inverting-gradients"
num_steps = 2
at = 1
game = { use = "reconstruct", victim = 2 }
seats = ["server"]
"""


PASSIVE = SMALL[: SMALL.index("[coalition]")] + SMALL[SMALL.index("[attack.inverting") :]


def test_a_whole_audit_in_flowers_simulation_has_the_cells_of_simulate(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    file = tmp_path / "passive.toml"
    file.write_text(PASSIVE)
    cells = []
    for runtime in ("simulate", "flower-ray"):
        out = tmp_path / runtime
        options = [str(file), "--out", str(out), "--jobs", "2", "--runtime", runtime]
        main = "from turncoat.cli import main; main()"  # in a process of its own, as above
        command = [sys.executable, "-c", main, "audit", *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr
        lines = (out / "cells.jsonl").read_text().splitlines()
        cells.append([json.loads(line) | {"seconds": None} for line in lines])
    assert cells[0] == cells[1] and len(cells[0]) == 1


def test_an_exported_app_under_flwr_run_gives_the_bits_of_simulate(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    flwr_run, processes = Path(sys.executable).with_name("flwr"), Path("/proc")
    if not flwr_run.exists() or not processes.exists():
        pytest.skip("there is no flwr beside this Python, or no /proc to find what it leaves")
    file, made, home = tmp_path / "small.toml", tmp_path / "app", tmp_path / "home"
    file.write_text(SMALL)
    export(file, made)
    home.mkdir()
    (home / "config.toml").write_text('[superlink.local]\naddress = ":local:"\n')
    ports = ("FLWR_LOCAL_SUPERLINK_HTTP_API_PORT", "FLWR_LOCAL_CONTROL_API_PORT")
    own = {"FLWR_HOME": str(home), "PATH": f"{flwr_run.parent}:{os.environ['PATH']}"}
    with engines.shut_in():
        environment = {**os.environ, **engines.QUIET, **own}
        environment |= {name: str(deploy.free_port()) for name in ports}
    config = f'out="{tmp_path}" attack="sign-flip"'
    nodes = ["--federation-config", "num-supernodes=4", "--run-config", config]
    try:
        done = subprocess.run(
            [str(flwr_run), "run", str(made), "local", "--stream", *nodes],
            capture_output=True,
            text=True,
            timeout=240,
            env=environment,
        )
    finally:
        for left in processes.glob("[0-9]*/cmdline"):  # the SuperLink that `flwr run` leaves behind
            with suppress(OSError):
                if str(home) in left.read_text():
                    deploy.end(int(left.parent.name))
    record = json.loads((tmp_path / "run.json").read_text())
    audit = load(file)
    coalition = audit.entries["sign-flip"].trial.coalition
    run = simulate(audit.federations["none"], audit.task, num_rounds=2, seed=0, coalition=coalition)
    bits = hashlib.sha256(run.state.params.numpy().tobytes()).hexdigest()
    assert record["completed"] and record["sha256"] == bits, done.stdout + done.stderr
    assert not any(played["incidents"] for played in record["rounds"])


# What a node may do wrong


class Listening(InProcessGrid):
    """A grid that keeps what nodes answered, and lets a test come between."""

    def __init__(self, app: Any, num_nodes: int, meddle: Any = None) -> None:
        super().__init__(app, num_nodes)
        self.heard: list[Message] = []
        self.meddle = meddle or (lambda grid, replies: replies)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = list(super().pull_messages(message_ids))
        self.heard += replies
        return self.meddle(self, replies)  # type: ignore[no-any-return]


def play(
    task: Task,
    federation: Federation[Any, Any],
    grid: Callable[[Any], Any],
    *,
    rounds: int = 2,
    memory_stays: bool = False,
    coalition: Coalition[Any] | None = None,
    patience: Patience = BRIEF,
) -> Run:
    def engine(seats: Seats) -> Nodes:
        app = client_app(lambda context: seats)
        return Nodes(seats, grid(app), patience, memory_stays=memory_stays)

    return simulate(federation, task, num_rounds=rounds, seed=2, coalition=coalition, engine=engine)


def rewriting(change: Callable[[dict[str, Any]], Any], client: int = 3) -> Callable[[Any], Any]:
    """Return what makes a grid whose node ``client`` sends something else in the first round."""

    def meddle(grid: Any, replies: Sequence[Message]) -> list[Message]:
        found = []
        for reply in replies:
            value = read(reply.content) if reply.has_content() else {}
            if value.get("client") == client and value.get("round") == 0:
                value = change(value)
                reply.content = value if isinstance(value, RecordDict) else write(value)
            found.append(reply)
        return found

    return lambda app: Listening(app, 8, meddle)


def poisoned(**fields: Any) -> Callable[[dict[str, Any]], Any]:
    def change(value: dict[str, Any]) -> Any:
        value["message"]["fields"] |= fields
        return value

    return change


def _nan(like: int = 1210) -> Tensor:
    return torch.full((like,), torch.nan)


def _huge(value: dict[str, Any]) -> Any:
    array = Array("float32", (1 << 28,), "turncoat.raw", bytes(1 << 30))
    return RecordDict({"turncoat.arrays": ArrayRecord({"m0": array})})


def _pickle(value: dict[str, Any]) -> Any:
    array = Array("float32", (1,), "pickle", b"cos\nsystem\n(S'true'\ntR.")
    return RecordDict(
        {
            "turncoat.arrays": ArrayRecord({"m0": array}),
            "turncoat.json": ConfigRecord({"json": '{"tensor": "m0"}'}),
        }
    )


def _size(task: Task) -> int:
    return task.model.layout.num_params


FAULTS: dict[str, tuple[Callable[[Task], Callable[[dict[str, Any]], Any]], str]] = {
    "NaN": (lambda t: poisoned(delta=_nan(_size(t))), "sent NaN or infinity"),
    "another shape": (lambda t: poisoned(delta=torch.zeros(7)), "sent shape (7,) where"),
    "another type": (
        lambda t: poisoned(delta=torch.zeros(_size(t), dtype=torch.float64)),
        "sent torch.float64 where torch.float32 is due",
    ),
    "no tensor": (lambda t: poisoned(delta="zeros"), "sent str where"),
    "a negative weight": (lambda t: poisoned(weight=-1.0), "claimed the weight -1.0"),
    "a NaN weight": (lambda t: poisoned(weight=float("nan")), "claimed the weight nan"),
    "a weight in words": (lambda t: poisoned(weight="many"), "claimed the weight 'many'"),
    "another field": (lambda t: poisoned(extra=1), "that is none"),
    "a gigabyte": (lambda t: _huge, "sent 1,073,741,824 bytes where at most"),
    "a pickle": (lambda t: _pickle, "sent an array of the type 'pickle'"),
    "nothing": (lambda t: lambda value: RecordDict(), "sent what cannot be read"),
    "an unknown kind": (
        lambda t: lambda v: v | {"message": {"kind": "os:system", "fields": {}}},
        "sent a 'os:system' where turncoat.messages:Update is due",
    ),
    "another round": (lambda t: lambda v: v | {"round": 7}, "answered for round 7"),
    "another's name": (lambda t: lambda v: v | {"client": 5}, "answered for client 5"),
    "a memory that is none": (lambda t: lambda v: v | {"kept": 3}, "a memory that is none"),
    "an attack that broke": (lambda t: lambda v: v | {"broke": "haha"}, "haha"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_node_sends_amiss_is_an_incident_and_the_round_goes_on(
    task: Task, fault: str
) -> None:
    make, said = FAULTS[fault]
    run = play(task, MEAN, rewriting(make(task)))
    ((what),) = run.log[0].incidents
    assert what.client == 3 and said in what.what
    assert not run.log[1].incidents and not any(p.aborted for p in run.log)
    without = play(task, MEAN, rewriting(lambda v: v | {"fault": "left"}))
    assert torch.equal(run.state.params, without.state.params)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (poisoned(residue=torch.zeros(3, dtype=torch.int64)), "sent a residue of shape (3,)"),
        (poisoned(residue=torch.zeros(3)), "sent a residue that is no int64 tensor"),
        (poisoned(senders=frozenset({2})), "sent senders = frozenset({2}), which is not its own"),
        (poisoned(cohort=1), "sent cohort = 1 where 8 is due"),
        (poisoned(weight=0), "claimed the weight 0"),
    ],
)
def test_a_masked_message_that_could_not_be_summed_is_left_out(
    task: Task, change: Any, said: str
) -> None:
    run = play(task, MASKED, rewriting(change))
    first, second = run.log[0].incidents
    assert first.client == 3 and said in first.what
    assert "dropped out" in second.what and run.log[0].aborted and not run.log[1].aborted


def test_those_who_are_left_dress_once_more_as_in_simulate(task: Task) -> None:
    recovering = replace(MASKED, channel=SecureAggregation(recovers_from=5))
    broken = replace(recovering, train=Fails(SGD))
    there = simulate(broken, task, num_rounds=2, seed=2)
    for stays in (True, False):
        here = play(task, broken, lambda app: Listening(app, 8), memory_stays=stays)
        assert torch.equal(there.state.params, here.state.params)
        assert [i.what for p in here.log for i in p.incidents] == [
            i.what for p in there.log for i in p.incidents
        ]
        assert not any(p.aborted for p in here.log)


class Fails:
    """A training that raises at client 3."""

    def __init__(self, inner: LocalSGD) -> None:
        self.inner = inner

    def __call__(
        self,
        model: Model,
        start: Tensor,
        data: Batch,
        *,
        rng: torch.Generator,
        envelope: Any,
    ) -> Update:
        if envelope.sender == 3:
            raise OSError("the disk is full")
        return self.inner(model, start, data, rng=rng)


def test_a_node_that_raises_is_named_with_its_reason(task: Task) -> None:
    run = play(task, replace(MEAN, train=Fails(SGD)), lambda app: InProcessGrid(app, 8))
    assert [i.what for i in run.log[0].incidents] == ["raised OSError: the disk is full"]


def test_an_error_reply_is_an_incident(task: Task) -> None:
    def meddle(grid: Any, replies: Sequence[Message]) -> list[Message]:
        return [error_reply_to(r) if _is(r, 3) else r for r in replies]

    run = play(task, MEAN, lambda app: Listening(app, 8, meddle))
    assert all("answered with an error: no memory left" in p.incidents[0].what for p in run.log)


def test_a_node_that_vanishes_is_waited_for_and_left_out(task: Task) -> None:
    def meddle(grid: Any, replies: Sequence[Message]) -> list[Message]:
        return [r for r in replies if not _is(r, 3)]

    run = play(task, MEAN, lambda app: Listening(app, 8, meddle))
    assert all("did not answer within 0.2 seconds" in p.incidents[0].what for p in run.log)


def test_a_node_that_answers_twice_counts_once(task: Task) -> None:
    def meddle(grid: Any, replies: Sequence[Message]) -> list[Message]:
        return [again for r in replies for again in ([r, r] if _is(r, 3) else [r])]

    run = play(task, MEAN, lambda app: Listening(app, 8, meddle))
    assert [i.what for i in run.log[0].incidents] == ["answered twice: the first answer counts"]
    assert torch.equal(run.state.params, simulate(MEAN, task, num_rounds=2, seed=2).state.params)


def test_an_answer_that_comes_a_round_late_is_told_and_left_out(task: Task) -> None:
    held: list[Message] = []

    def meddle(grid: Any, replies: Sequence[Message]) -> list[Message]:
        late = [r for r in replies if _is(r, 3, round=0)]
        due, held[:] = (list(held), late) if late or replies else ([], held)
        return [*due, *(r for r in replies if r not in late)]

    run = play(task, MEAN, lambda app: Listening(app, 8, meddle))
    assert "did not answer" in run.log[0].incidents[0].what
    assert [i.what for i in run.log[1].incidents] == ["answered round 0 too late: it was left out"]


def test_a_federation_without_nodes_stops_with_its_reason(task: Task) -> None:
    class Empty(InProcessGrid):
        def get_node_ids(self) -> Iterable[int]:
            return []

    with pytest.raises(NoNodes, match=r"no node joined within 0.2 seconds: start the SuperNodes"):
        play(task, MEAN, lambda app: Empty(app, 8))


def test_clients_without_a_node_are_named_and_too_few_stop_the_run(task: Task) -> None:
    half = play(task, MEAN, lambda app: InProcessGrid(app, 4))
    assert {(i.client, i.what) for i in half.log[0].incidents} == {
        (c, "has no node") for c in range(4, 8)
    }
    with pytest.raises(TooFewClients, match=r"4 of 8 clients sent a sound message, 5 are needed"):
        play(task, replace(MEAN, min_clients=5), lambda app: InProcessGrid(app, 4))


def test_a_node_that_claims_the_place_of_another_is_told_and_gets_nothing(task: Task) -> None:
    def grid(app: Any) -> Any:
        return InProcessGrid(app, 9, node_configs=[{}] * 8 + [{"partition-id": 2}])

    run = play(task, MEAN, grid)
    assert "claims it too" in run.log[0].incidents[0].what
    assert torch.equal(run.state.params, simulate(MEAN, task, num_rounds=2, seed=2).state.params)


def test_an_attack_that_breaks_is_no_fault_of_a_client(task: Task) -> None:
    broken: Any = Coalition(members=Clients((3,)), train=Fails(SGD))
    with pytest.raises(AttackBroke, match="client 3's attack raised OSError"):
        play(task, MEAN, lambda app: InProcessGrid(app, 8), coalition=broken)


# The wire


@pytest.mark.parametrize(
    "value",
    [
        {"a": torch.tensor([torch.nan, -0.0, 1e-45]), "b": (1, [2.5, None, True], "x")},
        {3: frozenset({1, 2}), "empty": torch.empty(0, 4), "big": 2**70},
        {"t": torch.arange(6).reshape(2, 3), "bool": torch.tensor([True, False])},
    ],
)
def test_what_travels_arrives_to_the_bit(value: Any) -> None:
    again = read(write(value))
    assert again.keys() == value.keys()
    for key, there in value.items():
        if isinstance(there, Tensor):
            assert there.dtype == again[key].dtype and there.shape == again[key].shape
            assert there.numpy().tobytes() == again[key].numpy().tobytes()
        else:
            assert there == again[key]


def test_an_array_that_lies_about_its_shape_is_refused() -> None:
    content = write({"a": torch.zeros(4)})
    array = Array("float32", (5,), "turncoat.raw", bytes(16))
    content["turncoat.arrays"] = ArrayRecord({"m0": array})
    with pytest.raises(Unfit, match=r"sent 16 bytes for an array of shape \(5,\)"):
        read(content)


def _vector(message: Any) -> Tensor:
    assert isinstance(message, Clear | Masked)
    return message.delta if isinstance(message, Clear) else message.residue


def _is(reply: Message, client: int, round: int | None = None) -> bool:
    value = read(reply.content) if reply.has_content() else {}
    asked = value.get("round") is not None and (round is None or value["round"] == round)
    return asked and value["client"] == client


def error_reply_to(reply: Message) -> Message:
    """Return the same reply as an error."""
    from flwr.app import Error

    bad = Message.__new__(Message)
    bad.__dict__.update(reply.__dict__)
    bad.__dict__["_content"], bad.__dict__["_error"] = None, Error(0, "no memory left")
    return bad

"""The same rounds by different means: each contender waits for its turn before every round.

All train LeNet-5 from the same examples with one thread a process, plain SGD and no momentum. The
last of ``num_rounds`` is never played: by waiting for it a contender says that its work is done.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from turncoat.federation import Federation, Plain
from turncoat.runtimes.seat import one_thread
from turncoat.runtimes.simulate import simulate
from turncoat.stages.aggregate.mean import Mean
from turncoat.stages.train.local import LocalSGD
from turncoat.task import Model, Shards, Task
from turncoat.tasks.models import Built, LeNet5

LR, BATCH_SIZE = 0.05, 32
NET = Built(LeNet5(), (1, 28, 28), 10)

Examples = tuple[Tensor, Tensor]
Turn = Callable[[], None]  # says that what came before is done, and waits for the word to go on
Contender = Callable[["Work", Turn], None]


@dataclass(frozen=True)
class Work:
    """One local epoch in batches of 32 at each of ``num_clients`` clients, ``num_rounds`` times.

    Attributes:
        examples: A safetensors file with ``inputs`` and ``labels``, enough for all.
        num_examples: Of each client.
    """

    examples: Path
    num_clients: int
    num_examples: int
    num_rounds: int

    @property
    def steps(self) -> int:
        """Return the SGD steps of all clients in one round."""
        return self.num_clients * ceil(self.num_examples / BATCH_SIZE)

    def data(self) -> Examples:
        """Return the examples in the clients' order. Shapes: ``(n, 1, 28, 28)`` and ``(n,)``."""
        held = load_file(self.examples)
        num = self.num_clients * self.num_examples
        return held["inputs"][:num], held["labels"][:num]


def train(module: nn.Module, inputs: Tensor, labels: Tensor) -> None:
    """Take one epoch of SGD, as anyone would write it for data that fit in memory."""
    optimiser = torch.optim.SGD(module.parameters(), lr=LR)
    for chosen in torch.split(torch.randperm(len(labels)), BATCH_SIZE):
        optimiser.zero_grad()
        loss = cross_entropy(module(inputs[chosen]), labels[chosen])
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()


@dataclass(frozen=True)
class Loop:
    """PyTorch and nothing else: one of ``of`` processes trains its part of the clients.

    Every client starts from the same weights. Nothing travels and nothing is averaged, so this is
    what any runtime comes on top of.
    """

    part: int = 0
    of: int = 1

    def __call__(self, work: Work, turn: Turn) -> None:
        one_thread()
        inputs, labels = work.data()
        module = NET()
        start = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        for _ in range(work.num_rounds):
            turn()
            for c in range(self.part, work.num_clients, self.of):
                mine = slice(c * work.num_examples, (c + 1) * work.num_examples)
                module.load_state_dict(start)
                train(module, inputs[mine], labels[mine])


@dataclass(frozen=True)
class Turncoat:
    """FedAvg by ``turncoat.runtimes.simulate``."""

    num_processes: int

    def __call__(self, work: Work, turn: Turn) -> None:
        inputs, labels = work.data()
        bounds = tuple(c * work.num_examples for c in range(work.num_clients + 1))
        task = Task(
            name="mnist",
            model=Model(NET),
            clients=Shards(inputs, labels, bounds),
            test=(inputs[:1], labels[:1]),
        )
        federation = Federation(
            train=LocalSGD(LR, num_epochs=1, batch_size=BATCH_SIZE),
            channel=Plain(),
            aggregate=Mean(),
        )
        turn()
        simulate(
            federation,
            task,
            num_rounds=work.num_rounds,
            seed=0,
            num_processes=self.num_processes,
            on_round=lambda *_: turn(),
        )


@dataclass(frozen=True)
class Flower:
    """FedAvg by Flower's simulation, which runs on Ray, with ``num_processes`` workers.

    A client builds its module anew for each message, as Flower's tutorial does, but a worker keeps
    the data, and nothing is evaluated: what is timed is training, and how messages travel.
    """

    num_processes: int

    def __call__(self, work: Work, turn: Turn) -> None:
        os.environ |= {
            "FLWR_HOME": str(work.examples.parent / "flower"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        }
        _simulated_by_flower(work, turn, self.num_processes)


def _simulated_by_flower(work: Work, turn: Turn, num_processes: int) -> None:
    from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    client, server = ClientApp(), ServerApp()

    @client.train()
    def trained(message: Message, context: Context) -> Message:
        inputs, labels = _held(work)
        module = NET()
        module.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
        first = int(context.node_config["partition-id"]) * work.num_examples
        mine = slice(first, first + work.num_examples)
        train(module, inputs[mine], labels[mine])
        sent = RecordDict()
        sent["arrays"] = ArrayRecord(module.state_dict())
        sent["metrics"] = MetricRecord({"num-examples": work.num_examples})
        return Message(content=sent, reply_to=message)

    class Timed(FedAvg):
        """FedAvg whose rounds begin when they are told to."""

        def configure_train(self, *args: Any, **kwargs: Any) -> Any:
            turn()
            return super().configure_train(*args, **kwargs)

        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            arrived = list(replies)
            sound = [m for m in arrived if not m.has_error()]
            if len(sound) < work.num_clients:
                raise RuntimeError(f"{len(sound)} of {work.num_clients} clients replied")
            return super().aggregate_train(server_round, arrived)

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        everyone = Timed(
            fraction_evaluate=0.0,
            min_train_nodes=work.num_clients,
            min_available_nodes=work.num_clients,
        )
        everyone.start(
            grid=grid,
            initial_arrays=ArrayRecord(NET().state_dict()),
            num_rounds=work.num_rounds,
        )

    run_simulation(
        server_app=server,
        client_app=client,
        num_supernodes=work.num_clients,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": num_processes, "include_dashboard": False},
        },
    )


@lru_cache
def _held(work: Work) -> Examples:
    one_thread()
    return work.data()

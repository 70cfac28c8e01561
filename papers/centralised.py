"""How much accuracy does federated averaging cost, beside the same training in one place?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from papers.accuracy import accuracy_on
from turncoat.federation import Federation, Plain
from turncoat.runtimes.saved import State
from turncoat.runtimes.simulate import Played, simulate
from turncoat.stages.aggregate.mean import Mean
from turncoat.stages.train.local import LocalSGD
from turncoat.task import Shards, Task
from turncoat.views import ModelView


@dataclass(frozen=True)
class FedAvgVersusCentral:
    """Train with equal example-gradients: as a federation, and with one client who holds all.

    Both use ``train``, see each example once per local epoch and round, and start from the same
    parameters. The seed settles the split, the start, and the order of examples.

    Args:
        num_averaged: Over how many of the last rounds the test accuracy is averaged: of both.
    """

    make: Callable[..., Task]
    num_rounds: int
    train: LocalSGD
    options: Mapping[str, Any] = field(default_factory=dict)
    num_averaged: int = 1

    def __call__(self, seed: int) -> dict[str, float | str]:
        task = self.make(seed=seed, **self.options)
        clients = task.clients
        assert isinstance(clients, Shards)
        whole = Shards(clients.inputs, clients.labels, (0, clients.bounds[-1]))
        federated = self._percent(task, seed)
        central = self._percent(replace(task, clients=whole), seed)
        return {
            "points_below_central": central - federated,
            "federated_accuracy_percent": federated,
            "central_accuracy_percent": central,
            "example_gradients_each": float(
                sum(task.sizes) * self.num_rounds * (self.train.num_epochs or 1)
            ),
            "data": task.source,
        }

    def _percent(self, task: Task, seed: int) -> float:
        """Return the test accuracy in percent, averaged over the last rounds."""
        found: list[float] = []

        def on_round(state: State, played: Played) -> None:
            if state.round > self.num_rounds - self.num_averaged:
                found.append(accuracy_on(task.test, task, ModelView(task.model, state.params)))

        federation = Federation(train=self.train, channel=Plain(), aggregate=Mean())
        simulate(federation, task, num_rounds=self.num_rounds, seed=seed, on_round=on_round)
        return 100 * sum(found) / len(found)

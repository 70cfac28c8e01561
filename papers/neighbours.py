"""Attacks among peers: what reaches whom, by graph and by distance from the attacker."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from papers.accuracy import accuracy_on
from papers.courses import Aim
from turncoat.coalition import Coalition
from turncoat.federation import Federation, Plain
from turncoat.games.peers import traitors_of
from turncoat.graphs import Graph, distances, neighbours_of
from turncoat.messages import Clear, Update
from turncoat.randomness import Randomness
from turncoat.runtimes.simulate import Run, simulate
from turncoat.stage import Aggregate
from turncoat.stages.train.local import LocalSGD
from turncoat.task import Task
from turncoat.views import ModelView


@dataclass(frozen=True)
class AmongPeers:
    """A backdoor and a poisoning by one node, under every graph and rule.

    Attributes:
        aim: The backdoor; its success at an honest node is the figure.
        poisoning: Points of accuracy that an honest node loses.
        furthest: Nodes further away than this count as this far.
    """

    make: Callable[..., Task]
    train: LocalSGD
    graphs: Mapping[str, Graph]
    rules: Mapping[str, Aggregate[Clear]]
    aim: Aim
    poisoning: Coalition[Update]
    num_rounds: int
    furthest: int = 3
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, seed: int) -> dict[str, float | str]:
        task = self.make(seed=seed, **self.options)
        found: dict[str, float | str] = {}
        for graph_name, graph in self.graphs.items():
            for rule_name, rule in self.rules.items():
                row = f"{graph_name}, {rule_name}"
                clean = self._run(task, graph, rule, None, seed)
                hurt = self._run(task, graph, rule, self.aim.coalition, seed)
                poisoned = self._run(task, graph, rule, self.poisoning, seed)
                whole = [self._accuracy(task, clean, n) for n in range(len(task.clients))]
                title = "unattacked accuracy, percent: mean over nodes"
                found[f"{title} | {row}"] = 100 * sum(whole) / len(whole)
                for steps, nodes in self._rings(task, graph, self.aim.coalition, seed).items():
                    told = [self._success(task, hurt, n) for n in nodes]
                    title = "backdoor success by distance from the attacker"
                    found[f"{title}: {row} | {steps}"] = sum(told) / len(told)
                    lost = [whole[n] - self._accuracy(task, poisoned, n) for n in nodes]
                    title = "points of accuracy lost to poisoning by distance"
                    found[f"{title}: {row} | {steps}"] = 100 * sum(lost) / len(lost)
        return found | {"data": task.source}

    def _rings(
        self, task: Task, graph: Graph, coalition: Coalition[Update], seed: int
    ) -> dict[str, list[int]]:
        """Return the honest nodes by their distance, in words."""
        randomness, num_nodes = Randomness(seed), len(task.clients)
        traitors = traitors_of(coalition, num_nodes, self.num_rounds, randomness)
        away = distances(neighbours_of(graph, num_nodes, randomness), traitors)
        rings: dict[str, list[int]] = {}
        for steps in range(1, max(away) + 1):
            last = steps >= self.furthest
            name = f"{self.furthest} steps or more" if last else f"{steps} step{'s'[: steps - 1]}"
            rings.setdefault(name, []).extend(n for n, a in enumerate(away) if a == steps)
        return rings

    def _run(
        self,
        task: Task,
        graph: Graph,
        rule: Aggregate[Clear],
        coalition: Coalition[Update] | None,
        seed: int,
    ) -> Run:
        federation = Federation(train=self.train, channel=Plain(), aggregate=rule, graph=graph)
        return simulate(
            federation, task, num_rounds=self.num_rounds, seed=seed, coalition=coalition
        )

    def _view(self, task: Task, run: Run, node: int) -> ModelView:
        return ModelView(task.model, run.state.params[node])

    def _success(self, task: Task, run: Run, node: int) -> float:
        inputs, labels = task.test
        others = self.aim.trigger(inputs[labels != self.aim.target][:1_000])
        scores = self._view(task, run, node).scores(others)
        return float((scores.argmax(dim=1) == self.aim.target).double().mean())

    def _accuracy(self, task: Task, run: Run, node: int) -> float:
        few = task.test[0][:1_000], task.test[1][:1_000]
        return accuracy_on(few, task, self._view(task, run, node))

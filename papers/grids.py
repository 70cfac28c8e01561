"""Attacks against rules on one task: every pair is trained, and told beside its unattacked run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from papers.accuracy import accuracy_on
from turncoat.coalition import Coalition
from turncoat.federation import Federation, Plain
from turncoat.messages import Clear, Update
from turncoat.runtimes.simulate import simulate
from turncoat.stage import Aggregate, Train
from turncoat.task import Task
from turncoat.views import ModelView


@dataclass(frozen=True)
class AccuracyGrid:
    """The points of accuracy that each attack costs under each rule.

    Attributes:
        coalitions: By the attack's name.
        rules: By the rule's name.
        gains: Pairs of attacks; how much more the first costs than the second becomes a figure.
        num_last: The accuracy is the mean over so many last rounds, for it swings.
    """

    make: Callable[..., Task]
    train: Train[Update]
    rules: Mapping[str, Aggregate[Clear]]
    coalitions: Mapping[str, Coalition[Update]]
    num_rounds: int
    gains: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    num_last: int = 5
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, seed: int) -> dict[str, float | str]:
        task = self.make(seed=seed, **self.options)
        found: dict[str, float | str] = {}
        lost: dict[tuple[str, str], float] = {}
        for rule_name, rule in self.rules.items():
            clean = self._accuracy(task, rule, None, seed)
            found[f"unattacked, accuracy in percent: all | {rule_name}"] = clean
            for name, coalition in self.coalitions.items():
                lost[name, rule_name] = clean - self._accuracy(task, rule, coalition, seed)
        for (name, rule_name), points in lost.items():
            found[f"points of accuracy lost: {name} | {rule_name}"] = points
        for title, (first, second) in self.gains.items():
            for rule_name in self.rules:
                gain = lost[first, rule_name] - lost[second, rule_name]
                found[f"{title}, {rule_name}"] = gain
        return found | {"data": task.source}

    def _accuracy(
        self, task: Task, rule: Aggregate[Clear], coalition: Coalition[Update] | None, seed: int
    ) -> float:
        last: list[float] = []

        def mark(state: Any, played: Any) -> None:
            if state.round > self.num_rounds - self.num_last:
                last.append(accuracy_on(task.test, task, ModelView(task.model, state.params)))

        simulate(
            Federation(train=self.train, channel=Plain(), aggregate=rule),
            task,
            num_rounds=self.num_rounds,
            seed=seed,
            coalition=coalition,
            on_round=mark,
        )
        return 100 * sum(last) / len(last)

"""Backdoors round by round, behind one rule after the other, from one honestly trained model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from papers.accuracy import accuracy_on
from turncoat.attacks.backdoor.triggers import Trigger
from turncoat.coalition import Coalition
from turncoat.federation import Everyone, Federation, Plain
from turncoat.messages import Clear, Update
from turncoat.runtimes.saved import State
from turncoat.runtimes.simulate import simulate
from turncoat.stage import Aggregate, Sample
from turncoat.stages.aggregate.mean import Mean
from turncoat.stages.train.local import LocalSGD
from turncoat.task import Task
from turncoat.views import ModelView


@dataclass(frozen=True)
class Aim:
    """A coalition, and what its backdoor shall do."""

    coalition: Coalition[Update]
    trigger: Trigger
    target: int


@dataclass(frozen=True)
class BackdoorCourse:
    """After ``num_clean`` honest rounds under the mean each rule takes over, attacked or not.

    Attributes:
        watched: The rounds after which success is told, counted from the change of the rule.
        compared: Title of a figure, and the rules a and b of which it is success a / success b.
        whole: Whether each rule has all rounds to itself instead.
    """

    make: Callable[..., Task]
    train: LocalSGD
    rules: Mapping[str, Aggregate[Clear]]
    aims: Mapping[str, Aim]
    num_clean: int
    num_rounds: int
    watched: tuple[int, ...]
    compared: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    sample: Sample = field(default_factory=Everyone)
    whole: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, seed: int) -> dict[str, float | str]:
        task = self.make(seed=seed, **self.options)
        start = None if self.whole else self._go(task, Mean(), seed, None, self.num_clean)[0]
        found: dict[str, float | str] = {}
        if start is not None:
            found["accuracy_before_percent"] = 100 * self._accuracy(task, start)
        ends: dict[tuple[str, str], float] = {}
        for rule_name, rule in self.rules.items():
            clean, _ = self._go(task, rule, seed, start, self.num_clean + self.num_rounds)
            accuracy = 100 * self._accuracy(task, clean)
            found[f"unattacked accuracy, percent: at the end | {rule_name}"] = accuracy
            for name, aim in self.aims.items():
                base = self._success(task, aim, clean)
                found[f"success without the attack: {name} | {rule_name}"] = base
                state, course = self._go(
                    task, rule, seed, start, self.num_clean + self.num_rounds, aim
                )
                for t in self.watched:
                    title = f"attack success rate, {name}"
                    found[f"{title}: round {t} | {rule_name}"] = course[self.num_clean + t]
                lost = accuracy - 100 * self._accuracy(task, state)
                found[f"points of accuracy lost: {name} | {rule_name}"] = lost
                ends[name, rule_name] = course[self.num_clean + self.num_rounds]
        for title, (first, second) in self.compared.items():
            for name in self.aims:
                share = ends[name, first] / max(ends[name, second], 1e-9)
                found[f"{title}, {name}"] = share
        return found | {"data": task.source}

    def _go(
        self,
        task: Task,
        rule: Any,
        seed: int,
        state: State | None,
        until: int,
        aim: Aim | None = None,
    ) -> tuple[State, dict[int, float]]:
        course: dict[int, float] = {}

        def mark(now: State, played: Any) -> None:
            if aim is not None:
                course[now.round] = self._success(task, aim, now)

        run = simulate(
            Federation(train=self.train, channel=Plain(), aggregate=rule, sample=self.sample),
            task,
            num_rounds=self.num_clean + self.num_rounds,
            seed=seed,
            coalition=None if aim is None else aim.coalition,
            state=state,
            until=until,
            on_round=mark,
        )
        return run.state, course

    def _success(self, task: Task, aim: Aim, state: State) -> float:
        inputs, labels = task.test
        others = inputs[labels != aim.target][:2_000]
        scores = ModelView(task.model, state.params).scores(aim.trigger(others))
        return float((scores.argmax(dim=1) == aim.target).double().mean())

    def _accuracy(self, task: Task, state: State) -> float:
        with torch.no_grad():
            return accuracy_on(task.test, task, ModelView(task.model, state.params))

"""How much data it takes: success against the share of poisoned records."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import exp, log
from typing import Any

from turncoat.attacks.backdoor.planted import Backdoored
from turncoat.attacks.backdoor.triggers import Trigger
from turncoat.attacks.poisoning.label_flip import LabelFlip
from turncoat.coalition import Clients, Coalition, Pool
from turncoat.federation import Federation, Plain
from turncoat.messages import Update
from turncoat.randomness import Randomness
from turncoat.runtimes.simulate import simulate
from turncoat.stage import Prepare
from turncoat.stages.aggregate.mean import Mean
from turncoat.stages.train.local import LocalSGD
from turncoat.task import Task
from turncoat.trial import Outcome
from turncoat.views import ModelView


@dataclass(frozen=True)
class Patched:
    """Trigger and false label on a share of the records, in the place of clean ones."""

    trigger: Trigger
    target: int

    def __call__(self, share: float) -> Prepare:
        return Backdoored(trigger=self.trigger, target=self.target, share=share, adds=False)


@dataclass(frozen=True)
class Flipped:
    """False labels on records of one class: a share of all records, or as many as it has."""

    source: int
    target: int
    num_classes: int = 10

    def __call__(self, share: float) -> Prepare:
        return LabelFlip(self.source, self.target, share=min(1.0, share * self.num_classes))


@dataclass(frozen=True)
class Planted:
    """A data attack that takes a share of the records, and what it is after."""

    poison: Callable[[float], Prepare]
    outcome: Outcome


@dataclass(frozen=True)
class PoisonedShare:
    """Success for each share, and the shares that 50 % and 90 % success take.

    Attributes:
        shares: Of all records, in rising order.
        whole_clients: Whether the poisoned records are all those of so many clients, instead of the
            same share of each client's (whom a supplier serves).
        never: What stands for a share that would have to exceed the largest tried.
    """

    make: Callable[..., Task]
    train: LocalSGD
    attacks: Mapping[str, Planted]
    shares: tuple[float, ...]
    num_rounds: int
    whole_clients: bool
    never: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, seed: int) -> dict[str, float | str]:
        task = self.make(seed=seed, **self.options)
        clean = self._trained(task, None, seed)
        found: dict[str, float | str] = {}
        for name, attack in self.attacks.items():
            reached = []
            for share in self.shares:
                hurt = self._trained(task, self._coalition(task, attack, share), seed)
                marked = attack.outcome.mark(
                    hurt, clean, task=task, rng=Randomness(seed).at("mark")
                )
                reached.append(marked.headline.value)
                column = f"{100 * share:g} %"
                found[f"success by share of poisoned records: {name} | {column}"] = reached[-1]
                lost = next(m for m in marked.others if m.name.endswith("_lost"))
                found[f"points of accuracy lost: {name} | {column}"] = lost.value
            for level in (0.5, 0.9):
                needed = first_share(self.shares, reached, level, self.never)
                found[f"percent_for_{100 * level:g}_percent_success, {name}"] = 100 * needed
        return found | {"data": task.source}

    def _coalition(self, task: Task, attack: Planted, share: float) -> Coalition[Update]:
        if self.whole_clients:
            num = max(1, round(share * len(task.clients)))
            return Coalition(members=Clients(tuple(range(num))), supply=attack.poison(1.0))
        return Coalition(members=Pool(1.0), supply=attack.poison(share))

    def _trained(self, task: Task, coalition: Coalition[Update] | None, seed: int) -> ModelView:
        run = simulate(
            Federation(train=self.train, channel=Plain(), aggregate=Mean()),
            task,
            num_rounds=self.num_rounds,
            seed=seed,
            coalition=coalition,
        )
        return ModelView(task.model, run.state.params)


def first_share(
    shares: Sequence[float], reached: Sequence[float], level: float, never: float
) -> float:
    """Return where success first reaches a level, between two shares by their logarithms.

    >>> first_share((0.01, 0.1), (0.0, 1.0), 0.5, 1.0)
    0.0316...
    """
    before: tuple[float, float] | None = None
    for share, value in zip(shares, reached, strict=True):
        if value >= level:
            if before is None or value == before[1]:
                return share
            part = (level - before[1]) / (value - before[1])
            return exp(log(before[0]) + part * (log(share) - log(before[0])))
        before = (share, value)
    return never

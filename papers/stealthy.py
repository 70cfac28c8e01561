"""One record to be misjudged: does the attack work, and would a server that checks have seen it?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

from turncoat.attacks.backdoor.alternating_minimisation import (
    AlternatingMinimisation,
    ExplicitBoosting,
)
from turncoat.attacks.backdoor.stealth import Stealth, stealth
from turncoat.coalition import Clients, Coalition, From
from turncoat.federation import Federation, Plain
from turncoat.games.outcomes import TargetConfidence
from turncoat.messages import Update
from turncoat.randomness import Randomness
from turncoat.runtimes.simulate import Watch, simulate
from turncoat.stages.aggregate.mean import Mean
from turncoat.stages.train.local import LocalSGD
from turncoat.task import Task
from turncoat.views import ModelView, ServerView


@dataclass(frozen=True)
class TargetedPoisoning:
    """Client 0 attacks from round ``first`` on; the server checks what it sends on test data.

    Attributes:
        slack: How far a gap may exceed the largest of an honest client before a check fails.
        num_last: The checks are told of so many last rounds: an attack settles in.
    """

    make: Callable[..., Task]
    train: LocalSGD
    alternating: AlternatingMinimisation
    explicit: ExplicitBoosting
    source: int
    target: int
    first: int
    num_rounds: int
    slack: float = 0.15
    num_last: int = 10
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, seed: int) -> dict[str, float | str]:
        task = self.make(seed=seed, **self.options)
        clean = self._run(task, None, seed)[0]
        found: dict[str, float | str] = {}
        attacks = {"alternating": self.alternating, "explicit_boosting": self.explicit}
        for name, attack in attacks.items():
            params, all_checks = self._run(task, attack, seed)
            checks = all_checks[-self.num_last :]
            views = [ModelView(task.model, p) for p in (params, clean)]
            game = TargetConfidence(0, self.source, self.target)
            marked = game.mark(*views, task=task, rng=Randomness(seed).at("mark"))
            lost = next(m for m in marked.others if m.name.endswith("_lost"))
            found[f"{name}_target_confidence"] = marked.headline.value
            found[f"{name}_points_of_accuracy_lost"] = lost.value
            found[f"{name}_rounds_that_pass_accuracy_check"] = mean(
                c.passes_accuracy(self.slack) for c in checks
            )
            found[f"{name}_rounds_that_pass_distance_check"] = mean(
                c.passes_distances(self.slack) for c in checks
            )
            found[f"{name}_distance_gap"] = mean(c.distance_gap for c in checks)
            honest = mean(max(c.honest_distance_gaps) for c in checks)
            found[f"{name}_largest_honest_distance_gap"] = honest
        return found | {"data": task.source}

    def _run(self, task: Task, attack: Any, seed: int) -> tuple[Any, list[Stealth]]:
        coalition: Coalition[Update] | None = None
        if attack is not None:
            members, acts = Clients((0,)), From(self.first)
            coalition = Coalition(members=members, acts=acts, train=attack)
        rounds = frozenset(range(self.first, self.num_rounds))
        run = simulate(
            Federation(train=self.train, channel=Plain(), aggregate=Mean()),
            task,
            num_rounds=self.num_rounds,
            seed=seed,
            coalition=coalition,
            watch=[] if attack is None else [Watch(ServerView[Update], rounds)],
        )
        few = tuple(t[:2_000] for t in task.test)
        checks = [
            stealth(task.model, v.sent[0], v.messages, v.senders.index(0), (few[0], few[1]))
            for v in run.seen(ServerView[Update])
        ]
        return run.state.params, checks

"""One record to be misjudged: does the attack work, and would a server that checks have seen it?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

from torch import Tensor

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
from turncoat.trial import Marked
from turncoat.views import ModelView, ServerView


@dataclass(frozen=True)
class TargetedPoisoning:
    """Client 0 attacks from round ``first`` on; the server checks what it sends on test data.

    Attributes:
        slack: How far a gap may exceed the largest of an honest client before a check fails.
        won: The confidence with which the attack has won. Until then, the checks ask whether it
            could have been seen in time; what has won can go quiet.
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
    won: float = 0.9
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, seed: int) -> dict[str, float | str]:
        task = self.make(seed=seed, **self.options)
        clean = self._run(task, None, seed)[0]
        found: dict[str, float | str] = {}
        attacks = {"alternating": self.alternating, "explicit_boosting": self.explicit}
        for name, attack in attacks.items():
            models, all_checks = self._run(task, attack, seed)
            marks = [self._marked(task, params, clean[-1], seed) for params in models]
            lost = next(m for m in marks[-1].others if m.name.endswith("_lost"))
            sure = [m.headline.value for m in marks]
            until = next((i + 1 for i, c in enumerate(sure) if c >= self.won), len(sure))
            found[f"{name}_target_confidence"] = sure[-1]
            found[f"{name}_points_of_accuracy_lost"] = lost.value
            found[f"{name}_rounds_until_it_has_won"] = float(until)
            for when, checks in (("until_it_has_won", all_checks[:until]), ("of_all", all_checks)):
                rounds = f"{name}_rounds_{when}"
                found[f"{rounds}_that_pass_accuracy_check"] = mean(
                    c.passes_accuracy(self.slack) for c in checks
                )
                found[f"{rounds}_that_pass_distance_check"] = mean(
                    c.passes_distances(self.slack) for c in checks
                )
            found[f"{name}_distance_gap"] = mean(c.distance_gap for c in all_checks)
            honest = mean(max(c.honest_distance_gaps) for c in all_checks)
            found[f"{name}_largest_honest_distance_gap"] = honest
        return found | {"data": task.source}

    def _marked(self, task: Task, hurt: Tensor, clean: Tensor, seed: int) -> Marked:
        views = [ModelView(task.model, params) for params in (hurt, clean)]
        game = TargetConfidence(0, self.source, self.target)
        return game.mark(*views, task=task, rng=Randomness(seed).at("mark"))

    def _run(self, task: Task, attack: Any, seed: int) -> tuple[list[Tensor], list[Stealth]]:
        """Return the global models after each attacked round, and what the checks said in it."""
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
        views = run.seen(ServerView[Update])
        few = tuple(t[:2_000] for t in task.test)
        checks = [
            stealth(task.model, v.sent[0], v.messages, v.senders.index(0), (few[0], few[1]))
            for v in views
        ]
        return [*(v.sent[0] for v in views[1:]), run.state.params], checks

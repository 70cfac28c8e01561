"""One client, one round: is the model replaced by one with a backdoor, and what stops it?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from papers.accuracy import accuracy_on
from turncoat.attacks.backdoor.model_replacement import ModelReplacement
from turncoat.coalition import Clients, Coalition, Once
from turncoat.federation import Federation, Plain
from turncoat.games.outcomes import BackdoorSuccess
from turncoat.messages import Update
from turncoat.randomness import Randomness
from turncoat.runtimes.saved import State
from turncoat.runtimes.simulate import simulate
from turncoat.stage import Aggregate
from turncoat.stages.aggregate.mean import Mean
from turncoat.stages.aggregate.norm_bound import NormBound
from turncoat.stages.train.local import LocalSGD
from turncoat.task import Task
from turncoat.trial import Marked, Measurement
from turncoat.views import ModelView


@dataclass(frozen=True)
class OneShotBackdoor:
    """After ``num_clean`` honest rounds client 0 sends a replaced model, once.

    Each rule is compared with its own unattacked run of the same length and the same randomness.
    """

    make: Callable[..., Task]
    train: LocalSGD
    attack: ModelReplacement
    num_clean: int
    ratio: float
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, seed: int) -> dict[str, float | str]:
        task = self.make(seed=seed, **self.options)
        mean, bound = (
            self._under(rule, task, seed) for rule in (Mean(), NormBound(Mean(), ratio=self.ratio))
        )
        return {
            "accuracy_before_percent": 100 * mean.before,
            "success_against_mean": mean.success.value,
            "success_unattacked_mean": mean.success.baseline,
            "accuracy_lost_with_mean_points": mean.points_lost,
            "success_against_mean_one_honest_round_later": mean.later,
            "success_behind_norm_bound": bound.success.value,
            "success_unattacked_norm_bound": bound.success.baseline,
            "rise_behind_norm_bound": bound.success.value - bound.success.baseline,
            "accuracy_lost_behind_norm_bound_points": bound.points_lost,
            "data": task.source,
        }

    def _under(self, rule: Aggregate[Update], task: Task, seed: int) -> _Outcome:
        federation = Federation(train=self.train, channel=Plain(), aggregate=rule)
        worn = Coalition(members=Clients((0,)), acts=Once(self.num_clean), train=self.attack)
        whole = self.num_clean + 2

        def go_on(state: State | None, until: int, coalition: Coalition[Update] | None) -> State:
            return simulate(
                federation,
                task,
                num_rounds=whole,
                seed=seed,
                coalition=coalition,
                state=state,
                until=until,
            ).state

        start = go_on(None, self.num_clean, None)
        clean = go_on(start, self.num_clean + 1, None)
        hurt = go_on(start, self.num_clean + 1, worn)
        later = go_on(hurt, whole, worn)
        game = BackdoorSuccess(self.attack.trigger, self.attack.target)

        def marked(state: State) -> Marked:
            views = [ModelView(task.model, s.params) for s in (state, clean)]
            return game.mark(*views, task=task, rng=Randomness(seed).at("mark"))

        at_once = marked(hurt)
        accuracy = next(m for m in at_once.others if m.name == "accuracy")
        return _Outcome(
            accuracy_on(task.test, task, ModelView(task.model, start.params)),
            at_once.headline,
            100 * (accuracy.baseline - accuracy.value),
            marked(later).headline.value,
        )


@dataclass(frozen=True)
class _Outcome:
    """What one attacked round did to one rule, beside the unattacked round.

    Attributes:
        before: The accuracy before it.
        later: The attack's success after one more round, an honest one.
    """

    before: float
    success: Measurement
    points_lost: float
    later: float

"""Code from a supplier plants a backdoor in everyone's honest training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from turncoat.attacks.backdoor.blind import BlindBackdoor
from turncoat.coalition import Coalition, Pool
from turncoat.federation import Federation, Plain
from turncoat.games.outcomes import BackdoorSuccess
from turncoat.messages import Update
from turncoat.randomness import Randomness
from turncoat.runtimes.simulate import simulate
from turncoat.stages.aggregate.mean import Mean
from turncoat.stages.train.local import LocalSGD
from turncoat.task import Task
from turncoat.views import ModelView


@dataclass(frozen=True)
class BlindlyPlanted:
    """All clients train with the supplier's code; success and accuracy beside clean code's."""

    make: Callable[..., Task]
    train: LocalSGD
    code: BlindBackdoor
    num_rounds: int
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, seed: int) -> dict[str, float | str]:
        task = self.make(seed=seed, **self.options)
        served: Coalition[Update] = Coalition(members=Pool(1.0), code=self.code)
        views = [self._trained(task, coalition, seed) for coalition in (served, None)]
        game = BackdoorSuccess(self.code.trigger, self.code.target)
        marked = game.mark(*views, task=task, rng=Randomness(seed).at("mark"))
        accuracy = next(m for m in marked.others if m.name == "accuracy")
        return {
            "attack_success_rate": marked.headline.value,
            "success_with_clean_code": marked.headline.baseline,
            "accuracy_percent": 100 * accuracy.value,
            "points_of_accuracy_lost": 100 * (accuracy.baseline - accuracy.value),
            "data": task.source,
        }

    def _trained(self, task: Task, coalition: Coalition[Update] | None, seed: int) -> ModelView:
        run = simulate(
            Federation(train=self.train, channel=Plain(), aggregate=Mean()),
            task,
            num_rounds=self.num_rounds,
            seed=seed,
            coalition=coalition,
        )
        return ModelView(task.model, run.state.params)

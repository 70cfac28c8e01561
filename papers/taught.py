"""What a model that learnt from another's answers still tells of the records of that other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from turncoat.attacks.membership.lira import LiRA
from turncoat.attacks.membership.loss_threshold import LossThreshold
from turncoat.federation import Federation, Plain, WhiteBox
from turncoat.metrics.ranking import ROC, auc
from turncoat.privacy import Private, guarantees
from turncoat.randomness import Randomness
from turncoat.runtimes.simulate import simulate
from turncoat.stages.aggregate.gnmax import GNMax
from turncoat.stages.aggregate.mean import Mean
from turncoat.stages.begin.unanswered import Unanswered
from turncoat.stages.release.student import Distilled, Student
from turncoat.stages.train.local import LocalSGD
from turncoat.stages.train.teacher import Teacher
from turncoat.task import Batch, Shards, Task
from turncoat.views import ModelView, Shadows

_PLAIN, _DISTILLED, _PATE = "plain", "distilled", "PATE"


@dataclass(frozen=True)
class Releases:
    """A model as it is, distilled, and the student of teachers' noisy votes, before one attacker.

    A random half of the candidates is trained on; the others are the non-members, on which the
    accuracy is taken too. Shadow models are trained on random halves of the candidates, and
    released as the target is, by the same public examples: distilled, or taught by teachers of
    their own. Starts and draws are independent.

    Attributes:
        num_teachers: Among whom the members are dealt, for PATE; the others are trained in one
            place.
        answers: The noisy rule.
    """

    make: Callable[..., Task]
    train: LocalSGD
    teach: LocalSGD
    distilled: Distilled[ModelView]
    student: Student[ModelView]
    answers: GNMax
    num_teachers: int
    num_candidates: int
    attack: LiRA
    delta: float
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, seed: int) -> dict[str, float | str]:
        task = self.make(1, seed=seed, **self.options)
        drawn = Randomness(seed)
        inputs, labels = (
            torch.cat([mine, rest]) for mine, rest in zip(task.clients[0], task.test, strict=True)
        )
        order = torch.randperm(len(labels), generator=drawn.at("candidates"))
        order = order[: self.num_candidates]
        if len(order) < self.num_candidates:
            raise ValueError(f"{task.name} has {len(order)} records; take fewer candidates")
        pool = inputs[order], labels[order]
        models: dict[str, list[ModelView]] = {}
        for number in range(1 + self.attack.num_shadows):
            for name, view in self._released(task, pool, number, drawn).items():
                models.setdefault(name, []).append(view)
        masks = [self._half(number, drawn) for number in range(1 + self.attack.num_shadows)]
        found: dict[str, float | str] = {}
        for name, (target, *shadows) in models.items():
            found |= {
                f"{figure}: {name}": value
                for figure, value in self._attacked(target, shadows, masks, pool).items()
            }
        for name in (_DISTILLED, _PATE):
            for by in ("LiRA", "loss threshold"):
                gap = float(found[f"AUC of {by}: {_PLAIN}"]) - float(found[f"AUC of {by}: {name}"])
                found[f"AUC that {name} takes from {by}"] = gap
        (held,) = guarantees(self._taught(), num_records=1, num_rounds=1, delta=self.delta)
        if not isinstance(held, Private):
            raise RuntimeError(f"the federation proves no ε: {held}")
        return found | {f"ε composed: {_PATE}": held.epsilon, "data": task.source}

    def _half(self, number: int, drawn: Randomness) -> Tensor:
        """Return which candidates model ``number`` is trained on. Shape: ``(candidates,)``."""
        inside = torch.zeros(self.num_candidates, dtype=torch.bool)
        order = torch.randperm(self.num_candidates, generator=drawn.at("half", number))
        inside[order[: self.num_candidates // 2]] = True
        return inside

    def _taught(self) -> Federation[Any, Any]:
        return Federation(
            begin=Unanswered(),
            train=Teacher(self.teach),
            channel=Plain(),
            aggregate=self.answers,
            release=self.student,
        )

    def _released(
        self, task: Task, pool: Batch, number: int, drawn: Randomness
    ) -> dict[str, ModelView]:
        """Return what is released of the records of model ``number``, in each of the ways."""
        inside = self._half(number, drawn)
        order = inside.nonzero().flatten()
        order = order[torch.randperm(len(order), generator=drawn.at("deal", number))]
        mine = pool[0][order], pool[1][order]
        seed = int(torch.randint(2**31 - 1, (1,), generator=drawn.at("run", number)))
        whole = replace(task, clients=Shards(*mine, (0, len(mine[1]))))
        plain = Federation(train=self.train, channel=Plain(), aggregate=Mean(), release=WhiteBox())
        last = simulate(plain, whole, num_rounds=1, seed=seed).state.params
        rng, public = Randomness(seed), task.public
        found = {
            _PLAIN: ModelView(task.model, last),
            _DISTILLED: self.distilled(task.model, last, rng=rng.at("release"), public=public),
        }
        size = len(mine[1]) // self.num_teachers
        bounds = (*(size * i for i in range(self.num_teachers)), len(mine[1]))
        dealt = replace(task, clients=Shards(*mine, bounds))
        noisy = simulate(self._taught(), dealt, num_rounds=1, seed=seed).state.params
        return found | {
            _PATE: self.student(task.model, noisy, rng=rng.at("release"), public=public)
        }

    def _attacked(
        self, target: ModelView, shadows: list[ModelView], masks: list[Tensor], pool: Batch
    ) -> dict[str, float]:
        inside = masks[0]
        others = Shadows(tuple(shadows), torch.stack(masks[1:]))
        lira = self.attack(target, candidates=pool, shadows=others).scores
        loss = LossThreshold()(target, candidates=pool).scores
        right = (target.scores(pool[0]).argmax(dim=1) == pool[1]).double()
        by_lira = lira[inside], lira[~inside]
        return {
            "accuracy, percent": 100 * float(right[~inside].mean()),
            "AUC of LiRA": auc(*by_lira),
            "TPR of LiRA at 1 % FPR, percent": 100 * ROC.of(*by_lira).tpr_at(0.01),
            "AUC of loss threshold": auc(loss[inside], loss[~inside]),
        }

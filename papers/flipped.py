"""Flipped labels in a sampled federation: what one class loses, and who is caught."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from turncoat.attacks.poisoning.label_flip import LabelFlip
from turncoat.coalition import Clients, Coalition
from turncoat.federation import Federation, FixedSample, Plain
from turncoat.games.outcomes import SourceRecall
from turncoat.metrics.detection import Caught
from turncoat.randomness import Randomness
from turncoat.runtimes.simulate import Run, simulate
from turncoat.stages.aggregate.mean import Mean
from turncoat.stages.aggregate.update_analysis import UpdatePCA
from turncoat.stages.train.local import LocalSGD
from turncoat.task import Task
from turncoat.views import ModelView


@dataclass(frozen=True)
class SourceClassUnderFlips:
    """Recall of the source class and of the others, for each share of malicious clients.

    Attributes:
        shares: Of the clients that relabel, the lowest numbers first; the split is random.
        analysis: The detector, around the mean, of which precision, recall and F1 are told, from
            the round on in which its window is half full.
    """

    make: Callable[..., Task]
    train: LocalSGD
    source: int
    target: int
    shares: tuple[float, ...]
    analysis: UpdatePCA
    num_sampled: int
    num_rounds: int
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, seed: int) -> dict[str, float | str]:
        task = self.make(seed=seed, **self.options)
        clean = self._run(task, Mean(), 0, seed)
        found: dict[str, float | str] = {}
        points: dict[float, float] = {}
        for share in self.shares:
            num = round(share * len(task.clients))
            row = f"{100 * share:g} % malicious"
            hurt = self._run(task, Mean(), num, seed)
            views = [ModelView(task.model, run.state.params) for run in (hurt, clean)]
            marked = SourceRecall(self.source).mark(
                *views, task=task, rng=Randomness(seed).at("mark")
            )
            other = marked.others[0]
            points[share] = 100 * (marked.headline.baseline - marked.headline.value)
            title = "points of recall lost"
            found[f"{title}: {row} | source class"] = points[share]
            found[f"{title}: {row} | all other classes"] = 100 * (other.baseline - other.value)
            found |= self._caught(task, num, seed, row)
        most = max(self.shares, key=lambda s: (s <= 0.4, s))
        found[f"points_of_source_recall_lost_at_{100 * most:g}_percent"] = points[most]
        return found | {"data": task.source}

    def _caught(self, task: Task, num: int, seed: int, row: str) -> dict[str, float | str]:
        log = self._run(task, self.analysis, num, seed).log
        after = self.analysis.first_round + self.analysis.window // 2
        judged = (p.clients for p in log if p.round >= after and p.clients is not None)
        caught = sum(judged, Caught())
        told = {m.name: m.value for m in caught.measured("flagged")}
        found: dict[str, float | str] = {}
        for name in ("precision", "recall", "f1"):
            found[f"flagged clients, settled rounds: {row} | {name}"] = told.get(
                f"flagged_{name}", 0.0
            )
        return found

    def _run(self, task: Task, rule: Any, num_malicious: int, seed: int) -> Run:
        flip = LabelFlip(self.source, self.target)
        coalition: Coalition[Any] | None = None
        if num_malicious:
            coalition = Coalition(members=Clients(tuple(range(num_malicious))), prepare=flip)
        return simulate(
            Federation(
                train=self.train,
                channel=Plain(),
                aggregate=rule,
                sample=FixedSample(self.num_sampled),
            ),
            task,
            num_rounds=self.num_rounds,
            seed=seed,
            coalition=coalition,
        )

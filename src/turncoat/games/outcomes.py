"""What active attacks are after: marked on what users get, with and without the attack."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from turncoat.attacks.backdoor.edge_cases import Edge
from turncoat.attacks.backdoor.triggers import Trigger
from turncoat.metrics.intervals import clopper_pearson, of_difference, of_paired_shares, wilson
from turncoat.task import Task
from turncoat.trial import Marked, Measurement, Released
from turncoat.validate import at_least

MAX_SHOWN = 8  # triggered images kept for the report


@dataclass(frozen=True)
class AccuracyLost:
    """How well the model still works, by the task's own metric, on its test set.

    Also the points lost, with the interval of the differences example by example: both runs judge
    the same ones.
    """

    family = "poisoning"
    says = (
        "{who} can bring the model's performance down to {value} {interval}; without the attack "
        "it is {baseline}."
    )

    def mark(self, hurt: Released, clean: Released, *, task: Task, rng: Generator) -> Marked:
        after, before = _outputs(hurt, task.test[0]), _outputs(clean, task.test[0])
        kept, lost = _performance(task, after, before)
        return Marked(kept, (lost,))


@dataclass(frozen=True)
class BackdoorSuccess:
    """How often test images with the trigger, not of the target class, are taken for it.

    Args:
        trigger: What is put into the images.
        target: The class that they shall be taken for.
    """

    trigger: Trigger
    target: int
    family = "backdoor"
    says = (
        "{who} can plant a backdoor: inputs with the trigger are taken for the attacker's class "
        "in {value} {interval} of cases; without the attack in {baseline}."
    )

    def __post_init__(self) -> None:
        at_least(0, self, target=self.target)

    def mark(self, hurt: Released, clean: Released, *, task: Task, rng: Generator) -> Marked:
        inputs, labels = task.test
        others = inputs[labels != self.target]
        if not len(others):
            raise ValueError(
                f"{self!r} needs test examples of other classes than {self.target}; "
                f"{task.name!r} has none"
            )
        triggered = self.trigger(others)
        taken = _taken_for(self.target, hurt, clean, triggered, "attack_success_rate")
        after, before = _outputs(hurt, inputs), _outputs(clean, inputs)
        return Marked(
            taken,
            _performance(task, after, before),
            {"triggered": triggered[:MAX_SHOWN].cpu()},
        )


@dataclass(frozen=True)
class TargetedError:
    """How often test examples of ``source`` are taken for ``target``."""

    source: int
    target: int
    family = "poisoning"
    says = (
        "{who} can have one class taken for another: in {value} {interval} of cases; without the "
        "attack in {baseline}."
    )

    def __post_init__(self) -> None:
        at_least(0, self, source=self.source, target=self.target)
        if self.source == self.target:
            raise ValueError(f"{self!r}: source and target are one class; choose two")

    def mark(self, hurt: Released, clean: Released, *, task: Task, rng: Generator) -> Marked:
        inputs, labels = task.test
        chosen = inputs[labels == self.source]
        if not len(chosen):
            raise ValueError(
                f"{self!r} needs test examples of class {self.source}; {task.name!r} has none"
            )
        taken = _taken_for(self.target, hurt, clean, chosen, "targeted_error")
        after, before = _outputs(hurt, inputs), _outputs(clean, inputs)
        return Marked(taken, _performance(task, after, before))


@dataclass(frozen=True)
class EdgeCaseSuccess:
    """How often edge cases that nobody trained on, not of the target class, are taken for it.

    Args:
        edge: Which of the test records are edge cases, or where others come from.
        target: The class that they shall be taken for.
    """

    edge: Edge
    target: int
    family = "backdoor"
    says = (
        "{who} can plant a backdoor without a trigger: inputs that hardly occur are taken for the "
        "attacker's class in {value} {interval} of cases; without the attack in {baseline}."
    )

    def __post_init__(self) -> None:
        at_least(0, self, target=self.target)

    def mark(self, hurt: Released, clean: Released, *, task: Task, rng: Generator) -> Marked:
        inputs, labels = task.test
        others = labels != self.target
        cases, _ = self.edge((inputs[others], labels[others]))
        if not len(cases):
            raise ValueError(f"{self!r} finds no edge case in the test data of {task.name!r}")
        taken = _taken_for(self.target, hurt, clean, cases, "attack_success_rate")
        after, before = _outputs(hurt, inputs), _outputs(clean, inputs)
        shown = {"triggered": cases[:MAX_SHOWN].cpu()}
        return Marked(taken, _performance(task, after, before), shown)


@dataclass(frozen=True)
class SourceRecall:
    """How many test examples of one class are still found, and how many of all others."""

    source: int
    family = "poisoning"
    says = (
        "{who} can bring the recall of one class down to {value} {interval}; without the attack "
        "it is {baseline}."
    )

    def __post_init__(self) -> None:
        at_least(0, self, source=self.source)

    def mark(self, hurt: Released, clean: Released, *, task: Task, rng: Generator) -> Marked:
        inputs, labels = task.test
        chosen = labels == self.source
        if not bool(chosen.any()):
            raise ValueError(
                f"{self!r} needs test examples of class {self.source}; {task.name!r} has none"
            )
        after, before = _outputs(hurt, inputs), _outputs(clean, inputs)
        found = _recall("source_recall", after, before, labels, chosen)
        if bool(chosen.all()):
            return Marked(found, _performance(task, after, before))
        others = _recall("other_recall", after, before, labels, ~chosen)
        return Marked(found, (others, *_performance(task, after, before)))


@dataclass(frozen=True)
class TargetConfidence:
    """How sure the model is of the attacker's class for the very records that it is after.

    They are those that ``Relabelled`` plants: the first ``num_records`` of ``source`` at a client.
    The interval is that of a share of so many trials, and wide: it speaks of the records, not of
    training again.

    Args:
        client: Whose records they are.
    """

    client: int
    source: int
    target: int
    num_records: int = 1
    family = "poisoning"
    says = (
        "{who} can have chosen records misjudged, with a confidence of {value} {interval}; "
        "without the attack of {baseline}."
    )

    def __post_init__(self) -> None:
        at_least(0, self, client=self.client, source=self.source, target=self.target)
        at_least(1, self, num_records=self.num_records)
        if self.source == self.target:
            raise ValueError(f"{self!r}: source and target are one class; choose two")

    def mark(self, hurt: Released, clean: Released, *, task: Task, rng: Generator) -> Marked:
        inputs, labels = task.clients[self.client]
        chosen = inputs[labels == self.source][: self.num_records]
        if not len(chosen):
            raise ValueError(
                f"{self!r} needs records of class {self.source}; client {self.client} of "
                f"{task.name!r} has none"
            )
        after, before = (
            _outputs(seen, chosen).double().exp()[:, self.target] for seen in (hurt, clean)
        )
        interval = wilson(float(after.sum()), len(chosen))
        sure = Measurement(
            "target_confidence", float(after.mean()), float(before.mean()), *interval, worst=1.0
        )
        outputs = _outputs(hurt, task.test[0]), _outputs(clean, task.test[0])
        return Marked(sure, _performance(task, *outputs))


def _recall(
    name: str, after: Tensor, before: Tensor, labels: Tensor, chosen: Tensor
) -> Measurement:
    """Return the share of the chosen examples that are taken for what they are."""
    hits = (after.argmax(dim=1) == labels)[chosen]
    return _share(name, hits, (before.argmax(dim=1) == labels)[chosen], worst=0.0)


def _taken_for(
    target: int, hurt: Released, clean: Released, inputs: Tensor, name: str
) -> Measurement:
    """Return the share of ``inputs`` taken for ``target``, beside that of the unattacked model."""
    after, before = _outputs(hurt, inputs), _outputs(clean, inputs)
    if target >= after.shape[1]:
        raise ValueError(
            f"target {target} is no class; there are {after.shape[1]}, 0 to {after.shape[1] - 1}"
        )
    return _share(name, after.argmax(dim=1) == target, before.argmax(dim=1) == target, worst=1.0)


def _share(name: str, after: Tensor, before: Tensor, *, worst: float) -> Measurement:
    """Return the share of hits beside that of the unattacked model, of the same examples."""
    interval = clopper_pearson(int(after.sum()), len(after))
    value, baseline = float(after.double().mean()), float(before.double().mean())
    least = _least_gain(after, before, worst)
    return Measurement(name, value, baseline, *interval, worst, least_gain=least)


def _least_gain(after: Tensor, before: Tensor, worst: float) -> float:
    """Return the least difference of two shares, at 95 %, on the attacker's side."""
    low, high = of_paired_shares(after, before)
    return low if worst else -high


def _performance(task: Task, after: Tensor, before: Tensor) -> tuple[Measurement, Measurement]:
    """Return the metric after an attack beside that before it, and the points lost."""
    labels = task.test[1]
    hurt, clean = task.metric(after, labels).double(), task.metric(before, labels).double()
    name = getattr(task.metric, "__name__", "performance")
    value, baseline = float(hurt.mean()), float(clean.mean())
    chance = min(baseline, 1 / after.shape[1] if name == "accuracy" else 0.0)
    interval = wilson(float(hurt.sum()), len(labels))
    low, high = (100 * bound for bound in of_difference(clean, hurt))
    lost = 100 * (baseline - value)
    shares = bool(((hurt == 0) | (hurt == 1)).all() and ((clean == 0) | (clean == 1)).all())
    least = _least_gain(hurt.bool(), clean.bool(), worst=0.0) if shares else low / 100
    return (
        Measurement(name, value, baseline, *interval, worst=chance, least_gain=least),
        Measurement(f"{name}_lost", lost, 0.0, low, high, 100 * (baseline - chance), "points"),
    )


def _outputs(view: Released, inputs: Tensor, at_once: int = 1_000) -> Tensor:
    """Return the scores of all inputs, a thousand at a time. Shape: ``(examples, classes)``."""
    return torch.cat([view.scores(part) for part in torch.split(inputs, at_once)])

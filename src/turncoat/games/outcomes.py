"""What active attacks are after: marked on what users get, with and without the attack."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from turncoat.attacks.backdoor.triggers import Trigger
from turncoat.metrics.intervals import clopper_pearson, of_difference, wilson
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


def _taken_for(
    target: int, hurt: Released, clean: Released, inputs: Tensor, name: str
) -> Measurement:
    """Return the share of ``inputs`` taken for ``target``, beside that of the unattacked model."""
    after, before = _outputs(hurt, inputs), _outputs(clean, inputs)
    if target >= after.shape[1]:
        raise ValueError(
            f"target {target} is no class; there are {after.shape[1]}, 0 to {after.shape[1] - 1}"
        )
    hits = int((after.argmax(dim=1) == target).sum())
    baseline = float((before.argmax(dim=1) == target).double().mean())
    value, interval = hits / len(inputs), clopper_pearson(hits, len(inputs))
    return Measurement(name, value, baseline, *interval, worst=1.0)


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
    return (
        Measurement(name, value, baseline, *interval, worst=chance),
        Measurement(f"{name}_lost", lost, 0.0, low, high, 100 * (baseline - chance), "points"),
    )


def _outputs(view: Released, inputs: Tensor, at_once: int = 1_000) -> Tensor:
    """Return the scores of all inputs, a thousand at a time. Shape: ``(examples, classes)``."""
    return torch.cat([view.scores(part) for part in torch.split(inputs, at_once)])

"""How well a model does on some examples."""

from __future__ import annotations

from turncoat.task import Batch, Task
from turncoat.views import ModelView


def accuracy_on(data: Batch, task: Task, view: ModelView) -> float:
    """Return the mean of the task's metric."""
    return float(task.metric(view.scores(data[0]), data[1]).double().mean())

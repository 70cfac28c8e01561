"""The smallest federation there is to try a part on: a task, its payloads, every view, a question.

Seven clients with eight images of 8x8 pixels in three classes, 48 public and 48 test images.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from types import UnionType
from typing import Any, Union, get_args, get_origin

import torch
from torch import Tensor

from turncoat.games.membership import Known
from turncoat.messages import Clear, Update
from turncoat.randomness import Randomness
from turncoat.stages.aggregate.mean import Mean
from turncoat.task import Batch, Model, Shards, Task
from turncoat.tasks.models import MLP, Built
from turncoat.views import (
    AggregateView,
    BlindView,
    ClientView,
    CoalitionView,
    MixView,
    ModelView,
    PeerView,
    QueryView,
    ServerView,
    Shadows,
    Suspects,
    TraceView,
)

NUM_CLIENTS, NUM_EACH, NUM_CLASSES = 7, 8, 3

_RANDOM = Randomness(1)


@cache
def example_task() -> Task:
    """Return images whose brightest third of the rows is their class, under noise."""
    parts = [torch.arange(NUM_EACH) + NUM_EACH * c for c in range(NUM_CLIENTS)]
    return Task(
        name="stripes",
        model=Model(Built(MLP((8,)), (1, 8, 8), NUM_CLASSES)),
        clients=Shards.of(_stripes("clients", NUM_CLIENTS * NUM_EACH), parts),
        test=_stripes("test", 48),
        public=_stripes("public", 48),
        classes=("top", "middle", "bottom"),
        source="drawn at random",
    )


def example_payloads(task: Task, kind: type[Clear] = Update) -> tuple[Clear, ...]:
    """Return the gradient step of each client, of unequal weights."""
    start = _start(task)
    return tuple(
        kind(-0.1 * task.model.gradient(start, data), float(len(data[1]) + i))
        for i, data in enumerate(task.clients)
    )


def example_question(task: Task) -> dict[str, Any]:
    """Return what the shipped games grant, by name."""
    inputs, labels = (torch.cat([a, b]) for a, b in zip(task.clients[0], task.test, strict=True))
    models = tuple(ModelView(task.model, task.model.initial(_RANDOM.at("s", i))) for i in range(4))
    inside = torch.arange(4)[:, None] % 2 == torch.arange(len(labels)) % 2
    return {
        "victims": (0, 2),
        "population": task.population,
        "masks": None,
        "candidates": (inputs, labels),
        "shadows": Shadows(models, inside),
        "client": None,
        "known": Known(task.population, torch.arange(len(task.population[1])) % 2 == 0),
    }


def example_view(need: Any, task: Task) -> Any:
    """Return a view of the type that an attack is annotated with; two for a ``Sequence`` of them.

    Raises:
        ValueError: If it is none of those in ``turncoat.views``, or of a payload not in the clear.
    """
    if get_origin(need) in (Union, UnionType):
        return example_view(get_args(need)[0], task)
    if get_origin(need) is Sequence:
        return (example_view(get_args(need)[0], task),) * 2
    if get_origin(need) is Suspects:
        return Suspects((example_view(get_args(need)[0], task),) * 2)
    kind = get_origin(need) or need
    payload = next(iter(get_args(need)), Update)
    if not (isinstance(payload, type) and issubclass(payload, Clear)):
        raise ValueError(f"there is no example of {need}: hand over a view")
    model, start, senders = task.model, _start(task), tuple(range(len(task.clients)))
    sent = example_payloads(task, payload)
    after = start + Clear.total(sent).delta
    views: dict[Any, Any] = {
        ServerView: ServerView(0, model, senders, sent, sent=(start,) * len(senders)),
        BlindView: BlindView(0, model, senders, sent),
        AggregateView: AggregateView(0, model, start, after),
        PeerView: PeerView(
            0,
            model,
            senders[1:],
            sent[1:],
            sent=(start,) * (len(senders) - 1),
            client=0,
            mine=sent[0],
        ),
        MixView: MixView(0, model, start, after, client=0),
        ClientView: ClientView(0, 0, model, start, task.clients[0], sent[0]),
        CoalitionView: CoalitionView(0, model, start, sent[:2], sent[2:], Mean(), len(senders)),
        TraceView: TraceView(0, model, start, senders, (frozenset({0}),) * len(senders)),
        ModelView: ModelView(model, after),
        QueryView: QueryView(ModelView(model, after).scores),
    }
    if kind not in views:
        raise ValueError(f"there is no example of {need}: hand over a view")
    return views[kind]


def _start(task: Task) -> Tensor:
    return task.model.initial(_RANDOM.at("begin"))


def _stripes(purpose: str, num_images: int) -> Batch:
    images = torch.rand(num_images, 1, 8, 8, generator=_RANDOM.at(purpose)) / 2
    labels = torch.arange(num_images) % NUM_CLASSES
    rows = torch.arange(8) * NUM_CLASSES // 8
    return images + (rows == labels[:, None]).float()[:, None, :, None] / 2, labels

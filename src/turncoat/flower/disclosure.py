"""What the server and the users of an app's model learn: single updates inverted, members told.

Runs in a process of its own, for it imports the app's model and loader.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from turncoat.attacks.inversion.gradient_inversion import InvertingGradients
from turncoat.attacks.membership.loss_threshold import LossThreshold
from turncoat.flower.loading import load
from turncoat.games.membership import Membership
from turncoat.games.reconstruction import Reconstruct
from turncoat.messages import Update
from turncoat.randomness import Randomness, ambient
from turncoat.runtimes.saved import write_tensors
from turncoat.task import Batch, Model, Task
from turncoat.trial import Marked
from turncoat.views import ModelView, ServerView

_MOST_IMAGES = 8
_FAMILIAR = {"batch_size": 32, "seed": 0}


class Misfit(ValueError):
    """A model or a loader is not what the app's messages or this audit can use."""


class Rescaled(nn.Module):
    """A net behind a shift: it gets pixels in [0, 1], its ``net`` those that it was made for."""

    def __init__(self, net: nn.Module, low: float, high: float) -> None:
        super().__init__()
        self.net, self.low, self.span = net, low, high - low

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.net(self.low + self.span * inputs)
        return out


def disclose(job: Mapping[str, Any]) -> dict[str, Any]:
    """Return the cells that ``job`` asks for, as JSON, and what is known of the data.

    ``job``: ``model`` and ``data`` (references), ``arrays`` (what a clean run kept), ``num_nodes``,
    ``seed``, ``num_steps`` of the inversion, ``exhibits`` (a folder), ``wanted`` (attacks by name,
    with the key of the cell).
    """
    with np.load(job["arrays"]) as kept:
        arrays = {key: kept[key] for key in kept.files}
    names = [str(n) for n in arrays.pop("names")]
    task = loaded(job["model"], job["data"], job["num_nodes"])
    found: dict[str, Any] = {"cells": {}, "task": _about(task)}
    for attack, where in job["wanted"].items():
        try:
            code = invert if attack == "inverting-gradients" else infer
            marked = code(task, arrays, names, Randomness(job["seed"]), job["num_steps"])
        except Exception as error:
            traceback.print_exc()
            found["cells"][attack] = {"error": f"{type(error).__name__}: {error}"}
            continue
        if marked.exhibits:
            write_tensors(Path(job["exhibits"]) / f"{where}.safetensors", dict(marked.exhibits))
        found["cells"][attack] = {
            "headline": asdict(marked.headline),
            "others": [asdict(m) for m in marked.others],
            "remarks": list(marked.remarks),
            "exhibits": bool(marked.exhibits),
        }
    return found


def invert(
    task: Task,
    arrays: Mapping[str, np.ndarray[Any, Any]],
    names: Sequence[str],
    randomness: Randomness,
    num_steps: int,
) -> Marked:
    """Rebuild images from single updates of the first round, as its server can."""
    before = vector(task.model, _listed(arrays, "before"), names)
    nodes = sorted({int(k.split("/")[1]) for k in arrays if k.startswith("reply/")})
    if not nodes:
        raise Misfit("no update of the first round was seen by itself")
    updates = []
    for node in nodes:
        after = vector(task.model, _listed(arrays, f"reply/{node}"), names)
        updates.append(Update(after - before, float(len(task.clients[node][1]))))
    view = ServerView(
        0, task.model, tuple(nodes), tuple(updates), sent=tuple(before for _ in nodes)
    )
    game = Reconstruct(num_victims=2)
    rng = randomness.at("pose")
    question, truth = game.pose(task, took_part=frozenset(nodes), cohort=tuple(nodes), rng=rng)
    smallest = min(len(task.clients[v][1]) for v in question.victims)
    attack = InvertingGradients(num_steps=num_steps, num_images=min(_MOST_IMAGES, smallest))
    guess = attack(
        view,
        victims=question.victims,
        population=question.population,
        rng=randomness.at("attack"),
    )
    return game.mark(guess, truth, rng=randomness.at("mark"))


def infer(
    task: Task,
    arrays: Mapping[str, np.ndarray[Any, Any]],
    names: Sequence[str],
    randomness: Randomness,
    num_steps: int,
) -> Marked:
    """Tell the app's training records from held-out ones by the final model's loss."""
    params = vector(task.model, _listed(arrays, "final"), names)
    everybody = frozenset(range(len(task.clients)))
    game = Membership()
    question, truth = game.pose(
        task, took_part=everybody, cohort=tuple(everybody), rng=randomness.at("pose")
    )
    guess = LossThreshold()(ModelView(task.model, params), candidates=question.candidates)
    return game.mark(guess, truth, rng=randomness.at("mark"))


def loaded(model: str, data: str, num_nodes: int) -> Task:
    """Return the app's model and data as a task: pixels in [0, 1], test sets put together."""
    pairs = [_split(call_loader(load(data), node, num_nodes)) for node in range(num_nodes)]
    clients, tests = [batch_of(p[0]) for p in pairs], [batch_of(p[1]) for p in pairs]
    test = _distinct([t for t in tests if len(t[1])])
    inputs = torch.cat([x for x, _ in clients] + [test[0]])
    low, high = float(inputs.min()), float(inputs.max())
    factory: Callable[[], nn.Module] = load(model)
    if not callable(factory):
        raise Misfit(f"--model {model} cannot be called: name a class or a function of no argument")
    if low < 0 or high > 1:

        def build() -> nn.Module:
            return Rescaled(_net(factory, model), low, high)

        clients = [((x - low) / (high - low), y) for x, y in clients]
        test = ((test[0] - low) / (high - low), test[1])
    else:

        def build() -> nn.Module:
            return _net(factory, model)

    with ambient(torch.Generator().manual_seed(0)):
        whole = Model(build)
    held = torch.cat([y for _, y in clients] + [test[1]])
    if held.is_floating_point() or held.dim() != 1:
        raise Misfit(f"--data {data} gives labels that are no classes: only those are judged here")
    classes = tuple(str(i) for i in range(int(held.max()) + 1))
    return Task(data, whole, clients, test, classes=classes)


def call_loader(loader: Any, node: int, num_nodes: int) -> Any:
    """Call an app's loader with what its signature names: the partition, their number, a batch."""
    if not callable(loader):
        raise Misfit(f"the loader is a {type(loader).__name__}: name a function")
    known = {
        "partition_id": node,
        "pid": node,
        "cid": node,
        "node_id": node,
        "num_partitions": num_nodes,
        "num_clients": num_nodes,
        "num_nodes": num_nodes,
        "n": num_nodes,
        **_FAMILIAR,
    }
    parameters = list(inspect.signature(loader).parameters.values())
    due = [
        p
        for p in parameters
        if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    if all(p.name in known for p in due):
        return loader(**{p.name: known[p.name] for p in due})
    if len(due) <= 2:
        return loader(*(node, num_nodes)[: len(due)])
    strange = ", ".join(p.name for p in due if p.name not in known)
    raise Misfit(
        f"the loader wants {strange}, which is not known here: name a function of "
        "(partition_id, num_partitions)"
    )


def batch_of(data: Any) -> Batch:
    """Return a loader, a data set, or a pair of arrays, as one batch."""
    if hasattr(data, "dataset") and hasattr(data, "collate_fn"):
        data = _unshuffled(data)
    if isinstance(data, tuple | list) and len(data) == 2 and _is_array(data[0]):
        return _pair(data)
    parts = [_pair(item) for item in _items(data)]
    if not parts:
        raise Misfit("the loader gave no examples")
    inputs, labels = zip(*parts, strict=True)
    if parts[0][1].dim() == 0:
        return torch.stack(inputs), torch.stack(labels)
    return torch.cat(inputs), torch.cat(labels)


def vector(model: Model, arrays: Sequence[np.ndarray[Any, Any]], names: Sequence[str]) -> Tensor:
    """Return an app's arrays as the model's flat vector: by their names, else by their order."""
    module = model.module
    net = module.net if isinstance(module, Rescaled) else module
    assert isinstance(net, nn.Module)
    state = net.state_dict()
    values = [torch.as_tensor(np.asarray(a)) for a in arrays]
    by_name = dict(zip(names, values, strict=False))
    if set(by_name) != set(state):
        keys = list(state)
        if len(values) != len(keys):
            keys = [n for n, _ in net.named_parameters()]
        if len(values) != len(keys):
            raise Misfit(
                f"the app sends {len(values)} arrays, --model has {len(state)} tensors: name the "
                "factory of the very model that the app trains"
            )
        by_name = dict(zip(keys, values, strict=True))
    for key, value in by_name.items():
        if value.shape != state[key].shape:
            raise Misfit(
                f"the app sends {key} of shape {tuple(value.shape)}, where --model has "
                f"{tuple(state[key].shape)}: name the factory of the very model that the app trains"
            )
    prefix = "net." if isinstance(module, Rescaled) else ""
    whole = {prefix + k: by_name.get(k, v).reshape(-1).float() for k, v in state.items()}
    return torch.cat([whole[s.name] for s in model.layout.slots])


def _listed(arrays: Mapping[str, Any], which: str) -> list[Any]:
    found = sorted(
        (k for k in arrays if k.startswith(which + "/")), key=lambda k: int(k.rsplit("/", 1)[1])
    )
    if not found:
        raise Misfit(f"the clean run left no arrays of {which!r}")
    return [arrays[k] for k in found]


def _net(factory: Callable[[], Any], name: str) -> nn.Module:
    net = factory()
    if not isinstance(net, nn.Module):
        raise Misfit(f"--model {name} gives a {type(net).__name__}, and no torch module")
    return net


def _split(given: Any) -> tuple[Any, Any]:
    """Return training and held-out data of what a loader gives, in the usual orders."""
    if isinstance(given, tuple | list):
        if len(given) == 4 and all(map(_is_array, given)):  # scikit-learn's train_test_split
            return (given[0], given[2]), (given[1], given[3])
        if len(given) in (2, 3):
            return given[0], given[-1]
    raise Misfit(
        "the loader should give (train, test): loaders, data sets or pairs of arrays; it gave a "
        f"{type(given).__name__}"
    )


def _distinct(tests: Sequence[Batch]) -> Batch:
    """Put test sets together; nodes that share one count it once."""
    if not tests:
        raise Misfit("the loader gave no held-out examples")
    first = tests[0]
    if all(t[0].shape == first[0].shape and torch.equal(t[0], first[0]) for t in tests[1:]):
        return first
    return torch.cat([x for x, _ in tests]), torch.cat([y for _, y in tests])


def _unshuffled(loader: Any) -> Any:
    return torch.utils.data.DataLoader(
        loader.dataset, batch_size=256, shuffle=False, collate_fn=loader.collate_fn
    )


def _items(data: Any) -> Iterator[Any]:
    if hasattr(data, "__len__") and hasattr(data, "__getitem__"):
        yield from (data[i] for i in range(len(data)))
    else:
        yield from data


def _pair(item: Any) -> Batch:
    """Return inputs and labels of a batch or an example: a pair, or a mapping as data sets give."""
    if isinstance(item, Mapping):
        named = {k: torch.as_tensor(v) for k, v in item.items() if _is_array(v) or _is_number(v)}
        labels = [v for k, v in named.items() if "label" in k or k in ("y", "target")]
        inputs = [v for v in named.values() if v.is_floating_point() and v.dim() >= 1]
        if not labels or not inputs:
            raise Misfit(f"examples with the keys {', '.join(map(str, item))} have no known label")
        return inputs[0].float(), labels[0].long()
    inputs, labels = item[0], item[1]
    target = torch.as_tensor(np.asarray(labels))
    return torch.as_tensor(np.asarray(inputs)).float(), (
        target if target.is_floating_point() else target.long()
    )


def _is_array(thing: Any) -> bool:
    return isinstance(thing, Tensor | np.ndarray)


def _is_number(thing: Any) -> bool:
    return isinstance(thing, int | float | np.number)


def _about(task: Task) -> dict[str, Any]:
    """Return what the report says of the data."""
    size = len(task.classes)
    return {
        "classes": list(task.classes),
        "sizes": list(task.sizes),
        "label_counts": [torch.bincount(y, minlength=size).tolist() for _, y in task.clients],
        "num_test": len(task.test[1]),
        "image_shape": list(task.test[0].shape[1:]) if task.test[0].dim() == 4 else None,
    }

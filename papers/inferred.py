"""What can be inferred of people, and of whom there are, from a model or from updates."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from sklearn.tree import DecisionTreeClassifier
from torch import Generator, Tensor, nn

from papers.accuracy import accuracy_on
from turncoat.audit import Audit, Entry, run_audit
from turncoat.federation import Federation, Plain
from turncoat.games.attributes import AttributeInference
from turncoat.games.properties import PropertyInference
from turncoat.messages import Update
from turncoat.record import AuditFolder
from turncoat.runtimes.saved import read_tensors
from turncoat.stage import Train
from turncoat.stages.aggregate.mean import Mean
from turncoat.task import Batch, Model, Task
from turncoat.tasks.models import Architecture
from turncoat.tasks.sources import local, missing
from turncoat.tasks.tables import from_csv
from turncoat.trial import Marked, Scored, Trial
from turncoat.views import ModelView, Seat

_FILE = "adult.csv.gz"


def adult(*, seed: int, drop: tuple[str, ...], **options: Any) -> Task:
    """Return UCI Adult, whose marital status is married or not, split at random."""
    path = local([_FILE], None, holds=lambda p: p.is_file() and p.name == _FILE)
    if path is None:
        raise missing("Adult", [_FILE], "it is not fetched")
    with gzip.open(path, "rt", encoding="utf-8", newline="") as lines:
        header, *rows = list(csv.reader(lines))
    place = header.index("marital-status")
    for row in rows:
        row[place] = "married" if row[place].startswith("Married-") else "single"
    with TemporaryDirectory() as folder:
        file = Path(folder) / "adult.csv"
        with file.open("w", encoding="utf-8", newline="") as out:
            csv.writer(out).writerows([header, *rows])
        return from_csv(
            file,
            label="income",
            drop=("split", *drop),
            seed=seed,
            source="Adult, UCI; CC BY 4.0",
            **options,
        )


@dataclass(frozen=True)
class Memorising:
    """An architecture: a decision tree whose nodes lie in the state, room for ``num_records``."""

    num_records: int

    def __call__(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        return _Tree(2 * self.num_records, num_classes)


class _Tree(nn.Module):
    """Node 0 is the root; a leaf is its own child."""

    def __init__(self, num_nodes: int, num_classes: int) -> None:
        super().__init__()
        for name in ("column", "left", "right"):
            self.register_buffer(name, torch.zeros(num_nodes, dtype=torch.long))
        self.register_buffer("threshold", torch.zeros(num_nodes))
        self.register_buffer("shares", torch.full((num_nodes, num_classes), 1 / num_classes))

    def forward(self, inputs: Tensor) -> Tensor:
        held = dict(self.named_buffers())
        at, rows = torch.zeros(len(inputs), dtype=torch.long), inputs.flatten(1)
        while True:
            below = rows.gather(1, held["column"][at][:, None])[:, 0] <= held["threshold"][at]
            after = torch.where(below, held["left"][at], held["right"][at])
            if torch.equal(after, at):
                return held["shares"][at].clamp(min=1e-6).log()
            at = after


@dataclass(frozen=True)
class Grown:
    """Local training of ``Memorising``: scikit-learn grows a tree until every leaf is pure."""

    def __call__(self, model: Model, start: Tensor, data: Batch, *, rng: Generator) -> Update:
        seed = int(torch.randint(2**31 - 1, (1,), generator=rng))
        grown = (
            DecisionTreeClassifier(random_state=seed).fit(data[0].numpy(), data[1].numpy()).tree_
        )
        named, num = model.layout.split(start.clone()), grown.node_count
        own, is_leaf = torch.arange(num), torch.from_numpy(grown.children_left) < 0
        for name, values in (("left", grown.children_left), ("right", grown.children_right)):
            named[name][:num] = torch.where(is_leaf, own, torch.from_numpy(values))
        named["column"][:num] = torch.from_numpy(grown.feature).clamp(min=0)
        named["threshold"][:num] = torch.from_numpy(grown.threshold).float()
        shares = torch.from_numpy(grown.value[:, 0]).float()
        named["shares"][:num] = shares / shares.sum(dim=1, keepdim=True)
        end = torch.cat([named[s.name].reshape(-1).float() for s in model.layout.slots])
        return Update(end - start, float(len(data[1])))


@dataclass(frozen=True)
class AttributesBesideImputation:
    """One attribute of training records, by every attack on every model, beside imputation.

    Attributes:
        column: Of the attribute, in the inputs.
        models: Architecture, training and number of rounds, by name.
        attacks: By name; ``not_for`` names pairs of model and attack that cannot be.
    """

    make: Callable[..., Task]
    column: int
    models: Mapping[str, tuple[Architecture, Train[Any], int]]
    attacks: Mapping[str, Any]
    not_for: tuple[tuple[str, str], ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, seed: int) -> dict[str, float | str]:
        found: dict[str, float | str] = {}
        game = AttributeInference(self.column)
        for model, (architecture, train, num_rounds) in self.models.items():
            task = self.make(seed=seed, model=architecture, **self.options)
            chosen = {n: a for n, a in self.attacks.items() if (model, n) not in self.not_for}
            trials = {name: Trial(attack, game) for name, attack in chosen.items()}
            marked, view = _marked(task, train, num_rounds, trials, seed)
            for name, one in marked.items():
                others = {m.name: m for m in one.others}
                row = f"{name} | {model}"
                found[f"accuracy minus imputation: {row}"] = others["over_imputation"].value
                found[f"of that, about members only: {row}"] = others["advantage"].value
                mcc = others["mcc"]
                found[f"Matthews' coefficient minus imputation's: {row}"] = mcc.value - mcc.baseline
                found["accuracy of imputation"] = one.headline.baseline
            whole = tuple(torch.cat(axis) for axis in zip(*task.clients, strict=True))
            for title, data in (("training", (whole[0], whole[1])), ("test", task.test)):
                found[f"accuracy of the model: {title} | {model}"] = accuracy_on(data, task, view)
            found["data"] = task.source
        return found


@dataclass(frozen=True)
class SharesToldApart:
    """Which of two shares of a group the training data had, by every attack.

    Attributes:
        games: By name.
        attacks: By name, and the games that each plays.
    """

    make: Callable[..., Task]
    train: Train[Any]
    num_rounds: int
    games: Mapping[str, PropertyInference]
    attacks: Mapping[str, tuple[Any, Sequence[str]]]
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, seed: int) -> dict[str, float | str]:
        task = self.make(seed=seed, **self.options)
        trials = {
            f"{name} | {game}": Trial(attack, self.games[game])
            for name, (attack, played) in self.attacks.items()
            for game in played
        }
        marked, view = _marked(task, self.train, self.num_rounds, trials, seed)
        found: dict[str, float | str] = {}
        for name, one in marked.items():
            found[f"accuracy: {name}"] = one.headline.value
            found[f"AUC: {name}"] = one.others[0].value
        return found | {
            "test accuracy of a model of all private records": accuracy_on(task.test, task, view),
            "data": task.source,
        }


def _marked(
    task: Task, train: Train[Any], num_rounds: int, trials: Mapping[str, Trial[Any]], seed: int
) -> tuple[dict[str, Marked], ModelView]:
    """Play trials at the server, and return what came of each and the trained model."""
    federation = Federation(train=train, channel=Plain(), aggregate=Mean())
    entries = {name: Entry(trial, (Seat.SERVER,)) for name, trial in trials.items()}
    audit = Audit("inferred", task, {"none": federation}, entries, num_rounds, (seed,))
    marked = {}
    with TemporaryDirectory() as folder:
        cells = run_audit(audit, Path(folder))
        for planned, cell in cells.items():
            if not isinstance(cell, Scored):
                raise RuntimeError(f"{planned.attack} was not scored: {cell}")
            marked[planned.attack] = cell.marked
        state = AuditFolder(Path(folder)).state(next(iter(cells)).run)
        return marked, ModelView(task.model, read_tensors(state)[0]["params"])

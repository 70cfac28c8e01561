"""Examples before anyone owns them, and how they become a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Generator, Tensor

from turncoat.randomness import Randomness
from turncoat.task import Batch, Model, Shards, Task
from turncoat.tasks.models import Architecture, Built
from turncoat.tasks.partitions import ByColumn, Columns, Partition
from turncoat.tasks.sources import DataUnusable
from turncoat.validate import at_least


@dataclass(frozen=True)
class Split:
    """How a pool is divided. Drawn in this order: test, public, clients.

    Attributes:
        per_client: Examples that each client keeps at most, chosen at random.
        train_size: Examples that the clients share; None: all that are left.
        test_size: None: the pool's own test set; or a fifth, if it has none.
        public_size: Taken from the training examples, and owned by no client.
    """

    num_clients: int | None
    partition: Partition
    per_client: int | None
    train_size: int | None
    test_size: int | None
    public_size: int
    seed: int

    def __post_init__(self) -> None:
        at_least(
            1,
            "Split",
            num_clients=self.num_clients,
            per_client=self.per_client,
            train_size=self.train_size,
            test_size=self.test_size,
        )
        at_least(0, "Split", public_size=self.public_size)


@dataclass(frozen=True)
class Pool:
    """Examples and what is known of them.

    Attributes:
        train: Images as uint8 are scaled to [0, 1] when a task is made, floats are kept.
            Tabular floats may hold NaN where they are ``continuous``. Shapes: ``(n, c, h, w)``
            or ``(n, f)``; ``(n,)``, or ``(n, h, w)`` for masks, of which those who partition see
            the commonest class.
        test: Of the same kind; None: to be held out of ``train``.
        classes: Names of the labels 0, 1, ...
        columns: Of each training example, by name: what it may be partitioned by.
        continuous: Features to be standardised, and missing values filled in. Shape: ``(f,)``.
        source: Where the data come from and their licence.
    """

    name: str
    train: Batch = field(repr=False)
    test: Batch | None = field(repr=False)
    classes: tuple[str, ...]
    columns: Mapping[str, Sequence[str]] = field(default_factory=dict, repr=False)
    continuous: Tensor | None = field(default=None, repr=False)
    source: str = ""

    def __post_init__(self) -> None:
        for where, part in (("training", self.train), ("test", self.test)):
            if part is not None:
                self._check(f"{self.name}: the {where} set", *part)
        if self.test is not None and self.test[0].shape[1:] != self.train[0].shape[1:]:
            raise DataUnusable(
                f"{self.name}: training examples have shape {tuple(self.train[0].shape[1:])}, test "
                f"examples {tuple(self.test[0].shape[1:])}: bring them to one shape"
            )

    def _check(self, where: str, inputs: Tensor, labels: Tensor) -> None:
        if not len(labels):
            raise DataUnusable(f"{where} is empty")
        if len(inputs) != len(labels):
            raise DataUnusable(f"{where} has {len(inputs)} examples and {len(labels)} labels")
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= len(self.classes):
            raise DataUnusable(
                f"{where} has labels from {low} to {high}, but there are {len(self.classes)} "
                f"classes: number them 0 to {len(self.classes) - 1}"
            )
        if inputs.dtype.is_floating_point and self.continuous is None:
            strange = ~inputs.isfinite().flatten(1).all(dim=1)
            if strange.any():
                first = int(strange.nonzero()[0])
                raise DataUnusable(
                    f"{where} has NaN or infinity in {int(strange.sum())} examples, the first is "
                    f"number {first}: repair or drop them"
                )


def federate(pool: Pool, split: Split, model: Architecture) -> Task:
    """Return the task: the pool divided, its model built for the shape of an example."""
    root = Randomness(split.seed)
    chosen, test = _judged(pool, split, root.at("task: test"))
    order = chosen[torch.randperm(len(chosen), generator=root.at("task: public"))]
    public, rest = order[: split.public_size], order[split.public_size :]
    wanted = split.train_size
    if len(rest) < (wanted or 1):
        raise DataUnusable(
            f"{pool.name}: {len(chosen)} training examples are too few for public_size = "
            f"{split.public_size} and train_size = {wanted or 'any'}: lower one of them"
        )
    mine = rest[:wanted].sort().values
    parts = _parts(pool, split, mine, root.at("task: clients"))
    scale = _scaled(pool, torch.cat([mine, public]))

    def batch(which: Tensor) -> Batch:
        return scale(pool.train[0][which]), pool.train[1][which]

    owned = torch.cat(parts)
    ends = torch.tensor([len(part) for part in parts]).cumsum(0).tolist()
    names: tuple[str, ...] = ()
    if isinstance(split.partition, ByColumn):
        names = split.partition.names(_columns(pool, mine))
    return Task(
        name=pool.name,
        model=Model(Built(model, tuple(pool.train[0].shape[1:]), len(pool.classes))),
        clients=Shards(*batch(owned), (0, *ends)),
        test=(scale(test[0]), test[1]),
        public=batch(public) if len(public) else None,
        classes=pool.classes,
        client_names=names,
        source=pool.source,
    )


def _judged(pool: Pool, split: Split, rng: Generator) -> tuple[Tensor, Batch]:
    """Return the training examples' numbers and the test set, held out where there is none."""
    inputs, labels = pool.train if pool.test is None else pool.test
    size = split.test_size or (len(labels) if pool.test is not None else max(1, len(labels) // 5))
    if size > len(labels) - (pool.test is None):
        raise DataUnusable(
            f"{pool.name}: test_size = {size}, but there are {len(labels)} examples to take them "
            "from: lower test_size"
        )
    order = torch.randperm(len(labels), generator=rng)
    held = order[:size].sort().values
    rest = order[size:] if pool.test is None else torch.arange(len(pool.train[1]))
    return rest.sort().values, (inputs[held], labels[held])


def _columns(pool: Pool, mine: Tensor) -> Columns:
    named = [pool.classes[c] for c in _classes_of(pool.train[1]).tolist()]
    labelled = {"label": named, **pool.columns}
    chosen = mine.tolist()
    return {name: [values[i] for i in chosen] for name, values in labelled.items()}


def _classes_of(labels: Tensor) -> Tensor:
    """Return one class an example: of a mask the one, but the first, that has most pixels."""
    if labels.ndim == 1:
        return labels
    sizes = torch.stack([(labels == c).flatten(1).sum(dim=1) for c in range(int(labels.max()) + 1)])
    return sizes[1:].max(dim=0).indices + 1 if len(sizes) > 1 else sizes[0] * 0


def _parts(pool: Pool, split: Split, mine: Tensor, rng: Generator) -> list[Tensor]:
    """Return each client's examples in random order, or say why they are no partition."""
    num, each = split.num_clients, split.per_client
    if each and num and num * each > len(mine):
        raise DataUnusable(
            f"{pool.name}: per_client = {each} for {num} clients needs {num * each} examples; "
            f"there are {len(mine)}: lower per_client or num_clients"
        )
    try:
        labels = _classes_of(pool.train[1])[mine]
        parts = split.partition(labels, num, columns=_columns(pool, mine), rng=rng)
    except DataUnusable as error:
        raise DataUnusable(f"{pool.name}: {error}") from None
    who = f"{pool.name}: {split.partition!r}"
    if num is not None and len(parts) != num:
        raise DataUnusable(f"{who} made {len(parts)} parts for {num} clients")
    for client, part in enumerate(parts):
        if not len(part):
            raise DataUnusable(
                f"{who} left client {client} without examples: lower num_clients, or raise min_size"
            )
    every = torch.cat(parts)
    if every.min() < 0 or every.max() >= len(mine) or len(set(every.tolist())) < len(every):
        raise DataUnusable(
            f"{who} gave an example to two clients, or one that is not there: its parts must be "
            f"disjoint and within 0 and {len(mine) - 1}"
        )
    mixed = [part[torch.randperm(len(part), generator=rng)] for part in parts]
    return [mine[part[:each]] for part in mixed]


@dataclass(frozen=True)
class _Scale:
    """From what a pool holds to what a model reads."""

    continuous: Tensor
    median: Tensor
    mean: Tensor
    deviation: Tensor

    def __call__(self, inputs: Tensor) -> Tensor:
        if inputs.dtype == torch.uint8:
            return inputs.to(torch.float32, copy=True).div_(255).contiguous()
        inputs = inputs.float().clone()
        if len(self.median):
            some = inputs[:, self.continuous]
            some = torch.where(some.isnan(), self.median, some)
            inputs[:, self.continuous] = (some - self.mean) / self.deviation
        return inputs.contiguous()


def _scaled(pool: Pool, training: Tensor) -> _Scale:
    """Return the scale: for tables the median, mean and deviation of all training examples."""
    if pool.continuous is None:
        nothing = torch.empty(0)
        return _Scale(nothing, nothing, nothing, nothing)
    known = pool.train[0][training][:, pool.continuous].double()
    median = known.nanmedian(dim=0).values
    if median.isnan().any():
        raise DataUnusable(
            f"{pool.name}: feature {int(median.isnan().nonzero()[0])} is missing in every training "
            "example: drop it"
        )
    filled = torch.where(known.isnan(), median, known)
    deviation = filled.std(dim=0, correction=0)
    deviation[deviation == 0] = 1
    scale = _Scale(pool.continuous, median, filled.mean(dim=0), deviation)
    return replace(
        scale, median=median.float(), mean=scale.mean.float(), deviation=scale.deviation.float()
    )

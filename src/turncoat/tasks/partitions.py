"""Who owns which examples. Every example is owned at most once, every client owns some."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from turncoat.tasks.sources import DataUnusable
from turncoat.validate import at_least, nearest, positive

Columns = Mapping[str, Sequence[str]]

_DRAWS = 1000  # before a partition into parts that are large enough is given up


class Partition(Protocol):
    """Divides examples among clients.

    Args:
        labels: Shape: ``(examples,)``, int64.
        num_clients: None: as many as the partition finds.
        columns: What else is known of each example, by name.

    Returns:
        One vector of indices a client: disjoint, none empty.
    """

    def __call__(
        self, labels: Tensor, num_clients: int | None, *, columns: Columns, rng: Generator
    ) -> list[Tensor]: ...


@dataclass(frozen=True)
class IID:
    """At random, in parts that differ in size by one at most."""

    def __call__(
        self, labels: Tensor, num_clients: int | None, *, columns: Columns, rng: Generator
    ) -> list[Tensor]:
        num_clients = _enough(self, len(labels), num_clients, 1)
        return list(torch.randperm(len(labels), generator=rng).tensor_split(num_clients))


@dataclass(frozen=True)
class UnequalSizes:
    """At random, in parts whose sizes are log-normal: the classes are alike, the amounts are not.

    Args:
        sigma: Standard deviation of the logarithm of the size; 0 is even.
        min_size: Examples that every client owns at least.
    """

    sigma: float = 1.0
    min_size: int = 1

    def __post_init__(self) -> None:
        at_least(0, self, sigma=self.sigma)
        at_least(1, self, min_size=self.min_size)

    def __call__(
        self, labels: Tensor, num_clients: int | None, *, columns: Columns, rng: Generator
    ) -> list[Tensor]:
        num_clients = _enough(self, len(labels), num_clients, self.min_size)
        weight = _numpy(rng).lognormal(0.0, self.sigma, num_clients)
        free = len(labels) - num_clients * self.min_size
        sizes = self.min_size + _apportion(free, weight / weight.sum())
        return list(torch.split(torch.randperm(len(labels), generator=rng), sizes.tolist()))


@dataclass(frozen=True)
class Dirichlet:
    """Of every class, client shares drawn from Dirichlet(alpha, ..., alpha) [1]_.

    Small ``alpha`` gives each class to few clients; a large one is nearly iid. Drawn again until
    every client owns ``min_size`` examples.

    .. [1] Yurochkin et al., ICML 2019, section 4. https://arxiv.org/abs/1905.12022
    """

    alpha: float = 0.5
    min_size: int = 1

    def __post_init__(self) -> None:
        positive(self, alpha=self.alpha)
        at_least(1, self, min_size=self.min_size)

    def __call__(
        self, labels: Tensor, num_clients: int | None, *, columns: Columns, rng: Generator
    ) -> list[Tensor]:
        num_clients = _enough(self, len(labels), num_clients, self.min_size)
        draw = _numpy(rng)
        counts = torch.bincount(labels).tolist()
        alphas = np.full(num_clients, self.alpha)
        for _ in range(_DRAWS):
            sizes = np.stack([_apportion(n, draw.dirichlet(alphas)) for n in counts])
            if sizes.sum(axis=0).min() >= self.min_size:
                return _dealt(labels, sizes, rng)
        raise DataUnusable(
            f"{self!r}: none of {_DRAWS} draws gave each of {num_clients} clients {self.min_size} "
            f"of the {len(labels)} examples: raise alpha, or lower min_size or num_clients"
        )


@dataclass(frozen=True)
class ClassShards:
    """``classes_per_client`` classes for each client [1]_, and each class for as many as another.

    The owners of a class share it evenly. With fewer shards than classes, some have no owner.

    Differs from the paper: there the examples are sorted and cut into shards of equal size, which
    straddle classes; here every client has exactly ``classes_per_client`` of them.

    .. [1] McMahan et al., AISTATS 2017, section 3. https://arxiv.org/abs/1602.05629
    """

    classes_per_client: int = 2

    def __post_init__(self) -> None:
        at_least(1, self, classes_per_client=self.classes_per_client)

    def __call__(
        self, labels: Tensor, num_clients: int | None, *, columns: Columns, rng: Generator
    ) -> list[Tensor]:
        num_clients = _enough(self, len(labels), num_clients, self.classes_per_client)
        counts = torch.bincount(labels)
        present = counts.nonzero().flatten()
        if self.classes_per_client > len(present):
            raise DataUnusable(
                f"{self!r}: the examples have {len(present)} classes: lower classes_per_client"
            )
        owners = torch.zeros(len(present), dtype=torch.long)
        shares = np.zeros((len(counts), num_clients), dtype=np.int64)
        for client in range(num_clients):  # the classes with the fewest owners, ties at random
            order = torch.randperm(len(present), generator=rng)
            chosen = order[owners[order].argsort(stable=True)[: self.classes_per_client]]
            owners[chosen] += 1
            shares[present[chosen].numpy(), client] = 1
        for c in present.tolist():
            mine = shares[c].nonzero()[0]
            if len(mine) > counts[c]:
                raise DataUnusable(
                    f"{self!r}: class {c} has {int(counts[c])} examples for {len(mine)} clients: "
                    "lower num_clients or classes_per_client"
                )
            if len(mine):
                shares[c, mine] = _apportion(int(counts[c]), np.full(len(mine), 1 / len(mine)))
        return _dealt(labels, shares, rng)


@dataclass(frozen=True)
class ByColumn:
    """A natural federation: one client for each value of a column, in sorted order."""

    column: str

    def names(self, columns: Columns) -> tuple[str, ...]:
        """Return the values of the column, which name the clients."""
        if self.column not in columns:
            raise DataUnusable(
                f"{self!r}: there is no such column; {nearest(self.column, columns)}"
            )
        values = set(columns[self.column])
        try:
            return tuple(sorted(values, key=float))
        except ValueError:  # not all of them are numbers
            return tuple(sorted(values))

    def __call__(
        self, labels: Tensor, num_clients: int | None, *, columns: Columns, rng: Generator
    ) -> list[Tensor]:
        names = self.names(columns)
        if num_clients not in (None, len(names)):
            said = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            raise DataUnusable(
                f"{self!r} makes {len(names)} clients ({said}); num_clients is {num_clients}: "
                "leave it out"
            )
        found: dict[str, list[int]] = {name: [] for name in names}
        for i, value in enumerate(columns[self.column]):
            found[value].append(i)
        return [torch.tensor(found[name]) for name in names]


@dataclass(frozen=True)
class ByGroup:
    """Whole groups of examples that share a column, as the slices of a patient, for each client.

    Groups come in random order, each to whoever has the fewest examples so far.
    """

    column: str

    def __call__(
        self, labels: Tensor, num_clients: int | None, *, columns: Columns, rng: Generator
    ) -> list[Tensor]:
        groups = ByColumn(self.column)(labels, None, columns=columns, rng=rng)
        num_clients = _enough(self, len(labels), num_clients, 1)
        if num_clients > len(groups):
            raise DataUnusable(
                f"{self!r}: there are {len(groups)} groups for {num_clients} clients: lower "
                "num_clients"
            )
        owned: list[list[Tensor]] = [[] for _ in range(num_clients)]
        sizes = [0] * num_clients
        for i in torch.randperm(len(groups), generator=rng).tolist():
            client = sizes.index(min(sizes))
            owned[client].append(groups[i])
            sizes[client] += len(groups[i])
        return [torch.cat(part) for part in owned]


def _enough(owner: object, num_examples: int, num_clients: int | None, each: int) -> int:
    """Return ``num_clients`` if each can own so many examples."""
    if num_clients is None:
        raise DataUnusable(
            f"{owner!r} cannot tell how many clients there are: give num_clients, or partition by "
            "a column"
        )
    at_least(1, owner, num_clients=num_clients)
    if num_clients * each > num_examples:
        raise DataUnusable(
            f"{owner!r}: {num_clients} clients of at least {each} examples need "
            f"{num_clients * each}; there are {num_examples}: lower num_clients"
        )
    return num_clients


def _numpy(rng: Generator) -> np.random.Generator:
    """Return NumPy's generator, seeded from ours: torch has no Dirichlet that takes one."""
    words = torch.randint(2**32, (8,), generator=rng)
    return np.random.default_rng(words.tolist())


def _apportion(total: int, shares: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return whole numbers near ``total * shares`` that add up to ``total``."""
    ends = np.rint(np.cumsum(shares) * total).astype(np.int64)
    ends[-1] = total
    return np.diff(ends, prepend=0)


def _dealt(labels: Tensor, sizes: NDArray[np.int64], rng: Generator) -> list[Tensor]:
    """Return the parts of which client k owns ``sizes[c, k]`` examples of class c."""
    parts: list[list[Tensor]] = [[] for _ in range(sizes.shape[1])]
    for c, row in enumerate(sizes):
        if row.sum():
            mine = (labels == c).nonzero().flatten()
            mine = mine[torch.randperm(len(mine), generator=rng)]
            for part, piece in zip(parts, torch.split(mine, row.tolist()), strict=False):
                part.append(piece)
    return [torch.cat(part) for part in parts]

"""Who talks to whom where there is no server.

A graph is any function of a number of nodes, so one of your own is a few lines::

    def torus(num_nodes: int) -> Neighbours: ...
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any, Protocol

import torch
from torch import Generator

from turncoat.randomness import Randomness
from turncoat.stage import IncompatibleStages, Later, asks, call, code_of
from turncoat.validate import at_least, nearest

Neighbours = tuple[tuple[int, ...], ...]
"""The neighbours of each node, by number; never the node itself."""

_MOST_TRIES = 1_000  # at a random graph that hangs together


class Graph(Protocol):
    """Who are neighbours among so many nodes, both ways. Offered: rng, the same all run long."""

    def __call__(self, num_nodes: int, *args: Any, **asks: Any) -> Sequence[Iterable[int]]: ...


@dataclass(frozen=True)
class Ring:
    """Nodes in a circle, each linked to the next ``hops`` on either side."""

    hops: int = 1

    def __post_init__(self) -> None:
        at_least(1, self, hops=self.hops)

    def __call__(self, num_nodes: int) -> Neighbours:
        reach = [k for k in range(-self.hops, self.hops + 1) if k % num_nodes]
        return tuple(tuple(sorted({(i + k) % num_nodes for k in reach})) for i in range(num_nodes))


@dataclass(frozen=True)
class Complete:
    """Everyone is everyone's neighbour: as many servers as nodes, and all see all."""

    def __call__(self, num_nodes: int) -> Neighbours:
        everyone = range(num_nodes)
        return tuple(tuple(j for j in everyone if j != i) for i in everyone)


@dataclass(frozen=True)
class RandomRegular:
    """A random graph in which every node has ``degree`` neighbours [1]_.

    Nearly uniform over such graphs. Drawn again until it hangs together.

    .. [1] Steger and Wormald, Combinatorics, Probability and Computing 1999.
       https://doi.org/10.1017/S0963548399003867
    """

    degree: int

    def __post_init__(self) -> None:
        at_least(1, self, degree=self.degree)

    def __call__(self, num_nodes: int, *, rng: Generator) -> Neighbours:
        n, d = num_nodes, self.degree
        if d >= n or n * d % 2 or (d == 1 and n > 2):
            raise ValueError(
                f"{self!r} of {n} nodes does not exist or falls apart: the degree must be below "
                "the number of nodes, at least 2, and one of both even"
            )
        for _ in range(_MOST_TRIES):
            linked = _paired(n, d, rng)
            if linked is not None and not _unreached(linked):
                return linked
        raise ValueError(f"{self!r} of {n} nodes was not found in {_MOST_TRIES} tries")


@dataclass(frozen=True)
class StarOfStars:
    """Node 0 in the middle, hubs around it, and all others as leaves, each at one hub.

    Hubs are the nodes 1 to ``arms``; leaves are dealt out to them in turn. A dishonest hub is all
    that its leaves ever hear of the others.

    Args:
        arms: How many hubs; None for the whole part of the square root of all other nodes.
    """

    arms: int | None = None

    def __post_init__(self) -> None:
        at_least(1, self, arms=self.arms)

    def __call__(self, num_nodes: int) -> Neighbours:
        arms = isqrt(num_nodes - 1) if self.arms is None else self.arms
        if arms >= num_nodes:
            raise ValueError(f"{self!r} of {num_nodes} nodes: arms must be below their number")
        hub_of = [0] * (arms + 1) + [1 + i % arms for i in range(num_nodes - 1 - arms)]
        links = [set[int]() for _ in range(num_nodes)]
        for node, hub in enumerate(hub_of[1:], 1):
            links[node].add(hub)
            links[hub].add(node)
        return tuple(tuple(sorted(them)) for them in links)


def neighbours_of(graph: Graph, num_nodes: int, randomness: Randomness) -> Neighbours:
    """Return who hears whom in a run; a graph draws from the run's address ``"graph"``.

    Raises:
        ValueError: If it is no undirected graph of these nodes that hangs together.
    """
    drawn = call(graph, num_nodes, rng=Later(lambda: randomness.at("graph")))
    linked = tuple(tuple(sorted({int(j) for j in them})) for them in drawn)
    if len(linked) != num_nodes:
        raise ValueError(f"{graph!r} links {len(linked)} nodes; there are {num_nodes}")
    for i, them in enumerate(linked):
        for j in them:
            if not 0 <= j < num_nodes or j == i:
                raise ValueError(
                    f"{graph!r} names {j} as a neighbour of node {i}; the others are among 0 to "
                    f"{num_nodes - 1}"
                )
            if i not in linked[j]:
                raise ValueError(
                    f"{graph!r} links {i} to {j}, but not {j} to {i}: neighbours hear each other"
                )
    if lost := _unreached(linked):
        raise ValueError(
            f"{graph!r} falls apart: node {lost[0]} never hears of node 0: add links, or audit the "
            "parts one by one"
        )
    return linked


def distances(neighbours: Neighbours, sources: Iterable[int]) -> tuple[int, ...]:
    """Return how many steps each node is away from the nearest of ``sources``; -1 for no way.

    >>> distances(Ring()(6), [0, 1])
    (0, 0, 1, 2, 2, 1)
    """
    found = dict.fromkeys(sorted(set(sources)), 0)
    todo = deque(found)
    while todo:
        here = todo.popleft()
        for near in neighbours[here]:
            if near not in found:
                found[near] = found[here] + 1
                todo.append(near)
    return tuple(found.get(i, -1) for i in range(len(neighbours)))


def in_words(neighbours: Neighbours) -> str:
    """Say what kind of graph it is.

    >>> in_words(Ring()(8))
    '8 nodes with 2 neighbours each, at most 4 steps apart'
    """
    degrees = [len(them) for them in neighbours]
    few, many = min(degrees), max(degrees)
    noun = "neighbour" if many == 1 else "neighbours"
    each = f"{few} {noun} each" if few == many else f"{few} to {many} neighbours"
    apart = max(max(distances(neighbours, [i])) for i in range(len(neighbours)))
    steps = "step" if apart == 1 else "steps"
    return f"{len(neighbours)} nodes with {each}, at most {apart} {steps} apart"


def check_graph(graph: Any) -> None:
    """Refuse what is no graph: it is called with a number of nodes, and may ask for ``rng``."""
    if not callable(graph) or isinstance(graph, type):
        raise IncompatibleStages(f"{graph!r} is no graph: it must be a function of num_nodes")
    code = code_of(graph)
    subject = next((n for n in inspect.signature(code).parameters if n != "self"), "")
    for name in sorted(asks(code)[0] - {subject, "rng"}):
        raise IncompatibleStages(
            f"{graph!r} asks for {name!r}, but a graph is called with the number of nodes and "
            f"offered rng; {nearest(name, ['rng'])}"
        )


def _paired(num_nodes: int, degree: int, rng: Generator) -> Neighbours | None:
    """Return a regular graph, made by linking free ends at random; None if it got stuck."""
    links = [set[int]() for _ in range(num_nodes)]
    ends = [i for i in range(num_nodes) for _ in range(degree)]
    while ends:
        order = torch.randperm(len(ends), generator=rng).tolist()
        left: list[int] = []
        for a, b in zip(order[::2], order[1::2], strict=True):
            i, j = ends[a], ends[b]
            if i == j or j in links[i]:
                left += [i, j]
            else:
                links[i].add(j)
                links[j].add(i)
        if len(left) == len(ends) and not any(
            i != j and j not in links[i] for i in left for j in left
        ):
            return None
        ends = left
    return tuple(tuple(sorted(them)) for them in links)


def _unreached(neighbours: Neighbours) -> list[int]:
    return [i for i, away in enumerate(distances(neighbours, [0])) if away < 0]

"""The work of a seat: what one participant does in one round, wherever it is done.

Pure functions of an address (seed, round, client): a process pool, another machine or a Flower
client calls the same and gets the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Generator, Tensor

from turncoat.coalition import Coalition
from turncoat.federation import Federation
from turncoat.graphs import Neighbours, neighbours_of
from turncoat.messages import Clear, Envelope
from turncoat.metrics.detection import Caught
from turncoat.randomness import Randomness, ambient
from turncoat.stage import Later, Memory, Verdict, call, judges
from turncoat.task import Batch, Task

Cell = Mapping[str, Any]


class AttackBroke(RuntimeError):
    """A dishonest seat's own code raised: neither a success of the attack nor of a defence."""


@dataclass(frozen=True)
class Seats:
    """Everything that is fixed for a run, for whoever does the work of its seats."""

    federation: Federation[Any, Any]
    task: Task
    coalition: Coalition[Any] | None
    seed: int

    @property
    def wears_training(self) -> bool:
        """Whether what the traitors do before they send anything is not an honest client's."""
        worn = self.coalition
        return worn is not None and any((worn.supply, worn.code, worn.prepare, worn.train))

    def cohort(self, round: int) -> tuple[int, ...]:
        """Return who takes part in a round."""
        return cohort_of(self.federation, len(self.task.clients), round, Randomness(self.seed))

    @cached_property
    def neighbours(self) -> Neighbours | None:
        """Who hears whom; None where a server hears all."""
        graph = self.federation.graph
        if graph is None:
            return None
        return neighbours_of(graph, len(self.task.clients), Randomness(self.seed))

    def envelope(self, client: int, cohort: tuple[int, ...], round: int) -> Envelope:
        """Return as one of whom a client works: of the cohort, or of those it hears of it."""
        if self.neighbours is not None:
            near = {client, *self.neighbours[client]}
            cohort = tuple(c for c in cohort if c in near)
        return Envelope(client, cohort, round)

    def train(
        self, envelope: Envelope, start: Tensor, kept: Cell, *, traitor: bool
    ) -> tuple[Clear, Cell, Caught | None]:
        """Prepare and train at one client; return the payload, the next memory, and who was caught.

        The last is of the client's records, where its preparation says which it distrusts.
        """
        t, c = envelope.round, envelope.sender
        randomness, task = Randomness(self.seed), self.task
        worn = self.coalition if traitor else None
        prepare = (worn and worn.prepare) or self.federation.prepare
        train = (worn and worn.train) or self.federation.train
        model = worn.code(task.model) if worn and worn.code else task.model
        genuine, verdict = task.clients[c], Verdict()
        with ambient(randomness.at("ambient", t, c)):
            given = genuine
            if worn and worn.supply:
                given = call(
                    worn.supply,
                    genuine,
                    rng=Later(lambda: randomness.at("supply", t, c)),
                    envelope=envelope,
                    model=model,
                    start=start,
                    public=task.public,
                    verdict=Verdict(),
                )
            data = call(
                prepare,
                given,
                rng=Later(lambda: randomness.at("prepare", t, c)),
                envelope=envelope,
                model=model,
                start=start,
                public=task.public,
                verdict=verdict,
            )
            memory: Memory[Any] = Memory(dict(kept))
            payload = call(
                train,
                model,
                start,
                data,
                rng=Later(lambda: randomness.at("train", t, c)),
                memory=memory,
                public=task.public,
                envelope=envelope,
            )
        caught = None
        if judges(prepare):
            caught = Caught.of(verdict.flagged, _changed(genuine, given), len(given[1]))
        return payload, memory.cell, caught

    def forge(self, view: Any, kept: Cell, round: int) -> tuple[Sequence[Clear], Cell]:
        """Return what the acting members send instead, one each, and the coalition's memory."""
        assert self.coalition is not None and self.coalition.forge is not None
        memory: Memory[Any] = Memory(dict(kept))
        rng = Randomness(self.seed).at("forge", round)
        try:
            forged = call(self.coalition.forge, view, rng=rng, memory=memory)
        except Exception as error:
            raise AttackBroke(f"{self.coalition.forge!r} raised {_said(error)}") from error
        if len(forged) != len(view.own):
            raise AttackBroke(
                f"{self.coalition.forge!r} forged {len(forged)} payloads "
                f"for {len(view.own)} members"
            )
        return forged, memory.cell

    def dress(
        self,
        payload: Clear,
        envelope: Envelope,
        kept: Cell,
        *,
        traitor: bool,
        receiver: int | None = None,
    ) -> tuple[Any, Cell]:
        """Pass a payload through the channel; return the message and the next memory.

        Each ``receiver`` has draws of its own, None being the server: pads are used once.
        """
        t, c = envelope.round, envelope.sender
        here = () if receiver is None else (receiver,)
        randomness = Randomness(self.seed)
        worn = self.coalition.channel if traitor and self.coalition else None
        memory: Memory[Any] = Memory(dict(kept))
        message = call(
            worn or self.federation.channel,
            payload,
            rng=Later(lambda: randomness.at("channel", t, c, *here)),
            envelope=envelope,
            memory=memory,
            pairwise=_pairwise(randomness, t, c, here),
            model=self.task.model,
        )
        return message, memory.cell


@dataclass(frozen=True)
class Job:
    """What one client does in one round.

    Attributes:
        kept: What its training remembers.
        channel: What its channel remembers; empty where the runtime itself dresses.
        shown: Whether the experiment has to see the payload bare: to forge with it, or for a view.
    """

    client: int
    traitor: bool
    kept: Cell
    channel: Cell = field(default_factory=dict)
    shown: bool = True


@dataclass(frozen=True)
class Done:
    """What became of a job: a payload and the next memory, or the reason why there is none.

    Attributes:
        caught: How the client's own check of its records did, if it has one.
    """

    payload: Any
    kept: Cell
    fault: str | None = None
    caught: Caught | None = None


@dataclass(frozen=True, slots=True)
class Incident:
    """Something that went wrong in a round and was survived. ``client`` is None for all of it."""

    round: int
    client: int | None
    what: str


class Engine(Protocol):
    """Whoever does the clients' part of a round: processes of our own, or Flower's nodes.

    Attributes:
        dresses: Whether the clients dress their payloads themselves, where none has to be shown.
    """

    dresses: bool

    def __enter__(self) -> Engine: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
        /,
    ) -> None: ...

    def together(
        self, round: int, jobs: Sequence[Job], starts: Mapping[int, Tensor]
    ) -> Iterator[Done]:
        """Yield what became of the jobs, in their order."""
        ...

    def stream(
        self, round: int, jobs: Sequence[Job], starts: Mapping[int, Tensor]
    ) -> Iterator[Done]:
        """Yield the same to one who takes them one at a time."""
        ...

    def dress(
        self, payload: Any, envelope: Envelope, kept: Cell, *, traitor: bool
    ) -> tuple[Any, Cell]:
        """Return the message that a payload becomes, and the channel's next memory."""
        ...

    def incidents(self) -> Sequence[Incident]:
        """Return what was survived since the last call, beside what the jobs tell."""
        ...


def attempt(seats: Seats, envelope: Envelope, start: Tensor, job: Job) -> Done:
    """Do a client's job. What an honest client raises is its fault; an attacker's is the attack's.

    A payload that is unfit to be sent is a fault too: it is found before it is dressed.
    """
    try:
        payload, kept, caught = seats.train(envelope, start, job.kept, traitor=job.traitor)
    except Exception as error:
        if job.traitor and seats.wears_training:
            raise AttackBroke(f"client {job.client}'s attack raised {_said(error)}") from error
        return Done(None, job.kept, f"raised {_said(error)}")
    kind = seats.federation.trains
    if not isinstance(payload, kind):
        raise TypeError(
            f"{seats.federation.train!r} is annotated {kind.__name__} but gave {payload!r}"
        )
    fault = payload.fault(start)
    if fault is not None:
        return Done(None, job.kept, fault)
    return Done(payload, kept, caught=caught)


def _changed(genuine: Batch, given: Batch) -> frozenset[int]:
    """Return which of the given examples are not those that there were at their place."""
    if given is genuine:
        return frozenset()
    num = min(len(genuine[1]), len(given[1]))
    same = (genuine[0][:num] == given[0][:num]).flatten(1).all(dim=1)
    same &= (genuine[1][:num] == given[1][:num]).reshape(num, -1).all(dim=1)
    return frozenset((~same).nonzero().flatten().tolist()) | frozenset(range(num, len(given[1])))


def cohort_of(
    federation: Federation[Any, Any], num_clients: int, round: int, randomness: Randomness
) -> tuple[int, ...]:
    """Return who takes part in a round. It follows from the seed, so no round need be run."""
    chosen: tuple[int, ...] = call(
        federation.sample, num_clients, rng=randomness.at("sample", round)
    )
    return chosen


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _pairwise(
    randomness: Randomness, round: int, me: int, receiver: tuple[int, ...]
) -> Callable[[int], Generator]:
    """Return what stands for key agreement: the same stream at both ends, fresh each round."""
    return lambda peer: randomness.at("pair", round, min(me, peer), max(me, peer), *receiver)


def one_thread() -> None:
    """Compute with one thread: the order of a sum, and so its bits, depends on their number."""
    torch.set_num_threads(1)

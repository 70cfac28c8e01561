"""Run a federation in this process, or in several that share the matrix of payloads."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from turncoat.coalition import Coalition, check_members, check_worn
from turncoat.federation import Federation
from turncoat.messages import Clear, Envelope, Summable
from turncoat.metrics.detection import Caught
from turncoat.randomness import Randomness
from turncoat.runtimes.pool import Workers, keep_memory
from turncoat.runtimes.saved import Role, State
from turncoat.runtimes.seat import Done, Engine, Incident, Job, Seats, cohort_of
from turncoat.runtimes.seen import coalition_view, views_of_round
from turncoat.stage import (
    Broadcast,
    Later,
    Memory,
    Plan,
    Trace,
    Verdict,
    asks,
    call,
    code_of,
    judges,
    matches,
    streams,
    wants,
    within,
)
from turncoat.task import Task
from turncoat.views import ClientView

_Runs = Callable[[int, Sequence[Job], Mapping[int, Tensor]], Iterator[Done]]


class TooFewClients(RuntimeError):
    """A round was left with fewer sound messages than the federation asks for."""


@dataclass(frozen=True)
class Watch:
    """Which views to keep: an annotation, and the rounds (None: all of them)."""

    need: Any
    rounds: frozenset[int] | None = None

    def keeps(self, round: int, kind: Any) -> bool:
        return (self.rounds is None or round in self.rounds) and matches(kind, self.need)


@dataclass(frozen=True, slots=True)
class Played:
    """The log of one round.

    Attributes:
        num_bytes: What one client sent and received, on average. Headers are left out.
        aborted: Whether the state stayed as it was.
        clients, records: What the rule caught of the traitors, and the honest of false records.
    """

    round: int
    cohort: tuple[int, ...]
    seconds: float
    bytes_up: int
    bytes_down: int
    incidents: tuple[Incident, ...] = ()
    aborted: bool = False
    clients: Caught | None = None
    records: Caught | None = None


@dataclass(frozen=True)
class Run:
    """What is left of a run: its last state, its log, and the views someone asked to keep."""

    federation: Federation[Any, Any]
    task: Task
    state: State
    views: tuple[tuple[Any, Any], ...] = field(repr=False)  # (type, view), in order of rounds
    log: tuple[Played, ...] = field(default=(), repr=False)

    def seen(self, need: Any) -> list[Any]:
        """Return the kept views that satisfy an annotation, first round first."""
        return [view for kind, view in self.views if matches(kind, need)]


def simulate(
    federation: Federation[Any, Any],
    task: Task,
    *,
    num_rounds: int,
    seed: int,
    coalition: Coalition[Any] | None = None,
    server: Broadcast | None = None,
    watch: Sequence[Watch] = (),
    num_processes: int = 1,
    device: str = "cpu",
    state: State | None = None,
    until: int | None = None,
    on_round: Callable[[State, Played], None] | None = None,
    engine: Callable[[Seats], Engine] | None = None,
) -> Run:
    """Run rounds until ``num_rounds`` are done; only views that match ``watch`` are kept.

    The bits of the result depend on the seed alone: neither on ``num_processes`` nor on whether
    the run was resumed. They do depend on the device. With a graph the state has a row a node.

    Args:
        server: What a malicious server sends instead of the federation's broadcast.
        num_processes: Worker processes of one thread each; on a GPU there is none.
        state: Where to go on, from an earlier run with the same other arguments.
        until: Stop before this round, though the run was planned for ``num_rounds``.
        on_round: Called after each round, with the new state and the round's log.
        engine: Who does the clients' part; None for processes of our own.

    Raises:
        TooFewClients: If a round is left with fewer sound messages than ``min_clients``.
    """
    place = torch.device(device)
    randomness = Randomness(seed)
    federation = federation.planned(Plan(num_rounds, task.sizes, task.model))
    if coalition is not None:
        check_worn(federation, coalition)
        check_members(coalition, len(task.clients), randomness)
    if place.type != "cpu":
        task, num_processes = task.to(place), 1
    if federation.graph is not None:
        _check_peers(federation, server, engine)
        from turncoat.runtimes.gossip import Mixing  # here, for it builds on Round
    keep_memory()
    seats, views, log = Seats(federation, task, coalition, seed), list[tuple[Any, Any]](), []
    begun: Engine = Workers(seats, num_processes) if engine is None else engine(seats)
    with one_thread(), begun as workers:
        if federation.graph is not None or state is None:
            first = call(federation.begin, task, rng=randomness.at("begin")).to(place)
        if state is None:
            alone = federation.graph is None
            state = State(0, first if alone else first.repeat(len(task.clients), 1))
        while state.round < (num_rounds if until is None else until):
            if federation.graph is None:
                state, played, seen = Round(seats, server, workers, state, watch).play()
            else:
                state, played, seen = Mixing(seats, first, workers, state, watch).play()
            views += seen
            log.append(played)
            if on_round is not None:
                on_round(state, played)
    return Run(federation, task, state, tuple(views), tuple(log))


def _check_peers(federation: Federation[Any, Any], server: Any, engine: Any) -> None:
    """Refuse what needs a server where there is none."""
    without = f"this federation has no server: {federation.graph!r} says who hears whom"
    if server is not None:
        raise ValueError(f"{server!r} is played by a server, but {without}; leave 'graph' out")
    if engine is not None:
        raise ValueError(
            f"only processes of our own can play a graph, but {without}, and in Flower all go "
            "through one: run it without --runtime, or leave 'graph' out"
        )


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread: the order of a sum, and so its bits, depends on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cohorts(
    federation: Federation[Any, Any], num_clients: int, *, num_rounds: int, seed: int
) -> list[tuple[int, ...]]:
    """Return who takes part in each round. It follows from the seed, so no round need be run."""
    return [cohort_of(federation, num_clients, t, Randomness(seed)) for t in range(num_rounds)]


class Round:
    """One round: broadcast, prepare, train, forge, dress, aggregate."""

    def __init__(
        self,
        seats: Seats,
        server: Broadcast | None,
        workers: Engine,
        state: State,
        watch: Sequence[Watch],
    ) -> None:
        self.seats, self.state, self.workers = seats, state, workers
        self.federation, self.task, self.coalition = seats.federation, seats.task, seats.coalition
        self.sends = seats.federation.sends
        self.randomness = Randomness(seats.seed)
        self.round, self.before = state.round, state.params
        self.memory: dict[Role, Mapping[str, Any]] = dict(state.memory)
        self.incidents: list[Incident] = []
        self.num_sent = self.bytes_up = 0
        self.cohort = seats.cohort(self.round)
        self.watch = [w for w in watch if w.rounds is None or self.round in w.rounds]
        coalition = self.coalition
        acting = (
            coalition.acting(len(self.task.clients), self.round, self.randomness)
            if coalition
            else frozenset[int]()
        )
        self.traitors = frozenset(acting & set(self.cohort))
        self.keeps_last = server is not None and wants(server, "last")
        self.starts = self._broadcast(server)
        # filled only where someone looks: a round that streams holds no message
        self.payloads: dict[int, Any] = {}
        self.messages: list[Any] = []
        self.caught: Caught | None = None
        self.records: Caught | None = None

    def play(self) -> tuple[State, Played, list[tuple[Any, Any]]]:
        began = time.perf_counter()
        trace = Trace()
        sent = self._stream() if self._streams else iter(self._together())
        step = self._aggregate(sent, trace)
        aborted = step is None and bool(self.cohort)
        after = self.before if step is None else self.before + step
        self.incidents += self.workers.incidents()
        seen = self._seen(after, trace)
        played = Played(
            self.round,
            self.cohort,
            time.perf_counter() - began,
            self.bytes_up // max(self.num_sent, 1),
            self.before.numel() * 4,
            tuple(self.incidents),
            aborted,
            self.caught,
            self.records,
        )
        return State(self.round + 1, after, self.memory), played, seen

    @property
    def _streams(self) -> bool:
        """Whether nobody needs to hold all messages: no rule, no forger, no channel, no watcher."""
        if judges(self.federation.aggregate):
            return False  # positions are those of the senders, who have to be known
        forges = self.coalition is not None and self.coalition.forge is not None
        paired = self._is_paired
        return streams(self.federation.aggregate) and not (forges or paired or self.watch)

    @property
    def _is_paired(self) -> bool:
        """Whether the channel binds a client to its peers, so that one who drops is missed."""
        return any("pairwise" in asks(code_of(s))[0] for s in within(self.federation.channel))

    def _broadcast(self, server: Broadcast | None) -> dict[int, Tensor]:
        stage = server or self.federation.broadcast
        named, takes_all = asks(code_of(stage))
        known = {"model": self.task.model, "public": self.task.public}
        tells_apart = takes_all or bool(named & {"rng", "envelope", "last"})
        if not tells_apart:  # one client from another
            return dict.fromkeys(self.cohort, call(stage, self.before, **known))
        return {
            c: call(
                stage,
                self.before,
                rng=Later(partial(self.randomness.at, "broadcast", self.round, c)),
                **known,
                envelope=Envelope(c, self.cohort, self.round),
                last=self.memory.get(("last", c), {}).get(""),
            )
            for c in self.cohort
        }

    def _train(self, run: _Runs) -> Iterator[tuple[int, Any]]:
        """Train the cohort; yield the sound payloads, and note who sent none."""
        roles = [self._role("train", c) for c in self.cohort]
        jobs = [self._job(role) for role in roles]
        for role, done in zip(roles, run(self.round, jobs, self.starts), strict=True):
            if done.fault is not None:
                self._note(role[1], done.fault)
                continue
            self._remember(role, done.kept)
            if done.caught is not None:
                self.records = (self.records or Caught()) + done.caught
            yield role[1], done.payload

    def _job(self, role: Role) -> Job:
        client = role[1]
        kept = self.memory.get(role, {})
        if not self.workers.dresses:
            return Job(client, client in self.traitors, kept)
        forging = self.coalition if self.traitors else None
        shown = self._shows_clients or (
            forging is not None
            and forging.forge is not None
            and (client in self.traitors or forging.knows_honest)
        )
        channel = {} if shown else self.memory.get(self._role("channel", client), {})
        return Job(client, client in self.traitors, kept, channel, shown)

    def _role(self, place: str, client: int) -> Role:
        """Return whose memory a client's stage has: a worn stage has one of its own."""
        worn = self.coalition if client in self.traitors else None
        return (f"worn {place}" if getattr(worn, place, None) is not None else place, client)

    @property
    def _shows_clients(self) -> bool:
        """Whether someone watches what a client alone sees: its bare payload."""
        payload: Any = self.federation.trains
        return any(w.keeps(self.round, ClientView[payload]) for w in self.watch)

    def _together(self) -> list[Any]:
        """Return all messages of the round at once; none if it had to be aborted."""
        payloads = dict(self._train(self.workers.together))
        if self.watch and not self.workers.dresses:
            payloads = {c: replace(p, delta=p.delta.clone()) for c, p in payloads.items()}
        payloads = self._forge(payloads)
        cohort = self.cohort
        if self._is_paired and len(payloads) < len(cohort):
            needed = self.federation.recovers_from
            if needed is None or len(payloads) < needed:
                why = (
                    f"{self.federation.channel!r} does not recover from dropouts"
                    if needed is None
                    else f"{self.federation.channel!r} recovers from {needed} clients on"
                )
                missing = len(cohort) - len(payloads)
                self._note(None, f"{missing} clients dropped out and {why}: the round was aborted")
                return []
            cohort = tuple(payloads)
        dressed = {c: self._dress(c, p, cohort) for c, p in payloads.items()}
        self.payloads = {c: p for c, p in payloads.items() if dressed[c] is not None}
        self.messages = [dressed[c] for c in self.payloads]
        if self._is_paired and len(self.messages) < len(payloads):
            self._note(None, "a client dropped out after keys were agreed: the round was aborted")
            self.payloads, self.messages = {}, []
        return self.messages

    def _forge(self, payloads: dict[int, Any]) -> dict[int, Any]:
        coalition, traitors = self.coalition, [c for c in payloads if c in self.traitors]
        if coalition is None or coalition.forge is None or not traitors:
            return payloads
        view = coalition_view(
            self.federation, coalition, self.round, self.before, self.task, payloads, traitors
        )
        forged, kept = self.seats.forge(view, self.memory.get(("forge", -1), {}), self.round)
        self._remember(("forge", -1), kept)
        payloads = payloads | dict(zip(traitors, forged, strict=True))
        for c in traitors:
            if fault := payloads[c].fault(self.before):
                self._note(c, fault)
                del payloads[c]
        return payloads

    def _stream(self) -> Iterator[Any]:
        """Yield messages as they come; only a few payloads are held at a time."""
        for c, payload in self._train(self.workers.stream):
            if (message := self._dress(c, payload, self.cohort)) is not None:
                yield message

    def _dress(self, client: int, payload: Any, cohort: tuple[int, ...]) -> Any:
        traitor = client in self.traitors
        role = self._role("channel", client)
        envelope = Envelope(client, cohort, self.round)
        try:
            message, kept = self.workers.dress(
                payload, envelope, self.memory.get(role, {}), traitor=traitor
            )
        except Exception as error:
            self._note(client, f"raised {type(error).__name__}: {error}")
            return None
        if not isinstance(message, self.sends):
            raise TypeError(
                f"{self.federation.channel!r} is annotated {self.sends.__name__} "
                f"but gave {message!r}"
            )
        self._remember(role, kept)
        if self.keeps_last and isinstance(message, Clear):
            self._remember(("last", client), {"": self.starts[client] + message.delta})
        self.num_sent += 1
        self.bytes_up += getattr(message, "num_bytes", 0)
        return message

    def _aggregate(self, messages: Iterator[Any], trace: Trace) -> Tensor | None:
        """Return the step of the rule, or None if the round has none to make."""
        rule, federation = self.federation.aggregate, self.federation
        noisy = any(hasattr(s, "event") for s in within(rule))
        first = next(messages, None)
        if first is None and self._was_aborted:
            return None
        if first is None and self.cohort:
            if federation.min_clients:
                self._too_few()
            self._note(None, "nobody sent a sound message: the round was aborted")
            return None
        if first is None and not noisy:
            return None
        whole = messages if first is None else chain([first], messages)
        role = ("aggregate", -1)
        memory: Memory[Any] = Memory(dict(self.memory.get(role, {})))
        verdict, senders = Verdict(), tuple(self.payloads)
        total = call(
            rule,
            whole if streams(rule) else list(whole),
            rng=self.randomness.at("aggregate", self.round),
            memory=memory,
            model=self.task.model,
            before=self.before,
            cohort=tuple(self.payloads) if self.payloads else self.cohort,
            public=self.task.public,
            trace=trace,
            verdict=verdict,
        )
        if judges(rule):
            false = {i for i, c in enumerate(senders) if c in self.traitors}
            self.caught = Caught.of(verdict.flagged, false, len(senders))
        if self.cohort and self.num_sent < federation.min_clients:
            self._too_few()
        step: Tensor = federation.opener.open(total) if isinstance(total, Summable) else total
        if not bool(torch.isfinite(self.before + step).all()):
            self._note(None, "the step was not finite: the round was aborted")
            return None  # and forgotten: a rule that remembered it would never recover
        self._remember(role, memory.cell)
        return step

    @property
    def _was_aborted(self) -> bool:
        return any(i.client is None for i in self.incidents)

    def _too_few(self) -> None:
        why = "; ".join(f"client {i.client} {i.what}" for i in self.incidents[:3])
        raise TooFewClients(
            f"round {self.round}: {self.num_sent} of {len(self.cohort)} clients sent a sound "
            f"message, {self.federation.min_clients} are needed ({why}): mend the clients, sample "
            "more, or lower min_clients"
        )

    def _seen(self, after: Tensor, trace: Trace) -> list[tuple[Any, Any]]:
        if not self.watch:
            return []
        views = views_of_round(
            self.federation,
            self.task,
            self.round,
            self.before,
            after,
            tuple(self.payloads),
            self.starts,
            self.payloads,
            self.messages,
            trace,
        )
        return [(k, v) for k, v in views if any(w.keeps(self.round, k) for w in self.watch)]

    def _note(self, client: int | None, what: str) -> None:
        self.incidents.append(Incident(self.round, client, what))

    def _remember(self, role: Role, kept: Mapping[str, Any]) -> None:
        if kept:
            self.memory[role] = kept

"""The server's half: a round's jobs travel through a Grid to the nodes, and what comes back is
checked before anything is made of it.

Flower swallows an error reply and a node that never answers. Here each is an incident of the round,
with its client, and the round goes on with the others as far as its rules allow.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from flwr.app import Message
from flwr.serverapp import Grid
from torch import Tensor

from turncoat.messages import Clear, Envelope
from turncoat.metrics.detection import Caught
from turncoat.runtimes.flower.wire import (
    Unfit,
    built,
    fault_beside,
    read,
    size_of,
    spelt,
    unfit_weight,
    write,
)
from turncoat.runtimes.seat import AttackBroke, Cell, Done, Incident, Job, Seats
from turncoat.validate import positive

_SPARE = 1 << 20  # bytes beyond what is due that a reply may have
_MOST_MEMORY = 16  # vectors that a client may remember, where its memory travels
_LONGEST_PAUSE = 0.1  # seconds between two looks for replies


class NoNodes(RuntimeError):
    """Nobody is there to train."""


@dataclass(frozen=True)
class Patience:
    """How long a server waits.

    Args:
        join_seconds: For all clients' nodes before the first round; it begins without the others.
        reply_seconds: For the replies of a round; a node that takes longer is left out of it.
    """

    join_seconds: float = 120.0
    reply_seconds: float = 600.0

    def __post_init__(self) -> None:
        positive(self, join_seconds=self.join_seconds, reply_seconds=self.reply_seconds)


_PATIENCE = Patience()


@dataclass(frozen=True)
class _Held:
    """A payload that stays with its node: here is the message that it was dressed as."""

    message: Any
    channel: Cell
    cohort: tuple[int, ...]


class Nodes:
    """An engine whose clients are Flower nodes.

    Args:
        memory_stays: Whether a client's memory stays at its node, as it does in a deployment; else
            it travels, so that the server's state is all of a run, to be saved and gone on with.
    """

    dresses = True

    def __init__(
        self,
        seats: Seats,
        grid: Grid,
        patience: Patience = _PATIENCE,
        *,
        memory_stays: bool = False,
    ) -> None:
        self._seats, self._grid, self._patience = seats, grid, patience
        self._memory_stays = memory_stays
        self._node_of: dict[int, int] = {}  # client -> node id
        self._client_of: dict[int, int | None] = {}  # node id -> client; None where it has none
        self._overdue: dict[str, tuple[int, int]] = {}  # message id -> (client, round)
        self._noted: list[Incident] = []
        self._round = -1
        self._jobs: Mapping[int, Job] = {}
        self._redressed: tuple[tuple[int, ...], dict[int, Any]] = ((), {})

    def __enter__(self) -> Nodes:
        num_clients, began = len(self._seats.task.clients), time.monotonic()
        while True:
            self._meet()
            late = time.monotonic() - began > self._patience.join_seconds
            if late or len(self._node_of) == num_clients:
                break
            time.sleep(0.5)
        if not self._node_of:
            raise NoNodes(
                f"no node joined within {self._patience.join_seconds:g} seconds: start the "
                "SuperNodes, each with partition-id in its --node-config"
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
        /,
    ) -> None:
        return None

    def together(
        self, round: int, jobs: Sequence[Job], starts: Mapping[int, Tensor]
    ) -> Iterator[Done]:
        """Send every node its job; yield what became of them, in their order."""
        cohort = self._seats.cohort(round)
        self._round, self._jobs = round, {job.client: job for job in jobs}
        self._redressed = ((), {})
        if any(job.client not in self._node_of for job in jobs):
            self._meet()
        due = self._due(cohort, starts)
        orders = {
            job.client: {
                "round": round,
                "client": job.client,
                "cohort": cohort,
                "traitor": job.traitor,
                "shown": job.shown,
                "start": starts[job.client],
                "kept": {} if self._memory_stays else job.kept,
                "channel": {} if self._memory_stays else job.channel,
                "memory_stays": self._memory_stays,
            }
            for job in jobs
        }
        replies = self._exchange("train", orders, self._most_bytes(due, starts))
        for job in jobs:
            yield self._done(job, starts[job.client], cohort, due, replies[job.client])

    stream = together

    def dress(
        self, payload: Any, envelope: Envelope, kept: Cell, *, traitor: bool
    ) -> tuple[Any, Cell]:
        """Return what the node dressed; for a cohort that has shrunk, it dresses once more."""
        if not isinstance(payload, _Held):
            return self._seats.dress(payload, envelope, kept, traitor=traitor)
        if payload.cohort == envelope.cohort:
            return payload.message, payload.channel
        if self._redressed[0] != envelope.cohort:
            self._redressed = (envelope.cohort, self._dressed_again(envelope.cohort))
        found = self._redressed[1][envelope.sender]
        if isinstance(found, str):
            raise Unfit(found)
        message, channel = found
        return message, channel

    def incidents(self) -> Sequence[Incident]:
        """Return who answered twice or late, and which nodes are none, since the last call."""
        noted, self._noted = self._noted, []
        return noted

    def _done(self, job: Job, start: Tensor, cohort: tuple[int, ...], due: Any, reply: Any) -> Done:
        """Judge a reply: nothing in it is believed before it is checked."""
        if isinstance(reply, str):
            return Done(None, job.kept, reply)
        if "broke" in reply and job.traitor:
            raise AttackBroke(str(reply["broke"]))
        if "fault" in reply or "broke" in reply:
            return Done(None, job.kept, _cut(reply.get("fault", reply.get("broke"))))
        kept, channel = reply.get("kept", {}), reply.get("channel", {})
        if not (isinstance(kept, dict) and isinstance(channel, dict)):
            return Done(None, job.kept, "sent a memory that is none")
        federation, place = self._seats.federation, "payload" if job.shown else "message"
        try:
            thing = built(reply.get(place), federation.trains if job.shown else federation.sends)
        except Unfit as error:
            return Done(None, job.kept, str(error))
        fault = (
            _clear_fault(thing, start)
            if isinstance(thing, Clear)
            else fault_beside(thing, due, job.client, cohort[0])
            if due is not None
            else None
        )
        if fault is not None:
            return Done(None, job.kept, fault)
        caught = _caught(reply.get("caught"))
        if job.shown:
            return Done(_moved(thing, start), kept, caught=caught)
        return Done(_Held(_moved(thing, start), channel, cohort), kept, caught=caught)

    def _dressed_again(self, cohort: tuple[int, ...]) -> dict[int, Any]:
        """Ask all who are left to dress for each other; return their messages, or their faults."""
        clients = [c for c in cohort if c in self._jobs and not self._jobs[c].shown]
        starts = {c: torch.empty(self._seats.task.model.layout.num_params) for c in clients[:1]}
        due = self._due(cohort, starts)
        orders = {
            c: {
                "round": self._round,
                "client": c,
                "cohort": cohort,
                "traitor": self._jobs[c].traitor,
                "memory_stays": self._memory_stays,
            }
            for c in clients
        }
        replies = self._exchange("train.dress", orders, self._most_bytes(due, starts))
        found: dict[int, Any] = {}
        for c, reply in replies.items():
            start = next(iter(starts.values()))
            job = self._jobs[c]
            done = self._done(job, start, cohort, due, reply)
            held = done.payload
            found[c] = done.fault if held is None else (held.message, held.channel)
        return found

    def _due(self, cohort: tuple[int, ...], starts: Mapping[int, Tensor]) -> Any:
        """Return what a message looks like; None where its type says it, or nothing is sent."""
        federation = self._seats.federation
        if issubclass(federation.sends, Clear) or not starts:
            return None
        like = next(iter(starts.values()))
        zeros = federation.trains(torch.zeros_like(like), 1.0)
        envelope = Envelope(cohort[0], cohort, self._round)
        return self._seats.dress(zeros, envelope, {}, traitor=False)[0]

    def _most_bytes(self, due: Any, starts: Mapping[int, Tensor]) -> int:
        """Return what a reply may hold: the message, room for memory, and some to spare."""
        vector = max((s.numel() * 4 for s in starts.values()), default=0)
        message = 2 * vector if due is None else 2 * size_of(write(spelt(due)))
        memory = 0 if self._memory_stays else _MOST_MEMORY * vector
        return max(message, 2 * vector) + memory + _SPARE

    def _meet(self) -> None:
        """Ask the nodes that are new which client they are; forget those that have left."""
        present = list(self._grid.get_node_ids())
        self._node_of = {c: n for c, n in self._node_of.items() if n in set(present)}
        new = [n for n in present if n not in self._client_of]
        found = self._sent("query.hello", {n: {} for n in new}, _SPARE, self._patience.join_seconds)
        for node in new:
            reply = found[node]
            self._client_of[node] = None
            client = reply.get("client") if isinstance(reply, dict) else None
            num_clients = len(self._seats.task.clients)
            if not isinstance(client, int) or isinstance(client, bool):
                self._note(None, f"node {node} {_cut(reply)}")
            elif not 0 <= client < num_clients:
                self._note(None, f"node {node} says it is client {client} of {num_clients}")
            elif client in self._node_of:
                self._note(client, f"is node {self._node_of[client]}; node {node} claims it too")
            else:
                self._client_of[node] = client
                self._node_of[client] = node

    def _exchange(self, kind: str, orders: Mapping[int, Any], most_bytes: int) -> dict[int, Any]:
        """Send each client its order; return its reply, or a text that says what is wrong."""
        known = {self._node_of[c]: order for c, order in orders.items() if c in self._node_of}
        answers = self._sent(kind, known, most_bytes, self._patience.reply_seconds)
        found: dict[int, Any] = {}
        for c in orders:
            reply = answers[self._node_of[c]] if c in self._node_of else "has no node"
            if isinstance(reply, dict) and reply.get("round") != self._round:
                reply = f"answered for round {_cut(reply.get('round'))}"
            elif isinstance(reply, dict) and reply.get("client") != c:
                reply = f"answered for client {_cut(reply.get('client'))}"
            found[c] = reply
        return found

    def _sent(
        self, kind: str, orders: Mapping[int, Any], most_bytes: int, seconds: float
    ) -> dict[int, Any]:
        """Send orders to nodes, and wait; return their replies or what is wrong, by node."""
        messages = [
            Message(
                write(order),
                dst_node_id=node,
                message_type=kind,
                group_id=str(self._round),
                ttl=4 * seconds,
            )
            for node, order in orders.items()
        ]
        found: dict[int, Any] = {}
        waiting: dict[str, int] = {}
        for node, key in zip(orders, self._grid.push_messages(messages), strict=True):
            if key is None:
                found[node] = "could not be sent to"
            else:
                waiting[key] = node
        asked, pause, ends = dict(waiting), 0.001, time.monotonic() + seconds
        while waiting:
            for reply in self._grid.pull_messages([*waiting, *self._overdue]):
                key = reply.metadata.reply_to_message_id
                if key in self._overdue:
                    self._note_late(*self._overdue.pop(key), reply)
                elif key in waiting:
                    node = waiting.pop(key)
                    found[node] = _opened(reply, node, most_bytes)
                elif key in asked:
                    who = self._client_of.get(asked[key])
                    self._note(who, "answered twice: the first answer counts")
            if waiting and time.monotonic() > ends:
                break
            if waiting:
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
        for key, node in waiting.items():
            found[node] = f"did not answer within {seconds:g} seconds"
            if (client := self._client_of.get(node)) is not None:
                self._overdue[key] = (client, self._round)
        return found

    def _note_late(self, client: int, round: int, reply: Message) -> None:
        if not reply.has_error():
            self._note(client, f"answered round {round} too late: it was left out")

    def _note(self, client: int | None, what: str) -> None:
        self._noted.append(Incident(max(self._round, 0), client, what))


def _opened(reply: Message, node: int, most_bytes: int) -> Any:
    """Return what a node answered, or what is wrong with it."""
    if reply.has_error():
        return f"answered with an error: {_cut(reply.error.reason or reply.error.code)}"
    if reply.metadata.src_node_id not in (node, 0):
        return f"was answered for by node {reply.metadata.src_node_id}"
    try:
        value = read(reply.content, most_bytes)
    except Unfit as error:
        return str(error)
    return value if isinstance(value, dict) else "sent what is no answer"


def _clear_fault(thing: Clear, start: Tensor) -> str | None:
    delta = thing.delta
    if not isinstance(delta, Tensor) or delta.dtype != start.dtype:
        what = getattr(delta, "dtype", type(delta).__name__)
        return f"sent {what} where {start.dtype} is due"
    return unfit_weight(thing.weight) or thing.fault(start.cpu())


def _moved(thing: Any, like: Tensor) -> Any:
    from turncoat.audit import moved

    return thing if like.device.type == "cpu" else moved(thing, str(like.device))


def _cut(text: Any) -> str:
    """Return the first line or so: an error may carry a whole trace."""
    whole = " ".join(str(text).split())
    return whole if len(whole) <= 300 else whole[:300] + " ..."


def _caught(counts: Any) -> Caught | None:
    """Return what a node says that it caught; nothing that is not four counts."""
    if not isinstance(counts, list | tuple) or len(counts) != 4:
        return None
    return Caught(*counts) if all(type(n) is int and n >= 0 for n in counts) else None

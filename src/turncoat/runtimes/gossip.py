"""A round without a server: every node trains, tells its neighbours, and mixes what it hears."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from turncoat.messages import Clear, Envelope, Revealed, rows, with_rows
from turncoat.metrics.detection import Caught
from turncoat.runtimes.saved import State
from turncoat.runtimes.seat import Engine, Seats
from turncoat.runtimes.seen import coalition_view, views_of_peer
from turncoat.runtimes.simulate import Played, Round, TooFewClients, Watch
from turncoat.stage import Memory, Trace, Verdict, asks, call, code_of, judges, nested, within

_APART = frozenset({"rng", "memory", "envelope", "pairwise"})  # asks that tell receivers apart


@dataclass(frozen=True)
class Moved(Revealed):
    """A message that cannot be read, and by how much its opened mean is to be moved.

    A rule that sums and opens it gets a step from the reader's own state, whatever the sender's
    message is relative to.
    """

    whole: Revealed
    shift: Tensor = field(repr=False)
    weight: float

    def __add__(self, other: Self, /) -> Self:
        return replace(self, whole=self.whole + other.whole, weight=self.weight + other.weight)

    @classmethod
    def total(cls, messages: Iterable[Self]) -> Self:
        """Return the sum, made as the messages inside make theirs."""
        parts = list(messages)
        whole = type(parts[0].whole).total(m.whole for m in parts)
        return replace(parts[0], whole=whole, weight=whole.weight)

    @property
    def num_bytes(self) -> int:
        return self.whole.num_bytes

    def open(self) -> Tensor:
        return self.whole.open() + self.shift


class Mixing(Round):
    """One round of a graph. ``State.params`` has one row a node. Shape: ``(nodes, num_params)``.

    Memory and randomness of ``aggregate`` are each node's own, those of ``channel`` each pair's.

    Args:
        common: What all nodes began with: on the wire, messages are relative to it.
    """

    def __init__(
        self,
        seats: Seats,
        common: Tensor,
        workers: Engine,
        state: State,
        watch: Sequence[Watch],
    ) -> None:
        super().__init__(seats, None, workers, state, watch)
        self.common = common
        self.bytes_sent = 0
        self.heard: dict[int, Any] = {}  # by the node that mixes, for whoever watches it
        self.trace = Trace()
        self.seen: list[tuple[Any, Any]] = []
        self.dressed: dict[tuple[int, bool], Any] = {}  # what is the same for all receivers

    def _broadcast(self, server: Any) -> dict[int, Tensor]:
        return {c: self.before[c] for c in self.cohort}

    def play(self) -> tuple[State, Played, list[tuple[Any, Any]]]:
        began = time.perf_counter()
        self.payloads = {
            c: replace(p, delta=p.delta.clone()) if self.watch else p
            for c, p in self._train(self.workers.together)
        }
        truth = {c: self._moved(p, self.before[c]) for c, p in self.payloads.items()}
        told = self._told(truth)
        after, num_mixed = self.before.clone(), 0
        for node in self.cohort:
            # one who forges lies to others: it goes on from what it really trained
            mine = {node: truth[node]} if node in truth else {}
            step = self._mix(node, told | mine)
            if step is not None:
                after[node] += step
                num_mixed += 1
            self._look(node, after[node])
        played = Played(
            self.round,
            self.cohort,
            time.perf_counter() - began,
            self.bytes_sent // max(len(told), 1),
            self.bytes_sent // max(len(self.cohort), 1),
            tuple(self.incidents),
            bool(self.cohort) and not num_mixed,
            self.caught,
            self.records,
        )
        return State(self.round + 1, after, self.memory), played, self.seen

    def _moved(self, payload: Any, start: Tensor) -> Any:
        """Return a payload relative to the common start instead of ``start``."""
        return replace(payload, delta=payload.delta + (start - self.common))

    def _told(self, truth: dict[int, Any]) -> dict[int, Any]:
        """Return what each node tells all its neighbours: a forgery, where a member forges.

        Forgers see payloads relative to the mean of their own states, all that they surely know.
        """
        coalition, members = self.coalition, [c for c in self.payloads if c in self.traitors]
        if coalition is None or coalition.forge is None or not members:
            return truth
        away = torch.stack([self.before[c] - self.common for c in members]).mean(dim=0)
        middle = self.common + away
        known = {
            c: replace(p, delta=p.delta + (self.before[c] - middle))
            for c, p in self.payloads.items()
        }
        view = coalition_view(
            self.federation, coalition, self.round, middle, self.task, known, members
        )
        forged, kept = self.seats.forge(view, self.memory.get(("forge", -1), {}), self.round)
        self._remember(("forge", -1), kept)
        lies = {}
        for c, payload in zip(members, forged, strict=True):
            if fault := payload.fault(self.common):
                self._note(c, fault)
            else:
                lies[c] = self._moved(payload, middle)
        return {c: p for c, p in truth.items() if c not in members} | lies

    def _mix(self, node: int, told: Mapping[int, Any]) -> Tensor | None:
        """Return the step of one node, or None if it has none to make."""
        hears = self.seats.envelope(node, self.cohort, self.round).cohort
        messages = self._heard(node, hears, told)
        if not messages:
            return None
        if len(messages) < self.federation.min_clients:
            raise TooFewClients(
                f"round {self.round}: node {node} has {len(messages)} sound messages, its own "
                f"included; {self.federation.min_clients} are needed: link more, or lower "
                "min_clients"
            )
        shift = self.common - self.before[node]
        read = self._read(list(messages.values()), shift)
        self.heard = dict(
            zip(messages, read if _are_clear(read) else messages.values(), strict=True)
        )
        role, rule = ("aggregate", node), self.federation.aggregate
        memory: Memory[Any] = Memory(dict(self.memory.get(role, {})))
        verdict, senders = Verdict(), tuple(messages)
        total = call(
            rule,
            read,
            rng=self.randomness.at("aggregate", self.round, node),
            memory=memory,
            model=self.task.model,
            before=self.before[node],
            cohort=senders,
            public=self.task.public,
            trace=self.trace,
            verdict=verdict,
        )
        is_fooled = self.coalition is not None and self.coalition.is_supplied
        if judges(rule) and (is_fooled or node not in self.traitors):
            false = {i for i, c in enumerate(senders) if c in self.traitors}
            caught = Caught.of(verdict.flagged, false, len(senders))
            self.caught = (self.caught or Caught()) + caught
        step: Tensor = total.open() if isinstance(total, Revealed) else total
        if not bool(torch.isfinite(self.before[node] + step).all()):
            self._note(node, "came to what is not finite: it kept its state")
            return None
        self._remember(role, memory.cell)
        return step

    def _heard(self, node: int, hears: tuple[int, ...], told: Mapping[int, Any]) -> dict[int, Any]:
        """Return what reaches a node, by sender: nothing, where pads would not cancel."""
        present = tuple(c for c in hears if c in told)
        if self._is_paired and len(present) < len(hears):
            needed = self.federation.recovers_from
            if needed is None or len(present) < needed:
                lost = len(hears) - len(present)
                self._note(node, f"heard nothing: {lost} around it dropped out of the masks")
                return {}
        found = {c: self._dress_for(node, c, told[c], present) for c in present}
        sound = {c: m for c, m in found.items() if m is not None}
        if self._is_paired and len(sound) < len(found):
            self._note(node, "heard nothing: one dropped out after keys were agreed")
            return {}
        for c, message in sound.items():
            if c != node:
                self.bytes_sent += getattr(message, "num_bytes", 0)
        return sound

    def _dress_for(self, node: int, sender: int, payload: Any, cohort: tuple[int, ...]) -> Any:
        """Return the message from one node to another, or None if there is none."""
        traitor = sender in self.traitors
        place, _ = self._role("channel", sender)
        worn = self.coalition.channel if self.coalition and traitor else None
        apart = _tells_apart(worn or self.federation.channel)
        if not apart and (sender, sender == node) in self.dressed:
            return self.dressed[sender, sender == node]
        role = (f"{place} to {node}", sender)
        envelope = Envelope(sender, cohort, self.round)
        try:
            message, kept = self.seats.dress(
                payload, envelope, self.memory.get(role, {}), traitor=traitor, receiver=node
            )
        except Exception as error:
            self._note(sender, f"raised {type(error).__name__} for node {node}: {error}")
            return None
        if not isinstance(message, self.sends):
            raise TypeError(
                f"{self.federation.channel!r} is annotated {self.sends.__name__} "
                f"but gave {message!r}"
            )
        self._remember(role, kept)
        if not apart:
            self.dressed[sender, sender == node] = message
        return message

    def _read(self, messages: Sequence[Any], shift: Tensor) -> list[Any]:
        """Return the messages relative to the reader's own state."""
        if _are_clear(messages):
            return list(with_rows(messages, rows(messages) + shift))
        return [Moved(m, shift, m.weight) for m in messages]

    def _look(self, node: int, after: Tensor) -> None:
        """Keep what a node saw, if someone watches."""
        heard, trace, self.heard, self.trace = self.heard, self.trace, {}, Trace()
        if not self.watch:
            return
        for kind, view in views_of_peer(
            self.federation,
            self.task,
            self.round,
            node,
            self.before[node],
            after,
            heard,
            self.payloads.get(node),
            trace,
        ):
            if any(w.keeps(self.round, kind) for w in self.watch):
                self.seen.append((kind, view))


def _are_clear(messages: Sequence[Any]) -> bool:
    return all(isinstance(m, Clear) for m in messages)


def _tells_apart(channel: Any) -> bool:
    """Say whether a channel may give different receivers different messages."""
    for stage in within(channel):
        named, takes_all = asks(code_of(stage))
        if named & _APART or (takes_all and not any(nested(stage))):
            return True
    return False

"""What an attacker sees. A view holds no more than its seat grants, and never the truth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from turncoat.messages import Clear
from turncoat.stage import Aggregate
from turncoat.task import Batch, Model

M_co = TypeVar("M_co", covariant=True)
P_co = TypeVar("P_co", covariant=True)
V_co = TypeVar("V_co", covariant=True)
C_co = TypeVar("C_co", bound=Clear, covariant=True)


_CHUNK = 1_000  # examples that are put through a model at once


class Seat(StrEnum):
    """Where the attacker sits."""

    CLIENT = "client"
    COALITION = "coalition"
    SERVER = "server"
    WIRE = "wire"
    PEER = "peer"
    USER = "user"
    SUPPLIER = "supplier"
    NEIGHBOUR = "neighbour"


@dataclass(frozen=True)
class BlindView(Generic[M_co]):
    """One round at a server that never learns the global model: only what arrived, and from whom.

    ``server`` tells the servers of multi-party computation apart.
    """

    round: int
    model: Model
    senders: tuple[int, ...]
    messages: tuple[M_co, ...] = field(repr=False)
    server: int = 0


@dataclass(frozen=True, kw_only=True)
class ServerView(BlindView[M_co]):
    """One round at a server that also knows the state it sent: to each sender, for it may lie."""

    sent: tuple[Tensor, ...] = field(repr=False)


@dataclass(frozen=True)
class AggregateView(Generic[P_co]):
    """Two consecutive global states, seen by all; a ``P`` moves one to the next."""

    round: int
    model: Model
    before: Tensor = field(repr=False)
    after: Tensor = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class PeerView(ServerView[M_co]):
    """One round at one node of a graph: what it heard from its neighbours, as its own rule read it.

    All is relative to the state that this node itself had: it takes that for what its neighbours
    started from, too (``sent``). In the first round, and on a complete graph, it is right, and sees
    their updates as a server would. Elsewhere "what they have minus what I have" is their update
    and the distance of two states.

    Attributes:
        client: The node's own number.
        mine: What it sent to itself: the rule reads it among the others.
    """

    client: int
    mine: M_co = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class MixView(AggregateView[P_co]):
    """A node's own state before and after a round: the mean of its neighbourhood moved it.

    Attributes:
        client: The node's own number.
    """

    client: int


@dataclass(frozen=True)
class ClientView(Generic[P_co]):
    """One round at one client: what it received, what it holds, what it computed."""

    client: int
    round: int
    model: Model
    before: Tensor = field(repr=False)
    data: Batch = field(repr=False)
    mine: P_co = field(repr=False)


@dataclass(frozen=True)
class CoalitionView(Generic[C_co]):
    """What colluding clients hold when they forge. ``honest`` and ``rule`` are stated knowledge.

    Attributes:
        own: What the acting members would send if they were honest, one each.
        honest: The payloads of everyone else in the cohort, if they know them.
        rule: The server's rule, if they know it and it reads such payloads.
        num_clients: Size of the cohort.
        public: Data that everyone has, if there are any.
    """

    round: int
    model: Model
    before: Tensor = field(repr=False)
    own: tuple[C_co, ...] = field(repr=False)
    honest: tuple[C_co, ...] | None = field(repr=False)
    rule: Aggregate[C_co] | None
    num_clients: int
    public: Batch | None = field(default=None, repr=False)

    @property
    def known(self) -> tuple[C_co, ...]:
        """The honest payloads, or the members' own as a sample of such."""
        return self.own if self.honest is None else self.honest


@dataclass(frozen=True)
class Shadows:
    """Models that the attacker trained as the target was, on random halves of the candidates.

    Attributes:
        models: White box to the attacker, who made them.
        inside: Which candidates each was trained on. Shape: ``(models, candidates)``, bool.
    """

    models: tuple[ModelView, ...] = field(repr=False)
    inside: Tensor = field(repr=False)


@dataclass(frozen=True)
class Suspects(Generic[V_co]):
    """Several federations, as one seat sees each: they differ by the kind of data they trained on.

    Attributes:
        views: What the seat sees of one federation each.
    """

    views: tuple[V_co, ...] = field(repr=False)


@dataclass(frozen=True)
class Worlds(Generic[V_co]):
    """Federations that the attacker played with records of its own, as its seat sees each.

    Attributes:
        views: As those of the suspects.
        second: Which were trained on the second kind of data. Shape: ``(federations,)``, bool.
    """

    views: tuple[V_co, ...] = field(repr=False)
    second: Tensor = field(repr=False)


@dataclass(frozen=True)
class TraceView:
    """One round at a neighbour of the machine: what was touched while each sender was served."""

    round: int
    model: Model
    before: Tensor = field(repr=False)
    senders: tuple[int, ...]
    touched: tuple[Any, ...] = field(repr=False)


@dataclass(frozen=True)
class ModelView:
    """The released model, white box."""

    model: Model
    params: Tensor = field(repr=False)

    def scores(self, inputs: Tensor) -> Tensor:
        """Return log-probabilities. Shape: ``(examples, classes)``."""
        with torch.no_grad():
            parts = [self.model.logits(self.params, some) for some in torch.split(inputs, _CHUNK)]
            return torch.cat(parts).log_softmax(dim=1)


class BudgetSpent(RuntimeError):
    """A released model was asked more often than it answers."""


@dataclass(eq=False)
class QueryView:
    """The released model behind an interface that counts. The one view that is not frozen."""

    answer: Callable[[Tensor], Tensor] = field(repr=False)
    budget: int | None = None
    num_queries: int = field(default=0, init=False)

    def scores(self, inputs: Tensor) -> Tensor:
        asked = self.num_queries + len(inputs)
        if self.budget is not None and asked > self.budget:
            raise BudgetSpent(f"{asked} queries asked; the budget is {self.budget}: ask fewer")
        self.num_queries = asked
        return self.answer(inputs)

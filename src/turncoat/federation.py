"""A federated round, written as the stages it passes through."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any, Generic, TypeVar, get_type_hints

import torch
from torch import Generator, Tensor

from turncoat.graphs import Graph, check_graph
from turncoat.messages import Clear, Revealed, Summable, Update, Votes
from turncoat.stage import (
    Aggregate,
    Begin,
    Broadcast,
    Channel,
    IncompatibleStages,
    Plan,
    Prepare,
    Release,
    Sample,
    Train,
    check,
    gives,
    join,
    leaves_trace,
    planned,
    wants,
    within,
)
from turncoat.task import Batch, Model, Task
from turncoat.validate import at_least, fraction
from turncoat.views import (
    AggregateView,
    BlindView,
    ClientView,
    MixView,
    ModelView,
    PeerView,
    Seat,
    ServerView,
    TraceView,
)

P = TypeVar("P")
M = TypeVar("M")


@dataclass(frozen=True)
class FromModel:
    """Begin with the model's own initialisation."""

    def __call__(self, task: Task, *, rng: Generator) -> Tensor:
        return task.model.initial(rng)


@dataclass(frozen=True)
class Everyone:
    """All clients take part in every round."""

    def __call__(self, num_clients: int) -> tuple[int, ...]:
        return tuple(range(num_clients))


@dataclass(frozen=True)
class PoissonSample:
    """Each client takes part with probability ``rate``, independently."""

    rate: float

    def __post_init__(self) -> None:
        fraction(self, rate=self.rate)

    def __call__(self, num_clients: int, *, rng: Generator) -> tuple[int, ...]:
        chosen = torch.rand(num_clients, generator=rng) < self.rate
        return tuple(chosen.nonzero().flatten().tolist())


@dataclass(frozen=True)
class FixedSample:
    """``num_sampled`` clients at a time, without replacement."""

    num_sampled: int

    def __post_init__(self) -> None:
        at_least(1, self, num_sampled=self.num_sampled)

    def __call__(self, num_clients: int, *, rng: Generator) -> tuple[int, ...]:
        if self.num_sampled > num_clients:
            raise ValueError(
                f"{self!r} needs {self.num_sampled} clients; there are {num_clients}: "
                "lower num_sampled"
            )
        order = torch.randperm(num_clients, generator=rng)[: self.num_sampled]
        return tuple(sorted(order.tolist()))


@dataclass(frozen=True)
class FractionSample:
    """A ``fraction`` of the clients at a time, rounded up, without replacement."""

    fraction: float

    def __post_init__(self) -> None:
        fraction(self, fraction=self.fraction)

    def __call__(self, num_clients: int, *, rng: Generator) -> tuple[int, ...]:
        return FixedSample(max(1, ceil(self.fraction * num_clients - 1e-9)))(num_clients, rng=rng)


@dataclass(frozen=True)
class Untouched:
    """Use the data as they are."""

    keeps_records = True  # what it gives of a record depends on no other: ε for each holds

    def __call__(self, data: Batch) -> Batch:
        return data


@dataclass(frozen=True)
class Same:
    """Send every client the same state."""

    def __call__(self, params: Tensor) -> Tensor:
        return params


@dataclass(frozen=True)
class Plain:
    """Send the payload as it is."""

    def __call__(self, payload: P) -> P:
        return payload


@dataclass(frozen=True)
class WhiteBox:
    """Publish the parameters."""

    def __call__(self, model: Model, params: Tensor) -> ModelView:
        return ModelView(model, params)


@dataclass(frozen=True, kw_only=True)
class Federation(Generic[P, M]):
    """The rules of one federation. ``P`` is what training yields, ``M`` what travels.

    With a graph there is no server: every client is a node that trains from a state of its own,
    sends what it then has to its neighbours, and makes its next state of its own and of what it
    hears, by the same ``aggregate``. All begin with the same state. On the wire a message is
    relative to that common start, which both ends know; every node reads it relative to its own
    state, as "what they have minus what I have". So on a complete graph, where all states are
    equal, each node does what a server would; and a radius, a distance or a cosine means what it
    means at a server, where one that grew with all that was ever learnt would mean nothing.

    Args:
        min_clients: A round that fewer sound messages reach (a node, in a graph) is an error; with
            0 a round that none reaches is aborted, and the run goes on.
        graph: Who hears whom; None for a server that hears all.
    """

    train: Train[P]
    channel: Channel[P, M]
    aggregate: Aggregate[M]
    prepare: Prepare = Untouched()
    broadcast: Broadcast = Same()
    sample: Sample = Everyone()
    begin: Begin = FromModel()
    release: Release[Any] = WhiteBox()
    min_clients: int = 1
    graph: Graph | None = None

    def __post_init__(self) -> None:
        at_least(0, self, min_clients=self.min_clients)
        for place, kind in STAGES.items():
            check(getattr(self, place), kind)
            if wants(stage := getattr(self, place), "targets") or wants(stage, "last"):
                raise IncompatibleStages(
                    f"{stage!r} is told what an attack is after, and a federation is after "
                    "nobody: let an attack name it as its server"
                )
        join(self.train, self.trains, self.channel)
        join(self.channel, self.sends, self.aggregate)
        self._check_answers()
        if not self.server_learns_state and self.opener is None:
            raise IncompatibleStages(f"nobody opens {self.sends.__name__}: {self.channel!r} cannot")
        if self.graph is not None:
            self._check_peers(self.graph)

    def _check_answers(self) -> None:
        """Refuse votes where the state is a model, and the other way round."""
        answers = any(hasattr(stage, "answers") for stage in within(self.begin))
        if answers == issubclass(self.trains, Votes):
            return
        if answers:
            raise IncompatibleStages(
                f"{self.begin!r} begins with answers to public examples, which votes move, but "
                f"{self.train!r} gives {self.trains.__name__}: train with 'teacher', or leave "
                "'begin' out"
            )
        raise IncompatibleStages(
            f"{self.train!r} votes on public examples, but {self.begin!r} begins with a model: "
            "begin with 'unanswered'"
        )

    def _check_peers(self, graph: Graph) -> None:
        """Refuse what only makes sense with a server."""
        check_graph(graph)
        if self.broadcast != Same():
            raise IncompatibleStages(
                f"{self.broadcast!r} broadcasts, but with {graph!r} there is no server: leave "
                "'broadcast' out"
            )
        if not issubclass(self.sends, Revealed):
            raise IncompatibleStages(
                f"{self.channel!r} sends {self.sends.__name__}, which whoever mixes must not be "
                f"able to open, but with {graph!r} those who hold the key mix: use a channel whose "
                "sums open without one (secure-aggregation), or leave 'graph' out"
            )
        if not issubclass(self.sends, Clear):
            join(self.channel, Revealed, self.aggregate)
        if not issubclass(self.trains, Clear):
            raise IncompatibleStages(
                f"{self.train!r} gives {self.trains.__name__}, but with {graph!r} it must give a "
                "change of a node's own state (Update): use another training"
            )

    @property
    def trains(self) -> Any:
        """The type of payload that training yields."""
        return gives(self.train)

    @property
    def sends(self) -> Any:
        """The type of message that travels."""
        return gives(self.channel, self.trains)

    @property
    def opener(self) -> Any:
        """The part of the channel that holds the key, if any."""
        return next((s for s in within(self.channel) if hasattr(s, "open")), None)

    @property
    def recovers_from(self) -> int | None:
        """How many clients must be left for the channel to mend dropouts; None: it cannot."""
        least = (getattr(stage, "recovers_from", None) for stage in within(self.channel))
        return next((number for number in least if number is not None), None)

    @property
    def server_learns_state(self) -> bool:
        return not issubclass(self.sends, Summable) or issubclass(self.sends, Revealed)

    @property
    def yields_model(self) -> bool:
        """Whether the state is a model's parameters, and not, say, a consensus of logits."""
        return issubclass(self.trains, Update)

    def planned(self, plan: Plan) -> Federation[P, M]:
        """Return the federation with its calibrated stages fitted to a plan."""
        return Federation(
            **{place: planned(getattr(self, place), plan) for place in STAGES},
            min_clients=self.min_clients,
            graph=self.graph,
        )

    def held(self, params: Tensor, node: int) -> Tensor:
        """Return the state that a node holds: the one there is, or its own row.

        Args:
            params: Shape: ``(num_params,)``, or ``(nodes, num_params)`` with a graph.
        """
        return params if self.graph is None else params[node]

    def views(self) -> dict[Seat, tuple[Any, ...]]:
        """Return the types of view that this federation produces, by seat.

        Whoever receives the global state holds the model white box, whatever users are given. In a
        graph a peer holds its own, and users get that of one node.
        """
        payload: Any = self.trains
        aggregate = AggregateView[payload]
        facing = getattr(self.sends, "facing", None)  # what one of several servers gets of it
        seen: Any = get_type_hints(facing)["return"] if facing else self.sends
        model = (ModelView,) if self.yields_model else ()
        leaves = (TraceView,) if leaves_trace(self.aggregate) else ()
        if self.graph is not None:
            peer = (PeerView[seen], MixView[payload], ClientView[payload], *model)
            return {
                Seat.PEER: peer,
                Seat.USER: (gives(self.release),),
                Seat.NEIGHBOUR: leaves,
            }
        if self.server_learns_state:
            server: tuple[Any, ...] = (ServerView[seen], aggregate, *model)
        else:
            server = (BlindView[seen],)
        return {
            Seat.SERVER: server,
            Seat.CLIENT: (ClientView[payload], aggregate, *model),
            Seat.USER: (gives(self.release),),
            Seat.NEIGHBOUR: leaves,
        }


STAGES: dict[str, Any] = {
    "begin": Begin,
    "sample": Sample,
    "broadcast": Broadcast,
    "prepare": Prepare,
    "train": Train,
    "channel": Channel,
    "aggregate": Aggregate,
    "release": Release,
}

"""Our active attacks as mods of a Flower ClientApp: ``ClientApp(mods=[Traitors(...)])``.

Every forge of ``turncoat.attacks.poisoning`` can be worn that needs no server's rule; those most
used can be had from here. Apps in the Message API and ``client_fn`` apps alike; under secure
aggregation, name the traitors after its mod: ``[secaggplus_mod, Traitors(...)]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord
from flwr.clientapp.typing import ClientAppCallable
from torch import nn

from turncoat.attacks.poisoning.boost import Boost
from turncoat.attacks.poisoning.gaussian import Gaussian
from turncoat.attacks.poisoning.ipm import IPM
from turncoat.attacks.poisoning.min_max import MinMax, MinSum, largest_gamma
from turncoat.coalition import Forge
from turncoat.flower.replies import Frame, arrays_of, record_of
from turncoat.messages import Update
from turncoat.randomness import Randomness
from turncoat.stage import Memory, call
from turncoat.task import Model
from turncoat.validate import at_least
from turncoat.views import CoalitionView

__all__ = ["IPM", "Boost", "Gaussian", "MinMax", "MinSum", "Traitors", "largest_gamma"]

_WEIGHTS = ("num-examples", "num_examples")  # where the two APIs say how much a reply counts


@dataclass(frozen=True)
class Traitors:
    """Let some nodes, known by ``partition-id``, train as they should and send what ``forge`` says.

    Traitors in one process collude: each forges with what the others would have sent in this round
    if they were asked before it, and in their last round if not. A traitor that is alone in its
    process has its own honest update for a sample, from which ALIE and Min-Max read no spread:
    they then send it as it is.

    Args:
        forge: ``SignFlip(3.0)``, ``ALIE()``, ``MinMax()``, ``Boost()``, ...
        clients: The partition ids of the traitors.
        num_clients: Size of the cohort as the traitors believe; None for ``num-partitions``.
        num_examples: What they claim to have trained on; None for the truth.
        seed: Of the forges that draw.

    >>> Traitors(Boost(), clients=(0, 1))
    Traitors(forge=Boost(factor=None), clients=(0, 1), num_clients=None, num_examples=None, seed=0)
    """

    forge: Forge[Update]
    clients: tuple[int, ...]
    num_clients: int | None = None
    num_examples: int | None = None
    seed: int = 0
    _shared: dict[int, tuple[int, Update]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _memory: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.clients:
            raise ValueError("Traitors: clients is empty: give at least one partition id")
        at_least(0, self, **{f"clients[{i}]": c for i, c in enumerate(self.clients)})
        at_least(1, self, num_clients=self.num_clients, num_examples=self.num_examples)

    def __call__(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        client = context.node_config.get("partition-id")
        if client is None:
            raise ValueError(
                "Traitors know themselves by their partition-id, and this node has none: start it "
                "with --node-config 'partition-id=...'"
            )
        trains = message.metadata.message_type.split(".")[0] == "train"
        if int(client) not in self.clients or not trains or not message.content.array_records:
            return call_next(message, context)
        before = Frame(arrays_of(_sole(message.content.array_records)))
        number, last = _round_of(message), self._shared.get(int(client), (0, None))[0]
        reply = call_next(message, context)
        if reply.has_error():
            return reply
        self._betray(reply, before, int(client), last + 1 if number is None else number, context)
        return reply

    def _betray(
        self, reply: Message, frame: Frame, client: int, number: int, context: Context
    ) -> None:
        name = next(iter(reply.content.array_records))
        sent = arrays_of(_sole(reply.content.array_records))
        named = dict(zip(frame.before, sent.values(), strict=True))  # both have the same order
        weight = self.num_examples or _weight(reply)
        self._shared[client] = (number, Update(frame.delta(named), float(weight or 1)))
        others = [
            update
            for member, (at, update) in sorted(self._shared.items())
            if member != client and number - at in (0, 1)
        ]
        view = CoalitionView(
            round=number,
            model=_unknown(),
            before=frame.vector.float(),
            own=(*others, self._shared[client][1]),
            honest=None,
            rule=None,
            num_clients=self._size(context),
        )
        forged: Sequence[Update] = call(
            self.forge,
            view,
            rng=Randomness(self.seed).at("forge", number, client),
            memory=Memory(self._memory),
        )
        moved = frame.moved(forged[-1].delta, {n: named[n] for n in frame.others})
        reply.content[name] = record_of(
            {
                own: np.asarray(array, sent[own].dtype)
                for own, array in zip(sent, moved.values(), strict=True)
            }
        )
        if self.num_examples is not None:
            _claim(reply, self.num_examples)

    def _size(self, context: Context) -> int:
        known = self.num_clients or context.node_config.get("num-partitions")
        return max(int(known or 0), len(self.clients))


def _unknown() -> Model:
    return Model(nn.Identity)  # a mod knows arrays, and no architecture


def _sole(records: Any) -> ArrayRecord:
    if len(records) != 1:
        raise ValueError(f"Traitors forge one ArrayRecord; this message has {len(records)}")
    record: ArrayRecord = next(iter(records.values()))
    return record


def _round_of(message: Message) -> int | None:
    for config in message.content.config_records.values():
        if isinstance(number := config.get("server-round"), int):
            return number
    return None


def _weight(reply: Message) -> float | None:
    for metrics in reply.content.metric_records.values():
        for key in _WEIGHTS:
            if isinstance(weight := metrics.get(key), int | float) and weight > 0:
                return float(weight)
    return None


def _claim(reply: Message, num_examples: int) -> None:
    for name, metrics in list(reply.content.metric_records.items()):
        for key in _WEIGHTS:
            if key in metrics:
                reply.content[name] = MetricRecord({**dict(metrics.items()), key: num_examples})

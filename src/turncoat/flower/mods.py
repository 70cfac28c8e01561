"""Our active attacks as mods of a Flower ClientApp: ``ClientApp(mods=[Traitors(...)])``.

Every forge of Turncoat can be worn (``turncoat.attacks.poisoning``), and those below, which need
no more than updates either. Apps in the Message API and ``client_fn`` apps alike; under secure
aggregation, name the traitors after its mod: ``[secaggplus_mod, Traitors(...)]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord
from flwr.clientapp.typing import ClientAppCallable
from torch import Generator, Tensor, nn

from turncoat.coalition import Forge
from turncoat.flower.replies import Frame, arrays_of, record_of
from turncoat.messages import Update, rows, with_rows
from turncoat.randomness import Randomness
from turncoat.stage import Memory, call
from turncoat.task import Model
from turncoat.validate import at_least, positive
from turncoat.views import CoalitionView

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


@dataclass(frozen=True)
class Boost:
    """Send the own update ``factor`` times as long: the mean then becomes it [1]_. A forge.

    The update must be worth it: train it on poisoned data (the app's own affair).

    Args:
        factor: None for the size of the cohort.

    .. [1] Bagdasaryan et al., AISTATS 2020, section 4.2, eq. (3). https://arxiv.org/abs/1807.00459
    """

    factor: float | None = None

    def __post_init__(self) -> None:
        positive(self, factor=self.factor)

    def __call__(self, view: CoalitionView[Update]) -> Sequence[Update]:
        factor = float(view.num_clients) if self.factor is None else self.factor
        return with_rows(view.own, rows(view.own) * factor)


@dataclass(frozen=True)
class Gaussian:
    """Send noise, ``scale`` times as long as the own update [1]_. A forge that knows no label.

    .. [1] Blanchard et al., NeurIPS 2017, section 6. https://arxiv.org/abs/1703.02757
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        positive(self, scale=self.scale)

    def __call__(self, view: CoalitionView[Update], *, rng: Generator) -> Sequence[Update]:
        own = rows(view.own)
        noise = torch.randn(own.shape, generator=rng).to(own.device)
        lengths = own.norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True).clamp(min=1e-30)
        return with_rows(view.own, noise * lengths * self.scale)


@dataclass(frozen=True)
class IPM:
    """Send the honest mean turned round and ``epsilon`` times as long [1]_. A forge.

    Inner product manipulation: a small epsilon hides among the honest from Krum and the median, one
    above ``(n - f) / f`` turns the plain mean round.

    .. [1] Xie et al., UAI 2019, section 4. https://arxiv.org/abs/1903.03936
    """

    epsilon: float = 0.5

    def __post_init__(self) -> None:
        positive(self, epsilon=self.epsilon)

    def __call__(self, view: CoalitionView[Update]) -> Sequence[Update]:
        forged = -self.epsilon * rows(view.known).mean(dim=0)
        return with_rows(view.own, forged.expand(len(view.own), -1))


@dataclass(frozen=True)
class MinMax:
    """Go from the honest mean as far as the two honest updates furthest apart are [1]_. A forge.

    ``mean + gamma p`` with the largest gamma that leaves the forged update no further from any
    known one than any two of these are from each other. One known update has no spread: it is sent
    as it is.

    Differs from the paper: gamma is the smallest of the roots of a quadratic for each known
    update, not searched.

    Args:
        direction: p: minus the deviation of each coordinate ("std"), minus its mean's sign
            ("sign"), or minus the mean as a unit vector ("unit").

    .. [1] Shejwalkar & Houmansadr, NDSS 2021, section IV-B, eq. (11).
       https://www.ndss-symposium.org/ndss-paper/manipulating-the-byzantine-optimizing-model-poisoning-attacks-and-defenses-for-federated-learning/
    """

    direction: Literal["std", "sign", "unit"] = "std"

    def __post_init__(self) -> None:
        if self.direction not in ("std", "sign", "unit"):
            raise ValueError(
                f"MinMax: direction must be 'std', 'sign' or 'unit'; it is {self.direction!r}"
            )

    def __call__(self, view: CoalitionView[Update]) -> Sequence[Update]:
        known = rows(view.known).double()
        mean = known.mean(dim=0)
        forged = mean + largest_gamma(known, self._away(known, mean)) * self._away(known, mean)
        return with_rows(view.own, forged.float().expand(len(view.own), -1))

    def _away(self, known: Tensor, mean: Tensor) -> Tensor:
        if self.direction == "sign":
            away = mean.sign()
        elif self.direction == "unit":
            away = mean / mean.norm().clamp(min=1e-30)
        else:
            away = known.std(dim=0) if len(known) > 1 else torch.zeros_like(mean)
        return -away


def largest_gamma(known: Tensor, away: Tensor) -> float:
    """Return how far along ``away`` from the mean of ``known`` Min-Max may go.

    For each known x: ``|mean + gamma p - x|^2 <= D``, a quadratic in gamma.
    """
    square = float(away.square().sum())
    if len(known) < 2 or not square:
        return 0.0
    furthest = torch.pdist(known).max().square()
    offsets = known.mean(dim=0) - known
    half = offsets @ away
    slack = (furthest - offsets.square().sum(dim=1)).clamp(min=0)
    return float(((half.square() + square * slack).sqrt() - half).min() / square)


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

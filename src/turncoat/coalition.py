"""Who is dishonest, what they know, when they act, and what they do instead."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, get_args, get_origin, get_type_hints

import torch

from turncoat.federation import Federation
from turncoat.messages import Clear
from turncoat.randomness import Randomness
from turncoat.stage import (
    Channel,
    IncompatibleStages,
    Prepare,
    Train,
    asks,
    check,
    code_of,
    gives,
    join,
    matches,
)
from turncoat.task import Model
from turncoat.validate import at_least, fraction, nearest
from turncoat.views import CoalitionView

C = TypeVar("C", bound=Clear)


class Members(Protocol):
    """Which clients are compromised in a round."""

    def __call__(self, num_clients: int, round: int, randomness: Randomness) -> frozenset[int]: ...


class Schedule(Protocol):
    """Whether the coalition acts in a round."""

    def __call__(self, round: int) -> bool: ...


class Code(Protocol):
    """What a supplier of code makes of the model that its users train: the loss is part of it."""

    def __call__(self, model: Model, /) -> Model: ...


class Forge(Protocol[C]):
    """What the members send: one payload each. Offered: rng, memory (one for the coalition)."""

    def __call__(self, view: CoalitionView[C], *args: Any, **asks: Any) -> Sequence[C]: ...


@dataclass(frozen=True)
class Clients:
    """Always the same, by number."""

    ids: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.ids:
            raise ValueError(f"{self!r} names nobody: give at least one client's number")
        at_least(0, self, **{f"ids[{i}]": number for i, number in enumerate(self.ids)})

    def __call__(self, num_clients: int, round: int, randomness: Randomness) -> frozenset[int]:
        return frozenset(self.ids)


@dataclass(frozen=True)
class Pool:
    """A random fraction of all clients, drawn once, or anew each round."""

    fraction: float
    anew: bool = False

    def __post_init__(self) -> None:
        fraction(self, fraction=self.fraction)

    def __call__(self, num_clients: int, round: int, randomness: Randomness) -> frozenset[int]:
        rng = randomness.at("coalition", round if self.anew else 0)
        order = torch.randperm(num_clients, generator=rng).tolist()
        return frozenset(order[: round_half_up(self.fraction * num_clients)])


@dataclass(frozen=True)
class Always:
    """In every round."""

    def __call__(self, round: int) -> bool:
        return True


@dataclass(frozen=True)
class Once:
    """In one round, by number; the first is 0."""

    at: int

    def __post_init__(self) -> None:
        at_least(0, self, at=self.at)

    def __call__(self, round: int) -> bool:
        return round == self.at


@dataclass(frozen=True)
class Every:
    """In every ``num_rounds``-th round from ``first`` on."""

    num_rounds: int
    first: int = 0

    def __post_init__(self) -> None:
        at_least(1, self, num_rounds=self.num_rounds)
        at_least(0, self, first=self.first)

    def __call__(self, round: int) -> bool:
        return round >= self.first and (round - self.first) % self.num_rounds == 0


@dataclass(frozen=True)
class From:
    """In round ``first`` and all after it."""

    first: int

    def __post_init__(self) -> None:
        at_least(0, self, first=self.first)

    def __call__(self, round: int) -> bool:
        return round >= self.first


@dataclass(frozen=True, kw_only=True)
class Coalition(Generic[C]):
    """Clients that wear other stages than the federation's. ``None`` means: as an honest client.

    Whoever wears nothing but ``supply`` or ``code`` is honest, and the victim of a supplier: all
    clients may be.

    Args:
        supply: What a supplier of data does to their records, before they prepare them.
        code: What a supplier of code does to the model that they train.
        knows_honest: Whether they see everyone's payloads when they forge, or only their own.
        knows_rule: Whether they know the server's rule (Kerckhoffs), though never its memory.
    """

    members: Members
    acts: Schedule = Always()
    supply: Prepare | None = None
    code: Code | None = None
    prepare: Prepare | None = None
    train: Train[C] | None = None
    forge: Forge[C] | None = None
    channel: Channel[C, Any] | None = None
    knows_honest: bool = False
    knows_rule: bool = True

    @property
    def is_supplied(self) -> bool:
        """Whether the members are honest themselves, and only get what is bad."""
        own = (self.prepare, self.train, self.forge, self.channel)
        return not any(stage is not None for stage in own)

    def acting(self, num_clients: int, round: int, randomness: Randomness) -> frozenset[int]:
        """Return who misbehaves in this round; the runtime intersects it with the cohort."""
        if not self.acts(round):
            return frozenset()
        return self.members(num_clients, round, randomness)


def round_half_up(number: float) -> int:
    return int(number + 0.5)


def check_worn(federation: Federation[Any, Any], coalition: Coalition[Any]) -> None:
    """Refuse a coalition whose stages do not fit the federation that it wants to betray."""
    for stage in (coalition.supply, coalition.prepare):
        if stage is not None:
            check(stage, Prepare)
    if coalition.code is not None and not is_code(coalition.code):
        raise IncompatibleStages(
            f"{coalition.code!r} is no code: it must take a Model and nothing else, and return one"
        )
    trains = federation.trains
    if coalition.train is not None:
        check(coalition.train, Train)
        trains = gives(coalition.train)
        if not matches(trains, federation.trains):
            raise IncompatibleStages(
                f"{coalition.train!r} trains {trains.__name__}, but this federation's clients "
                f"send {federation.trains.__name__}: wear a training that yields the same"
            )
    if coalition.forge is not None:
        _check_forge(coalition.forge, trains)
    if coalition.channel is not None:
        check(coalition.channel, Channel)
        join(coalition.train or federation.train, trains, coalition.channel)
        sends = gives(coalition.channel, trains)
        if not matches(sends, federation.sends):
            raise IncompatibleStages(
                f"{coalition.channel!r} sends {sends.__name__}, but this federation's server takes "
                f"{federation.sends.__name__}: it would be found out at once"
            )


def is_code(stage: Any) -> bool:
    """Say whether a callable makes one model of another."""
    code = code_of(stage)
    names = [n for n in inspect.signature(code).parameters if n != "self"]
    hints = get_type_hints(code)
    return len(names) == 1 and hints.get(names[0]) is Model and hints.get("return") is Model


def _check_forge(forge: Any, trains: Any) -> None:
    offers, code = {"rng", "memory"}, code_of(forge)
    hints = get_type_hints(code)
    subject = next((n for n in inspect.signature(code).parameters if n != "self"), "")
    view = hints.get(subject)
    if get_origin(view) is not CoalitionView:
        raise IncompatibleStages(f"{forge!r} cannot forge: its subject must be a CoalitionView")
    for name in sorted(asks(code)[0] - offers - {subject}):
        raise IncompatibleStages(
            f"{forge!r} asks for {name!r}, but Forge offers memory, rng; {nearest(name, offers)}"
        )
    if not matches(trains, get_args(view)[0]):
        raise IncompatibleStages(
            f"{forge!r} forges {get_args(view)[0].__name__}, but this federation's clients send "
            f"{trains.__name__}"
        )


def check_members(coalition: Coalition[Any], num_clients: int, randomness: Randomness) -> None:
    """Refuse a coalition of nobody, of everybody, or with members that do not exist."""
    members = coalition.members(num_clients, 0, randomness)
    if strangers := sorted(m for m in members if not 0 <= m < num_clients):
        raise ValueError(
            f"{coalition.members!r} names client {strangers[0]}, but there are {num_clients} "
            f"clients, 0 to {num_clients - 1}"
        )
    if not members:
        raise ValueError(
            f"{coalition.members!r} of {num_clients} clients is nobody: raise the fraction"
        )
    if len(members) >= num_clients and not coalition.is_supplied:
        raise ValueError(
            f"{coalition.members!r} is everyone: {len(members)} of {num_clients} clients are "
            "dishonest, so nobody is left to attack; name fewer"
        )

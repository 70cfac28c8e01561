"""One cell of the matrix: an attack, the game that marks its guess, and what came of it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Generic, Protocol, TypeVar, get_args, get_origin, get_type_hints

from torch import Generator, Tensor

from turncoat.coalition import Clients, Coalition
from turncoat.describe import ADDED
from turncoat.federation import Federation
from turncoat.stage import Broadcast, asks, matches
from turncoat.task import Task
from turncoat.views import ClientView, ModelView, QueryView, Seat, ServerView, Suspects

V_contra = TypeVar("V_contra", contravariant=True)
G = TypeVar("G")
G_co = TypeVar("G_co", covariant=True)
G_contra = TypeVar("G_contra", contravariant=True)
Released = ModelView | QueryView


class Attack(Protocol[V_contra, G_co]):
    """Anything that turns a view into a guess. It asks by name for what the question grants."""

    def __call__(self, view: V_contra, *args: Any, **asks: Any) -> G_co: ...


@dataclass(frozen=True, slots=True)
class Measurement:
    """A figure that cannot be read without its baseline and its interval (95 %).

    Attributes:
        name: What is measured: ``"auc"``, ``"psnr"``, ``"accuracy"``.
        value: What the attack reached.
        baseline: What someone reaches who does not attack: chance, a blind guess, a clean run.
        low, high: The interval of ``value``.
        worst: The value at which the attacker has all there is to have; says which way is worse.
        unit: Of all the above: ``"dB"``, or nothing.
        least_gain: How far at least ``value`` is from ``baseline`` towards ``worst``, at the same
            95 %; for a baseline that was measured on the same trials, and is as uncertain.
    """

    name: str
    value: float
    baseline: float
    low: float
    high: float
    worst: float
    unit: str = ""
    least_gain: float | None = None

    @property
    def success(self) -> float:
        """Return how far the attack went from the baseline (0) to all there is (1)."""
        room = self.worst - self.baseline
        return min(1.0, max(0.0, (self.value - self.baseline) / room)) if room else 0.0

    @property
    def beats_baseline(self) -> bool:
        """Say whether the whole interval lies on the attacker's side of the baseline.

        That is the interval of the gain, if there is one. Where not to attack already gives all
        there is, no side is left.
        """
        if self.worst == self.baseline:
            return False
        if self.least_gain is not None:
            return self.least_gain > 0
        return self.low > self.baseline if self.worst > self.baseline else self.high < self.baseline


@dataclass(frozen=True)
class Marked:
    """What a game says of a guess: one figure to lead with, more, and what can be shown.

    ``exhibits`` are tensors for the report, by the names that it knows (see docs/report.md).
    ``remarks`` say what is not among the figures, and why: each half a sentence.
    """

    headline: Measurement
    others: tuple[Measurement, ...] = ()
    exhibits: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    remarks: tuple[str, ...] = ()


class Game(Protocol[G_contra]):
    """Poses a question, keeps the truth to itself, marks the guess.

    ``pose`` is annotated ``-> tuple[Q, Truth]`` where ``Q`` is a frozen dataclass: its fields are
    what the attack may ask for, and all it gets beside the view. Clients that never ``took_part``
    are outsiders, whatever the task gave them; ``cohort`` is who was in the round of the view.

    Attributes:
        family: What the attacker wants, one of ``"inversion"``, ``"membership"``, ...
        says: The verdict, with ``{who}``, ``{value}``, ``{interval}`` and ``{baseline}`` left open.
    """

    family: str
    says: str

    def pose(
        self, task: Task, *, took_part: frozenset[int], cohort: tuple[int, ...], rng: Generator
    ) -> tuple[Any, Any]: ...

    def mark(self, guess: G_contra, truth: Any, *, rng: Generator) -> Marked: ...


class Outcome(Protocol):
    """What an active attack is after, marked on what users get of the two runs."""

    family: str
    says: str

    def mark(self, hurt: Released, clean: Released, *, task: Task, rng: Generator) -> Marked: ...


class UnknownQuestion(TypeError):
    """An attack asks for something that its game does not grant."""


@dataclass(frozen=True)
class Trial(Generic[G]):
    """An attack that only watches, and the game it plays.

    Args:
        coalition: Clients that actively help it, if any: client ``by`` alone, where the attack
            itself says what is ``worn`` for its training.
        server: A malicious server's broadcast that helps it, if any: the ``server`` that the attack
            itself names, if it names one.
        at: The round whose view it gets: 0 is the first, -1 the last. Others are not kept.
        by: Which client, node, or which of several servers, it sits at. Of a graph, users get the
            model of this node.
        allies: Other clients that pool what they see with the one it sits at, ``by``.
    """

    attack: Attack[Any, G]
    game: Game[G]
    coalition: Coalition[Any] | None = None
    server: Broadcast | None = None
    at: int = -1
    by: int = 0
    allies: tuple[int, ...] = field(default=(), metadata=ADDED)

    def __post_init__(self) -> None:
        if self.allies and not matches(ClientView, self.needs):
            raise UnknownQuestion(
                f"{self.attack!r} needs {name_of(self.needs)}, and allies only pool what a client "
                "sees (ClientView): leave allies out"
            )
        if self.server is None:
            object.__setattr__(self, "server", getattr(self.attack, "server", None))
        if self.coalition is None and hasattr(self.attack, "worn"):
            worn: Any = getattr(self.attack, "worn")  # noqa: B009
            alone = Coalition[Any](members=Clients((self.by,)), train=worn)
            object.__setattr__(self, "coalition", alone)
        question = get_args(get_type_hints(type(self.game).pose)["return"])[0]
        granted = {f.name for f in fields(question)} | {"rng", "drafts"}
        code = type(self.attack).__call__
        subject = next(n for n in inspect.signature(code).parameters if n != "self")
        for name in sorted(asks(code)[0] - granted - {subject}):
            raise UnknownQuestion(
                f"{self.attack!r} asks for {name!r}, but {self.game!r} grants {sorted(granted)}"
            )
        if getattr(self.game, "prior_only", False) and not hasattr(self.attack, "prior_only"):
            raise UnknownQuestion(
                f"{self.game!r} asks what priors alone are worth, but {self.attack!r} has none to "
                "play without the update: leave prior_only out"
            )
        if self.suspects != hasattr(self.game, "num_suspects"):
            raise UnknownQuestion(
                f"{self.game!r} is about {'one federation' if self.suspects else 'several'}, but "
                f"{self.attack!r} takes a view of {'several' if self.suspects else 'one'}: choose "
                "another game"
            )
        if self.planted and (self.coalition is not None or self.server is not None):
            raise ValueError(
                f"{self.game!r} plants canaries in a run in which nobody else is dishonest: "
                f"{self.attack!r} can have neither a coalition nor a server of its own"
            )
        if self.suspects and (self.coalition is not None or self.server is not None):
            raise ValueError(
                f"{self.game!r} trains suspects in which everyone is honest: {self.attack!r} can "
                "have neither a coalition nor a server of its own"
            )

    @property
    def planted(self) -> bool:
        """Whether its game plants canaries, and so has a run of its own."""
        return hasattr(self.game, "planted")

    @property
    def suspects(self) -> bool:
        """Whether it takes the views of several federations: ``Suspects`` of them."""
        return get_origin(self._given) is Suspects

    @property
    def whole(self) -> bool:
        """Whether it needs the views of all rounds: a ``Sequence`` of them."""
        return get_origin(self._annotation) is Sequence

    @property
    def needs(self) -> Any:
        """The type of the view, of one round if it needs all."""
        return get_args(self._annotation)[0] if self.whole else self._annotation

    @property
    def _annotation(self) -> Any:
        return get_args(self._given)[0] if self.suspects else self._given

    @property
    def _given(self) -> Any:
        return get_type_hints(type(self.attack).__call__)["view"]

    @property
    def family(self) -> str:
        return self.game.family

    @property
    def says(self) -> str:
        return self.game.says

    def sits_at(self, view: Any) -> bool:
        """Say whether a view is that of the attacker's own client or server.

        A server that knows the state is the only one.
        """
        if type(view) is ServerView:
            return True
        return getattr(view, "client", getattr(view, "server", self.by)) in {self.by, *self.allies}

    def seats(self, federation: Federation[Any, Any]) -> list[Seat]:
        """Return the seats from which this attack can be mounted: a server's, if it lies."""
        produced = federation.views().items()
        if self.server is not None:
            produced = {Seat.SERVER: federation.views().get(Seat.SERVER, ())}.items()
        return [s for s, kinds in produced if any(matches(k, self.needs) for k in kinds)]


@dataclass(frozen=True, kw_only=True)
class Sabotage:
    """An active attack, marked by its outcome; the baseline is the same run without it.

    Both runs share every address of randomness, so they differ by the attack alone.
    """

    outcome: Outcome
    coalition: Coalition[Any] | None = None
    server: Broadcast | None = None

    @property
    def family(self) -> str:
        return self.outcome.family

    @property
    def says(self) -> str:
        return self.outcome.says

    def seats(self, federation: Federation[Any, Any]) -> list[Seat]:
        if self.server:
            return [Seat.SERVER] if federation.graph is None else []
        supplied = self.coalition is not None and self.coalition.is_supplied
        return [Seat.SUPPLIER if supplied else Seat.COALITION]


@dataclass(frozen=True, slots=True)
class Scored:
    marked: Marked


@dataclass(frozen=True, slots=True)
class Blocked:
    """The federation never produces the view this attack needs."""

    reason: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The attack could be mounted and broke down: neither a success nor a defence."""

    error: str


Cell = Scored | Blocked | Failed


def why_blocked(
    trial: Trial[Any] | Sabotage, federation: Federation[Any, Any], seat: Seat | None
) -> str:
    """Return what the attack needs and what this seat sees instead (None: all seats)."""
    sees = "; ".join(
        f"the {s} sees {', '.join(map(name_of, kinds)) or 'nothing'}"
        for s, kinds in federation.views().items()
        if seat in (s, None)
    )
    needs = name_of(trial.needs) if isinstance(trial, Trial) else "to take part"
    who = type(trial.attack).__name__ if isinstance(trial, Trial) else "the attack"
    return f"{who} needs {needs}; {sees or f'nobody sits at {seat}'}"


def name_of(kind: Any) -> str:
    """Return an annotation as people write it.

    >>> name_of(ModelView | QueryView)
    'ModelView or QueryView'
    """
    if get_args(kind):
        inside = [name_of(a) for a in get_args(kind)]
        origin = get_origin(kind)
        if isinstance(origin, type) and origin.__module__ != "types":
            return f"{origin.__name__}[{', '.join(inside)}]"
        return " or ".join(inside)
    return getattr(kind, "__name__", str(kind))


@dataclass(frozen=True, slots=True)
class Reconstruction:
    """What the inputs were. Shapes: ``(n, ...)`` and ``(n,)``.

    Attributes:
        prior_only: What the same recipe makes without the update, of its priors alone, if the
            attack says so: a baseline. Shape: as ``inputs``.
    """

    inputs: Tensor
    labels: Tensor
    prior_only: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Memberships:
    """One score per candidate; the higher, the more likely it was trained on."""

    scores: Tensor


@dataclass(frozen=True, slots=True)
class Attributes:
    """How likely each value of a hidden attribute is. Shape: ``(records, values)``."""

    scores: Tensor


@dataclass(frozen=True, slots=True)
class Leanings:
    """One score per suspect: above 0 for the second kind of data, otherwise for the first."""

    scores: Tensor

"""Stages: callables whose signatures say what they read, what they give and what they ask for.

The first parameters of a stage are what it transforms. Every further parameter is an *ask*: it is
handed over if, and only if, the stage names it. So a rule without memory never mentions memory.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache
from types import FunctionType, UnionType
from typing import Any, Generic, Protocol, TypeVar, Union, get_args, get_origin, get_type_hints

from torch import Tensor

from turncoat.messages import Clear, Revealed, Summable
from turncoat.task import Batch, Model, Task
from turncoat.validate import nearest

P_co = TypeVar("P_co", covariant=True)
P_contra = TypeVar("P_contra", contravariant=True)
M_co = TypeVar("M_co", covariant=True)
M_contra = TypeVar("M_contra", contravariant=True)
V_co = TypeVar("V_co", covariant=True)
S = TypeVar("S")


@dataclass(frozen=True)  # no slots: Generic, frozen and slots together break Memory[int]()
class Memory(Generic[S]):
    """What one stage keeps from call to call.

    Like ``rng`` it is handed over by the runtime, which owns, saves and restores it: the runtime
    gives each call a fresh one with the old contents, so a call that is repeated gives the same.
    Contents are values: keep new ones, never edit the old. Tensors, numbers, strings, None, and
    tuples, lists and dicts of these can be saved.
    """

    cell: dict[str, Any] = field(default_factory=dict)
    path: str = ""

    def last(self, first: S) -> S:
        """Return what was kept at the previous call, or ``first`` if there was none."""
        kept: S = self.cell.get(self.path, first)
        return kept

    def keep(self, value: S) -> S:
        """Keep a value for the next call, and return it."""
        self.cell[self.path] = value
        return value

    @property
    def inner(self) -> Memory[Any]:
        """Return the memory of the stage that this one wraps."""
        return Memory(self.cell, f"{self.path}/inner")


@dataclass(frozen=True, slots=True)
class Trace:
    """What a neighbour of the machine observes. A stage that asks for it says that it leaks."""

    touched: list[frozenset[int]] = field(default_factory=list)

    def touch(self, addresses: Iterable[int]) -> None:
        self.touched.append(frozenset(addresses))


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whom a stage distrusts, by position among the messages or examples that it was given.

    A stage that asks for it says whom it left out. The runtime, which knows who misbehaved, keeps
    count of how often that was right.
    """

    flagged: set[int] = field(default_factory=set)

    def flag(self, positions: Iterable[int]) -> None:
        self.flagged.update(map(int, positions))


class Begin(Protocol):
    """The state before the first round. Offered: rng."""

    def __call__(self, task: Task, *args: Any, **asks: Any) -> Tensor: ...


class Sample(Protocol):
    """Who takes part in a round. Offered: rng."""

    def __call__(self, num_clients: int, *args: Any, **asks: Any) -> tuple[int, ...]: ...


class Broadcast(Protocol):
    """What the server sends to one client. Offered: rng, model, public, envelope.

    To a malicious one also: targets, the records that its attack is after (a batch), and last, the
    state that the client last came to, where its message could be read, or None.
    """

    def __call__(self, params: Tensor, *args: Any, **asks: Any) -> Tensor: ...


class Prepare(Protocol):
    """What a client does to its data first.

    Offered: rng, envelope, model, start, public, verdict.
    """

    def __call__(self, data: Batch, *args: Any, **asks: Any) -> Batch: ...


class Train(Protocol[P_co]):
    """Local training. Offered: rng, memory (one per client), public, envelope.

    To a dishonest client also: targets, the records that its attack is after.
    """

    def __call__(
        self, model: Model, start: Tensor, data: Batch, *args: Any, **asks: Any
    ) -> P_co: ...


class Channel(Protocol[P_contra, M_co]):
    """How a payload is dressed before it leaves. Offered: rng, memory, envelope, pairwise, model.

    A channel whose sums the server cannot open has ``open(total) -> Tensor`` too: it has the key.
    """

    def __call__(self, payload: P_contra, *args: Any, **asks: Any) -> M_co: ...


class Aggregate(Protocol[M_contra]):
    """The server's rule. Offered: rng, memory, model, before, cohort, public, trace, verdict.

    A rule whose messages are annotated ``Iterable`` takes them one at a time, once: the runtime
    then never holds them all.
    """

    def __call__(
        self, messages: Sequence[M_contra], *args: Any, **asks: Any
    ) -> Tensor | Summable: ...


class Release(Protocol[V_co]):
    """What users of the final state get. Offered: rng, public."""

    def __call__(self, model: Model, params: Tensor, *args: Any, **asks: Any) -> V_co: ...


@dataclass(frozen=True, slots=True)
class Place:
    """What a place of the round hands its stage: so many subjects, and these offers."""

    subjects: tuple[Any, ...]  # the type of each leading parameter; None: any
    offers: frozenset[str]
    does: str


PLACES: dict[Any, Place] = {
    Begin: Place((Task,), frozenset({"rng"}), "makes the first state"),
    Sample: Place((int,), frozenset({"rng"}), "chooses the cohort"),
    Broadcast: Place(
        (Tensor,),
        frozenset({"rng", "model", "public", "envelope", "targets", "last"}),
        "sends the state out",
    ),
    Prepare: Place(
        (Batch,),
        frozenset({"rng", "envelope", "model", "start", "public", "verdict"}),
        "prepares a client's data",
    ),
    Train: Place(
        (Model, Tensor, Batch),
        frozenset({"rng", "memory", "public", "envelope", "targets"}),
        "trains at a client",
    ),
    Channel: Place(
        (None,),
        frozenset({"rng", "memory", "envelope", "pairwise", "model"}),
        "dresses a payload",
    ),
    Aggregate: Place(
        (Iterable,),
        frozenset({"rng", "memory", "model", "before", "cohort", "public", "trace", "verdict"}),
        "makes one step of many messages",
    ),
    Release: Place((Model, Tensor), frozenset({"rng", "public"}), "hands out the final state"),
}


class IncompatibleStages(TypeError):
    """Two stages were joined that cannot work together."""


@dataclass(frozen=True, slots=True)
class Later:
    """An offer that is made when a stage asks for it, and not before."""

    make: Callable[[], Any]


def call(stage: Any, *args: Any, **offers: Any) -> Any:
    """Call a stage with those offers that it asks for."""
    wanted, takes_all = asks(code_of(stage))
    names = offers if takes_all else wanted & offers.keys()
    taken = {k: o.make() if isinstance(o := offers[k], Later) else o for k in names}
    return stage(*args, **taken)


def takes(stage: Any) -> tuple[Any, ...]:
    """Return every type that the subject of a stage must have, from its annotation."""
    _, annotation = _subject(stage)
    if isinstance(annotation, TypeVar):
        bound = (annotation.__bound__,) if annotation.__bound__ else ()
        return bound + tuple(t for inner, _ in _sources(stage, annotation) for t in takes(inner))
    return (annotation,)


def gives(stage: Any, taken: Any = object) -> Any:
    """Return the type of what a stage returns when its subject has the type ``taken``."""
    hint = _hint(stage, "return")
    if not isinstance(hint, TypeVar):
        return hint
    for inner, arguments in _sources(stage, hint):
        before = next((a for a in arguments[:-1] if not isinstance(a, TypeVar)), taken)
        return gives(inner, before)
    return taken


def streams(stage: Any) -> bool:
    """Say whether a rule, and every rule inside it, takes its messages one at a time."""
    name = next(n for n in inspect.signature(code_of(stage)).parameters if n != "self")
    inside = [s for s, hint in nested(stage) if (get_origin(hint) or hint) is Aggregate]
    return get_origin(_hint(stage, name)) is Iterable and all(map(streams, inside))


def check(stage: Any, place: Any) -> None:
    """Refuse a stage that stands in the wrong place, asks for what is not offered, or misnests."""
    _refuse_misplaced(stage, place)
    known = PLACES[place].offers
    names, _ = asks(code_of(stage))
    for name in sorted(names - known - set(_leading(stage, place))):
        raise IncompatibleStages(
            f"{stage!r} asks for {name!r}, but {place.__name__} offers {', '.join(sorted(known))}; "
            + nearest(name, known)
        )
    for inner, hint in nested(stage):
        where, arguments = get_origin(hint) or hint, get_args(hint)
        check(inner, where)
        for name in sorted(asks(code_of(inner))[0] & getattr(stage, "withholds", frozenset())):
            raise IncompatibleStages(
                f"{inner!r} asks for {name!r}, but {stage!r} has none to give: "
                "take the wrapper off, or put another stage inside"
            )
        fed = arguments[0] if arguments and where in (Aggregate, Channel) else None
        if isinstance(fed, type):
            for needed in takes(inner):
                if not matches(fed, needed):
                    raise IncompatibleStages(misfit(stage, fed, inner, needed))


def join(first: Any, given: Any, second: Any) -> None:
    """Refuse ``second`` after ``first`` unless it reads what it is given."""
    for needed in takes(second):
        if not matches(given, needed):
            raise IncompatibleStages(misfit(first, given, second, needed))


def misfit(first: Any, given: Any, second: Any, needed: Any) -> str:
    """Return the two facts that exclude each other, and the cure."""
    hidden = getattr(given, "reveals", None)
    if needed is not None and isinstance(needed, type) and issubclass(needed, Clear):
        what = f"must read each client's update ({needed.__name__})"
    else:
        what = f"reads {getattr(needed, '__name__', needed)}"
    sends = f"gives {getattr(given, '__name__', given)}"
    fact = f"{second!r} {what}, but {first!r} {sends}" + (f", which {hidden}" if hidden else "")
    if isinstance(given, type) and not issubclass(given, Clear) and issubclass(given, Summable):
        kind = "mean" if issubclass(given, Revealed) else "mean, with no stage around it"
        cure = f"use a rule that needs only the sum ({kind}), or a channel that shows each (plain)"
    else:
        cure = "put a stage that fits in the place of one of the two"
    return f"{fact}: {cure}"


def within(stage: Any) -> Iterator[Any]:
    """Yield a stage and all those in its fields, outermost first."""
    yield stage
    for inner, _ in nested(stage):
        yield from within(inner)


def nested(stage: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the stages held in the fields of a stage, with the annotation of the field."""
    if is_dataclass(stage) and not isinstance(stage, type):
        hints = _hints(type(stage))
        for f in fields(stage):
            if (get_origin(hints[f.name]) or hints[f.name]) in PLACES:
                yield getattr(stage, f.name), hints[f.name]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is fixed before the first round, for stages that are calibrated to it.

    Attributes:
        num_rounds: How many rounds will be run.
        sizes: The number of examples of each client, honest clients' and traitors' alike.
        model: What is trained, for stages that cannot train every model; None where that is open.
    """

    num_rounds: int
    sizes: tuple[int, ...]
    model: Model | None = field(default=None, repr=False)


def planned(stage: Any, plan: Plan) -> Any:
    """Return the stage with every part that asks for the plan (``planned(plan)``) fitted to it."""
    if is_dataclass(stage) and not isinstance(stage, type):
        inner = {
            f.name: planned(getattr(stage, f.name), plan)
            for f in fields(stage)
            if f.init and any(getattr(stage, f.name) is s for s, _ in nested(stage))
        }
        changed = {k: v for k, v in inner.items() if v is not getattr(stage, k)}
        stage = replace(stage, **changed) if changed else stage
    return stage.planned(plan) if hasattr(stage, "planned") else stage


def matches(have: Any, need: Any) -> bool:
    """Say whether a value of type ``have`` will do where ``need`` is annotated."""
    if get_origin(need) in (Union, UnionType):
        return any(matches(have, n) for n in get_args(need))
    have_class, need_class = get_origin(have) or have, get_origin(need) or need
    if need_class is Any or need_class is object:
        return True
    if not (isinstance(have_class, type) and issubclass(have_class, need_class)):
        return False
    pairs = zip(get_args(have), get_args(need), strict=False)
    return all(matches(h, n) for h, n in pairs)


@cache
def asks(code: Any) -> tuple[frozenset[str], bool]:
    """Return the names of the parameters, and whether there is a ``**`` that takes all offers."""
    parameters = inspect.signature(code).parameters.values()
    named = frozenset(p.name for p in parameters if p.kind is not p.VAR_KEYWORD)
    return named - {"self"}, any(p.kind is p.VAR_KEYWORD for p in parameters)


def wants(stage: Any, offer: str) -> bool:
    """Say whether a stage, or one inside it, asks for something by name."""
    return any(offer in asks(code_of(s))[0] for s in within(stage))


def judges(stage: Any) -> bool:
    """Say whether a stage, or one inside it, tells whom it distrusts."""
    return wants(stage, "verdict")


def leaves_trace(stage: Any) -> bool:
    """Say whether a stage, or one inside it, tells a neighbour what it touches."""
    return wants(stage, "trace")


def code_of(stage: Any) -> Any:
    """Return the function behind a stage, whose signature tells what it is."""
    return stage if isinstance(stage, FunctionType) else type(stage).__call__


@cache
def _hints(code: Any) -> dict[str, Any]:
    return get_type_hints(code)


def _hint(stage: Any, name: str) -> Any:
    hints = _hints(code_of(stage))
    if name not in hints:
        what = "what it returns" if name == "return" else f"its parameter {name!r}"
        raise IncompatibleStages(f"{stage!r} does not say what type {what} has: annotate __call__")
    return hints[name]


def _leading(stage: Any, place: Any) -> list[str]:
    parameters = inspect.signature(code_of(stage)).parameters.values()
    names = [p.name for p in parameters if p.name != "self" and p.kind is not p.KEYWORD_ONLY]
    return names[: len(PLACES[place].subjects)]


def stands(stage: Any, place: Any) -> bool:
    """Say whether a stage's leading parameters are those of a place."""
    due = PLACES[place]
    names, hints = _leading(stage, place), _hints(code_of(stage))
    right = len(names) == len(due.subjects)
    for name, kind in zip(names, due.subjects, strict=False):
        hint = hints.get(name, Any)
        if hint is Any:
            continue
        origin = get_origin(hint)
        if kind is Iterable:  # of messages; a tuple is a batch of data
            right &= isinstance(origin, type) and issubclass(origin, Iterable)
            right &= origin is not tuple
        elif kind is None:  # one payload: neither many, nor data
            right &= origin is None and hint not in (Model, Task, Tensor, int)
        else:
            right &= hint == kind
    return right


def _refuse_misplaced(stage: Any, place: Any) -> None:
    if not callable(stage) or isinstance(stage, type):
        raise IncompatibleStages(f"{stage!r} is no stage: {place.__name__} needs a callable")
    if not stands(stage, place):
        hints = _hints(code_of(stage))
        said = ", ".join(f"{n}: {_spelt(hints.get(n, Any))}" for n in _leading(stage, place))
        fits = [p.__name__.lower() for p in PLACES if stands(stage, p)]
        cure = f"put it at {' or '.join(fits)}" if fits else "annotate what that place hands it"
        raise IncompatibleStages(
            f"{stage!r} cannot stand at {place.__name__.lower()}, the place that "
            f"{PLACES[place].does}: it takes ({said}); {cure}"
        )


def _spelt(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)


def _subject(stage: Any) -> tuple[str, Any]:
    """Return name and type of the first parameter; ``Sequence[X]`` counts as ``X``."""
    name = next(n for n in inspect.signature(code_of(stage)).parameters if n != "self")
    hint = _hint(stage, name)
    origin = get_origin(hint)
    many = isinstance(origin, type) and issubclass(origin, Iterable) and origin is not tuple
    return name, get_args(hint)[0] if many else hint


def _sources(stage: Any, variable: TypeVar) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Yield the nested stages whose field annotation mentions ``variable``."""
    for inner, hint in nested(stage):
        if variable in get_args(hint):
            yield inner, get_args(hint)

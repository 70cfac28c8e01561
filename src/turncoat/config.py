"""From a TOML file to the audit it describes. The constructors are the schema."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import tomllib
import traceback
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError
from torch.nn.functional import cross_entropy

from turncoat.audit import Audit, Entry
from turncoat.brought import import_file
from turncoat.coalition import Coalition, is_code
from turncoat.describe import is_users
from turncoat.federation import STAGES, Federation
from turncoat.graphs import neighbours_of
from turncoat.parts import PARTS
from turncoat.randomness import Randomness
from turncoat.runtimes.simulate import cohorts
from turncoat.stage import Broadcast, Channel, IncompatibleStages, Prepare, Train, stands, within
from turncoat.task import Task
from turncoat.trial import Memberships, Reconstruction, Sabotage, Trial
from turncoat.validate import nearest
from turncoat.views import CoalitionView, Seat

_TOP = {"title", "rounds", "seeds", "delta", "search", "defences", "task", "federation"} | {
    "coalition",
    "attack",
    "defence",
    "variant",
}
_WATCHING = (Seat.SERVER, Seat.CLIENT, Seat.PEER, Seat.USER, Seat.NEIGHBOUR)
_PLAYED_BY = {"server": Seat.SERVER, "supply": Seat.SUPPLIER, "code": Seat.SUPPLIER}
_OF_A_TRIAL = {"at", "by", "allies", "game", "outcome", "coalition", "acts", "seats"}
_KINDS = {
    "Members": "members",
    "Schedule": "schedule",
    "Partition": "partition",
    "Architecture": "model",
    "Game": "game",
    "Outcome": "outcome",
    "Objective": "objective",
    "Prior": "prior",
    "Start": "start",
    "Optimiser": "optimiser",
    "LabelRule": "labels",
    "Space": "space",
    "Unrolled": "unrolled",
}  # of the protocols that options are annotated with
_GAMES = {tuple[Reconstruction, ...]: "reconstruct", Memberships: "membership"}


class ConfigError(ValueError):
    """A description that names nothing buildable. Says file, key, and the nearest right one."""


class Conflict(ConfigError):
    """Two defences want the same place of the round."""


@dataclass(frozen=True)
class Where:
    """A place in a file, for messages and for what is named relative to it."""

    file: str
    folder: Path
    keys: tuple[str, ...] = ()

    def __truediv__(self, key: str) -> Where:
        return replace(self, keys=(*self.keys, key))

    def __str__(self) -> str:
        return f"{self.file}: [{'.'.join(self.keys)}]" if self.keys else self.file


def load(path: Path, *, overrides: Sequence[str] = (), num_seeds: int | None = None) -> Audit:
    """Return the one audit that a TOML file describes; the arguments are those of ``load_all``."""
    found = load_all(path, overrides=overrides, num_seeds=num_seeds)
    if len(found) > 1:
        raise ConfigError(
            f"{path.name} describes {len(found)} audits, its variants {', '.join(found)}; here one "
            "is needed: leave the tables [variant.NAME] out but for one of them"
        )
    return next(iter(found.values()))


def load_all(
    path: Path,
    *,
    overrides: Sequence[str] = (),
    num_seeds: int | None = None,
    variant: str | None = None,
) -> dict[str, Audit]:
    """Return the audits that a TOML file describes: one for each table ``[variant.NAME]``.

    A variant is the file with some tables changed. A file without any is one audit, named "".

    Args:
        overrides: ``"key.of.a.table=value"``, the value as TOML has it, or a bare string.
        num_seeds: Audit the seeds 0 to ``num_seeds - 1``, whatever the file says.
        variant: Return this one alone.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a mark
    except FileNotFoundError:
        raise ConfigError(f"there is no file {path}: give a TOML file, or no name at all") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}: give a TOML file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no text in UTF-8 ({error}): save it as UTF-8") from None
    where = Where(path.name, path.resolve().parent)
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{where}: not TOML: {error}") from None
    for override in overrides:
        _override(tables, override)
    if num_seeds is not None:
        tables["seeds"] = num_seeds
    variants = _table(tables, "variant", where)
    tables.pop("variant", None)
    if variant is not None and variant not in variants:
        cure = nearest(variant, variants) if variants else "leave --variant out"
        raise ConfigError(f"{where} has no table [variant.{variant}]; {cure}")
    if not variants:
        return {"": _audit(tables, where, text, tuple(overrides))}
    found = {}
    for name, changes in variants.items():
        if variant not in (None, name):
            continue
        at = where / "variant" / name
        if re.search(r"[^\w.+ -]|^\.", name):
            raise ConfigError(f"{at}: a variant's name is a folder's too: letters, digits, - and _")
        if not isinstance(changes, dict):
            raise ConfigError(f"{at} must be a table of changes, such as task.partition = ...")
        known_keys(changes, _TOP - {"variant"}, at)
        audit = _audit(_changed(tables, changes), where, text, tuple(overrides))
        title = audit.title if "title" in changes else f"{audit.title}: {name}"
        found[name] = replace(audit, title=title, variant=name)
    return found


def _changed(table: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a table with changes, key by key; one that names a part takes the old one's place."""
    new = dict(table)
    for key, value in changes.items():
        old = new.get(key)
        if isinstance(value, dict) and isinstance(old, dict) and "use" not in value:
            new[key] = _changed(old, value)
        else:
            new[key] = value
    return new


def _audit(tables: dict[str, Any], where: Where, text: str, overrides: tuple[str, ...]) -> Audit:
    known_keys(tables, _TOP, where)
    for table in ("task", "federation"):
        if table not in tables:
            raise ConfigError(f"{where} lacks the table [{table}]")
    task = build(tables["task"], where / "task", kind="task")
    if not isinstance(task, Task):
        named = _as_table(tables["task"], where / "task")["use"]
        raise ConfigError(f"{where / 'task'}: {named!r} made {task!r} and no Task")
    _check_task(task, where / "task")
    base = _federation(tables["federation"], where / "federation")
    defences = {
        name: _defence(name, parts, where / "defence" / name)
        for name, parts in _table(tables, "defence", where).items()
    }
    columns = _columns(tables.get("defences", ["none", *defences]), where / "defences")
    federations, titles = {"none": base}, {"none": "no defence"}
    for column in columns:
        if column != "none":
            whole = _column(column, defences, where / "defences")
            federations[column], titles[column] = whole.around(base), whole.title
    standing = tables.get("coalition")
    entries = {
        name: _entry(name, table, standing, base, where)
        for name, table in _table(tables, "attack", where).items()
    }
    if not entries:
        raise ConfigError(f"{where} names no attack: add a table [attack.NAME]")
    seeds = _seeds(tables.get("seeds", 1), where / "seeds")
    rounds = _value(int, tables.get("rounds", 10), where / "rounds")
    if rounds < 1:
        raise ConfigError(f"{where / 'rounds'} = {rounds}: it must be at least 1")
    delta = _value(float, tables.get("delta", 1e-5), where / "delta")
    if not 0 < delta < 1:
        raise ConfigError(f"{where / 'delta'} = {delta}: it must be between 0 and 1")
    search = tables.get("search")
    if search is not None:
        search = build(search, where / "search", kind="search")
        if not hasattr(search, "bounded"):
            raise ConfigError(
                f"{where / 'search'}: {search!r} is no number of runs; there are "
                f"{', '.join(PARTS['search'])}"
            )
    for column, federation in federations.items():
        at = where / "federation" if column == "none" else where / "defence" / column
        _check_cohorts(federation, len(task.clients), rounds, seeds[0], at)
    return Audit(
        title=_value(str, tables.get("title", where.file), where / "title"),
        task=task,
        federations=federations,
        entries=entries,
        num_rounds=rounds,
        seeds=seeds,
        delta=delta,
        search=search,
        titles=titles,
        text=text,
        overrides=overrides,
    )


def _check_task(task: Task, where: Where) -> None:
    """Refuse what a task of one's own can get wrong, before hours are spent on it."""
    if not len(task.clients) or not any(task.sizes):
        raise ConfigError(f"{where}: {task.name!r} has no clients with examples: add some")
    inputs, labels = task.test
    if not len(labels):
        raise ConfigError(f"{where}: {task.name!r} has no test examples: hold some out")
    start = task.model.initial(Randomness(0).at("begin"))
    try:
        outputs = task.model.logits(start, inputs[:1])
    except Exception as error:
        raise ConfigError(
            f"{where}: the model of {task.name!r} cannot read a test example of shape "
            f"{tuple(inputs.shape[1:])}: {_said(error)}"
        ) from error
    if task.model.criterion is not cross_entropy or labels.dim() != 1 or outputs.dim() != 2:
        return
    num_classes = outputs.shape[1]
    owned = {task.name_of(c): y for c, (_, y) in enumerate(task.clients)}
    for owner, held in ({"the test set": labels} | owned).items():
        if len(held) and (int(held.min()) < 0 or int(held.max()) >= num_classes):
            raise ConfigError(
                f"{where}: labels of {owner} run from {int(held.min())} to {int(held.max())}, but "
                f"the model of {task.name!r} has {num_classes} outputs: number the classes 0 to "
                f"{num_classes - 1}"
            )


def _check_cohorts(
    federation: Federation[Any, Any], num_clients: int, rounds: int, seed: int, where: Where
) -> None:
    """Refuse a federation whose rule no cohort is large enough for, or a node's neighbourhood."""
    try:
        sampled = cohorts(federation, num_clients, num_rounds=rounds, seed=seed)
        most = max(map(len, sampled))
        if federation.graph is not None:
            linked = neighbours_of(federation.graph, num_clients, Randomness(seed))
            heard = [[len({c, *linked[c]} & set(some)) for c in some] for some in sampled]
            most = max(min(lengths, default=0) for lengths in heard)
        for rule in within(federation.aggregate):
            if hasattr(rule, "check_cohort"):
                rule.check_cohort(most)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None
    if most < federation.min_clients:
        raise ConfigError(
            f"{where}: min_clients = {federation.min_clients}, but a round has {most} at most"
            f"{' around some node' if federation.graph is not None else ''}: "
            "lower it or sample more clients"
        )


def _seeds(value: Any, where: Where) -> tuple[int, ...]:
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 1:
            raise ConfigError(f"{where} = {value}: it must be at least 1")
        return tuple(range(value))
    if not isinstance(value, list):
        raise ConfigError(f"{where} = {value!r}: say how many, or list them: [0, 1, 2]")
    found: list[int] = _value(list[int], value, where)
    if not found or len(set(found)) < len(found):
        fault = "names one seed twice" if found else "names no seed"
        raise ConfigError(f"{where} = {found!r} {fault}: list each that is wanted once")
    return tuple(found)


@dataclass(frozen=True)
class Defence:
    """Stages to put in place of a federation's, or around them where ``inner`` is left out.

    ``a | b`` is both, in this order: later wrappers go outside. Two that replace one place clash.
    """

    name: str
    parts: Mapping[str, Any]
    where: Where
    title: str
    then: tuple[Defence, ...] = field(default=())

    def __or__(self, other: Defence) -> Defence:
        for place in sorted(self.replaces() & other.replaces()):
            raise Conflict(
                f"{self.where}: {self.name!r} and {other.name!r} both replace {place!r}: choose one"
            )
        name, title = f"{self.name} | {other.name}", f"{self.title}, {other.title}"
        return replace(self, name=name, title=title, then=(*self.then, *other))

    def replaces(self) -> set[str]:
        """Return the places whose stage is lost, here and in what is combined with this."""
        return {p for d in self for p, table in d.parts.items() if not wraps(table, d.where / p)}

    def __iter__(self) -> Any:
        yield replace(self, then=())
        yield from self.then

    def around(self, federation: Federation[Any, Any]) -> Federation[Any, Any]:
        """Return the federation with replacements first, then wrappers, in order."""
        new: dict[str, Any] = {}
        todo = [(p, table, d.where / p) for d in self for p, table in d.parts.items()]
        for place, table, where in sorted(todo, key=lambda item: wraps(item[1], item[2])):
            held = new.get(place, getattr(federation, place))
            if place == "graph":
                new[place] = _graph(table, where)
                continue
            new[place] = build(table, where, kind="stage", inner=held)
        try:
            return replace(federation, **new)
        except IncompatibleStages as error:
            raise ConfigError(f"{self.where}: the defence {self.name!r}: {error}") from None


def _defence(name: str, parts: Any, where: Where) -> Defence:
    if not isinstance(parts, dict) or not parts:
        raise ConfigError(f"{where} must be a table of stages, such as aggregate = {{ use = ... }}")
    if "|" in name or name == "none":
        raise ConfigError(f"{where}: a defence cannot be called {name!r}; '|' joins names of them")
    known_keys(parts, {*STAGES, "title", "graph"}, where)
    title = _value(str, parts.get("title", name), where / "title")
    stages = {place: table for place, table in parts.items() if place != "title"}
    defence = Defence(name, stages, where, title)
    defence.replaces()  # so that a misspelt part is found before anything is built
    return defence


def _columns(value: Any, where: Where) -> list[str]:
    """Return the names of the columns, spelt alike: one column is not two."""
    spelt = [" | ".join(name.strip() for name in c.split("|")) for c in _strings(value, where)]
    return _strings(spelt, where)


def _column(column: str, defences: Mapping[str, Defence], where: Where) -> Defence:
    names = column.split(" | ")
    for name in names:
        if name == "none":
            raise ConfigError(
                f"{where} = {column!r}: 'none' cannot be combined: name the others alone"
            )
        if name not in defences:
            raise ConfigError(
                f"{where} names {name!r}, but there is no table [defence.{name}]; "
                + nearest(name, [*defences, "none"])
            )
    whole = defences[names[0]]
    for name in names[1:]:
        whole = whole | defences[name]
    return whole


def _federation(table: Any, where: Where) -> Federation[Any, Any]:
    if not isinstance(table, dict):
        raise ConfigError(f"{where} must be a table")
    known_keys(table, set(inspect.signature(Federation).parameters), where)
    stages = {
        place: build(part, where / place, kind="stage")
        if place in STAGES
        else _graph(part, where / place)
        if place == "graph"
        else _value(int, part, where / place)
        for place, part in table.items()
    }
    for place, usual in {"train": "local-sgd", "channel": "plain", "aggregate": "mean"}.items():
        if place not in stages:
            raise ConfigError(f"{where} lacks the stage {place!r}: name one, such as {usual!r}")
    try:
        return Federation(**stages)
    except (IncompatibleStages, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from None


def _graph(table: Any, where: Where) -> Any:
    """Build a graph; a function of the number of nodes is one already."""
    made = part(_as_table(table, where)["use"], where, kind="graph")
    return made if inspect.isfunction(made) else build(table, where, kind="graph")


def _entry(name: str, table: Any, standing: Any, base: Federation[Any, Any], where: Where) -> Entry:
    at = where / "attack" / name
    if not isinstance(table, dict):
        raise ConfigError(f"{at} must be a table with the key 'use'")
    about = {k: v for k, v in table.items() if k in _OF_A_TRIAL}
    attack = build(
        {k: v for k, v in table.items() if k not in _OF_A_TRIAL},
        at,
        kind="attack",
        inner=base.train,
    )
    seats = _seats(about.pop("seats", []), at / "seats")
    place = _worn_at(attack, at)
    if place is None:
        if blind := [seat for seat in seats if seat not in _WATCHING]:
            raise ConfigError(
                f"{at / 'seats'}: {type(attack).__name__} watches, and nothing is watched at the "
                f"seat {str(blind[0])!r}: name {', '.join(_WATCHING[:-1])} or {_WATCHING[-1]}, or "
                "leave 'seats' out"
            )
        return Entry(_trial(attack, about, at), seats)
    outcome = about.pop("outcome", None) or _outcome_of(attack)
    made = (
        build(outcome, at / "outcome", kind="outcome")
        if isinstance(outcome, dict | str)
        else outcome
    )
    known_keys(about, {"coalition", "acts"}, at)
    if place == "prepare" and seats == (Seat.SUPPLIER,):
        place = "supply"
    its_own = _PLAYED_BY.get(place, Seat.COALITION)
    if set(seats) - {its_own}:
        raise ConfigError(
            f"{at / 'seats'}: {type(attack).__name__} is played by the {its_own} alone: leave "
            "'seats' out"
        )
    if place == "server":
        return Entry(Sabotage(outcome=made, server=attack), seats)
    everyone = {"members": {"use": "pool", "fraction": 1.0}}  # who installed the code
    who = about.get("coalition", everyone if place == "code" else standing)
    if who is None:
        raise ConfigError(
            f"{at}: {type(attack).__name__} is played by dishonest clients, but nobody is named: "
            'add [coalition] members = { use = "clients", ids = [0, 1] }'
        )
    if not isinstance(who, dict) or "members" not in who:
        raise ConfigError(f"{where / 'coalition'} lacks the key 'members': who is dishonest?")
    options = dict(who) | ({"acts": about["acts"]} if "acts" in about else {})
    known_keys(options, {f.name for f in fields(Coalition)} - {place}, where / "coalition")
    hints = get_type_hints(Coalition)
    built = {
        k: v if k == place else _nested(hints[k], v, where / "coalition" / k)
        for k, v in (options | {place: attack}).items()
    }
    return Entry(Sabotage(outcome=made, coalition=Coalition(**built)), seats)


def _trial(attack: Any, about: dict[str, Any], at: Where) -> Trial[Any]:
    known_keys(about, {"at", "by", "allies", "game"}, at)
    guess = get_type_hints(type(attack).__call__).get("return")
    game = about.pop("game", _GAMES.get(guess))  # type: ignore[arg-type]
    if game is None:
        raise ConfigError(f"{at} lacks the key 'game': what would mark a guess {guess!r}?")
    made = build(game, at / "game", kind="game")
    kinds: dict[str, Any] = {"allies": tuple[int, ...]}
    whole = {k: _value(kinds.get(k, int), v, at / k) for k, v in about.items()}
    try:
        return Trial(attack, made, **whole)
    except TypeError as error:
        raise ConfigError(f"{at}: {error}") from None


def _outcome_of(attack: Any) -> Any:
    """Return what an attack is after: its backdoor, one class for another, or the accuracy."""
    attack = getattr(attack, "poison", attack)
    if hasattr(attack, "edge") and hasattr(attack, "target"):
        from turncoat.games.outcomes import EdgeCaseSuccess

        return EdgeCaseSuccess(attack.edge, attack.target)
    if hasattr(attack, "trigger") and hasattr(attack, "target"):
        from turncoat.games.outcomes import BackdoorSuccess

        return BackdoorSuccess(attack.trigger, attack.target)
    source, target = getattr(attack, "source", None), getattr(attack, "target", None)
    if isinstance(source, int) and isinstance(target, int):
        return {"use": "targeted-error", "source": source, "target": target}
    return "accuracy-lost"


def _worn_at(attack: Any, at: Where) -> str | None:
    """Return the place at which a dishonest seat wears an attack; None if it only watches."""
    call = type(attack).__call__
    subject = next((n for n in inspect.signature(call).parameters if n != "self"), "")
    hints = get_type_hints(call)
    if subject == "view":
        return "forge" if get_origin(hints.get("view")) is CoalitionView else None
    if is_code(attack):
        return "code"
    for name, kind in (
        ("prepare", Prepare),
        ("train", Train),
        ("server", Broadcast),
        ("channel", Channel),
    ):
        if stands(attack, kind):
            return name
    raise ConfigError(f"{at}: {attack!r} is no attack: it neither watches a view nor can be worn")


def _seats(names: Any, where: Where) -> tuple[Seat, ...]:
    for name in (given := _strings([names] if isinstance(names, str) else names, where)):
        if name not in list(Seat):
            raise ConfigError(f"{where} has no seat {name!r}; {nearest(name, list(Seat))}")
    return tuple(map(Seat, given))


def wraps(table: Any, where: Where) -> bool:
    """Say whether a table describes a wrapper that is still open."""
    table = _as_table(table, where)
    if where.keys[-1] == "graph":
        return False
    signature = inspect.signature(part(table["use"], where, kind="stage")).parameters
    return "inner" in signature and "inner" not in table


def build(table: Any, where: Where, *, kind: str, inner: Any = None) -> Any:
    """Build what ``table["use"]`` names from the other keys, deepest tables first.

    A part without options may be named by a bare string.
    """
    table = _as_table(table, where)
    made = part(table["use"], where, kind=kind)
    signature = inspect.signature(made)
    hints = get_type_hints(made)
    options = {key: value for key, value in table.items() if key != "use"}
    parameters = {
        name: p for name, p in signature.parameters.items() if p.kind is not p.VAR_KEYWORD
    }
    if len(parameters) == len(signature.parameters):
        known_keys(options, set(parameters), where)
    built = {k: _nested(hints.get(k, Any), v, where / k, kind=kind) for k, v in options.items()}
    if inner is not None and "inner" in parameters:
        built.setdefault("inner", inner)
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in built:
            raise ConfigError(f"{where} lacks the key {name!r}, which {table['use']!r} needs")
    try:
        return made(**built)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{where}: {_said(error)}") from error


def part(name: Any, where: Where, *, kind: str) -> Any:
    """Return what a short name, ``package.module:Name`` or ``file.py:Name`` stands for."""
    if not isinstance(name, str):
        raise ConfigError(f"{where} use = {name!r}: it must be a string")
    target = name if ":" in name else PARTS.get(kind, {}).get(name) or _anywhere(name)
    if target is None:
        raise ConfigError(
            f"{where} use = {name!r} names no {kind}; {nearest(name, PARTS.get(kind, {}))}"
        )
    source, _, attribute = target.rpartition(":")
    try:
        module = _module(source, where)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{where} use = {name!r}: {_said(error)}") from error
    if not hasattr(module, attribute):
        names = [n for n in vars(module) if not n.startswith("_")]
        raise ConfigError(
            f"{where} use = {name!r}: {source} has no {attribute!r}; {nearest(attribute, names)}"
        )
    return getattr(module, attribute)


def _anywhere(name: str) -> str | None:
    return next((parts[name] for parts in PARTS.values() if name in parts), None)


def _module(source: str, where: Where) -> types.ModuleType:
    folder = where.folder
    file = folder / (source if source.endswith(".py") else f"{source.replace('.', '/')}.py")
    if source.endswith(".py") and not file.is_file():
        raise ConfigError(f"{where}: there is no file {file}: a file is named relative to {folder}")
    return import_file(file) if file.is_file() else importlib.import_module(source)


def _nested(hint: Any, value: Any, where: Where, kind: str = "") -> Any:
    """Return a value as its annotation has it: a part is built, all else is checked."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if Path in options and isinstance(value, str) and (where.folder / value).exists():
        return where.folder / value  # of the file's own folder first, then of the current one
    plain = (str, int, float, bool, type(None), list, tuple, dict, Any, set, frozenset, Path)
    made = [o for o in options if (get_origin(o) or o) not in plain and _is_built(o)]
    each = [get_args(o)[0] for o in options if get_origin(o) is tuple]
    if isinstance(value, list) and any(map(_is_built, each)):
        return tuple(_nested(each[0], v, where / str(i), kind) for i, v in enumerate(value))
    is_part = isinstance(value, dict) and "use" in value
    if made and (is_part or (isinstance(value, str) and str not in options)):
        return build(value, where, kind=_kind_of(made[0], kind))
    if made and isinstance(value, dict):
        raise ConfigError(f"{where} lacks the key 'use'")
    return _value(hint, value, where)


def _is_built(hint: Any) -> bool:
    origin = get_origin(hint) or hint
    return isinstance(origin, type) and not issubclass(origin, str | int | float)


def _kind_of(hint: Any, kind: str) -> str:
    name = getattr(get_origin(hint) or hint, "__name__", "")
    if any(hint is s or get_origin(hint) is s for s in STAGES.values()):
        return "stage"
    return _KINDS.get(name, kind)


def _value(hint: Any, value: Any, where: Where) -> Any:
    try:
        return TypeAdapter(hint).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        said = error.errors()[0]["msg"]
        raise ConfigError(f"{where} = {value!r}: {said[:1].lower()}{said[1:]}") from None
    except TypeError:
        raise ConfigError(f"{where} = {value!r}: a date or time is of no use here") from None


def _as_table(table: Any, where: Where) -> dict[str, Any]:
    if isinstance(table, str):
        return {"use": table}
    if not isinstance(table, dict) or "use" not in table:
        raise ConfigError(f"{where} lacks the key 'use'")
    return table


def _table(tables: Mapping[str, Any], name: str, where: Where) -> dict[str, Any]:
    table = tables.get(name, {})
    if not isinstance(table, dict):
        raise ConfigError(f"{where / name} must be a table of tables: [{name}.NAME]")
    for key in table:
        if not key.strip() or not key.isprintable():
            raise ConfigError(f"{where}: [{name}.{key!r}]: a name needs letters that can be read")
    return table


def _strings(value: Any, where: Where) -> list[str]:
    found: list[str] = _value(list[str], value, where)
    if len(set(found)) < len(found):
        raise ConfigError(f"{where} = {found!r} names one thing twice")
    return found


def _said(error: BaseException) -> str:
    """Return what an error says; of one that no one wrote for people, its kind and its line too."""
    meant = isinstance(error, ValueError | TypeError | OSError | ImportError) and str(error)
    said = str(error) if meant else f"{type(error).__name__}: {error}"
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [f for f in frames if f.filename.endswith(".py") and is_users(f.filename)]
    if not theirs:
        return said
    return f"{said} ({Path(theirs[-1].filename).name}, line {theirs[-1].lineno})"


def known_keys(given: Mapping[str, Any], right: set[str], where: Where) -> None:
    """Refuse a key that means nothing here, with the nearest that does."""
    for name in given:
        if name not in right:
            raise ConfigError(f"{where} has no key {name!r}; {nearest(name, right)}")


def _override(tables: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    keys = [k.strip() for k in name.split(".")]
    if not equals or not all(keys):
        raise ConfigError(f"--set {override!r} is not of the form key.of.a.table=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    table = tables
    for step in keys[:-1]:
        table = table.setdefault(step, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {override!r}: {step!r} is a value and has no keys")
    table[keys[-1]] = value

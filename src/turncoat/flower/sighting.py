"""What a Flower app is made of, read off its objects and its source. Nothing of it is run.

Strategies are mostly built within functions, so their calls are looked up in the source and their
arguments read as far as they are written there; what is not is `UNKNOWN`, never guessed.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import sys
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from types import FunctionType, ModuleType
from typing import Any

_WORKFLOWS = ("SecAggPlusWorkflow", "Watched")
_ROOTS = {"Strategy", *_WORKFLOWS}  # and what derives from them
_PLAIN = (bool, int, float, str, type(None))


class _Unknown:
    def __repr__(self) -> str:
        return "?"

    def __bool__(self) -> bool:
        return False


UNKNOWN = _Unknown()
"""What the source does not say."""


@dataclass(frozen=True)
class Sighted:
    """One strategy or workflow of an app, with those arguments that are known."""

    kind: type
    arguments: Mapping[str, Any] = field(repr=False)
    where: str = ""

    def __str__(self) -> str:
        return self.kind.__name__

    def get(self, *names: str) -> Any:
        """Return the argument that has one of these names, or `UNKNOWN`."""
        return next((self.arguments[n] for n in names if n in self.arguments), UNKNOWN)

    @property
    def inner(self) -> Sighted | None:
        """The strategy or workflow that it wraps, if one is known."""
        inner = self.get("strategy", "workflow")
        return inner if isinstance(inner, Sighted) else None

    def chain(self) -> Iterator[Sighted]:
        """Yield it and all that it wraps, outermost first."""
        yield self
        if self.inner is not None:
            yield from self.inner.chain()


@dataclass(frozen=True)
class App:
    """What is known of a ServerApp and a ClientApp.

    Attributes:
        strategies: Each with what it wraps inside it.
        workflows: Of secure aggregation.
        mods: Of each function of the client, outermost first; alike ones once.
        has_client_fn: Whether the client is of the legacy kind.
        modules: The classes of ``torch.nn.Module`` of the app's own source, with their source.
        unread: Functions whose source could not be had.
    """

    strategies: tuple[Sighted, ...]
    workflows: tuple[Sighted, ...]
    mods: tuple[tuple[Any, ...], ...]
    has_client_fn: bool
    modules: Mapping[str, str]
    unread: tuple[str, ...]


def sight(server_app: Any, client_app: Any, strategy: Any = None) -> App:
    """Return what can be read of an app; ``strategy``, if given, is taken for the server's own."""
    chains, has_client_fn = _client_side(client_app)
    roots = [f for f in _functions(vars(server_app).values()) if not _flowers(f)]
    reached, unread = _reached(roots)
    found: list[Sighted] = []
    for function, tree in reached:
        found += _Reader(function, tree).found
    held = [_of_instance(v) for v in vars(server_app).values() if is_a(type(v), "Strategy")]
    if strategy is not None:
        given = [strategy] if not isinstance(strategy, list | tuple) else strategy
        held = [_of_instance(each) for each in given]
        found = [each for each in found if not is_a(each.kind, "Strategy")]
    clients, lost = _reached([f for _, innermost in chains for f in innermost])
    functions = [function for function, _ in (*reached, *clients)]
    return App(
        strategies=tuple(s for s in (*held, *found) if is_a(s.kind, "Strategy")),
        workflows=tuple(s for s in found if is_a(s.kind, *_WORKFLOWS)),
        mods=tuple(dict.fromkeys(tuple(mods) for mods, _ in chains)),
        has_client_fn=has_client_fn,
        modules=_modules_of(functions),
        unread=(*unread, *lost),
    )


def is_a(kind: type, *names: str) -> bool:
    """Say whether a class is, or derives from, one of Flower's (or ours) of these names.

    >>> is_a(dict, "Strategy")
    False
    """
    return any(
        c.__name__ in names and c.__module__.split(".")[0] in ("flwr", "turncoat")
        for c in kind.__mro__
    )


def is_legacy(kind: type) -> bool:
    """Say whether a strategy is one of ``flwr.server.strategy``."""
    return any(c.__module__.startswith("flwr.server.strategy") for c in kind.__mro__)


def defines(kind: type, *methods: str) -> type:
    """Return the class that aggregates for a strategy: not one that leaves it to ``super()``."""
    return next(c for c in kind.__mro__ if any(m in vars(c) and not _defers(c, m) for m in methods))


def _defers(kind: type, method: str) -> bool:
    if kind.__module__.split(".")[0] in ("flwr", "turncoat"):
        return False
    try:
        return f"super().{method}" in inspect.getsource(vars(kind)[method])
    except (OSError, TypeError):
        return False


def _client_side(app: Any) -> tuple[list[tuple[list[Any], list[Any]]], bool]:
    """Return the mods and the innermost function of each function that the ClientApp calls."""
    chains, has_client_fn = [], False
    for value in vars(app).values():
        many = list(value.values()) if isinstance(value, dict) else [value]
        for function in (f for f in many if isinstance(f, FunctionType) and _num_taken(f) == 2):
            mods, innermost = _unwound(function)
            if _flowers(innermost):  # the adapter of a client_fn, which is what it closes over
                has_client_fn = True
                inside = [f for f in _held_by(innermost) if isinstance(f, FunctionType)]
            else:
                inside = [innermost]
            chains.append((mods, inside))
    if not chains:
        lists = [v for v in vars(app).values() if isinstance(v, list) and all(map(callable, v))]
        chains = [(mods, []) for mods in lists]
    return chains, has_client_fn


def _unwound(function: Any) -> tuple[list[Any], Any]:
    """Take the mods off: each layer closes over one callable of three, and over what is inside."""
    mods: list[Any] = []
    while True:
        held = _held_by(function)
        mod = [h for h in held if _num_taken(h) == 3]
        inside = [h for h in held if _num_taken(h) == 2]
        if len(held) != 2 or len(mod) != 1 or len(inside) != 1:
            return mods, function
        mods.append(mod[0])
        function = inside[0]


def _held_by(function: Any) -> list[Any]:
    cells = getattr(function, "__closure__", None) or ()
    return [c.cell_contents for c in cells if callable(c.cell_contents)]


def _num_taken(function: Any) -> int:
    try:
        return len(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return -1


def _functions(values: Any) -> Iterator[FunctionType]:
    for value in values:
        if isinstance(value, FunctionType):
            yield value


def _flowers(function: Any) -> bool:
    return str(getattr(function, "__module__", "")).split(".")[0] == "flwr"


def _reached(roots: list[Any]) -> tuple[list[tuple[FunctionType, ast.AST]], list[str]]:
    """Return the functions of the app that the roots can call, with their source."""
    found: dict[int, tuple[FunctionType, ast.AST]] = {}
    unread: list[str] = []
    todo = list(roots)
    while todo:
        function = todo.pop(0)
        if id(function) in found:
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        except (OSError, TypeError, SyntaxError):
            unread.append(getattr(function, "__qualname__", repr(function)))
            continue
        found[id(function)] = (function, tree)
        known = {**function.__globals__, **_closed_over(function)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Name | ast.Attribute):
                value = _resolved(node, known)
                if isinstance(value, type) and not is_a(value, *_ROOTS):
                    todo += [f for f in _functions(vars(value).values()) if _same_app(f, function)]
                elif isinstance(value, FunctionType) and _same_app(value, function):
                    todo.append(value)
    return list(found.values()), unread


def _same_app(function: Any, other: Any) -> bool:
    return bool(_package(function) == _package(other))


def _package(function: Any) -> Any:
    return str(function.__module__).split(".")[0]


def _closed_over(function: Any) -> dict[str, Any]:
    names, cells = function.__code__.co_freevars, function.__closure__ or ()
    full = {}
    for name, cell in zip(names, cells, strict=True):
        try:
            full[name] = cell.cell_contents
        except ValueError:  # not yet assigned
            continue
    return full


def _resolved(node: ast.expr, known: Mapping[str, Any]) -> Any:
    """Return what a dotted name means, looking into modules and classes only."""
    if isinstance(node, ast.Name):
        return known.get(node.id, getattr(builtins, node.id, UNKNOWN))
    if isinstance(node, ast.Attribute):
        owner = _resolved(node.value, known)
        if isinstance(owner, ModuleType | type):
            return getattr(owner, node.attr, UNKNOWN)
    return UNKNOWN


class _Reader(ast.NodeVisitor):
    """Reads one function from top to bottom and keeps the strategies and workflows it builds."""

    def __init__(self, function: FunctionType, tree: ast.AST) -> None:
        self._known: dict[str, Any] = {**function.__globals__, **_closed_over(function)}
        for name in function.__code__.co_varnames:
            self._known[name] = UNKNOWN
        self._where = f"{function.__module__}.{function.__qualname__}"
        self._seen: dict[int, Sighted] = {}
        self._inside: set[int] = set()
        self.visit(tree)

    @property
    def found(self) -> list[Sighted]:
        return [s for s in self._seen.values() if id(s) not in self._inside]

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            if isinstance(target, ast.Name):
                self._known[target.id] = self._value(node.value)
            elif isinstance(target, ast.Tuple):
                self._known |= {e.id: UNKNOWN for e in target.elts if isinstance(e, ast.Name)}

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.generic_visit(node)
        if isinstance(node.target, ast.Name) and node.value is not None:
            self._known[node.target.id] = self._value(node.value)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.generic_visit(node)
        if isinstance(node.target, ast.Name):
            self._known[node.target.id] = UNKNOWN

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        self._value(node)

    def _value(self, node: ast.expr) -> Any:
        if id(node) in self._seen:
            return self._seen[id(node)]
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.UnaryOp | ast.BinOp):
            try:
                return ast.literal_eval(node)
            except ValueError:
                return UNKNOWN
        if isinstance(node, ast.Name | ast.Attribute):
            return _resolved(node, self._known)
        if isinstance(node, ast.Dict) and all(isinstance(k, ast.Constant) for k in node.keys):
            keys = [k.value for k in node.keys if isinstance(k, ast.Constant)]
            return dict(zip(keys, map(self._value, node.values), strict=True))
        if isinstance(node, ast.Call):
            return self._called(node)
        return UNKNOWN

    def _called(self, node: ast.Call) -> Any:
        kind = _resolved(node.func, self._known)
        if not isinstance(kind, type):
            return UNKNOWN
        given = [UNKNOWN if isinstance(a, ast.Starred) else self._value(a) for a in node.args]
        named, is_whole = {}, not any(isinstance(a, ast.Starred) for a in node.args)
        for keyword in node.keywords:
            value = self._value(keyword.value)
            if keyword.arg is not None:
                named[keyword.arg] = value
            elif isinstance(value, dict):
                named |= value
            else:
                is_whole = False
        if kind is dict and not given and is_whole:
            return named
        if is_a(kind, *_ROOTS):
            sighted = Sighted(kind, _bound(kind, given, named, is_whole), self._where)
            self._seen[id(node)] = sighted
            self._inside |= {id(v) for v in sighted.arguments.values() if isinstance(v, Sighted)}
            return sighted
        if str(kind.__module__).startswith("turncoat.") and is_whole:
            return _built(kind, given, named)
        return UNKNOWN


def _built(kind: type, given: list[Any], named: dict[str, Any]) -> Any:
    """Return a rule or a clipping of ours, which is a value, if all its arguments are known."""
    every = [*given, *named.values()]
    if any(v is UNKNOWN for v in every):
        return UNKNOWN
    if not all(isinstance(v, _PLAIN) or type(v).__module__.startswith("turncoat.") for v in every):
        return UNKNOWN
    try:
        return kind(*given, **named)
    except (TypeError, ValueError):
        return UNKNOWN


def _bound(kind: type, given: list[Any], named: dict[str, Any], is_whole: bool) -> dict[str, Any]:
    """Return what each argument of a strategy is; without defaults where they may be others."""
    try:
        signature = inspect.signature(kind)
        bound = signature.bind_partial(*given, **named)
    except TypeError:
        return named
    arguments = dict(bound.arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments |= arguments.pop(name, {})
        elif is_whole and name not in arguments and parameter.default is not parameter.empty:
            arguments[name] = parameter.default
    return arguments


def _of_instance(strategy: Any) -> Sighted:
    arguments = dict(vars(strategy))
    inner = arguments.get("strategy")
    if inner is not None and is_a(type(inner), "Strategy"):
        arguments["strategy"] = _of_instance(inner)
    return Sighted(type(strategy), arguments, "the strategy given")


def _modules_of(functions: list[FunctionType]) -> dict[str, str]:
    torch = sys.modules.get("torch")
    if torch is None:
        return {}
    packages, found = {_package(f) for f in functions}, {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] not in packages or not isinstance(module, ModuleType):
            continue
        for value in list(vars(module).values()):
            if not (isinstance(value, type) and issubclass(value, torch.nn.Module)):
                continue
            if value.__module__.split(".")[0] in packages:
                with suppress(OSError, TypeError):
                    found[value.__qualname__] = inspect.getsource(value)
    return found

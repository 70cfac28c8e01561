"""Whole configurations as JSON, and their hashes: what has one description is computed once."""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import Field, fields, is_dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MappingProxyType, ModuleType
from typing import Any

from torch import Tensor

_OWN = Path(__file__).parent
ADDED = MappingProxyType({"added": True})
"""Metadata of a field that came after results were kept: at its default it is not described.

So what was computed before there was such an option is found again, and is drawn at the same
address of randomness.
"""
_SHOWN_ONLY = {"report", "audits", "testing"}  # what only shows results does not change them


def describe(thing: Any) -> Any:
    """Return JSON that names all of a configuration.

    Raises:
        TypeError: If something in it has no name that would be the same in another process.
    """
    if isinstance(thing, Tensor):
        data = hashlib.sha256(thing.contiguous().cpu().numpy().tobytes()).hexdigest()
        return [str(thing.dtype), list(thing.shape), data]
    if is_dataclass(thing) and not isinstance(thing, type):
        inside = {f.name: getattr(thing, f.name) for f in fields(thing) if _is_said(f, thing)}
        return {"use": _name(type(thing)), **{name: describe(v) for name, v in inside.items()}}
    if isinstance(thing, FunctionType | BuiltinFunctionType | type):
        if "<" in thing.__qualname__:
            raise TypeError(
                f"{thing.__qualname__} of {thing.__module__} has no name of its own, so that its "
                "results could not be found again: write it as a function or a frozen dataclass "
                "at the top of its file"
            )
        return _name(thing)
    if isinstance(thing, Enum):
        return thing.value
    if isinstance(thing, Mapping):
        return {str(k): describe(v) for k, v in thing.items()}
    if isinstance(thing, list | tuple):
        return [describe(v) for v in thing]
    if isinstance(thing, frozenset | set):
        return sorted((describe(v) for v in thing), key=repr)
    if thing is None or isinstance(thing, str | int | float):
        return thing
    if isinstance(thing, Path):
        return str(thing)
    raise TypeError(
        f"cannot describe {thing!r}: make it a frozen dataclass or a function, so that its results "
        "can be found again"
    )


def _is_said(f: Field[Any], thing: Any) -> bool:
    return f.init and not (f.metadata.get("added") and getattr(thing, f.name) == f.default)


def key(*things: Any) -> str:
    """Return the hash of whole configurations, of this package's code and of users' files."""
    return hashlib.sha256(f"{own_code()} {fingerprint(*things)}".encode()).hexdigest()


def fingerprint(*things: Any) -> str:
    """Return the hash of whole configurations alone: an address of randomness that lasts."""
    return hashlib.sha256(json.dumps([*map(describe, things)], sort_keys=True).encode()).hexdigest()


@cache
def own_code() -> str:
    """Return the hash of the package's text, what only shows results left out."""
    digest = hashlib.sha256()
    for path in sorted(_OWN.rglob("*.py")):
        inside = path.relative_to(_OWN)
        if inside.parts[0] not in _SHOWN_ONLY and inside.name != "cli.py":
            digest.update(str(inside).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _name(thing: Any) -> str:
    name = f"{thing.__module__}:{thing.__qualname__}"
    if name.startswith("turncoat.brought.") or _is_their_module(sys.modules.get(thing.__module__)):
        # where a user's file lies is not what it says: its text counts, and not its path
        stem = thing.__module__.rpartition(".")[2].rpartition("_")[0] or thing.__module__
        return f"{stem}:{thing.__qualname__}@{_text(sys.modules[thing.__module__])[:16]}"
    return name


def _is_their_module(module: ModuleType | None) -> bool:
    """Say whether a module is neither ours nor installed."""
    source = getattr(module, "__file__", None)
    if source is None:
        return False
    return is_users(source)


@cache
def is_users(file: str) -> bool:
    """Say whether a source file is neither ours nor installed."""
    path = Path(file).resolve()
    installed = "site-packages" in path.parts or "dist-packages" in path.parts
    return not (installed or path.is_relative_to(_OWN) or _is_standard(path))


def _is_standard(path: Path) -> bool:
    return path.is_relative_to(Path(inspect.__file__).resolve().parent)


def _text(module: ModuleType) -> str:
    """Return the hash of a user's module and of all modules of theirs that it imports."""
    digest = hashlib.sha256()
    for source in sorted(_sources(module, set())):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def _sources(module: ModuleType, seen: set[str]) -> Iterator[Path]:
    if module.__name__ in seen or not _is_their_module(module):
        return
    seen.add(module.__name__)
    assert module.__file__ is not None
    yield Path(module.__file__).resolve()
    for value in vars(module).values():
        name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", "")
        if isinstance(name, str) and (imported := sys.modules.get(name)) is not None:
            yield from _sources(imported, seen)

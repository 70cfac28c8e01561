"""A run's state on disk: safetensors, never pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

Role = tuple[str, int]  # a stage's place and its client; -1 where there is one for all


class Unreadable(ValueError):
    """A saved file is not what it should be."""


class Unwritable(OSError):
    """A file cannot be written, as when the disk is full."""


@dataclass(frozen=True)
class State:
    """All that a run carries from round to round: save it, load it, go on."""

    round: int
    params: Tensor
    memory: Mapping[Role, Mapping[str, Any]] = field(default_factory=dict)


def write_state(path: Path, state: State, about: Any = None) -> None:
    """Save a state and some JSON atomically: the file is there whole, or not at all."""
    tensors: dict[str, Tensor] = {"params": state.params.contiguous()}
    memory = [
        [place, client, {key: packed(value, tensors) for key, value in cell.items()}]
        for (place, client), cell in state.memory.items()
    ]
    write_tensors(path, tensors, {"round": state.round, "memory": memory, "about": about})


def read_state(path: Path) -> tuple[State, Any]:
    """Load what ``write_state`` saved."""
    tensors, about = read_tensors(path)
    memory = {
        (place, client): {key: unpacked(value, tensors) for key, value in cell.items()}
        for place, client, cell in about["memory"]
    }
    return State(int(about["round"]), tensors["params"], memory), about["about"]


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Any = None) -> None:
    """Save named tensors and JSON atomically."""
    whole = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    with replacing(path) as draft:
        save_file(whole, draft, {"turncoat": json.dumps(about)})


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Lend a name to write to; what is there afterwards takes the place of ``path``, or nothing.

    Raises:
        Unwritable: If the disk is full, or the folder cannot be written.
    """
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield draft
        os.replace(draft, path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise Unwritable(getattr(error, "strerror", None) or str(error)) from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], Any]:
    """Load what ``write_tensors`` saved."""
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("turncoat", "null"))
            return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise Unreadable(
            f"{path} cannot be read ({error}): delete it, and it is made again"
        ) from error


def packed(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return JSON that stands for a value; its tensors are put into ``tensors``."""
    if isinstance(value, Tensor):
        name = f"m{len(tensors)}"
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        pairs = [[packed(k, tensors), packed(v, tensors)] for k, v in value.items()]
        return {"dict": pairs}
    if isinstance(value, tuple):
        return {"tuple": [packed(v, tensors) for v in value]}
    if isinstance(value, frozenset):
        return {"set": [packed(v, tensors) for v in sorted(value, key=repr)]}
    if isinstance(value, list):
        return [packed(v, tensors) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(
        f"a stage keeps {value!r} in its memory, which cannot be saved: keep tensors, numbers, "
        "strings, None, and tuples, lists and dicts of these"
    )


def unpacked(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return the value that ``packed`` made JSON of."""
    if isinstance(value, list):
        return [unpacked(v, tensors) for v in value]
    if isinstance(value, dict):
        ((kind, inside),) = value.items()
        if kind == "tensor":
            return tensors[inside]
        if kind == "tuple":
            return tuple(unpacked(v, tensors) for v in inside)
        if kind == "set":
            return frozenset(unpacked(v, tensors) for v in inside)
        return {unpacked(k, tensors): unpacked(v, tensors) for k, v in inside}
    return value

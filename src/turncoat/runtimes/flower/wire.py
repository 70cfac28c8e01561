"""What travels between the server and the nodes: raw bytes and JSON, never pickle.

A value is written as two records: its tensors as raw little-endian bytes, so that every bit
arrives, and the rest as JSON. What arrives is not trusted: it is measured before it is decoded, and
no name in it is imported.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from math import isfinite, prod
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from turncoat.runtimes.saved import packed, unpacked

_ARRAYS, _REST = "turncoat.arrays", "turncoat.json"
_RAW = "turncoat.raw"
_DTYPES = {
    str(t).removeprefix("torch."): t
    for t in (
        torch.float32,
        torch.float64,
        torch.float16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}


class Unfit(ValueError):
    """What a node sent cannot be used. The text goes on after "client 3 ..."."""


def write(value: Any) -> RecordDict:
    """Return the records that carry a value: tensors, numbers, strings, and nests of these."""
    tensors: dict[str, Tensor] = {}
    rest = json.dumps(packed(value, tensors))
    arrays = ArrayRecord({name: _array(tensor) for name, tensor in tensors.items()})
    return RecordDict({_ARRAYS: arrays, _REST: ConfigRecord({"json": rest})})


def read(content: RecordDict, most_bytes: int | None = None) -> Any:
    """Return the value that ``write`` wrote.

    Raises:
        Unfit: If it is larger than ``most_bytes``, or nothing that ``write`` wrote.
    """
    size = size_of(content)
    if most_bytes is not None and size > most_bytes:
        raise Unfit(f"sent {size:,} bytes where at most {most_bytes:,} are due")
    try:
        arrays = content.array_records[_ARRAYS]
        tensors = {name: _tensor(array) for name, array in arrays.items()}
        return unpacked(json.loads(str(content.config_records[_REST]["json"])), tensors)
    except Unfit:
        raise
    except Exception as error:
        raise Unfit(f"sent what cannot be read ({type(error).__name__}: {error})") from error


def size_of(content: RecordDict) -> int:
    """Return how many bytes a content holds, without decoding any."""
    arrays = sum(len(a.data) for record in content.array_records.values() for a in record.values())
    texts = (v for record in content.config_records.values() for v in record.values())
    return arrays + sum(len(v) if isinstance(v, str | bytes | list) else 8 for v in texts)


def spelt(message: Any) -> Any:
    """Return what ``write`` can carry of a message: the name of its type, and its fields."""
    if not is_dataclass(message) or isinstance(message, type):
        raise TypeError(f"{message!r} cannot travel: make messages frozen dataclasses")
    inside = {f.name: getattr(message, f.name) for f in fields(message) if f.init}
    return {"kind": _name(type(message)), "fields": inside}


def built(spelling: Any, kind: type[Any]) -> Any:
    """Return the message that was spelt, if it is of a kind or of one that derives from it."""
    try:
        name, inside = spelling["kind"], spelling["fields"]
        known = {_name(k): k for k in _with_subclasses(kind)}
    except (TypeError, KeyError) as error:
        raise Unfit("sent no message") from error
    if name not in known:
        raise Unfit(f"sent a {name!r} where {_name(kind)} is due")
    try:
        return known[name](**inside)
    except Exception as error:
        raise Unfit(f"sent a {name!r} that is none ({error})") from error


def fault_beside(message: Any, due: Any, sender: int, like_sender: int) -> str | None:
    """Say what makes a message unfit beside one that our own channel dressed, if anything does.

    Tensors must have the shape and type of those of ``due``, a claimed weight must be a positive
    number, whoever is named as the sender must be it, and all else must be equal.
    """
    for f in fields(due):
        mine, theirs = getattr(due, f.name), getattr(message, f.name, None)
        if isinstance(mine, Tensor):
            if not isinstance(theirs, Tensor) or theirs.dtype != mine.dtype:
                return f"sent a {f.name} that is no {_short(mine.dtype)} tensor"
            if theirs.shape != mine.shape:
                return f"sent a {f.name} of shape {(*theirs.shape,)}, not {(*mine.shape,)}"
            if theirs.is_floating_point() and not bool(torch.isfinite(theirs).all()):
                return "sent NaN or infinity"
        elif f.name == "weight":
            if fault := unfit_weight(theirs):
                return fault
        elif isinstance(mine, frozenset):
            named = frozenset({sender}) if mine == frozenset({like_sender}) else mine
            if theirs != named:
                return f"sent {f.name} = {theirs!r}, which is not its own to send"
        elif isinstance(mine, bool | int | float | str) and theirs != mine:
            return f"sent {f.name} = {theirs!r} where {mine!r} is due"
    return None


def unfit_weight(weight: Any) -> str | None:
    """Say what is wrong with a claimed weight, if anything is."""
    number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if number and isfinite(weight) and weight > 0:
        return None
    return f"claimed the weight {weight!r:.50}, which is no positive number"


def _array(tensor: Tensor) -> Array:
    whole = tensor.detach().cpu().contiguous()
    name = _short(whole.dtype)
    if name not in _DTYPES:
        raise TypeError(f"a tensor of {whole.dtype} cannot travel: use {', '.join(_DTYPES)}")
    return Array(name, tuple(whole.shape), _RAW, whole.numpy().tobytes())


def _tensor(array: Array) -> Tensor:
    dtype, shape = _DTYPES[array.dtype], tuple(array.shape)
    if array.stype != _RAW or min(shape, default=0) < 0:
        raise Unfit(f"sent an array of the type {array.stype!r:.50}")
    if len(array.data) != prod(shape) * dtype.itemsize:
        raise Unfit(f"sent {len(array.data):,} bytes for an array of shape {shape}")
    if not array.data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(array.data), dtype=dtype).reshape(shape)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _name(kind: type[Any]) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _with_subclasses(kind: type[Any]) -> Iterator[type[Any]]:
    yield kind
    for other in kind.__subclasses__():
        yield from _with_subclasses(other)

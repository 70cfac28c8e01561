"""What Flower's messages carry, as numbers: the update in a reply, metrics, and bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Message, RecordDict
from numpy.typing import NDArray

Vector = NDArray[np.float64]


@dataclass
class Parcel:
    """The arrays of one reply, beside those that they are an answer to.

    Attributes:
        delta: Every float array minus what was sent, as one vector; integers do not count.
        relative: False if nothing that was sent has these shapes: then the arrays are the update.
    """

    reply: Message
    record: str
    names: tuple[str, ...]
    arrays: list[NDArray[Any]]
    sent: list[NDArray[Any]]
    relative: bool

    @classmethod
    def of(cls, message: Message, reply: Message) -> Parcel | None:
        sent = {n: _opened(r) for n, r in message.content.array_records.items()}
        best: Parcel | None = None
        for name, record in reply.content.array_records.items():
            arrays = _opened(record)
            if not arrays:
                continue
            shapes = [a.shape for a in arrays]
            same = [s for s in sent.values() if [a.shape for a in s] == shapes]
            zeros = [np.zeros_like(a) for a in arrays]
            parcel = cls(reply, name, tuple(record), arrays, same[0] if same else zeros, bool(same))
            if same:
                return parcel
            best = best or parcel
        return best

    @property
    def delta(self) -> Vector:
        pairs = zip(self.arrays, self.sent, strict=True)
        parts = [
            (a.astype(np.float64) - b.astype(np.float64)).ravel()
            for a, b in pairs
            if a.dtype.kind == "f"
        ]
        return np.concatenate(parts) if parts else np.zeros(0)

    def send(self, delta: Vector) -> None:
        """Put ``delta`` into the reply; what is no float stays as it is."""
        start, changed = 0, {}
        for name, array, sent in zip(self.names, self.arrays, self.sent, strict=True):
            if array.dtype.kind == "f":
                part = delta[start : start + array.size].reshape(array.shape)
                start += array.size
                with np.errstate(over="ignore"):
                    array = np.asarray(sent.astype(np.float64) + part, dtype=array.dtype)
            changed[name] = Array(array)
        self.reply.content[self.record] = ArrayRecord(changed)


def _opened(record: ArrayRecord) -> list[NDArray[Any]]:
    return [array.numpy() for array in record.values() if array.data]


def sole(content: RecordDict) -> ArrayRecord | None:
    return next((r for r in content.array_records.values() if _opened(r)), None)


def num_bytes(message: Message) -> int:
    if not message.has_content():
        return 0
    arrays = sum(len(a.data) for r in message.content.array_records.values() for a in r.values())
    configs = (v for r in message.content.config_records.values() for v in r.values())
    lists = (x for v in configs for x in (v if isinstance(v, list) else [v]))
    return arrays + sum(len(x) for x in lists if isinstance(x, bytes))


def metrics_of(content: RecordDict) -> dict[str, float]:
    """Return every number in the records of metrics, legacy ones among them."""
    found: dict[str, float] = {}
    records: list[Mapping[str, Any]] = list(content.metric_records.values())
    records += [r for n, r in content.config_records.items() if n.endswith(".metrics")]
    for record in records:
        for name, value in record.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                found[name] = float(value)
    return found


def num_examples(metrics: Mapping[str, float]) -> int:
    said = metrics.get("num-examples", metrics.get("num_examples", 0.0))
    return int(said) if isfinite(said) and said > 0 else 0

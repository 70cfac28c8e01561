"""What came back to a Flower server, judged: what is fit for a rule, and what is not, and why."""

from __future__ import annotations

import copy
import io
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from statistics import median
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from numpy.typing import NDArray
from torch import Tensor

from turncoat.messages import Update

Arrays = Mapping[str, NDArray[Any]]

_HEADER = 4096  # bytes that a serialised array may have beside its numbers
_log = logging.getLogger("turncoat.flower")


@dataclass(frozen=True, slots=True)
class Incident:
    """One thing that was not as it should be, and what became of it. No node: the round itself."""

    round: int
    node: int | str | None
    what: str

    def __str__(self) -> str:
        who = "" if self.node is None else f", node {self.node}"
        return f"round {self.round}{who}: {self.what}"


class Incidents(list[Incident]):
    """Incidents in their order; each is also logged as a warning of ``turncoat.flower``."""

    def note(self, round: int, node: int | str | None, what: str) -> None:
        self.append(Incident(round, node, what))
        _log.warning("%s", self[-1])


class Unfit(ValueError):
    """A reply that cannot be used; its text is the reason."""


class Frame:
    """The arrays of one global model: its floats as one vector, all others apart.

    Integers (counters, masks) are no directions to go in: next to a step of 0.01, a count of
    batches would settle every distance. They take no part in a rule; see `median_of`.
    """

    def __init__(self, arrays: Arrays) -> None:
        for name, array in arrays.items():
            if array.dtype.kind not in "fiub":
                raise TypeError(
                    f"the global model's array {name!r} is {array.dtype}: only floats, integers "
                    "and booleans can be aggregated; keep it out of the ArrayRecord"
                )
        self.before = dict(arrays)
        self.floats = [name for name, array in arrays.items() if array.dtype.kind == "f"]
        self.others = [name for name, array in arrays.items() if array.dtype.kind != "f"]

    @property
    def vector(self) -> Tensor:
        """The floats before the round. Shape: ``(num_floats,)``, float64."""
        return self._flat(self.before)

    def delta(self, arrays: Arrays) -> Tensor:
        """Return how far ``arrays`` are from here. Shape: ``(num_floats,)``, float32.

        Subtracted in float64: only the difference is rounded.
        """
        return (self._flat(arrays) - self.vector).float()

    def moved(self, step: Tensor, others: Arrays) -> dict[str, NDArray[Any]]:
        """Return the floats ``step`` further, and ``others`` (or what was) as they are.

        All in float64: a strategy's average of such replies is exact once it is `cast`, and no
        integer is cut off in it (the legacy FedAvg makes 8 the sum of ten times 0).
        """
        after, start, arrays = self.vector + step.double(), 0, {}
        for name, array in self.before.items():
            if array.dtype.kind == "f":
                part = after[start : start + array.size].numpy()
                arrays[name] = part.reshape(array.shape)
                start += array.size
            else:
                arrays[name] = np.asarray(others.get(name, array), np.float64)
        return arrays

    def cast(self, arrays: Arrays) -> dict[str, NDArray[Any]]:
        """Return ``arrays`` with the types that the global model has; integers are rounded."""
        return {
            name: _as(array, self.before[name].dtype) if name in self.before else array
            for name, array in arrays.items()
        }

    def median_of(self, many: Sequence[Arrays]) -> dict[str, NDArray[Any]]:
        """Return the (lower) median of each integer or boolean, over replies."""
        middle = (len(many) - 1) // 2
        return {n: np.sort(np.stack([m[n] for m in many]), axis=0)[middle] for n in self.others}

    def read(self, serialised: Mapping[str, bytes]) -> dict[str, NDArray[Any]]:
        """Return the arrays in ``serialised``, or raise `Unfit`. Nothing oversized is opened."""
        if serialised.keys() != self.before.keys():
            strange = sorted(serialised.keys() ^ self.before.keys())
            raise Unfit(f"sent other arrays than it was given: {strange[0]!r} and so on")
        arrays = {}
        for name, like in self.before.items():
            data, most = serialised[name], 8 * like.size + _HEADER
            if len(data) > most:
                raise Unfit(f"sent {len(data)} bytes as {name!r}, where {most} are the most")
            try:
                array = np.load(io.BytesIO(data), allow_pickle=False)
            except Exception as error:
                raise Unfit(f"sent {name!r} in a form that cannot be read ({error})") from None
            shape = getattr(array, "shape", None)
            if shape != like.shape:
                raise Unfit(f"sent {name!r} of shape {shape}, where {like.shape} is due")
            if array.dtype.kind not in ("f" if like.dtype.kind == "f" else "iub"):
                raise Unfit(f"sent {name!r} as {array.dtype}, where {like.dtype} is due")
            arrays[name] = array
        return arrays

    def _flat(self, arrays: Arrays) -> Tensor:
        parts = [np.asarray(arrays[name], np.float64).reshape(-1) for name in self.floats]
        return torch.from_numpy(np.concatenate(parts) if parts else np.zeros(0))


@dataclass(frozen=True)
class Sound:
    """One reply that is fit for a rule. ``reply`` is what the node sent, in Flower's own form."""

    node: int | str
    update: Update
    others: Arrays = field(repr=False)
    reply: Any = field(repr=False)


@dataclass(frozen=True)
class Received:
    """What `soundness` reads of a reply, whatever the API."""

    node: int | str
    arrays: Callable[[], Mapping[str, bytes]]
    weight: Any
    kind: Any  # of its metrics: replies of different kinds cannot be averaged
    reply: Any


def sound(
    received: Sequence[Received],
    frame: Frame,
    *,
    round: int,
    incidents: Incidents,
    max_weight_ratio: float,
) -> list[Sound]:
    """Return the replies that are fit, their weights capped; the others become incidents."""
    kept: list[Sound] = []
    usual = most_common(each.kind for each in received)
    for each in received:
        try:
            if each.kind != usual:
                raise Unfit("sent other records or metrics than most")
            arrays = frame.read(each.arrays())
            update = Update(frame.delta(arrays), weight_of(each.weight))
            if not bool(torch.isfinite(update.delta).all()):
                raise Unfit("sent NaN or infinity")
        except Unfit as reason:
            incidents.note(round, each.node, f"left out: {reason}")
            continue
        others = {name: arrays[name] for name in frame.others}
        kept.append(Sound(each.node, update, others, each.reply))
    if not kept:
        return kept
    cap = max_weight_ratio * median(each.update.weight for each in kept)
    for i, one in enumerate(kept):
        if one.update.weight > cap:
            claim = f"claimed the weight {one.update.weight:g}; it counts for {cap:g}"
            incidents.note(round, one.node, claim)
            kept[i] = replace(one, update=replace(one.update, weight=cap))
    return kept


def from_messages(
    replies: Iterable[Message],
    asked: Mapping[int, Message],
    weighted_by: str | None,
    *,
    round: int,
    incidents: Incidents,
    with_arrays: bool = True,
) -> list[Received]:
    """Return the replies with content, one for each node that was asked, in the order of ids."""
    first: dict[int, Message] = {}
    heard: set[int] = set()
    for reply in sorted(replies, key=lambda reply: reply.metadata.src_node_id):
        node = reply.metadata.src_node_id
        if node not in asked:
            incidents.note(round, node, "left out: it was not asked")
        elif node in heard:
            incidents.note(round, node, "answered twice; only its first reply counts")
        elif reply.has_error():
            incidents.note(round, node, f"failed: {reply.error.reason}")
        else:
            first[node] = reply
        heard.add(node)
    for node in asked:
        if node not in heard:
            incidents.note(round, node, "did not answer")
    found = []
    for node in first:
        content = first[node].content
        if with_arrays and len(content.array_records) != 1:
            many = len(content.array_records)
            incidents.note(round, node, f"left out: sent {many} ArrayRecords where one is due")
            continue
        if weighted_by is not None and len(content.metric_records) != 1:
            many = len(content.metric_records)
            incidents.note(round, node, f"left out: sent {many} MetricRecords where one is due")
            continue
        metrics = next(iter(content.metric_records.values()), MetricRecord())
        weight: Any = 1.0
        if weighted_by is not None:
            weight = metrics.get(weighted_by, f"no {weighted_by!r}")
        found.append(
            Received(
                node,
                lambda content=content: {  # type: ignore[misc]
                    name: array.data for name, array in sole_arrays(content).items()
                },
                weight,
                None if weighted_by is None else kind_of(content),
                first[node],
            )
        )
    return found


def sole_arrays(content: RecordDict) -> ArrayRecord:
    """Return the one ArrayRecord of a message."""
    (record,) = content.array_records.values()
    return record


def with_content(
    message: Message, arrays: ArrayRecord | None, weight: float, key: str | None
) -> Message:
    """Return a copy of a reply with these arrays and, under ``key``, this weight."""
    content = RecordDict(dict(message.content.items()))
    for name in list(content.array_records):
        if arrays is not None:
            content[name] = ArrayRecord(dict(arrays.items()))
    for name, metrics in list(content.metric_records.items()):
        if key is not None and key in metrics and metrics[key] != weight:
            content[name] = MetricRecord({**dict(metrics.items()), key: weight})
    again = copy.copy(message)
    again.content = content
    return again


def record_of(arrays: Arrays) -> ArrayRecord:
    """Return arrays as Flower's record."""
    return ArrayRecord({name: Array(np.asarray(array)) for name, array in arrays.items()})


def arrays_of(record: ArrayRecord) -> dict[str, NDArray[Any]]:
    """Return Flower's record as arrays."""
    return {name: array.numpy() for name, array in record.items()}


def weight_of(claim: Any) -> float:
    """Return a claimed weight as a positive number, or raise `Unfit`."""
    try:
        weight = float(claim) if isinstance(claim, int | float) else float("nan")
    except OverflowError:
        weight = float("inf")
    if not (isfinite(weight) and weight > 0):
        raise Unfit(f"claimed the weight {str(claim)[:40]}, which is no positive number")
    return weight


def weighted_by(strategy: Any) -> str | None:
    """Return the metric by which a strategy, or the one that it wraps, weighs its replies."""
    key = getattr(strategy, "weighted_by_key", None)
    if key is None and hasattr(strategy, "strategy"):
        return weighted_by(strategy.strategy)
    return key


def kind_of(content: RecordDict) -> tuple[Any, ...]:
    """Return what all replies must share for Flower's average of them: names, and list sizes."""
    names: list[Any] = [*content.array_records, *content.metric_records]
    for metrics in content.metric_records.values():
        sizes = ((k, len(v) if isinstance(v, list) else -1) for k, v in metrics.items())
        names += sorted(sizes)
    return tuple(names)


def most_common(kinds: Iterable[Any]) -> Any:
    """Return the most frequent of some values; the first of several, or None of none."""
    counted = Counter(kinds).most_common(1)
    return counted[0][0] if counted else None


def _as(array: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    if dtype.kind in "iu" and array.dtype.kind == "f":
        array = np.rint(array)
    elif dtype.kind == "b" and array.dtype.kind == "f":
        array = array >= 0.5
    return array.astype(dtype, copy=False)

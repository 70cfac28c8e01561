"""One run of a Flower app in this process, as it is or with a coalition among its nodes."""

from __future__ import annotations

import contextlib
import gc
import random
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.server import History, LegacyContext, Server
from flwr.server.strategy import Strategy as LegacyStrategy
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.serverapp.strategy import Result, Strategy
from numpy.typing import NDArray

from turncoat.flower.forgeries import Forgery
from turncoat.flower.grid import (
    Delivery,
    InProcessGrid,
    other_mods,
    whole_rounds,
    without_secure_aggregation,
)
from turncoat.flower.loading import load

Vector = NDArray[np.float64]
Rows = dict[str, dict[str, float]]  # by round, then by name: as JSON keeps it


@dataclass(frozen=True)
class Rehearsal:
    """What to run, in values that travel as JSON.

    Attributes:
        members: The nodes of the coalition, by number.
        attack: What they do, or None for a clean run.
        secure: Whether the app is known to use SecAgg+: members then forge before they mask.
        in_the_clear: Take SecAgg+ out of the app, to see what it would be without.
        keep: Where to keep the arrays of the first round and the final ones, if anywhere.
        checked: Whether to have ``turncoat.flower.check`` look at the app, and at its ``model``.
    """

    folder: str
    serverapp: str
    clientapp: str
    config: Mapping[str, Any]
    num_nodes: int
    seed: int = 0
    members: tuple[int, ...] = ()
    attack: str | None = None
    strength: float | None = None
    secure: bool = False
    in_the_clear: bool = False
    keep: str | None = None
    checked: bool = False
    model: str | None = None

    @property
    def forgery(self) -> Forgery | None:
        return None if self.attack is None else Forgery(self.attack, self.strength)


@dataclass
class Played:
    """What a run left behind.

    Attributes:
        metrics: By source (``server``: the server's own evaluation; ``clients``: the clients', as
            the strategy aggregates them; ``replies``: the same, averaged here), by round.
        num_evaluated: Examples behind the clients' last evaluation; 0 if nobody says.
        seen: What the server saw: a row for each reply to a training message.
        sizes: Examples that each node claims to train on.
        secure: Whether a SecAgg+ workflow was at work.
        error: What stopped the server, if anything did.
    """

    metrics: dict[str, Rows] = field(default_factory=dict)
    num_evaluated: int = 0
    seconds: list[float] = field(default_factory=list)
    cohort: list[int] = field(default_factory=list)
    bytes_up: int = 0
    bytes_down: int = 0
    incidents: list[tuple[int, int | None, str]] = field(default_factory=list)
    seen: list[dict[str, Any]] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)
    num_params: int = 0
    strategies: list[str] = field(default_factory=list)
    secure: bool = False
    forged: int = 0
    findings: list[dict[str, str]] = field(default_factory=list)
    error: str | None = None


def rehearse(job: Rehearsal) -> Played:
    """Run the app once. The current process is spent afterwards: its modules are the app's."""
    _seed(job.seed)
    recorder = Recorder(job)
    with contextlib.ExitStack() as patches:
        patches.enter_context(whole_rounds())
        if job.in_the_clear:
            patches.enter_context(without_secure_aggregation())
        elif job.secure and job.attack is not None:
            patches.enter_context(other_mods(innermost=recorder.forge_before_masking))
        client_app, server_app = load(job.clientapp), load(job.serverapp)
        _seed(job.seed)
        grid = InProcessGrid(client_app, job.num_nodes, job.config, intercept=recorder)
        recorder.start()
        try:
            server_app(grid, grid.server_context())
        except Exception as error:
            traceback.print_exc()
            recorder.played.error = f"{type(error).__name__}: {error}"
    recorder.finish()
    if job.checked:
        recorder.played.findings = _checked(server_app, client_app, recorder)
    return recorder.played


class Recorder:
    """Sits between the nodes and the server: notes what passes, and plays the coalition."""

    def __init__(self, job: Rehearsal) -> None:
        self.job, self.played = job, Played()
        self.strategies: list[Any] = []
        self.workflows: list[Any] = []
        self._results: list[Any] = []
        self._servers: list[Any] = []
        self._kept: dict[str, list[NDArray[Any]]] = {}
        self._names: list[str] = []
        self._last_sent: list[NDArray[Any]] = []
        self._round = 0
        self._pushes = 0
        self._began = self._last = time.perf_counter()
        self._evaluated: Rows = {}

    def __call__(self, batch: Sequence[Delivery]) -> list[Message | None]:
        if not self._pushes:
            self._look_around()
        self._pushes += 1
        kind = batch[0].message.metadata.message_type.split(".")[0]
        if kind == "train":
            self._train(batch)
        elif kind == "evaluate":
            self._evaluate(batch)
        self._last = time.perf_counter()
        return [each.reply for each in batch]

    def forge_before_masking(
        self, message: Message, context: Context, call_next: Callable[..., Message]
    ) -> Message:
        """Forge what a member computes, before SecAgg+ masks it. A mod."""
        reply = call_next(message, context)
        node, forgery = int(context.node_config["partition-id"]), self.job.forgery
        if forgery is not None and node in self.job.members and reply.has_content():
            update = Parcel.of(message, reply)
            if update is not None:
                own = update.delta[None]
                update.send(forgery(own, own[:0])[0])
                self.played.forged += 1
        return reply

    def start(self) -> None:
        """Start the clock."""
        self._last = time.perf_counter()

    def finish(self) -> None:
        """Read what the server's own records say, now that it is done."""
        played = self.played
        if played.cohort:
            played.bytes_up //= max(1, sum(played.cohort))
            played.bytes_down //= max(1, sum(played.cohort))
        for source, rows in (*_told(self._results), ("replies", self._evaluated)):
            if rows:
                played.metrics[source] = played.metrics.get(source, {}) | rows
        if self.job.keep is not None:
            final = self._final()
            if final:
                self._kept["final"] = final
            flat = {f"{k}/{i}": a for k, v in self._kept.items() for i, a in enumerate(v)}
            np.savez(self.job.keep, names=np.array(self._names), **flat)  # type: ignore[arg-type]

    def _look_around(self) -> None:
        """Find the parts of the server that live when it first sends something."""
        for thing in gc.get_objects():
            kind = type(thing)
            if issubclass(kind, Strategy | LegacyStrategy):
                self.strategies.append(thing)
            elif issubclass(kind, SecAggPlusWorkflow):
                self.workflows.append(thing)
            elif issubclass(kind, Result | History):
                self._results.append(thing)
            elif issubclass(kind, Server | LegacyContext):
                self._servers.append(thing)
        self.played.strategies = list(dict.fromkeys(type(s).__name__ for s in self.strategies))
        self.played.secure = bool(self.workflows) and not self.job.in_the_clear

    def _train(self, batch: Sequence[Delivery]) -> None:
        played, said = self.played, batch[0].message.metadata.group_id
        number = int(said) if said.isdigit() else self._round + 1
        if number != self._round:
            self._round, self._began = number, self._last
            played.cohort.append(len(batch))
            played.seconds.append(0.0)
        played.seconds[-1] = time.perf_counter() - self._began
        parcels: dict[int, Parcel] = {}
        for each in batch:
            played.bytes_down += _num_bytes(each.message)
            if each.reply.has_error():
                reason = " ".join(str(each.reply.error.reason).split())[-300:]
                played.incidents.append((number, each.node, f"failed: {reason}"))
                continue
            parcel = Parcel.of(each.message, each.reply)
            if parcel is not None:
                parcels[each.node] = parcel
            self._note(number, each, parcel)
        self._keep_first(batch, parcels)
        forgery = self.job.forgery
        if forgery is not None and not self.job.secure:
            self._forge(forgery, parcels)
        played.bytes_up += sum(_num_bytes(e.reply) for e in batch if e.reply.has_content())

    def _forge(self, forgery: Forgery, parcels: Mapping[int, Parcel]) -> None:
        """Let the members that take part send what they would, knowing all that the others sent."""
        members = [n for n in parcels if n in self.job.members]
        if not members:
            return
        size = parcels[members[0]].delta.shape
        others = [p.delta for n, p in parcels.items() if n not in members]
        others = [row for row in others if row.shape == size and np.isfinite(row).all()]
        own = np.stack([parcels[n].delta for n in members])
        forged = forgery(own, np.stack(others) if others else own[:0])
        for node, row in zip(members, forged, strict=True):
            parcels[node].send(row)
        self.played.forged += len(members)

    def _note(self, number: int, each: Delivery, parcel: Parcel | None) -> None:
        content = each.reply.content
        metrics = _metrics(content)
        count = _num_examples(metrics)
        if count:
            self.played.sizes[str(each.node)] = count
        row: dict[str, Any] = {
            "round": number,
            "node": each.node,
            "arrays": {name: len(record) for name, record in content.array_records.items()},
            "metrics": metrics,
            "configs": sorted(content.config_records),
            "bytes": _num_bytes(each.reply),
        }
        if parcel is not None and not self.played.secure:
            self.played.num_params = max(self.played.num_params, len(parcel.delta))
            row["norm"] = float(np.linalg.norm(parcel.delta))
            row["relative_to_what_was_sent"] = parcel.relative
        self.played.seen.append(row)

    def _keep_first(self, batch: Sequence[Delivery], parcels: Mapping[int, Parcel]) -> None:
        sent = next((arrays for e in batch if (arrays := _sole(e.message.content))), None)
        if sent is not None:
            self._last_sent = [a.numpy() for a in sent.values()]
            size = sum(a.size for a in self._last_sent if a.dtype.kind == "f")
            self.played.num_params = max(self.played.num_params, size)
        if not parcels or "before" in self._kept or self.job.keep is None:
            return
        first = next(iter(parcels.values()))
        self._names = list(first.names)
        if first.relative:
            self._kept["before"] = first.sent
            for node, parcel in parcels.items():
                self._kept[f"reply/{node}"] = [a.copy() for a in parcel.arrays]

    def _evaluate(self, batch: Sequence[Delivery]) -> None:
        sent = next((arrays for e in batch if (arrays := _sole(e.message.content))), None)
        if sent is not None:
            self._last_sent = [a.numpy() for a in sent.values()]
        found: dict[str, float] = {}
        weights: dict[str, float] = {}
        total = 0
        for each in batch:
            if each.reply.has_error():
                continue
            metrics = _metrics(each.reply.content)
            count = _num_examples(metrics)
            total += count
            for name, value in metrics.items():
                if name not in ("num-examples", "num_examples"):
                    found[name] = found.get(name, 0.0) + value * max(1, count)
                    weights[name] = weights.get(name, 0.0) + max(1, count)
        self.played.num_evaluated = total
        self._evaluated[str(self._round)] = {k: v / weights[k] for k, v in found.items()}

    def _final(self) -> list[NDArray[Any]]:
        for result in self._results:
            if isinstance(result, Result) and len(result.arrays):
                return [a.numpy() for a in result.arrays.values()]
        for server in self._servers:
            if isinstance(server, LegacyContext):
                for record in server.state.array_records.values():
                    if len(record):
                        return [a.numpy() for a in record.values()]
            elif isinstance(server, Server) and server.parameters.tensors:
                loaded = (_loaded(t) for t in server.parameters.tensors)
                return list(loaded)
        return self._last_sent


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


def _loaded(data: bytes) -> NDArray[Any]:
    return np.asarray(Array(dtype="", shape=(), stype="numpy.ndarray", data=data).numpy())


def _sole(content: RecordDict) -> ArrayRecord | None:
    return next((r for r in content.array_records.values() if _opened(r)), None)


def _num_bytes(message: Message) -> int:
    if not message.has_content():
        return 0
    arrays = sum(len(a.data) for r in message.content.array_records.values() for a in r.values())
    configs = (v for r in message.content.config_records.values() for v in r.values())
    lists = (x for v in configs for x in (v if isinstance(v, list) else [v]))
    return arrays + sum(len(x) for x in lists if isinstance(x, bytes))


def _metrics(content: RecordDict) -> dict[str, float]:
    """Return every number in the records of metrics, legacy ones among them."""
    found: dict[str, float] = {}
    records: list[Mapping[str, Any]] = list(content.metric_records.values())
    records += [r for n, r in content.config_records.items() if n.endswith(".metrics")]
    for record in records:
        for name, value in record.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                found[name] = float(value)
    return found


def _num_examples(metrics: Mapping[str, float]) -> int:
    said = metrics.get("num-examples", metrics.get("num_examples", 0.0))
    return int(said) if isfinite(said) and said > 0 else 0


def _told(results: Sequence[Any]) -> Iterator[tuple[str, Rows]]:
    """Return what the strategies' own records say, of the Message API and of the legacy one."""
    for result in results:
        if isinstance(result, Result):
            for source, rounds in (
                ("server", result.evaluate_metrics_serverapp),
                ("clients", result.evaluate_metrics_clientapp),
            ):
                yield source, {str(r): _numbers(m) for r, m in rounds.items()}
        else:
            for source, losses, metrics in (
                ("server", result.losses_centralized, result.metrics_centralized),
                ("clients", result.losses_distributed, result.metrics_distributed),
            ):
                rows: Rows = {}
                for name, pairs in {**metrics, "loss": losses}.items():
                    for number, value in pairs:
                        rows.setdefault(str(number), {}).update(_numbers({name: value}))
                yield source, rows


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    found = {}
    for name, value in record.items():
        if isinstance(value, int | float | np.number) and not isinstance(value, bool):
            found[name] = float(value)
    return found


def _checked(server_app: Any, client_app: Any, recorder: Recorder) -> list[dict[str, str]]:
    """Return what ``check`` finds, as JSON keeps it; what it cannot look at is a note."""
    from turncoat.flower.check import check

    wrapped = [getattr(strategy, "strategy", None) for strategy in recorder.strategies]
    outer = [s for s in recorder.strategies if not any(s is inner for inner in wrapped)]
    try:
        found = check(
            server_app,
            client_app,
            strategy=outer or None,
            num_nodes=recorder.job.num_nodes,
            model=load(recorder.job.model) if recorder.job.model else None,
        )
    except Exception as error:
        traceback.print_exc()
        return [_note_of(f"The check of the app broke down: {type(error).__name__}: {error}")]
    return [
        {"severity": str(f.severity), "what": f.what, "why": f.why, "cure": f.cure} for f in found
    ]


def _note_of(what: str) -> dict[str, str]:
    return {"severity": "note", "what": what, "why": "", "cure": ""}


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def run_rehearsal(job: Mapping[str, Any]) -> dict[str, Any]:
    """Run a `Rehearsal` that came as JSON, and return what is `Played` as JSON."""
    return asdict(rehearse(Rehearsal(**{**job, "members": tuple(job["members"])})))

"""What one run of a Flower app leaves behind, noted while it passes."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import Array, Message
from flwr.server import History, LegacyContext, Server
from flwr.server.strategy import Strategy as LegacyStrategy
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.serverapp.strategy import Result, Strategy
from numpy.typing import NDArray

from turncoat.flower.grid import Delivery, reason_of
from turncoat.flower.parcel import Parcel, metrics_of, num_bytes, num_examples, sole
from turncoat.flower.secagg import Passage

Rows = dict[str, dict[str, float]]  # by round, then by name: as JSON keeps it


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
        halts: Rounds in which it gave up, and why.
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
    halts: list[tuple[int, str]] = field(default_factory=list)
    forged: int = 0
    findings: list[dict[str, str]] = field(default_factory=list)
    error: str | None = None


class Recorder:
    """Sits between the nodes and the server, and notes what passes.

    Args:
        coalition: Who may rewrite the replies to a training message before the server has them.
        in_the_clear: Whether SecAgg+, if the app has it, is taken out.
        keep: Where to keep the arrays of the first round and the final ones, if anywhere.
    """

    def __init__(
        self,
        coalition: Callable[[Mapping[int, Parcel]], None],
        *,
        in_the_clear: bool = False,
        keep: str | None = None,
    ) -> None:
        self.played = Played()
        self._coalition, self._in_the_clear, self._keep = coalition, in_the_clear, keep
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

    def note_passage(self, passage: Passage) -> None:
        """Note that a round of SecAgg+ halted, if it did: Flower only logs it."""
        if passage.halted:
            said = str(passage)
            self.played.halts.append((passage.round, said))
            self.played.incidents.append(
                (passage.round, None, f"{said}; the model stays as it was")
            )

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
        if self._keep is not None:
            final = self._final()
            if final:
                self._kept["final"] = final
            flat = {f"{k}/{i}": a for k, v in self._kept.items() for i, a in enumerate(v)}
            np.savez(self._keep, names=np.array(self._names), **flat)  # type: ignore[arg-type]

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
        self.played.secure = bool(self.workflows) and not self._in_the_clear

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
            played.bytes_down += num_bytes(each.message)
            if each.reply.has_error():
                said = f"failed: {reason_of(each.reply.error)}"
                played.incidents.append((number, each.node, said))
                continue
            parcel = Parcel.of(each.message, each.reply)
            if parcel is not None:
                parcels[each.node] = parcel
            self._note(number, each, parcel)
        self._keep_first(batch, parcels)
        self._coalition(parcels)
        played.bytes_up += sum(num_bytes(e.reply) for e in batch if e.reply.has_content())

    def _note(self, number: int, each: Delivery, parcel: Parcel | None) -> None:
        content = each.reply.content
        metrics = metrics_of(content)
        count = num_examples(metrics)
        if count:
            self.played.sizes[str(each.node)] = count
        row: dict[str, Any] = {
            "round": number,
            "node": each.node,
            "arrays": {name: len(record) for name, record in content.array_records.items()},
            "metrics": metrics,
            "configs": sorted(content.config_records),
            "bytes": num_bytes(each.reply),
        }
        if parcel is not None and not self.played.secure:
            self.played.num_params = max(self.played.num_params, len(parcel.delta))
            row["norm"] = float(np.linalg.norm(parcel.delta))
            row["relative_to_what_was_sent"] = parcel.relative
        self.played.seen.append(row)

    def _keep_first(self, batch: Sequence[Delivery], parcels: Mapping[int, Parcel]) -> None:
        sent = next((arrays for e in batch if (arrays := sole(e.message.content))), None)
        if sent is not None:
            self._last_sent = [a.numpy() for a in sent.values()]
            size = sum(a.size for a in self._last_sent if a.dtype.kind == "f")
            self.played.num_params = max(self.played.num_params, size)
        if not parcels or "before" in self._kept or self._keep is None:
            return
        first = next(iter(parcels.values()))
        self._names = list(first.names)
        if first.relative:
            self._kept["before"] = first.sent
            for node, parcel in parcels.items():
                self._kept[f"reply/{node}"] = [a.copy() for a in parcel.arrays]

    def _evaluate(self, batch: Sequence[Delivery]) -> None:
        sent = next((arrays for e in batch if (arrays := sole(e.message.content))), None)
        if sent is not None:
            self._last_sent = [a.numpy() for a in sent.values()]
        found: dict[str, float] = {}
        weights: dict[str, float] = {}
        total = 0
        for each in batch:
            if each.reply.has_error():
                continue
            metrics = metrics_of(each.reply.content)
            count = num_examples(metrics)
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


def _loaded(data: bytes) -> NDArray[Any]:
    return np.asarray(Array(dtype="", shape=(), stype="numpy.ndarray", data=data).numpy())


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

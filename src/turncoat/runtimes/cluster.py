"""The trainings and cells of an audit on a Ray cluster: one task of one thread for each.

What is finished lies in the audit's folder, which all nodes share: so a driver, a worker or a node
may go at any time, and the same command goes on.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from turncoat import brought
from turncoat.audit import Executor, Fixed, Unit, WorkerDied
from turncoat.config import ConfigError
from turncoat.describe import fingerprint, own_code
from turncoat.plan import Audit, Training
from turncoat.record import FolderUnusable, read_cell
from turncoat.runtimes.flower.engines import QUIET, hush, shut_in
from turncoat.runtimes.pool import keep_memory
from turncoat.runtimes.simulate import one_thread

_MOST_TRIES = 3
_KNOCK_SECONDS = 5.0  # for whoever listens at the address
_NODE_SECONDS = 120.0  # for a cluster without a CPU to get one
_FOLDER_SECONDS = 60.0  # for what one machine wrote to be seen by another


def on_cluster(address: str, num_jobs: int | None = None) -> Executor:
    """Return what sends the work of an audit to the Ray cluster at an address.

    Args:
        address: ``"auto"``, ``"host:6379"`` or ``"ray://host:10001"`` of a running cluster, or
            ``"local"`` for one that is started here and ends with the audit.
        num_jobs: How many units may be under way; as many as the cluster has CPUs without.

    Raises:
        ConfigError: If Ray is not installed, or the address is none.
    """
    if find_spec("ray") is None:
        raise ConfigError(
            "--executor ray needs ray, which is not installed: pip install 'turncoat[ray]'"
        )
    if address not in ("auto", "local") and _host_and_port(address) is None:
        raise ConfigError(
            f"--address {address} is no address: give auto, local, host:6379 or ray://host:10001"
        )
    return partial(_RayCrew, address, num_jobs)


@dataclass(frozen=True)
class _Sent:
    """What a worker needs beside its unit.

    Attributes:
        meeting: A folder in the audit's own, new in each run: who finds it shares our storage.
        fixed: A reference to what all units share, and what must be the same where it is used.
    """

    meeting: Path
    fixed: Any


@dataclass(frozen=True)
class _Try:
    unit: Unit
    number: int = 1


class _RayCrew:
    """A crew of Ray tasks, each of one CPU and one thread."""

    def __init__(
        self, address: str, num_jobs: int | None, fixed: Fixed, on_lost: Callable[[str], None]
    ) -> None:
        self._address, self._on_lost = address, on_lost
        self._num_jobs = num_jobs
        self._running: dict[Any, _Try] = {}
        self._none_since: float | None = None  # since when no node has a CPU
        folder = replace(fixed.folder, path=fixed.folder.path.absolute())
        for left in folder.path.glob(".cluster-*"):  # by someone who was killed
            shutil.rmtree(left, ignore_errors=True)
        meeting = folder.path / f".cluster-{uuid.uuid4().hex}"
        self._ray, self._ours = _connect(address, num_jobs)
        try:
            meeting.mkdir()
            brought.lay_out(meeting / "brought")
            whole = (replace(fixed, folder=folder), _marks(fixed.audit))
            self._sent = _Sent(meeting, self._ray.put(self._ray.cloudpickle.dumps(whole)))
            once = self._ray.remote(num_cpus=1, max_retries=0, scheduling_strategy="SPREAD")
            self._remote = once(_in_worker)
        except BaseException:
            self.close()
            raise

    @property
    def size(self) -> int:
        return self._num_jobs or max(1, sum(self._nodes().values()))

    def hand_out(self, unit: Unit) -> None:
        self._begin(_Try(unit))

    def finished(self) -> Iterator[tuple[Unit, tuple[Any, float]]]:
        from ray import exceptions

        deaths = (
            exceptions.WorkerCrashedError,
            exceptions.NodeDiedError,
            exceptions.LocalRayletDiedError,
            exceptions.OutOfMemoryError,
            exceptions.ObjectLostError,  # with the node that kept the answer
        )
        ended: list[Any] = []
        while not ended:
            ended, _ = self._ray.wait(list(self._running), timeout=5.0)
            if not ended:
                self._check_there_are_nodes()
        for reference in ended:
            tried = self._running.pop(reference)
            try:
                result, left = self._ray.get(reference)
            except deaths as error:
                self._lost(tried, error)
            except exceptions.RayTaskError as error:
                raise _reason(error) from error
            else:
                if left is not None:
                    _wait_for(left)
                yield tried.unit, result

    def close(self) -> None:
        """Leave; Ray ends the workers of who leaves.

        Nothing is cancelled: Ray aborts the process that cancels by force what ends at that moment.
        In a session that is not ours, what is under way ends by itself.
        """
        if self._ours:
            self._ray.shutdown()
        if hasattr(self, "_sent"):
            shutil.rmtree(self._sent.meeting, ignore_errors=True)

    def _begin(self, tried: _Try, **options: Any) -> None:
        task = self._remote.options(**options) if options else self._remote
        self._running[task.remote(self._sent, tried.unit)] = tried

    def _lost(self, tried: _Try, error: Exception) -> None:
        """Try a unit again, on another node if there is one."""
        mark = _mark(self._sent.meeting, tried.unit)
        node = mark.read_text() if mark.exists() else ""
        where = f"on node {node[:8]}" if node else "before it began"
        said = f"{_name(tried.unit)} lost its worker {where}: {_said(error)}"
        if tried.number == _MOST_TRIES:
            raise WorkerDied(
                f"{said} (it was tried {_MOST_TRIES} times): give its nodes more memory, or use "
                "fewer --jobs; what is finished is kept, and the same command goes on"
            ) from error
        self._on_lost(f"{said}; it is tried again")
        others = [name for name, num_cpus in self._nodes().items() if num_cpus and name != node]
        options = {}
        if others and node:
            from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

            other = others[tried.number % len(others)]
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(other, soft=True)
        self._begin(replace(tried, number=tried.number + 1), **options)

    def _nodes(self) -> Mapping[str, int]:
        """Return the CPUs of the nodes that live, by their ids."""
        nodes = [n for n in self._ray.nodes() if n["Alive"]]
        return {n["NodeID"]: int(n["Resources"].get("CPU", 0)) for n in nodes}

    def _check_there_are_nodes(self) -> None:
        if any(self._nodes().values()):
            self._none_since = None
            return
        self._none_since = self._none_since or time.monotonic()
        if time.monotonic() - self._none_since > _NODE_SECONDS:
            raise WorkerDied(
                f"the cluster at {self._address} has had no node with a CPU for "
                f"{_NODE_SECONDS:.0f} seconds: start one with ray start --address; what is "
                "finished is kept, and the same command goes on"
            )


def _connect(address: str, num_jobs: int | None) -> tuple[Any, bool]:
    """Join a cluster, or start one; return Ray, and whether it is ours to shut down."""
    hush()
    if address != "local":
        _knock(address)
    with shut_in() if address == "local" else nullcontext():
        import ray  # which reads at once what shuts it in

        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if ray.is_initialized():
            return ray, False
        if address == "local":
            ray.init("local", num_cpus=num_jobs, include_dashboard=False, **quiet)
            return ray, True
        try:
            ray.init(address, **quiet)
        except (ConnectionError, RuntimeError, ValueError, AssertionError) as error:
            raise ConfigError(f"--address {address}: {_said(error)}: {_CURE}") from error
        return ray, True


def _said(error: Exception) -> str:
    """Return the first sentence of what Ray has to say."""
    return str(error).strip().splitlines()[0].partition(". ")[0].rstrip(".")


_CURE = "start a cluster with ray start --head, give the address that it prints, or --address local"


def _knock(address: str) -> None:
    """Ask for a sign of life first: Ray asks for minutes, and may end this process.

    Ray's ports speak HTTP/2, whose server sends its settings (a frame of type 4) unasked.
    """
    found = _host_and_port(os.environ.get("RAY_ADDRESS", "") if address == "auto" else address)
    if found is None:
        return
    try:
        with socket.create_connection(found, _KNOCK_SECONDS) as there:
            there.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0)))
            frame = there.recv(9, socket.MSG_WAITALL)
    except OSError as error:
        why = error.strerror or str(error)
        raise ConfigError(f"--address {address}: nobody answers there ({why}): {_CURE}") from error
    if frame[3:4] != b"\x04":
        raise ConfigError(f"--address {address}: what answers there is not Ray: {_CURE}")


def _host_and_port(address: str) -> tuple[str, int] | None:
    found = re.fullmatch(r"(?:ray://)?(\[[0-9a-fA-F:.]+\]|[^\s/:\[\]]+):(\d{1,5})", address)
    return (found[1].strip("[]"), int(found[2])) if found else None


def _reason(error: Any) -> BaseException:
    """Return what ended a worker's task, as it was raised there."""
    if "failed to import on the worker" in str(error):
        return ConfigError(
            "a node of the cluster cannot import turncoat: install the same versions there as here "
            f"({str(error).strip().splitlines()[-1]})"
        )
    cause: BaseException = error.cause
    return cause


def _name(unit: Unit) -> str:
    if isinstance(unit, Training):
        who = unit.attack or ("shadow model" if unit.shadow is not None else "honest")
        return f"the training ({unit.defence}, {who}, seed {unit.seed})"
    return f"the attack ({unit.attack} at {unit.seat}, {unit.defence}, seed {unit.seed})"


def _mark(meeting: Path, unit: Unit) -> Path:
    """Return where it is noted which node has a unit."""
    return meeting / f"{unit.key}.node"


def _marks(audit: Audit) -> dict[str, str]:
    """Return what must be the same on all machines, for their figures to be so."""
    described = fingerprint(
        [*audit.federations.values()],
        [entry.trial for entry in audit.entries.values()],
        audit.task.model,
        audit.task.metric,
    )
    return {
        "turncoat": own_code(),
        "PyTorch": torch.__version__.partition("+")[0],
        "your own code": described,
    }


def _wait_for(path: Path) -> None:
    """Wait until a network file system shows here what was written there."""
    limit = time.monotonic() + _FOLDER_SECONDS
    while not path.exists():
        if time.monotonic() > limit:
            raise FolderUnusable(
                f"a node wrote {path}, and it is not here: put --out on storage that all nodes and "
                "this machine share, under the same path"
            )
        time.sleep(0.2)


# In a worker


_here: tuple[Path, Fixed] | None = None


def _in_worker(sent: _Sent, unit: Unit) -> tuple[tuple[Any, float], Path | None]:
    """Do a unit; return what became of it, and what file it left."""
    import ray

    fixed, folder = _entered(sent), sent.meeting.parent
    try:
        _mark(sent.meeting, unit).write_text(ray.get_runtime_context().get_node_id())
    except OSError as error:
        raise FolderUnusable(
            f"node {_own_name()} cannot write to {folder}: {error.strerror or error}: make it "
            "writable from every node; what is finished is kept"
        ) from error
    if isinstance(unit, Training):
        left = fixed.folder.log(unit.key)
        known: Any = (None, 0.0) if fixed.folder.is_trained(unit) else None
    else:
        left = fixed.folder.cell(unit.key)
        known = read_cell(fixed.folder, unit.key)
    result = known or fixed.do(unit)  # known: by a worker that died before it could say so
    return result, left if left.exists() else None


def _entered(sent: _Sent) -> Fixed:
    """Return what all units share, when it is sure that it means here what it means there."""
    global _here
    if _here is not None and _here[0] == sent.meeting:
        return _here[1]
    import ray

    os.environ.update(QUIET)
    one_thread()
    keep_memory()
    limit = time.monotonic() + _FOLDER_SECONDS / 4
    while not sent.meeting.is_dir():
        if time.monotonic() > limit:
            raise FolderUnusable(
                f"node {_own_name()} does not see {sent.meeting.parent} as the machine does that "
                "runs the audit: put --out on storage that all nodes share, under the same path"
            )
        time.sleep(0.2)
    brought.take_up(sent.meeting / "brought")
    fixed: Fixed
    fixed, due = ray.cloudpickle.loads(ray.get(sent.fixed))
    different = [name for name, mark in _marks(fixed.audit).items() if mark != due[name]]
    if different:
        raise ConfigError(
            f"node {_own_name()} would compute other figures: it has other versions of "
            f"{', '.join(different)}: install the same on every node as here"
        )
    _here = (sent.meeting, fixed)
    return fixed


def _own_name() -> str:
    import ray

    return f"{ray.get_runtime_context().get_node_id()[:8]} ({platform.node()})"

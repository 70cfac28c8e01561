"""The process whose forks run apps, and how to start it.

It has imported Flower and PyTorch and nothing of any app, and every run is a fork of it: no
global, seed or patch outlives a run, and none pays for the imports again.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from turncoat.flower.loading import mirror

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "PYTHONDONTWRITEBYTECODE": "1",
    "OMP_NUM_THREADS": "1",
}
_POLL_SECONDS = 0.02
_COMMON = ("turncoat.flower.rehearsal", "sklearn.datasets", "sklearn.model_selection")


@contextmanager
def company() -> Iterator[Callable[..., Iterator[tuple[int, int]]]]:
    """Start the process whose forks run apps; yield what hands it tasks.

    Telemetry, the update check, run-time installs and Ray's usage statistics are off in it.
    """
    with tempfile.TemporaryDirectory() as home:
        started: list[subprocess.Popen[str]] = []

        def hand(
            tasks: Sequence[Mapping[str, Any]], num_jobs: int, timeout_seconds: float | None
        ) -> Iterator[tuple[int, int]]:
            if not started:
                started.append(_start(home))
            pipe_in, pipe_out = started[0].stdin, started[0].stdout
            assert pipe_in is not None and pipe_out is not None
            request = {"tasks": tasks, "num_jobs": num_jobs, "timeout_seconds": timeout_seconds}
            pipe_in.write(json.dumps(request) + "\n")
            pipe_in.flush()
            for _ in tasks:
                line = pipe_out.readline()
                if not line:
                    raise RuntimeError("the process that runs the app died: is Flower installed?")
                number, code = json.loads(line)
                yield number, code

        try:
            yield hand
        finally:
            for process in started:
                process.terminate()  # it takes its forks along
                process.communicate()


def _start(home: str) -> subprocess.Popen[str]:
    environment = {**os.environ, **QUIET, "FLWR_HOME": home}
    environment.setdefault("MPLBACKEND", "Agg")
    return subprocess.Popen(
        [sys.executable, "-m", "turncoat.flower.company"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        text=True,
        start_new_session=True,
    )


def _play(task: Mapping[str, Any]) -> None:
    """Do one task in this process, which is a fork: ``{"call", "job", "folder", "out"}``."""
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "app"
        mirror(Path(task["folder"]), target)
        os.chdir(target)
        sys.path.insert(0, str(target))
        module, _, name = task["call"].partition(":")
        result = getattr(importlib.import_module(module), name)(task["job"])
        out = Path(task["out"])
        draft = out.with_suffix(".part")
        draft.write_text(json.dumps(result), encoding="utf-8")
        os.replace(draft, out)
        os.chdir("/")


def _fork(task: Mapping[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        log = os.open(task["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        torch.set_num_threads(1)
        try:
            _play(task)
            code = 0
        except BaseException:
            traceback.print_exc()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    finally:
        os._exit(code)


def warm_up() -> None:
    """Import once what every fork would import again: PyTorch puts off a second's worth of it."""
    for module in _COMMON:
        importlib.import_module(module)
    torch.set_num_threads(1)
    leaf = torch.zeros(1, requires_grad=True)
    leaf.grad = torch.zeros(1)  # no backward: autograd must not be awake when it is forked
    torch.optim.SGD([leaf], lr=0.1, momentum=0.9).step()


def serve() -> None:
    """Read lists of tasks, a line each; say which is done, and with which exit code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    warm_up()
    running: dict[int, tuple[int, float]] = {}
    try:
        for line in sys.stdin:
            request = json.loads(line)
            _serve(request["tasks"], running, request["num_jobs"], request["timeout_seconds"])
    finally:
        for pid in running:
            _end(pid)


def _serve(
    tasks: Sequence[Mapping[str, Any]],
    running: dict[int, tuple[int, float]],
    num_jobs: int,
    timeout_seconds: float | None,
) -> None:
    waiting = list(enumerate(tasks))
    while waiting or running:
        while waiting and len(running) < num_jobs:
            number, task = waiting.pop(0)
            running[_fork(task)] = (number, time.monotonic())
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            number, _ = running.pop(pid)
            print(json.dumps([number, os.waitstatus_to_exitcode(status)]), flush=True)
            continue
        for child, (_, began) in running.items():
            if timeout_seconds is not None and time.monotonic() - began > timeout_seconds:
                _end(child)
        time.sleep(_POLL_SECONDS)


def _end(pid: int) -> None:
    """End a fork and whatever it started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


if __name__ == "__main__":
    serve()

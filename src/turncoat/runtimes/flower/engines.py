"""A whole run on Flower, in this process or in Flower's simulation on Ray."""

from __future__ import annotations

import logging
import os
import pickle
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from turncoat.federation import Federation
from turncoat.runtimes.seat import Engine, Seats
from turncoat.runtimes.simulate import Run, simulate
from turncoat.task import Task

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""What keeps Flower and Ray from calling home and from installing anything."""

_NOWHERE = "http://127.0.0.1:9"
_SHUT_IN = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # which is: take 127.0.0.1 for this node's address
    "RAY_USAGE_STATS_REPORT_URL": _NOWHERE,
    "http_proxy": _NOWHERE,
    "https_proxy": _NOWHERE,
    "no_proxy": "127.0.0.1,localhost,::1",
}
"""What keeps Ray on this machine. With its statistics off it still says so to its makers, and asks
whether it runs in a cloud: both go to a port where nobody listens."""


def hush() -> None:
    """Switch off telemetry, update checks and run-time installs, here and in every child."""
    os.environ.update(QUIET)


def in_process(federation: Federation[Any, Any], task: Task, **options: Any) -> Run:
    """Run what ``simulate`` runs, with the same options, as a Flower app in this process."""
    hush()
    from turncoat.flower.grid import InProcessGrid
    from turncoat.runtimes.flower.node import client_app
    from turncoat.runtimes.flower.nodes import Nodes

    def engine(seats: Seats) -> Engine:
        grid = InProcessGrid(client_app(lambda context: seats), len(seats.task.clients))
        return Nodes(seats, grid)

    options.pop("num_processes", None)
    return simulate(federation, task, engine=engine, **options)


def on_ray(
    federation: Federation[Any, Any], task: Task, *, num_processes: int = 2, **options: Any
) -> Run:
    """Run what ``simulate`` runs in Flower's simulation, by ``num_processes`` workers of Ray."""
    hush()
    with shut_in():
        return _on_ray(federation, task, num_processes, options)


def _on_ray(
    federation: Federation[Any, Any], task: Task, num_processes: int, options: dict[str, Any]
) -> Run:
    from flwr.app import Context
    from flwr.serverapp import Grid, ServerApp
    from flwr.simulation import run_simulation

    from turncoat.runtimes.flower.node import client_app
    from turncoat.runtimes.flower.nodes import Nodes

    runs: list[Run] = []
    server = ServerApp()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="turncoat-") as folder:

        @server.main()
        def main(grid: Grid, context: Context) -> None:
            def engine(seats: Seats) -> Engine:
                (Path(folder) / "seats").write_bytes(pickle.dumps(seats))
                return Nodes(seats, grid)

            runs.append(simulate(federation, task, engine=engine, **options))

        run_simulation(
            server,
            client_app(partial(_lent, Path(folder) / "seats")),
            len(task.clients),
            backend_config={
                "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
                # "local": never the cluster that happens to run here, which is not shut in
                "init_args": {"address": "local", "num_cpus": num_processes},
            },
        )
    return runs[0]


@contextmanager
def shut_in() -> Iterator[None]:
    """Keep what Ray starts meanwhile on this machine."""
    before = {name: os.environ.get(name) for name in _SHUT_IN}
    os.environ.update(_SHUT_IN)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _lent(path: Path, context: Any) -> Seats:
    return _read_once(path)


@lru_cache(maxsize=1)
def _read_once(path: Path) -> Seats:
    """Return the seats that this machine's own server left, as worker processes do everywhere."""
    seats: Seats = pickle.loads(path.read_bytes())
    return seats

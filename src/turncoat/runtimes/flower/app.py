"""The two halves of an exported app, for `flwr run`: in a simulation, or on a deployment.

Server and nodes build the federation from the same TOML file, which travels in the app's bundle;
the run config says which defence, attack and seed of it. Whatever happened is in ``run.json``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from turncoat.audit import shown_score
from turncoat.coalition import Coalition
from turncoat.config import ConfigError, load
from turncoat.federation import Federation
from turncoat.plan import Audit, aimed
from turncoat.runtimes.flower import node
from turncoat.runtimes.flower.engines import hush
from turncoat.runtimes.flower.nodes import Nodes, Patience
from turncoat.runtimes.saved import State, write_state
from turncoat.runtimes.seat import Seats
from turncoat.runtimes.simulate import Played, one_thread, simulate
from turncoat.stage import Broadcast, Plan
from turncoat.trial import Sabotage, Trial
from turncoat.validate import nearest

RUN_CONFIG: dict[str, Any] = {
    "defence": "none",
    "attack": "",
    "seed": 0,
    "rounds": 0,
    "set": "",
    "join-seconds": 120.0,
    "reply-seconds": 600.0,
    "out": "",
}
"""What `flwr run --run-config` may set: names of the file's tables; 0 rounds means as many as the
file says; ``set`` overrides keys of the file, several apart by ``;``; ``out`` is the server's
folder for results."""


@dataclass(frozen=True)
class Chosen:
    """One run of those that a file describes."""

    audit: Audit
    defence: str
    attack: str
    seed: int
    num_rounds: int

    @property
    def federation(self) -> Federation[Any, Any]:
        return self.audit.federations[self.defence]

    @property
    def coalition(self) -> Coalition[Any] | None:
        return self._trial.coalition if self.attack else None

    @property
    def server(self) -> Broadcast | None:
        return self._trial.server if self.attack else None

    @property
    def seats(self) -> Seats:
        task = self.audit.task
        plan = Plan(self.num_rounds, task.sizes, task.model)
        planned = self.federation.planned(plan)
        return Seats(planned, task, self.coalition, self.seed)

    @property
    def _trial(self) -> Any:
        trial = self.audit.entries[self.attack].trial
        if isinstance(trial, Trial):
            return aimed(self.audit, self.federation, trial, self.seed)
        return trial


def server_app(file: Path) -> ServerApp:
    """Return the server of the federation that a file describes."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        hush()
        with one_thread():
            _serve(file, grid, context)

    return app


def client_app(file: Path) -> ClientApp:
    """Return the client of the federation that a file describes."""

    def seats_of(context: Context) -> Seats:
        hush()
        own = str(context.node_config.get("set", ""))
        return _seats(file, json.dumps(_known(context.run_config)), own)

    return node.client_app(seats_of)


@cache
def _seats(file: Path, run_config: str, own: str) -> Seats:
    return chosen(file, json.loads(run_config), own).seats


def chosen(file: Path, run_config: Mapping[str, Any], own: str = "") -> Chosen:
    """Return the run that a run config chooses.

    Args:
        own: Overrides of this participant alone, such as where its data lie.
    """
    overrides = [part.strip() for text in (run_config["set"], own) for part in text.split(";")]
    audit = load(file, overrides=[part for part in overrides if part])
    defence, attack = str(run_config["defence"]), str(run_config["attack"])
    if defence not in audit.federations:
        raise ConfigError(
            f"{file.name} has no defence {defence!r}; {nearest(defence, audit.federations)}"
        )
    active = {n for n, e in audit.entries.items() if isinstance(e.trial, Sabotage)}
    if attack and attack not in active:
        raise ConfigError(
            f"{file.name} has no active attack {attack!r}; {nearest(attack, [*active, ''])}"
        )
    num_rounds = int(run_config["rounds"]) or audit.num_rounds
    return Chosen(audit, defence, attack, int(run_config["seed"]), num_rounds)


def _serve(file: Path, grid: Grid, context: Context) -> None:
    config = _known(context.run_config)
    run = chosen(file, config)
    out = Path(str(config["out"]) or f"turncoat-{context.run_id}").resolve()
    out.mkdir(parents=True, exist_ok=True)
    patience = Patience(float(config["join-seconds"]), float(config["reply-seconds"]))
    log: list[Played] = []
    record: dict[str, Any] = {"defence": run.defence, "attack": run.attack, "seed": run.seed}
    record |= {"completed": False, "reason": None, "rounds": []}

    def on_round(state: State, played: Played) -> None:
        log.append(played)
        score = shown_score(run.federation, run.audit.task, state.params, run.seed)
        metric = run.audit.task.metric.__name__
        print(_said(played, f"{metric} {score:.4f}"), flush=True)
        record["rounds"].append(asdict(played) | {metric: score})
        _write(out / "run.json", record)

    try:
        done = simulate(
            run.federation,
            run.audit.task,
            num_rounds=run.num_rounds,
            seed=run.seed,
            coalition=run.coalition,
            server=run.server,
            on_round=on_round,
            engine=lambda seats: Nodes(seats, grid, patience, memory_stays=True),
        )
        if log and all(p.aborted for p in log):
            raise RuntimeError(f"every round was aborted: {log[-1].incidents[-1].what}")
    except BaseException as error:
        record["reason"] = f"{type(error).__name__}: {error}"
        _write(out / "run.json", record)
        print(f"turncoat: the run stopped: {record['reason']}", flush=True)
        raise
    params = done.state.params.cpu().numpy().tobytes()
    record |= {"completed": True, "sha256": hashlib.sha256(params).hexdigest()}
    write_state(out / "state.safetensors", done.state)
    _write(out / "run.json", record)
    print(f"turncoat: completed, sha256 of the model {record['sha256']}", flush=True)


def _known(run_config: Mapping[str, Any]) -> dict[str, Any]:
    return RUN_CONFIG | {k: v for k, v in run_config.items() if k in RUN_CONFIG}


def _said(played: Played, score: str) -> str:
    aborted = ", aborted" if played.aborted else ""
    said = [f"round {played.round + 1}: {played.seconds:.1f} s, {score}{aborted}"]
    for i in played.incidents:
        said.append(f"  {'all' if i.client is None else f'client {i.client}'} {i.what}")
    return "\n".join(said)


def _write(path: Path, record: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=1), encoding="utf-8")

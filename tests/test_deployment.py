"""A SuperLink and three SuperNodes with TLS and authentication on loopback: the same bits, and what
goes wrong there (theorem, sabotage). One deployment for the whole file: two or three minutes.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason="the extra 'flower' is not installed")
pytest.importorskip("cryptography", reason="the extra 'flower' is not installed")
if not Path(sys.executable).with_name("flower-superlink").exists():
    pytest.skip("there is no flower-superlink beside this Python", allow_module_level=True)

from turncoat.brought import import_file
from turncoat.config import load
from turncoat.runtimes.flower.export import export
from turncoat.runtimes.simulate import simulate

EXAMPLE = Path(__file__).parents[1] / "examples" / "deployment"
deploy: Any = import_file(EXAMPLE / "deploy.py")

NAUGHTY = '''
"""A channel that misbehaves as each round of the test wants it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from turncoat.messages import Envelope, Update


@dataclass(frozen=True)
class Naughty:
    """Someone raises, someone sends NaN, then another shape. ``says`` raises in place of all."""

    says: bool = False

    def __call__(self, payload: Update, *, envelope: Envelope) -> Update:
        at = (envelope.round, envelope.sender)
        if at == (0, 0) or (self.says and at in ((0, 1), (1, 0), (1, 2))):
            raise OSError("the disk is full")
        if at == (0, 1):
            return replace(payload, delta=payload.delta * torch.nan)
        if at == (1, 0):
            return replace(payload, delta=torch.zeros(7))
        return payload
'''

NAUGHTY_TOML = """
title = "Three, of whom one misbehaves and one dies"
rounds = 2
[task]
use = "digits"
num_clients = 3
model = "lenet5"
[federation]
train = { use = "local-sgd", lr = 0.1, num_steps = 3, batch_size = 16 }
channel = { use = "naughty.py:Naughty" }
aggregate = "mean"
[attack.sign-flip]
use = "sign-flip"
coalition = { members = { use = "clients", ids = [1] } }
"""


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    deployment = deploy.Deployment(tmp_path_factory.mktemp("deployment"))
    try:
        deployment.up()
        yield deployment
    finally:
        deployment.down()


REFUSED = {
    "a wrong CA": (
        ["--root-certificates", "other-ca.crt", "--auth-supernode-private-key", "node0"],
        "certificate verify failed",
    ),
    "plaintext": (["--insecure"], "Failed to initialize the connection to the SuperLink"),
    "an unknown key": (
        ["--root-certificates", "ca.crt", "--auth-supernode-private-key", "stranger"],
        "Failed to activate SuperNode",
    ),
    "no key": (["--root-certificates", "ca.crt"], "SuperNode authentication is enabled"),
}


@pytest.fixture(scope="module")
def strangers(there: Any) -> dict[str, tuple[int | None, str]]:
    """Some who should not get in: how they ended, and what they said."""
    deploy.make_certificates(there.folder, "other-")
    deploy.make_node_key(there.folder / "stranger")
    processes = {}
    for name, (options, _) in REFUSED.items():
        with (there.folder / f"{name}.log").open("wb") as log:
            processes[name] = subprocess.Popen(
                [
                    deploy.beside_python("flower-supernode"),
                    *options,
                    *("--max-wait-time", "5", "--superlink", f"127.0.0.1:{there.port}"),
                    *("--port", str(deploy.free_port())),
                    *("--node-config", "partition-id=0 num-partitions=3"),
                ],
                cwd=there.folder,
                env=there.environment(),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
    ends = time.monotonic() + 60
    while time.monotonic() < ends and any(p.poll() is None for p in processes.values()):
        time.sleep(0.2)
    ended: dict[str, tuple[int | None, str]] = {}
    for name, process in processes.items():
        ended[name] = process.poll(), (there.folder / f"{name}.log").read_text()
        deploy.end(process.pid, 1)
        process.wait()
    return ended


@pytest.mark.parametrize("who", REFUSED)
def test_a_supernode_that_should_not_get_in_is_refused(
    there: Any, strangers: dict[str, tuple[int | None, str]], who: str
) -> None:
    code, said = strangers[who]
    assert code == 1 and REFUSED[who][1] in said, said


def test_only_those_who_belong_there_are_online(there: Any, strangers: Any) -> None:
    assert there.num_online() == 3


def test_the_example_gives_the_bits_of_simulate_over_tls(there: Any, tmp_path: Path) -> None:
    file = EXAMPLE / "three.toml"
    export(file, tmp_path / "app")
    chosen = {"defence": "median", "attack": "sign-flip", "rounds": 1}
    record = there.run(tmp_path / "app", tmp_path / "out", chosen)
    audit = load(file)
    coalition = audit.entries["sign-flip"].trial.coalition
    alone = simulate(
        audit.federations["median"], audit.task, num_rounds=1, seed=0, coalition=coalition
    )
    assert record["sha256"] == _sha256(alone)
    assert not any(p["incidents"] for p in record["rounds"])


def test_what_goes_wrong_in_a_round_is_told_and_survived(there: Any, tmp_path: Path) -> None:
    """One run: a node raises, sends NaN, sends another shape, and one is killed."""
    (tmp_path / "naughty.py").write_text(NAUGHTY)
    file = tmp_path / "naughty.toml"
    file.write_text(NAUGHTY_TOML)
    export(file, tmp_path / "app")
    out = tmp_path / "out"
    killer = threading.Thread(target=_kill_in_round, args=(there, out, 1))
    killer.start()
    try:
        record = there.run(tmp_path / "app", out, {"reply-seconds": 40.0})
    finally:
        killer.join()
    said = [[(i["client"], i["what"]) for i in p["incidents"]] for p in record["rounds"]]
    assert said[0] == [(0, "raised OSError: the disk is full"), (1, "sent NaN or infinity")]
    wrong, (client, why) = said[1]
    assert wrong == (0, "sent shape (7,) where (42794,) is due")
    assert client == 2 and ("did not answer" in why or "error" in why)
    shown = (there.folder / "run.log").read_text()
    assert "client 1 sent NaN or infinity" in shown and "turncoat: completed" in shown
    audit = load(file)
    naughty: Any = audit.federations["none"].channel
    channel = replace(naughty, says=True)
    alone = simulate(
        replace(audit.federations["none"], channel=channel), audit.task, num_rounds=2, seed=0
    )
    assert record["sha256"] == _sha256(alone)


def test_a_run_that_cannot_go_on_says_why_and_ends_with_an_error(
    there: Any, tmp_path: Path
) -> None:
    """After the last test one node is dead, and this federation needs all three."""
    file = tmp_path / "strict.toml"
    strict = NAUGHTY_TOML.replace("[federation]", "[federation]\nmin_clients = 3")
    file.write_text(strict.replace('{ use = "naughty.py:Naughty" }', '"plain"'))
    export(file, tmp_path / "app")
    settings = {"join-seconds": 30.0, "reply-seconds": 30.0}
    with pytest.raises(
        deploy.DeploymentBroke, match=r"TooFewClients: round 0: 2 of 3 clients sent"
    ):
        there.run(tmp_path / "app", tmp_path / "out", settings)


SECAGG = '''
"""SecAgg+ between nodes, one of which is killed while it shares its secrets."""

import os
import signal

import numpy as np
from flwr.client import NumPyClient
from flwr.client.mod import secaggplus_mod
from flwr.clientapp import ClientApp
from flwr.common import ndarrays_to_parameters
from flwr.server import LegacyContext, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow
from flwr.serverapp import ServerApp

from turncoat.flower import Watched

server = ServerApp()


@server.main()
def main(grid, context):
    start = ndarrays_to_parameters([np.zeros(1, np.float32)])
    strategy = FedAvg(fraction_evaluate=0.0, initial_parameters=start)
    workflow = Watched(SecAggPlusWorkflow(1.0, 1.0, timeout=25.0))
    legacy = LegacyContext(context, ServerConfig(num_rounds=1), strategy)
    DefaultWorkflow(fit_workflow=workflow)(grid, legacy)


class Client(NumPyClient):
    def fit(self, parameters, config):
        return parameters, 1, {}


def dies(message, context, call_next):
    stage = message.content.config_records["secaggplus_configs"]["stage"]
    if stage == "share_keys" and context.node_config["partition-id"] == 1:
        with open(context.run_config["pid-file"]) as file:
            os.killpg(int(file.read()), signal.SIGKILL)
    return call_next(message, context)


client = ClientApp(client_fn=lambda context: Client().to_client(), mods=[dies, secaggplus_mod])
'''

SECAGG_TOML = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "sealed"
version = "1.0.0"
license = "Apache-2.0"
[tool.hatch.build.targets.wheel]
packages = ["."]
[tool.flwr.app]
publisher = "example"
[tool.flwr.app.components]
serverapp = "sealed:server"
clientapp = "sealed:client"
[tool.flwr.app.config]
pid-file = ""
"""


def test_a_secagg_that_halts_stops_the_run_with_its_reason(there: Any, tmp_path: Path) -> None:
    """Of the nodes that are left, one is killed between the stages."""
    pids = [int(file.read_text()) for file in there.folder.glob("supernode*.pid")]
    left = sum(map(deploy.alive, pids))
    app = tmp_path / "sealed"
    app.mkdir()
    (app / "sealed.py").write_text(SECAGG)
    (app / "pyproject.toml").write_text(SECAGG_TOML)
    victim = (there.folder / "supernode1.pid").resolve()
    with pytest.raises(deploy.DeploymentBroke) as broke:
        there.play(app, {"pid-file": str(victim)}, 180.0)
    assert str(broke.value).startswith("finished:failed: ")
    halted = f"SecAgg+ halted when sharing secrets: {left - 1} of {left} nodes answered"
    assert halted in str(broke.value)
    assert not deploy.alive(int(victim.read_text()))


def _kill_in_round(there: Any, out: Path, round: int) -> None:
    ends = time.monotonic() + 200
    while time.monotonic() < ends:
        try:
            done = len(json.loads((out / "run.json").read_text())["rounds"])
        except (OSError, ValueError):  # not there yet, or half written
            done = 0
        if done == round:
            break
        time.sleep(0.1)
    else:
        raise AssertionError(f"the run never came to round {round}: nothing was killed in it")
    os.killpg(int((there.folder / "supernode2.pid").read_text()), signal.SIGKILL)


def _sha256(run: Any) -> str:
    return hashlib.sha256(run.state.params.numpy().tobytes()).hexdigest()

"""An audit on a Ray cluster of two nodes on this machine (theorem, sabotage): the same cells, both
nodes at work, and what ends, dies or is not there on the way.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.test_audit import audit_of, without_seconds
from turncoat import brought
from turncoat.audit import Fixed
from turncoat.cli import Exit, app
from turncoat.config import ConfigError
from turncoat.record import AuditFolder, FolderUnusable
from turncoat.task import Task

pytest.importorskip("ray", reason="the extra 'ray' is not installed")

from turncoat.runtimes import cluster
from turncoat.runtimes.flower.engines import QUIET, shut_in

HERE = '''
"""A training that notes its node, waits for another node's, and may take its worker with it."""

from dataclasses import dataclass
from pathlib import Path
import os
import time

import ray
import torch

from beside import HOW_LONG
from turncoat.messages import Envelope, Update
from turncoat.stages.train.local import LocalSGD
from turncoat.task import Batch, Model


@dataclass(frozen=True)
class Noting:
    inner: LocalSGD
    notes: str
    dies: bool = False

    def __call__(
        self,
        model: Model,
        start: torch.Tensor,
        data: Batch,
        *,
        rng: torch.Generator,
        envelope: Envelope,
    ) -> Update:
        if ray.is_initialized() and envelope.sender == 0:
            node = ray.get_runtime_context().get_node_id()
            (Path(self.notes) / node).write_text(str(os.getpid()))
            limit = time.monotonic() + 30
            while len([*Path(self.notes).iterdir()]) < 2 and time.monotonic() < limit:
                time.sleep(0.05)
            time.sleep(HOW_LONG)
            while Path(self.notes).with_name("hold").exists():
                time.sleep(0.05)
            if self.dies:
                os._exit(1)
        return self.inner(model, start, data, rng=rng)
'''

TOML = """
title = "small"
rounds = 2
seeds = 4
[task]
use = "digits"
num_clients = 3
per_client = 20
model = { use = "mlp", hidden = [8] }
[federation]
train = { use = "here.py:Noting", notes = "NOTES", inner = { use = "local-sgd", lr = 0.5 } }
channel = "plain"
aggregate = "mean"
[coalition]
members = { use = "clients", ids = [1] }
[attack.sign-flip]
use = "sign-flip"
scale = 3.0
[attack.loss]
use = "loss-threshold"
seats = ["user"]
"""


CLUSTER = """
import sys
from ray.cluster_utils import Cluster

head = {"num_cpus": 1, "include_dashboard": False}
cluster = Cluster(initialize_head=True, connect=False, head_node_args=head)
second = cluster.add_node(num_cpus=1, wait=False)
print(cluster.address, flush=True)
print(second.node_id, flush=True)
if sys.stdin.readline():
    cluster.remove_node(second, allow_graceful=False)
    print("the second is gone", flush=True)
    sys.stdin.readline()
cluster.shutdown()
"""


class TwoNodes:
    """A cluster of two nodes of one CPU each, and an audit for it."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-W", "ignore", "-c", CLUSTER]  # Ray leaves files open behind it
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, **pipes)
        self.address, self.second = self.told(), self.told()
        self.folder, self.notes = folder, folder / "notes"
        self.notes.mkdir()
        (folder / "here.py").write_text(HERE)
        (folder / "beside.py").write_text("HOW_LONG = 0.3")
        self.file = folder / "small.toml"
        self.file.write_text(TOML.replace("NOTES", str(self.notes)))

    def told(self) -> str:
        assert self.process.stdout is not None
        return str(self.process.stdout.readline()).strip()

    def kill_the_second(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("kill\n")
        self.process.stdin.flush()
        assert self.told() == "the second is gone"

    def forget(self) -> None:
        for note in self.notes.iterdir():
            note.unlink()

    def start(self, out: Path, *options: str) -> subprocess.Popen[str]:
        command = ["audit", str(self.file), "--out", str(out), *options]
        return subprocess.Popen(
            [sys.executable, "-c", "from turncoat.cli import main; main()", *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.folder,
        )

    def on_both(self, out: Path, *options: str) -> subprocess.Popen[str]:
        return self.start(out, "--executor", "ray", "--address", self.address, *options)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoNodes]:
    with pytest.MonkeyPatch.context() as patch, shut_in():
        for name, value in QUIET.items():
            patch.setenv(name, value)
        there = TwoNodes(tmp_path_factory.mktemp("cluster"))
        try:
            yield there
        finally:
            there.process.communicate(timeout=60)


@pytest.fixture(scope="module")
def alone(two: TwoNodes) -> list[dict[str, Any]]:
    """The cells of the same audit on this machine."""
    out = two.folder / "alone"
    done = CliRunner().invoke(app, ["audit", str(two.file), "--out", str(out), "--jobs", "1"])
    assert done.exit_code == 0, done.output
    return without_seconds(out)


def ended(running: subprocess.Popen[str], code: int) -> str:
    said, _ = running.communicate(timeout=240)
    assert running.returncode == code, said
    return said


def finished(out: Path) -> dict[Path, int]:
    """Return what is finished in an audit's folder, and when it was written."""
    files = [*out.glob("trainings/*.json"), *out.glob("cells/*.json")]
    return {path: path.stat().st_mtime_ns for path in files}


def trains_at(out: Path) -> dict[str, str]:
    """Return the trainings under way, and the node of each."""
    planned = {t["key"] for t in json.loads((out / "plan.json").read_text())["trainings"]}
    marks = {m.stem: m.read_text() for m in out.glob(".cluster-*/*.node")}
    return {key: marks[key] for key in marks.keys() & planned - {f.stem for f in finished(out)}}


def runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_for(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.05)


def test_a_unit_that_takes_its_worker_along_is_tried_elsewhere_and_then_stops_the_run(
    two: TwoNodes,
) -> None:
    said = ended(
        two.on_both(two.folder / "dead", "--seeds", "1", "--set", "federation.train.dies=true"),
        Exit.WORKER_DIED,
    )
    assert "lost its worker on node" in said and "it is tried again" in said
    assert "what is finished is kept" in said and "(it was tried 3 times)" in said
    assert len([*two.notes.iterdir()]) == 2


def test_who_interrupts_and_kills_a_node_gets_the_same_cells_and_computes_none_twice(
    two: TwoNodes, alone: list[dict[str, Any]]
) -> None:
    out = two.folder / "both"
    two.forget()
    running = two.on_both(out)
    wait_for(lambda: len(finished(out)) >= 2)
    running.send_signal(signal.SIGINT)
    ended(running, Exit.INTERRUPTED)
    assert not [*out.glob(".cluster-*")]
    first = finished(out)
    assert 2 <= len(first) < 16 and len([*two.notes.iterdir()]) == 2

    two.forget()
    hold = two.folder / "hold"
    hold.touch()  # what is under way does not end until its worker has died
    running = two.on_both(out)
    wait_for(lambda: two.second in trains_at(out).values() and len([*two.notes.iterdir()]) == 2)
    wait_for(lambda: bool((two.notes / two.second).read_text()))
    worker = int((two.notes / two.second).read_text())
    two.kill_the_second()
    wait_for(lambda: not runs(worker))  # which outlives its node by a moment, and may answer
    second = finished(out)
    hold.unlink()
    assert len(second) < 16
    said = ended(running, Exit.DONE)
    assert "lost its worker" in said and "it is tried again" in said
    last = finished(out)
    assert len(last) == 16
    assert first.items() <= second.items() <= last.items()
    assert without_seconds(out) == alone

    again = ["audit", str(two.file), "--out", str(out), "--executor", "ray"]
    done = CliRunner().invoke(app, [*again, "--address", "127.0.0.1:9"])  # whom nobody asks
    assert done.exit_code == Exit.DONE and "0 cells are left to do" in done.output
    assert finished(out) == last


# What is not there


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--address", "127.0.0.1:9"], "nobody answers there (Connection refused)"),
        (["--address", "ray://127.0.0.1:9"], "nobody answers there (Connection refused)"),
        (["--address", "head"], "--address head is no address: give auto, local, host:6379"),
        (["--device", "meta"], "--executor ray works on CPUs"),
        (["--runtime", "flower-ray"], "starts a Ray of its own in each worker"),
        (["--executor", "processes", "--address", "local"], "add --executor ray"),
        (["--executor", "slurm"], "'slurm' is not one of 'processes', 'ray'"),
    ],
)
def test_what_cannot_be_is_refused_with_a_cure(
    options: list[str], said: str, tmp_path: Path
) -> None:
    tried = ["audit", "--out", str(tmp_path / "out"), "--executor", "ray", *options]
    done = CliRunner().invoke(app, tried, env={"COLUMNS": "200"})
    assert done.exit_code == Exit.BAD_INPUT and said in done.output, done.output


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs ray, .*: pip install 'turncoat\[ray\]'"):
        cluster.on_cluster("auto")


def test_whoever_else_listens_at_an_address_is_not_taken_for_ray() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            with server.accept()[0] as there:
                there.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
                there.recv(1000)

        listening = threading.Thread(target=answer)
        listening.start()
        with pytest.raises(ConfigError, match="what answers there is not Ray: start a cluster"):
            cluster._knock(f"127.0.0.1:{server.getsockname()[1]}")
        listening.join()


@pytest.fixture
def lent(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a worker gets, without a cluster: an audit and a meeting point."""
    import ray

    audit = audit_of(task)
    meeting = tmp_path / "out" / ".cluster-1"
    brought.lay_out(meeting / "brought")
    fixed = Fixed(audit, AuditFolder(tmp_path / "out"), "cpu")
    cloudpickle: Any = ray.cloudpickle
    whole = cloudpickle.dumps((fixed, cluster._marks(audit)))
    monkeypatch.setattr(ray, "get", lambda reference: reference)
    monkeypatch.setattr(cluster, "_own_name", lambda: "7 (ward-3)")
    monkeypatch.setattr(cluster, "_here", None)
    monkeypatch.setattr(cluster, "_FOLDER_SECONDS", 0.0)
    for name in QUIET:
        monkeypatch.setenv(name, "")
    return cluster._Sent(meeting, whole)


def test_a_worker_that_does_not_see_the_folder_says_so_and_writes_nowhere(
    lent: Any, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere" / lent.meeting.name
    with pytest.raises(FolderUnusable, match=r"node 7 \(ward-3\) does not see .*elsewhere as"):
        cluster._entered(cluster._Sent(elsewhere, lent.fixed))
    assert not elsewhere.parent.exists()
    with pytest.raises(FolderUnusable, match=r"and it is not here: put --out on storage"):
        cluster._wait_for(elsewhere / "cell.json")


@pytest.mark.parametrize("what", ["turncoat", "PyTorch", "your own code"])
def test_a_node_with_other_versions_is_refused(
    lent: Any, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cluster._entered(lent).device == "cpu"
    marks = cluster._marks
    monkeypatch.setattr(cluster, "_here", None)
    monkeypatch.setattr(cluster, "_marks", lambda audit: marks(audit) | {what: "other"})
    with pytest.raises(ConfigError, match=f"other figures: it has other versions of {what}:"):
        cluster._entered(lent)


def test_files_that_were_brought_are_found_by_who_has_them_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TURNCOAT_BROUGHT", "{}")
    monkeypatch.setattr(sys, "path", [*sys.path])
    mine, beside = tmp_path / "mine.py", tmp_path / "shelf.py"
    mine.write_text("from shelf import WHAT")
    beside.write_text("WHAT = 'as it was'")
    name = brought.import_file(mine).__name__
    brought.lay_out(tmp_path / "copies")
    known = os.environ["TURNCOAT_BROUGHT"]
    brought.take_up(tmp_path / "copies")
    assert os.environ["TURNCOAT_BROUGHT"] == known  # what is here is used where it is
    for change in (lambda: beside.write_text("WHAT = 'another'"), mine.unlink):
        change()
        brought.take_up(tmp_path / "copies")
        found = Path(json.loads(os.environ["TURNCOAT_BROUGHT"])[name])
        assert found.parent.parent == tmp_path / "copies"
        code = f"import turncoat.brought, {name} as mine; print(mine.WHAT)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout == "as it was\n", done.stderr

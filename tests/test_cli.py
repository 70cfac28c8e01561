"""The command line, as one who errs uses it: what it says and how it exits (contract, sabotage)."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

from turncoat import audit as auditing
from turncoat.cli import Exit, app
from turncoat.plan import Audit
from turncoat.report.page import write_report

TOML = """
title = "small"
rounds = 2
defences = ["none"]
[task]
use = "digits"
num_clients = 6
train_size = 120
test_size = 100
model = { use = "mlp", hidden = [8] }
[federation]
train = { use = "local-sgd", lr = 0.2 }
channel = "plain"
aggregate = "mean"
[coalition]
members = { use = "clients", ids = [0] }
[attack.loss]
use = "loss-threshold"
seats = ["user"]
[attack.flip]
use = "sign-flip"
[defence.krum]
aggregate = { use = "krum", num_byzantine = 1 }
[defence.masks]
channel = "secure-aggregation"
"""
MAIN = [sys.executable, "-c", "from turncoat.cli import main; main()"]


def written(folder: Path, *changes: tuple[str, str]) -> Path:
    text = TOML
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (folder / "small.toml").write_text(text)
    return folder / "small.toml"


def turncoat(*arguments: str | Path, code: Exit) -> Result:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def audit(file: Path, folder: Path, *more: str, code: Exit = Exit.DONE) -> str:
    return turncoat("audit", file, "--out", folder, "--jobs", "1", *more, code=code).output


def cells(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "cells.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


@pytest.fixture(autouse=True)
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the page, which takes longer than these audits; ``finished`` has one."""
    monkeypatch.setattr("turncoat.cli._report", lambda folder: folder / "report.html")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    said = audit(written(folder), folder / "out")
    assert "• A user of the released model" in said and "out/report.html" in said
    return folder / "out"


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "out")
    return tmp_path / "out"


def test_help_answers_at_once_and_imports_no_torch() -> None:
    code = (
        "import sys, time; began = time.process_time(); import turncoat.cli as c\n"
        "try: c.app(['--help'])\n"
        "except SystemExit: print(time.process_time() - began, 'torch' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, torch = said.stdout.splitlines()[-1].split()
    assert float(seconds) < 1.5 and torch == "False"
    assert "Exit codes" in said.stdout and "130" in said.stdout


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["audit"], "A TOML file, or the name of an audit that comes along; without: digits."),
        (["calibrate"], "A TOML file, or the name of one that comes along."),
        (["explain"], "A TOML file, or the name of an audit that comes along; without: digits."),
        (["list"], "What to list."),
        (["report"], "The folder of an audit."),
        (["flower", "audit"], "The folder of an app: its pyproject.toml."),
        (["flower", "audit"], "The app's model, as module:factory; it lets updates be inverted."),
        (["flower", "export"], "A TOML file of Turncoat's."),
    ],
)
def test_the_help_of_a_command_explains_its_arguments(
    command: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Typer 0.20 loses the help of arguments with click 8.5, and takes ``:word:`` for a picture."""
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 400)
    assert said in turncoat(*command, "--help", code=Exit.DONE).stdout


@pytest.mark.parametrize("kind", ["attacks", "defences", "tasks"])
def test_what_there_is_can_be_read_by_a_program(kind: str) -> None:
    found = json.loads(turncoat("list", kind, "--json", code=Exit.DONE).stdout)
    assert found and all({"name", "place", "summary", "options", "use"} <= f.keys() for f in found)
    assert not any("]_" in f["summary"] or "``" in f["summary"] for f in found)


KRUM = ('defences = ["none"]', 'defences = ["none", "krum"]')
ODD_SEATS = ('use = "sign-flip"', 'use = "sign-flip"\nseats = ["coalition", "user"]')
BLIND = ('seats = ["user"]', 'seats = ["user", "coalition"]')
NEVER = ('use = "sign-flip"', 'use = "sign-flip"\nacts = { use = "once", at = 9 }')
ROUND_9 = (
    'use = "loss-threshold"\nseats = ["user"]',
    'use = "inverting-gradients"\ngame = { use = "reconstruct" }\nat = 9',
)
MASKED = ('defences = ["none"]', 'defences = ["masks | krum"]')
BAD: dict[str, tuple[list[tuple[str, str]], str]] = {
    "an unknown key": ([("rounds", "roundz")], "has no key 'roundz'; did you mean 'rounds'?"),
    "a misspelt attack": ([("loss-th", "los-th")], "did you mean 'loss-threshold'?"),
    "a number out of range": (
        [("lr = 0.2", "lr = -1.0")],
        "error: small.toml: [federation.train]: LocalSGD: lr must be positive; it is -1.0",
    ),
    "a coalition of everyone": ([("[0]", "[0, 1, 2, 3, 4, 5]")], "is everyone: 6 of 6 clients"),
    "num_byzantine too large": (
        [KRUM, ("num_byzantine = 1", "num_byzantine = 2")],
        "[defence.krum]: Krum(num_byzantine=2, num_neighbours=None) needs at least 7 messages "
        "(2f + 3); the cohort has 6: lower num_byzantine or sample more clients",
    ),
    "a cohort too small for a rule": (
        [KRUM, ('"plain"', '"plain"\nsample = { use = "fixed-sample", num_sampled = 4 }')],
        "needs at least 5 messages (2f + 3); the cohort has 4",
    ),
    "min_clients too large": ([('"plain"', '"plain"\nmin_clients = 7')], "a round has 6 at most"),
    "secure aggregation with krum": (
        [MASKED],
        "Krum(num_byzantine=1, num_neighbours=None) must read each client's update (Clear), but "
        "SecureAggregation(",
    ),
    "a round that is not": ([ROUND_9], "is at round 9, but the rounds are 0 to 1"),
    "an attack that never acts": ([NEVER], "'flip' never happens: Once(at=9) is in none of the"),
    "a seat that is not the attack's": ([ODD_SEATS], "is played by the coalition alone"),
    "a seat that watches nothing": (
        [BLIND],
        "[attack.loss.seats]: LossThreshold watches, and nothing is watched at the seat "
        "'coalition': name server, client, peer, user or neighbour, or leave 'seats' out",
    ),
    "a stage that is missing": (
        [('channel = "plain"', "")],
        "[federation] lacks the stage 'channel': name one, such as 'plain'",
    ),
    "a stage in another's place": (
        [('channel = "plain"', 'channel = "median"')],
        "Median() cannot stand at channel, the place that dresses a payload: it takes (messages: "
        "collections.abc.Sequence[turncoat.messages.Clear]); put it at aggregate",
    ),
    "a file that is not there": (
        [('"loss-threshold"', '"mine.py:Mine"')],
        "small.toml: [attack.loss]: there is no file ",
    ),
    "a seed twice": ([("rounds = 2", "rounds = 2\nseeds = [0, 0]")], "names one seed twice"),
    "no seed": ([("rounds = 2", "rounds = 2\nseeds = []")], "names no seed"),
    "seeds in words": ([("rounds = 2", "rounds = 2\nseeds = 'x'")], "say how many, or list them"),
    "a column twice": (
        [('"none"]', '"none", "masks|krum", "masks | krum"]')],
        "names one thing twice",
    ),
    "none with another": ([('["none"]', '["none | krum"]')], "'none' cannot be combined"),
    "an unreadable name": ([("[attack.flip]", '[attack."a\\nb"]')], "letters that can be read"),
    "an empty attack": ([('use = "sign-flip"', "")], "[attack.flip] lacks the key 'use'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_before_anything_is_trained(name: str, tmp_path: Path) -> None:
    changes, said = BAD[name]
    file = written(tmp_path, *changes)
    for result in (
        audit(file, tmp_path / "out", code=Exit.BAD_INPUT),
        turncoat("explain", file, code=Exit.BAD_INPUT).output,
    ):
        assert said in result and "Traceback" not in result
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere.toml"], "there is no file nowhere.toml: give a TOML file, or no name at all"),
        (["digitz"], "no audit of that name comes along: give a TOML file, or one of digits"),
        (["."], "cannot be read: Is a directory: give a TOML file"),
        (["--set", "rounds"], "--set 'rounds' is not of the form key.of.a.table=value"),
        (["--set", "rounds=0"], "[rounds] = 0: it must be at least 1"),
        (["--set", "title.x=1"], "'title' is a value and has no keys"),
        (["--seeds", "0"], "0 is not in the range"),
        (["--jobs", "0"], "0 is not in the range"),
        (["--device", "warp"], "--device warp: "),
    ],
)
def test_a_bad_command_is_refused_in_words(arguments: list[str], said: str, tmp_path: Path) -> None:
    file = [] if not arguments[0].startswith("-") else [str(written(tmp_path))]
    result = turncoat("audit", *file, *arguments, "--out", tmp_path / "o", code=Exit.BAD_INPUT)
    assert said in result.output


def test_a_gpu_that_is_not_there_is_said_to_be(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    said = audit(written(tmp_path), tmp_path / "o", "--device", "cuda", code=Exit.BAD_INPUT)
    assert "--device cuda: " in said and "use cpu" in said


def test_a_file_of_another_editor_is_read_too(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_bytes(b"\xef\xbb\xbf" + TOML.replace("\n", "\r\n").encode())
    turncoat("explain", tmp_path / "a.toml", code=Exit.DONE)
    (tmp_path / "a.toml").write_bytes(TOML.replace("small", "klär").encode("latin-1"))
    said = turncoat("explain", tmp_path / "a.toml", code=Exit.BAD_INPUT).output
    assert "is no text in UTF-8" in said and "save it as UTF-8" in said


TASK = TOML[TOML.index('use = "digits"') : TOML.index("[federation]")]
OWN = """
import torch
from torch import nn
from turncoat.task import Model, Task

def build():
    return nn.Linear(4, 3)

def some(n):
    return torch.rand(n, 4), torch.arange(n) % 3

def make_task():
    clients = [some(9) for _ in range(6)]
    test = some(9)
    {line}
    return Task("own", Model(build), clients, test)
"""
TASKS = {
    "def make_task():\n    return {}['x']": "[task]: KeyError: 'x' (mine.py, line 2)",
    "def make_task(:\n    pass": "SyntaxError: invalid syntax (mine.py, line 1)",
    "import nonesuch": "No module named 'nonesuch' (mine.py, line 1)",
    "import sys\ndef make_task():\n    sys.exit(3)": "SystemExit: 3 (mine.py, line 3)",
    "def make_task():\n    open('/none')": "No such file or directory: '/none' (mine.py, line 2)",
    "def make_task():\n    pass": "made None and no Task",
    "def make_tusk():\n    pass": "has no 'make_task'; did you mean 'make_tusk'?",
    OWN.format(line="clients[2][1][3] = 12"): (
        "labels of client 2 run from 0 to 12, but the model of 'own' has 3 outputs: number the "
        "classes 0 to 2"
    ),
    OWN.format(line="test = test[0][:, 1:], test[1]"): "cannot read a test example of shape (3,)",
    OWN.format(line="test = some(0)"): "'own' has no test examples: hold some out",
    OWN.format(line="clients = []"): "'own' has no clients with examples: add some",
}


@pytest.mark.parametrize("code", TASKS, ids=[v[:40] for v in TASKS.values()])
def test_a_task_of_ones_own_that_is_wrong_is_told_where(code: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(code)
    file = written(tmp_path, (TASK, 'use = "mine.py:make_task"\n'))
    said = audit(file, tmp_path / "out", code=Exit.BAD_INPUT)
    assert TASKS[code] in said and "Traceback" not in said


def test_damaged_data_and_wrong_labels_are_refused(tmp_path: Path) -> None:
    images, labels = np.zeros((40, 8, 8), np.uint8), np.arange(40) % 10
    np.savez(tmp_path / "whole.npz", train_images=images, train_labels=labels)
    whole = (tmp_path / "whole.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "train.parquet").write_bytes(b"PAR1" + bytes(99))
    labels[3] = 12
    named = np.array(list("abcdefghij"))
    np.savez(tmp_path / "far.npz", train_images=images, train_labels=labels, classes=named)
    labels[3] = 10**9  # and no billion of names is made for it
    np.savez(tmp_path / "wild.npz", train_images=images, train_labels=labels)
    (tmp_path / "t.csv").write_text("a,y\n" + "".join(f"{i},{i / 7}\n" for i in range(40)))
    for task, said in {
        'use = "npz"\npath = "cut.npz"': "cut.npz cannot be read: it is truncated, or no npz",
        'use = "npz"\npath = "far.npz"': "labels from 0 to 12, but there are 10 classes: number",
        'use = "npz"\npath = "wild.npz"': "the largest of 40 labels is 1000000000: number the",
        'use = "npz"\npath = "gone.npz"': "there is no file 'gone.npz': name an npz file",
        'use = "parquet"\nfolder = "."': "train.parquet cannot be read: it is truncated, or no",
        'use = "csv"\npath = "t.csv"\nlabel = "y"': "the label 'y' has 40 classes in 40 rows",
        'use = "csv"\npath = "t.csv"\nlabel = "z"': "t.csv has no column 'z'; it has a, y",
    }.items():
        if "parquet" in task:
            pytest.importorskip("pyarrow")
        file = written(tmp_path, (TASK, f"{task}\nnum_clients = 5\n"))
        assert said in turncoat("explain", file, code=Exit.BAD_INPUT).output


def test_a_broken_attack_is_told_once_and_the_rest_is_done(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\n"
        "from turncoat.trial import Memberships\n"
        "from turncoat.views import ModelView\n"
        "@dataclass(frozen=True)\n"
        "class Broken:\n"
        "    def __call__(self, view: ModelView) -> Memberships:\n"
        "        open('/none')\n"
    )
    file = written(tmp_path, ('"loss-threshold"\n', '"mine.py:Broken"\n'), KRUM)
    said = audit(file, tmp_path / "out", code=Exit.FAILED_CELLS)
    assert said.count("No such file or directory: '/none' (loss at user, none; loss at user,") == 1
    assert [c["status"] for c in cells(tmp_path / "out")] == ["failed", "failed", *["scored"] * 2]


def test_an_attack_that_its_task_does_not_suit_fails_in_words(tmp_path: Path) -> None:
    inversion = 'use = "inverting-gradients"\nnum_steps = 1\ngame = { use = "reconstruct" }\n[x]'
    text = TOML.replace(TASK, 'use = "breast-cancer"\n').replace('use = "sign-flip"', "[x]")
    text = text.replace("[attack.flip]\n[x]", f"[attack.inversion]\n{inversion}").replace("[x]", "")
    (tmp_path / "a.toml").write_text(text)
    said = audit(tmp_path / "a.toml", tmp_path / "out", code=Exit.FAILED_CELLS)
    assert "Reconstruct marks images; 'breast_cancer' has inputs of shape (30,)" in said


def test_a_training_that_diverges_is_a_failure_and_no_defence(tmp_path: Path) -> None:
    file = written(tmp_path, ("lr = 0.2", "lr = 1e30"))
    said = audit(file, tmp_path / "out", code=Exit.FAILED_CELLS)
    assert "0 of 6 clients sent a sound message" in said and "sent NaN or infinity" in said
    assert {c["status"] for c in cells(tmp_path / "out")} == {"failed"}


def test_a_coalition_that_is_never_sampled_is_no_harmless_one(tmp_path: Path) -> None:
    changes = (
        ('"plain"', '"plain"\nsample = { use = "fixed-sample", num_sampled = 1 }'),
        ("ids = [0]", "ids = [3]"),
        ('use = "sign-flip"', 'use = "sign-flip"\nacts = { use = "once", at = 1 }'),
    )
    file = written(tmp_path, *changes)
    assert "cannot be run" in turncoat("explain", file, code=Exit.DONE).output
    said = audit(file, tmp_path / "out", code=Exit.FAILED_CELLS)
    assert "in no round that a member of the coalition is sampled in does it act" in said
    assert [c["status"] for c in cells(tmp_path / "out")] == ["scored", "failed"]


def test_clients_that_are_left_out_are_counted_aloud(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN.format(line="clients[2][0][3] = float('nan')"))
    file = written(tmp_path, (TASK, 'use = "mine.py:make_task"\n'))
    assert "4 times clients were left out of a round" in audit(file, tmp_path / "out")


def test_more_seeds_keep_those_that_are_finished(copied: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in copied.rglob("*/*.json")}
    audit(written(copied.parent), copied, "--seeds", "2")
    assert before and all(p.stat().st_mtime_ns == moment for p, moment in before.items())
    assert [c["seed"] for c in cells(copied)] == [0, 1, 0, 1]


@pytest.mark.parametrize("where", ["small.toml", "small.toml/below"])
def test_a_folder_that_cannot_be_made_is_refused(where: str, tmp_path: Path) -> None:
    said = audit(file := written(tmp_path), file.parent / where, code=Exit.BAD_FOLDER)
    assert "cannot write to" in said and "choose another --out" in said


@pytest.mark.parametrize("where", ["small.toml", "small.toml/app"])
def test_an_app_that_cannot_be_written_is_refused_in_words(where: str, tmp_path: Path) -> None:
    file = written(tmp_path)
    said = turncoat("flower", "export", file, tmp_path / where, code=Exit.BAD_FOLDER).output
    assert "error: cannot write to " in said and "choose another DIR" in said


def test_a_folder_of_something_else_is_refused(copied: Path) -> None:
    file = written(copied.parent)
    said = audit(file, copied, "--set", "rounds=3", code=Exit.BAD_FOLDER)
    assert "holds another audit ('small')" in said and "--update" in said
    (copied.parent / "code" / ".git").mkdir(parents=True)
    said = audit(file, copied.parent / "code", code=Exit.BAD_FOLDER)
    assert "holds '.git' and no audit: choose an empty folder" in said


def test_two_audits_in_one_folder_do_not_mix(copied: Path) -> None:
    with auditing.AuditFolder(copied).locked():
        said = audit(written(copied.parent), copied, code=Exit.BAD_FOLDER)
    assert "another audit is running in" in said


@pytest.mark.parametrize("content", ["{", "{}", "[]", ""])
def test_a_report_of_a_damaged_folder_says_what_to_do(content: str, copied: Path) -> None:
    (copied / "plan.json").write_text(content)
    said = turncoat("report", copied, code=Exit.BAD_FOLDER).output
    assert "plan.json cannot be read" in said and "delete it" in said
    (copied / "plan.json").unlink()
    assert "give the --out" in turncoat("report", copied, code=Exit.BAD_FOLDER).output
    audit(written(copied.parent), copied)
    turncoat("report", copied, code=Exit.DONE)


@pytest.mark.parametrize("content", ["{", "{}", "[]"])
@pytest.mark.parametrize("part", ["cells/*.json", "trainings/*.json"])
def test_damaged_results_count_as_unfinished(part: str, content: str, copied: Path) -> None:
    right = cells(copied)
    for path in copied.glob(part):
        path.write_text(content)
    turncoat("report", copied, code=Exit.DONE)
    audit(written(copied.parent), copied)
    assert cells(copied) == right


def test_a_lost_or_damaged_model_is_trained_again(copied: Path) -> None:
    right = cells(copied)
    for path in copied.glob("cells/*.json"):
        path.unlink()
    for path in copied.glob("trainings/*.safetensors"):
        path.write_bytes(path.read_bytes()[:50])
    said = audit(written(copied.parent), copied, code=Exit.BAD_FOLDER)
    assert "delete it, and it is made again" in said
    for path in copied.glob("trainings/*.safetensors"):
        path.unlink()
    audit(written(copied.parent), copied)
    assert cells(copied) == right


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_ends_an_audit_that_goes_on_after_room_is_made(
    tiny_disk: Path, finished: Path
) -> None:
    file, ballast = written(tiny_disk.parent), tiny_disk / "ballast"
    for kilobytes in (48, 40, 32, 24):  # at the plan, a state, a log or a cell
        ballast.write_bytes(bytes(kilobytes * 1024))
        said = audit(file, tiny_disk / "out", code=Exit.BAD_FOLDER)
        assert "No space left on device" in said and "Traceback" not in said
        assert not list(tiny_disk.rglob("*.tmp"))
    ballast.unlink()
    subprocess.run(["mount", "-o", "remount,size=4m", str(tiny_disk)], check=True)
    audit(file, tiny_disk / "out")
    assert cells(tiny_disk / "out") == cells(finished)


LONG = (("rounds = 2", "rounds = 3000"), ('defences = ["none"]', 'defences = ["none", "masks"]'))


def started(folder: Path, *more: str) -> subprocess.Popen[str]:
    """Start a long audit and return when its two workers are at work."""
    running = subprocess.Popen(
        [*MAIN, "audit", str(written(folder, *LONG)), "--out", str(folder / "out"), *more],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    limit = time.monotonic() + 60
    while len(children(running.pid)) < 2 and time.monotonic() < limit:
        assert running.poll() is None
        time.sleep(0.05)
    return running


def children(process: int) -> list[int]:
    try:
        return [
            int(c) for c in Path(f"/proc/{process}/task/{process}/children").read_text().split()
        ]
    except FileNotFoundError:
        return []


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")
@pytest.mark.parametrize("how", ["interrupted", "killed", "a worker killed"])
def test_whoever_ends_an_audit_leaves_no_worker_behind(how: str, tmp_path: Path) -> None:
    running = started(tmp_path, "--jobs", "2")
    workers = children(running.pid)
    if how == "interrupted":
        os.killpg(running.pid, signal.SIGINT)
    else:
        os.kill(running.pid if how == "killed" else workers[-1], signal.SIGKILL)
    _, said = running.communicate(timeout=10)
    code, words = {
        "interrupted": (Exit.INTERRUPTED, "what is finished is kept, and the same command goes on"),
        "killed": (-signal.SIGKILL, ""),
        "a worker killed": (Exit.WORKER_DIED, "a worker process died, as when memory runs out"),
    }[how]
    assert running.returncode == code and words in said and "Traceback" not in said
    limit = time.monotonic() + 2
    while any(map(alive, workers)) and time.monotonic() < limit:
        time.sleep(0.05)
    assert not any(map(alive, workers))


def test_strange_names_stay_text(tmp_path: Path) -> None:
    name = "<script>alert(1)</script> [red]ü :bomb: 日本 " + "x" * 200
    changes = (('"small"', f'"{name}"'), ("[attack.loss]", f'[attack."{name}"]'))
    said = audit(written(tmp_path, *changes), tmp_path / "out")
    assert name in said
    page = write_report(tmp_path / "out").read_text()
    assert "&lt;script&gt;alert(1)" in page and "<script>alert(1)" not in page


def test_a_plan_that_fails_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(audit: Audit) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(auditing, "plan", interrupted)
    assert "stopped" in audit(written(tmp_path), tmp_path / "out", code=Exit.INTERRUPTED)
    assert not (tmp_path / "out").exists()

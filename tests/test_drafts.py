"""An attack on many victims is stopped in the middle: it loses one of them at most.

Kinds: theorem (stopped anywhere, it ends with the bits of one never stopped), sabotage (SIGKILL; a
draft that is no draft).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from turncoat.attacks.inversion.gradient_inversion import DLG, GradientInversion
from turncoat.attacks.inversion.learned import Learned
from turncoat.attacks.inversion.optimisers import SignedAdam
from turncoat.audit import run_audit
from turncoat.config import load
from turncoat.drafts import Drafts
from turncoat.messages import Update
from turncoat.randomness import Randomness
from turncoat.stages.train.local import FedSGD
from turncoat.task import Task
from turncoat.tasks.bundled import digits
from turncoat.tasks.models import ConvNet, LeNet5
from turncoat.trial import Reconstruction, Scored
from turncoat.views import ServerView

RANDOM = Randomness(0)
torch.set_num_threads(1)


class Stopped(BaseException):
    """Nothing catches it, as nothing catches a kill."""


@dataclass(frozen=True)
class Stopping(Drafts):
    """Drafts of a process that ends as soon as it has kept the victim with this number."""

    last: int = 0

    def put(self, number: int, done: Reconstruction, rng: Generator) -> Reconstruction:
        super().put(number, done, rng)
        if number == self.last:
            raise Stopped
        return done


@cache
def seen(dropout: float) -> tuple[Task, ServerView[Update]]:
    model: Any = ConvNet((4,), (2,), dropout=dropout) if dropout else LeNet5("tanh")
    task = digits(3, per_client=1, seed=0, model=model)
    start = task.model.initial(RANDOM.at("begin"))
    step = FedSGD(0.1)
    sent = tuple(step(task.model, start, c, rng=RANDOM.at("train")) for c in task.clients)
    return task, ServerView(0, task.model, (0, 1, 2), sent, sent=(start,) * 3)


def inverted(attack: Any, drafts: Drafts | None, dropout: float = 0.0) -> list[Tensor]:
    task, view = seen(dropout)
    rng = RANDOM.at("attack")
    found = attack(view, victims=(0, 1, 2), population=task.population, rng=rng, drafts=drafts)
    return [*(f.inputs for f in found), rng.get_state()]


@pytest.mark.parametrize("last", [0, 1, 2])
@pytest.mark.parametrize(
    ("attack", "dropout"),
    [
        (GradientInversion(optimiser=SignedAdam(5), num_restarts=2), 0.0),
        (GradientInversion(optimiser=SignedAdam(5)), 0.5),
        (GradientInversion(optimiser=SignedAdam(3), space=Learned(4, num_steps=3)), 0.0),
        (DLG(local_lr=0.1, num_steps=2), 0.0),
    ],
    ids=["restarts", "dropout", "learned", "dlg"],
)
def test_stopped_after_any_victim_it_ends_with_the_same_bits(
    attack: Any, dropout: float, last: int, tmp_path: Path
) -> None:
    whole = inverted(attack, None, dropout)
    with pytest.raises(Stopped):
        inverted(attack, Stopping(tmp_path, last), dropout)
    assert {p.stem for p in tmp_path.iterdir()} == {str(i) for i in range(last + 1)}
    again = inverted(attack, Drafts(tmp_path), dropout)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))


def test_a_draft_that_is_none_is_made_again(tmp_path: Path) -> None:
    attack = GradientInversion(optimiser=SignedAdam(3))
    whole = inverted(attack, Drafts(tmp_path))
    (tmp_path / "1.safetensors").write_bytes(b"nonsense")
    again = inverted(attack, Drafts(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))


def test_victims_who_are_moved_together_are_kept_together_or_not_at_all(tmp_path: Path) -> None:
    attack = GradientInversion(optimiser=SignedAdam(3), together=True)
    whole = inverted(attack, None)
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole, inverted(attack, Drafts(tmp_path / "none")), strict=True)
    )
    assert not (tmp_path / "none").exists()


LONG = """
rounds = 1
seeds = 1
defences = ["none"]
[task]
use = "digits"
num_clients = 4
per_client = 1
model = { use = "lenet5", activation = "tanh" }
[federation]
train = { use = "fed-sgd", lr = 0.1 }
channel = "plain"
aggregate = "mean"
[attack.long]
use = "inverting-gradients"
num_steps = 300
at = 0
game = { use = "reconstruct", num_victims = 4, prior_only = true }
"""


def test_an_audit_that_is_killed_in_a_long_attack_goes_on_with_the_next_victim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "long.toml"
    file.write_text(LONG)
    (undisturbed,) = run_audit(load(file), tmp_path / "undisturbed").values()
    command = [sys.executable, "-c", "from turncoat.cli import main; main()", "audit", str(file)]
    running = subprocess.Popen(
        [*command, "--out", str(tmp_path / "out"), "--jobs", "1"],
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    done: list[Path] = []
    while not done and running.poll() is None and time.monotonic() < deadline:
        done = list((tmp_path / "out").glob("cells/*.part/attack/1.safetensors"))
        time.sleep(0.002)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert done, "it was through before it could be killed, or never began"
    kept: list[str] = []
    put = Drafts.put

    def counted(self: Drafts, number: int, *rest: Any) -> Reconstruction:
        kept.append(f"{self.path.name}/{number}")
        return put(self, number, *rest)

    monkeypatch.setattr(Drafts, "put", counted)
    (again,) = run_audit(load(file), tmp_path / "out").values()
    assert isinstance(again, Scored) and isinstance(undisturbed, Scored)
    assert again.marked.headline == undisturbed.marked.headline
    assert again.marked.others == undisturbed.marked.others
    assert not {"attack/0", "attack/1"} & set(kept)
    assert {f"prior-only/{i}" for i in range(4)} <= set(kept)
    assert not list((tmp_path / "out").glob("cells/*.part"))

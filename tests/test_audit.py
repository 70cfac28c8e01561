"""The audit: planned, shared, resumed, blocked in words (theorem, sabotage)."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from turncoat import audit as auditing
from turncoat.attacks.inversion.gradient_inversion import InvertingGradients
from turncoat.attacks.membership.lira import LiRA
from turncoat.attacks.membership.loss_threshold import LossThreshold
from turncoat.attacks.poisoning.sign_flip import SignFlip
from turncoat.coalition import Clients, Coalition
from turncoat.describe import describe, fingerprint, key
from turncoat.federation import Federation, Plain
from turncoat.games.membership import Membership
from turncoat.games.outcomes import AccuracyLost
from turncoat.games.reconstruction import Reconstruct
from turncoat.messages import Update
from turncoat.plan import Audit, Entry, plan, pose, shadow_run, shadow_seed, shadow_task
from turncoat.record import AuditFolder, FolderUnusable, write_records
from turncoat.runtimes.saved import read_tensors
from turncoat.runtimes.simulate import simulate
from turncoat.stages.aggregate.krum import Krum
from turncoat.stages.aggregate.mean import Mean
from turncoat.stages.aggregate.norm_bound import NormBound
from turncoat.stages.channel.secure_aggregation import SecureAggregation
from turncoat.stages.release.queries import Queries
from turncoat.stages.train.dpsgd import DPSGD
from turncoat.stages.train.local import LocalSGD
from turncoat.task import Batch, Model, Task
from turncoat.trial import Blocked, Failed, Memberships, Sabotage, Scored, Trial, UnknownQuestion
from turncoat.views import ModelView, Seat

SGD = LocalSGD(0.3, num_epochs=1, batch_size=16)
NONE = Federation(train=SGD, channel=Plain(), aggregate=Mean())
HIDDEN: Federation[Any, Any] = Federation(train=SGD, channel=SecureAggregation(), aggregate=Mean())
FLIP: Coalition[Update] = Coalition(members=Clients((0, 1)), forge=SignFlip(5.0))


@pytest.fixture(scope="module")
def small(task: Task) -> Task:
    return replace(task, clients=[(x[:20], y[:20]) for x, y in task.clients])


def audit_of(task: Task, **changes: Any) -> Audit:
    whole: dict[str, Any] = {
        "title": "a test",
        "task": task,
        "federations": {
            "none": NONE,
            "krum": replace(NONE, aggregate=Krum(num_byzantine=2)),
            "masks": HIDDEN,
            "bound": replace(NONE, aggregate=NormBound(Mean(), ratio=2.0)),
        },
        "entries": {
            "inversion": Entry(
                Trial(InvertingGradients(num_steps=3, num_images=1), Reconstruct(0), at=1),
                (Seat.SERVER,),
            ),
            "loss": Entry(Trial(LossThreshold(), Membership(80)), (Seat.USER,)),
            "lira": Entry(Trial(LiRA(num_shadows=2), Membership(80)), (Seat.USER,)),
            "flip": Entry(Sabotage(outcome=AccuracyLost(), coalition=FLIP)),
        },
        "num_rounds": 3,
        "seeds": (0,),
    }
    return Audit(**(whole | changes))


def without_seconds(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "cells.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def test_one_process_or_two_twice_give_the_same_cells(small: Task, tmp_path: Path) -> None:
    audit = audit_of(small)
    one = auditing.run_audit(audit, tmp_path / "one")
    auditing.run_audit(audit, tmp_path / "two", num_jobs=2)
    assert without_seconds(tmp_path / "one") == without_seconds(tmp_path / "two")
    alone, together = (
        {p.name: p.read_bytes() for p in (tmp_path / n / "trainings").glob("*.safetensors")}
        for n in ("one", "two")
    )
    assert alone and alone == together
    told = {r["attack"]: r.get("remarks") for r in without_seconds(tmp_path / "one")}
    assert told["loss"] == [
        "no TPR at 1 % FPR: it needs 100 non-members, and there are 40",
        "no TPR at 0.1 % FPR: it needs 10,000 non-members, and there are 40",
    ]
    by = {(c.attack, c.defence): r for c, r in one.items()}
    kept = {
        (c.attack, c.defence): r for c, r in auditing.run_audit(audit, tmp_path / "one").items()
    }
    read = kept["loss", "none"]
    assert isinstance(read, Scored) and list(read.marked.remarks) == told["loss"]
    blocked = by["inversion", "masks"]
    assert isinstance(blocked, Blocked)
    assert "needs ServerView[Update]; the server sees ServerView[Masked]" in blocked.reason
    flipped = by["flip", "none"]
    assert isinstance(flipped, Scored)
    assert flipped.marked.headline.value < flipped.marked.headline.baseline - 0.1


def test_what_is_finished_is_never_computed_again(
    small: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[Any] = []

    def counted(*args: Any, **options: Any) -> Any:
        runs.append(options)
        return simulate(*args, **options)

    monkeypatch.setattr("turncoat.audit.simulate", counted)
    audit = audit_of(small)
    first = auditing.run_audit(audit, tmp_path)
    # 4 honest, 4 flipped, 8 shadows, and 3 replays of the round that inversion looks at
    assert len(first) == 16 and len(runs) == 4 + 4 + 8 + 3
    before = (tmp_path / "cells.jsonl").read_bytes()
    assert auditing.run_audit(audit, tmp_path).keys() == first.keys() and len(runs) == 19
    assert (tmp_path / "cells.jsonl").read_bytes() == before
    lost = next(c for c in first if c.attack == "loss")
    AuditFolder(tmp_path).cell(lost.key).unlink()
    auditing.run_audit(audit, tmp_path)
    assert len(runs) == 19  # the cell is made again of the training, which is kept
    more = replace(audit, seeds=(0, 1))
    auditing.run_audit(more, tmp_path)
    assert len(runs) == 38 and len(without_seconds(tmp_path)) == 32


def test_a_training_that_was_cut_short_goes_on(
    small: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auditing, "_CHECKPOINT_SECONDS", 0.0)
    audit = audit_of(small, federations={"none": NONE})
    folder, seen = AuditFolder(tmp_path / "cut"), list[int]()
    training = next(t for t in plan(audit).trainings.values() if t.attack is None)

    class Cut(BaseException):
        pass

    score = auditing.shown_score

    def cutting(*args: Any) -> float:
        seen.append(1)
        if len(seen) == 3:
            raise Cut
        return score(*args)

    monkeypatch.setattr(auditing, "shown_score", cutting)
    with pytest.raises(Cut):
        auditing.train(audit, folder, training, "cpu")
    assert folder.draft(training.key).exists() and not folder.log(training.key).exists()
    monkeypatch.setattr(auditing, "shown_score", score)
    assert auditing.train(audit, folder, training, "cpu")[0] is None
    whole = AuditFolder(tmp_path / "whole")
    assert auditing.train(audit, whole, training, "cpu")[0] is None
    cut, uncut = folder.state(training.key), whole.state(training.key)
    assert cut.read_bytes() == uncut.read_bytes() and not folder.draft(training.key).exists()
    logs = [json.loads(f.log(training.key).read_text()) for f in (folder, whole)]
    assert logs[0]["history"] == logs[1]["history"] and len(logs[0]["history"]) == 3


KILLED = """
title = "killed"
rounds = 4
[task]
use = "digits"
num_clients = 5
model = { use = "mlp", hidden = [16] }
[federation]
train = { use = "local-sgd", lr = 0.1, num_epochs = 3, batch_size = 4 }
channel = "plain"
aggregate = "mean"
[coalition]
members = { use = "clients", ids = [0] }
[attack.loss]
use = "loss-threshold"
seats = ["user"]
[attack.lira]
use = "lira"
num_shadows = 4
seats = ["user"]
[attack.flip]
use = "sign-flip"
[defence.median]
aggregate = "median"
"""


def test_an_audit_that_is_killed_goes_on_where_it_stopped(tmp_path: Path) -> None:
    (tmp_path / "killed.toml").write_text(KILLED)
    whole, cut = tmp_path / "whole", tmp_path / "cut"

    def start(out: Path) -> subprocess.Popen[bytes]:
        command = ["-c", "from turncoat.cli import main; main()", "audit", "killed.toml"]
        return subprocess.Popen(
            [sys.executable, *command, "--out", str(out), "--jobs", "2"],
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )

    assert start(whole).wait(120) == 0
    draw, kept = random.Random(0), dict[Path, int]()
    for _ in range(3):
        before = len(list(cut.rglob("*.json"))) if cut.exists() else 0
        running = start(cut)
        limit = time.monotonic() + 60
        target = before + draw.randint(1, 3)
        while time.monotonic() < limit and running.poll() is None:
            if cut.exists() and len(list(cut.rglob("*.json"))) >= target:
                break
            time.sleep(0.05)
        os.kill(running.pid, signal.SIGKILL)
        running.wait()
        for path, moment in kept.items():
            assert path.stat().st_mtime_ns == moment, f"{path} was computed again"
        folders = (cut / "cells", cut / "trainings")
        kept = {p: p.stat().st_mtime_ns for f in folders if f.exists() for p in f.glob("*.json")}
    assert kept and start(cut).wait(120) == 0
    assert all(path.stat().st_mtime_ns == moment for path, moment in kept.items())
    assert without_seconds(cut) == without_seconds(whole)


@dataclass(frozen=True)
class Breaking:
    def __call__(self, view: ModelView, *, candidates: Batch) -> Memberships:
        raise ArithmeticError("no luck")


@dataclass(frozen=True)
class Exploding:
    def __call__(self, model: Model, start: Tensor, data: Batch, *, rng: Generator) -> Update:
        raise ArithmeticError("it exploded")


def test_failures_are_cells_and_are_tried_again(small: Task, tmp_path: Path) -> None:
    entries = {
        "broken": Entry(Trial(Breaking(), Membership(20)), (Seat.USER,)),
        "loss": Entry(Trial(LossThreshold(), Membership(20)), (Seat.USER,)),
    }
    federations = {
        "none": NONE,
        "bad": replace(NONE, train=Exploding()),
        "few": replace(NONE, aggregate=Krum(num_byzantine=3)),
    }
    audit = audit_of(small, entries=entries, federations=federations)
    cells = auditing.run_audit(audit, tmp_path)
    by = {(c.attack, c.defence): r for c, r in cells.items()}
    assert by["broken", "none"] == Failed("ArithmeticError: no luck")
    bad, few = by["loss", "bad"], by["loss", "few"]
    assert isinstance(bad, Failed) and "0 of 8 clients" in bad.error and "exploded" in bad.error
    assert isinstance(few, Failed) and "needs at least 9" in few.error
    assert isinstance(by["loss", "none"], Scored)
    status = [r["status"] for r in without_seconds(tmp_path)]
    assert sorted(status) == ["failed"] * 5 + ["scored"]
    again = auditing.run_audit(audit, tmp_path, num_jobs=2)
    assert [type(r) for r in again.values()] == [type(r) for r in cells.values()]
    trainings = [json.loads(x) for x in (tmp_path / "trainings.jsonl").read_text().splitlines()]
    assert [t["status"] for t in trainings] == ["done", "failed", "failed"]


def test_records_are_made_again_of_what_is_on_disk(small: Task, tmp_path: Path) -> None:
    audit = audit_of(small)
    auditing.run_audit(audit, tmp_path)
    before = (tmp_path / "cells.jsonl").read_bytes()
    (tmp_path / "cells.jsonl").unlink()
    (tmp_path / "trainings.jsonl").unlink()
    write_records(tmp_path)
    assert (tmp_path / "cells.jsonl").read_bytes() == before


def test_a_damaged_cell_is_computed_again(small: Task, tmp_path: Path) -> None:
    audit = audit_of(small, federations={"none": NONE})
    first = auditing.run_audit(audit, tmp_path)
    before = without_seconds(tmp_path)
    for cell in first:
        AuditFolder(tmp_path).cell(cell.key).write_text("{")
    auditing.run_audit(audit, tmp_path)
    assert without_seconds(tmp_path) == before


def test_a_folder_of_another_audit_is_refused_unless_told(small: Task, tmp_path: Path) -> None:
    audit = audit_of(small, federations={"none": NONE})
    auditing.run_audit(audit, tmp_path)
    other = replace(audit, num_rounds=2)
    with pytest.raises(FolderUnusable, match=r"holds another audit \('a test'\).*--update"):
        auditing.run_audit(other, tmp_path)
    auditing.run_audit(other, tmp_path, update=True)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "thesis.tex").write_text("...")
    with pytest.raises(FolderUnusable, match=r"holds 'thesis.tex' and no audit"):
        auditing.run_audit(audit, tmp_path / "x")
    with pytest.raises(FolderUnusable, match="cannot write to"):
        auditing.run_audit(audit, tmp_path / "x" / "thesis.tex" / "below")


def test_two_audits_do_not_share_a_folder_at_once(small: Task, tmp_path: Path) -> None:
    with (
        AuditFolder(tmp_path).locked(),
        pytest.raises(FolderUnusable, match="another audit is running"),
    ):
        auditing.run_audit(audit_of(small, federations={"none": NONE}), tmp_path)


def test_defences_face_the_same_question(small: Task) -> None:
    audit = audit_of(small)
    first, truth = pose(audit, NONE, Membership(80), -1, 0)
    other, again = pose(audit, HIDDEN, Membership(80), -1, 0)
    assert torch.equal(first.candidates[0], other.candidates[0]) and torch.equal(truth, again)
    assert not torch.equal(truth, pose(audit, NONE, Membership(80), -1, 1)[1])


def test_every_candidate_is_in_half_of_the_shadows(small: Task) -> None:
    audit = audit_of(small)
    question, _ = pose(audit, NONE, Membership(80), -1, 0)
    inside = []
    for k in range(6):
        task, mask = shadow_task(audit, question.candidates, Membership(80), k, 0)
        inside.append(mask)
        assert sum(task.sizes) <= sum(small.sizes) and len(task.clients) == len(small.clients)
        theirs = {x.numpy().tobytes() for shard in task.clients for x in shard[0]}
        chosen = question.candidates[0][mask]
        assert all(x.numpy().tobytes() in theirs for x in chosen)
    assert torch.stack(inside).sum(0).tolist() == [3] * 80


def only_noise(small: Task) -> Audit:
    """Return an audit whose models are their start and much noise, for nothing can be learnt."""
    train = DPSGD(0.1, 1.0, expected_batch=10, noise_multiplier=100.0)
    entries = {"lira": Entry(Trial(LiRA(num_shadows=4), Membership(80)), (Seat.USER,))}
    noisy = {"none": replace(NONE, train=train)}
    return audit_of(small, federations=noisy, entries=entries, num_rounds=1)


def spread(audit: Audit, folder: Path) -> float:
    """Return how far apart the nearest two of all models are, in lengths of a model."""
    (cell,) = auditing.run_audit(audit, folder)
    there = AuditFolder(folder)
    ends = torch.stack([read_tensors(there.state(k))[0]["params"] for k in cell.needs])
    return float(torch.pdist(ends).min() / ends.norm(dim=1).mean())


def test_no_shadow_shares_the_targets_draws_nor_anothers(
    small: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sabotage: with the target's own seed its start and its noise are known, and all but cancel.

    Whoever trains a shadow model does not know the noise that protects the records.
    """
    audit = only_noise(small)
    seeds = {shadow_seed(Membership(80), k, 0) for k in range(6)}
    assert len(seeds | {0}) == 7
    assert seeds.isdisjoint(shadow_seed(Membership(80), k, 1) for k in range(6))
    assert seeds.isdisjoint(shadow_seed(Membership(60), k, 0) for k in range(6))
    assert spread(audit, tmp_path / "own") > 0.8
    monkeypatch.setattr("turncoat.plan.shadow_seed", lambda game, shadow, seed: seed)
    assert spread(audit, tmp_path / "shared") < 0.2


def test_shadows_know_the_halves_that_the_targets_seed_deals(small: Task) -> None:
    audit = only_noise(small)
    question, _ = pose(audit, NONE, Membership(80), -1, 0)
    dealt, _ = shadow_task(audit, question.candidates, Membership(80), 1, 0)
    federation, task, seed = shadow_run(audit, NONE, Membership(80), 1, 0)
    assert federation == NONE and seed == shadow_seed(Membership(80), 1, 0)
    for mine, theirs in zip(task.clients, dealt.clients, strict=True):
        assert torch.equal(mine[0], theirs[0]) and torch.equal(mine[1], theirs[1])


def test_shadows_of_an_audit_that_was_stopped_are_the_same_bits(
    small: Task, tmp_path: Path
) -> None:
    audit = only_noise(small)

    def stop(event: auditing.Event) -> None:
        if event.what == "shadow":
            raise KeyboardInterrupt

    auditing.run_audit(audit, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        auditing.run_audit(audit, tmp_path / "stopped", on_event=stop)
    auditing.run_audit(audit, tmp_path / "stopped", num_jobs=2)
    whole, stopped = (
        {p.name: p.read_bytes() for p in (tmp_path / n / "trainings").glob("*.safetensors")}
        for n in ("whole", "stopped")
    )
    assert len(whole) == 5 and whole == stopped


def test_a_seat_that_one_federation_opens_is_a_row_for_all(small: Task) -> None:
    audit = audit_of(small, federations={"none": NONE, "asked": replace(NONE, release=Queries())})
    open_row = {"loss": Entry(Trial(LossThreshold(), Membership(20)))}
    cells = plan(replace(audit, entries=open_row)).cells
    assert {c.seat for c in cells} == {Seat.SERVER, Seat.CLIENT, Seat.USER}
    assert len(cells) == 6 and all(c.settled is None for c in cells)


def test_the_key_hashes_the_whole_configuration(small: Task) -> None:
    assert key(NormBound(Mean(), ratio=2.0)) != key(NormBound(Mean(), ratio=3.0))
    assert key(small) != key(replace(small, clients=small.clients[1:]))
    assert fingerprint(SGD) == fingerprint(LocalSGD(0.3, num_epochs=1, batch_size=16))
    with pytest.raises(TypeError, match="has no name of its own"):
        describe(lambda: 1)


@dataclass(frozen=True)
class Greedy:
    def __call__(self, view: ModelView, *, truth: Any) -> Memberships:
        return Memberships(truth)


def test_an_attack_cannot_ask_for_the_truth() -> None:
    with pytest.raises(UnknownQuestion, match=r"grants \['candidates', 'client', 'drafts'"):
        Trial(Greedy(), Membership(10))


def test_worn_stages_are_checked_when_the_audit_is_planned(small: Task) -> None:
    coalition: Coalition[Any] = Coalition(members=Clients((0,)), channel=SecureAggregation())
    entries = {"odd": Entry(Sabotage(outcome=AccuracyLost(), coalition=coalition))}
    cells = plan(audit_of(small, entries=entries)).cells
    settled = {c.defence: c.settled for c in cells}
    assert settled["masks"] is None and isinstance(settled["none"], Blocked)
    assert "it would be found out at once" in settled["none"].reason

"""Configs: what they build, and every way in which they are refused in words (contract)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from turncoat.attacks.backdoor.model_replacement import ModelReplacement
from turncoat.coalition import Once
from turncoat.config import ConfigError, Conflict, load, load_all
from turncoat.games.outcomes import BackdoorSuccess
from turncoat.parts import PARTS
from turncoat.plan import Audit, plan
from turncoat.runtimes.simulate import simulate
from turncoat.stages.aggregate.krum import Krum
from turncoat.stages.aggregate.mean import Mean
from turncoat.stages.aggregate.norm_bound import NormBound
from turncoat.stages.aggregate.optimisers import ServerMomentum
from turncoat.stages.channel.secure_aggregation import SecureAggregation
from turncoat.stages.train.local import FedSGD
from turncoat.trial import Blocked, Sabotage, Trial
from turncoat.views import Seat

TOML = """
title = "a test"
rounds = 2
seeds = [3, 5]
[task]
use = "digits"
num_clients = 6
model = { use = "mlp", hidden = [8] }
partition = { use = "dirichlet", alpha = 1.0 }
[federation]
train = { use = "local-sgd", lr = 0.5 }
channel = "plain"
aggregate = "mean"
[coalition]
members = { use = "clients", ids = [0] }
[attack.loss]
use = "loss-threshold"
seats = ["user"]
[attack.backdoor]
use = "model-replacement"
trigger = "pixel-pattern"
target = 0
acts = { use = "once", at = 1 }
[defence.secagg]
channel = "secure-aggregation"
[defence.krum]
aggregate = { use = "krum", num_byzantine = 1 }
[defence.momentum]
aggregate = { use = "server-momentum", beta = 0.5 }
[defence.both]
aggregate = { use = "norm-bound", ratio = 2.0, inner = { use = "krum", num_byzantine = 1 } }
"""


def written(folder: Path, text: str = TOML) -> Path:
    (folder / "audit.toml").write_text(text)
    return folder / "audit.toml"


def changed(folder: Path, old: str, new: str) -> Path:
    assert old in TOML
    return written(folder, TOML.replace(old, new))


def stacked(folder: Path, *columns: str) -> Audit:
    named = ", ".join(f'"{c}"' for c in columns)
    return load(changed(folder, "rounds = 2", f"rounds = 2\ndefences = [{named}]"))


def test_a_file_becomes_the_audit_it_describes(tmp_path: Path) -> None:
    audit = load(written(tmp_path))
    assert audit.seeds == (3, 5) and audit.num_rounds == 2 and len(audit.task.clients) == 6
    assert list(audit.federations) == ["none", "secagg", "krum", "momentum", "both"]
    assert audit.federations["momentum"].aggregate == ServerMomentum(0.5, inner=Mean())
    bound = audit.federations["both"].aggregate
    assert bound == NormBound(Krum(num_byzantine=1), ratio=2.0)
    loss, backdoor = (audit.entries[n].trial for n in ("loss", "backdoor"))
    assert isinstance(loss, Trial) and audit.entries["loss"].seats == (Seat.USER,)
    assert isinstance(backdoor, Sabotage) and backdoor.coalition is not None
    assert backdoor.coalition.acts == Once(1) and isinstance(backdoor.outcome, BackdoorSuccess)
    assert isinstance(backdoor.coalition.train, ModelReplacement)
    assert backdoor.coalition.train.inner == audit.federations["none"].train


def test_defences_stack_in_any_order_and_clash_loudly(tmp_path: Path) -> None:
    first = stacked(tmp_path, "momentum | secagg").federations["momentum | secagg"]
    other = stacked(tmp_path, "secagg | momentum").federations["secagg | momentum"]
    assert first == other and first.channel == SecureAggregation()
    nested = stacked(tmp_path, "krum | momentum").federations["krum | momentum"]
    assert nested.aggregate == ServerMomentum(0.5, inner=Krum(num_byzantine=1))
    with pytest.raises(Conflict, match="'krum' and 'both' both replace 'aggregate': choose one"):
        stacked(tmp_path, "krum | both")


def test_secure_aggregation_with_krum_is_refused_with_both_facts_and_the_cure(
    tmp_path: Path,
) -> None:
    said = (
        r"Krum\(num_byzantine=1, .*\) must read each client.s update.*, but SecureAggregation\(.*"
        r"\) gives Masked, which shows the server only the sum of the cohort: use a rule that "
        r"needs only the sum \(mean\), or a channel that shows each \(plain\)"
    )
    with pytest.raises(ConfigError, match=said):
        stacked(tmp_path, "secagg | krum")


def test_what_is_blocked_says_why(tmp_path: Path) -> None:
    text = TOML + '[attack.inversion]\nuse = "inverting-gradients"\nseats = ["server"]\n'
    cells = plan(load(written(tmp_path, text))).cells
    blocked = {c.defence for c in cells if isinstance(c.settled, Blocked)}
    assert blocked == {"secagg"}


WRONG = [
    ("lr = 0.5", "lrr = 0.5", r"audit.toml: \[federation.train\] has no key 'lrr'.*mean 'lr'"),
    ("lr = 0.5", "lr = 'fast'", r"\[federation.train.lr\] = 'fast': input should be a valid"),
    ("lr = 0.5", "lr = -1.0", r"\[federation.train\]: .*LocalSGD: lr must be positive; it is -1"),
    ("lr = 0.5", "lr = true", r"\[federation.train.lr\] = True: input should be a valid number"),
    (", lr = 0.5", "", r"\[federation.train\] lacks the key 'lr', which 'local-sgd' needs"),
    ('"krum", num', '"kurm", num', r"\[defence.krum.aggregate\] use = 'kurm'.*mean 'krum'"),
    ('use = "loss-threshold"', 'use = "los-threshold"', r"no attack; did you mean 'loss-thre"),
    ('channel = "plain"', 'chanel = "plain"', r"\[federation\] has no key 'chanel'; did you mean"),
    ('use = "digits"', 'use = "digitz"', r"names no task; did you mean 'digits'"),
    ("ids = [0]", "ids = [0, 9]", r"names client 9, but there are 6 clients, 0 to 5"),
    ("ids = [0]", "ids = [0, 1, 2, 3, 4, 5]", r"is everyone: 6 of 6 clients are dishonest"),
    ("ids = [0]", "ids = []", r"names nobody"),
    ("num_byzantine = 1 }\n[defence.m", "num_byzantine = -1 }\n[defence.m", r"num_byzantine"),
    ("rounds = 2", "rounds = 0", r"\[rounds\] = 0: it must be at least 1"),
    ("rounds = 2", "rounds = 2.5", r"\[rounds\] = 2.5: input should be a valid integer"),
    ("seeds = [3, 5]", "seeds = 0", r"\[seeds\] = 0"),
    ("num_clients = 6", "num_clients = 5000", r"5000"),
    ("alpha = 1.0", "alpha = 0.0", r"alpha must be positive; it is 0"),
    ('seats = ["user"]', 'seats = ["usher"]', r"no seat 'usher'; did you mean 'user'"),
    ("[coalition]\nmembers = ", "[coalition]\nmember = ", r"lacks the key 'members'"),
    ('[coalition]\nmembers = { use = "clients", ids = [0] }', "", r"nobody is named: add \[coal"),
    (
        "rounds = 2",
        "rounds = 2\ndefences = ['krom']",
        r"no table \[defence.krom\]; did you mean 'k",
    ),
    ("rounds = 2", "rounds = = 2", r"audit.toml: not TOML"),
    ("[task]", "[tusk]", r"has no key 'tusk'; did you mean 'task'"),
    ("target = 0", 'target = 0\ngame = "membership"', r"has no key 'game'"),
    ('"loss-threshold"', '"mine.py:Nothing"', r"there is no file .*mine.py"),
    ('"loss-threshold"', '"turncoat.task:Modle"', r"has no 'Modle'; did you mean 'Model'"),
    ('use = "loss-threshold"', "", r"\[attack.loss\] lacks the key 'use'"),
]


@pytest.mark.parametrize(("old", "new", "said"), WRONG, ids=[w[2][:40] for w in WRONG])
def test_bad_input_is_refused_in_words(tmp_path: Path, old: str, new: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        plan(load(changed(tmp_path, old, new)))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no file .*nowhere.toml"):
        load(tmp_path / "nowhere.toml")


def test_overrides_reach_any_key(tmp_path: Path) -> None:
    path = written(tmp_path)
    audit = load(
        path, overrides=["rounds=7", "task.num_clients = 5", "attack.loss.seats=['server']"]
    )
    assert audit.num_rounds == 7 and len(audit.task.clients) == 5
    assert audit.entries["loss"].seats == (Seat.SERVER,)
    assert load(path, num_seeds=3).seeds == (0, 1, 2)
    with pytest.raises(ConfigError, match="not of the form"):
        load(path, overrides=["rounds"])
    with pytest.raises(ConfigError, match="'title' is a value and has no keys"):
        load(path, overrides=["title.x=1"])


def test_variants_are_audits_that_differ_in_what_they_name(tmp_path: Path) -> None:
    path = written(tmp_path)
    tables = "[variant.short]\nrounds = 2\n[variant.more]\ntask.num_clients = 7\n"
    path.write_text(path.read_text() + tables)
    whole = load_all(path)
    assert list(whole) == ["short", "more"]
    assert (whole["short"].num_rounds, len(whole["more"].task.clients)) == (2, 7)
    assert whole["more"].title.endswith(": more") and whole["more"].variant == "more"
    assert whole["short"].identity != whole["more"].identity
    assert list(load_all(path, variant="more")) == ["more"]
    with pytest.raises(ConfigError, match="describes 2 audits, its variants short, more"):
        load(path)
    with pytest.raises(ConfigError, match=r"no table \[variant.mor\]; did you mean 'more'"):
        load_all(path, variant="mor")
    with pytest.raises(ConfigError, match="has no key 'taks'; did you mean 'task'"):
        path.write_text(path.read_text() + "[variant.wrong]\ntaks = 1\n")
        load_all(path)


def test_a_variant_of_a_file_without_any_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="leave --variant out"):
        load_all(written(tmp_path), variant="x")


def test_a_variant_that_names_a_part_takes_the_old_ones_place(tmp_path: Path) -> None:
    path = written(tmp_path)
    tables = '[variant.a]\nfederation.train = { use = "fed-sgd", lr = 0.1 }\n'
    path.write_text(path.read_text() + tables)
    assert load_all(path)["a"].federations["none"].train == FedSGD(0.1)


USER = """
from dataclasses import dataclass
import torch
import their_loss
from turncoat.messages import Update
from turncoat.task import Batch
from turncoat.trial import Memberships
from turncoat.views import ModelView

@dataclass(frozen=True)
class Margin:
    power: float = 1.0
    def __call__(self, view: ModelView, *, candidates: Batch) -> Memberships:
        top = view.scores(candidates[0]).topk(2).values
        return Memberships((top[:, 0] - top[:, 1]) ** self.power)

@dataclass(frozen=True)
class Lazy:
    def __call__(self, model, start, data) -> Update:
        return Update(-0.5 * model.gradient(start, data), float(len(data[1])))

def make_task(num_clients: int):
    from turncoat.tasks.bundled import digits
    from turncoat.tasks.models import MLP
    return digits(num_clients, model=MLP((8,)))
"""


def test_a_users_file_brings_a_task_an_attack_and_a_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "statistics.py").write_text(USER)  # named like a library module, and still found
    (tmp_path / "their_loss.py").write_text("scale = 1\n")
    text = TOML.replace('"local-sgd", lr = 0.5', '"statistics.py:Lazy"')
    text = text.replace('use = "loss-threshold"', 'use = "statistics:Margin"\npower = 2.0')
    task = text[text.index("[task]") : text.index("[federation]")]
    text = text.replace(task, '[task]\nuse = "statistics:make_task"\nnum_clients = 4\n')
    text = text[: text.index("[attack.backdoor]")]
    path = written(tmp_path, text)
    audit = load(path)
    federation = audit.federations["none"]
    alone = simulate(federation, audit.task, num_rounds=1, seed=0)
    monkeypatch.setenv("TURNCOAT_START", "spawn")
    both = simulate(federation, audit.task, num_rounds=1, seed=0, num_processes=2)
    assert torch.equal(alone.state.params, both.state.params)
    before = [c.key for c in plan(audit).cells]
    again = load(path)
    assert [c.key for c in plan(again).cells] == before
    assert "statistics" not in sys.modules or hasattr(sys.modules["statistics"], "median")


@pytest.mark.parametrize(
    "name", [f"{kind} {name}" for kind, names in PARTS.items() for name in names]
)
def test_every_short_name_names_something(name: str) -> None:
    kind, short = name.split(" ")
    module, _, attribute = PARTS[kind][short].partition(":")
    made: Any = getattr(__import__(module, fromlist=[attribute]), attribute)
    assert callable(made) and made.__doc__


def test_short_names_are_unique() -> None:
    names = [n for kind in PARTS.values() for n in kind]
    assert len(names) == len(set(names))

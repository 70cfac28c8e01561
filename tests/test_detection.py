"""What is caught, and by whom: verdicts of rules and filters beside the truth of the run.

Kinds: theorem (the four counts), contract (supply and code are worn as stated, for any number of
processes), sabotage (a filter that flags at random is told from one that looks).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from turncoat.attacks.poisoning.label_flip import LabelFlip
from turncoat.attacks.poisoning.sign_flip import SignFlip
from turncoat.audit import run_audit
from turncoat.coalition import Clients, Coalition, Pool, check_members
from turncoat.config import load
from turncoat.federation import Federation, Plain
from turncoat.messages import Clear, rows
from turncoat.metrics.detection import Caught
from turncoat.randomness import Randomness
from turncoat.runtimes.simulate import Run, simulate
from turncoat.stage import IncompatibleStages, Verdict
from turncoat.stages.aggregate.mean import Mean
from turncoat.stages.train.local import LocalSGD
from turncoat.task import Batch, Model
from turncoat.testing.examples import example_task
from turncoat.trial import Scored

SGD = LocalSGD(0.3, num_epochs=1, batch_size=8)
TASK = example_task()
LIARS = Clients((1,))


@dataclass(frozen=True)
class TellsLongest:
    """A rule that averages, and distrusts the longest update."""

    def __call__(self, messages: Sequence[Clear], *, verdict: Verdict) -> Tensor:
        matrix = rows(messages)
        verdict.flag([int(matrix.norm(dim=1).argmax())])
        return matrix.mean(dim=0)


@dataclass(frozen=True)
class DropsFlipped:
    """A filter that knows the first label of each row's class: brightest third of the rows."""

    def __call__(self, data: Batch, *, verdict: Verdict) -> Batch:
        inputs, labels = data
        thirds = torch.stack([p.mean(dim=(1, 2, 3)) for p in inputs.tensor_split(3, dim=2)], 1)
        right = thirds.argmax(dim=1) == labels
        verdict.flag((~right).nonzero().flatten().tolist())
        return inputs[right], labels[right]


@dataclass(frozen=True)
class Reversed:
    """Code whose loss climbs."""

    def __call__(self, model: Model) -> Model:
        return Model(
            model.build, lambda outputs, labels: -nn.functional.cross_entropy(outputs, labels)
        )


def run(federation: Federation[Any, Any], coalition: Coalition[Any], num_processes: int = 1) -> Run:
    return simulate(
        federation, TASK, num_rounds=2, seed=3, coalition=coalition, num_processes=num_processes
    )


def with_rule(rule: Any) -> Federation[Any, Any]:
    return Federation(train=SGD, channel=Plain(), aggregate=rule)


@given(
    st.integers(1, 40).flatmap(
        lambda n: st.tuples(
            st.just(n), st.sets(st.integers(0, n - 1)), st.sets(st.integers(0, n - 1))
        )
    )
)
def test_the_four_counts_are_those_of_two_sets(drawn: tuple[int, set[int], set[int]]) -> None:
    num, flagged, false = drawn
    caught = Caught.of(flagged, false, num)
    assert caught == Caught(
        len(flagged & false),
        len(false - flagged),
        len(flagged - false),
        num - len(flagged | false),
    )
    found = {m.name: m for m in caught.measured("x")}
    if flagged and false:
        precision, recall = found["x_precision"].value, found["x_recall"].value
        f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
        assert found["x_f1"].value == pytest.approx(f1)
        assert found["x_f1"].low <= f1 <= found["x_f1"].high


def test_a_rules_verdict_is_held_beside_who_misbehaved() -> None:
    traitors = Coalition(members=LIARS, forge=SignFlip(30.0))
    for num_processes in (1, 2):
        log = run(with_rule(TellsLongest()), traitors, num_processes).log
        assert [p.clients for p in log] == [Caught(1, 0, 0, len(TASK.clients) - 1)] * 2


def test_a_rule_without_a_verdict_catches_nothing_and_says_nothing() -> None:
    log = run(with_rule(Mean()), Coalition(members=LIARS, forge=SignFlip(30.0))).log
    assert [p.clients for p in log] == [None, None]


def test_a_filter_is_judged_by_the_records_that_a_supplier_changed() -> None:
    federation = Federation(train=SGD, channel=Plain(), aggregate=Mean(), prepare=DropsFlipped())
    supplied: Coalition[Any] = Coalition(members=LIARS, supply=LabelFlip(share=0.5))
    alone, both = run(federation, supplied), run(federation, supplied, 2)
    caught = alone.log[0].records
    assert caught is not None and caught.hits > 0
    assert caught.misses == 0
    assert [p.records for p in alone.log] == [p.records for p in both.log]
    assert torch.equal(alone.state.params, both.state.params)


def test_records_that_were_filtered_out_cannot_poison() -> None:
    filtering = Federation(train=SGD, channel=Plain(), aggregate=Mean(), prepare=DropsFlipped())
    poisoned = run(with_rule(Mean()), Coalition(members=LIARS, supply=LabelFlip()))
    filtered = run(filtering, Coalition(members=LIARS, supply=LabelFlip()))
    dishonest = run(filtering, Coalition(members=LIARS, prepare=LabelFlip()))
    assert not torch.equal(filtered.state.params, poisoned.state.params)
    assert torch.equal(dishonest.state.params, poisoned.state.params)  # who lies does not filter


def test_code_from_a_supplier_reaches_all_who_run_it() -> None:
    everyone: Coalition[Any] = Coalition(members=Pool(1.0), code=Reversed())
    check_members(everyone, 4, Randomness(0))
    hurt = run(with_rule(Mean()), everyone).state.params
    clean = simulate(with_rule(Mean()), TASK, num_rounds=2, seed=3).state.params
    right = [
        float((TASK.model.logits(p, TASK.test[0]).argmax(1) == TASK.test[1]).float().mean())
        for p in (hurt, clean)
    ]
    assert right[0] < right[1]


def test_a_coalition_of_everyone_is_refused_unless_a_supplier_serves_it() -> None:
    with pytest.raises(ValueError, match="is everyone"):
        check_members(Coalition(members=Pool(1.0), forge=SignFlip(2.0)), 4, Randomness(0))


def test_code_must_make_a_model_of_a_model() -> None:
    with pytest.raises(IncompatibleStages, match="is no code"):
        run(with_rule(Mean()), Coalition(members=LIARS, code=LabelFlip()))  # type: ignore[arg-type]


TOML = """
rounds = 2
seeds = [0]
defences = ["none"]

[task]
use = "digits"
num_clients = 4

[federation]
train = { use = "local-sgd", lr = 0.1, batch_size = 32 }
channel = "plain"
aggregate = { use = "test_detection:TellsLongest" }

[coalition]
members = { use = "clients", ids = [1] }

[attack.far]
use = "sign-flip"
scale = 50.0

[attack.supplied]
use = "label-flip"
seats = "supplier"
"""


def test_the_audit_tells_precision_and_recall_and_who_supplied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    file = tmp_path / "audit.toml"
    file.write_text(TOML)
    cells = run_audit(load(file), tmp_path / "out")
    (_, marked), (supplied, _) = cells.items()
    assert isinstance(marked, Scored)
    assert supplied.seat == "supplier"
    found = {m.name: m.value for m in marked.marked.others}
    assert found["flagged_clients_precision"] == 1.0
    assert found["flagged_clients_recall"] == 1.0

"""What is released instead of the model that was trained: PATE's student, and a distilled model.

Kinds: theorem (hypothesis) and golden for the vote and its ε; oracle: secure aggregation gives what
reading every vote gives; sabotage: forgotten noise is found out; an attack that wins without them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import inf, sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from torch import Generator, Tensor
from torch.distributions import Categorical
from torch.nn.functional import mse_loss, one_hot

from turncoat.attacks.membership.lira import LiRA
from turncoat.attacks.membership.loss_threshold import LossThreshold
from turncoat.audit import released, remade, run_audit
from turncoat.federation import Federation, Plain, PoissonSample, WhiteBox
from turncoat.games.membership import Membership
from turncoat.messages import Votes
from turncoat.metrics.auditing import epsilon_of_rates
from turncoat.plan import Audit, Entry, plan, shadow_seed
from turncoat.privacy import Private, guarantees
from turncoat.randomness import Randomness
from turncoat.record import AuditFolder
from turncoat.report.cost import costs
from turncoat.report.record import read
from turncoat.runtimes.saved import read_tensors
from turncoat.runtimes.simulate import simulate
from turncoat.stage import IncompatibleStages
from turncoat.stages.aggregate.gnmax import GNMax, counted
from turncoat.stages.aggregate.mean import Mean
from turncoat.stages.begin.unanswered import Unanswered
from turncoat.stages.channel.secure_aggregation import SecureAggregation
from turncoat.stages.release.queries import Queries
from turncoat.stages.release.student import Distilled, Student
from turncoat.stages.train.local import LocalSGD
from turncoat.stages.train.teacher import Teacher
from turncoat.task import Batch, Model, Shards, Task
from turncoat.tasks.bundled import digits
from turncoat.tasks.models import MLP
from turncoat.testing.examples import example_task
from turncoat.trial import Blocked, Memberships, Scored, Trial
from turncoat.views import ModelView, QueryView, Seat, Shadows

SGD = LocalSGD(0.1, num_epochs=4, batch_size=4)
STUDY = LocalSGD(0.1, num_epochs=30, batch_size=16, momentum=0.9)
DELTA = 1e-5


def pate(rule: GNMax, **more: Any) -> Federation[Any, Any]:
    stages: dict[str, Any] = {
        "begin": Unanswered(),
        "train": Teacher(SGD),
        "channel": Plain(),
        "aggregate": rule,
        "release": Student(WhiteBox(), STUDY),
    }
    return Federation(**stages | more)


def voted(*classes: list[int]) -> tuple[Votes, ...]:
    """Return the votes of teachers on some queries among three classes."""
    return tuple(Votes(one_hot(torch.tensor(c), 3).float().flatten(), 1.0) for c in classes)


def rng(seed: int = 0) -> Generator:
    return Randomness(seed).at("a test")


# The vote


@given(st.lists(st.lists(st.integers(0, 2), min_size=4, max_size=4), min_size=1, max_size=9))
@settings(max_examples=50, deadline=None)
def test_without_noise_the_plurality_answers(classes: list[list[int]]) -> None:
    counts = counted(voted(*classes), 4, 3)
    answers = GNMax(sigma=0.0, num_queries=4).answered(counts, rng())
    for query, answer in enumerate(answers):
        votes = [mine[query] for mine in classes]
        assert votes.count(int(answer.argmax())) == max(map(votes.count, range(3)))


@given(
    st.lists(st.lists(st.integers(0, 2), min_size=4, max_size=4), min_size=2, max_size=9),
    st.lists(st.integers(0, 2), min_size=4, max_size=4),
)
@settings(max_examples=50, deadline=None)
def test_a_client_moves_counts_by_no_more_than_the_event_says(
    classes: list[list[int]], other: list[int]
) -> None:
    counts = counted(voted(*classes), 4, 3)
    turned = counted(voted(other, *classes[1:]), 4, 3)
    gone = counted(voted(*classes[1:]), 4, 3)
    for changed in (turned, gone):
        assert float((counts - changed).norm(dim=1).max()) <= sqrt(2) + 1e-9
        assert float((counts.amax(dim=1) - changed.amax(dim=1)).abs().max()) <= 1


def test_the_rdp_is_the_papers() -> None:
    # Papernot et al. 2018: λ / σ² for an answer, half of it for a look at the threshold
    rule = GNMax(sigma=20.0, num_queries=100, threshold=60.0, threshold_sigma=30.0, max_answers=40)
    orders = [2.0, 5.0, 33.0]
    spent = RdpAccountant(orders).compose(rule.event(1))._rdp
    due = [40 * a / 20.0**2 + 100 * a / (2 * 30.0**2) for a in orders]
    assert spent == pytest.approx(due)


def test_the_guarantee_is_that_of_one_gaussian() -> None:
    # all Gaussians compose to one, of which the privacy curve is known in closed form
    (held,) = guarantees(
        pate(GNMax(sigma=20.0, num_queries=50)), num_records=9, num_rounds=2, delta=DELTA
    )
    assert isinstance(held, Private) and held.unit == "client"
    assert held.against == {"client", "user"}
    mu = sqrt(2 * 50 * 2) / 20.0
    exact = norm.cdf(mu / 2 - held.epsilon / mu) - torch.tensor(held.epsilon).exp() * norm.cdf(
        -mu / 2 - held.epsilon / mu
    )
    assert float(exact) == pytest.approx(DELTA, rel=0.01)


def test_nothing_is_gained_from_sampling_and_a_server_that_opens_the_sum_has_no_bound() -> None:
    rule = GNMax(sigma=20.0, num_queries=50)
    ask: Any = {"num_records": 9, "num_rounds": 1, "delta": DELTA}
    (alone,) = guarantees(pate(rule), **ask)
    (some,) = guarantees(pate(rule, sample=PoissonSample(0.1)), **ask)
    (masked,) = guarantees(pate(rule, channel=SecureAggregation()), **ask)
    assert isinstance(alone, Private) and alone == some
    assert masked == alone and alone.against == {"client", "user"}
    (loud,) = guarantees(pate(replace(rule, sigma=0.0)), **ask)
    assert isinstance(loud, Private) and loud.epsilon == inf


def test_below_the_threshold_nothing_is_answered_and_answers_run_out() -> None:
    counts = torch.tensor([[9.0, 1, 0], [4, 3, 3], [0, 10, 0], [0, 0, 8]], dtype=torch.float64)
    rule = GNMax(sigma=0.0, num_queries=4, threshold=6.0, threshold_sigma=1e-6)
    assert rule.answered(counts, rng()).sum(dim=1).tolist() == [1, 0, 1, 1]
    assert replace(rule, max_answers=2).answered(counts, rng()).sum(dim=1).tolist() == [1, 0, 1, 0]


def test_each_round_answers_the_next_queries_and_says_when_none_are_left() -> None:
    task = example_task()
    rule = GNMax(sigma=0.1, num_queries=20)
    run = simulate(pate(rule), task, num_rounds=2, seed=0)
    answered = run.state.params.reshape(48, 3).sum(dim=1)
    assert answered.tolist() == [1.0] * 40 + [0.0] * 8
    with pytest.raises(ValueError, match="8 of 48 are left: lower num_queries"):
        simulate(pate(rule), task, num_rounds=3, seed=0)


def test_a_client_in_the_clear_counts_once_whatever_it_sends() -> None:
    honest = voted([0, 1], [0, 1], [2, 1])
    loud = Votes(torch.tensor([0.0, 0, 1e6, 9, -3, 0]), 1e6)
    assert counted((*honest, loud), 2, 3).tolist() == [[2, 0, 2], [1, 3, 0]]


def test_masks_give_the_answers_that_reading_every_vote_gives() -> None:
    task = example_task()
    rule = GNMax(sigma=1.0, num_queries=30)
    runs = [
        simulate(pate(rule, channel=channel), task, num_rounds=1, seed=3).state.params
        for channel in (Plain(), SecureAggregation())
    ]
    assert torch.equal(*runs) and float(runs[0].sum()) == 30


def test_the_bits_depend_neither_on_processes_nor_on_a_stop() -> None:
    task, rule = example_task(), GNMax(sigma=1.0, num_queries=16)
    whole = simulate(pate(rule), task, num_rounds=3, seed=1).state.params
    two = simulate(pate(rule), task, num_rounds=3, seed=1, num_processes=2).state.params
    first = simulate(pate(rule), task, num_rounds=3, seed=1, until=1).state
    after = simulate(pate(rule), task, num_rounds=3, seed=1, state=first).state.params
    assert torch.equal(whole, two) and torch.equal(whole, after)


# Sabotage: what claims the noise and does not add it


class Forgotten(GNMax):
    """The noise was left out, as in a first version that was to be completed."""

    def answered(self, counts: Tensor, rng: Generator) -> Tensor:
        return replace(GNMax(sigma=0.0, num_queries=self.num_queries)).answered(counts, rng)


class AsShares(GNMax):
    """Votes were divided by the number of teachers, and the noise with them, once too often."""

    def answered(self, counts: Tensor, rng: Generator) -> Tensor:
        least = GNMax(sigma=self.sigma / float(counts[0].sum()), num_queries=self.num_queries)
        return least.answered(counts, rng)


def lower_limit(rule: GNMax, num_trials: int = 2_000) -> float:
    """Return what a user proves who sees the answers, and knows all votes but those of one client.

    Eleven teachers are split 5 to 6 on every query; the one in question turns all of its votes.
    """
    num = rule.num_queries
    ones = []
    for turned in (0, 1):
        counts = torch.tensor([5.0 + turned, 6.0 - turned], dtype=torch.float64).expand(num, 2)
        drawn = rng(turned)
        answers = [rule.answered(counts, drawn)[:, 0].sum() for _ in range(num_trials)]
        ones.append(int((torch.stack(answers) > num / 2).sum()))
    return epsilon_of_rates(ones[1], num_trials, ones[0], num_trials, delta=DELTA)


def test_forgotten_noise_is_found_out_and_that_of_the_rule_is_not() -> None:
    fields: Mapping[str, Any] = {"sigma": 20.0, "num_queries": 50}
    right = GNMax(**fields)
    (held,) = guarantees(pate(right), num_records=1, num_rounds=1, delta=DELTA)
    assert isinstance(held, Private) and 1 < held.epsilon < 3
    assert 0 <= lower_limit(right) <= held.epsilon
    for broken in (Forgotten(**fields), AsShares(**fields)):
        assert broken.event(1) == right.event(1)
        assert lower_limit(broken) > held.epsilon


# What is released, before attackers who know how


@cache
def mislabelled(seed: int = 0) -> Task:
    """Return digits, of which a third of all labels is drawn at random: much to memorise."""
    task = digits(5, per_client=60, public_size=300, test_size=600, seed=seed, model=MLP((64,)))
    assert isinstance(task.clients, Shards)

    def blurred(labels: Tensor, purpose: str) -> Tensor:
        drawn = Randomness(seed).at(purpose)
        others = torch.randint(10, labels.shape, generator=drawn)
        return torch.where(torch.rand(labels.shape, generator=drawn) < 0.35, others, labels)

    clients = replace(task.clients, labels=blurred(task.clients.labels, "clients"))
    return replace(task, clients=clients, test=(task.test[0], blurred(task.test[1], "test")))


def columns() -> dict[str, Federation[Any, Any]]:
    plain: Federation[Any, Any] = Federation(
        train=LocalSGD(0.1, num_epochs=40, batch_size=15, momentum=0.9),
        channel=Plain(),
        aggregate=Mean(),
    )
    study = LocalSGD(0.05, num_epochs=40, batch_size=32, momentum=0.9)
    return {
        "none": plain,
        "distilled": replace(plain, release=Distilled(WhiteBox(), share=0.8, tuning=study)),
        "pate": replace(
            plain,
            begin=Unanswered(),
            train=Teacher(plain.train),
            aggregate=GNMax(sigma=2.0, num_queries=100),
            release=Student(WhiteBox(), study),
        ),
    }


SEEN: list[tuple[ModelView, ...]] = []
Played = tuple[Audit, Path, dict[str, Any]]


@dataclass(frozen=True)
class Looks:
    """An attack that does nothing but note the shadow models that it is given."""

    num_shadows: int

    def __call__(
        self, view: ModelView | QueryView, *, candidates: Batch, shadows: Shadows | None
    ) -> Memberships:
        assert shadows is not None
        SEEN.append(shadows.models)
        return Memberships(torch.zeros(len(candidates[1])))


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Played:
    game = Membership()
    audit = Audit(
        title="what is released",
        task=mislabelled(),
        federations=columns(),
        entries={
            "loss": Entry(Trial(LossThreshold(), game), (Seat.USER, Seat.SERVER)),
            "look": Entry(Trial(Looks(4), game), (Seat.USER,)),
            "lira": Entry(Trial(LiRA(4, variance="fixed"), game), (Seat.USER,)),
        },
        num_rounds=2,
        seeds=(0,),
    )
    folder = tmp_path_factory.mktemp("released")
    cells = run_audit(audit, folder)
    found = {
        f"{c.attack} at {c.seat}, {c.defence}": cell.marked.headline
        if isinstance(cell, Scored)
        else cell
        for c, cell in cells.items()
    }
    return audit, folder, found


def test_lira_wins_against_the_model_and_loses_against_pate(played: Played) -> None:
    _, _, found = played
    plain, student = found["lira at user, none"], found["lira at user, pate"]
    assert plain.low > 0.55
    assert not student.beats_baseline and student.high < plain.low
    assert isinstance(found["loss at server, pate"], Blocked)  # no model reaches it


def test_distillation_takes_some_of_it_and_at_the_server_nothing(played: Played) -> None:
    _, _, found = played
    plain, student = found["lira at user, none"], found["lira at user, distilled"]
    assert student.value < plain.value - 0.03
    assert found["loss at server, distilled"] == found["loss at server, none"]
    assert found["loss at user, distilled"].value < found["loss at user, none"].value


def test_shadows_are_distilled_or_taught_as_the_target_was(played: Played) -> None:
    audit, folder, _ = played
    there, todo = AuditFolder(folder), plan(audit)
    for cell in (c for c in todo.cells if c.attack == "look"):
        federation = audit.federations[cell.defence]
        trained = [read_tensors(there.state(k))[0]["params"] for k in cell.shadows]
        given = [view.params for view in SEEN[list(audit.federations).index(cell.defence)]]
        trial: Any = audit.entries[cell.attack].trial
        due = [
            remade(federation, audit.task, params, shadow_seed(trial.game, i, 0))
            for i, params in enumerate(trained)
        ]
        assert all(map(torch.equal, given, due))
        assert (cell.defence == "none") == all(
            t.shape == g.shape and torch.equal(t, g) for t, g in zip(trained, given, strict=True)
        )


def test_the_accuracy_of_a_column_is_that_of_what_it_releases(played: Played) -> None:
    audit, folder, _ = played
    record = read(folder)
    quality: Any = {name: cost.quality for name, cost in costs(record).items()}
    for name, federation in audit.federations.items():
        cell = next(c for c in plan(audit).cells if c.defence == name and c.run)
        params = read_tensors(AuditFolder(folder).state(cell.run))[0]["params"]
        view = released(federation, audit.task, params, 0)
        score = (view.scores(audit.task.test[0]).argmax(dim=1) == audit.task.test[1]).float()
        assert quality[name].value == pytest.approx(float(score.mean()))


def test_another_column_of_the_same_training_is_scored_without_training_again(
    played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    audit, folder, _ = played
    soft = replace(audit.federations["none"], release=Distilled(WhiteBox(), 20.0, tuning=STUDY))
    more = replace(
        audit,
        federations={"none": audit.federations["none"], "soft": soft},
        entries={"loss": audit.entries["loss"]},
    )
    monkeypatch.setattr("turncoat.audit.simulate", None)  # whoever trains fails
    cells = run_audit(more, folder)
    assert all(isinstance(cell, Scored) for cell in cells.values())
    assert costs(read(folder))["soft"].quality is not None


# Distilled


def test_the_surest_examples_are_kept_and_a_temperature_softens() -> None:
    task = example_task()
    assert task.public is not None
    params = task.model.initial(rng())
    logits = task.model.logits(params, task.public[0])
    inputs, soft = Distilled(WhiteBox(), 3.0, 0.25).answers(task.model, params, task.public[0])
    entropy = Categorical(logits=logits).entropy()  # type: ignore[no-untyped-call]
    kept = sorted(range(48), key=lambda i: float(entropy[i]))[:12]
    assert torch.equal(inputs, task.public[0][sorted(kept)])
    assert torch.allclose(soft, (logits[sorted(kept)] / 3.0).softmax(dim=1))


def test_a_student_copies_its_teacher_and_never_reads_the_public_labels() -> None:
    task = mislabelled()
    assert task.public is not None
    plain = columns()["none"]
    params = simulate(plain, task, num_rounds=1, seed=0).state.params
    stage = Distilled(WhiteBox(), 1.0, 1.0, STUDY)
    student = stage(task.model, params, rng=rng(), public=task.public)
    lied = task.public[0], 9 - task.public[1]
    assert torch.equal(student.params, stage(task.model, params, rng=rng(), public=lied).params)
    teacher = ModelView(task.model, params)
    same = student.scores(task.test[0]).argmax(dim=1) == teacher.scores(task.test[0]).argmax(dim=1)
    assert float(same.float().mean()) > 0.8


def test_they_wrap_another_release() -> None:
    task = example_task()
    stage = Distilled(Queries(labels_only=True))
    view = stage(task.model, task.model.initial(rng()), rng=rng(), public=task.public)
    assert isinstance(view, QueryView)


# Bad input


def test_what_does_not_fit_is_refused_with_the_cure() -> None:
    rule = GNMax(sigma=1.0, num_queries=4)
    with pytest.raises(IncompatibleStages, match="begin with 'unanswered'"):
        Federation(train=Teacher(SGD), channel=Plain(), aggregate=rule)
    with pytest.raises(IncompatibleStages, match="train with 'teacher'"):
        Federation(begin=Unanswered(), train=SGD, channel=Plain(), aggregate=Mean())
    with pytest.raises(IncompatibleStages, match=r"reads .*Votes"):
        Federation(train=SGD, channel=Plain(), aggregate=rule)  # type: ignore[misc]
    with pytest.raises(ValueError, match="needs public examples"):
        Unanswered()(replace(example_task(), public=None))
    task = example_task()
    params = task.model.initial(rng())
    with pytest.raises(ValueError, match="train with 'teacher'"):
        Student(WhiteBox())(task.model, params, rng=rng(), public=task.public)
    with pytest.raises(ValueError, match="no public data"):
        Distilled(WhiteBox())(task.model, params, rng=rng(), public=None)
    with pytest.raises(ValueError, match="leave 'distilled' out"):
        Distilled(Student(WhiteBox()))(task.model, params[1:], rng=rng(), public=task.public)
    squares = Model(task.model.build, mse_loss)
    with pytest.raises(ValueError, match="cross-entropy"):
        Distilled(WhiteBox())(squares, params, rng=rng(), public=task.public)


def test_a_student_without_answers_stays_as_it_began() -> None:
    task = example_task()
    view = Student(WhiteBox())(task.model, torch.zeros(48 * 3), rng=rng(), public=task.public)
    assert torch.equal(view.params, task.model.initial(rng()))

"""Audits of private training: what is broken is caught, and what is not is left in peace.

Kinds: sabotage (eight broken trainers that claim epsilon = 1), statistics (correct trainers stay
below what they claim in 95 % of runs; false alarms of the test of sampling), theorem (scores by
chance prove nothing), oracle (gradients by autograd, SciPy's binomial test, accountants).
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from functools import cache
from math import exp
from pathlib import Path
from typing import Any

import dp_accounting
import numpy as np
import pytest
import torch
from dp_accounting.pld import PLDAccountant
from opacus.grad_sample import GradSampleModule
from opacus.optimizers import DPOptimizer
from scipy.stats import binom, binomtest
from torch import Generator, Tensor, nn

from papers import sabotaged
from papers.audited import RIGHT, RIGHT_RULE, SLIGHT, Correct, Sabotaged, sum_epsilon
from papers.ledger import Summary
from turncoat.auditing import Audited, Diracs, audit_federation, audit_trainer, poisson_p_value
from turncoat.auditing.evidence import audited
from turncoat.federation import Federation, Plain, PoissonSample
from turncoat.graphs import Complete
from turncoat.messages import Update
from turncoat.metrics.auditing import one_run_epsilon
from turncoat.randomness import Randomness
from turncoat.stage import Memory
from turncoat.stages.aggregate.dp_fedavg import DPFedAvg
from turncoat.stages.aggregate.dp_ftrl import DPFTRL
from turncoat.stages.train.dpsgd import DPSGD, noise_for
from turncoat.stages.train.local import LocalSGD
from turncoat.task import Batch, Model
from turncoat.testing.sabotage import (
    ClippedBatch,
    ClippedLate,
    DividedNoise,
    NeverCleared,
    NoiseForAll,
    NoiseOnHalf,
    PlainDPSGD,
    ReusedNoise,
    WrongRate,
)

torch.set_num_threads(1)  # two threads fight over nets so small

DELTA, RATE, ROUNDS = 1e-5, 0.1, 50
SIGMA = noise_for(1.0, DELTA, RATE, ROUNDS)  # for epsilon = 1
FIELDS: dict[str, Any] = {
    "lr": 1.0,
    "max_norm": 1.0,
    "rate": RATE,
    "noise_multiplier": SIGMA,
}
FEW = Diracs(200, 200)


def audit(train: Any, seed: int = 0, **more: Any) -> Audited:
    options: dict[str, Any] = {"claimed": 1.0, "delta": DELTA, "num_rounds": ROUNDS}
    return audit_trainer(train, seed=seed, **options | more)


@cache
def spent(sigma: float, rate: float, steps: int) -> float:
    step: Any = dp_accounting.GaussianDpEvent(sigma)
    if rate < 1:
        step = dp_accounting.PoissonSampledDpEvent(rate, step)
    return float(PLDAccountant().compose(step, steps).get_epsilon(DELTA))


@pytest.mark.parametrize(
    "train",
    [
        NoiseOnHalf(**FIELDS),
        ClippedLate(**FIELDS),
        ReusedNoise(**FIELDS),
        WrongRate(**FIELDS, true_rate=1.0),
        ClippedBatch(**FIELDS),
        NeverCleared(**FIELDS),
        DividedNoise(**FIELDS, num_micro_batches=25),
    ],
    ids=lambda train: type(train).__name__,
)
def test_a_broken_trainer_is_caught(train: Any) -> None:
    found = audit(train)
    assert found.refuted and found.epsilon > 1 and "refuted; at least" in str(found)


@pytest.mark.parametrize(
    ("sizes", "noise", "rate"),
    [
        ([1.0] * ROUNDS, SIGMA, 1.0),  # wrong rate
        ([1.0] * ROUNDS, SIGMA / 5, RATE),  # divided noise
        ([float(t) for t in range(ROUNDS, 0, -1)], SIGMA, RATE),  # never cleared
        ([200.0] * ROUNDS, SIGMA, RATE),  # clipped batch, of the canary alone
        ([1000.0] * ROUNDS, SIGMA, RATE),  # clipped late: whatever its gradient is
        ([1.0] * ROUNDS, 1e-3, RATE),  # noise on half, in the other half; reused noise, differenced
    ],
)
def test_the_broken_truly_spend_four_or_more(sizes: list[float], noise: float, rate: float) -> None:
    assert sum_epsilon(sizes, rate, noise, DELTA) >= 4


def test_sum_epsilon_never_exceeds_the_accountants() -> None:
    for sigma, rate, steps in ((SIGMA, RATE, ROUNDS), (2.0, 1.0, 9)):
        low = sum_epsilon([1.0] * steps, rate, sigma, DELTA)
        assert 0.3 * spent(sigma, rate, steps) < low <= spent(sigma, rate, steps)


def test_a_sabotage_that_breaks_nothing_is_the_plain_trainer() -> None:
    plain = audit(PlainDPSGD(**FIELDS), num_rounds=5)
    assert plain == audit(WrongRate(**FIELDS, true_rate=RATE), num_rounds=5)
    assert plain == audit(DividedNoise(**FIELDS, num_micro_batches=1), num_rounds=5)
    assert not plain.refuted


def test_the_plain_trainer_does_what_the_packages_own_does() -> None:
    quiet = replace(PlainDPSGD(**FIELDS), rate=1.0, noise_multiplier=1e-9)
    ours = DPSGD(1.0, 1.0, 20, noise_multiplier=0.0, num_steps=1)
    model = Model(lambda: nn.Linear(4, 3))
    data = torch.randn(20, 4, generator=Randomness(0).at("x")), torch.arange(20) % 3
    start = model.initial(Randomness(0).at("p"))
    rng = Randomness(0).at("t")
    plain = quiet(model, start, data, rng=rng, memory=Memory())
    assert torch.allclose(plain.delta, ours(model, start, data, rng=rng).delta, atol=1e-6)


@pytest.mark.parametrize(("epsilon", "rate", "rounds"), [(1.0, 0.5, 4), (4.0, 1.0, 2)])
def test_a_correct_trainer_stays_below_its_epsilon_in_95_percent_of_runs(
    epsilon: float, rate: float, rounds: int
) -> None:
    sigma = noise_for(epsilon, DELTA, rate, rounds)
    train = DPSGD(1.0, 1.0, int(400 * rate), noise_multiplier=sigma, num_steps=1)
    assert train.schedule(400) == (rate, 1)
    runs = [
        audit(train, seed, claimed=epsilon, num_rounds=rounds, canaries=FEW) for seed in range(40)
    ]
    assert sum(run.refuted for run in runs) <= 0.05 * len(runs)
    assert sum(run.gaussian_epsilon > epsilon for run in runs) <= 0.05 * len(runs)
    weak = replace(train, noise_multiplier=sigma / 20)  # nor is it blind
    for seed in range(3):
        assert audit(weak, seed, num_rounds=rounds, canaries=FEW).refuted


def test_a_small_error_of_the_rate_is_seen_by_the_binomial_test_alone() -> None:
    slightly = audit(WrongRate(**FIELDS, true_rate=1.1 * RATE), rate=RATE)
    assert not slightly.refuted and slightly.missampled
    assert "rate is contradicted" in str(slightly)
    right = audit(PlainDPSGD(**FIELDS), rate=RATE)
    assert not right.refuted and not right.missampled and right.sampling_p_value is not None


def test_draws_are_counted_however_the_trainer_computes_gradients() -> None:
    by_hooks = DPSGD(1.0, 1.0, 40, noise_multiplier=SIGMA, num_steps=1)
    by_vmap = PlainDPSGD(**FIELDS)
    for train, kind in ((by_hooks, torch.float64), (by_vmap, torch.float32)):
        found = audit(train, num_rounds=5, canaries=FEW)
        for t, size in enumerate(found.batch_sizes):
            rng = Randomness(0).at("train", t, 0)
            assert size == int((torch.rand(400, generator=rng, dtype=kind) < RATE).sum())


def test_shuffled_batches_are_no_poisson_samples() -> None:
    assert poisson_p_value([100] * 50, 1000, 0.1) < 1e-6
    assert poisson_p_value([1000] * 5, 1000, 1.0) == 1.0
    assert poisson_p_value([999] * 5, 1000, 1.0) == 0.0


def test_a_rate_that_is_off_is_told_by_the_number_of_draws_and_not_by_their_spread() -> None:
    """Batches of 93 and 111 are spread as batches of 100 should be, and 2 too large on the mean."""
    sizes = [93, 111] * 200
    drawn = float(binomtest(sum(sizes), 400 * 1000, 0.1).pvalue)
    assert drawn < 1e-4
    assert poisson_p_value(sizes, 1000, 0.1) == pytest.approx(2 * drawn)
    assert poisson_p_value([91, 109] * 200, 1000, 0.1) > 0.1


def test_one_batch_is_judged_by_scipys_binomial_test() -> None:
    both = poisson_p_value([140], 1000, 0.1)
    assert both <= 2 * float(binomtest(140, 1000, 0.1).pvalue) < 1e-3


def test_right_sampling_is_doubted_in_at_most_one_run_in_twenty() -> None:
    rng = np.random.default_rng(0)
    doubted = sum(
        poisson_p_value(rng.binomial(500, 0.1, 30).tolist(), 500, 0.1) < 0.05 for _ in range(300)
    )
    assert doubted <= binom.ppf(0.999, 300, 0.05)


@pytest.mark.parametrize("sizes", [[], [5, 1001], [-1]])
def test_impossible_batches_are_refused(sizes: list[int]) -> None:
    with pytest.raises(ValueError, match="give one size for each step"):
        poisson_p_value(sizes, 1000, 0.1)


@dataclass(frozen=True)
class PlainOpacus:
    """One step by Opacus as its users take it, around the module that the audit gives."""

    noise_multiplier: float

    def __call__(self, model: Model, start: Tensor, data: Batch, *, rng: Generator) -> Update:
        views = model.layout.split(start)
        with torch.no_grad():
            for name, parameter in model.module.named_parameters():
                parameter.copy_(views[name])
        chosen = torch.rand(len(data[1]), generator=rng) < RATE
        wrapped = GradSampleModule(model.module.train())
        optimiser = DPOptimizer(
            torch.optim.SGD(wrapped.parameters(), lr=1.0),
            noise_multiplier=self.noise_multiplier,
            max_grad_norm=1.0,
            expected_batch_size=int(RATE * len(data[1])),
            generator=rng,
        )
        torch.autograd.backward(model.criterion(wrapped(data[0][chosen]), data[1][chosen]))
        optimiser.step()
        optimiser.zero_grad()
        wrapped.to_standard_module()
        return Update(model.layout.flatten(model.module) - start, 1.0)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_someone_elses_trainer_is_audited_as_it_is() -> None:
    options: dict[str, Any] = {"num_rounds": 10, "rate": RATE, "canaries": Diracs(500, 500)}
    sigma = noise_for(1.0, DELTA, RATE, 10)
    right = audit(PlainOpacus(sigma), **options)
    assert not right.refuted and not right.missampled
    assert audit(PlainOpacus(sigma / 10), **options).refuted


def test_the_code_on_the_page_runs() -> None:
    page = (Path(__file__).parents[1] / "docs" / "auditing.md").read_text("utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    exec(code, {})


def test_the_published_table_says_what_caught_each_and_how_often(tmp_path: Path) -> None:
    measure, correct = Sabotaged(), sabotaged.SABOTAGED[1].measure
    assert isinstance(correct, Correct)
    broken = {
        f"audit: {name} | {column}": asdict(Summary.of((value, value + 0.1)))
        for name in measure.names
        for column, value in (
            ("true, at least", 4.0 if name != RIGHT else 1.0),
            ("lower bound", 0.95 if name != RIGHT else 0.5),
            ("p of the rate", 0.5 if name != SLIGHT else -0.1),
            ("canaries", 1000.0),
            ("seconds", 1.0),
        )
    }
    fine = {
        f"{head}: {name} | {c:g}": asdict(Summary.of((0.1, 0.2)))
        for head in ("lower bound", "largest lower bound", "if Gaussian")
        for name in (RIGHT, RIGHT_RULE)
        for c in correct.epsilons
    }
    shares = ("share_of_runs_below_the_claim", "share_of_runs_whose_sampling_is_doubted")
    fine |= {name: asdict(Summary.of((0.5, 1.0))) for name in shares}
    known: dict[str, Any] = {
        "sabotaged-trainers": {"figures": broken},
        "correct-trainers-audited": {"figures": fine, "seeds": [10, 11]},
    }
    rows = {row.split(" | ")[0]: row for row in sabotaged.table(known).splitlines()}
    assert "| nothing |" in rows[f"| {RIGHT}"]
    assert "the audit, 1 of 2 runs; the binomial test of batch sizes, 2 of 2" in rows[f"| {SLIGHT}"]
    assert "Below the claim: 75.0% of 120 runs" in sabotaged.summary(known)
    sabotaged.draw(known, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def federation(rule: Any, **stages: Any) -> Any:
    return Federation(**{"train": LocalSGD(0.1), "channel": Plain(), "aggregate": rule} | stages)


CLIENTS = Diracs(400, 0)
SAMPLED = {"sample": PoissonSample(0.25)}
CLIENT_SIGMA = noise_for(1.0, DELTA, 0.25, 12)


def test_noise_that_is_scaled_for_all_clients_is_caught_and_for_the_cohort_is_not() -> None:
    broken = NoiseForAll(
        max_norm=1.0, noise_multiplier=CLIENT_SIGMA, expected_cohort=50, num_clients=500
    )
    assert sum_epsilon([1.0] * 12, 0.25, CLIENT_SIGMA / 10, DELTA) > 4
    options: dict[str, Any] = {
        "claimed": 1.0,
        "delta": DELTA,
        "num_rounds": 12,
        "canaries": CLIENTS,
        "rate": 0.25,
    }
    caught = audit_federation(federation(broken, **SAMPLED), **options)
    assert caught.refuted and not caught.missampled
    right = DPFedAvg(max_norm=1.0, noise_multiplier=CLIENT_SIGMA, expected_cohort=50)
    for seed in range(2):
        found = audit_federation(federation(right, **SAMPLED), seed=seed, **options)
        assert not found.refuted
    more = audit_federation(federation(right, sample=PoissonSample(0.4)), **options)
    assert more.missampled


def test_a_tree_of_noise_stays_below_its_epsilon_and_without_noise_it_is_caught() -> None:
    rule = DPFTRL(max_norm=1.0, noise_multiplier=4.0, expected_cohort=50, restart_every=4)
    event = rule.training_event(1, 8)
    claimed = float(PLDAccountant().compose(event).get_epsilon(DELTA))
    options: dict[str, Any] = {
        "claimed": claimed,
        "delta": DELTA,
        "num_rounds": 8,
        "canaries": Diracs(100, 0),
    }
    for seed in range(4):
        assert not audit_federation(federation(rule), seed=seed, **options).refuted
    weak = replace(rule, noise_multiplier=0.1)
    options |= {"claimed": 1.0}
    assert audit_federation(federation(weak), **options).refuted


def test_a_federation_without_a_server_is_refused() -> None:
    rule = DPFedAvg(max_norm=1.0, noise_multiplier=1.0, expected_cohort=60)
    with pytest.raises(ValueError, match="audit the trainer of a node"):
        audit_federation(federation(rule, graph=Complete()), claimed=1.0, delta=DELTA, num_rounds=1)


@pytest.mark.parametrize("canaries", [Diracs(16, 3), Diracs(10, 0, num_layers=1, length=7.0)])
def test_the_gradient_of_a_canary_has_one_entry_of_its_own(canaries: Diracs) -> None:
    model, everyone = canaries.model(), torch.ones(canaries.num_canaries, dtype=torch.bool)
    start = model.initial(Randomness(0).at("p"))
    for round in (0, 1):
        inputs, labels = canaries.data(everyone, round)
        rows = torch.stack(
            [
                -model.gradient(start, (x[None], y[None]))
                for x, y in zip(inputs, labels, strict=True)
            ]
        )
        scores = torch.stack([canaries.scores(row, round) for row in rows])
        due = torch.zeros_like(scores)
        due.fill_diagonal_(canaries.length)
        assert torch.equal(scores, due)
        assert int(rows.count_nonzero()) == canaries.num_canaries


def test_half_of_the_canaries_of_each_layer_change_sides() -> None:
    canaries = Diracs(80, 0)
    moved = canaries.signs(0) != canaries.signs(1)
    for k in range(4):
        assert int(moved[canaries.groups[f"layer {k}"]].sum()) == 10
    assert torch.equal(moved, canaries.groups["alternating"])


def test_an_audit_repeats_itself_to_the_bit() -> None:
    train = DPSGD(1.0, 1.0, 40, noise_multiplier=1.0, num_steps=1)
    first, second = (audit(train, num_rounds=3, canaries=FEW) for _ in range(2))
    assert first == second != audit(train, 1, num_rounds=3, canaries=FEW)


def test_perfect_scores_prove_what_so_many_guesses_can() -> None:
    included = torch.arange(100) % 2 == 0
    found = audited(
        included.double(),
        included,
        {"all": included | True},
        claimed=1.0,
        delta=DELTA,
        confidence=0.95,
    )
    right = one_run_epsilon(100, 80, 80, delta=DELTA, confidence=0.975)
    assert found.epsilon == right > 2 and found.best.num_right == 80


def test_it_says_when_so_few_canaries_could_refute_no_such_claim() -> None:
    found = audit(PlainDPSGD(**FIELDS), claimed=8.0, num_rounds=2, canaries=FEW)
    assert found.most == max(bound.most for bound in found.bounds) < 8
    assert "200 canaries cannot prove more than" in str(found) and "take more" in str(found)
    assert "take more" not in str(audit(PlainDPSGD(**FIELDS), num_rounds=2, canaries=FEW))


def test_scores_by_chance_refute_nothing() -> None:
    refuted = 0
    for seed in range(100):
        rng = Randomness(seed).at("chance")
        included = torch.rand(200, generator=rng) < 0.5
        scores = torch.randn(200, generator=rng).double()
        groups = {"all": included | True, "half": torch.arange(200) % 2 == 0}
        found = audited(scores, included, groups, claimed=1e-9, delta=DELTA, confidence=0.95)
        refuted += found.refuted or found.gaussian_epsilon > 0
    assert refuted <= binom.ppf(0.999, 100, 0.1)


def test_randomised_response_is_bounded_from_below_and_not_beyond() -> None:
    truth, beyond = 2.0, 0
    found = []
    for seed in range(40):
        rng = Randomness(seed).at("response")
        included = torch.rand(500, generator=rng) < 0.5
        honest = torch.rand(500, generator=rng) < exp(truth) / (1 + exp(truth))
        scores = (included == honest).double() + 1e-3 * torch.rand(500, generator=rng)
        run = audited(
            scores, included, {"all": included | True}, claimed=truth, delta=1e-9, confidence=0.95
        )
        found.append(run.epsilon)
        beyond += run.refuted
    assert beyond <= binom.ppf(0.999, 40, 0.05) and np.mean(found) > 0.6 * truth


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"claimed": 0.0}, "claimed must be positive"),
        ({"delta": 0.0}, "delta must lie between 0 and 1"),
        ({"confidence": 1.0}, "confidence must lie between 0 and 1"),
        ({"num_rounds": 0}, "num_rounds must be at least 1"),
    ],
)
def test_claims_that_mean_nothing_are_refused(more: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        audit(PlainDPSGD(**FIELDS), **more)


class Diverging:
    def __call__(self, model: Model, start: Tensor, data: Batch, *, rng: Generator) -> Update:
        return Update(torch.full_like(start, float("inf")), 1.0)


def test_a_training_that_diverges_is_no_evidence() -> None:
    with pytest.raises(ValueError, match="training diverged"):
        audit(Diverging(), num_rounds=1, canaries=FEW)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_canaries": 15}, "15 canaries are too few for 4 layers"),
        ({"num_others": -1}, "num_others must be at least 0"),
        ({"num_layers": 0}, "num_layers must be at least 1"),
        ({"length": 0.0}, "length must be positive"),
    ],
)
def test_impossible_canaries_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Diracs(**fields)

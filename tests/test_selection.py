"""What a search for hyper-parameters costs.

Kinds: oracle: the theorems' own formulas, computed here from the paper; theorem (hypothesis): a
search costs no less than a run, and more runs no less; contract.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import exp, inf, log, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, LaplaceDpEvent, NonPrivateDpEvent
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.stats import norm

from turncoat.audit import run_audit
from turncoat.config import ConfigError, load
from turncoat.explain import explained
from turncoat.federation import Federation, Plain, PoissonSample
from turncoat.metrics.tradeoff import composed, tpr_limit
from turncoat.privacy import Private, Unproven, guarantees
from turncoat.randomness import Randomness
from turncoat.record import planned_record
from turncoat.report.page import write_report
from turncoat.selection import FixedRuns, NegativeBinomialRuns, PoissonRuns, Search
from turncoat.stages.aggregate.dp_fedavg import DPFedAvg
from turncoat.stages.aggregate.mean import Mean
from turncoat.stages.train.dpsgd import DPSGD
from turncoat.stages.train.local import LocalSGD

DELTA = 1e-5
RUN = GaussianDpEvent(2.0)
ORDERS = [1.001, 1.01, *(1 + k / 10 for k in range(1, 100)), *range(11, 64), 128, 256, 512, 1024]


def cost(search: Search, event: Any = RUN) -> float:
    return float(composed(search.event(event)).get_epsilon(DELTA))


def gaussian_rdp(order: float, sigma: float = 2.0) -> float:
    return order / (2 * sigma**2)


def spent(rdp: list[float]) -> float:
    """Return ε at δ by the conversion of Canonne, Kamath and Steinke (2020), proposition 12."""
    epsilons: Iterator[float] = (
        r + log((a - 1) / a) - (log(DELTA) + log(a)) / (a - 1)
        for a, r in zip(ORDERS, rdp, strict=True)
        if a > 1.01
    )
    return min(epsilons)


# The theorems' values, computed from the paper


@pytest.mark.parametrize(("eta", "gamma"), [(1.0, 0.05), (0.0, 0.01), (0.5, 0.1), (4.0, 0.3)])
def test_the_negative_binomial_costs_what_theorem_2_says(eta: float, gamma: float) -> None:
    search = NegativeBinomialRuns(eta, gamma)
    if eta:  # definition 1, summed
        shares = [mass(k, eta, gamma) for k in range(1, 4_000)]
    else:
        shares = [(1 - gamma) ** k / (k * log(1 / gamma)) for k in range(1, 4_000)]
    assert sum(shares) == pytest.approx(1)
    assert search.mean == pytest.approx(sum(k * p for k, p in enumerate(shares, 1)))
    tail = min((1 - 1 / b) * gaussian_rdp(b) + log(1 / gamma) / b for b in ORDERS)
    best = [gaussian_rdp(a) + (1 + eta) * tail + log(search.mean) / (a - 1) for a in ORDERS]
    assert cost(search) == pytest.approx(spent(best), rel=1e-6)


def mass(k: int, eta: float, gamma: float) -> float:
    """Return the chance of k runs: definition 1 of Papernot and Steinke."""
    product = 1.0
    for i in range(k):
        product *= (i + eta) / (i + 1) * (1 - gamma)
    return product / (float(gamma**-eta) - 1)


@pytest.mark.parametrize("mean", [1.0, 5.0, 20.0])
def test_poisson_costs_what_theorem_6_says(mean: float) -> None:
    def delta(epsilon: float) -> float:  # of one run: any order gives one, the least counts
        by_order = min(
            exp(min(0.0, (a - 1) * (gaussian_rdp(a) - epsilon + log(1 - 1 / a)) - log(a)))
            for a in ORDERS
            if a > 1.01
        )
        return min(by_order, sqrt(1 - exp(-gaussian_rdp(ORDERS[0]))))  # Bretagnolle and Huber

    def exact(epsilon: float) -> float:
        return float(norm.cdf(0.25 - 2 * epsilon) - exp(epsilon) * norm.cdf(-0.25 - 2 * epsilon))

    def best(one: Callable[[float], float]) -> float:
        return spent(
            [
                gaussian_rdp(a) + mean * one(log(1 + 1 / (a - 1))) + log(mean) / (a - 1)
                for a in ORDERS
            ]
        )

    assert cost(PoissonRuns(mean)) == pytest.approx(best(delta), rel=1e-6)
    assert cost(PoissonRuns(mean)) >= best(exact) * (1 - 1e-9)


def test_a_fixed_number_of_runs_composes() -> None:
    assert cost(FixedRuns(9)) == pytest.approx(cost(FixedRuns(1), GaussianDpEvent(2 / 3)), rel=1e-4)


def test_of_pure_privacy_geometric_stopping_costs_three_runs() -> None:
    # Liu and Talwar 2019, theorem 3.2, at an order near infinity; ε of one is 0.1
    event = NegativeBinomialRuns(1.0, 0.5).event(LaplaceDpEvent(10.0))
    rdp = RdpAccountant([1e6]).compose(event)._rdp
    assert rdp[0] == pytest.approx(0.3, rel=1e-3)


# What must hold of any


SEARCHES = st.one_of(
    st.builds(FixedRuns, st.integers(1, 30)),
    st.builds(NegativeBinomialRuns, st.floats(0, 5), st.floats(1e-4, 0.999)),
    st.builds(PoissonRuns, st.floats(1, 100)),
)


@given(SEARCHES, st.sampled_from([0.7, 2.0, 10.0]))
@settings(max_examples=40, deadline=None)
def test_a_search_costs_no_less_than_a_run(search: Search, sigma: float) -> None:
    event = GaussianDpEvent(sigma)
    assert cost(search, event) >= cost(FixedRuns(1), event) * (1 - 1e-6)


@given(st.floats(0, 4), st.floats(1e-3, 0.9), st.floats(1.05, 3))
@settings(max_examples=30, deadline=None)
def test_more_runs_cost_no_less(eta: float, gamma: float, factor: float) -> None:
    few, many = NegativeBinomialRuns(eta, gamma), NegativeBinomialRuns(eta, gamma / factor)
    assert many.mean >= few.mean and cost(many) >= cost(few) - 1e-9
    wider = NegativeBinomialRuns(eta + factor, gamma)
    assert wider.mean >= few.mean and cost(wider) >= cost(few) - 1e-9


def test_one_run_costs_nothing_more() -> None:
    assert cost(FixedRuns(1)) == composed(RUN).get_epsilon(DELTA)
    by_orders = spent([gaussian_rdp(a) for a in ORDERS])
    nearly = [NegativeBinomialRuns(eta, 1 - 1e-6) for eta in (0.0, 1.0, 3.0)]
    for search in nearly:
        assert search.mean == pytest.approx(1, abs=1e-5)
        assert cost(search) == pytest.approx(by_orders, abs=0.01)


def test_without_noise_a_search_is_not_private() -> None:
    for search in (FixedRuns(3), NegativeBinomialRuns(1.0, 0.1), PoissonRuns(3.0)):
        assert cost(search, NonPrivateDpEvent()) == inf


def test_the_bound_on_an_attack_follows_the_search() -> None:
    one, ten = (tpr_limit(FixedRuns(n).event(RUN), 0.01) for n in (1, 10))
    drawn = tpr_limit(NegativeBinomialRuns(1.0, 0.1).event(RUN), 0.01)
    assert one < drawn <= 1 and one < ten <= 1


def test_the_number_that_is_drawn_is_of_the_distribution() -> None:
    rng = Randomness(0).at("draws")
    assert NegativeBinomialRuns(1e-12, 0.1).mean == pytest.approx(NegativeBinomialRuns(0, 0.1).mean)
    many = NegativeBinomialRuns(300.0, 0.1)  # whose smallest chances no float holds
    assert np.mean([many.drawn(rng) for _ in range(100)]) == pytest.approx(many.mean, rel=0.05)
    for search in (NegativeBinomialRuns(0.5, 0.2), NegativeBinomialRuns(1.0, 0.3)):
        drawn = [search.drawn(rng) for _ in range(3_000)]
        seen = np.bincount(np.minimum(drawn, 9), minlength=10)[1:]
        due = np.array([mass(k, search.eta, search.gamma) for k in range(1, 9)])
        due = np.append(due, 1 - due.sum()) * len(drawn)
        assert stats.chisquare(seen, due).pvalue > 1e-3
    logarithmic = [NegativeBinomialRuns(0.0, 0.1).drawn(rng) for _ in range(3_000)]
    seen = np.bincount(np.minimum(logarithmic, 9), minlength=10)[1:]
    due = stats.logser(0.9).pmf(np.arange(1, 9))
    due = np.append(due, 1 - due.sum()) * len(logarithmic)
    assert stats.chisquare(seen, due).pvalue > 1e-3
    poisson = [PoissonRuns(3.0).drawn(rng) for _ in range(2_000)]
    assert np.mean(poisson) == pytest.approx(3.0, abs=0.2) and min(poisson) == 0
    assert FixedRuns(7).drawn(rng) == 7


# In a federation


def held(search: Search | None, **more: Any) -> tuple[Private | Unproven, ...]:
    stages: dict[str, Any] = {
        "train": DPSGD(0.1, 1.0, 10, noise_multiplier=1.0),
        "channel": Plain(),
        "aggregate": Mean(),
    }
    return guarantees(
        Federation(**stages | more), num_records=100, num_rounds=3, delta=DELTA, search=search
    )


def test_with_a_fixed_number_all_seats_pay_for_all_runs() -> None:
    (one,), (same,), (ten,) = held(None), held(FixedRuns(1)), held(FixedRuns(10))
    assert isinstance(one, Private) and isinstance(same, Private) and isinstance(ten, Private)
    assert one.epsilon == same.epsilon < ten.epsilon
    assert one.against == ten.against
    assert str(ten).endswith(", for the best of 10 runs") and "best" not in str(one)


def test_with_a_random_number_users_alone_have_a_bound() -> None:
    (one,), (best, rest) = held(None), held(NegativeBinomialRuns(1.0, 0.1))
    assert isinstance(one, Private) and isinstance(best, Private) and isinstance(rest, Unproven)
    assert best.against == {"user"} and one.epsilon < best.epsilon < inf
    assert "every run of the search is seen by client, neighbour, server" in str(rest)
    (fixed,) = held(FixedRuns(10))
    assert isinstance(fixed, Private) and best.epsilon < fixed.epsilon  # that is what it is for


def test_clients_who_are_sampled_have_it_amplified_within_each_run() -> None:
    rule = DPFedAvg(max_norm=1.0, noise_multiplier=2.0, expected_cohort=5.0)
    more = {"train": LocalSGD(0.1), "aggregate": rule, "sample": PoissonSample(0.1)}
    (one,) = held(None, **more)
    best, rest = held(PoissonRuns(4.0), **more)
    assert isinstance(one, Private) and isinstance(best, Private) and isinstance(rest, Unproven)
    assert one.against == {"client", "user"} and best.against == {"user"}
    assert one.epsilon < best.epsilon


FILE = """
rounds = 2
[task]
use = "digits"
num_clients = 3
per_client = 20
model = { use = "mlp", hidden = [4] }
[federation]
train = { use = "dp-sgd", lr = 0.1, max_norm = 1.0, expected_batch = 5, noise_multiplier = 2.0 }
channel = "plain"
aggregate = "mean"
[attack.loss]
use = "loss-threshold"
seats = ["user"]
"""


def written(folder: Path, search: str) -> Path:
    path = folder / "audit.toml"
    path.write_text(search + FILE, encoding="utf-8")
    return path


def test_a_file_says_how_many_runs_there_were_and_all_pages_show_it(tmp_path: Path) -> None:
    line = 'search = { use = "negative-binomial-runs", eta = 1.0, gamma = 0.1 }\n'
    audit = load(written(tmp_path, line))
    assert audit.search == NegativeBinomialRuns(1.0, 0.1)
    assert planned_record(audit)["search"].startswith("10 runs on average")
    text = "\n".join(explained(audit))
    assert (
        "for the best of 10 runs on average" in text
        and "every run of the search is seen by" in text
    )
    run_audit(audit, tmp_path / "out")
    page = write_report(tmp_path / "out").read_text(encoding="utf-8")
    assert "for the best of 10 runs on average" in page
    without = load(written(tmp_path, ""))
    assert (
        without.search is None and without.identity == audit.identity
    )  # a statement, no other run


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("search = 20", "lacks the key 'use'"),
        ('search = { use = "fixed-run", num_runs = 3 }', "did you mean 'fixed-runs'"),
        ('search = { use = "fixed-runs", num_runs = 0 }', "num_runs must be at least 1"),
        ('search = { use = "fixed-runs" }', "lacks the key 'num_runs'"),
        ('search = { use = "poisson-runs", mean = 0.5 }', "mean must be at least 1"),
        (
            'search = { use = "negative-binomial-runs", eta = 1.0, gamma = 1.0 }',
            "gamma must be between 0 and 1; it is 1.0",
        ),
        (
            'search = { use = "negative-binomial-runs", eta = -0.5, gamma = 0.1 }',
            "eta must be at least 0",
        ),
        ('search = "mean"', "is no number of runs"),
    ],
)
def test_what_is_no_search_is_refused(line: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        load(written(tmp_path, line + "\n"))

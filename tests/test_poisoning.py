"""Attacks on updates by coalitions.

Kinds: golden (z of ALIE, critical counts of PoisonedFL); theorem (hypothesis: what is forged keeps
to its own bound, closed forms are what the search finds, nothing is NaN); oracle (byzfl, the rule
itself, scipy); contract (what a coalition must know); sabotage (an attack without its sharp end, or
before a rule that stops it, does no harm).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import sqrt
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from torch import Tensor, nn

from turncoat.attacks.poisoning.alie import ALIE, largest_z
from turncoat.attacks.poisoning.boost import Boost
from turncoat.attacks.poisoning.fang import FangKrum, FangTrimmedMean
from turncoat.attacks.poisoning.gaussian import Gaussian
from turncoat.attacks.poisoning.ipm import IPM
from turncoat.attacks.poisoning.mimic import Mimic
from turncoat.attacks.poisoning.min_max import (
    Bound,
    Line,
    MinMax,
    MinSum,
    Perturbation,
    bisection,
    diameter,
    largest_gamma,
    largest_gamma_of_sum,
    perturbed,
)
from turncoat.attacks.poisoning.poisoned_fl import PoisonedFL, critical_count
from turncoat.attacks.poisoning.rehearsal import Rehearsal, RuleUnknown
from turncoat.attacks.poisoning.sign_flip import SignFlip
from turncoat.attacks.poisoning.strongest import Strongest
from turncoat.attacks.poisoning.tailored import Tailored
from turncoat.coalition import Clients, Coalition, check_worn
from turncoat.config import Where, build
from turncoat.federation import Federation, Plain
from turncoat.messages import Clear, Update, rows
from turncoat.randomness import Randomness
from turncoat.runtimes.seat import AttackBroke
from turncoat.runtimes.simulate import simulate
from turncoat.stage import Memory, Verdict, call
from turncoat.stages.aggregate.coordinatewise import Median, TrimmedMean
from turncoat.stages.aggregate.dnc import DnC
from turncoat.stages.aggregate.krum import Krum, MultiKrum
from turncoat.stages.aggregate.mean import Mean
from turncoat.stages.aggregate.norm_bound import NormBound
from turncoat.stages.train.local import LocalSGD
from turncoat.task import Batch, Model, Task
from turncoat.tasks.bundled import digits
from turncoat.tasks.models import MLP
from turncoat.tasks.partitions import IID, ClassShards
from turncoat.views import CoalitionView

RANDOM = Randomness(5)
quick = settings(max_examples=40, deadline=None)
PERTURBATIONS: tuple[Perturbation, ...] = ("std", "unit", "sign")


def updates(matrix: Tensor) -> tuple[Update, ...]:
    return tuple(Update(row, 1.0) for row in matrix)


def drawn(n: int, d: int, *address: int, shift: float = 0.3) -> Tensor:
    return torch.randn(n, d, generator=RANDOM.at("drawn", n, d, *address)) + shift


def view(
    own: Tensor, honest: Tensor | None = None, rule: Any = None, n: int | None = None, **more: Any
) -> CoalitionView[Update]:
    size = len(own) + (0 if honest is None else len(honest)) if n is None else n
    seen = None if honest is None else updates(honest)
    fields: dict[str, Any] = {"round": 0, "before": torch.zeros(own.shape[1])} | more
    return CoalitionView(
        model=Model(nn.Identity),
        own=updates(own),
        honest=seen,
        rule=rule,
        num_clients=size,
        **fields,
    )


def forged(forge: Any, seen: CoalitionView[Update], memory: Memory[Any] | None = None) -> Tensor:
    made = call(forge, seen, rng=RANDOM.at("forge"), memory=memory or Memory())
    return rows(made)


def step(rule: Any, *parts: Tensor) -> Tensor:
    """Return what a rule makes of the rows of these."""
    made: Tensor = call(rule, updates(torch.cat(parts)), verdict=Verdict())
    return made


def led(rule: Any, honest: Tensor, bad: Tensor) -> float:
    """Return how far a rule is led from the mean of the honest."""
    return float((step(rule, honest, bad) - honest.mean(dim=0)).norm())


# ---- ALIE, IPM, Gaussian, Boost


@pytest.mark.parametrize(("members", "z"), [(10, 0.2533), (12, 0.3360), (3, 0.0267), (24, 1.4261)])
def test_the_largest_z_of_fifty_is_that_of_the_paper(members: int, z: float) -> None:
    assert round(largest_z(50, members), 4) == z


@pytest.mark.parametrize(
    ("members", "z"), [(3, 0.69847), (5, 0.7054), (8, 0.71904), (10, 0.72575), (12, 0.73891)]
)
def test_the_other_convention_is_that_of_the_code_of_ndss21(members: int, z: float) -> None:
    assert largest_z(50, members, "probability") == pytest.approx(z, abs=1e-5)
    matrix = drawn(50, 6)
    assert torch.equal(
        forged(ALIE(convention="probability"), view(matrix[:members], matrix[members:])),
        forged(
            ALIE(largest_z(50, members, "probability")), view(matrix[:members], matrix[members:])
        ),
    )


def test_ipm_sends_the_mean_turned_round_and_turns_the_mean_where_the_paper_says() -> None:
    honest, own = drawn(6, 9), drawn(2, 9, 1)
    assert torch.allclose(forged(IPM(0.3), view(own, honest))[1], -0.3 * honest.mean(dim=0))
    for epsilon, turned in ((2.9, False), (3.1, True)):  # (n - m) / m is 3
        made = step(Mean(), honest, forged(IPM(epsilon), view(own, honest)))
        assert (float(made @ honest.mean(dim=0)) < 0) == turned


def test_noise_is_as_long_as_told_and_each_members_own() -> None:
    own = drawn(3, 4000)
    noise = forged(Gaussian(4.0), view(own))
    assert torch.allclose(noise.norm(dim=1), 4 * own.norm(dim=1), rtol=1e-4)
    assert float(torch.cosine_similarity(noise[0], noise[1], dim=0)) < 0.1
    absolute = forged(Gaussian(std=200.0), view(own))
    assert float(absolute.std()) == pytest.approx(200.0, rel=0.02)
    assert torch.allclose(forged(Gaussian(std=200.0, added=True), view(own)), absolute + own)


def test_boost_multiplies_by_the_cohort() -> None:
    own = drawn(2, 5)
    assert torch.allclose(forged(Boost(), view(own, n=9)), own * 9)
    assert torch.allclose(forged(Boost(2.0), view(own)), own * 2)


@cache
def byzfl() -> Any:
    """Return byzfl's attacks, without what else it would import."""
    package = next((Path(p) / "byzfl" for p in sys.path if (Path(p) / "byzfl").is_dir()), None)
    if package is None:
        pytest.skip("byzfl is not installed")
    for name, folder in (("byzfl", package), ("byzfl.benchmark", package / "benchmark")):
        module = ModuleType(name)
        module.__path__ = [str(folder)]
        sys.modules.setdefault(name, module)
    return pytest.importorskip("byzfl.attacks.attacks")


def test_byzfl_forges_the_same() -> None:
    honest, own = drawn(7, 30), drawn(2, 30, 1)
    seen, attacks = view(own, honest), byzfl()
    mean = honest.mean(dim=0)
    ipm = torch.as_tensor(attacks.InnerProductManipulation(0.7)(honest))
    assert torch.allclose(forged(IPM(0.7), seen)[0], ipm, atol=1e-6)
    alie = torch.as_tensor(attacks.ALittleIsEnough(1.3)(honest))  # on the other side of the mean
    assert torch.allclose(forged(ALIE(1.3), seen)[0] - mean, mean - alie, atol=1e-5)
    sent = forged(Mimic(), seen)[0]
    who = int((honest - sent).norm(dim=1).argmin())
    assert torch.equal(sent, torch.as_tensor(attacks.Mimic(who)(honest)))


# ---- Min-Max and Min-Sum


@quick
@given(
    st.integers(2, 9),
    st.integers(1, 40),
    st.integers(0, 10**6),
    st.sampled_from(PERTURBATIONS),
    st.sampled_from((1e-6, 1.0, 1e6)),
)
def test_the_search_finds_the_closed_form(
    n: int, d: int, seed: int, perturbation: Perturbation, size: float
) -> None:
    known = size * torch.randn(n, d, generator=Randomness(seed).at("x"), dtype=torch.float64)
    line = Line.of(known, perturbation)
    widest = diameter(known)
    found = bisection(lambda g: bool(line.distances(g).max() <= widest))
    assert found == pytest.approx(largest_gamma(known, line.away), rel=1e-4)
    bounds: tuple[Bound, ...] = ("max", "min")
    for bound in bounds:
        sums = torch.cdist(known, known).square().sum(dim=1)
        allowed = sums.max() if bound == "max" else sums.min()
        found = bisection(lambda g, a=allowed: bool(line.distances(g).sum() <= a))  # type: ignore[misc]
        assert found == pytest.approx(
            largest_gamma_of_sum(known, line.away, bound), rel=1e-4, abs=1e-6 * size
        )


@quick
@given(st.integers(2, 9), st.integers(1, 40), st.integers(0, 10**6), st.sampled_from(PERTURBATIONS))
def test_what_is_forged_is_no_outlier_and_could_not_go_further(
    n: int, d: int, seed: int, perturbation: Perturbation
) -> None:
    known = torch.randn(n, d, generator=Randomness(seed).at("x"))
    between = torch.cdist(known.double(), known.double()).square()
    seen = view(known[:1], known)
    for gamma in ("bisection", "closed-form"):
        bad = forged(MinMax(perturbation, gamma), seen)[0].double()
        furthest = float((known - bad).square().sum(dim=1).max())
        assert furthest == pytest.approx(float(between.max()), rel=1e-3)
        for bound, due in (("max", between.sum(1).max()), ("min", between.sum(1).min())):
            bad = forged(MinSum(perturbation, bound, gamma), seen)[0].double()  # type: ignore[arg-type]
            total = float((known - bad).square().sum())
            assert total == pytest.approx(float(due), rel=1e-3, abs=1e-5)


def test_min_sum_goes_no_further_than_min_max_and_its_code_less_far_than_its_paper() -> None:
    known = drawn(9, 200)
    away = perturbed(known, known.mean(dim=0), "std")
    gammas = [
        largest_gamma_of_sum(known, away, "min"),
        largest_gamma_of_sum(known, away, "max"),
        largest_gamma(known, away),
    ]
    assert 0 < gammas[0] < gammas[1] <= gammas[2]


def test_by_hand() -> None:
    known = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 3.0], [4.0, 3.0]])
    # a rectangle: mean (2, 1.5), every corner 2.5 from it, diameter 5
    assert forged(MinSum("unit"), view(known[:1], known))[0].tolist() == pytest.approx(
        [0.0, 0.0], abs=1e-4
    )
    bad = forged(MinMax("unit"), view(known[:1], known))[0]  # as far from (4, 3) as that diameter
    assert bad.tolist() == pytest.approx([0.0, 0.0], abs=1e-4)
    wide = forged(MinMax("sign", "closed-form"), view(known[:1], known))[0]
    gamma = (-7 + sqrt(49 + 8 * (25 - 6.25))) / 4  # 2 g^2 + 7 g + 6.25 = 25
    assert wide.tolist() == pytest.approx([2 - gamma, 1.5 - gamma])


# ---- Fang


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shift", [0.0, 0.1, 0.5])
def test_krum_picks_what_fang_forged_for_it(seed: int, shift: float) -> None:
    honest, own = drawn(12, 60, seed, shift=shift), drawn(4, 60, seed, 1, shift=shift)
    bad = forged(FangKrum(), view(own, honest, Krum(4)))
    assert torch.equal(step(Krum(4), honest, bad), bad[0])
    signs = torch.cat([honest, own]).mean(dim=0).sign()
    assert torch.allclose(bad[0] / -signs, bad[0].abs().max().expand(60))
    assert led(Krum(4), honest, bad) > led(Krum(4), honest, own)


def test_fangs_lambda_is_within_a_half_of_the_longest_that_krum_picks() -> None:
    honest, own = drawn(12, 60), drawn(4, 60, 1)
    bad = forged(FangKrum(), view(own, honest, Krum(4)))
    assert torch.equal(step(Krum(4), honest, bad), bad[0])
    assert not torch.equal(step(Krum(4), honest, 2 * bad), 2 * bad[0])


def test_fang_takes_krums_own_f_where_it_is_known() -> None:
    honest, own = drawn(12, 60), drawn(2, 60, 1)
    inside = NormBound(Krum(4), ratio=9.0)
    known = forged(FangKrum(), view(own, honest, inside))
    assert torch.equal(known, forged(FangKrum(num_byzantine=4), view(own, honest)))
    assert torch.equal(step(Krum(4), honest, known), known[0])


def test_with_partial_knowledge_fang_goes_by_its_own() -> None:
    own = drawn(5, 60, shift=0.1)
    bad = forged(FangKrum(), view(own, n=20))
    assert bool((bad * own.mean(dim=0) < 0).all())
    guess = forged(FangTrimmedMean(), view(own, n=20))
    mean, spread, signs = own.mean(dim=0), own.std(dim=0), own.mean(dim=0).sign()
    z = (guess - mean) / spread * -signs
    assert bool(((z > 2.999) & (z < 4.001)).all()) and float(z.std()) > 0.2


def test_the_values_for_the_trimmed_mean_lie_just_beyond_the_honest_on_both_sides() -> None:
    """Defect Q2 of the code of NDSS'21: one mask for both branches leaves half of them out."""
    honest, own = drawn(8, 500, shift=0.0), drawn(3, 500, 1, shift=0.0)
    bad = forged(FangTrimmedMean(), view(own, honest))
    signs = torch.cat([honest, own]).mean(dim=0).sign()
    least, most = honest.amin(dim=0), honest.amax(dim=0)
    rises, falls = signs > 0, signs < 0
    assert 100 < int(rises.sum()) < 400
    assert bool((bad <= least + 1e-6)[:, rises].all()) and bool(
        (bad >= most - 1e-6)[:, falls].all()
    )
    edge = torch.where(rises, least, most)
    assert bool(((bad / edge <= 2 + 1e-5) & (bad / edge >= 0.5 - 1e-5)).all())
    made, clean = step(TrimmedMean(3), honest, bad), step(TrimmedMean(3), honest, own)
    assert float(((made - clean) * signs < 0).float().mean()) > 0.95
    for half in (rises, falls):
        crippled = bad.where(half, torch.zeros_like(bad))
        assert led(TrimmedMean(3), honest, crippled) < 0.9 * led(TrimmedMean(3), honest, bad)


# ---- Tailored


RULES: list[Any] = [
    Median(),
    TrimmedMean(4),
    Krum(4),
    MultiKrum(4),
    MultiKrum(4, 3),
    NormBound(Mean(), ratio=2.0),
]


@pytest.mark.parametrize("perturbation", PERTURBATIONS)
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_the_tailored_lead_their_rule_at_least_as_far_as_min_max(
    rule: Any, perturbation: Perturbation
) -> None:
    for seed in range(2):
        honest, own = drawn(15, 40, seed), drawn(4, 40, seed, 1)
        seen, mean = view(own, honest, rule), honest.mean(dim=0)
        away = perturbed(honest, mean, perturbation)

        def along(bad: Tensor, mean: Tensor = mean, away: Tensor = away) -> float:
            return float((step(rule, honest, bad) - mean) @ away)  # noqa: B023

        bad = forged(Tailored(perturbation), seen)
        assert along(bad) >= along(forged(MinMax(perturbation), seen)) - 1e-4
        assert along(bad) > along(own) + 0.1
        if not isinstance(rule, Krum):
            far = led(rule, honest, forged(MinMax(perturbation), seen))
            assert led(rule, honest, bad) >= 0.98 * far


@pytest.mark.parametrize("rule", [Krum(4), MultiKrum(4)], ids=repr)
def test_rules_that_select_take_the_tailored_and_would_not_a_little_further_out(rule: Any) -> None:
    honest, own = drawn(15, 300), drawn(4, 300, 1)
    bad = forged(Tailored(), view(own, honest, rule))
    mean = honest.mean(dim=0)
    further = mean + (bad - mean) * 1.02
    assert led(rule, honest, further) < led(rule, honest, bad)
    if rule == Krum(4):
        assert torch.equal(step(rule, honest, bad), bad[0])


def test_a_rule_that_nobody_knows_cannot_be_tailored_for() -> None:
    with pytest.raises(RuleUnknown, match="knows_rule"):
        forged(Tailored(), view(drawn(2, 5), drawn(5, 5)))


@dataclass(frozen=True)
class Rooted:
    """A rule that trusts public data."""

    def __call__(self, messages: Sequence[Clear], *, public: Batch | None) -> Tensor:
        return rows(messages).mean(dim=0)


@dataclass(frozen=True)
class Curious:
    """A rule that names all that a coalition can give it."""

    def __call__(
        self,
        messages: Sequence[Clear],
        *,
        rng: torch.Generator,
        memory: Memory[float],
        model: Model,
        before: Tensor,
        cohort: tuple[int, ...],
        verdict: Any,
    ) -> Tensor:
        verdict.flag([0])
        assert cohort == tuple(range(len(messages))) and memory.last(0.0) == 0.0
        memory.keep(1.0)
        return rows(messages).median(dim=0).values + torch.rand((), generator=rng) * 0


def test_the_rule_is_asked_with_what_a_coalition_can_know() -> None:
    honest, own = drawn(6, 8), drawn(2, 8, 1)
    assert forged(Tailored(), view(own, honest, Curious())).shape == own.shape
    with pytest.raises(RuleUnknown, match="asks for 'public'"):
        forged(Tailored(), view(own, honest, NormBound(Rooted(), ratio=2.0)))
    everyones = replace(view(own, honest, Rooted()), public=(torch.zeros(1), torch.zeros(1)))
    assert forged(Tailored(), everyones).shape == own.shape
    assert len(forged(Strongest(), view(own, honest, Rooted()))) == 2  # by the panel


def test_a_rehearsal_has_as_many_messages_as_the_round() -> None:
    own = drawn(4, 30_000)
    blind = Rehearsal.of(view(own, n=50), RANDOM.at("rehearsal"))
    others = rows(blind.messages)[:46]
    assert len(blind.messages) == 50 and torch.equal(others[:4], own)
    between = float(torch.pdist(others[4:]).mean())  # the drawn are as far apart as one's own
    assert between == pytest.approx(float(torch.pdist(own).mean()), rel=0.1)
    assert float((forged(Tailored(), view(own, n=50, rule=Krum(4))) - own.mean(dim=0)).norm()) > 1


# ---- Mimic


def test_the_mimic_copies_who_goes_furthest_along_the_direction_of_most_variance() -> None:
    main = torch.nn.functional.normalize(drawn(1, 50), dim=1)[0]
    ways = torch.tensor([0.5, -3.0, 0.2, 1.0, 0.8, 0.1])
    memory: Memory[Any] = Memory()
    copied = []
    for t in range(8):
        honest = ways[:, None] * main + 0.05 * drawn(6, 50, t, shift=0.0)
        sent = forged(Mimic(5), view(drawn(2, 50, 1), honest), memory)
        copied.append(int((honest - sent[0]).norm(dim=1).argmin()))
        assert torch.equal(sent[0], sent[1]) and torch.equal(sent[0], honest[copied[-1]])
    assert copied[2:] == [1] * 6
    direction = memory.last(None)["direction"]
    assert abs(float(direction @ main)) > 0.99


def test_after_the_first_rounds_the_mimic_is_faithful() -> None:
    memory: Memory[Any] = Memory()
    matrix = torch.diag(torch.tensor([5.0, 1.0, 1.0, 1.0]))
    for _ in range(3):
        forged(Mimic(3), view(matrix[:1], matrix), memory)
    later = torch.diag(torch.tensor([1.0, 1.0, 9.0, 1.0]))
    assert torch.equal(forged(Mimic(3), view(matrix[:1], later), memory)[0], later[0])
    assert memory.last(None)["round"] == 3
    assert torch.equal(forged(Mimic(3), view(matrix[:1], later), Memory())[0], later[2])


# ---- PoisonedFL


@pytest.mark.parametrize(
    ("d", "count"), [(1204682, 603618), (139960, 70415), (717924, 359948), (145212, 73049)]
)
def test_the_critical_counts_are_those_of_the_authors_and_of_the_binomial(
    d: int, count: int
) -> None:
    assert critical_count(d, 0.01) == count == int(binom.ppf(0.99, d, 0.5))


def steps_of(forge: PoisonedFL, moves: Sequence[Tensor]) -> tuple[list[Tensor], dict[str, Any]]:
    """Return what is sent in each round of a model that moves so, and what is kept."""
    memory: Memory[Any] = Memory()
    at, sent = torch.zeros_like(moves[0]), []
    for t, move in enumerate([*moves, moves[0]]):
        seen = view(torch.zeros(2, len(at)), None, n=10, before=at, round=t)
        sent.append(forged(forge, seen, memory)[0])
        at = at + move
    return sent, memory.last(None)


def test_poisoned_steps_have_the_same_signs_in_every_round_and_the_length_that_is_due() -> None:
    moves = [0.1 * drawn(1, 400, t)[0] for t in range(6)]
    sent, kept = steps_of(PoisonedFL(8.0), moves)
    assert not sent[0].any()
    for t in range(1, 6):
        assert float(sent[t].norm()) == pytest.approx(8 * float(moves[t - 1].norm()), rel=1e-4)
        assert bool((sent[t] * kept["signs"] >= 0).all())
    departs = (moves[1] - sent[1] * moves[1].norm() / sent[1].norm()).abs()
    assert torch.allclose(sent[2].abs(), 8 * moves[1].norm() * departs / departs.norm(), rtol=1e-4)
    assert 150 < int((kept["signs"] > 0).sum()) < 250


def test_the_scale_shrinks_where_the_model_does_not_follow_and_not_below_the_floor() -> None:
    moves = [0.1 * drawn(1, 400, t, shift=0.0)[0] for t in range(12)]
    _, kept = steps_of(PoisonedFL(8.0, num_rounds=4), moves)
    assert kept["scale"] == pytest.approx(8 * 0.7**3)
    _, kept = steps_of(PoisonedFL(1.0, num_rounds=4), moves)
    assert kept["scale"] == pytest.approx(0.7)  # 0.49 would be below
    signs = kept["signs"]
    _, kept = steps_of(PoisonedFL(8.0, num_rounds=4), [0.1 * signs] * 12)
    assert kept["scale"] == 8.0  # the same generator draws the same signs
    assert not PoisonedFL().succeeds(torch.zeros(400), signs) or critical_count(0, 0.01) == 0


# ---- Strongest


@pytest.mark.parametrize("rule", [Mean(), *RULES], ids=repr)
def test_the_strongest_is_as_bad_as_the_worst_of_its_forges(rule: Any) -> None:
    honest, own = drawn(15, 40), drawn(4, 40, 1)
    seen = view(own, honest, rule)
    forges = (SignFlip(), IPM(), ALIE(1.0), MinMax("unit"), MinSum(), FangKrum())
    found = led(rule, honest, forged(Strongest(forges, by="distance"), seen))
    assert found == pytest.approx(max(led(rule, honest, forged(f, seen)) for f in forges), rel=1e-4)

    def against(bad: Tensor) -> float:
        return -float(step(rule, honest, bad) @ honest.mean(dim=0))

    found = against(forged(Strongest(forges), seen))
    assert found == pytest.approx(max(against(forged(f, seen)) for f in forges), rel=1e-4)


def test_without_the_rule_the_panel_decides_and_those_who_need_it_are_left_out() -> None:
    honest, own = drawn(15, 40), drawn(4, 40, 1)
    forges = (Tailored(), SignFlip(50.0), FangKrum())
    seen = view(own, honest)
    by_mean = Strongest(forges, (Mean(),), "distance")
    assert torch.equal(forged(by_mean, seen), forged(SignFlip(50.0), seen))
    by_krum = Strongest(forges, (Krum(4),))
    assert torch.equal(forged(by_krum, seen), forged(FangKrum(), seen))
    with pytest.raises(RuleUnknown, match="add one"):
        forged(Strongest((Tailored(),)), seen)


def test_each_of_its_forges_keeps_its_own_memory() -> None:
    memory: Memory[Any] = Memory()
    both = Strongest((Mimic(2), PoisonedFL()))
    for t in range(3):
        seen = view(drawn(2, 6), drawn(5, 6, 1), Mean(), before=torch.full((6,), float(t)), round=t)
        forged(both, seen, memory)
    assert memory.cell.keys() == {"/0", "/1"}
    assert memory.cell["/0"]["round"] == 2 and memory.cell["/1"]["forged"].any()


def test_lists_of_forges_can_be_written_in_a_file(tmp_path: Path) -> None:
    table = {
        "use": "strongest",
        "forges": ["ipm", {"use": "alie", "z": 1.5}],
        "panel": ["median", {"use": "krum", "num_byzantine": 1}],
    }
    made = build(table, Where("x.toml", tmp_path), kind="attack")
    assert made == Strongest((IPM(), ALIE(1.5)), (Median(), Krum(1)))
    assert build("strongest", Where("x.toml", tmp_path), kind="attack") == Strongest()


# ---- numbers that could be none

ALL: list[Any] = [
    Gaussian(),
    IPM(),
    Boost(),
    ALIE(1.0),
    Mimic(2),
    FangKrum(),
    FangTrimmedMean(),
    *(MinMax(p) for p in PERTURBATIONS),
    *(MinSum(p, gamma="closed-form") for p in PERTURBATIONS),
    *(Tailored(p, num_steps=2) for p in PERTURBATIONS),
    PoisonedFL(),
    Strongest(),
]


@pytest.mark.parametrize("forge", ALL, ids=repr)
def test_no_spread_no_mean_or_no_company_gives_no_nan(forge: Any) -> None:
    zero, one = torch.zeros(2, 7), torch.ones(5, 7)
    opposed = torch.cat([one, -one, torch.zeros(1, 7)])
    huge = drawn(5, 7) * 1e18
    cases = [
        view(zero, torch.zeros(5, 7), Median()),
        view(zero, one, Median()),
        view(one[:2], opposed, Mean()),
        view(one[:1], None, Median(), n=7),
        view(one[:1], one[:1], Mean()),
        view(opposed[4:6], None, Mean(), n=8),
        view(huge[:2], huge, Median()),
        view(1e-30 * one[:2], 1e-30 * drawn(5, 7), Median()),
    ]
    for seen in cases:
        memory: Memory[Any] = Memory()
        for t in range(3):
            made = forged(forge, replace(seen, round=t), memory)
            assert made.shape == rows(seen.own).shape and bool(made.isfinite().all()), seen


@pytest.mark.parametrize("forge", ALL, ids=repr)
def test_equal_updates_leave_nothing_to_hide_in(forge: Any) -> None:
    if isinstance(forge, MinMax | MinSum | ALIE | Mimic):
        made = forged(forge, view(torch.ones(2, 7), torch.ones(5, 7)))
        assert torch.allclose(made, torch.ones(2, 7))


# ---- on a federation


@cache
def tiny(shards: bool = False) -> Task:
    return digits(10, model=MLP((32,)), partition=ClassShards(2) if shards else IID())


@cache
def accuracy(
    rule: Any, forge: Any = None, rounds: int = 6, shards: bool = False, knows: bool = True
) -> float:
    federation = Federation(
        train=LocalSGD(0.2, num_epochs=1, batch_size=16), channel=Plain(), aggregate=rule
    )
    coalition: Coalition[Update] | None = None
    if forge is not None:
        members = Clients((0, 4, 7))
        coalition = Coalition(members=members, forge=forge, knows_honest=knows)
        check_worn(federation, coalition)
    run = simulate(federation, tiny(shards), num_rounds=rounds, seed=0, coalition=coalition)
    logits = run.task.model.logits(run.state.params, run.task.test[0])
    return float((logits.argmax(dim=1) == run.task.test[1]).float().mean())


HARM: list[tuple[Any, Any, float, Any]] = [
    # a forge, a rule that it harms, by how much at least, and a rule that stops most of it
    (Gaussian(30.0), Mean(), 0.1, Median()),
    (SignFlip(8.0), Mean(), 0.5, MultiKrum(3)),
    (IPM(5.0), Mean(), 0.5, MultiKrum(3)),
    (Boost(), Mean(), 0.2, Median()),
    (ALIE(1.5), Median(), 0.05, DnC(3)),
    (FangKrum(), Krum(3), 0.4, DnC(3)),
    (FangTrimmedMean(), TrimmedMean(3), 0.1, DnC(3)),
    (MinMax("unit"), Krum(3), 0.2, DnC(3)),
    (MinSum("unit"), MultiKrum(3), 0.05, DnC(3)),
    (Tailored("unit"), Mean(), 0.5, DnC(3)),
    (Tailored("unit"), Krum(3), 0.4, Median()),
    (PoisonedFL(), Mean(), 0.5, MultiKrum(3)),
    (Strongest(), Krum(3), 0.4, DnC(3)),
]


@pytest.mark.parametrize(("forge", "rule", "lost", "held"), HARM, ids=[repr(h[0]) for h in HARM])
def test_the_attack_harms_the_rule_it_is_for_and_another_stops_most_of_it(
    forge: Any, rule: Any, lost: float, held: Any
) -> None:
    harm = accuracy(rule) - accuracy(rule, forge)
    assert harm > lost
    assert accuracy(held) - accuracy(held, forge) < harm / 3


def test_a_mimic_makes_krum_forget_classes_where_each_client_has_two() -> None:
    clean, copied = (accuracy(MultiKrum(3), f, 8, True) for f in (None, Mimic(3)))
    assert copied < clean - 0.1


def test_an_attack_that_knows_only_its_own_still_harms() -> None:
    for forge, rule, lost in (
        (MinMax("unit"), MultiKrum(3), 0.03),
        (FangTrimmedMean(), TrimmedMean(3), 0.05),
        (Tailored("unit"), Median(), 0.05),
    ):
        assert accuracy(rule) - accuracy(rule, forge, knows=False) > lost


def test_a_federation_tells_a_coalition_that_it_lacks_the_rule() -> None:
    federation = Federation(train=LocalSGD(0.2), channel=Plain(), aggregate=Median())
    coalition: Coalition[Update] = Coalition(
        members=Clients((0, 1)), forge=Tailored(), knows_rule=False
    )
    with pytest.raises(AttackBroke, match="knows_rule"):
        simulate(federation, tiny(), num_rounds=1, seed=0, coalition=coalition)


# ---- sabotage: what is taken out of an attack is missed


@pytest.mark.parametrize(
    ("whole", "crippled", "rule"),
    [
        (MinMax("unit"), lambda mean, bad: mean, Krum(3)),  # without gamma
        (FangKrum(), lambda mean, bad: -bad, Krum(3)),  # with the model's way
        (Tailored("unit"), lambda mean, bad: mean + 3 * (bad - mean), Krum(3)),  # too far
        (Tailored("unit"), lambda mean, bad: mean + (bad - mean) / 3, Krum(3)),  # not far enough
        (FangTrimmedMean(), lambda mean, bad: 2 * mean - bad, TrimmedMean(3)),  # the wrong side
        (MinSum("sign"), lambda mean, bad: mean + (bad - mean).abs(), MultiKrum(3)),  # no signs
    ],
    ids=lambda part: getattr(part, "__name__", repr(part)),
)
def test_an_attack_without_its_sharp_end_leads_less_far_astray(
    whole: Any, crippled: Callable[[Tensor, Tensor], Tensor], rule: Any
) -> None:
    honest, own = drawn(10, 300, shift=0.2), drawn(3, 300, 1, shift=0.2)
    mean, bad = honest.mean(dim=0), forged(whole, view(own, honest, rule))

    def damage(sent: Tensor) -> float:
        return -float(step(rule, honest, sent.expand(3, -1)) @ mean)

    assert damage(crippled(mean, bad)) < damage(bad) - 0.02 * float(mean.square().sum())


def test_a_consistent_attack_moves_a_median_further_than_signs_that_change() -> None:
    honest = [drawn(9, 300, t, shift=0.0) for t in range(20)]

    def way(forges: Sequence[Any]) -> float:
        memories: dict[int, Memory[Any]] = {i: Memory() for i in range(len(forges))}
        at = torch.zeros(300)
        for t, matrix in enumerate(honest):
            i = t % len(forges)
            seen = view(matrix[:4], None, n=13, before=at, round=t)
            rng = RANDOM.at("signs", i)
            bad = rows(call(forges[i], seen, rng=rng, memory=memories[i]))
            at = at + step(Median(), matrix, bad)
        return float(at.norm())

    assert way([PoisonedFL()]) > 1.3 * way([PoisonedFL()] * 10)


def test_numpy_agrees_with_the_spread() -> None:
    known = drawn(6, 70_000)  # more than one block of columns
    away = perturbed(known, known.double().mean(dim=0), "std")
    np.testing.assert_allclose(-away.numpy(), known.numpy().std(axis=0, ddof=1), rtol=1e-5)
    assert diameter(known) == pytest.approx(float(torch.pdist(known.double()).max()) ** 2, rel=1e-9)

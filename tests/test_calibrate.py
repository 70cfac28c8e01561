"""Bounds on what any attacker reaches, and the search for the weakest value that keeps a risk.

Oracles: the closed form of Gaussian privacy, the exact test of one sampled step, riskcal. Theorems
(hypothesis): the search ends at the edge. Golden: figures of riskcal 1.4.1. Sabotage: noise that
protects others, or nobody.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import dp_accounting
import pytest
from click.testing import Result
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from typer.testing import CliRunner

from turncoat import calibrate as calibration
from turncoat.audit import Audit, Event
from turncoat.calibrate import (
    AttackFailed,
    Calibration,
    Knob,
    Point,
    Risk,
    Uncalibratable,
    calibrate,
    middle,
    noise_of,
)
from turncoat.cli import Exit, app
from turncoat.config import load
from turncoat.metrics import tradeoff
from turncoat.metrics.intervals import clopper_pearson
from turncoat.metrics.tradeoff import advantage_limit, composed, tpr_limit
from turncoat.plan import pose
from turncoat.record import AuditFolder, read_cell
from turncoat.report.calibration import markdown, read, says, write_calibration
from turncoat.stages.train.dpsgd import DPSGD

TOML = """
title = "two <hospitals>"
rounds = 2
[task]
use = "digits"
num_clients = 2
train_size = 240
test_size = 240
model = { use = "mlp", hidden = [16] }
[federation]
train = { use = "local-sgd", lr = 0.3, num_epochs = 2, batch_size = 20 }
channel = "plain"
aggregate = "mean"
[attack.loss]
use = "loss-threshold"
seats = ["user"]
[attack.backdoor]
use = "model-replacement"
trigger = { use = "pixel-pattern", size = 2 }
target = 0
inner = { use = "local-sgd", lr = 0.1, num_epochs = 4, batch_size = 10 }
coalition = { members = { use = "clients", ids = [0] } }
acts = { use = "once", at = 1 }
[attack.inversion]
use = "inverting-gradients"
num_steps = 4
at = 0
seats = ["server"]
game = { use = "reconstruct", victim = 0 }
[defence.dp]
train = { use = "dp-sgd", lr = 0.5, max_norm = 1.0, expected_batch = 60, noise_multiplier = 1.0 }
[defence.bound]
aggregate = { use = "norm-bound", max_norm = 1.0 }
"""
TPR = Risk("tpr", 0.05, 0.01)
FINEST = tradeoff._FINEST
ENDS = st.just(0.0) | st.floats(1e-6, 10)


@pytest.fixture
def fine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's own step of the privacy loss, whatever was tested before."""
    monkeypatch.setattr(tradeoff, "_FINEST", FINEST)
    tradeoff._composed.cache_clear()


def gaussian(sigma: float, num_steps: int = 1, rate: float = 1.0) -> dp_accounting.DpEvent:
    step = dp_accounting.GaussianDpEvent(sigma)
    if rate < 1:
        step = dp_accounting.PoissonSampledDpEvent(rate, step)
    return dp_accounting.SelfComposedDpEvent(step, num_steps)


@settings(max_examples=2, deadline=None)
@given(mu=st.floats(0.05, 4.0), fpr=st.floats(1e-3, 0.9))
def test_bounds_of_a_gaussian_are_those_of_its_closed_form(mu: float, fpr: float) -> None:
    event = gaussian(2.0 / mu, 4)
    assert tpr_limit(event, fpr) == pytest.approx(norm.cdf(norm.ppf(fpr) + mu), abs=2e-4)
    assert advantage_limit(event) == pytest.approx(2 * norm.cdf(mu / 2) - 1, abs=2e-4)


@settings(max_examples=2, deadline=None)
@given(sigma=st.floats(0.5, 4.0), rate=st.floats(0.01, 0.9))
def test_the_best_test_of_a_sampled_step_reaches_the_bound_and_does_not_pass_it(
    sigma: float, rate: float
) -> None:
    """Whoever sees a sampled sum says "in" above a threshold: the likelihood ratio rises.

    From one half on the ratio is above 1, and the bound is the very test; below it the bound covers
    the test that turns both round, too.
    """
    event = gaussian(sigma, rate=rate)
    for threshold in (-1.0, 0.0, 0.5, 1.0, 2.0, 3.0):
        fpr = float(norm.sf(threshold / sigma))
        tpr = (1 - rate) * fpr + rate * float(norm.sf((threshold - 1) / sigma))
        limit = tpr_limit(event, fpr)
        assert tpr <= limit + 1e-9
        if threshold >= 0.5:
            assert limit == pytest.approx(tpr, abs=3e-4)


RISKCAL = {  # sigma, rate, steps: 1 - beta at 0.001, 0.01 and 0.1, and the advantage
    (2.2, 0.1, 200): (0.008306, 0.050567, 0.272410, 0.260989),
    (0.6, 0.02, 100): (0.015580, 0.065562, 0.271064, 0.224718),
}


@pytest.mark.usefixtures("fine")
@pytest.mark.parametrize("how", RISKCAL)
def test_bounds_are_those_of_riskcal(how: tuple[float, float, int]) -> None:
    """Golden: ``get_beta_from_pld`` and ``get_advantage_from_pld`` of riskcal 1.4.1."""
    sigma, rate, num_steps = how
    event = gaussian(sigma, num_steps, rate)
    mine = [*(tpr_limit(event, fpr) for fpr in (0.001, 0.01, 0.1)), advantage_limit(event)]
    assert mine == pytest.approx(RISKCAL[how], abs=2e-4)
    assert all(m >= r - 1e-5 for m, r in zip(mine, RISKCAL[how], strict=True))


@pytest.mark.usefixtures("fine")
def test_little_noise_bounds_nothing_and_costs_little() -> None:
    event = gaussian(0.05, 500, 0.2)  # a loss of 100,000: at a fixed step it would take gigabytes
    assert tpr_limit(event, 0.01) == pytest.approx(1.0)
    assert composed(event).get_epsilon(1e-5) > 1000
    assert tpr_limit(dp_accounting.NonPrivateDpEvent(), 0.01) == 1.0
    with pytest.raises(ValueError, match="no accountant"):
        advantage_limit(dp_accounting.UnsupportedDpEvent())
    with pytest.raises(ValueError, match="between 0 and 1"):
        tpr_limit(event, 1.5)


@given(weak=ENDS, strong=ENDS, whole=st.booleans())
def test_a_middle_lies_between(weak: float, strong: float, whole: bool) -> None:
    if whole:
        weak, strong = int(weak), int(strong)
    value = middle(weak, strong, whole=whole)
    if value is not None:
        assert min(weak, strong) < value < max(weak, strong)
        assert not whole or value == int(value)
    elif whole:
        assert abs(weak - strong) <= 1
    elif weak and strong:
        assert max(weak, strong) / min(weak, strong) < 1.01


class Pretended(calibration._Search):
    """A search for an attack that is held from ``edge`` on."""

    def __init__(self, knob: Knob, edge: float, risk: Risk = TPR) -> None:
        self.knob, self.edge, self.risk, self.points = knob, edge, risk, {}
        self.whole = isinstance(knob.weakest, int)

    def _tried(self, value: float | None) -> Point:
        assert value is not None
        rising = (self.knob.weakest or 0) < (self.knob.strongest or 0)
        held = value >= self.edge if rising else value <= self.edge
        figures = (0.0, 0.0, 0.0 if held else 1.0)
        return Point(value, *figures, held, 1.0, None, None, None, None, 0.0, 1)


@given(edge=st.floats(0.02, 7.9), num_probes=st.integers(0, 12), falling=st.booleans())
def test_the_search_closes_in_on_the_edge(edge: float, num_probes: int, falling: bool) -> None:
    ends = (8.0, 0.01) if falling else (0.01, 8.0)
    search = Pretended(Knob("dp", ("train", "x"), *ends), edge)
    held, failed = search._between(*ends, num_probes)
    assert search._tried(held).holds and not search._tried(failed).holds
    most, least = max(held, failed), min(held, failed)
    assert most / least <= 800 ** (0.5**num_probes) * 1.01
    assert len(search.points) <= num_probes


@given(edge=st.integers(1, 100))
def test_whole_numbers_are_searched_to_the_last(edge: int) -> None:
    search = Pretended(Knob("dp", ("aggregate", "k"), 0, 100), edge)
    assert search._between(0, 100, 20) == (edge, edge - 1)


@pytest.fixture(scope="module")
def coarse() -> Iterator[None]:
    """Let accountants take longer steps of the privacy loss: what they say is safe all the same.

    What is tested with it is the search, which takes a tenth of the time; the bounds themselves
    are tested above, at the step that the package takes.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tradeoff, "_FINEST", 1e-3)
        tradeoff._composed.cache_clear()
        yield
    tradeoff._composed.cache_clear()


@pytest.fixture(scope="module")
def file(coarse: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files") / "two.toml"
    path.write_text(TOML)
    return path


@pytest.fixture(scope="module")
def audit(file: Path) -> Audit:
    return load(file)


NOISE = Knob("dp", ("train", "noise_multiplier"))


def events(said: list[Event]) -> Callable[[Event], None]:
    return said.append


@pytest.fixture(scope="module")
def done(audit: Audit, tmp_path_factory: pytest.TempPathFactory) -> tuple[Calibration, Path]:
    folder = tmp_path_factory.mktemp("done") / "out"
    found = calibrate(audit, folder, attack="loss", risk=TPR, knob=NOISE, num_probes=2)
    write_calibration(folder)
    return found, folder


def test_the_bound_is_where_the_closed_form_has_it(
    done: tuple[Calibration, Path], audit: Audit
) -> None:
    """Two rounds of two steps at a rate of one half; full batches have a closed form beside it."""
    bound = done[0].bound
    assert bound.value is not None and bound.reached is not None
    rate, num_steps = DPSGD(0.5, 1.0, 60, noise_multiplier=1.0).schedule(120)
    assert (rate, num_steps) == (0.5, 2)
    assert tpr_limit(gaussian(bound.value, 4, rate), 0.01) <= 0.05
    assert tpr_limit(gaussian(bound.value * 0.995, 4, rate), 0.01) > 0.05
    sampled: Any = audit.federations["dp"].train
    full = replace(sampled, expected_batch=120)
    federation = replace(audit.federations["dp"], train=full)
    search = calibration._Search(
        replace(audit, federations={"dp": federation}),
        Path("nowhere"), "loss", TPR, NOISE, False, lambda e: None, {},
    )  # fmt: skip
    mu = norm.ppf(0.05) - norm.ppf(0.01)
    assert search._by_theorem().value == pytest.approx(2**0.5 / mu, rel=3e-3)


def test_what_is_measured_is_what_the_audit_has_in_its_cells(
    done: tuple[Calibration, Path],
) -> None:
    found, folder = done
    assert found.num_members == found.num_others == 240
    cells = json.loads((folder / "plan.json").read_text())["cells"]
    assert cells[0]["defence"] == "none"
    for point in found.points:
        name = "none" if point.value is None else f"noise_multiplier {point.value:g}"
        (key,) = [c["key"] for c in cells if c["defence"] == name]
        known = read_cell(AuditFolder(folder), key)
        assert known is not None
        (rate,) = [m for m in known[0].marked.others if m.name == "tpr_at_1pct_fpr"]
        assert (point.reached, point.low, point.high) == (rate.value, rate.low, rate.high)
        assert point.holds == (rate.high <= 0.05)
        assert point.accuracy_low is not None and point.accuracy_high is not None
        assert point.accuracy_low < point.accuracy < point.accuracy_high
        assert point.seconds > 0 and point.num_trainings == 1
    held = [p.value for p in found.points[1:] if p.holds]
    assert found.measured == min(v for v in held if v is not None)
    proven = found.at(found.bound.value)
    assert proven is not None and proven.bound == found.bound.reached
    assert proven.epsilon == found.bound.epsilon
    assert found.points[0].bound is None  # nobody adds noise there


def test_the_second_run_trains_nothing_and_gives_the_same_bytes(
    done: tuple[Calibration, Path], audit: Audit
) -> None:
    found, folder = done
    before = {p.name: p.read_bytes() for p in folder.glob("calibration.*")}
    said: list[Event] = []
    again = calibrate(
        audit, folder, attack="loss", risk=TPR, knob=NOISE, num_probes=2, on_event=events(said)
    )
    write_calibration(folder)
    assert again == found
    assert said and all(e.of == 0 for e in said)
    assert before == {p.name: p.read_bytes() for p in folder.glob("calibration.*")}


def test_a_search_that_was_stopped_goes_on_and_finds_the_same(
    done: tuple[Calibration, Path], audit: Audit, tmp_path: Path
) -> None:
    count = [0]

    def stop(event: Event) -> None:
        count[0] += event.what == "training"
        if count[0] == 2:
            raise KeyboardInterrupt

    wish: dict[str, Any] = {"attack": "loss", "risk": TPR, "knob": NOISE, "num_probes": 2}
    with pytest.raises(KeyboardInterrupt):
        calibrate(audit, tmp_path / "out", on_event=stop, **wish)
    said: list[Event] = []
    again = calibrate(audit, tmp_path / "out", on_event=events(said), **wish)
    trained = sum(e.what == "training" for e in said)
    assert trained == len(done[0].points) - 2  # the second was saved before it was told

    def timeless(found: Calibration) -> Calibration:
        points = tuple(replace(p, seconds=0.0) for p in found.points)
        return replace(found, points=points, bound=replace(found.bound, seconds=0.0))

    assert timeless(again) == timeless(done[0])


def test_another_limit_reuses_what_was_trained(
    done: tuple[Calibration, Path], audit: Audit
) -> None:
    said: list[Event] = []
    risk, folder = Risk("advantage", 0.5), done[1].parent / "out"
    found = calibrate(
        audit, folder, attack="loss", risk=risk, knob=NOISE, num_probes=0, on_event=events(said)
    )
    assert sum(e.what == "training" for e in said) == 1  # at the bound's noise; 0 was there
    assert found.bound.reached is not None and found.bound.reached <= 0.5
    point = found.points[0]
    assert point.low <= point.reached <= point.high
    calibrate(audit, folder, attack="loss", risk=TPR, knob=NOISE, num_probes=2)  # as it was


def test_other_risks_and_other_numbers(audit: Audit, tmp_path: Path) -> None:
    clip = Knob("bound", ("aggregate", "max_norm"), 50.0, 0.001)
    found = calibrate(
        audit, tmp_path, attack="backdoor", risk=Risk("success", 0.5), knob=clip, num_probes=2
    )
    assert found.points[0].reached > 0.5, "the backdoor should work where nothing stops it"
    assert found.measured is not None and found.measured < 50 and found.failed is not None
    assert found.failed > found.measured
    assert found.bound.value is None and "no theorem" in found.bound.reason
    assert [p.value for p in found.points[1:]] == sorted(
        (p.value for p in found.points[1:] if p.value is not None), reverse=True
    )
    write_calibration(tmp_path)
    noise = replace(NOISE, weakest=0.0, strongest=100.0)
    psnr = calibrate(
        audit, tmp_path, attack="inversion", risk=Risk("psnr", 60.0), knob=noise, num_probes=0
    )
    assert psnr.measured == 0.0 and psnr.points[0].low > 0
    assert "dB" in markdown(json.loads(json.dumps(read(tmp_path))))


def test_a_clip_does_not_change_what_a_theorem_says(audit: Audit) -> None:
    knob = Knob("dp", ("train", "max_norm"), 10.0, 0.1)
    search = calibration._Search(
        audit, Path("nowhere"), "loss", Risk("advantage", 0.9), knob, False, lambda e: None, {}
    )
    assert "same of every max_norm" in search._by_theorem().reason


@pytest.mark.parametrize(
    "train, aggregate, seat, why",
    [
        ('"local-sgd", lr = 0.1', '"mean"', "user", "no stage adds noise"),
        (
            '"local-sgd", lr = 0.1',
            '"dp-fedavg", max_norm = 1.0, noise_multiplier = 1.0, expected_cohort = 2',
            "user",
            "for each client",
        ),
    ],
)
def test_noise_that_protects_others_gives_no_bound(
    train: str, aggregate: str, seat: str, why: str, tmp_path: Path
) -> None:
    text = TOML.replace(
        'train = { use = "local-sgd", lr = 0.3, num_epochs = 2, batch_size = 20 }',
        f"train = {{ use = {train} }}",
    ).replace('aggregate = "mean"', f"aggregate = {{ use = {aggregate} }}")
    path = tmp_path / "other.toml"
    path.write_text(text.replace('seats = ["user"]', f'seats = ["{seat}"]'))
    audit = load(path)
    knob = Knob("none", ("aggregate",), 0.0, 1.0)
    search = object.__new__(calibration._Search)
    search.risk, search.audit, search.knob = TPR, audit, knob
    search.seats = []
    proof, reason = search._proof(audit.federations["none"])
    assert proof is None and why in reason


def turncoat(*arguments: str | Path, code: Exit) -> Result:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


@pytest.mark.parametrize(
    "wish, said",
    [
        ("--tpr 0.01 --fpr 0.05", "guessing reaches a TPR as large as the FPR"),
        ("--tpr 0.05 --fpr 0.05", "guessing reaches"),
        ("--tpr 1.5 --fpr 0.01", "between 0 and 1"),
        ("--tpr 0.5 --fpr 0", "between 0 and 1"),
        ("--tpr 0.5", "give --tpr and --fpr together"),
        ("--advantage 0.2 --fpr 0.01", "give --tpr and --fpr together"),
        ("--advantage nan", "give a finite one"),
        ("", "by one of --tpr, --advantage, --psnr, --success"),
        ("--advantage 0.2 --psnr 10", "--advantage and --psnr are given"),
        ("--tpr 0.05 --fpr 0.001", "at least 10000 non-members to be told; the game has 240"),
        ("--tpr 0.009 --fpr 0.005", "at least 2000 non-members"),
        ("--tpr 0.012 --fpr 0.01", "it needs 306 of them"),
        ("--psnr 12", "a figure of inversion"),
        ("--advantage 0.2 --defence dq", "there is no column 'dq'; there are bound, dp, none"),
        ("--advantage 0.2 --parameter train.noise", "leads nowhere behind 'dp'"),
        ("--advantage 0.2 --parameter train", "no number"),
        ("--advantage 0.2 --parameter train.max_norm --defence dp", "--weakest and --strongest"),
        ("--advantage 0.2 --weakest 1", "together, or none"),
        ("--advantage 0.2 --weakest 1 --strongest 1", "give two"),
        ("--advantage 0.2 --weakest -3 --strongest 1", "noise_multiplier must be at least 0"),
        ("--advantage 0.2 --set defence.dp.train.target_epsilon=-1", "must be positive"),
    ],
)
def test_a_wish_that_cannot_be_granted_is_refused(
    wish: str, said: str, file: Path, tmp_path: Path
) -> None:
    command = ["--attack", "loss", "--out", str(tmp_path / "out"), "--jobs", "1", *wish.split()]
    output = turncoat("calibrate", file, *command, code=Exit.BAD_INPUT).output
    assert said in " ".join(output.split())


def test_what_the_file_lacks_is_told_with_its_cure(file: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare.toml"
    bare.write_text(TOML[: TOML.index("[defence.dp]")])
    wish = ("--advantage", "0.3", "--out", tmp_path / "out")
    said = turncoat("calibrate", bare, "--attack", "loss", *wish, code=Exit.BAD_INPUT).output
    assert "no stage of the file adds noise: add a table such as [defence.dp-sgd]" in said
    said = turncoat("calibrate", file, "--attack", "losss", *wish, code=Exit.BAD_INPUT).output
    assert "did you mean 'loss'?" in said
    assert not (tmp_path / "out").exists()


def test_the_number_is_found_where_there_is_one(audit: Audit) -> None:
    assert noise_of(audit, None, None) == ("dp", "train.noise_multiplier")
    assert noise_of(audit, "aggregate.max_norm", None) == ("bound", "aggregate.max_norm")
    twice = replace(audit, federations={**audit.federations} | {"dq": audit.federations["dp"]})
    with pytest.raises(Uncalibratable, match="choose by --defence"):
        noise_of(twice, None, None)


def test_a_target_gives_way_to_the_noise_and_back(audit: Audit) -> None:
    federation = audit.federations["dp"]
    target = Knob("dp", ("train", "target_epsilon"), 8.0, 1.0)
    train: Any = federation.train
    fitted = replace(train, noise_multiplier=None, target_epsilon=4.0, delta=1e-5)
    with_target = replace(federation, train=fitted)
    assert NOISE.turned(with_target, 2.0).train == replace(train, noise_multiplier=2.0)
    changed: Any = target.turned(with_target, 2.0).train
    assert changed.target_epsilon == 2.0 and changed.noise_multiplier is None


def test_an_attack_that_breaks_down_is_no_result(
    audit: Audit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*scores: Any) -> float:
        raise RuntimeError("out of luck")

    monkeypatch.setattr("turncoat.games.membership.auc", broken)
    with pytest.raises(AttackFailed, match="out of luck"):
        calibrate(audit, tmp_path, attack="loss", risk=TPR, knob=NOISE)


def test_the_command_shows_the_figures_and_the_page_escapes_names(
    done: tuple[Calibration, Path], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (found, folder), reported = done, list[Path]()
    monkeypatch.setattr("turncoat.report.page.write_report", reported.append)  # it takes long
    wish = ("--tpr", "0.05", "--fpr", "0.01", "--probes", "2", "--jobs", "1", "--out", folder)
    said = turncoat("calibrate", file, "--attack", "loss", *wish, code=Exit.DONE).output
    assert f"{found.bound.value:g}" in said and f"{found.measured:g}" in said
    assert reported == [folder]
    page = (folder / "calibration.html").read_text(encoding="utf-8")
    assert "two &lt;hospitals&gt;" in page and "<hospitals>" not in page
    text = (folder / "calibration.md").read_text(encoding="utf-8")
    for point in found.points[1:]:
        assert f"| {point.value:g} |" in text and f"{100 * point.reached:.1f} %" in text


def test_words_say_what_was_and_what_was_not_found(done: tuple[Calibration, Path]) -> None:
    told = read(done[1])
    none = told | {"measured": None, "failed": told["bound"]["value"]}
    assert "so few records cannot show it" in " ".join(says(none))
    bare = told | {"bound": told["bound"] | {"value": None, "reason": "no theorem"}}
    assert "By theorem: nothing; no theorem." in list(says(bare))
    loose = told | {"delta": 0.1}
    assert "promises little" in " ".join(says(loose))
    assert "promises little" not in " ".join(says(told))


def test_an_upper_limit_needs_so_many_members() -> None:
    with pytest.raises(Uncalibratable, match="it needs 72 of them"):
        TPR.check(71, 1000)
    TPR.check(72, 1000)
    assert clopper_pearson(0, 72)[1] <= 0.05 < clopper_pearson(0, 71)[1]


def test_the_example_asks_for_what_its_head_says() -> None:
    """On other images, for PneumoniaMNIST must be fetched."""
    path = Path(__file__).parents[1] / "examples" / "calibration" / "pneumonia.toml"
    other = ['task.use="digits"', "rounds=1"]
    audit = load(path, overrides=other)
    assert "--attack lira --tpr 0.05 --fpr 0.01" in audit.text
    assert audit.task.sizes == (100, 100, 100) and audit.delta < 1 / 100
    assert noise_of(audit, None, None) == ("dp-sgd", "train.noise_multiplier")
    trial: Any = audit.entries["lira"].trial
    _, truth = pose(audit, audit.federations["dp-sgd"], trial.game, trial.at, 0)
    TPR.check(int(truth.sum()), int((~truth).sum()))

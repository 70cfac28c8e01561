"""The ledger of reproductions, with toy experiments. Kinds: contract, oracle (scipy), sabotage
(kill it, damage what it wrote, let one measurement raise: nothing else is lost)."""

from __future__ import annotations

import json
import pickle
import time
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pytest
from scipy import stats

from papers import foundation, inference, inversion, ledger, poisoning
from papers.__main__ import LEDGERS
from papers.ledger import Done, Expectation, Experiment, Summary, measure_all, page, record
from turncoat.describe import fingerprint

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Toy:
    """Gives seed + shift, leaves a line in a diary, and raises for one seed if told to."""

    diary: str
    shift: float = 0.0
    broken: int | None = None

    def __call__(self, seed: int) -> dict[str, float | str]:
        with Path(self.diary).open("a") as file:
            file.write(f"{seed}\n")
        if seed == self.broken:
            raise ValueError("no data here")
        return {"score": seed + self.shift, "data": "made up"}


def toy(folder: Path, shift: float = 0.0, broken: int | None = None) -> Experiment:
    measure = Toy(str(folder / "diary"), shift, broken)
    bound = Expectation("score", at_least=10, at_most=20)
    return Experiment("toy", "Seeds are seeds.", measure, "Look.", "Ours.", (bound,))


def jobs(experiment: Experiment, num_seeds: int) -> list[tuple[Experiment, int]]:
    return [(experiment, seed) for seed in experiment.seeds(num_seeds)]


def diary(folder: Path) -> list[int]:
    return sorted(map(int, (folder / "diary").read_text().split()))


# resuming


def test_what_is_finished_is_never_measured_again(tmp_path: Path) -> None:
    done, e = Done(tmp_path / "done"), toy(tmp_path)
    assert not measure_all(jobs(e, 2), done, num_processes=2)
    assert not measure_all(jobs(e, 3), done, num_processes=2)
    assert diary(tmp_path) == [10, 11, 12]
    result = done.read(e, 11)
    assert result is not None
    assert (result.figures, result.notes) == ({"score": 11.0}, {"data": "made up"})


def test_another_recipe_is_another_result(tmp_path: Path) -> None:
    done, e = Done(tmp_path / "done"), toy(tmp_path)
    done.measure(e, 10)
    assert done.read(toy(tmp_path, shift=1.0), 10) is None
    assert done.read(replace(e, claim="Other words."), 10) is not None


def test_a_damaged_result_is_measured_again(tmp_path: Path) -> None:
    done, e = Done(tmp_path / "done"), toy(tmp_path)
    done.measure(e, 10)
    kept = done.of(e, 10)
    kept.write_text(kept.read_text()[:30])
    assert done.read(e, 10) is None
    assert not measure_all(jobs(e, 1), done, num_processes=1)
    assert done.read(e, 10) is not None


def test_one_measurement_that_raises_is_named_and_the_others_are_kept(tmp_path: Path) -> None:
    done, e = Done(tmp_path / "done"), toy(tmp_path, broken=11)
    said: list[str] = []
    failed = measure_all(jobs(e, 3), done, num_processes=1, say=said.append)
    assert failed == {(e, 11): "ValueError: no data here"}
    assert [done.read(e, s) is not None for s in e.seeds(3)] == [True, False, True]
    assert len(said) == 3
    known = record("toys", [e], done, num_seeds=3, failed=failed)
    assert known["experiments"][0]["failures"] == ["ValueError: no data here"]
    assert "1 seeds are missing" in page(known)


@dataclass(frozen=True)
class Stuck:
    """Gives its seed, and for any but the first waits until a file lets it."""

    folder: str

    def __call__(self, seed: int) -> dict[str, float | str]:
        while seed > 10 and not Path(self.folder, "go").exists():
            time.sleep(0.01)
        with Path(self.folder, "diary").open("a") as file:
            file.write(f"{seed}\n")
        return {"score": float(seed)}


def test_a_run_that_was_killed_goes_on(tmp_path: Path) -> None:
    done, e = Done(tmp_path / "done"), replace(toy(tmp_path), measure=Stuck(str(tmp_path)))
    work = partial(measure_all, jobs(e, 2), done, num_processes=1)
    killed = get_context("fork").Process(target=work)
    killed.start()
    until = time.monotonic() + 60
    while done.read(e, 10) is None:
        assert time.monotonic() < until
        time.sleep(0.01)
    killed.kill()
    killed.join()
    time.sleep(0.5)  # its worker notices, and ends
    (tmp_path / "go").touch()
    assert not work()
    assert diary(tmp_path) == [10, 11]


# judging


def test_the_interval_is_students() -> None:
    values = (1.0, 2.0, 4.0, 5.0, 9.0)
    low, high = stats.t.interval(0.95, 4, loc=4.2, scale=stats.sem(values))
    summary = Summary.of(values)
    assert (summary.value, summary.low, summary.high) == pytest.approx((4.2, low, high))


@pytest.mark.parametrize(
    ("values", "bounds", "verdict"),
    [
        ((1.0, 1.1, 0.9), {"at_least": 0.5, "at_most": 1.5}, "met"),
        ((1.0, 1.1, 0.9), {"at_most": 1.05}, "met in the mean only"),
        ((1.0, 1.1, 0.9), {"at_most": 0.9}, "not met"),
        ((1.0, 1.0, 1.0), {"at_least": 1.0}, "met"),
        ((0.0, 0.0, 0.0), {"above": 0.0}, "not met"),
        ((2.0, 4.0), {"above": 0.0}, "met in the mean only"),
        ((2.0,), {"above": 0.0}, "met"),
        ((float("nan"), 1.0), {"above": 0.0}, "not met"),
        ((float("nan"), 1.0), {}, "not met"),
    ],
)
def test_the_whole_interval_must_lie_within_the_bounds(
    values: tuple[float, ...], bounds: dict[str, float], verdict: str
) -> None:
    assert Expectation("score", **bounds).verdict(Summary.of(values)) == verdict


def test_what_was_not_run_is_shown_as_not_run(tmp_path: Path) -> None:
    known = record("toys", [toy(tmp_path)], Done(tmp_path), num_seeds=2, failed={})
    assert known["experiments"][0]["expectations"][0]["verdict"] == "not run"
    assert "0 of 1 expectations are met" in page(known)


def test_the_table_says_value_interval_expectation_and_verdict(tmp_path: Path) -> None:
    done, e = Done(tmp_path / "done"), toy(tmp_path)
    for seed in e.seeds(3):
        done.measure(e, seed)
    said = page(record("toys", [e], done, num_seeds=3, failed={}))
    assert "| [toy](#toy) | score | 11 | 8.5159 to 13.48 | at least 10 and at most 20 |" in said
    assert "met in the mean only" in said
    assert "made up" in said


def test_a_changed_package_is_said_to_be_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, e = Done(tmp_path / "done"), toy(tmp_path)
    done.measure(e, 10)
    assert "has changed since" not in page(record("toys", [e], done, num_seeds=1, failed={}))
    monkeypatch.setattr(ledger, "own_code", lambda: "another text")
    assert "has changed since" in page(record("toys", [e], done, num_seeds=1, failed={}))


# the experiments that ship


SHIPPED = {
    "foundation": foundation.EXPERIMENTS,
    "poisoning": poisoning.EXPERIMENTS,
    "inversion": inversion.EXPERIMENTS,
    "inference": inference.EXPERIMENTS,
}


def test_every_ledger_ships() -> None:
    assert tuple(SHIPPED) == LEDGERS


@pytest.mark.parametrize("name", SHIPPED)
def test_every_experiment_has_a_name_of_its_own_a_description_and_a_way_to_a_worker(
    name: str,
) -> None:
    experiments = SHIPPED[name]
    assert len({e.name for e in experiments}) == len(experiments)
    assert len({fingerprint(e.measure) for e in experiments}) == len(experiments)
    for e in experiments:
        assert pickle.loads(pickle.dumps(e)) == e


@pytest.mark.parametrize("name", SHIPPED)
def test_every_expectation_of_a_shipped_table_was_judged(name: str) -> None:
    held = json.loads((ROOT / "papers" / f"{name}.json").read_text("utf-8"))
    asked = {(e.name, x.figure, str(x)) for e in SHIPPED[name] for x in e.expectations}
    rows = held["experiments"]
    judged = {(e["name"], x["figure"], x["expected"]) for e in rows for x in e["expectations"]}
    assert judged == asked
    for e in rows:
        assert {x["figure"] for x in e["expectations"]} <= set(e["figures"])
    assert (ROOT / "papers" / f"{name}.md").read_text("utf-8") == page(held)


def test_alies_z_is_measured_and_not_typed_in() -> None:
    e = next(e for e in foundation.EXPERIMENTS if e.name == "alie-z")
    figures = e.measure(0)
    for x in e.expectations:
        assert x.verdict(Summary.of([float(figures[x.figure])])) == "met"

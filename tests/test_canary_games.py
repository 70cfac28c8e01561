"""Canaries in a user's own federation, from his file to the page.

Kinds: sabotage (broken trainers and rules that claim epsilon = 1 are refuted, the right ones are
not), oracle (group privacy against a Gaussian of twice the length), theorem (who is in, and who is
not), contract (units, errors, the file, the page).
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from dp_accounting import GaussianDpEvent, SelfComposedDpEvent

from turncoat.attacks.membership.canaries import DiracProducts, GradientRegression
from turncoat.attacks.membership.loss_threshold import LossThreshold
from turncoat.audit import run_audit
from turncoat.config import load
from turncoat.federation import Federation, Plain
from turncoat.games.canaries import Canaries, ClientCanaries
from turncoat.graphs import Complete
from turncoat.metrics.tradeoff import composed
from turncoat.plan import Audit, Entry, Impossible, claim_of, plan, planted_run
from turncoat.privacy import Private, Unit, claim, of_two
from turncoat.report.claims import Audit as Shown
from turncoat.report.page import write_report
from turncoat.stages.aggregate.dp_fedavg import DPFedAvg
from turncoat.stages.aggregate.mean import Mean
from turncoat.stages.train.dpsgd import DPSGD, noise_for
from turncoat.stages.train.local import LocalSGD
from turncoat.stages.train.local_noise import LocalNoise
from turncoat.task import Task
from turncoat.tasks.bundled import digits
from turncoat.tasks.models import MLP
from turncoat.testing.sabotage import ClippedBatch, ClippedLate, NoiseForAll, PlainDPSGD
from turncoat.trial import Blocked, Cell, Scored, Trial
from turncoat.views import Seat

torch.set_num_threads(1)

DELTA, ROUNDS, RATE = 1e-5, 20, 0.25
FIELDS: dict[str, Any] = {
    "lr": 0.5,
    "max_norm": 1.0,
    "rate": RATE,
    "noise_multiplier": noise_for(1.0, DELTA, RATE, ROUNDS),
}
RECORDS = Canaries(150, client=0, records="noise")
CLIENTS = ClientCanaries(80)
SGD = LocalSGD(0.1, batch_size=20)


@cache
def task() -> Task:
    return digits(2, per_client=250, test_size=600, public_size=100, seed=3, model=MLP((24,)))


def federation(train: Any = SGD, rule: Any = None, **stages: Any) -> Any:
    return Federation(train=train, channel=Plain(), aggregate=rule or Mean(), **stages)


def audit(
    federations: dict[str, Any],
    attack: Any,
    game: Any,
    seat: Seat,
    rounds: int = ROUNDS,
    seeds: tuple[int, ...] = (0,),
) -> Audit:
    entries = {"canaries": Entry(Trial(attack, game), (seat,))}
    return Audit("own", task(), federations, entries, rounds, seeds, DELTA)


def cells(played: Audit, folder: Path) -> dict[str, Cell]:
    return {c.defence: found for c, found in run_audit(played, folder).items()}


def measured(found: Cell) -> Any:
    assert isinstance(found, Scored), found
    return found.marked.headline


# records


def test_a_sabotaged_trainer_in_a_federation_is_refuted_and_the_right_one_is_not(
    tmp_path: Path,
) -> None:
    played = audit(
        {
            "right": federation(PlainDPSGD(**FIELDS)),
            "clipped late": federation(ClippedLate(**FIELDS)),
            "clipped batch": federation(ClippedBatch(**FIELDS)),
        },
        GradientRegression(),
        RECORDS,
        Seat.SERVER,
    )
    found = cells(played, tmp_path)
    for name, cell in found.items():
        lead = measured(cell)
        assert 0.99 < lead.baseline <= 1.0  # what all of them claim
        assert lead.beats_baseline == (name != "right"), name
    write_report(tmp_path)
    page = (tmp_path / "report.html").read_text("utf-8")
    assert page.count("refuted: it spends more than it claims") == 2
    assert page.count("not refuted, which proves nothing") == 1
    assert "Claimed ε, and what canaries prove" in page
    assert (tmp_path / "figures" / "claims.svg").stat().st_size > 1000
    rows = [json.loads(line) for line in (tmp_path / "cells.jsonl").read_text("utf-8").splitlines()]
    assert {r["metric"] for r in rows} == {"epsilon_lower_bound"}
    assert all(r["seconds"] > 0 and 0 <= r["guess_accuracy"] <= 1 for r in rows)


def test_half_of_the_canaries_are_added_to_what_their_holders_have() -> None:
    for client in (None, 1):
        game = Canaries(60, client=client)
        played = audit({"none": federation()}, LossThreshold(), game, Seat.USER)
        with_them, coalition = planted_run(played, played.federations["none"], game, 0)
        added = [new - old for new, old in zip(with_them.sizes, task().sizes, strict=True)]
        assert coalition is None and 15 < sum(added) < 45
        assert added[0] == 0 if client == 1 else min(added) > 0
        for c in range(2):
            assert torch.equal(with_them.clients[c][0][: task().sizes[c]], task().clients[c][0])


def test_where_nothing_is_claimed_the_leak_is_measured_all_the_same(tmp_path: Path) -> None:
    played = audit({"none": federation()}, GradientRegression(), RECORDS, Seat.SERVER, rounds=6)
    lead = measured(cells(played, tmp_path)["none"])
    assert lead.baseline == 0 and lead.value > 1 and lead.value <= lead.worst
    write_report(tmp_path)
    assert "nothing is claimed for each record" in (tmp_path / "report.html").read_text("utf-8")


def test_a_claim_may_be_stated_where_stages_make_none(tmp_path: Path) -> None:
    game = Canaries(150, client=0, records="noise", claimed=0.5)
    played = audit({"none": federation()}, GradientRegression(), game, Seat.SERVER, rounds=6)
    lead = measured(cells(played, tmp_path)["none"])
    assert lead.baseline == 0.5 and lead.beats_baseline


@pytest.mark.parametrize("records", ["mislabelled", "natural", "noise"])
def test_every_kind_of_record_is_told_better_than_by_chance_without_noise(
    records: Any, tmp_path: Path
) -> None:
    game = Canaries(150, client=0, records=records)
    played = audit({"none": federation()}, GradientRegression(), game, Seat.SERVER, rounds=6)
    (found,) = cells(played, tmp_path).values()
    assert isinstance(found, Scored)
    (right,) = [m for m in found.marked.others if m.name == "guess_accuracy"]
    assert right.beats_baseline


# clients


def test_a_rule_with_too_little_noise_is_refuted_and_the_right_one_is_not(tmp_path: Path) -> None:
    sigma = noise_for(1.0, DELTA, 1.0, 8)
    options: dict[str, Any] = {
        "max_norm": 1.0,
        "noise_multiplier": sigma,
        "expected_cohort": 50,
    }
    played = audit(
        {
            "right": federation(rule=DPFedAvg(**options)),
            "wrong": federation(rule=NoiseForAll(**options, num_clients=1000)),
            "none": federation(),
            "records": federation(DPSGD(0.1, 1.0, 20, noise_multiplier=2.0)),
        },
        DiracProducts(),
        CLIENTS,
        Seat.CLIENT,
        rounds=8,
    )
    found = cells(played, tmp_path)
    assert not measured(found["right"]).beats_baseline
    assert 0.99 < measured(found["right"]).baseline <= 1.0
    assert measured(found["wrong"]).beats_baseline
    assert measured(found["none"]).baseline == 0 and measured(found["none"]).value > 2
    blocked = found["records"]
    assert isinstance(blocked, Blocked) and "bounds no client" in blocked.reason
    assert "play 'canaries', of records" in blocked.reason


def test_clients_who_add_the_noise_themselves_are_audited_with_their_noise(tmp_path: Path) -> None:
    played = audit(
        {
            name: federation(LocalNoise(max_norm=1.0, noise_multiplier=sigma, inner=SGD))
            for name, sigma in (("right", noise_for(1.0, DELTA, 1.0, 4)), ("weak", 0.05))
        },
        DiracProducts(),
        ClientCanaries(60),
        Seat.CLIENT,
        rounds=4,
    )
    for name in ("right", "weak"):
        whole, coalition = planted_run(played, played.federations[name], ClientCanaries(60), 0)
        assert len(whole.clients) == 62  # who is there is public
        assert coalition is not None and isinstance(coalition.train, LocalNoise)
    found = cells(played, tmp_path)
    assert not measured(found["right"]).beats_baseline
    assert measured(found["weak"]).value > 1  # though it claims much more


# units and claims


def test_a_claim_for_each_client_bounds_a_record_as_two_clients() -> None:
    rule = DPFedAvg(max_norm=1.0, noise_multiplier=20.0, expected_cohort=2)
    played = audit({"none": federation(rule=rule)}, LossThreshold(), RECORDS, Seat.CLIENT)
    found = {
        unit: claim_of(played, played.federations["none"], game, Seat.CLIENT)
        for unit, game in ((Unit.RECORD, RECORDS), (Unit.CLIENT, CLIENTS))
    }
    one, two = found[Unit.CLIENT].epsilon, found[Unit.RECORD].epsilon
    assert one is not None and two is not None and 2 * one < two < 3 * one
    server = claim_of(played, played.federations["none"], RECORDS, Seat.SERVER)
    assert server.epsilon is None and "nothing is claimed against the server" in server.text
    records = federation(DPSGD(0.1, 1.0, 20, noise_multiplier=2.0))
    assert claim_of(played, records, CLIENTS, Seat.USER).other_unit
    assert not claim_of(played, federation(), CLIENTS, Seat.USER).other_unit


@pytest.mark.parametrize("sigma", [1.0, 4.0, 20.0])
def test_two_steps_are_never_claimed_to_cost_less_than_a_gaussian_of_twice_the_length(
    sigma: float,
) -> None:
    event = SelfComposedDpEvent(GaussianDpEvent(sigma), 5)
    doubled = SelfComposedDpEvent(GaussianDpEvent(sigma / 2), 5)
    one = Private(Unit.CLIENT, composed(event).get_epsilon(DELTA), DELTA, frozenset(), event)
    two = of_two(one, DELTA)
    assert composed(doubled).get_epsilon(DELTA) <= two
    assert two > 2 * one.epsilon


def test_noise_that_proves_nothing_claims_nothing() -> None:
    found = claim((), Unit.RECORD, "user", DELTA)
    assert found.epsilon is None and "nothing here adds noise" in found.text


# what is refused


@pytest.mark.parametrize(
    ("attack", "game", "seat", "said"),
    [
        (LossThreshold(), Canaries(800), Seat.USER, "more canaries than data"),
        (LossThreshold(), Canaries(300, client=0), Seat.USER, "more canaries than data"),
        (LossThreshold(), Canaries(20, client=9), Seat.USER, "never took part"),
        (DiracProducts(), ClientCanaries(10_000), Seat.CLIENT, "lower num_canaries"),
    ],
)
def test_impossible_canaries_are_refused_before_anything_is_trained(
    attack: Any, game: Any, seat: Seat, said: str
) -> None:
    with pytest.raises(Impossible, match=said):
        plan(audit({"none": federation()}, attack, game, seat))


def test_clients_are_not_added_to_a_graph() -> None:
    with pytest.raises(ValueError, match="play 'canaries', of records"):
        CLIENTS.planted(task(), federation(graph=Complete()), _truth())


def _truth() -> Any:
    return CLIENTS.pose(
        task(), took_part=frozenset({0}), cohort=(), rng=torch.Generator().manual_seed(0)
    )[1]


def test_an_audit_with_canaries_says_the_same_again(tmp_path: Path) -> None:
    games = [(DiracProducts(), ClientCanaries(40), Seat.CLIENT)]
    for attack, game, seat in games:
        first, second = (
            measured(
                cells(audit({"none": federation()}, attack, game, seat, rounds=3), tmp_path / name)[
                    "none"
                ]
            )
            for name in ("one", "two")
        )
        assert first == second


@pytest.mark.parametrize(
    ("bounds", "claimed", "most", "state"),
    [
        ((0.5,), 1.0, 4.0, "held"),
        ((1.5,), 1.0, 4.0, "refuted"),
        ((1.5, 0.5, 0.5, 0.5, 0.5), 1.0, 4.0, "doubtful"),
        ((1.5, 1.2, 0.5, 0.5, 0.5), 1.0, 4.0, "refuted"),
        ((0.5,), 8.0, 4.0, "blunt"),
        ((0.5,), None, 4.0, "unclaimed"),
    ],
)
def test_the_page_says_what_so_many_runs_come_to(
    bounds: tuple[float, ...], claimed: float | None, most: float, state: str
) -> None:
    shown = Shown(
        "a", "server", "d", "record", DELTA, 0.95, claimed, bounds, most, 100, 80, 60, 1.0
    )
    assert shown.state == state and shown.verdict


def test_the_file_on_the_page_can_be_audited(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "auditing.md").read_text("utf-8")
    text = page.split("```toml\n")[1].split("```")[0]
    file = tmp_path / "audit.toml"
    file.write_text(text, "utf-8")
    found = plan(load(file)).cells
    assert {c.attack for c in found if c.settled is None} == {"records", "clients"}

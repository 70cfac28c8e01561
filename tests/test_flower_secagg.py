"""A SecAgg+ that halts: which Flower logs, and nothing else. Contract (what is told of it, by the
wrapper for users and by the audit) and sabotage (nodes that fail between the stages).
"""

from __future__ import annotations

import os
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
pytest.importorskip("flwr")

import numpy as np
from flwr.app import Context, Message
from flwr.client import NumPyClient
from flwr.client.mod import secaggplus_mod
from flwr.clientapp import ClientApp
from flwr.common import ndarrays_to_parameters
from flwr.server import LegacyContext, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow
from flwr.serverapp import Grid, ServerApp
from typer.testing import CliRunner

from tests.report_fixture import read_json, read_rows
from turncoat.cli import Exit, app
from turncoat.flower import AggregationHalted, Watched
from turncoat.flower.audit import FlowerAudit, run_flower_audit
from turncoat.flower.forgeries import Forgery
from turncoat.flower.grid import InProcessGrid
from turncoat.flower.loading import read_app
from turncoat.flower.secagg import STAGES
from turncoat.report.page import page

SETUP, SHARE, COLLECT, UNMASK = "setup", "share_keys", "collect_masked_vectors", "unmask"


class Adder(NumPyClient):
    """Adds one to every weight."""

    def fit(self, parameters, config):  # type: ignore[no-untyped-def]
        return [p + 1 for p in parameters], 1, {}


def client_fn(context: Context):  # type: ignore[no-untyped-def]
    return Adder().to_client()


def nodes(stage: str, rounds: tuple[str, ...], failing: int, num_nodes: int = 6) -> InProcessGrid:
    """Nodes of which the first ``failing`` break down at a stage of some rounds."""

    def breaks(message, context, call_next):  # type: ignore[no-untyped-def]
        said = message.content.config_records.get("secaggplus_configs", {}).get("stage")
        asked: Message = message
        at = said == stage and asked.metadata.group_id in rounds
        if at and context.node_config["partition-id"] < failing:
            raise OSError("the disk is full")
        return call_next(message, context)

    return InProcessGrid(ClientApp(client_fn=client_fn, mods=[breaks, secaggplus_mod]), num_nodes)


def served(fit: object, grid: InProcessGrid, num_rounds: int = 3) -> float:
    """Run a server, and return the one weight that is left; it begins at 0."""
    left: list[float] = []
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        start = ndarrays_to_parameters([np.zeros(1, np.float32)])
        options: Any = {"min_fit_clients": 1, "min_available_clients": 1}
        strategy = FedAvg(fraction_evaluate=0.0, initial_parameters=start, **options)
        legacy = LegacyContext(context, ServerConfig(num_rounds=num_rounds), strategy)
        DefaultWorkflow(fit_workflow=fit)(grid, legacy)  # type: ignore[arg-type]
        record = next(iter(legacy.state.array_records.values()))
        left.append(float(next(iter(record.values())).numpy()[0]))

    server(grid, grid.server_context())
    return left[0]


def plain() -> SecAggPlusWorkflow:
    return SecAggPlusWorkflow(num_shares=5, reconstruction_threshold=4)


def test_flower_still_has_the_stages_that_are_watched() -> None:
    for name in STAGES:
        moved = f"{name}: a Flower release has moved it: mend src/turncoat/flower/secagg.py"
        assert callable(getattr(SecAggPlusWorkflow, name, None)), moved


def test_flower_itself_says_nothing_and_goes_on() -> None:
    """What this file is about: round 2 is lost, and nobody who calls Flower learns of it."""
    assert served(plain(), nodes(UNMASK, ("2",), failing=4)) == pytest.approx(2, abs=1e-3)


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        (SETUP, "when exchanging keys: 2 of 6 nodes answered"),
        (SHARE, "when sharing secrets: 2 of 6 nodes answered"),
        (COLLECT, "when collecting masked updates: 2 of 6 nodes answered"),
        (UNMASK, "when unmasking: 2 of 6 nodes answered"),
    ],
)
def test_a_halt_stops_a_watched_run_with_its_stage_and_reason(stage: str, said: str) -> None:
    watched = Watched(plain())
    with pytest.raises(AggregationHalted) as stopped:
        served(watched, nodes(stage, ("2",), failing=4))
    text = str(stopped.value)
    assert f"round 2: SecAgg+ halted {said}; a secret takes 4 of 5 shares" in text
    assert "shares (the disk is full); the model stays as it was." in text
    assert "Halted rounds: 1, of which 0 were to be survived" in text


def test_as_many_halts_as_allowed_are_survived_counted_and_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    watched = Watched(plain(), max_halts=1)
    assert served(watched, nodes(UNMASK, ("2",), failing=4)) == pytest.approx(2, abs=1e-3)
    assert watched.num_halts == 1
    (incident,) = watched.incidents
    assert incident.round == 2 and "the model stays as it was" in incident.what
    assert "SecAgg+ halted when unmasking" in caplog.text


def test_a_node_that_is_lost_without_harm_is_told() -> None:
    watched = Watched(plain())
    assert served(watched, nodes(COLLECT, ("1",), failing=1), 2) == pytest.approx(2, abs=1e-3)
    (incident,) = watched.incidents
    assert incident.what.startswith("5 of 6 nodes answered SecAgg+ when collecting")
    assert watched.num_halts == 0


def test_a_cohort_of_one_is_told() -> None:
    with pytest.raises(AggregationHalted, match="it takes two nodes at least, and 1 was chosen"):
        strategy_of_one = Watched(SecAggPlusWorkflow(1.0, 0.5))
        served(strategy_of_one, nodes(SETUP, (), 0, num_nodes=1))


def test_what_is_no_workflow_is_not_watched() -> None:
    with pytest.raises(TypeError, match="Watched wraps a SecAggPlusWorkflow"):
        Watched(FedAvg())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_halts"):
        Watched(plain(), max_halts=-1)


# ---- the audit


APP = """
import numpy as np
from flwr.client import NumPyClient
from flwr.client.mod import secaggplus_mod
from flwr.clientapp import ClientApp
from flwr.common import ndarrays_to_parameters
from flwr.server import LegacyContext, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow
from flwr.serverapp import ServerApp

server = ServerApp()


@server.main()
def main(grid, context):
    start = ndarrays_to_parameters([np.zeros(4, np.float32)])

    def evaluate(number, parameters, config):
        error = float(np.abs(parameters[0] - 1).mean())
        return error, {"accuracy": 1 / (1 + error)}

    strategy = FedAvg(fraction_evaluate=0.0, initial_parameters=start, evaluate_fn=evaluate)
    config = ServerConfig(num_rounds=context.run_config["num-server-rounds"])
    workflow = DefaultWorkflow(fit_workflow=SecAggPlusWorkflow(5, 4))
    workflow(grid, LegacyContext(context, config, strategy))


class Client(NumPyClient):
    def fit(self, parameters, config):
        return [p + (1 - p) / 2 for p in parameters], 10, {}


def breaks(message, context, call_next):
    stage = message.content.config_records.get("secaggplus_configs", {}).get("stage")
    bad = str(context.run_config["bad-rounds"]).split()
    if stage == "unmask" and message.metadata.group_id in bad:
        if context.node_config["partition-id"] < 4:
            raise OSError("the disk is full")
    return call_next(message, context)


client = ClientApp(client_fn=lambda context: Client().to_client(), mods=[breaks, secaggplus_mod])
"""

PYPROJECT = """
    [project]
    name = "halting"
    version = "1.0.0"

    [tool.flwr.app]
    publisher = "example"

    [tool.flwr.app.components]
    serverapp = "halting:server"
    clientapp = "halting:client"

    [tool.flwr.app.config]
    num-server-rounds = 3
    bad-rounds = ""
"""


@pytest.fixture
def halting(tmp_path: Path) -> Path:
    folder = tmp_path / "app"
    folder.mkdir()
    (folder / "halting.py").write_text(APP)
    (folder / "pyproject.toml").write_text(dedent(PYPROJECT))
    return folder


def test_an_audit_counts_the_rounds_that_halted_and_says_why(halting: Path, tmp_path: Path) -> None:
    found = read_app(halting).configured(["bad-rounds=2"])
    out = tmp_path / "audit"
    assert run_flower_audit(FlowerAudit(found, 6, (0,), (Forgery("scaling", 9.0),)), out)
    findings = read_json(out / "plan.json")["findings"]
    told = next(f for f in findings if f["what"].startswith("SecAgg+ halted"))
    assert told["severity"] == "danger"
    assert "in 1 of the 3 rounds of the clean run" in told["what"]
    assert "when unmasking: 2 of 6 nodes answered; a secret takes 4 of 5 shares" in told["why"]
    clean = next(
        t
        for t in read_rows(out / "trainings.jsonl")
        if t["attack"] is None and t["defence"] == "as-is"
    )
    assert clean["aborted_rounds"] == 1
    assert clean["history"][0] == clean["history"][1] != clean["history"][2]
    said = [i["what"] for i in clean["incidents"] if i["client"] is None]
    assert len(said) == 1 and "the model stays as it was" in said[0]
    text = page(out)[0]
    assert "SecAgg+ halted in 1 of the 3 rounds" in text
    assert "rounds aborted" in text


def test_an_app_whose_secagg_halts_in_every_round_is_no_app_to_audit(
    halting: Path, tmp_path: Path
) -> None:
    command = ["flower", "audit", str(halting), "--nodes", "6", "--out", str(tmp_path / "audit")]
    result = CliRunner().invoke(app, [*command, "--set", "bad-rounds=1 2 3", "--rounds", "2"])
    assert result.exit_code == Exit.BAD_INPUT
    said = " ".join(result.output.split())
    assert "in every round SecAgg+ halted when unmasking: 2 of 6 nodes answered" in said
    assert "(the disk is full)" in said

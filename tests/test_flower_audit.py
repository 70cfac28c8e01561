"""The audit of Flower apps: contract (the in-process grid does as Flower does), oracle (Min-Max by
bisection), theorem (no forgery is longer than it may be), sabotage (with a rule that works and one
that is void), golden (three apps that were not written for this, as they are).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
pytest.importorskip("flwr")

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from tests.report_fixture import read_json, read_rows, write_audit, write_json
from turncoat.flower.audit import AppBroken, FlowerAudit, run_flower_audit
from turncoat.flower.commands import members_of
from turncoat.flower.company import QUIET
from turncoat.flower.disclosure import Misfit, batch_of, call_loader, vector
from turncoat.flower.forgeries import ATTACKS, Forgery, parse, widest_gamma
from turncoat.flower.grid import Delivery, InProcessGrid
from turncoat.flower.loading import AppUnreadable, read_app
from turncoat.flower.parcel import Parcel
from turncoat.flower.witness import chosen_metric, num_examples_behind
from turncoat.record import FolderUnusable
from turncoat.report.cost import costs
from turncoat.report.page import page
from turncoat.report.pooled import squares
from turncoat.report.ranking import ranked
from turncoat.report.record import read
from turncoat.report.verdict import verdicts
from turncoat.task import Model

APPS = Path(__file__).parent / "apps"


# ---- the grid


def adder(step: float = 1.0, fails_at: int | None = None) -> ClientApp:
    """A client that adds ``step`` to every array, and counts its calls in its context."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        node = int(context.node_config["partition-id"])
        calls = context.state.metric_records.get("calls", MetricRecord({"n": 0}))
        context.state["calls"] = MetricRecord({"n": int(str(calls["n"])) + 1})
        if node == fails_at:
            raise OSError("no disk")
        record = message.content.array_records["arrays"]
        arrays = {name: array.numpy() + step for name, array in record.items()}
        record.clear()  # what a mod may do to what it was sent
        content = RecordDict(
            {
                "arrays": ArrayRecord([*arrays.values()]),
                "metrics": MetricRecord({"num-examples": 1, "node": node}),
            }
        )
        return Message(content, reply_to=message)

    return app


def ask(grid: InProcessGrid, size: int = 3) -> list[Message]:
    """Send one and the same record to all nodes."""
    content = RecordDict({"arrays": ArrayRecord([np.zeros(size, np.float32)])})
    messages = [Message(content, n, "train") for n in grid.get_node_ids()]
    return list(grid.send_and_receive(messages))


def first(message: Message) -> list[float]:
    record = next(iter(message.content.array_records.values()))
    found: list[float] = next(iter(record.values())).numpy().tolist()
    return found


def test_flower_still_has_the_private_names_that_the_grid_borrows() -> None:
    moved = "a Flower release has moved it: mend src/turncoat/flower/grid.py, which alone uses it"
    import flwr.server.server
    from flwr.clientapp import client_app
    from flwr.common import constant
    from flwr.server.compat.grid_client_proxy import GridClientProxy
    from flwr.server.workflow import default_workflows
    from flwr.supercore.run import Run
    from flwr.supercore.task_identity import TaskIdentity

    for where, name in (
        (flwr.server.server, "fit_clients"),
        (flwr.server.server, "evaluate_clients"),
        (client_app, "ClientAppException"),
        (client_app, "LoadClientAppError"),
        (constant, "SUPERLINK_NODE_ID"),
        (constant.ErrorCode, "CLIENT_APP_RAISED_EXCEPTION"),
        (constant.ErrorCode, "NODE_UNAVAILABLE"),
        (default_workflows, "default_fit_workflow"),
        (Run, "create_empty"),
        (TaskIdentity, "_node_id"),
        (TaskIdentity, "_task_id"),
    ):
        assert hasattr(where, name), f"{name}: {moved}"
    assert hasattr(ClientApp(), "_mods"), f"ClientApp._mods: {moved}"
    grid = InProcessGrid(adder(), 1)
    message = Message(RecordDict(), 1000, "train")
    assert "_message_id" in message.metadata.__dict__, f"Metadata._message_id: {moved}"
    assert GridClientProxy(node_id=1, grid=grid, run_id=1).grid is grid, f"grid: {moved}"


def test_every_node_gets_its_own_copy_and_its_partition() -> None:
    replies = ask(InProcessGrid(adder(), 3))
    assert [first(r) for r in replies] == [[1.0, 1.0, 1.0]] * 3
    assert [r.content["metrics"]["node"] for r in replies] == [0, 1, 2]


def test_a_node_keeps_its_state_but_not_that_of_a_call_that_raised() -> None:
    grid = InProcessGrid(adder(fails_at=1), 2)
    ask(grid)
    ask(grid)
    assert grid.context(0).state["calls"]["n"] == 2
    assert "calls" not in grid.context(1).state


def test_what_a_client_raises_becomes_an_error_reply_in_flowers_words() -> None:
    good, bad = ask(InProcessGrid(adder(fails_at=1), 2))
    assert not good.has_error()
    assert bad.error.code == 2
    assert "ClientAppException" in str(bad.error.reason)
    assert "no disk" in str(bad.error.reason)


def test_a_node_that_is_not_there_gets_an_error_reply() -> None:
    grid = InProcessGrid(adder(), 1)
    (reply,) = grid.send_and_receive([Message(RecordDict(), 77, "train")])
    assert reply.error.code == 5


def test_a_coalition_sees_a_whole_push_before_it_answers() -> None:
    seen: list[list[int]] = []

    def rewrite(batch: Sequence[Delivery]) -> list[Message | None]:
        seen.append([each.node for each in batch])
        parcel = Parcel.of(batch[0].message, batch[0].reply)
        assert parcel is not None
        parcel.send(-5 * parcel.delta)
        return [batch[0].reply, None, batch[2].reply]

    replies = ask(InProcessGrid(adder(), 3, intercept=rewrite))
    assert seen == [[0, 1, 2]]
    assert [first(r)[0] for r in replies] == [-5.0, 1.0]  # the second node never answered


def test_an_intercept_must_answer_for_every_node() -> None:
    grid = InProcessGrid(adder(), 2, intercept=lambda batch: [])
    with pytest.raises(ValueError, match="0 replies for 2"):
        ask(grid)


def test_a_strategy_of_flower_runs_on_it() -> None:
    app = ServerApp()
    final: list[float] = []

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = FedAvg(fraction_evaluate=0.0)
        start = ArrayRecord([np.zeros(2, np.float32)])
        result = strategy.start(grid, start, num_rounds=int(str(context.run_config["rounds"])))
        final.extend(next(iter(result.arrays.values())).numpy().tolist())

    grid = InProcessGrid(adder(0.5), 4, {"rounds": 3})
    app(grid, grid.server_context())
    assert final == [1.5, 1.5]


# ---- forgeries

matrices = st.integers(2, 6).flatmap(
    lambda n: st.lists(
        st.lists(st.floats(-10, 10, width=32), min_size=4, max_size=4), min_size=n, max_size=n
    )
)


@given(matrices)
def test_min_max_in_closed_form_is_what_bisection_finds(rows: list[list[float]]) -> None:
    known = np.array(rows)
    mean, away = known.mean(0), -known.std(0, ddof=1)
    widest = max(float(((a - b) ** 2).sum()) for a in known for b in known)

    def fits(gamma: float) -> bool:
        point = mean + gamma * away
        return max(float(((point - row) ** 2).sum()) for row in known) <= widest

    gamma = widest_gamma(known, away)
    if float(away @ away) < 1e-6:
        return
    low, high = 0.0, 1e4
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    assert gamma == pytest.approx(low, rel=1e-4, abs=1e-4)


def test_forgeries_are_what_their_papers_say() -> None:
    honest = np.array([[1.0, 0.0], [3.0, 0.0], [2.0, 3.0]])
    own = np.array([[1.0, 1.0]])
    assert Forgery("sign-flip", 2.0)(own, honest).tolist() == [[-2.0, -2.0]]
    assert Forgery("scaling", 7.0)(own, honest).tolist() == [[7.0, 7.0]]
    assert Forgery("ipm", 0.5)(own, honest).tolist() == [[-1.0, -0.5]]
    shifted = honest.mean(0) - 1.5 * honest.std(0, ddof=1)
    assert Forgery("alie")(own, honest) == pytest.approx(shifted[None])  # z_max is 0 in four
    mean_of_all = (honest.sum(0) + Forgery("ipm")(own, honest)[0]) / 4
    assert mean_of_all == pytest.approx(-honest.sum(0) / 4)  # turned round


def test_a_coalition_alone_in_its_round_takes_its_own_for_everybodys() -> None:
    own = np.ones((2, 3))
    for name in ATTACKS:
        assert Forgery(name)(own, own[:0]).shape == own.shape


def test_the_list_of_attacks_is_read_or_refused_in_words() -> None:
    assert parse("alie, scaling=50") == [Forgery("alie"), Forgery("scaling", 50.0)]
    with pytest.raises(ValueError, match="did you mean 'scaling'"):
        parse("scalling")
    with pytest.raises(ValueError, match="twice"):
        parse("alie,alie=2")
    with pytest.raises(ValueError, match="positive"):
        parse("ipm=-1")


# ---- the app's folder


def test_an_app_is_read_without_importing_it() -> None:
    app = read_app(APPS / "legacy")
    assert app.serverapp == "sklearnexample.server_app:app"
    assert app.config == {
        "num-server-rounds": 5,
        "model.penalty": "l2",
        "model.local-epochs": 2,
    }
    assert app.configured([], 3).config["num-server-rounds"] == 3
    assert app.configured(["model.penalty=l1"]).config["model.penalty"] == "l1"


def test_what_an_app_cannot_take_is_refused_with_the_cure(tmp_path: Path) -> None:
    app = read_app(APPS / "quickstart")
    with pytest.raises(AppUnreadable, match="did you mean 'learning-rate'"):
        app.configured(["lerning-rate=1"])
    with pytest.raises(AppUnreadable, match="cannot replace"):
        app.configured(["local-epochs=many"])
    with pytest.raises(AppUnreadable, match="give the folder of an app"):
        read_app(tmp_path)
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "x"\n')
    with pytest.raises(AppUnreadable, match="names no serverapp"):
        read_app(tmp_path)
    assert members_of(None, None, 10) == (0, 1)
    with pytest.raises(ValueError, match="give one of them"):
        members_of("1", 0.5, 10)
    with pytest.raises(ValueError, match="no node 9"):
        FlowerAudit(app, 4, (9,), ())


# ---- what runs leave behind


def test_the_metric_is_an_accuracy_before_a_loss_and_the_servers_before_the_nodes() -> None:
    def chosen(**sources: dict[str, float]) -> str:
        found = chosen_metric({"metrics": {s: {"1": row} for s, row in sources.items()}})
        return f"{found.source}:{found.key}:{found.scale}" if found else "none"

    assert chosen(server={"loss": 1.0}, clients={"eval_acc": 0.5}) == "clients:eval_acc:1.0"
    assert chosen(server={"accuracy": 93.0}, clients={"acc": 0.5}) == "server:accuracy:0.01"
    assert chosen(replies={"eval_loss": 2.0}) == "replies:eval_loss:1.0"
    assert chosen(server={"seconds": 2.0}) == "none"


def test_shares_give_away_how_many_examples_are_behind_them() -> None:
    assert num_examples_behind([237 / 360, 71 / 360]) == 360
    assert num_examples_behind([0.123456789123]) is None


@pytest.mark.parametrize(
    "data",
    [
        (torch.zeros(4, 1, 2, 2), torch.arange(4)),
        (np.zeros((4, 1, 2, 2)), np.arange(4)),
        [{"img": torch.zeros(2, 1, 2, 2), "label": torch.arange(2)}] * 2,
        torch.utils.data.TensorDataset(torch.zeros(4, 1, 2, 2), torch.arange(4)),
        torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(torch.zeros(4, 1, 2, 2), torch.arange(4)), 3
        ),
    ],
    ids=["tensors", "arrays", "batches by name", "data set", "loader"],
)
def test_the_apps_data_come_in_many_forms(data: Any) -> None:
    inputs, labels = batch_of(data)
    assert inputs.shape == (4, 1, 2, 2)
    assert labels.dtype == torch.int64


def test_a_loader_is_called_with_what_it_names() -> None:
    assert call_loader(lambda partition_id, num_partitions, batch_size: num_partitions, 1, 5) == 5
    assert call_loader(lambda which, of: (which, of), 1, 5) == (1, 5)
    with pytest.raises(Misfit, match="wants"):
        call_loader(lambda which, of, tokenizer: None, 1, 5)


def test_arrays_become_the_models_vector_by_name_or_in_order() -> None:
    model = Model(lambda: torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)))
    state = {k: torch.rand(v.shape) for k, v in model.module.state_dict().items()}
    arrays = [v.numpy() for v in state.values()]
    named = vector(model, arrays, list(state))
    assert torch.equal(named, vector(model, arrays, [str(i) for i in range(len(arrays))]))
    assert torch.equal(model.layout.split(named)["0.weight"], state["0.weight"])
    with pytest.raises(Misfit, match="the very model"):
        vector(model, arrays[:-2], ["a", "b"])


# ---- three apps that were not written for this


def tree(folder: Path) -> str:
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        found.update(str(path).encode() + (path.read_bytes() if path.is_file() else b""))
    return found.hexdigest()


def audited(folder: Path, name: str, **options: Any) -> Path:
    """Audit an app; it must be left as it is, byte for byte."""
    before = tree(APPS / name)
    app = read_app(APPS / name).configured((), options.pop("num_rounds"))
    wanted = FlowerAudit(app, options.pop("num_nodes"), (0,), **options)
    assert run_flower_audit(wanted, folder, num_jobs=2)
    assert tree(APPS / name) == before
    return folder


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return audited(
        tmp_path_factory.mktemp("quickstart") / "audit",
        "quickstart",
        num_nodes=4,
        num_rounds=2,
        forgeries=(Forgery("ipm"),),
        model="pytorchexample.task:Net",
        data="pytorchexample.task:load_data",
        num_steps=10,
    )


@pytest.fixture(scope="module")
def legacy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return audited(
        tmp_path_factory.mktemp("legacy") / "audit",
        "legacy",
        num_nodes=4,
        num_rounds=2,
        forgeries=(Forgery("sign-flip"),),
    )


@pytest.fixture(scope="module")
def secagg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return audited(
        tmp_path_factory.mktemp("secagg") / "audit",
        "secagg",
        num_nodes=6,
        num_rounds=4,
        forgeries=(Forgery("scaling", 50.0), Forgery("min-max")),
    )


def cell(folder: Path, attack: str, defence: str = "as-is") -> dict[str, Any]:
    rows = read_rows(folder / "cells.jsonl")
    return next(r for r in rows if (r["attack"], r["defence"]) == (attack, defence))


def findings(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = read_json(folder / "plan.json")["findings"]
    return found


def test_the_quick_start_is_wrecked_by_one_node_and_its_own_metric_says_so(
    quickstart: Path,
) -> None:
    found = cell(quickstart, "ipm")
    assert found["metric"] == "accuracy"
    assert found["baseline"] - found["value"] > 0.2
    assert found["beats_baseline"]
    assert read_json(quickstart / "plan.json")["task"]["num_test"] == 360  # read off the shares


def test_with_the_model_and_the_data_updates_are_inverted_and_members_told(
    quickstart: Path,
) -> None:
    assert cell(quickstart, "inverting-gradients")["metric"] == "psnr"
    assert cell(quickstart, "inverting-gradients")["exhibits"]
    assert cell(quickstart, "loss-threshold")["metric"] == "auc"
    assert '<section id="gallery"' in page(quickstart)[0]


def test_what_the_server_saw_is_on_record(quickstart: Path) -> None:
    seen = read_rows(quickstart / "seen.jsonl")
    assert {(r["round"], r["node"]) for r in seen} == {(r, n) for r in (1, 2) for n in range(4)}
    assert all(r["norm"] > 0 and "train_loss" in r["metrics"] for r in seen)


def test_a_legacy_app_is_attacked_and_what_was_not_tried_is_said(legacy: Path) -> None:
    found = cell(legacy, "sign-flip")
    assert found["baseline"] > 0.8
    assert found["value"] < 0.5
    untried = cell(legacy, "loss-threshold")
    assert untried["status"] == "blocked"
    assert untried["reason"].startswith("not tried, for it needs --model")
    server = next(v for v in verdicts(legacy) if v.seat == "server")
    assert server.finding.startswith("The server: not tried")
    assert any("were not tried" in f["what"] for f in findings(legacy))


def test_a_robust_rule_behind_secure_aggregation_is_called_void_and_the_attack_shows_it(
    secagg: Path,
) -> None:
    worst = findings(secagg)[0]
    assert worst["severity"] == "void"
    assert re.search(r"Krum .*SecAgg\+", worst["what"])
    assert "Under scaling by 1 node of 6" in worst["shown"]
    sealed, clear = cell(secagg, "scaling"), cell(secagg, "scaling", "without-secagg")
    assert sealed["baseline"] - sealed["value"] > 0.2  # Krum is on, and protects nothing
    assert clear["baseline"] - clear["value"] < 0.1  # the same Krum, where it can read
    assert clear["value"] > 0.7


def test_behind_secure_aggregation_nobody_is_said_to_read_single_updates(secagg: Path) -> None:
    assert cell(secagg, "min-max")["status"] == "blocked"
    assert cell(secagg, "min-max", "without-secagg")["status"] == "scored"
    assert "ServerView[Masked]" in cell(secagg, "inverting-gradients")["reason"]
    assert not any("norm" in row for row in read_rows(secagg / "seen.jsonl"))


def test_the_column_that_proves_it_is_never_advised(secagg: Path) -> None:
    found = next(v for v in verdicts(secagg) if v.seat == "coalition")
    assert found.state == "open" and found.defence is None
    assert "Best of the defences" not in found.remedy
    assert found.remedy.startswith("No defence was tested. without-secagg is none: it shows what")
    record = read(secagg)
    ranks = ranked(record, squares(record), costs(record), "coalition")
    assert [rank.defence for rank in ranks] == ["as-is"]


def test_a_seat_that_was_never_asked_is_not_said_to_be_running_yet(secagg: Path) -> None:
    for seat in ("server", "user"):
        found = next(v for v in verdicts(secagg) if v.seat == seat)
        assert found.state == "untried"
        assert "not tried, for it needs --model" in found.finding
    text = page(secagg)[0]
    assert " not tried</p>" in text
    assert "not run yet" not in text and "did not run yet" not in text


def test_findings_come_first_on_the_page(secagg: Path) -> None:
    text = page(secagg)[0]
    assert re.findall(r'<section id="(\w+)"', text)[:2] == ["findings", "verdict"]
    assert "Krum is void behind SecAgg+" in text


def test_a_second_audit_of_the_same_computes_nothing_and_of_another_is_refused(
    legacy: Path,
) -> None:
    app = read_app(APPS / "legacy").configured((), 2)
    events: list[str] = []
    wanted = FlowerAudit(app, 4, (0,), (Forgery("sign-flip"),))
    runs = sorted((p.name, p.stat().st_mtime_ns) for p in (legacy / "runs").iterdir())
    assert run_flower_audit(wanted, legacy, on_event=lambda e: events.append(e.what))
    assert sorted((p.name, p.stat().st_mtime_ns) for p in (legacy / "runs").iterdir()) == runs
    with pytest.raises(FolderUnusable, match="another audit"):
        run_flower_audit(FlowerAudit(app, 4, (1,), ()), legacy)


def test_an_app_that_does_not_run_is_said_to_and_why(tmp_path: Path) -> None:
    folder = tmp_path / "app"
    folder.mkdir()
    (folder / "pyproject.toml").write_text(
        '[tool.flwr.app.components]\nserverapp = "mine:server"\nclientapp = "mine:client"\n'
    )
    (folder / "mine.py").write_text("raise RuntimeError('no such cluster')\n")
    with pytest.raises(AppBroken, match="no such cluster"):
        run_flower_audit(FlowerAudit(read_app(folder), 3, (0,), ()), tmp_path / "out")


HIDING = """
import numpy as np
import flwr.serverapp.strategy as strategies
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

server, client = ServerApp(), ClientApp()


@server.main()
def main(grid, context):
    kind = getattr(strategies, context.run_config["strategy"])
    strategy = kind(num_malicious_nodes=context.run_config["f"], fraction_evaluate=0.0)
    strategy.start(grid, ArrayRecord([np.zeros(2, np.float32)]), num_rounds=1)


@client.train()
def train(message, context):
    arrays = ArrayRecord([np.ones(2, np.float32)])
    metrics = MetricRecord({"num-examples": 1})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)
"""


def test_the_audit_checks_the_strategy_and_the_cohort_that_it_saw(tmp_path: Path) -> None:
    """The source does not show the strategy, nor f, nor how many nodes there are."""
    folder = tmp_path / "app"
    folder.mkdir()
    (folder / "pyproject.toml").write_text(
        '[tool.flwr.app.components]\nserverapp = "hiding:server"\nclientapp = "hiding:client"\n'
        '[tool.flwr.app.config]\nstrategy = "Krum"\nf = 2\n'
        '[tool.flwr.federations.plain]\naddress = "fl.example:9093"\ninsecure = true\n'
    )
    (folder / "hiding.py").write_text(HIDING)
    run_flower_audit(FlowerAudit(read_app(folder), 6, (0,), ()), tmp_path / "out")
    said = {f["what"]: f["severity"] for f in findings(tmp_path / "out")}
    assert said["Krum needs 7 nodes (2f + 3, f = 2), and the cohort has 6."] == "void"
    assert said["The connection plain (fl.example:9093) says insecure = true."] == "danger"
    assert not any("could not be determined" in what or "not known" in what for what in said)


def test_nothing_is_sent_anywhere_by_what_is_started() -> None:
    assert QUIET["FLWR_TELEMETRY_ENABLED"] == "0"
    assert QUIET["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert QUIET["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    assert QUIET["RAY_USAGE_STATS_ENABLED"] == "0"


# ---- findings on the page


def test_findings_are_escaped_and_the_gravest_comes_first(tmp_path: Path) -> None:
    folder = write_audit(tmp_path / "audit", num_seeds=1, num_rounds=2, defences=("none",))
    plan = read_json(folder / "plan.json")
    plan["findings"] = [
        {"severity": "note", "what": "small", "why": "", "cure": ""},
        {"severity": "void", "what": "<script>x</script>", "why": "<b>", "cure": "a & b"},
    ]
    write_json(folder / "plan.json", plan)
    text = page(folder)[0]
    assert "<script>x" not in text
    assert text.index("&lt;script&gt;x") < text.index(">small<")
    assert "a &amp; b" in text


def test_a_page_without_findings_has_no_section_for_them(tmp_path: Path) -> None:
    folder = write_audit(tmp_path / "audit", num_seeds=1, num_rounds=2, defences=("none",))
    assert "findings" not in re.findall(r'<section id="(\w+)"', page(folder)[0])
    assert "findings" not in json.dumps(read_json(folder / "plan.json"))

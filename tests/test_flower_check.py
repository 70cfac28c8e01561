"""What `check` says of Flower apps that were put together wrongly, and of ones that were not.

Kinds: contract (one case each way); oracle: the claims about Flower that findings make are run.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("flwr")

import flwr.serverapp.strategy as strategies
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.client import NumPyClient
from flwr.client.mod import (
    LocalDpMod,
    adaptiveclipping_mod,
    arrays_size_mod,
    fixedclipping_mod,
    secaggplus_mod,
)
from flwr.clientapp import ClientApp
from flwr.server import LegacyContext, ServerAppComponents, ServerConfig
from flwr.server import strategy as legacy
from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import (
    Bulyan,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
    FedMedian,
    FedTrimmedAvg,
    Krum,
    MultiKrum,
)
from flwr.serverapp.strategy.multikrum import select_multikrum

from turncoat.attacks.poisoning.sign_flip import SignFlip
from turncoat.flower import (
    Adaptive,
    DPFedAvg,
    DPFedAvgLegacy,
    Finding,
    Fixed,
    Robust,
    RobustLegacy,
    Severity,
    Traitors,
    Watched,
    check,
)
from turncoat.messages import Update
from turncoat.stages.aggregate.coordinatewise import Median
from turncoat.stages.aggregate.distances import measured
from turncoat.stages.aggregate.krum import Krum as OurKrum
from turncoat.stages.aggregate.krum import ranked
from turncoat.stages.aggregate.mean import Mean

logging.getLogger("flwr").setLevel(logging.ERROR)

TLS = {"name": "tls", "address": "fl.example:9093", "root-certificates": "ca.crt"}


def served(main: Any) -> ServerApp:
    app = ServerApp()
    app.main()(main)
    return app


def client(*mods: Any) -> ClientApp:
    app = ClientApp(mods=list(mods))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(message.content, reply_to=message)

    return app


class Client(NumPyClient):
    pass


def client_fn(context: Context) -> Any:
    return Client().to_client()


def nothing(grid: Grid, context: Context) -> None:
    pass


def told(found: list[Finding], *words: str) -> Severity | None:
    """Return how severe the worst finding is that has these words; None if there is none."""
    return next((f.severity for f in found if all(w in str(f) for w in words)), None)


def of(strategy: Any, *mods: Any, **more: Any) -> list[Finding]:
    more.setdefault("connection", TLS)
    return check(served(nothing), client(*mods), strategy=strategy, **more)


# ---- reading an app


def build(nodes: int) -> strategies.Strategy:
    options: dict[str, Any] = dict(min_train_nodes=nodes, fraction_evaluate=0.0)
    return Krum(num_malicious_nodes=2, **options)


def main_that_builds(grid: Grid, context: Context) -> None:
    nodes = int(context.run_config["nodes"])
    build(nodes).start(grid, ArrayRecord())


def test_a_strategy_built_in_a_function_that_main_calls_is_found() -> None:
    found = check(served(main_that_builds), client(), num_nodes=6, connection=TLS)
    assert told(found, "Krum needs 7 nodes (2f + 3, f = 2), and the cohort has 6") is Severity.VOID
    assert told(found, "No strategy was found") is None
    found = check(served(main_that_builds), client(), num_nodes=7, connection=TLS)
    assert told(found, "needs 7") is None


def main_that_nests(grid: Grid, context: Context) -> None:
    inner = strategies.FedAvg(fraction_train=0.5)
    rule = OurKrum(num_byzantine=2)
    Robust(rule, inner).start(grid, ArrayRecord())


def test_a_rule_of_ours_in_the_source_is_tried_on_the_cohort() -> None:
    found = check(served(main_that_nests), client(), num_nodes=10, connection=TLS)
    assert told(found, "Krum(num_byzantine=2", "needs at least 7", "has 5") is Severity.DANGER
    assert told(found, "num-examples") is None
    assert not check(served(main_that_nests), client(), num_nodes=14, connection=TLS)


def main_that_hides(grid: Grid, context: Context) -> None:
    getattr(strategies, str(context.run_config["strategy"]))().start(grid, ArrayRecord())


def test_what_the_source_does_not_say_is_said_to_be_unknown() -> None:
    found = check(served(main_that_hides), client())
    assert told(found, "No strategy was found") is Severity.UNKNOWN
    assert told(found, "TLS") is Severity.UNKNOWN
    found = of(Krum(num_malicious_nodes=1))
    assert told(found, "needs 5 nodes", "is content with 2") is Severity.UNKNOWN


def main_with_unknown_f(grid: Grid, context: Context) -> None:
    Krum(num_malicious_nodes=int(context.run_config["f"])).start(grid, ArrayRecord())


def test_an_argument_from_the_run_config_is_unknown_and_not_its_default() -> None:
    found = check(served(main_with_unknown_f), client(), num_nodes=9, connection=TLS)
    assert told(found, "num_malicious_nodes could not be determined") is Severity.UNKNOWN
    assert told(found, "0 nodes are malicious") is None


class Spying(FedAvg):
    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        return super().aggregate_train(server_round, list(replies))


class Odd(FedAvg):
    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        return None, None


def test_an_apps_own_strategy_is_fedavg_as_far_as_it_says_super() -> None:
    assert told(of(Spying()), "Spying weighs each update") is Severity.DANGER
    assert told(of(Odd()), "weighs each update") is None
    assert told(of(Odd()), "way of its own") is Severity.UNKNOWN


def server_fn(context: Context) -> ServerAppComponents:
    strategy = legacy.Krum(num_malicious_clients=1, min_fit_clients=4)
    return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=1))


def test_a_legacy_app_is_read_too() -> None:
    app = ServerApp(server_fn=server_fn)
    found = check(app, ClientApp(client_fn=client_fn), num_nodes=4, connection=TLS)
    assert told(found, "legacy path (client_fn and the strategy Krum)") is Severity.NOTE
    assert told(found, "needs 5 nodes") is Severity.VOID
    assert told(found, "float32") is None


# ---- secure aggregation


def secure(grid: Grid, context: Context, strategy: Any) -> None:
    state = LegacyContext(context, ServerConfig(num_rounds=1), strategy)
    DefaultWorkflow(fit_workflow=SecAggPlusWorkflow(0.5, 0.6))(grid, state)


def secure_median(grid: Grid, context: Context) -> None:
    secure(grid, context, legacy.FedMedian())


def secure_mean(grid: Grid, context: Context) -> None:
    secure(grid, context, legacy.FedAvg())


def secure_robust_median(grid: Grid, context: Context) -> None:
    secure(grid, context, RobustLegacy(Median(), legacy.FedAvg()))


def secure_private(grid: Grid, context: Context) -> None:
    inner = legacy.FedAvg()
    options: dict[str, Any] = {"noise_multiplier": 1.0, "expected_clients": 9}
    secure(grid, context, DPFedAvgLegacy(inner, Fixed(1.0), **options))


def watched_mean(grid: Grid, context: Context) -> None:
    state = LegacyContext(context, ServerConfig(num_rounds=1), legacy.FedAvg())
    workflow = Watched(SecAggPlusWorkflow(num_shares=9, reconstruction_threshold=7))
    DefaultWorkflow(fit_workflow=workflow)(grid, state)


def secure_robust_mean(grid: Grid, context: Context) -> None:
    secure(grid, context, RobustLegacy(Mean(), legacy.FedAvg()))


def masked(*before: Any) -> ClientApp:
    return ClientApp(client_fn=client_fn, mods=[*before, secaggplus_mod])


def test_a_rule_behind_secagg_is_void_and_a_mean_is_not() -> None:
    for main, severity in (
        (secure_median, Severity.VOID),
        (secure_robust_median, Severity.VOID),
        (secure_private, Severity.VOID),
        (secure_mean, None),
        (secure_robust_mean, None),
    ):
        found = check(served(main), masked())
        assert told(found, "void behind SecAgg+") is severity, main.__name__
        assert severity is None or found[0].severity is severity


def test_a_secagg_whose_halts_nobody_hears_of_is_told_and_a_watched_one_is_not() -> None:
    found = check(served(secure_mean), masked(), num_nodes=9)
    assert told(found, "Nobody is told when SecAgg+ halts") is Severity.DANGER
    found = check(served(watched_mean), masked(), num_nodes=9)
    assert told(found, "Nobody is told") is None
    assert told(found, "no SecAggPlusWorkflow was found") is None
    assert told(found, "opens a secret") is None
    found = check(served(watched_mean), masked(), num_nodes=6)
    assert told(found, "opens a secret with 7 shares, and the cohort has 6") is Severity.VOID


def test_half_a_secure_aggregation_is_told() -> None:
    assert told(check(served(secure_mean), ClientApp(client_fn=client_fn)), "does not wear") is (
        Severity.DANGER
    )
    found = check(ServerApp(server_fn=server_fn), masked(), num_nodes=9)
    assert told(found, "no SecAggPlusWorkflow was found") is Severity.DANGER


def test_a_mod_before_the_masks_is_told() -> None:
    noise = LocalDpMod(1.0, 2.0, 0.5, 1e-5)
    found = check(served(secure_mean), masked(arrays_size_mod, noise))
    assert told(found, "LocalDpMod stands before secaggplus_mod") is Severity.DANGER
    assert told(found, "arrays_size_mod stands") is None


# ---- preconditions


@pytest.mark.parametrize(
    ("strategy", "num_nodes", "words", "severity"),
    [
        (Krum(num_malicious_nodes=2), 6, "needs 7 nodes", Severity.VOID),
        (Krum(num_malicious_nodes=2), 7, "needs 7 nodes", None),
        (Krum(), 7, "told that 0 nodes", Severity.VOID),
        (Bulyan(num_malicious_nodes=2), 10, "needs 11 nodes (4f + 3", Severity.VOID),
        (Bulyan(num_malicious_nodes=2), 11, "needs 11", None),
        (Krum(fraction_train=0.5, num_malicious_nodes=2), 12, "needs 7", Severity.VOID),
        (Krum(fraction_train=0.5, min_train_nodes=7, num_malicious_nodes=2), 12, "needs 7", None),
        (MultiKrum(num_malicious_nodes=2, num_nodes_to_select=9), 10, "selects 9", Severity.VOID),
        (MultiKrum(num_malicious_nodes=2, num_nodes_to_select=8), 10, "selects", None),
        (FedTrimmedAvg(beta=0.05), 10, "= 0 of 10", Severity.VOID),
        (FedTrimmedAvg(beta=0.1), 10, "= 0 of 10", None),
        (Robust(OurKrum(3), FedAvg()), 8, "needs at least 9", Severity.DANGER),
        (Robust(OurKrum(3), FedAvg()), 9, "needs at least 9", None),
    ],
)
def test_a_cohort_that_a_rule_cannot_work_in_is_told(
    strategy: Any, num_nodes: int, words: str, severity: Severity | None
) -> None:
    assert told(of(strategy, num_nodes=num_nodes), words) is severity


def test_weights_that_a_node_may_inflate_are_told() -> None:
    for greedy in (FedAvg(), strategies.FedAdam(), MultiKrum(num_malicious_nodes=1)):
        assert told(of(greedy), "as its node claims it") is Severity.DANGER
    for safe in (FedMedian(), Robust(Median(), FedAvg()), Robust(Mean(), FedAvg())):
        assert told(of(safe), "as its node claims it") is None


# ---- clipping and noise


def test_flowers_adaptive_clipping_is_told_and_ours_is_not() -> None:
    flowers = DifferentialPrivacyServerSideAdaptiveClipping(FedAvg(), 0.1, 10)
    assert told(of(flowers), "the wrong way") is Severity.DANGER
    ours = DPFedAvg(FedAvg(), Adaptive(), noise_multiplier=0.5, expected_clients=20)
    assert not of(ours, model=nn.Linear(1, 1))


def test_noise_for_equal_weights_around_a_weighted_mean_is_told() -> None:
    fixed = DifferentialPrivacyServerSideFixedClipping
    assert told(of(fixed(FedAvg(), 1.0, 1.0, 10)), "equal weights") is Severity.DANGER
    assert told(of(fixed(Krum(num_malicious_nodes=1), 1.0, 1.0, 10)), "no proof") is Severity.DANGER
    assert told(of(fixed(FedAvg(), 0.0, 1.0, 10)), "adds no noise") is Severity.VOID


def test_clipping_after_the_noise_is_told() -> None:
    noise = LocalDpMod(1.0, 2.0, 0.5, 1e-5)
    server = DifferentialPrivacyClientSideFixedClipping(FedAvg(), 1.0, 1.0, 10)
    assert told(of(server, fixedclipping_mod, noise), "clips after LocalDpMod") is Severity.DANGER
    assert told(of(server, noise, fixedclipping_mod), "clips after LocalDpMod") is None


def test_clipping_that_no_client_does_is_void() -> None:
    server = DifferentialPrivacyClientSideFixedClipping(FedAvg(), 1.0, 1.0, 10)
    assert told(of(server), "relies on fixedclipping_mod") is Severity.VOID
    assert told(of(server, adaptiveclipping_mod), "relies on fixedclipping_mod") is Severity.VOID
    assert told(of(server, fixedclipping_mod), "relies on fixedclipping_mod") is None


def test_local_noise_that_is_too_small_is_told() -> None:
    assert told(of(FedAvg(), LocalDpMod(2.0, 1.0, 0.5, 1e-5)), "sensitivity of 1") is Severity.VOID
    assert told(of(FedAvg(), LocalDpMod(1.0, 2.0, 8.0, 1e-5)), "epsilon = 8") is Severity.DANGER
    assert told(of(FedAvg(), LocalDpMod(1.0, 2.0, 0.5, 1e-5)), "LocalDpMod's noise") is None


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return Tensor(self.norm(x))


def test_batch_normalisation_under_dp_is_told() -> None:
    private = DPFedAvg(FedAvg(), Fixed(1.0), noise_multiplier=1.0, expected_clients=5)
    assert told(of(private), "Normed has batch normalisation") is Severity.DANGER  # from the source
    assert told(of(private, model=Normed), "Normed has batch norm") is Severity.DANGER
    assert told(of(private, model=nn.Linear(1, 1)), "batch norm") is None
    assert told(of(FedAvg(), model=Normed), "batch norm") is None


def test_a_guarantee_of_ours_that_was_given_away_is_void() -> None:
    seeded = DPFedAvg(FedAvg(), Fixed(1.0), noise_multiplier=1.0, expected_clients=5, seed=1)
    assert told(of(seeded), "DPFedAvg with seed has no guarantee") is Severity.VOID


# ---- the rest


def test_a_connection_without_tls_is_told(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(
        '[superlink]\ndefault = "local"\n[superlink.local]\naddress = ":local:"\n'
        '[superlink.plain]\naddress = "fl.example:9093"\ninsecure = true\n'
        '[superlink.here]\naddress = "127.0.0.1:9093"\ninsecure = true\n'
        '[superlink.tls]\naddress = "fl.example:9093"\nroot-certificates = "ca.crt"\n'
    )
    found = of(Robust(Median(), FedAvg()), num_nodes=5, connection=path)
    assert [f.severity for f in found] == [Severity.DANGER, Severity.NOTE]
    assert "connection plain" in found[0].what and "connection here" in found[1].what


def test_a_mod_of_one_function_is_seen_and_an_attack_is_named() -> None:
    app = ClientApp(mods=[arrays_size_mod])

    @app.train(mods=[Traitors(SignFlip(), (0,))])
    def train(message: Message, context: Context) -> Message:
        return message

    found = check(served(nothing), app, strategy=Robust(Median(), FedAvg()), connection=TLS)
    assert told(found, "wears an attack: Traitors(forge=SignFlip") is Severity.NOTE


def test_findings_come_worst_first_and_once() -> None:
    found = check(served(secure_median), masked())
    order = list(Severity)
    ranks = [order.index(f.severity) for f in found]
    assert ranks == sorted(ranks) and len(set(found)) == len(found)
    for each in found:
        assert each.what.endswith(".") and each.why.endswith(".") and each.cure.endswith(".")


def test_multikrum_in_float64_leaves_out_what_flowers_in_float32_may_keep() -> None:
    """20 nodes, the last 6 of them half as far out again, updates 5000 times smaller."""
    rng = np.random.default_rng(0)
    start = rng.standard_normal(20_000).astype(np.float32)
    updates = rng.standard_normal((20, 20_000)) / 5000
    updates[14:] *= 1.5
    sent = (start + updates).astype(np.float32)
    contents = [RecordDict({str(i): ArrayRecord({"w": Array(row)})}) for i, row in enumerate(sent)]
    for content in contents:  # Flower takes the name of the first for that of all
        content["arrays"] = next(iter(content.array_records.values()))
    kept = select_multikrum([RecordDict({"arrays": c["arrays"]}) for c in contents], 6, 10)
    flowers = [next(i for i, c in enumerate(contents) if c["arrays"] is k["arrays"]) for k in kept]
    deltas = torch.from_numpy(sent.astype(np.float64) - start).float()
    ours = ranked(measured([Update(row, 1.0) for row in deltas])[1], 20 - 6 - 2)[:10]
    print(f"of 6 forgers Flower's kept {sum(i >= 14 for i in flowers)}, ours 0")
    assert max(ours) < 14

"""Robust and private strategies in Flower's Message API and in the legacy one.

Theorem: what f forgers send moves no robust rule. Oracle: a plain loop in numpy for the clipped
mean, FedAvg itself for the mean, dp-accounting's Gaussian for epsilon. Sabotage: the same forgery
breaks plain FedAvg; Flower's own adaptive clipping is run beside ours and its figures recorded.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from functools import cache
from math import exp, log
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

pytest.importorskip("flwr")

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common import Code, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server.strategy import FedAvg as LegacyFedAvg
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideAdaptiveClipping,
    FedAdam,
    FedAvg,
    FedMedian,
    Strategy,
)
from scipy.optimize import brentq
from scipy.stats import norm

from turncoat.attacks.poisoning.sign_flip import SignFlip
from turncoat.flower.grid import InProcessGrid
from turncoat.flower.mods import Traitors
from turncoat.flower.private import Adaptive, DPFedAvg, DPFedAvgLegacy, Fixed, noise_split
from turncoat.flower.robust import Robust, RobustLegacy
from turncoat.messages import Clear
from turncoat.privacy import Private, Unproven
from turncoat.randomness import Randomness
from turncoat.stage import Aggregate, IncompatibleStages
from turncoat.stages.aggregate.coordinatewise import Median, TrimmedMean
from turncoat.stages.aggregate.geometric_median import GeometricMedian
from turncoat.stages.aggregate.krum import Krum, MultiKrum
from turncoat.stages.aggregate.mean import Mean
from turncoat.stages.aggregate.norm_bound import NormBound
from turncoat.stages.aggregate.optimisers import ServerSGD
from turncoat.tasks.bundled import digits
from turncoat.tasks.models import MLP

logging.getLogger("flwr").setLevel(logging.ERROR)  # two lines a node and round otherwise

START: dict[str, Any] = {
    "weight": np.array([1.0, -2.0, 3.0], np.float32),
    "count": np.array(7, np.int64),
}


def record(weight: Any, count: int = 8) -> ArrayRecord:
    return ArrayRecord(
        {"weight": Array(np.asarray(weight)), "count": Array(np.array(count, np.int64))}
    )


def sent(weight: Any, examples: Any = 10, count: int = 8, **more: float) -> RecordDict:
    metrics = MetricRecord({"num-examples": examples, **more})
    return RecordDict({"arrays": record(weight, count), "metrics": metrics})


def grid_of(sends: Sequence[RecordDict | Exception]) -> InProcessGrid:
    """Return nodes that send what they are told, whatever they are asked."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        what = sends[int(context.node_config["partition-id"])]
        if isinstance(what, Exception):
            raise what
        return Message(what, reply_to=message)

    return InProcessGrid(app, len(sends))


def one_round(
    strategy: Strategy, sends: Sequence[RecordDict | Exception]
) -> tuple[dict[str, np.ndarray[Any, Any]], MetricRecord | None]:
    grid = grid_of(sends)
    start = ArrayRecord({name: Array(array) for name, array in START.items()})
    asked = strategy.configure_train(1, start, ConfigRecord(), grid)
    after, metrics = strategy.aggregate_train(1, grid.send_and_receive(asked))
    return {k: a.numpy() for k, a in (after or start).items()}, metrics


def near(rng: np.random.Generator) -> Any:
    return START["weight"] + 0.1 + 0.01 * rng.standard_normal(3).astype(np.float32)


def crowd(n: int) -> list[Any]:
    rng = np.random.default_rng(0)
    return [near(rng) for _ in range(n)]


def all_of(strategy: type[FedAvg] = FedAvg, **more: Any) -> FedAvg:
    return strategy(fraction_evaluate=0.0, **more)


RULES: list[Aggregate[Clear]] = [
    Krum(2),
    MultiKrum(2),
    Median(),
    TrimmedMean(2),
    GeometricMedian(),
    NormBound(Median(), max_norm=1.0),
    NormBound(MultiKrum(2), ratio=2.0),
]


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_two_forgers_of_nine_move_no_robust_rule(rule: Aggregate[Clear]) -> None:
    honest, forged = crowd(7), [START["weight"] - 1e6, START["weight"] + 1e30]
    strategy = Robust(rule, all_of())
    after, _ = one_round(strategy, [sent(w) for w in [forged[0], *honest, forged[1]]])
    assert np.linalg.norm(after["weight"] - START["weight"] - 0.1) < 0.05
    assert after["weight"].dtype == np.float32


def test_the_mean_is_fedavg_to_the_last_bits() -> None:
    sends = [sent(w, examples=k + 1, loss=float(k)) for k, w in enumerate(crowd(5))]
    ours, our_metrics = one_round(Robust(Mean(), all_of()), sends)
    theirs, their_metrics = one_round(all_of(), sends)
    np.testing.assert_allclose(ours["weight"], theirs["weight"], rtol=1e-6)
    assert our_metrics is not None and their_metrics is not None
    assert our_metrics["loss"] == pytest.approx(their_metrics["loss"])


def test_metrics_are_those_of_the_replies_that_were_kept() -> None:
    sends = [sent(w, loss=1.0) for w in crowd(5)] + [sent(np.full(3, np.nan), loss=100.0)]
    _, metrics = one_round(Robust(Median(), all_of()), sends)
    assert metrics is not None and metrics["loss"] == pytest.approx(1.0)


def test_the_server_optimiser_of_the_wrapped_strategy_goes_on() -> None:
    same = [sent(START["weight"] + 0.1)] * 2 + [sent(START["weight"] + 0.1001)]
    ours, _ = one_round(Robust(Median(), all_of(FedAdam)), same)
    theirs, _ = one_round(all_of(FedAdam), same[:2])
    np.testing.assert_allclose(ours["weight"], theirs["weight"], rtol=1e-5)


def test_a_strategy_that_takes_its_replies_apart_can_be_wrapped() -> None:
    after, _ = one_round(Robust(Krum(1), all_of(FedMedian)), [sent(w) for w in crowd(6)])
    assert np.linalg.norm(after["weight"] - START["weight"] - 0.1) < 0.05


def test_integers_take_the_median_and_no_part_in_the_rule() -> None:
    honest = crowd(6)
    plain, _ = one_round(Robust(Krum(1), all_of()), [sent(w) for w in honest])
    wild = [sent(w, count=c) for w, c in zip(honest, (8, 8, 9, 9, 9, 10**12), strict=True)]
    after, _ = one_round(Robust(Krum(1), all_of()), wild)
    assert after["count"] == 9 and after["count"].dtype == np.int64
    assert np.array_equal(after["weight"], plain["weight"])


BAD: dict[str, tuple[RecordDict | Exception, str]] = {
    "an error": (RuntimeError("disk full"), "failed: "),
    "NaN": (sent([np.nan, 0.0, 0.0]), "NaN"),
    "infinity": (sent(np.array([1e300, 0, 0])), "infinity"),
    "another shape": (sent(np.zeros(4, np.float32)), "shape"),
    "a gigabyte, nearly": (sent(np.zeros(10_000, np.float32)), "bytes"),
    "integers for floats": (sent(np.zeros(3, np.int64)), "int64"),
    "no examples": (sent(START["weight"], examples=0), "weight"),
    "less than no examples": (sent(START["weight"], examples=-5), "weight"),
    "NaN examples": (sent(START["weight"], examples=float("nan")), "weight"),
    "a list of examples": (sent(START["weight"], examples=[1, 2]), "other records"),
    "another metric": (sent(START["weight"], surprise=1.0), "other records or metrics"),
    "no arrays": (RecordDict({"metrics": MetricRecord({"num-examples": 1})}), "0 ArrayRecords"),
    "no metrics": (RecordDict({"arrays": record(START["weight"])}), "0 MetricRecords"),
    "other names": (
        RecordDict(
            {
                "arrays": ArrayRecord({"x": Array(START["weight"])}),
                "metrics": MetricRecord({"num-examples": 1}),
            }
        ),
        "other arrays",
    ),
    "nonsense": (
        RecordDict(
            {
                "arrays": ArrayRecord(
                    {
                        "weight": Array("float32", (3,), "numpy.ndarray", b"nonsense"),
                        "count": Array(np.array(8)),
                    }
                ),
                "metrics": MetricRecord({"num-examples": 10}),
            }
        ),
        "cannot be read",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_reply_that_is_no_update_is_left_out_and_told(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    bad, why = BAD[name]
    honest = [sent(w) for w in crowd(5)]
    strategy = Robust(Median(), all_of())
    after, _ = one_round(strategy, [*honest[:2], bad, *honest[2:]])
    without, _ = one_round(Robust(Median(), all_of()), [*honest])
    assert np.array_equal(after["weight"], without["weight"])
    (incident,) = strategy.incidents
    assert incident.round == 1 and why in incident.what
    assert incident.node == 1002 and str(incident) in caplog.text


def test_an_absurd_weight_is_capped_and_told() -> None:
    sends = [sent(w, examples=10) for w in crowd(5)] + [sent(START["weight"], examples=10**15)]
    strategy = Robust(Mean(), all_of())
    after, _ = one_round(strategy, sends)
    greedy, _ = one_round(all_of(), sends)
    assert "claimed the weight 1e+15; it counts for 100" in strategy.incidents[0].what
    assert np.abs(greedy["weight"] - START["weight"]).max() < 1e-6  # it has all the say
    assert (after["weight"] - START["weight"]).mean() == pytest.approx(0.1 * 5 / 15, rel=0.2)


def test_who_is_silent_answers_twice_or_was_not_asked_is_told() -> None:
    grid = grid_of([sent(w) for w in crowd(6)])
    strategy = Robust(Median(), all_of())
    start = ArrayRecord({name: Array(array) for name, array in START.items()})
    replies = list(grid.send_and_receive(strategy.configure_train(1, start, ConfigRecord(), grid)))
    replies.sort(key=lambda reply: reply.metadata.src_node_id)
    uncalled = Message(RecordDict(), dst_node_id=77, message_type="train")
    stranger = Message(sent(START["weight"]), reply_to=uncalled)
    arrays, _ = strategy.aggregate_train(1, [*replies[1:], replies[1], stranger])
    assert arrays is not None
    told = {incident.node: incident.what for incident in strategy.incidents}
    assert told.keys() == {1000, 1001, 77}
    assert "did not answer" in told[1000] and "twice" in told[1001]
    assert "not asked" in told[77]


def test_a_round_with_too_few_sound_replies_keeps_the_model_and_says_so() -> None:
    sends: list[RecordDict | Exception] = [sent(w) for w in crowd(6)]
    sends += [RuntimeError("gone")] * 3
    strategy = Robust(MultiKrum(3), all_of())
    after, metrics = one_round(strategy, sends)
    assert np.array_equal(after["weight"], START["weight"]) and metrics is None
    assert "needs at least 9" in strategy.incidents[-1].what


def test_a_cohort_too_small_for_the_rule_stops_the_run_at_once() -> None:
    with pytest.raises(ValueError, match=r"at least 9 messages .* cohort has 5"):
        one_round(Robust(Krum(3), all_of()), [sent(w) for w in crowd(5)])


def test_one_vector_from_all_is_taken_for_secure_aggregation() -> None:
    with pytest.raises(IncompatibleStages, match="secure aggregation"):
        one_round(Robust(Median(), all_of()), [sent(START["weight"] + 1)] * 5)
    after, _ = one_round(Robust(Mean(), all_of()), [sent(START["weight"] + 1)] * 5)
    np.testing.assert_allclose(after["weight"], START["weight"] + 1)


def test_what_cannot_be_wrapped_is_refused_with_a_cure() -> None:
    with pytest.raises(TypeError, match="use RobustLegacy"):
        Robust(Median(), LegacyFedAvg())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="use Robust,"):
        RobustLegacy(Median(), FedAvg())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ε would not hold"):
        Robust(
            Median(),
            DPFedAvg(FedAvg(), Fixed(1.0), noise_multiplier=1.0, expected_clients=5),
        )
    with pytest.raises(ValueError, match="no rule can choose"):
        DPFedAvg(Robust(Median(), FedAvg()), Fixed(1.0), noise_multiplier=1.0, expected_clients=5)
    with pytest.raises(IncompatibleStages, match="FedAdam"):
        Robust(ServerSGD(0.5, Mean()), FedAvg())
    with pytest.raises(IncompatibleStages):
        Robust(SignFlip(), FedAvg())  # type: ignore[arg-type]


# ---- must show 4: digits, three of ten send -3 times their update


TASK = digits(10, model=MLP((32,)))


@cache
def digits_app(num_traitors: int) -> ClientApp:
    mods = [Traitors(SignFlip(3.0), tuple(range(num_traitors)))] if num_traitors else []
    app = ClientApp(mods=list(mods))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        inputs, labels = TASK.clients[client]
        module = TASK.model.build()
        module.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
        optimiser = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        order = Randomness(client).at("order", int(str(message.content["config"]["server-round"])))
        for _ in range(2):
            for rows in torch.randperm(len(labels), generator=order).split(16):  # type: ignore[no-untyped-call]
                optimiser.zero_grad()
                cross_entropy(module(inputs[rows]), labels[rows]).backward()  # type: ignore[no-untyped-call]
                optimiser.step()
        return Message(
            RecordDict(
                {
                    "arrays": ArrayRecord(module.state_dict()),
                    "metrics": MetricRecord({"num-examples": len(labels)}),
                }
            ),
            reply_to=message,
        )

    return app


def accuracy_of(strategy: Strategy, num_traitors: int) -> float:
    module: nn.Module = TASK.model.build()
    start = TASK.model.layout.split(TASK.model.initial(Randomness(0).at("begin")))
    module.load_state_dict(start)
    result = strategy.start(
        InProcessGrid(digits_app(num_traitors), 10), ArrayRecord(module.state_dict()), num_rounds=8
    )
    module.load_state_dict(result.arrays.to_torch_state_dict())
    inputs, labels = TASK.test
    return float((module(inputs).argmax(1) == labels).float().mean())


def test_robust_multikrum_holds_where_fedavg_falls(record_property: Any) -> None:
    clean = accuracy_of(all_of(), 0)
    fallen = accuracy_of(all_of(), 3)
    held = accuracy_of(Robust(MultiKrum(num_byzantine=3), all_of()), 3)
    record_property("accuracies", {"clean": clean, "fedavg": fallen, "robust": held})
    print(f"clean {clean:.3f}, FedAvg attacked {fallen:.3f}, Robust attacked {held:.3f}")
    assert clean > 0.9
    assert held > clean - 0.03
    assert fallen < clean - 0.15


# ---- clipping and noise


def private(clipping: Fixed | Adaptive, noise: float = 0.0, n: int = 6, **more: Any) -> DPFedAvg:
    return DPFedAvg(all_of(), clipping, noise_multiplier=noise, expected_clients=n, **more)


def test_without_noise_it_is_the_mean_of_clipped_updates_in_float64() -> None:
    updates = [np.array([3.0, 4.0, 0.0]) * k for k in (0.1, 0.5, 2.0)]
    sends: list[RecordDict | Exception] = [
        sent((START["weight"] + u).astype(np.float32), examples=10**k, count=99)
        for k, u in enumerate(updates)
    ]
    strategy = private(Fixed(2.0))
    after, metrics = one_round(strategy, [*sends, RuntimeError("gone"), RuntimeError("gone")])
    total = sum(u * min(1.0, 2.0 / float(np.linalg.norm(u))) for u in updates)
    np.testing.assert_allclose(after["weight"], START["weight"] + total / 6, rtol=1e-6)
    assert after["weight"].dtype == np.float32 and after["count"] == START["count"]
    assert metrics is not None and not metrics
    assert [i.node for i in strategy.incidents] == [None, 1003, 1004]


def test_the_noise_has_the_stated_deviation_and_is_never_drawn_twice() -> None:
    size = 20_000
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        metrics = MetricRecord({"num-examples": 1})
        content = RecordDict({"arrays": ArrayRecord([np.zeros(size, np.float32)]), "m": metrics})
        return Message(content, reply_to=message)

    strategy, grid = private(Fixed(3.0), 0.8, n=4), InProcessGrid(app, 4)
    start = ArrayRecord([np.zeros(size, np.float32)])
    first = strategy.start(grid, start, num_rounds=1).arrays.to_numpy_ndarrays()[0]
    second = strategy.start(grid, start, num_rounds=1).arrays.to_numpy_ndarrays()[0]
    assert first.std() == pytest.approx(0.8 * 3.0 / 4, rel=0.03)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.05
    assert strategy.num_releases == 2


def test_one_node_cannot_have_another_left_out() -> None:
    honest = [sent(START["weight"] + 0.1)] * 2
    odd = sent(START["weight"], surprise=1.0)
    with_one, _ = one_round(private(Fixed(1.0)), [*honest, odd, odd, odd])
    without, _ = one_round(private(Fixed(1.0)), honest)
    np.testing.assert_allclose(with_one["weight"], without["weight"])


def test_metrics_are_passed_on_only_if_asked_for() -> None:
    strategy = private(Fixed(1.0), 1.0, keeps_metrics=True)
    _, metrics = one_round(strategy, [sent(w, loss=2.0) for w in crowd(6)])
    assert metrics is not None and metrics["loss"] == pytest.approx(2.0)
    assert isinstance(strategy.guarantee(1e-5), Unproven)


def test_epsilon_is_that_of_so_many_gaussians_against_users() -> None:
    strategy = private(Fixed(1.0), 2.0)
    assert strategy.guarantee(1e-5) == Private(strategy.guarantee(1e-5).unit, 0.0, 1e-5, BLIND)
    for _ in range(4):
        one_round(strategy, [sent(w) for w in crowd(6)])
    spent = strategy.guarantee(1e-5)
    assert isinstance(spent, Private) and spent == strategy.guarantee(1e-5, num_rounds=4)
    assert spent.against == BLIND and str(spent.unit) == "client"
    assert spent.epsilon == pytest.approx(gaussian_epsilon(2.0 / 4**0.5, 1e-5), rel=1e-3)
    assert isinstance(private(Fixed(1.0)).guarantee(1e-5, 1), Unproven)
    assert isinstance(private(Fixed(1.0), 1.0, seed=1).guarantee(1e-5, 1), Unproven)


BLIND = frozenset({"client", "user"})


def gaussian_epsilon(sigma: float, delta: float) -> float:
    """Return epsilon of one Gaussian mechanism: Balle & Wang, ICML 2018, theorem 8."""

    def spent(eps: float) -> float:
        return float(
            norm.cdf(0.5 / sigma - eps * sigma) - exp(eps) * norm.cdf(-0.5 / sigma - eps * sigma)
        )

    return float(brentq(lambda eps: spent(eps) - delta, 0, 50))


def test_the_two_noises_together_cost_what_is_stated() -> None:
    for z, n in ((0.5, 40), (1.0, 100), (3.0, 100)):
        update, count = noise_split(Adaptive(), z, n)
        assert update**-2 + (2 * count) ** -2 == pytest.approx(z**-2)
    with pytest.raises(ValueError, match=r"count_stddev above 0\.5"):
        private(Adaptive(), 1.0, n=6)


def clip_norm_after(strategy: Any, num_nodes: int, rounds: int = 200) -> float:
    """Return where the norm ends when updates' norms are lognormal about 5."""
    grid, rng = grid_of([sent(START["weight"])] * num_nodes), np.random.default_rng(3)
    start = ArrayRecord({"weight": Array(START["weight"])})
    for number in range(1, rounds + 1):
        asked = strategy.configure_train(number, start, ConfigRecord(), grid)
        replies = []
        for message in asked:
            way = rng.standard_normal(3)
            way *= 5 * exp(0.5 * rng.standard_normal()) / np.linalg.norm(way)
            arrays = ArrayRecord({"weight": Array((START["weight"] + way).astype(np.float32))})
            metrics = MetricRecord({"num-examples": 1})
            content = RecordDict({"arrays": arrays, "metrics": metrics})
            replies.append(Message(content, reply_to=message))
        strategy.aggregate_train(number, replies)
    return float(getattr(strategy, "clip_norm", None) or strategy.clipping_norm)


@pytest.mark.parametrize("initial", [0.1, 100.0])
def test_the_clipping_norm_finds_the_median(initial: float, record_property: Any) -> None:
    n = 20
    found = clip_norm_after(private(Adaptive(initial), 0.5, n=n, seed=0), n)
    np.random.seed(0)
    flowers = clip_norm_after(
        DifferentialPrivacyServerSideAdaptiveClipping(
            all_of(), 0.5, n, initial_clipping_norm=initial
        ),
        n,
    )
    record_property("clip norms", {"start": initial, "ours": found, "Flower's": flowers})
    print(f"from {initial}: ours {found:.3f}, Flower's {flowers:.3g}, the median 5")
    assert abs(log(found / 5)) < log(1.1)


# ---- the legacy API


def result(cid: int, weight: Any, examples: int = 10, **metrics: Any) -> Any:
    arrays = [np.asarray(weight), np.array(8)]
    fit = FitRes(Status(Code.OK, ""), ndarrays_to_parameters(arrays), examples, dict(metrics))
    return SimpleNamespace(cid=str(cid)), fit


def legacy_round(strategy: Any, results: list[Any]) -> tuple[Any, RobustLegacy]:
    strategy.strategy.configure_fit = lambda number, parameters, manager: [None] * len(results)
    strategy.configure_fit(1, ndarrays_to_parameters(list(START.values())), None)
    after, _ = strategy.aggregate_fit(1, results, [TimeoutError("late")])
    return None if after is None else parameters_to_ndarrays(after), strategy


def test_the_legacy_strategy_leaves_out_the_same_and_keeps_types() -> None:
    rows = [result(c, w) for c, w in enumerate(crowd(7))]
    bad = [
        result(7, START["weight"] - 1e6),
        result(8, START["weight"] - 1e6),
        result(9, [np.nan] * 3),
        result(10, np.zeros(4)),
        result(11, START["weight"], examples=-1),
        result(12, START["weight"], surprise=1),
    ]
    strategy = RobustLegacy(MultiKrum(2), LegacyFedAvg(fit_metrics_aggregation_fn=lambda m: {}))
    after, strategy = legacy_round(strategy, [*rows, *bad])
    assert np.linalg.norm(after[0] - START["weight"] - 0.1) < 0.05
    assert after[0].dtype == np.float32 and after[1].dtype == np.int64 and after[1] == 8
    assert [i.node for i in strategy.incidents] == [None, "10", "11", "12", "9"]


def test_behind_secagg_the_legacy_strategy_says_that_it_is_void() -> None:
    same = [result(c, START["weight"] + 0.1) for c in range(5)]
    with pytest.raises(IncompatibleStages, match="secure aggregation"):
        legacy_round(RobustLegacy(Median(), LegacyFedAvg()), same)


def private_legacy(expected: int, **more: Any) -> DPFedAvgLegacy:
    options = {"noise_multiplier": 0.0, "seed": 0} | more
    return DPFedAvgLegacy(
        LegacyFedAvg(accept_failures=False, fit_metrics_aggregation_fn=dict_of_losses),
        Fixed(0.1),
        expected_clients=expected,
        **options,
    )


def dict_of_losses(metrics: list[tuple[int, dict[str, Any]]]) -> dict[str, Any]:
    return {"losses": sum(n * m["loss"] for n, m in metrics)}


def private_round(strategy: Any, rows: list[Any], absent: int = 0) -> tuple[Any, dict[str, Any]]:
    asked = [(proxy, None) for proxy, _ in rows] + [(SimpleNamespace(cid="-"), None)] * absent
    strategy.strategy.configure_fit = lambda number, parameters, manager: asked
    strategy.configure_fit(1, ndarrays_to_parameters(list(START.values())), None)
    after, metrics = strategy.aggregate_fit(1, rows, [TimeoutError("late")] * absent)
    return parameters_to_ndarrays(after), metrics


def test_the_legacy_form_of_dp_is_that_of_the_message_api_to_the_bit() -> None:
    weights = crowd(6)
    for noise in (0.0, 1.3):
        rows = [result(c, w, loss=1.0) for c, w in enumerate(weights)]
        legacy, _ = private_round(private_legacy(6, noise_multiplier=noise), rows)
        ours, _ = one_round(private(Fixed(0.1), noise, seed=0), [sent(w) for w in weights])
        assert np.array_equal(legacy[0], ours["weight"])
        assert legacy[0].dtype == np.float32 and legacy[1] == 7 and legacy[1].dtype == np.int64


def test_in_the_legacy_form_too_who_is_absent_or_claims_much_changes_no_divisor() -> None:
    weights = crowd(4)
    rows = [result(c, w, examples=10**9 if c else 1, loss=1.0) for c, w in enumerate(weights)]
    bad = [result(4, [np.nan] * 3, loss=1.0)]
    strategy = private_legacy(8)
    after, metrics = private_round(strategy, [*rows, *bad], absent=3)
    clipped = [(w - START["weight"]).astype(np.float64) for w in weights]
    clipped = [d * min(1, 0.1 / np.linalg.norm(d)) for d in clipped]
    np.testing.assert_allclose(after[0], START["weight"] + np.sum(clipped, axis=0) / 8, rtol=1e-6)
    assert metrics == {}
    assert sorted(i.what[:8] for i in strategy.incidents) == ["failed: "] * 3 + ["left out"]


def test_the_legacy_form_releases_noise_where_nobody_answers() -> None:
    strategy = private_legacy(3, noise_multiplier=1.0)
    after, _ = private_round(strategy, [], absent=3)
    assert np.abs(after[0] - START["weight"]).max() > 0
    assert strategy.num_releases == 1 and isinstance(strategy.guarantee(1e-5), Unproven)  # a seed
    spent = private_legacy(3, noise_multiplier=1.0, seed=None).guarantee(1e-5, 4)
    assert isinstance(spent, Private) and spent.against == BLIND


def test_the_legacy_form_passes_metrics_on_only_if_asked_for() -> None:
    rows = [result(c, w, loss=2.0) for c, w in enumerate(crowd(3))]
    assert private_round(private_legacy(3), rows)[1] == {}
    kept = private_legacy(3, keeps_metrics=True, noise_multiplier=1.0)
    assert private_round(kept, rows)[1] == {"losses": 60.0}
    assert isinstance(kept.guarantee(1e-5, 1), Unproven)


def test_behind_secagg_the_legacy_form_says_that_its_epsilon_would_not_hold() -> None:
    rows = [result(c, START["weight"] + 0.1) for c in range(3)]
    for _, fit in rows:
        fit.parameters = rows[0][1].parameters
    with pytest.raises(IncompatibleStages, match="ε would not hold"):
        private_round(private_legacy(3), rows)
    with pytest.raises(TypeError, match="use DPFedAvgLegacy"):
        DPFedAvg(LegacyFedAvg(), Fixed(1.0), noise_multiplier=1.0, expected_clients=5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no rule can choose"):
        DPFedAvgLegacy(
            RobustLegacy(Median(), LegacyFedAvg()),
            Fixed(1.0),
            noise_multiplier=1.0,
            expected_clients=5,
        )


# ---- the page


def test_what_the_page_of_the_defences_says_runs() -> None:
    page = Path(__file__).parents[1] / "docs" / "flower-defences.md"
    found = re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)
    assert len(found) >= 4
    names: dict[str, Any] = {}
    for block in found:
        exec(block, names)

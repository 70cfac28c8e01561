"""Traitors among the nodes of a Flower app.

Contract: who acts, when, and that all else is left alone. Theorem (hypothesis): Min-Max stays
within the honest diameter, and goes as far as that. Oracle: bisection for its gamma.
"""

from __future__ import annotations

import logging
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

pytest.importorskip("flwr")

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.client import NumPyClient
from flwr.client.mod import secaggplus_mod
from flwr.clientapp import ClientApp
from flwr.common import ndarrays_to_parameters
from flwr.server import LegacyContext, ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg as LegacyFedAvg
from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow
from flwr.serverapp import Grid, ServerApp

from turncoat.attacks.poisoning.alie import ALIE
from turncoat.attacks.poisoning.sign_flip import SignFlip
from turncoat.flower.grid import InProcessGrid, whole_rounds
from turncoat.flower.mods import IPM, Boost, Gaussian, MinMax, Traitors, largest_gamma
from turncoat.flower.robust import RobustLegacy
from turncoat.messages import Update
from turncoat.randomness import Randomness
from turncoat.stage import IncompatibleStages
from turncoat.stages.aggregate.coordinatewise import Median
from turncoat.stages.aggregate.mean import Mean
from turncoat.task import Model
from turncoat.views import CoalitionView

logging.getLogger("flwr").setLevel(logging.ERROR)

START = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
STEPS = [np.full((2, 2), 0.1 * (k + 1), np.float32) for k in range(5)]


def client(traitors: Traitors) -> ClientApp:
    app = ClientApp(mods=[traitors])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        got = message.content.array_records["arrays"]["w"].numpy()
        mine = got + STEPS[int(context.node_config["partition-id"])]
        arrays = ArrayRecord({"w": Array(mine), "n": Array(np.array(6, np.int64))})
        metrics = MetricRecord({"num-examples": 50, "loss": 0.5})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return Message(RecordDict({"arrays": message.content["arrays"]}), reply_to=message)

    return app


def asked(
    grid: InProcessGrid, number: int | None = 1, kind: str = "train", nodes: int = 5
) -> list[Message]:
    """Return the replies of the nodes, asked one after the other."""
    arrays = ArrayRecord({"w": Array(START), "n": Array(np.array(5, np.int64))})
    config = ConfigRecord({} if number is None else {"server-round": number})
    content = RecordDict({"arrays": arrays, "config": config})
    messages = [
        Message(content, dst_node_id=node, message_type=kind)
        for node in list(grid.get_node_ids())[:nodes]
    ]
    return list(grid.send_and_receive(messages))


def deltas(replies: list[Message]) -> list[Any]:
    assert not any(reply.has_error() for reply in replies)
    return [reply.content.array_records["arrays"]["w"].numpy() - START for reply in replies]


def test_only_the_traitors_lie_and_only_when_they_train() -> None:
    grid = InProcessGrid(client(Traitors(SignFlip(3.0), (1, 3))), 5)
    replies = asked(grid)
    for k, delta in enumerate(deltas(replies)):
        np.testing.assert_allclose(delta, STEPS[k] * (-3 if k in (1, 3) else 1), rtol=1e-5)
    record = replies[1].content.array_records["arrays"]
    assert record["w"].dtype == "float32" and record["n"].numpy() == 6
    assert record["n"].dtype == "int64"
    assert replies[1].content.metric_records["metrics"] == {"num-examples": 50, "loss": 0.5}
    for reply in asked(grid, kind="evaluate"):
        assert np.array_equal(reply.content.array_records["arrays"]["w"].numpy(), START)


def test_a_traitor_can_claim_to_have_more_examples() -> None:
    grid = InProcessGrid(client(Traitors(SignFlip(), (0,), num_examples=10**6)), 2)
    claims = [r.content.metric_records["metrics"]["num-examples"] for r in asked(grid, nodes=2)]
    assert claims == [10**6, 50]


def test_traitors_in_one_process_know_each_others_updates() -> None:
    traitors = Traitors(IPM(1.0), (0, 2, 4))
    grid = InProcessGrid(client(traitors), 5)
    sent = deltas(asked(grid))
    for member, known in ((0, [0]), (2, [0, 2]), (4, [0, 2, 4])):
        mean = np.mean([STEPS[k] for k in known], axis=0)
        np.testing.assert_allclose(sent[member], -mean, rtol=1e-4)
    again = deltas(asked(grid, number=2))  # the first knows what the others did last round
    for member in (0, 2, 4):
        np.testing.assert_allclose(again[member], sent[4], rtol=1e-4)
    later = deltas(asked(grid, number=9))  # which is forgotten
    np.testing.assert_allclose(later[0], sent[0], rtol=1e-4)


def test_rounds_are_counted_where_the_server_does_not_say_them() -> None:
    grid = InProcessGrid(client(Traitors(IPM(1.0), (0, 1))), 2)
    first = deltas(asked(grid, number=None, nodes=2))
    second = deltas(asked(grid, number=None, nodes=2))
    np.testing.assert_allclose(first[0], -STEPS[0], rtol=1e-4)
    np.testing.assert_allclose(second[0], -(STEPS[0] + STEPS[1]) / 2, rtol=1e-4)


@pytest.mark.parametrize("forge", [ALIE(1.5), MinMax()], ids=repr)
def test_a_lone_traitor_has_no_spread_to_hide_in(forge: Any) -> None:
    sent = deltas(asked(InProcessGrid(client(Traitors(forge, (2,))), 5)))
    np.testing.assert_allclose(sent[2], STEPS[2], rtol=1e-5)


def test_a_node_that_does_not_know_its_number_says_so() -> None:
    app = client(Traitors(SignFlip(), (0,)))
    grid = InProcessGrid(app, 1)
    message = Message(RecordDict(), dst_node_id=1, message_type="train")
    context = grid.context(0)
    context.node_config.pop("partition-id")
    with pytest.raises(ValueError, match="--node-config"):
        app(message, context)


def test_traitors_can_be_sent_to_another_process_and_are_values() -> None:
    traitors = Traitors(Boost(5.0), (0, 1), num_clients=10)
    assert pickle.loads(pickle.dumps(traitors)) == traitors
    with pytest.raises(ValueError, match="at least one partition id"):
        Traitors(Boost(), ())
    with pytest.raises(ValueError, match="num_examples must be at least 1"):
        Traitors(Boost(), (0,), num_examples=0)


class Client(NumPyClient):
    def __init__(self, number: int) -> None:
        self.number = number

    def fit(self, parameters: list[Any], config: dict[str, Any]) -> tuple[list[Any], int, Any]:
        return [parameters[0] + STEPS[self.number]], 50, {}


def client_fn(context: Context) -> Any:
    return Client(int(context.node_config["partition-id"])).to_client()


def legacy_run(make: Any, traitors: Traitors) -> Any:
    """Return the model after one round of a legacy app, and the strategy."""
    models: list[Any] = []
    strategy = make(
        LegacyFedAvg(
            fraction_evaluate=0.0,
            min_fit_clients=5,
            min_available_clients=5,
            initial_parameters=ndarrays_to_parameters([START]),
            evaluate_fn=lambda number, arrays, config: models.append(arrays[0]),
            fit_metrics_aggregation_fn=lambda metrics: {},
        )
    )
    app = ServerApp(
        server_fn=lambda context: ServerAppComponents(
            strategy=strategy, config=ServerConfig(num_rounds=1)
        )
    )
    grid = InProcessGrid(ClientApp(client_fn=client_fn, mods=[traitors]), 5)
    with whole_rounds():
        app(grid, grid.server_context())
    return models[-1]


def test_a_legacy_app_can_be_betrayed_and_defended() -> None:
    traitors = Traitors(SignFlip(100.0), (0, 4))
    fallen = legacy_run(lambda strategy: strategy, traitors)
    np.testing.assert_allclose(fallen - START, (0.9 - 60.0) / 5, rtol=1e-3)
    held = legacy_run(lambda strategy: RobustLegacy(Median(), strategy), traitors)
    np.testing.assert_allclose(held - START, 0.2, rtol=1e-4)


# ---- the forges


def view(matrix: torch.Tensor, num_clients: int = 10) -> CoalitionView[Update]:
    own = tuple(Update(row, 1.0) for row in matrix)
    return CoalitionView(0, Model(nn.Identity), matrix[0] * 0, own, None, None, num_clients)


quick = settings(max_examples=30, deadline=None)


@quick
@given(
    st.integers(2, 8),
    st.integers(1, 30),
    st.integers(0, 10**6),
    st.sampled_from(("std", "sign", "unit")),
)
def test_min_max_goes_as_far_as_the_honest_are_apart_and_no_further(
    n: int, size: int, seed: int, direction: Any
) -> None:
    matrix = torch.randn(n, size, generator=Randomness(seed).at("x"), dtype=torch.float64)
    forge = MinMax(direction)
    forged = forge(view(matrix))[0].delta.double()
    diameter = float(torch.pdist(matrix).max())
    furthest = float((matrix - forged).norm(dim=1).max())
    assert furthest == pytest.approx(diameter, rel=1e-4)


def test_gamma_is_what_bisection_finds() -> None:
    known = torch.randn(7, 40, generator=Randomness(1).at("x"), dtype=torch.float64)
    away, mean, furthest = -known.std(dim=0), known.mean(dim=0), torch.pdist(known).max()
    low, high = 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        inside = bool((mean + middle * away - known).norm(dim=1).max() <= furthest)
        low, high = (middle, high) if inside else (low, middle)
    assert largest_gamma(known, away) == pytest.approx(low, rel=1e-6)


def test_the_simple_forges_send_what_they_say() -> None:
    matrix = torch.randn(3, 20, generator=Randomness(2).at("x"))
    torch.testing.assert_close(Boost()(view(matrix))[1].delta, matrix[1] * 10)
    torch.testing.assert_close(Boost(2.5)(view(matrix))[1].delta, matrix[1] * 2.5)
    torch.testing.assert_close(IPM(0.3)(view(matrix))[2].delta, -0.3 * matrix.mean(dim=0))
    noise = [Gaussian(4.0)(view(matrix), rng=Randomness(3).at("x"))[0].delta for _ in range(2)]
    assert torch.equal(*noise) and float(noise[0].norm() / matrix[0].norm()) == pytest.approx(4.0)


def test_under_masks_the_traitor_still_lies_and_the_rule_says_that_it_is_void() -> None:
    def run(strategy: Any) -> None:
        app = ServerApp()

        @app.main()
        def main(grid: Grid, context: Context) -> None:
            legacy = LegacyContext(context, ServerConfig(num_rounds=1), strategy)
            DefaultWorkflow(fit_workflow=SecAggPlusWorkflow(5, 3, clipping_range=64.0))(
                grid, legacy
            )

        mods: Any = [secaggplus_mod, Traitors(SignFlip(30.0), (0,))]
        grid = InProcessGrid(ClientApp(client_fn=client_fn, mods=mods), 5)
        app(grid, grid.server_context())

    models: list[Any] = []
    plain = LegacyFedAvg(
        fraction_evaluate=0.0,
        min_fit_clients=5,
        min_available_clients=5,
        initial_parameters=ndarrays_to_parameters([START]),
        evaluate_fn=lambda number, arrays, config: models.append(arrays[0]),
        fit_metrics_aggregation_fn=lambda metrics: {},
    )
    run(plain)
    np.testing.assert_allclose(models[-1] - START, (1.4 - 3.0) / 5, atol=1e-3)
    plain.initial_parameters = ndarrays_to_parameters([START])
    with pytest.raises(IncompatibleStages, match="secure aggregation"):
        run(RobustLegacy(Median(), plain))
    plain.initial_parameters = ndarrays_to_parameters([START])
    run(RobustLegacy(Mean(), plain))  # needs no more than the sum
    np.testing.assert_allclose(models[-1] - START, (1.4 - 3.0) / 5, atol=1e-3)

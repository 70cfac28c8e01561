"""Every aggregation rule of Turncoat as a Flower strategy, by wrapping another one."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.common import (
    EvaluateIns,
    EvaluateRes,
    FitIns,
    FitRes,
    Parameters,
    Scalar,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)
from flwr.server.client_manager import ClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import Strategy as LegacyStrategy
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from turncoat.flower.replies import (
    Frame,
    Incidents,
    Received,
    Sound,
    Unfit,
    arrays_of,
    from_messages,
    most_common,
    record_of,
    sound,
    weight_of,
    weighted_by,
    with_content,
)
from turncoat.messages import Clear, Update
from turncoat.randomness import Randomness
from turncoat.stage import (
    Aggregate,
    IncompatibleStages,
    Memory,
    Trace,
    asks,
    call,
    check,
    code_of,
    join,
    takes,
    within,
)
from turncoat.validate import at_least

_log = logging.getLogger("turncoat.flower")

_FOREIGN = {
    "model": "of server optimisers, use Flower's own inside (FedAdam, FedAvgM)",
    "public": "a Flower app has no public data that a rule could be given",
}


class Robust(Strategy):
    """Aggregate with ``rule``, and go on as ``strategy`` does from there.

    ``strategy`` chooses nodes, configures and evaluates as before. Of the replies to a training
    round, those that are errors, or hold NaN, other shapes or other records than most, or are no
    answer to what was asked, are left out; weights are capped. ``rule`` then makes one step of the
    rest, and ``strategy`` is handed the replies with their arrays moved by that step: its average
    of them is that step, and all else that it does (server optimiser, metrics) follows.

    A round in which too few replies are left for the rule keeps the model as it was, and is an
    incident. A rule that no cohort of this size can satisfy stops the run at its first round.

    Integer and boolean arrays (a count of batches) take no part in the rule: of these the median
    counts. Float buffers (running means) do take part, for their names do not tell them apart.

    Attributes:
        incidents: What was left out, capped or missing, and why; also logged as warnings.

    Args:
        rule: Any rule that reads updates: ``Krum(2)``, ``NormBound(Median(), max_norm=1.0)``.
        strategy: Any Flower strategy of the Message API that is no DP wrapper.
        max_weight_ratio: How many times the median claim a claimed number of examples may count.
        seed: Of the rules that draw.

    >>> from flwr.serverapp.strategy import FedAdam
    >>> from turncoat.stages.aggregate.krum import MultiKrum
    >>> Robust(MultiKrum(num_byzantine=3), FedAdam())
    Robust(MultiKrum(num_byzantine=3, num_selected=None), FedAdam)
    """

    def __init__(
        self,
        rule: Aggregate[Clear],
        strategy: Strategy,
        *,
        max_weight_ratio: float = 10.0,
        seed: int = 0,
    ) -> None:
        refuse_strategy(self, strategy)
        at_least(1, self, max_weight_ratio=max_weight_ratio)
        self.rule = rule
        self.strategy = strategy
        self.incidents = Incidents()
        self._max_weight_ratio = max_weight_ratio
        self._server = _Server(rule, seed)
        self._frame: Frame | None = None
        self._asked: dict[int, Message] = {}

    def __repr__(self) -> str:
        return f"Robust({self.rule!r}, {type(self.strategy).__name__})"

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask as the wrapped strategy asks, and remember whom."""
        self._frame = Frame(arrays_of(arrays))
        messages = list(self.strategy.configure_train(server_round, arrays, config, grid))
        self._asked = {message.metadata.dst_node_id: message for message in messages}
        if messages:
            self._server.try_out(len(messages))
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Hand the wrapped strategy the sound replies, all moved by the rule's step."""
        frame, key = started(self, self._frame), weighted_by(self.strategy)
        if not self._asked:
            return None, None
        received = from_messages(
            replies, self._asked, key, round=server_round, incidents=self.incidents
        )
        kept = sound(
            received,
            frame,
            round=server_round,
            incidents=self.incidents,
            max_weight_ratio=self._max_weight_ratio,
        )
        step = self._server.step(kept, frame, round=server_round, incidents=self.incidents)
        if step is None:
            return None, None
        moved = record_of(frame.moved(step, frame.median_of([each.others for each in kept])))
        messages = [with_content(e.reply, moved, e.update.weight, key) for e in kept]
        after, metrics = self.strategy.aggregate_train(server_round, messages)
        return None if after is None else record_of(frame.cast(arrays_of(after))), metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask as the wrapped strategy asks, and remember whom."""
        messages = list(self.strategy.configure_evaluate(server_round, arrays, config, grid))
        self._asked = {message.metadata.dst_node_id: message for message in messages}
        return messages

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Hand the wrapped strategy the replies that it can average."""
        return self.strategy.aggregate_evaluate(
            server_round,
            averageable(
                replies,
                self._asked,
                weighted_by(self.strategy),
                round=server_round,
                incidents=self.incidents,
            ),
        )

    def summary(self) -> None:
        """Log what is wrapped in what."""
        _log.info("%r", self)
        self.strategy.summary()


class RobustLegacy(LegacyStrategy):
    """`Robust` for strategies of ``flwr.server.strategy``: of ``client_fn`` and ``server_fn`` apps.

    Under ``SecAggPlusWorkflow`` every reply arrives as the same aggregate. A rule that must read
    updates is then void, and the run stops with that reason.

    Args: as of `Robust`.
    """

    def __init__(
        self,
        rule: Aggregate[Clear],
        strategy: LegacyStrategy,
        *,
        max_weight_ratio: float = 10.0,
        seed: int = 0,
    ) -> None:
        refuse_strategy(self, strategy, LegacyStrategy)
        at_least(1, self, max_weight_ratio=max_weight_ratio)
        self.rule = rule
        self.strategy = strategy
        self.incidents = Incidents()
        self._max_weight_ratio = max_weight_ratio
        self._server = _Server(rule, seed)
        self._frame: Frame | None = None

    def __repr__(self) -> str:
        return f"RobustLegacy({self.rule!r}, {type(self.strategy).__name__})"

    def initialize_parameters(self, client_manager: ClientManager) -> Parameters | None:
        """Begin as the wrapped strategy begins."""
        return self.strategy.initialize_parameters(client_manager)

    def configure_fit(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, FitIns]]:
        """Ask as the wrapped strategy asks."""
        named = {str(i): array for i, array in enumerate(parameters_to_ndarrays(parameters))}
        self._frame = Frame(named)
        asked = self.strategy.configure_fit(server_round, parameters, client_manager)
        if asked:
            self._server.try_out(len(asked))
        return asked

    def aggregate_fit(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, FitRes]],
        failures: list[tuple[ClientProxy, FitRes] | BaseException],
    ) -> tuple[Parameters | None, dict[str, Scalar]]:
        """Hand the wrapped strategy the sound results, all moved by the rule's step."""
        frame = started(self, self._frame)
        for failure in failures:
            node = None if isinstance(failure, BaseException) else failure[0].cid
            why = failure if isinstance(failure, BaseException) else failure[1].status.message
            self.incidents.note(server_round, node, f"failed: {why}")
        received = [
            Received(
                proxy.cid,
                lambda result=result: {  # type: ignore[misc]
                    str(i): data for i, data in enumerate(result.parameters.tensors)
                },
                result.num_examples,
                tuple(sorted(result.metrics)),
                (proxy, result),
            )
            for proxy, result in sorted(results, key=lambda each: each[0].cid)
        ]
        kept = sound(
            received,
            frame,
            round=server_round,
            incidents=self.incidents,
            max_weight_ratio=self._max_weight_ratio,
        )
        step = self._server.step(kept, frame, round=server_round, incidents=self.incidents)
        if step is None:
            return None, {}
        arrays = frame.moved(step, frame.median_of([each.others for each in kept]))
        moved = ndarrays_to_parameters(list(arrays.values()))
        sent = []
        for each in kept:
            proxy, result = each.reply
            weight = max(1, round(each.update.weight))
            sent.append((proxy, replace(result, parameters=moved, num_examples=weight)))
        after, metrics = self.strategy.aggregate_fit(server_round, sent, failures)
        if after is None:
            return None, metrics
        named = {str(i): array for i, array in enumerate(parameters_to_ndarrays(after))}
        return ndarrays_to_parameters(list(frame.cast(named).values())), metrics

    def configure_evaluate(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, EvaluateIns]]:
        """Ask as the wrapped strategy asks."""
        return self.strategy.configure_evaluate(server_round, parameters, client_manager)

    def aggregate_evaluate(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, EvaluateRes]],
        failures: list[tuple[ClientProxy, EvaluateRes] | BaseException],
    ) -> tuple[float | None, dict[str, Scalar]]:
        """Average as the wrapped strategy does, of those that claim a weight and a finite loss."""
        fit = []
        for proxy, result in results:
            try:
                weight_of(result.num_examples)
                if not np.isfinite(result.loss):
                    raise Unfit(f"sent the loss {result.loss}")
            except Unfit as reason:
                self.incidents.note(server_round, proxy.cid, f"left out of evaluation: {reason}")
            else:
                fit.append((proxy, result))
        return self.strategy.aggregate_evaluate(server_round, fit, failures)

    def evaluate(
        self, server_round: int, parameters: Parameters
    ) -> tuple[float, dict[str, Scalar]] | None:
        """Evaluate as the wrapped strategy does."""
        return self.strategy.evaluate(server_round, parameters)


class _Server:
    """A rule with what it is offered: its memory, its draws, and a cohort to be tried out on."""

    def __init__(self, rule: Any, seed: int) -> None:
        check(rule, Aggregate)
        join("Robust", Update, rule)
        for stage in within(rule):
            for name, cure in _FOREIGN.items():
                if name in asks(code_of(stage))[0]:
                    raise IncompatibleStages(
                        f"{stage!r} asks for {name!r}, which a Flower strategy has none of: {cure}"
                    )
        self._rule = rule
        self._reads_each = any(issubclass(needed, Clear) for needed in takes(rule))
        self._memory: dict[str, Any] = {}
        self._randomness = Randomness(seed)

    def try_out(self, num_messages: int) -> None:
        """Raise what the rule raises for a cohort of this size; its memory is not touched."""
        self._call([Update(torch.zeros(1), 1.0)] * num_messages, torch.zeros(1), {}, 0)

    def step(
        self, kept: Sequence[Sound], frame: Frame, *, round: int, incidents: Incidents
    ) -> Tensor | None:
        """Return the rule's step. Shape: ``(num_floats,)``. None if there is none to be taken."""
        if not kept:
            incidents.note(round, None, "no sound reply: the model stays as it was")
            return None
        updates = [each.update for each in kept]
        if self._reads_each:
            _refuse_one_for_all(self._rule, updates)
        memory = dict(self._memory)
        try:
            step = self._call(updates, frame.vector.float(), memory, round)
        except ValueError as reason:  # it could have coped with all that were asked
            incidents.note(round, None, f"{reason}; the model stays as it was")
            return None
        if not bool(torch.isfinite(step).all()):
            what = f"{self._rule!r} gave NaN or infinity: the model stays as it was"
            incidents.note(round, None, what)
            return None
        self._memory = memory
        return step

    def _call(
        self, updates: Sequence[Update], before: Tensor, memory: dict[str, Any], round: int
    ) -> Tensor:
        step: Tensor = call(
            self._rule,
            updates,
            rng=self._randomness.at("aggregate", round),
            memory=Memory(memory),
            before=before,
            cohort=tuple(range(len(updates))),
            trace=Trace(),
        )
        return step


def cohort_fault(rule: Any, num_messages: int) -> str | None:
    """Return why a rule cannot work in a cohort of this size, if it cannot."""
    try:
        _Server(rule, 0).try_out(num_messages)
    except (ValueError, IncompatibleStages) as reason:
        return str(reason)
    return None


def averageable(
    replies: Iterable[Message],
    asked: dict[int, Message],
    key: str | None,
    *,
    round: int,
    incidents: Incidents,
) -> list[Message]:
    """Return the replies to an evaluation whose metrics have the usual keys and a weight."""
    received = from_messages(
        replies, asked, key, round=round, incidents=incidents, with_arrays=False
    )
    usual, fit = most_common(each.kind for each in received), []
    for each in received:
        try:
            weight_of(each.weight)
            if each.kind != usual:
                raise Unfit("sent other metrics than most")
        except Unfit as reason:
            incidents.note(round, each.node, f"left out of evaluation: {reason}")
        else:
            fit.append(each.reply)
    return fit


def refuse_strategy(owner: object, strategy: object, due: type = Strategy) -> None:
    """Refuse what is no strategy of this API, and DP wrappers, whose noise would be wrong."""
    name = type(owner).__name__
    if isinstance(strategy, type) or not isinstance(strategy, Strategy | LegacyStrategy):
        raise TypeError(f"{name} wraps a Flower strategy; {strategy!r} is none: give FedAvg()")
    if not isinstance(strategy, due):
        cure = "RobustLegacy" if isinstance(strategy, LegacyStrategy) else "Robust"
        raise TypeError(
            f"{name} wraps a strategy of {due.__module__}, and {type(strategy).__name__} comes "
            f"from {type(strategy).__module__}: use {cure}, or the strategy of the other API"
        )
    inner: Any = strategy
    while inner is not None:
        if type(inner).__name__.startswith(("DifferentialPrivacy", "DPFedAvg")):
            raise ValueError(
                f"{name} around {type(inner).__name__}: its noise is meant for a mean of clipped "
                "updates, and this would hand it another thing, so its ε would not hold; "
                "leave one of the two out"
            )
        inner = getattr(inner, "strategy", None)
    if due is Strategy and type(strategy).start is not Strategy.start:  # type: ignore[union-attr]
        _log.warning("%s: %s.start() is not called", name, type(strategy).__name__)


def started(owner: object, frame: Frame | None) -> Frame:
    """Return the frame of this round, or say that the round was never configured."""
    if frame is None:
        name = type(owner).__name__
        raise RuntimeError(f"{name} has configured no round yet: call configure_train first")
    return frame


def _refuse_one_for_all(rule: Any, updates: Sequence[Update]) -> None:
    first = updates[0].delta
    same = len(updates) > 2 and all(torch.equal(first, u.delta) for u in updates[1:])
    if same and bool(first.any()):
        raise IncompatibleStages(
            f"{rule!r} must read each client's update, but all {len(updates)} are the same vector, "
            "which is what Flower's secure aggregation leaves: this defence would do nothing; "
            "take the secure aggregation off, or use a rule that needs only the sum (Mean)"
        )

"""A Flower strategy around another one: what comes between the replies and its aggregation.

Two forms of one outline, for the Message API and for the legacy one. What is done to the replies
is a `Treatment`; a strategy for users is one of each.
"""

from __future__ import annotations

import copy
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common import (
    Code,
    EvaluateIns,
    EvaluateRes,
    FitIns,
    FitRes,
    Parameters,
    Scalar,
    Status,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)
from flwr.server.client_manager import ClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import Strategy as LegacyStrategy
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from turncoat.flower.replies import (
    Arrays,
    Frame,
    Incidents,
    Received,
    Sound,
    Unfit,
    arrays_of,
    from_messages,
    most_common,
    record_of,
    weight_of,
    weighted_by,
    with_content,
)

_log = logging.getLogger("turncoat.flower")

S = TypeVar("S", Strategy, LegacyStrategy)


@dataclass(frozen=True)
class Treated:
    """What the wrapped strategy is handed: ``arrays``, in each of the replies that were kept.

    Attributes:
        replies: None for one reply with nothing else in it, from nobody in particular.
    """

    arrays: Arrays
    replies: Sequence[Sound] | None = None


class Treatment(ABC, Generic[S]):
    """What is done to the replies to one round of training, whatever the API.

    Attributes:
        reads_claims: Whether what a node claims as its weight, and which metrics it sent, matter.
        strategy: The strategy that is wrapped.
        incidents: What was left out, capped or missing, and why; also logged as warnings.
    """

    reads_claims: ClassVar[bool]
    strategy: S
    incidents: Incidents
    _frame: Frame | None = None

    @abstractmethod
    def _expect(self, round: int, num_messages: int) -> None:
        """Look at how many nodes are asked; raise if that can never do."""

    @abstractmethod
    def _treat(self, received: Sequence[Received], frame: Frame, round: int) -> Treated | None:
        """Return what the wrapped strategy is to aggregate; None to leave the model as it is."""

    def _begun(self) -> Frame:
        if self._frame is None:
            name = type(self).__name__
            raise RuntimeError(f"{name} has configured no round yet: call configure_train first")
        return self._frame


class Wrapping(Treatment[Strategy], Strategy):
    """The outline for strategies of ``flwr.serverapp.strategy``."""

    _asked: dict[int, Message]

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask as the wrapped strategy asks, and remember whom."""
        self._frame = Frame(arrays_of(arrays))
        messages = self._ask(self.strategy.configure_train(server_round, arrays, config, grid))
        if messages:
            self._expect(server_round, len(messages))
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Hand the wrapped strategy the replies as they were treated."""
        frame, key = self._begun(), weighted_by(self.strategy)
        if not self._asked:
            return None, None
        received = from_messages(
            replies,
            self._asked,
            key if self.reads_claims else None,
            round=server_round,
            incidents=self.incidents,
        )
        treated = self._treat(received, frame, server_round)
        if treated is None:
            return None, None
        arrays = record_of(treated.arrays)
        if treated.replies is None:
            messages = [self._from_nobody(arrays, key)]
        else:
            messages = [
                with_content(e.reply, arrays, e.update.weight, key) for e in treated.replies
            ]
        after, metrics = self.strategy.aggregate_train(server_round, messages)
        kept = None if after is None else record_of(frame.cast(arrays_of(after)))
        return kept, self._passed_on(metrics, [each.reply for each in received])

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask as the wrapped strategy asks, and remember whom."""
        return self._ask(self.strategy.configure_evaluate(server_round, arrays, config, grid))

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Hand the wrapped strategy the replies whose metrics have the usual keys and a weight."""
        received = from_messages(
            replies,
            self._asked,
            weighted_by(self.strategy),
            round=server_round,
            incidents=self.incidents,
            with_arrays=False,
        )
        usual, fit = most_common(each.kind for each in received), []
        for each in received:
            try:
                weight_of(each.weight)
                if each.kind != usual:
                    raise Unfit("sent other metrics than most")
            except Unfit as reason:
                self.incidents.note(server_round, each.node, f"left out of evaluation: {reason}")
            else:
                fit.append(each.reply)
        return self.strategy.aggregate_evaluate(server_round, fit)

    def summary(self) -> None:
        """Log what is wrapped in what."""
        _log.info("%r", self)
        self.strategy.summary()

    def _passed_on(
        self, metrics: MetricRecord | None, replies: Sequence[Message]
    ) -> MetricRecord | None:
        """Return the training metrics that are made known."""
        return metrics

    def _ask(self, messages: Iterable[Message]) -> list[Message]:
        asked = list(messages)
        self._asked = {message.metadata.dst_node_id: message for message in asked}
        return asked

    def _from_nobody(self, arrays: ArrayRecord, key: str | None) -> Message:
        content = RecordDict(
            {
                getattr(self.strategy, "arrayrecord_key", "arrays"): arrays,
                "metrics": MetricRecord({} if key is None else {key: 1.0}),
            }
        )
        one = copy.copy(next(iter(self._asked.values())))
        one.content = content
        return one


class WrappingLegacy(Treatment[LegacyStrategy], LegacyStrategy):
    """The outline for strategies of ``flwr.server.strategy``."""

    _asked: list[tuple[ClientProxy, FitIns]]

    def initialize_parameters(self, client_manager: ClientManager) -> Parameters | None:
        """Begin as the wrapped strategy begins."""
        return self.strategy.initialize_parameters(client_manager)

    def configure_fit(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, FitIns]]:
        """Ask as the wrapped strategy asks, and remember whom."""
        self._frame = Frame(_numbered(parameters))
        self._asked = self.strategy.configure_fit(server_round, parameters, client_manager)
        if self._asked:
            self._expect(server_round, len(self._asked))
        return self._asked

    def aggregate_fit(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, FitRes]],
        failures: list[tuple[ClientProxy, FitRes] | BaseException],
    ) -> tuple[Parameters | None, dict[str, Scalar]]:
        """Hand the wrapped strategy the results as they were treated."""
        frame = self._begun()
        if not self._asked:
            return None, {}
        for failure in failures:
            node = None if isinstance(failure, BaseException) else failure[0].cid
            why = failure if isinstance(failure, BaseException) else failure[1].status.message
            self.incidents.note(server_round, node, f"failed: {why}")
        received = [
            _of_result(proxy, result)
            for proxy, result in sorted(results, key=lambda each: each[0].cid)
        ]
        treated = self._treat(received, frame, server_round)
        if treated is None:
            return None, {}
        moved = ndarrays_to_parameters(list(treated.arrays.values()))
        sent = []
        if treated.replies is None:
            sent.append((self._asked[0][0], FitRes(Status(Code.OK, ""), moved, 1, {})))
        for each in treated.replies or ():
            proxy, result = each.reply
            weight = max(1, round(each.update.weight))
            sent.append((proxy, replace(result, parameters=moved, num_examples=weight)))
        after, metrics = self._aggregate(server_round, sent, failures)
        metrics = self._passed_on(metrics, results)
        if after is None:
            return None, metrics
        return ndarrays_to_parameters(list(frame.cast(_numbered(after)).values())), metrics

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

    def _aggregate(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, FitRes]],
        failures: list[tuple[ClientProxy, FitRes] | BaseException],
    ) -> tuple[Parameters | None, dict[str, Scalar]]:
        return self.strategy.aggregate_fit(server_round, results, failures)

    def _passed_on(
        self, metrics: dict[str, Scalar], results: Sequence[tuple[ClientProxy, FitRes]]
    ) -> dict[str, Scalar]:
        """Return the training metrics that are made known."""
        return metrics


def refuse_strategy(owner: object, strategy: object) -> None:
    """Refuse what is no strategy of this API, and DP wrappers, whose noise would be wrong."""
    name, due = type(owner).__name__, Strategy if isinstance(owner, Wrapping) else LegacyStrategy
    if isinstance(strategy, type) or not isinstance(strategy, Strategy | LegacyStrategy):
        raise TypeError(f"{name} wraps a Flower strategy; {strategy!r} is none: give FedAvg()")
    if not isinstance(strategy, due):
        plain = name.removesuffix("Legacy")
        cure = f"{plain}Legacy" if isinstance(strategy, LegacyStrategy) else plain
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
    if isinstance(strategy, Strategy) and type(strategy).start is not Strategy.start:
        _log.warning("%s: %s.start() is not called", name, type(strategy).__name__)


def _of_result(proxy: ClientProxy, result: FitRes) -> Received:
    return Received(
        proxy.cid,
        lambda: {str(i): data for i, data in enumerate(result.parameters.tensors)},
        result.num_examples,
        tuple(sorted(result.metrics)),
        (proxy, result),
    )


def _numbered(parameters: Parameters) -> dict[str, Any]:
    return {str(i): array for i, array in enumerate(parameters_to_ndarrays(parameters))}

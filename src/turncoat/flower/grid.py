"""A Flower Grid that runs the ClientApp in this process, and every private Flower name we touch.

Flower's own in-process engine needs Ray or a SuperLink, starts seconds late and answers in any
order. This one calls the ClientApp where it stands: the same apps, the same strategies, and the
same answers every time. What it does as Flower does is said at `InProcessGrid`.

Flower promises nothing about the names in the block below; `tests/test_flower_audit.py` says in
one sentence which of them a release has moved.
"""

from __future__ import annotations

import contextlib
import copy
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flwr.server.server as legacy_server
from flwr.app import Context, Error, Message, RecordDict
from flwr.client.mod import secagg_mod, secaggplus_mod
from flwr.clientapp import ClientApp
from flwr.clientapp.client_app import ClientAppException, LoadClientAppError
from flwr.common import Code
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, Key
from flwr.server.workflow.default_workflows import default_fit_workflow
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from turncoat.validate import at_least

RUN_ID = 1
FIRST_NODE_ID = 1000
"""Node number 0 is known to Flower as this; the next as this plus one."""


class Delivery(NamedTuple):
    """What node number `node` (from 0: its partition id) was sent, and its reply to it."""

    node: int
    message: Message
    reply: Message


Intercept = Callable[[Sequence[Delivery]], Sequence[Message | None]]
"""Rewrites the replies to one push, once all of it has answered: one reply, or None for a node
that never answers, for each delivery, in their order."""


class InProcessGrid(Grid):
    """A Flower Grid whose nodes are calls of `client_app` in this process, in the order of sending.

    As in Flower's simulation: every node gets its own copy of a message (strategies send one
    object to all, and mods change it in place); a node's `Context.state` is kept from message to
    message, and left as it was by a call that raised; what a ClientApp raises becomes an error
    reply with Flower's code and wording; the node config is `partition-id` and `num-partitions`,
    to which `node_configs` (one mapping a node) is added. Apps in the Message API and with a
    legacy `client_fn` run alike; in front of a legacy server, see `whole_rounds`.

    Differs from Flower: no time passes between sending and answering, so a `timeout` never
    runs out; a message to a node that is not there gets the error reply NODE_UNAVAILABLE.
    The identity that `Message(...)` asks for is one for each process: a process is to run one
    federation at a time.
    """

    def __init__(
        self,
        client_app: ClientApp,
        num_nodes: int,
        run_config: Mapping[str, bool | float | int | str] | None = None,
        *,
        node_configs: Sequence[Mapping[str, bool | float | int | str]] | None = None,
        intercept: Intercept | None = None,
    ) -> None:
        at_least(1, self, num_nodes=num_nodes)
        if node_configs is not None and len(node_configs) != num_nodes:
            raise ValueError(
                f"there are {len(node_configs)} node_configs for {num_nodes} nodes: "
                "give one for each, or none"
            )
        self._client_app = client_app
        self._intercept = intercept
        self._run_config = dict(run_config or {})
        self._contexts = [
            Context(
                run_id=RUN_ID,
                node_id=FIRST_NODE_ID + node,
                node_config={
                    "partition-id": node,
                    "num-partitions": num_nodes,
                    **(node_configs[node] if node_configs else {}),
                },
                state=RecordDict(),
                run_config=dict(self._run_config),
            )
            for node in range(num_nodes)
        ]
        self._run = Run.create_empty(RUN_ID)
        self._run.override_config = dict(self._run_config)
        self._replies: dict[str, Message] = {}
        self._num_sent = 0
        self._turn = threading.RLock()
        _take_the_servers_identity()

    def context(self, node: int) -> Context:
        """What node number `node` (from 0) has kept so far."""
        return self._contexts[node]

    def server_context(self) -> Context:
        """A fresh Context for the ServerApp of this federation."""
        return Context(
            run_id=RUN_ID,
            node_id=SUPERLINK_NODE_ID,
            node_config={},
            state=RecordDict(),
            run_config=dict(self._run_config),
        )

    def set_run(self, run: Run) -> None:
        """Take `run` for the run that this grid operates in."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run that this grid operates in."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """A message from the server, as older ServerApps make them."""
        return Message(
            content,
            dst_node_id=dst_node_id,
            message_type=message_type,
            group_id=group_id,
            ttl=ttl,
        )

    def get_node_ids(self) -> Iterable[int]:
        """The ids of all nodes, in the order of their partitions."""
        return [context.node_id for context in self._contexts]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Deliver `messages`, let `intercept` rewrite the replies, and keep them to be pulled."""
        with self._turn:
            ids, deliveries = [], []
            for message in messages:
                self._num_sent += 1
                identify(message, f"message-{self._num_sent}")
                ids.append(message.metadata.message_id)
                deliveries.append(self._deliver(message))
            replies: Sequence[Message | None] = [each.reply for each in deliveries]
            if self._intercept is not None and deliveries:
                replies = self._intercept(deliveries)
                if len(replies) != len(deliveries):
                    raise ValueError(
                        f"intercept returned {len(replies)} replies for {len(deliveries)} "
                        "deliveries: give one, or None, for each"
                    )
            for key, reply in zip(ids, replies, strict=True):
                if reply is not None:
                    identify(reply, f"reply-to-{key}")
                    self._replies[key] = reply
            return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies to `message_ids` that have not been pulled yet."""
        with self._turn:
            found = (self._replies.pop(key, None) for key in message_ids)
            return [reply for reply in found if reply is not None]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push `messages` and pull all replies; what never answers is not waited for."""
        return self.pull_messages(self.push_messages(messages))

    def _deliver(self, message: Message) -> Delivery:
        node = message.metadata.dst_node_id - FIRST_NODE_ID
        if not 0 <= node < len(self._contexts):
            reason = f"there is no node {message.metadata.dst_node_id}"
            return Delivery(node, message, error_reply(message, ErrorCode.NODE_UNAVAILABLE, reason))
        received = copy.deepcopy(message)
        kept = self._contexts[node]
        context = copy.copy(kept)
        context.state = copy.deepcopy(kept.state)
        try:
            reply = self._client_app(received, context)
            if not isinstance(reply, Message):
                raise TypeError(f"a ClientApp must return a Message; got {type(reply).__name__}")
        except LoadClientAppError as fault:
            return Delivery(node, message, _fault(message, fault, "LOAD_CLIENT_APP_EXCEPTION"))
        except Exception as fault:
            raised = ClientAppException(str(fault))
            return Delivery(node, message, _fault(message, raised, "CLIENT_APP_RAISED_EXCEPTION"))
        kept.state = context.state
        return Delivery(node, message, copy.deepcopy(reply))


def identify(message: Message, key: str) -> None:
    """Give `message` its id, as a SuperLink does on receipt."""
    message.metadata.__dict__["_message_id"] = key


def error_reply(message: Message, code: int, reason: str) -> Message:
    """The reply of a node that could not answer `message`."""
    return Message(Error(code=code, reason=reason), reply_to=message)


def reason_of(error: Any) -> str:
    """Return what a node's error says, without the wrapping that Flower puts around it."""
    said = " ".join(str(getattr(error, "reason", error)).split())
    wrapped = re.search(r"ClientAppException occurred\. Message: (.*)'>$", said)
    return (wrapped[1] if wrapped else said)[-300:]


def _fault(message: Message, fault: Exception, code: str) -> Message:
    return error_reply(message, getattr(ErrorCode, code), f"{type(fault)}:<'{fault}'>")


def _take_the_servers_identity() -> None:
    TaskIdentity.task_id = 1
    TaskIdentity.run_id = RUN_ID
    TaskIdentity.node_id = SUPERLINK_NODE_ID


class _Posted(Exception):
    """Carries what a legacy client proxy would have sent."""

    def __init__(self, message: Message) -> None:
        self.message = message


class _Letterbox:
    """Stands in for the grid of one legacy client proxy: posts nothing, or answers with `reply`."""

    def __init__(self, reply: Message | None = None) -> None:
        self.reply = reply

    def send_and_receive(self, messages: Iterable[Message], **_: Any) -> list[Message]:
        if self.reply is None:
            raise _Posted(next(iter(messages)))
        return [self.reply]


@contextlib.contextmanager
def whole_rounds() -> Iterator[None]:
    """Let Flower's legacy server send each round in one push, in order, and without threads.

    By itself it sends every message from a thread of its own, and takes the replies as they
    come: no round can be seen whole, and no two runs are the same to the bit.
    """

    def ask(method: str) -> Callable[..., tuple[list[Any], list[Any]]]:
        def ask_all(
            client_instructions: list[tuple[Any, Any]],
            max_workers: int | None,
            timeout: float | None,
            group_id: int,
        ) -> tuple[list[Any], list[Any]]:
            def call(client: Any, ins: Any, letterbox: _Letterbox) -> Any:
                grid, client.grid = client.grid, letterbox
                try:
                    return getattr(client, method)(ins, timeout, group_id)
                finally:
                    client.grid = grid

            messages = []
            for client, ins in client_instructions:
                try:
                    call(client, ins, _Letterbox())
                except _Posted as posted:
                    messages.append(posted.message)
            if not messages:
                return [], []
            grid = client_instructions[0][0].grid
            ids = list(grid.push_messages(messages))
            results: list[Any] = []
            failures: list[Any] = []
            for (client, ins), key in zip(client_instructions, ids, strict=True):
                replies = list(grid.pull_messages([key]))
                if not replies:
                    failures.append(TimeoutError(f"node {client.node_id} did not answer"))
                    continue
                try:
                    answer = call(client, ins, _Letterbox(replies[0]))
                except Exception as failure:
                    failures.append(failure)
                    continue
                good = answer.status.code == Code.OK
                (results if good else failures).append((client, answer))
            return results, failures

        return ask_all

    before = legacy_server.fit_clients, legacy_server.evaluate_clients
    legacy_server.fit_clients, legacy_server.evaluate_clients = ask("fit"), ask("evaluate")
    try:
        yield
    finally:
        legacy_server.fit_clients, legacy_server.evaluate_clients = before


Mod = Callable[[Message, Context, Callable[[Message, Context], Message]], Message]


@contextlib.contextmanager
def other_mods(*, drop: Sequence[Mod] = (), innermost: Mod | None = None) -> Iterator[None]:
    """Let each ClientApp that is made meanwhile lose some mods, and gain one next to its code.

    Mods are bound when an app is made, so this must surround its import.
    """
    original = ClientApp.__init__

    def init(self: ClientApp, client_fn: Any = None, mods: list[Mod] | None = None) -> None:
        kept = [mod for mod in mods or () if mod not in drop]
        original(self, client_fn, [*kept, innermost] if innermost else kept)

    ClientApp.__init__ = init  # type: ignore[method-assign]
    try:
        yield
    finally:
        ClientApp.__init__ = original  # type: ignore[method-assign]


@contextlib.contextmanager
def without_secure_aggregation() -> Iterator[None]:
    """Let SecAgg+ workflows run the plain round instead, and client apps send in the clear."""
    original = SecAggPlusWorkflow.__call__

    def plain(self: SecAggPlusWorkflow, grid: Grid, context: Context) -> None:
        default_fit_workflow(grid, context)

    SecAggPlusWorkflow.__call__ = plain  # type: ignore[method-assign]
    try:
        with other_mods(drop=[secaggplus_mod, secagg_mod]):
            yield
    finally:
        SecAggPlusWorkflow.__call__ = original  # type: ignore[method-assign]


def round_of(context: Any) -> int:
    """Return the round that a legacy workflow is in."""
    return int(context.state.config_records[MAIN_CONFIGS_RECORD][Key.CURRENT_ROUND])


def mods_of(client_app: ClientApp) -> list[Mod]:
    """Return the mods that were given to the whole app."""
    return list(client_app._mods)

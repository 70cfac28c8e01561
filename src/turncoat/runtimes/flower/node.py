"""A client of a federation as a Flower ClientApp: it prepares, trains and dresses.

The work is that of `turncoat.runtimes.seat`, as in every runtime. A node knows itself by its
``partition-id``, and uses the data of that client alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import astuple
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from turncoat.messages import Envelope
from turncoat.runtimes.flower.wire import built, read, spelt, write
from turncoat.runtimes.seat import AttackBroke, Cell, Job, Seats, attempt
from turncoat.runtimes.simulate import one_thread

_KEPT = ("turncoat.arrays", "turncoat.json")  # where a node's own memory lies in its state


def client_app(seats_of: Callable[[Context], Seats]) -> ClientApp:
    """Return the app of every node. ``seats_of`` says what the node's federation is."""
    app = ClientApp()

    @app.query("hello")
    def hello(message: Message, context: Context) -> Message:
        number = int(context.node_config["partition-id"])
        return Message(write({"client": number}), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        with one_thread():
            reply = _trained(seats_of(context), read(message.content), context)
        return Message(write(reply), reply_to=message)

    @app.train("dress")
    def dress(message: Message, context: Context) -> Message:
        """Dress once more, for those who are left."""
        with one_thread():
            reply = _dressed_again(seats_of(context), read(message.content), context)
        return Message(write(reply), reply_to=message)

    return app


def _trained(seats: Seats, order: Mapping[str, Any], context: Context) -> dict[str, Any]:
    client, t = int(context.node_config["partition-id"]), int(order["round"])
    reply: dict[str, Any] = {"client": client, "round": t}
    if client != order["client"]:
        return reply | {"fault": f"is node {client} and was asked for client {order['client']}"}
    own = _recall(context) if order["memory_stays"] else {}
    job = Job(
        client,
        bool(order["traitor"]),
        own.get("train", {}) if order["memory_stays"] else order["kept"],
        own.get("channel", {}) if order["memory_stays"] else order["channel"],
        bool(order["shown"]),
    )
    start, envelope = order["start"], Envelope(client, tuple(order["cohort"]), t)
    try:
        done = attempt(seats, envelope, start.to(seats.task.test[0].device), job)
    except AttackBroke as error:
        return reply | {"broke": str(error)}
    if done.fault is not None:
        return reply | {"fault": done.fault}
    if done.caught is not None:
        reply["caught"] = list(astuple(done.caught))
    channel: Cell = job.channel
    if job.shown:
        reply["payload"] = spelt(done.payload)
    else:
        try:
            message, channel = seats.dress(done.payload, envelope, job.channel, traitor=job.traitor)
        except Exception as error:
            return reply | {"fault": f"raised {type(error).__name__}: {error}"}
        reply["message"] = spelt(message)
    again = None
    if not job.shown and seats.federation.recovers_from is not None:  # it may have to dress again
        again = {"round": t, "payload": spelt(done.payload), "channel": job.channel}
    if order["memory_stays"]:
        _keep(context, {"train": done.kept, "channel": channel, "again": again})
    else:
        reply |= {"kept": done.kept, "channel": channel}
        if again is not None:
            _keep(context, {"again": again})
    return reply


def _dressed_again(seats: Seats, order: Mapping[str, Any], context: Context) -> dict[str, Any]:
    client, t = int(context.node_config["partition-id"]), int(order["round"])
    own = _recall(context)
    again = own.get("again")
    if again is None or again["round"] != t:
        return {"client": client, "round": t, "fault": "kept no payload to dress once more"}
    payload = built(again["payload"], seats.federation.trains)
    envelope = Envelope(client, tuple(order["cohort"]), t)
    message, channel = seats.dress(
        payload, envelope, again["channel"], traitor=bool(order["traitor"])
    )
    reply = {"client": client, "round": t, "message": spelt(message)}
    if order["memory_stays"]:
        _keep(context, own | {"channel": channel})
        return reply
    return reply | {"channel": channel}


def _recall(context: Context) -> dict[str, Any]:
    if _KEPT[0] not in context.state:
        return {}
    kept: dict[str, Any] = read(context.state)
    return kept


def _keep(context: Context, value: dict[str, Any]) -> None:
    written = write(value)
    for name in _KEPT:
        context.state[name] = written[name]

"""What an audit of a Flower app set out to do, in the words and the form that the report reads."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from turncoat import __version__
from turncoat.flower.audit import AS_IS, IN_THE_CLEAR, INVERSION, MEMBERSHIP, Work
from turncoat.flower.witness import Metric
from turncoat.record import SCHEMA_VERSION

_SABOTAGES = (
    "{who} can bring the app's own {metric} down to {value} {interval}; without the attack it is "
    "{baseline}."
)
_HARMS = (
    "{who} can drive the app's own {metric} up to {value} {interval}; without the attack it is "
    "{baseline}."
)
_REBUILDS = (
    "{who} can rebuild images that nodes trained on from single updates: {value} {interval} of "
    "likeness to the originals, where a guess from public images reaches {baseline}."
)
_TELLS = (
    "{who} can tell whether a record was used for training better than by chance: AUC {value} "
    "{interval}, where guessing gives {baseline}."
)


def agenda(
    work: Work, metric: Metric | None, clean: Mapping[str, Any], command: str
) -> dict[str, Any]:
    """Return the plan of an audit as its report reads it, but for its cells and findings."""
    audit, task = work.audit, work.task
    nodes = range(audit.num_nodes)
    sizes = [int(clean["sizes"].get(str(n), 0)) for n in nodes]
    m, n = len(audit.members), audit.num_nodes
    return {
        "schema_version": SCHEMA_VERSION,
        "turncoat": __version__,
        "title": f"{audit.app.name}, a Flower app",
        "identity": audit.identity,
        "rounds": len(clean["cohort"]),
        "seeds": list(audit.seeds),
        "delta": 1e-5,
        "config_sha256": hashlib.sha256(audit.text.encode()).hexdigest(),
        "overrides": [],
        "command": command,
        "task": {
            "name": audit.app.name,
            "source": audit.app.about or "a Flower app; it does not say what its data are",
            "classes": task.get("classes") or [],
            "client_names": [f"node {i}" for i in nodes],
            "num_params": clean["num_params"],
            "image_shape": task.get("image_shape"),
            "sizes": task.get("sizes") or sizes,
            "label_counts": task.get("label_counts") or [],
            "num_test": work.num_test(metric),
            "metric": metric.name if metric else "accuracy",
        },
        "coalition": {"text": _who(work), "members": list(audit.members)},
        "defences": [_column(work, d, clean) for d in work.defences],
        "attacks": [
            {
                "name": f.name,
                "family": "poisoning",
                "text": f.said(m, n - m),
                "game": f"the app's own {metric.said}" if metric else "",
                "says": _says(metric),
                "seats": ["coalition"],
                "members": list(audit.members),
                "needs": "to take part",
            }
            for f in audit.forgeries
        ]
        + [
            {
                "name": INVERSION,
                "family": "inversion",
                "text": f"InvertingGradients(num_steps={audit.num_steps})",
                "game": "Reconstruct(num_victims=2)",
                "says": _REBUILDS,
                "seats": ["server"],
                "members": None,
                "needs": "ServerView[Update]",
            },
            {
                "name": MEMBERSHIP,
                "family": "membership",
                "text": "LossThreshold()",
                "game": "Membership()",
                "says": _TELLS,
                "seats": ["user"],
                "members": None,
                "needs": "ModelView or QueryView",
            },
        ],
        "versions": {"python": platform.python_version()} | _versions(),
        "machine": {
            "cores": os.cpu_count(),
            "system": f"{platform.system()} {platform.machine()}",
        },
    }


def _who(work: Work) -> str:
    members, audit = work.audit.members, work.audit
    named = ", ".join(str(m) for m in members)
    known = "their own updates and, where an attack asks, everyone else's (full knowledge)"
    if work.secure:
        known += "; behind SecAgg+ their own only"
    word = "node" if len(members) == 1 else "nodes"
    return f"{word} {named}: {len(members)} of {audit.num_nodes} nodes, who know {known}"


def _column(work: Work, defence: str, clean: Mapping[str, Any]) -> dict[str, Any]:
    sealed = work.secure and defence == AS_IS
    strategy = ", ".join(clean["strategies"]) or "a loop of its own"
    title = f"the app as it is: {strategy}{' behind SecAgg+' if sealed else ''}"
    if defence == IN_THE_CLEAR:
        title = f"the same app with SecAgg+ taken out: {strategy}"
    message = "Masked" if sealed else "Update"
    column = {
        "name": defence,
        "title": title,
        "stages": {"strategy": strategy, "channel": "SecAgg+" if sealed else "in the clear"},
        "changed": ["channel"] if defence == IN_THE_CLEAR else [],
        "guarantees": [],
        "sees": {
            "server": [f"ServerView[{message}]", "ModelView"],
            "coalition": ["CoalitionView[Update]"],
            "user": ["ModelView"],
        },
        "simulated": [],
    }
    if defence == IN_THE_CLEAR:
        column["proves"] = "what SecAgg+ does to the strategy, and gives the server every update"
    return column


def _says(metric: Metric | None) -> str:
    rises = metric is None or metric.rises
    return (_SABOTAGES if rises else _HARMS).replace("{metric}", metric.key if metric else "metric")


def _versions() -> dict[str, str]:
    found = {}
    for name in ("flwr", "torch", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found

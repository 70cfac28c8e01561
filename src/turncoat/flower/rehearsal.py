"""One run of a Flower app in this process, as it is or with a coalition among its nodes."""

from __future__ import annotations

import contextlib
import random
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Context, Message

from turncoat.flower.forgeries import Forgery
from turncoat.flower.grid import (
    InProcessGrid,
    other_mods,
    whole_rounds,
    without_secure_aggregation,
)
from turncoat.flower.loading import load
from turncoat.flower.parcel import Parcel
from turncoat.flower.recorder import Played, Recorder
from turncoat.flower.secagg import all_passages


@dataclass(frozen=True)
class Rehearsal:
    """What to run, in values that travel as JSON.

    Attributes:
        members: The nodes of the coalition, by number.
        attack: What they do, or None for a clean run.
        secure: Whether the app is known to use SecAgg+: members then forge before they mask.
        in_the_clear: Take SecAgg+ out of the app, to see what it would be without.
        keep: Where to keep the arrays of the first round and the final ones, if anywhere.
        checked: Whether to have ``turncoat.flower.check`` look at the app, and at its ``model``.
    """

    folder: str
    serverapp: str
    clientapp: str
    config: Mapping[str, Any]
    num_nodes: int
    seed: int = 0
    members: tuple[int, ...] = ()
    attack: str | None = None
    strength: float | None = None
    secure: bool = False
    in_the_clear: bool = False
    keep: str | None = None
    checked: bool = False
    model: str | None = None

    @property
    def forgery(self) -> Forgery | None:
        return None if self.attack is None else Forgery(self.attack, self.strength)


def rehearse(job: Rehearsal) -> Played:
    """Run the app once. The current process is spent afterwards: its modules are the app's."""
    _seed(job.seed)
    coalition = Coalition(job)
    recorder = Recorder(coalition, in_the_clear=job.in_the_clear, keep=job.keep)
    with contextlib.ExitStack() as patches:
        patches.enter_context(whole_rounds())
        patches.enter_context(all_passages(recorder.note_passage))
        if job.in_the_clear:
            patches.enter_context(without_secure_aggregation())
        elif job.secure and job.attack is not None:
            patches.enter_context(other_mods(innermost=coalition.before_masking))
        client_app, server_app = load(job.clientapp), load(job.serverapp)
        _seed(job.seed)
        grid = InProcessGrid(client_app, job.num_nodes, job.config, intercept=recorder)
        recorder.start()
        try:
            server_app(grid, grid.server_context())
        except Exception as error:
            traceback.print_exc()
            recorder.played.error = f"{type(error).__name__}: {error}"
    recorder.finish()
    recorder.played.forged = coalition.num_forged
    if job.checked:
        recorder.played.findings = _checked(job, server_app, client_app, recorder)
    return recorder.played


class Coalition:
    """The dishonest nodes of one run."""

    def __init__(self, job: Rehearsal) -> None:
        self.num_forged = 0
        self._members, self._forgery, self._masked = job.members, job.forgery, job.secure

    def __call__(self, parcels: Mapping[int, Parcel]) -> None:
        """Let the members that take part send what they would, knowing all that the others sent."""
        members = [n for n in parcels if n in self._members]
        if self._forgery is None or self._masked or not members:
            return
        size = parcels[members[0]].delta.shape
        others = [p.delta for n, p in parcels.items() if n not in members]
        others = [row for row in others if row.shape == size and np.isfinite(row).all()]
        own = np.stack([parcels[n].delta for n in members])
        forged = self._forgery(own, np.stack(others) if others else own[:0])
        for node, row in zip(members, forged, strict=True):
            parcels[node].send(row)
        self.num_forged += len(members)

    def before_masking(
        self, message: Message, context: Context, call_next: Callable[..., Message]
    ) -> Message:
        """Forge what a member computes, before SecAgg+ masks it. A mod."""
        reply = call_next(message, context)
        node = int(context.node_config["partition-id"])
        if self._forgery is not None and node in self._members and reply.has_content():
            update = Parcel.of(message, reply)
            if update is not None:
                own = update.delta[None]
                update.send(self._forgery(own, own[:0])[0])
                self.num_forged += 1
        return reply


def _checked(
    job: Rehearsal, server_app: Any, client_app: Any, recorder: Recorder
) -> list[dict[str, str]]:
    """Return what ``check`` finds, as JSON keeps it; what it cannot look at is a note."""
    from turncoat.flower.check import check, remote_tables

    pyproject = Path(job.folder) / "pyproject.toml"
    wrapped = [getattr(strategy, "strategy", None) for strategy in recorder.strategies]
    outer = [s for s in recorder.strategies if not any(s is inner for inner in wrapped)]
    try:
        found = check(
            server_app,
            client_app,
            strategy=outer or None,
            num_nodes=job.num_nodes,
            model=load(job.model) if job.model else None,
            connection=pyproject if any(remote_tables(pyproject)) else None,
        )
    except Exception as error:
        traceback.print_exc()
        return [_note_of(f"The check of the app broke down: {type(error).__name__}: {error}")]
    return [
        {"severity": str(f.severity), "what": f.what, "why": f.why, "cure": f.cure} for f in found
    ]


def _note_of(what: str) -> dict[str, str]:
    return {"severity": "note", "what": what, "why": "", "cure": ""}


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def run_rehearsal(job: Mapping[str, Any]) -> dict[str, Any]:
    """Run a `Rehearsal` that came as JSON, and return what is `Played` as JSON."""
    return asdict(rehearse(Rehearsal(**{**job, "members": tuple(job["members"])})))

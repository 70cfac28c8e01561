"""An audit's folder: what is in it, under which names, and how it becomes records.

``plan.json`` lists what is planned, ``cells/`` and ``trainings/`` hold what is finished, and
``cells.jsonl`` and ``trainings.jsonl`` are made of these at any time. See docs/report.md.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from turncoat import __version__
from turncoat.coalition import Coalition
from turncoat.drafts import Drafts
from turncoat.federation import STAGES, Federation
from turncoat.graphs import in_words, neighbours_of
from turncoat.plan import Audit, Plan, Training, rows
from turncoat.privacy import Private, Unit, Unproven, guarantees, loose
from turncoat.randomness import Randomness
from turncoat.runtimes.saved import replacing, write_tensors
from turncoat.stage import Plan as Schedule
from turncoat.stage import within
from turncoat.task import Task
from turncoat.trial import Blocked, Marked, Measurement, Sabotage, Scored, Trial, name_of

SCHEMA_VERSION = 1
SHOWN = 2_000  # test examples behind the accuracy of a round; cells take all
_VERSIONS = ("torch", "numpy", "scipy", "scikit-learn", "scikit-image", "opacus", "dp-accounting")


class FolderUnusable(OSError):
    """An audit cannot be kept in this folder."""


@dataclass(frozen=True)
class AuditFolder:
    """Where an audit is kept, and under which names."""

    path: Path

    def state(self, training: str, before: int | None = None) -> Path:
        """Return where a training's last state is, or that before a round."""
        name = training if before is None else f"{training}.before-{before}"
        return self.path / "trainings" / f"{name}.safetensors"

    def draft(self, training: str) -> Path:
        return self.path / "trainings" / f"{training}.part.safetensors"

    def log(self, training: str) -> Path:
        return self.path / "trainings" / f"{training}.json"

    def cell(self, cell: str) -> Path:
        return self.path / "cells" / f"{cell}.json"

    def drafts(self, cell: str) -> Drafts:
        """Return where an attack keeps what it has done so far."""
        return Drafts(self.path / "cells" / f"{cell}.part")

    def exhibits(self, cell: str) -> Path:
        return self.path / "cells" / f"{cell}.safetensors"

    def is_trained(self, training: Training) -> bool:
        """Say whether a training is finished, with all that is wanted of it."""
        log = self.played(training)
        return log is not None and set(log.get("remade", {})) >= training.remakes

    def played(self, training: Training) -> dict[str, Any] | None:
        """Return the log of a training whose rounds are done, with all states that are wanted."""
        states = [self.state(training.key, t) for t in (None, *training.states) if t != 0]
        return read_log(self.log(training.key)) if all(p.exists() for p in states) else None

    def claim(self, audit: Audit, *, update: bool) -> None:
        """Make the folder this audit's, or refuse.

        Raises:
            FolderUnusable: If it cannot be written, or holds an audit of something else.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".{os.getpid()}.tmp"
            probe.write_bytes(b"\0" * 4096)
            probe.unlink()
        except OSError as error:
            raise FolderUnusable(
                f"cannot write to {self.path}: {error.strerror or error}: choose another --out"
            ) from error
        known = self.path / "plan.json"
        if not known.exists():
            strange = [p.name for p in self.path.iterdir() if p.name not in (".lock",)]
            if strange and not (self.path / "cells").exists():
                raise FolderUnusable(
                    f"{self.path} holds {strange[0]!r} and no audit: choose an empty folder or a "
                    "new one as --out"
                )
            return
        found = read_plan(self.path)
        if found.get("identity") != audit.identity and not update:
            raise FolderUnusable(
                f"{self.path} holds another audit ({found.get('title')!r}), of another task, "
                "federation, number of rounds or version: choose another --out, or add --update "
                "to go on in it (what still applies is kept)"
            )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from writing here at the same time."""
        with (self.path / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise FolderUnusable(
                    f"another audit is running in {self.path}: wait for it, or choose another --out"
                ) from None
            for path in self.path.rglob("*.tmp"):  # what someone left who was killed
                path.unlink(missing_ok=True)
            yield


def write_text(path: Path, text: str) -> None:
    """Write a file atomically."""
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")


def write_plan(folder: Path, audit: Audit, todo: Plan, command: str) -> None:
    """Write ``plan.json`` and ``config.toml``."""
    whole = planned_record(audit) | {
        "identity": audit.identity,
        "command": command,
        "cells": [
            {
                "key": c.key,
                "defence": c.defence,
                "attack": c.attack,
                "family": audit.entries[c.attack].trial.family,
                "seat": c.seat,
                "seed": c.seed,
                "blocked": c.settled.reason if isinstance(c.settled, Blocked) else None,
            }
            for c in todo.cells
        ],
        "trainings": _trainings(audit, todo),
    }
    write_text(folder / "plan.json", json.dumps(whole, indent=1))
    said = "".join(f"# --set {o}\n" for o in audit.overrides)
    said += f"# --variant {audit.variant}\n" if audit.variant else ""
    write_text(folder / "config.toml", said + audit.text)


def planned_record(audit: Audit) -> dict[str, Any]:
    """Return what is known of an audit before it runs, as JSON."""
    task = audit.task
    return {
        "schema_version": SCHEMA_VERSION,
        "turncoat": __version__,
        "title": audit.title,
        "rounds": audit.num_rounds,
        "seeds": list(audit.seeds),
        "delta": audit.delta,
        "search": audit.search and str(audit.search),
        "config_sha256": hashlib.sha256(audit.text.encode()).hexdigest(),
        "overrides": list(audit.overrides),
        "variant": audit.variant,
        "task": {
            "name": task.name,
            "source": task.source,
            "classes": list(task.classes),
            "client_names": list(task.client_names),
            "num_params": task.model.layout.num_params,
            "image_shape": list(task.test[0].shape[1:]) if task.test[0].dim() == 4 else None,
            "sizes": list(task.sizes),
            "label_counts": _label_counts(audit),
            "num_test": len(task.test[1]),
            "num_shown": min(len(task.test[1]), SHOWN),
            "metric": task.metric.__name__,
        },
        "coalition": _coalition(audit),
        "defences": [defence_record(audit, name, f) for name, f in audit.federations.items()],
        "attacks": [
            {
                "name": name,
                "family": e.trial.family,
                "text": repr(e.trial.attack if isinstance(e.trial, Trial) else _worn(e.trial)),
                "game": repr(e.trial.game if isinstance(e.trial, Trial) else e.trial.outcome),
                "says": e.trial.says,
                "seats": [s for s in rows(audit, e) if s],
                "members": _members(audit, e.trial.coalition),
                "server": e.trial.server and repr(e.trial.server),
                "needs": name_of(e.trial.needs) if isinstance(e.trial, Trial) else "to take part",
            }
            for name, e in audit.entries.items()
        ],
        "versions": {"python": platform.python_version()} | _versions(),
        "machine": {"cores": os.cpu_count(), "system": f"{platform.system()} {platform.machine()}"},
    }


def defence_record(audit: Audit, name: str, federation: Federation[Any, Any]) -> dict[str, Any]:
    """Return what one column of the matrix is, sees and guarantees, as JSON."""
    base = next(iter(audit.federations.values()))
    fitted = federation.planned(Schedule(audit.num_rounds, audit.task.sizes, audit.task.model))
    found = guarantees(
        fitted,
        num_records=min(audit.task.sizes),
        num_rounds=audit.num_rounds,
        delta=audit.delta,
        search=audit.search,
    )
    stages = {place: getattr(fitted, place) for place in STAGES}
    texts = {place: repr(stage) for place, stage in stages.items()}
    changed = [p for p in STAGES if getattr(federation, p) != getattr(base, p)]
    if federation.graph != base.graph:
        changed.append("graph")
    linked = None
    if federation.graph is not None:
        texts["graph"] = getattr(federation.graph, "__name__", repr(federation.graph))
        randomness = Randomness(audit.seeds[0])
        linked = in_words(neighbours_of(federation.graph, len(audit.task.clients), randomness))
    simulated = {
        f"{type(s).__name__}: {s.simulates}"
        for stage in stages.values()
        for s in within(stage)
        if hasattr(s, "simulates")
    }
    return {
        "name": name,
        "title": audit.titles.get(name, name),
        "stages": texts,
        "changed": changed,
        "graph": linked,
        "guarantees": [
            {
                "kind": "private" if isinstance(g, Private) else "unproven",
                "unit": g.unit,
                "epsilon": g.epsilon if isinstance(g, Private) else None,
                "delta": g.delta if isinstance(g, Private) else None,
                "against": sorted(g.against) if isinstance(g, Private) else [],
                "search": g.search if isinstance(g, Private) else "",
                "doubt": _doubt(g, audit.task),
                "text": "; ".join(filter(None, (str(g), _doubt(g, audit.task)))),
            }
            for g in found
        ],
        "sees": {seat: [name_of(k) for k in kinds] for seat, kinds in federation.views().items()},
        "simulated": sorted(simulated),
    }


def _doubt(guarantee: Private | Unproven, task: Task) -> str | None:
    """Return why a guarantee says little, if it does: its δ is too large for those it covers."""
    if not isinstance(guarantee, Private):
        return None
    num = len(task.clients) if guarantee.unit is Unit.CLIENT else sum(task.sizes)
    return loose(guarantee.delta, num, guarantee.unit)


def write_records(folder: Path) -> None:
    """Make ``cells.jsonl`` and ``trainings.jsonl`` of ``plan.json`` and what is finished."""
    todo, there = read_plan(folder), AuditFolder(folder)
    cells = [_cell_record(there, c) for c in todo["cells"]]
    trainings = [_training_record(there, t) for t in todo["trainings"]]
    write_text(folder / "cells.jsonl", _lines(c for c in cells if c))
    write_text(folder / "trainings.jsonl", _lines(t for t in trainings if t))


def read_plan(folder: Path) -> dict[str, Any]:
    """Return what ``plan.json`` says."""
    path = folder / "plan.json"
    if not path.exists():
        raise FolderUnusable(f"{folder} holds no plan.json, so no audit: give the --out of one")
    try:
        plan: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if plan.keys() >= {"identity", "title", "cells", "trainings"}:
            return plan
        why = "it is no plan"
    except (OSError, ValueError, AttributeError) as error:
        why = str(error)
    raise FolderUnusable(
        f"{path} cannot be read ({why}): delete it, and the audit's own command makes it again"
    )


def read_log(path: Path) -> dict[str, Any] | None:
    """Return what is known of a finished training, or None. A damaged log counts as none."""
    try:
        log: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return (
            log if log.keys() >= {"metric", "history", "seconds_per_round", "incidents"} else None
        )
    except (OSError, ValueError, AttributeError):
        return None


def ended(log: Mapping[str, Any], defence: str) -> float:
    """Return where a finished training ended: of another model, if the defence releases another."""
    other = log.get("remade", {}).get(defence)
    return float(log["history"][-1] if other is None else other)


def num_left_out(folder: Path) -> int:
    """Return how often a client was left out of a round, after ``write_records``."""
    lines = (folder / "trainings.jsonl").read_text(encoding="utf-8").splitlines()
    return sum(json.loads(line).get("left_out", 0) for line in lines)


def _lines(records: Any) -> str:
    return "".join(json.dumps(r) + "\n" for r in records)


def _cell_record(folder: AuditFolder, planned: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the flat record of a cell; None if it is not finished."""
    empty = dict.fromkeys(
        ("metric", "unit", "value", "baseline", "low", "high", "worst", "success", "beats_baseline")
    )
    about = {k: planned[k] for k in ("key", "defence", "attack", "family", "seat", "seed")}
    record: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        **about,
        "status": "scored",
        **empty,
    }
    ends = {"reason": planned["blocked"], "error": None, "seconds": None, "exhibits": None}
    if planned["blocked"] is not None:
        return record | {"status": "blocked"} | ends
    found = read_cell(folder, planned["key"])
    if found is None:
        error = failure(folder.cell(planned["key"]))
        return None if error is None else record | {"status": "failed"} | ends | {"error": error}
    marked, seconds = found[0].marked, found[1]
    lead = marked.headline
    for name in ("unit", "value", "baseline", "low", "high", "worst", "success", "beats_baseline"):
        record[name] = getattr(lead, name)
    record["metric"] = lead.name
    for other in marked.others:
        record[other.name] = other.value
        record |= {f"{other.name}_{k}": getattr(other, k) for k in ("baseline", "low", "high")}
    shown = folder.exhibits(planned["key"])
    exhibits = str(shown.relative_to(folder.path)) if shown.exists() else None
    record["remarks"] = list(marked.remarks)
    return record | ends | {"seconds": seconds, "exhibits": exhibits}


def _training_record(folder: AuditFolder, planned: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the flat record of a training; None if it is not finished."""
    about = {k: planned[k] for k in ("defence", "attack", "seed")}
    record = {"schema_version": SCHEMA_VERSION, **about}
    path = folder.log(planned["key"])
    log = read_log(path)
    if log is None:
        error = failure(path)
        empty: dict[str, Any] = {
            "metric": None,
            "history": [],
            "seconds_per_round": [],
            "incidents": [],
        }
        return None if error is None else record | empty | {"status": "failed", "error": error}
    incidents = [{"round": r, "client": c, "what": w} for r, c, w in log["incidents"]]
    left_out = sum(c is not None for _, c, _ in log["incidents"])
    log |= {"incidents": incidents, "left_out": left_out}
    log["remade"] = log.get("remade", {}).get(planned["defence"])
    return record | log | {"status": "done", "error": None}


def _worn(trial: Sabotage) -> Any:
    """Return what makes a dishonest seat dishonest."""
    worn = trial.coalition
    if worn is None:
        return trial.server
    all_worn = (worn.supply, worn.code, worn.prepare, worn.train, worn.forge, worn.channel)
    return next(s for s in all_worn if s is not None)


def _trainings(audit: Audit, todo: Plan) -> list[dict[str, Any]]:
    """Return which training stands for which column: some stand for several."""
    found: dict[tuple[str, str | None, int], str] = {}
    for cell in todo.cells:
        if cell.run:
            attack = cell.attack if todo.trainings[cell.run].attack else None
            found[cell.defence, attack, cell.seed] = cell.run
        if cell.clean:
            found[cell.defence, None, cell.seed] = cell.clean
    return [
        {"key": k, "defence": d, "attack": a, "seed": seed} for (d, a, seed), k in found.items()
    ]


def _coalition(audit: Audit) -> dict[str, Any] | None:
    """Return who is dishonest in the first attack that has a coalition."""
    found = [e.trial.coalition for e in audit.entries.values() if e.trial.coalition is not None]
    if not found:
        return None
    num_clients = len(audit.task.clients)
    members = _members(audit, found[0]) or []
    named = ", ".join(audit.task.name_of(m) for m in members)
    said = f"{named}: {len(members)} of {num_clients} clients"
    known = (
        "their own updates and everyone else's" if found[0].knows_honest else "their own updates"
    )
    whose = "their neighbours'" if next(iter(audit.federations.values())).graph else "the server's"
    rule = f" and {whose} rule" if found[0].knows_rule else ""
    return {"text": f"{said}, who know {known}{rule}", "members": members}


def _members(audit: Audit, coalition: Coalition[Any] | None) -> list[int] | None:
    """Return who is dishonest in the first round under the first seed."""
    if coalition is None:
        return None
    return sorted(coalition.members(len(audit.task.clients), 0, Randomness(audit.seeds[0])))


def _label_counts(audit: Audit) -> list[list[int]]:
    labels = [y for _, y in audit.task.clients]
    if any(y.dim() != 1 or y.is_floating_point() for y in labels):
        return []
    most = int(max(int(y.max()) for y in labels if len(y))) + 1
    size = max(len(audit.task.classes), most)
    return [torch.bincount(y, minlength=size).tolist() for y in labels]


def _versions() -> dict[str, str]:
    found = {}
    for name in _VERSIONS:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def write_cell(folder: AuditFolder, name: str, marked: Marked, seconds: float) -> None:
    """Write a finished cell: what it shows first, then the figures, which say that it is whole."""
    if marked.exhibits:
        write_tensors(folder.exhibits(name), marked.exhibits)
    figures = {
        "schema_version": SCHEMA_VERSION,
        "headline": asdict(marked.headline),
        "others": [asdict(m) for m in marked.others],
        "remarks": list(marked.remarks),
        "exhibits": bool(marked.exhibits),
        "seconds": seconds,
    }
    write_json(folder.cell(name), figures)


def read_cell(folder: AuditFolder, name: str) -> tuple[Scored, float] | None:
    """Return a finished cell and its seconds, or None. A damaged one counts as unfinished."""
    try:
        saved = json.loads(folder.cell(name).read_text(encoding="utf-8"))
        headline, *others = (Measurement(**m) for m in [saved["headline"], *saved["others"]])
        if saved["exhibits"] and not folder.exhibits(name).exists():
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    marked = Marked(headline, tuple(others), remarks=tuple(saved.get("remarks", ())))
    return Scored(marked), float(saved["seconds"])


def note_failure(path: Path, error: str | None) -> None:
    """Leave word of a failure beside where the result would be; take it away after a success."""
    note = path.with_suffix(".failed.json")
    if error is None:
        note.unlink(missing_ok=True)
    else:
        write_json(note, {"error": error})


def write_json(path: Path, thing: Mapping[str, Any]) -> None:
    """Write JSON atomically."""
    write_text(path, json.dumps(thing))


def failure(path: Path) -> str | None:
    """Return the word that ``note_failure`` left, if any."""
    note = path.with_suffix(".failed.json")
    try:
        return str(json.loads(note.read_text(encoding="utf-8"))["error"])
    except (OSError, ValueError, KeyError, TypeError):
        return None

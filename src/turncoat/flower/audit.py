"""The audit of an unmodified Flower app: runs, findings and the report of both.

The folder that it fills is that of any audit (docs/report.md), with findings in the plan, and
``seen.jsonl``, ``runs/`` and ``logs/`` beside it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from turncoat import __version__
from turncoat.audit import Event
from turncoat.flower.company import company
from turncoat.flower.forgeries import Forgery
from turncoat.flower.loading import FlowerApp
from turncoat.flower.witness import Metric, num_examples_behind
from turncoat.record import (
    AuditFolder,
    FolderUnusable,
    write_records,
    write_text,
)
from turncoat.validate import at_least

AS_IS, IN_THE_CLEAR = "as-is", "without-secagg"
INVERSION, MEMBERSHIP = "inverting-gradients", "loss-threshold"
_RUN, _DISCLOSE = (
    "turncoat.flower.rehearsal:run_rehearsal",
    "turncoat.flower.disclosure:disclose",
)


class AppBroken(ValueError):
    """The app does not run by itself: there is nothing to compare an attack with."""


@dataclass(frozen=True)
class FlowerAudit:
    """What to do to an app.

    Attributes:
        members: The coalition, by number of node.
        model, data: ``module:factory`` and ``module:loader`` of the app, for inversion and
            membership; without them these are not tried, and the report says so.
        num_steps: Of the inversion.
    """

    app: FlowerApp
    num_nodes: int
    members: tuple[int, ...]
    forgeries: tuple[Forgery, ...]
    seeds: tuple[int, ...] = (0,)
    model: str | None = None
    data: str | None = None
    num_steps: int = 300

    def __post_init__(self) -> None:
        at_least(2, self.app.name, nodes=self.num_nodes)
        strange = [m for m in self.members if not 0 <= m < self.num_nodes]
        if strange or not self.members:
            raise ValueError(
                f"--clients: there is no node {strange[0] if strange else ''}; there are "
                f"{self.num_nodes}, 0 to {self.num_nodes - 1}: name some of them"
            )
        if len(self.members) == self.num_nodes:
            raise ValueError("--clients names every node: leave somebody honest")

    @property
    def text(self) -> str:
        """The audit as TOML: what ``config.toml`` holds."""
        attacks = [f.name + (f"={f.strength:g}" if f.strength else "") for f in self.forgeries]
        lines = [
            f"app = {json.dumps(self.app.name)}",
            f"serverapp = {json.dumps(self.app.serverapp)}",
            f"clientapp = {json.dumps(self.app.clientapp)}",
            f"nodes = {self.num_nodes}",
            f"clients = {json.dumps(list(self.members))}",
            f"attacks = {json.dumps(attacks)}",
            f"seeds = {json.dumps(list(self.seeds))}",
            *(f"{k} = {json.dumps(v)}" for k in ("model", "data") if (v := getattr(self, k))),
            "",
            "[run-config]",
            *(f"{json.dumps(k)} = {json.dumps(v)}" for k, v in self.app.config.items()),
        ]
        return "\n".join(lines) + "\n"

    @property
    def missing_options(self) -> str:
        """What the user would have to give for inversion and membership."""
        wanted = {"model": "--model module:factory", "data": "--data module:loader"}
        return " and ".join(v for k, v in wanted.items() if not getattr(self, k))

    @property
    def identity(self) -> str:
        """What makes two audits two: the app's text and everything that ``text`` says."""
        return _hash(self.app.digest, self.text)


def run_flower_audit(
    audit: FlowerAudit,
    folder: Path,
    *,
    num_jobs: int = 1,
    timeout_seconds: float | None = None,
    command: str = "",
    on_event: Callable[[Event], None] = lambda event: None,
) -> bool:
    """Do the audit and fill ``folder``; say whether everything that was tried came to an end.

    Runs that ``folder`` holds already are not run again.

    Raises:
        AppBroken: If the app does not run by itself, or tells nothing.
    """
    from turncoat.flower.account import Account

    there = AuditFolder(folder)
    _claim(there, audit)
    with there.locked(), company() as fork:
        work = Work(audit, there, fork, num_jobs, timeout_seconds, on_event)
        work.run()
        Account(work).write(command)
        write_records(folder)
        return not work.failed


@dataclass(frozen=True)
class Run:
    """One run of the app: a column, an attack or none, a seed."""

    defence: str
    attack: Forgery | None
    seed: int

    @property
    def said(self) -> str:
        return f"{self.defence}, {self.attack.name if self.attack else 'clean'}, seed {self.seed}"


@dataclass
class Work:
    audit: FlowerAudit
    folder: AuditFolder
    fork: Any
    num_jobs: int
    timeout_seconds: float | None
    on_event: Callable[[Event], None]
    played: dict[Run, dict[str, Any]] = field(default_factory=dict)
    broken: dict[Run, str] = field(default_factory=dict)
    disclosed: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)
    secure: bool = False
    failed: bool = False
    done: int = 0
    total: int = 0

    @property
    def defences(self) -> list[str]:
        return [AS_IS, IN_THE_CLEAR] if self.secure else [AS_IS]

    def run(self) -> None:
        audit = self.audit
        first = [Run(AS_IS, None, seed) for seed in audit.seeds]
        self.total = len(first) * (1 + len(audit.forgeries))
        self.on_event(Event("plan", 0, self.total, f"{self.total} runs of {audit.app.name}"))
        self._rehearse(first)
        clean = first[0]
        log = self.folder.path / "logs" / f"{self.key(clean)}.log"
        if clean in self.broken:
            raise AppBroken(f"the app does not run by itself: {self.broken[clean]}; see {log}")
        halts, num_rounds = self.played[clean]["halts"], len(self.played[clean]["cohort"])
        if halts and len(halts) >= num_rounds:
            raise AppBroken(
                f"the app learns nothing by itself: in every round {halts[0][1]}, which Flower "
                f"only logs; see {log}"
            )
        if not num_rounds:
            raise AppBroken(
                "the app's server sent no training message through its grid: there is nothing to "
                "attack; does its ServerApp use the Grid that it is given?"
            )
        self.secure = bool(self.played[clean]["secure"])
        rest = [Run(IN_THE_CLEAR, None, s) for s in audit.seeds if self.secure]
        rest += [
            Run(defence, forgery, seed)
            for forgery in audit.forgeries
            for defence in self.defences
            if not self.blocks(defence, forgery)
            for seed in audit.seeds
        ]
        self.total = len(first) + len(rest)
        self._rehearse(rest)
        self._disclose()

    def blocks(self, defence: str, forgery: Forgery) -> bool:
        return self.secure and defence == AS_IS and forgery.needs_others

    def _job(self, run: Run) -> dict[str, Any]:
        app, clean = self.audit.app, run.attack is None
        return {
            "folder": str(app.folder),
            "serverapp": app.serverapp,
            "clientapp": app.clientapp,
            "config": dict(app.config),
            "num_nodes": self.audit.num_nodes,
            "seed": run.seed,
            "members": [] if clean else list(self.audit.members),
            "attack": run.attack.name if run.attack else None,
            "strength": run.attack.strength if run.attack else None,
            "secure": self.secure and run.defence == AS_IS and not clean,
            "in_the_clear": run.defence == IN_THE_CLEAR,
            "checked": clean and run.defence == AS_IS and run.seed == self.audit.seeds[0],
            "model": self.audit.model if clean and run.defence == AS_IS else None,
        }

    def key(self, run: Run) -> str:
        return _hash(self.audit.app.digest, {**self._job(run), "folder": ""})

    def _rehearse(self, runs: Sequence[Run]) -> None:
        tasks = {}
        for run in runs:
            key = self.key(run)
            kept = str(self.folder.path / "runs" / f"{key}.npz") if run.attack is None else None
            tasks[run] = self._task(key, _RUN, {**self._job(run), "keep": kept})
        for run, (result, error) in self._do(tasks):
            if result is not None and result["error"]:
                error = result["error"]
            if result is not None:
                self.played[run] = result
            if error:
                self.broken[run] = error
            self.done += 1
            what = "failed" if error else "training"
            said = f"{run.said} failed: {error}" if error else run.said
            self.on_event(Event(what, self.done, self.total, said))

    def _disclose(self) -> None:
        audit, tasks = self.audit, {}
        if not audit.model or not audit.data:
            return
        for defence in self.defences:
            for seed in audit.seeds:
                clean = Run(defence, None, seed)
                wanted = [INVERSION, MEMBERSHIP] if self.sees_updates(defence) else [MEMBERSHIP]
                if clean in self.broken:
                    continue
                job = {
                    "model": audit.model,
                    "data": audit.data,
                    "arrays": str(self.folder.path / "runs" / f"{self.key(clean)}.npz"),
                    "num_nodes": audit.num_nodes,
                    "seed": seed,
                    "num_steps": audit.num_steps,
                    "wanted": {a: self.cell(a, defence, seed) for a in wanted},
                    "exhibits": str(self.folder.path / "cells"),
                }
                key = _hash(self.key(clean), {**job, "arrays": "", "exhibits": ""})
                tasks[defence, seed] = self._task(key, _DISCLOSE, job)
        for where, (result, error) in self._do(tasks):
            self.disclosed[where] = result or {"cells": {}, "task": {}, "error": error}

    def sees_updates(self, defence: str) -> bool:
        return not self.secure or defence == IN_THE_CLEAR

    def cell(self, attack: str, defence: str, seed: int) -> str:
        return _hash(self.audit.identity, attack, defence, seed)

    def history(self, run: Run, metric: Metric | None) -> list[float]:
        """Return a metric after each round of a run; nothing if there is none."""
        return metric.history(self.played[run]) if metric and run in self.played else []

    @property
    def task(self) -> dict[str, Any]:
        """What is known of the app's data, if it was given."""
        return next((d["task"] for d in self.disclosed.values() if d.get("task")), {})

    def chance(self, metric: Metric) -> float:
        """Return what guessing would give."""
        classes = len(self.task.get("classes") or ())
        return 1 / classes if metric.name == "accuracy" and classes else 0.0

    def num_test(self, metric: Metric | None) -> int | None:
        """Return how many examples are behind the metric, as nodes claim or shares give away."""
        clean = self.played[Run(AS_IS, None, self.audit.seeds[0])]
        if metric is None or not metric.rises:
            return None
        if metric.source != "server":
            return int(clean["num_evaluated"]) or None
        return num_examples_behind([v for p in self.played.values() for v in metric.history(p)])

    def _task(self, key: str, call: str, job: dict[str, Any]) -> dict[str, Any]:
        path = self.folder.path
        return {
            "call": call,
            "job": job,
            "folder": str(self.audit.app.folder),
            "out": str(path / "runs" / f"{key}.json"),
            "log": str(path / "logs" / f"{key}.log"),
        }

    def _do(self, tasks: Mapping[Any, dict[str, Any]]) -> Iterator[tuple[Any, Any]]:
        """Yield (result, error) of each task as it ends; one that is on disk is not done again."""
        for part in ("runs", "logs", "cells"):
            (self.folder.path / part).mkdir(exist_ok=True)
        todo = []
        for name, task in tasks.items():
            if (found := _read(Path(task["out"]))) is not None:
                yield name, (found, None)
            else:
                todo.append((name, task))
        if not todo:
            return
        codes = self.fork([task for _, task in todo], self.num_jobs, self.timeout_seconds)
        for number, code in codes:
            name, task = todo[number]
            found = _read(Path(task["out"]))
            yield name, (found, None if found is not None else _died(code, Path(task["log"])))


def _claim(there: AuditFolder, audit: FlowerAudit) -> None:
    """Make the folder this audit's, or refuse."""
    known = there.path / "identity"
    try:
        there.path.mkdir(parents=True, exist_ok=True)
        strange = [p.name for p in there.path.iterdir() if p.name != ".lock"]
        if known.exists() or not strange:
            if known.exists() and known.read_text() != audit.identity:
                raise FolderUnusable(
                    f"{there.path} holds another audit, of another app, config or coalition: "
                    "choose another --out"
                )
            write_text(known, audit.identity)
            return
    except OSError as error:
        raise FolderUnusable(
            f"cannot write to {there.path}: {error.strerror or error}: choose another --out"
        ) from error
    raise FolderUnusable(
        f"{there.path} holds {strange[0]!r} and no audit: choose an empty folder or a new one"
    )


def _died(code: int, log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.exists() else []
    last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
    how = "it ran out of time or memory" if code == -9 else f"exit code {code}"
    return f"{last[:300]} ({how}; {log})"


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found


def _hash(*things: Any) -> str:
    text = json.dumps([__version__, *things], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]

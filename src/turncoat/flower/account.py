"""What came of an audit's runs, as the files that the report is made from."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from turncoat import __version__
from turncoat.audit import Log
from turncoat.flower.audit import AS_IS, IN_THE_CLEAR, INVERSION, MEMBERSHIP, Run, Work
from turncoat.flower.forgeries import Forgery
from turncoat.flower.witness import Metric, chosen_metric, num_examples_behind
from turncoat.metrics.intervals import wilson
from turncoat.record import SCHEMA_VERSION, note_failure, write_cell, write_json, write_text
from turncoat.trial import Marked, Measurement

ALLOWANCE = 0.02  # of a metric in [0, 1], where nobody says how many examples are behind it
_LOSS_ALLOWANCE = 0.1  # of a clean loss
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


class Account:
    """Writes ``plan.json``, ``config.toml``, ``seen.jsonl`` and every cell and training."""

    def __init__(self, work: Work) -> None:
        self.work = work

    def write(self, command: str) -> None:
        """Write everything that the report is made from."""
        audit, path = self.work.audit, self.work.folder.path
        clean = self.work.played[Run(AS_IS, None, audit.seeds[0])]
        metric = chosen_metric(clean)
        rows, trainings = [], []
        for run in self._all_runs():
            key = self.work.key(run)
            log = self.work.folder.log(key)
            whole = run in self.work.played and run not in self.work.broken
            if whole or self._history(run, metric):
                write_json(log, asdict(self._log(run, metric)))
                note_failure(log, None)
            else:
                note_failure(log, self.work.broken.get(run, "it was not run"))
            attack = run.attack.name if run.attack else None
            trainings.append(
                {"key": key, "defence": run.defence, "attack": attack, "seed": run.seed}
            )
        for forgery in audit.forgeries:
            for defence in self.work.defences:
                for seed in audit.seeds:
                    rows.append(self._poisoning(forgery, defence, seed, metric))
        for attack in (INVERSION, MEMBERSHIP):
            for defence in self.work.defences:
                for seed in audit.seeds:
                    rows.append(self._disclosure(attack, defence, seed))
        plan = self._plan(metric, clean, command)
        plan |= {"cells": rows, "trainings": trainings}
        plan["findings"] = self._findings(clean, metric)
        write_text(path / "plan.json", json.dumps(plan, indent=1))
        write_text(path / "config.toml", audit.text)
        write_text(path / "seen.jsonl", "".join(json.dumps(r) + "\n" for r in clean["seen"]))

    def _all_runs(self) -> list[Run]:
        clean = [Run(d, None, s) for d in self.work.defences for s in self.work.audit.seeds]
        return clean + [
            Run(d, f, s)
            for f in self.work.audit.forgeries
            for d in self.work.defences
            if not self.work.blocks(d, f)
            for s in self.work.audit.seeds
        ]

    def _history(self, run: Run, metric: Metric | None) -> list[float]:
        return metric.history(self.work.played[run]) if metric and run in self.work.played else []

    def _log(self, run: Run, metric: Metric | None) -> Log:
        played = self.work.played[run]
        incidents = [
            (int(r), None if n is None else int(n), str(w)) for r, n, w in played["incidents"]
        ]
        last = len(played["cohort"])
        if metric is not None and metric.is_broken(played):
            incidents.append((last, None, f"the app's {metric.key} is no number any more"))
        if run in self.work.broken:
            incidents.append((last, None, f"the app's server stopped: {self.work.broken[run]}"))
        return Log(
            metric.name if metric else "unknown",
            tuple(self._history(run, metric)),
            tuple(played["seconds"]),
            int(played["bytes_up"]),
            int(played["bytes_down"]),
            tuple(played["cohort"]),
            tuple(incidents),
            0,
        )

    def _row(self, attack: str, family: str, seat: str, defence: str, seed: int) -> dict[str, Any]:
        return {
            "key": self.work.cell(attack, defence, seed),
            "defence": defence,
            "attack": attack,
            "family": family,
            "seat": seat,
            "seed": seed,
            "blocked": None,
        }

    def _poisoning(
        self, forgery: Forgery, defence: str, seed: int, metric: Metric | None
    ) -> dict[str, Any]:
        row = self._row(forgery.name, "poisoning", "coalition", defence, seed)
        if self.work.blocks(defence, forgery):
            return row | {
                "blocked": (
                    f"{forgery.name} needs everybody else's updates, and SecAgg+ hides them from "
                    "other nodes too; sign-flip and scaling need only the members' own"
                )
            }
        if metric is None:
            return row | {
                "blocked": (
                    "not tried, for the app reports no accuracy and no loss, neither from its "
                    "server nor from its nodes: nobody can say what is lost until it evaluates"
                )
            }
        run, clean = Run(defence, forgery, seed), Run(defence, None, seed)
        error = self.work.broken.get(run) or self.work.broken.get(clean)
        marked = None
        if run in self.work.played and clean in self.work.played:
            marked = self._marked(metric, self.work.played[run], self.work.played[clean])
        path = self.work.folder.cell(row["key"])
        if marked is None or (error and not self._history(run, metric)):
            said = error or f"the app told no {metric.key} in that run"
            self.work.failed = True
            note_failure(path, said)
        elif not self.work.played[run]["forged"]:
            self.work.failed = True
            note_failure(
                path, "no member of the coalition was asked to train: name other --clients"
            )
        else:
            write_cell(self.work.folder, row["key"], marked, sum(self.work.played[run]["seconds"]))
            note_failure(path, None)
        return row

    def _marked(
        self, metric: Metric, hurt: Mapping[str, Any], clean: Mapping[str, Any]
    ) -> Marked | None:
        """Return the metric after an attack beside that without it."""
        before = metric.history(clean)
        if not before:
            return None
        baseline, chance = before[-1], self._chance(metric)
        everything = [v for p in self.work.played.values() for v in metric.history(p)]
        worst = min(chance, baseline) if metric.rises else max(everything) + 1e-9
        after = metric.history(hurt)
        value = worst if metric.is_broken(hurt) or not after else after[-1]
        low, high = self._interval(metric, value, baseline)
        lost = (baseline - value) if metric.rises else (value - baseline)
        name, unit = (
            (f"{metric.name}_lost", "points") if metric.rises else (f"{metric.name}_gained", "")
        )
        scale = 100 if metric.rises else 1
        ends = sorted(
            (scale * (baseline - e if metric.rises else e - baseline)) for e in (low, high)
        )
        room = scale * abs(baseline - worst)
        return Marked(
            Measurement(metric.name, value, baseline, low, high, worst),
            (Measurement(name, scale * lost, 0.0, ends[0], ends[1], room, unit),),
        )

    def _interval(self, metric: Metric, value: float, baseline: float) -> tuple[float, float]:
        number = self._num_test(metric)
        if number is not None and metric.name == "accuracy":
            low, high = wilson(min(1.0, max(0.0, value)) * number, number)
            return min(low, value), max(high, value)
        margin = ALLOWANCE if metric.rises else _LOSS_ALLOWANCE * abs(baseline)
        return value - margin, value + margin

    def _num_test(self, metric: Metric | None) -> int | None:
        """Return how many examples are behind the metric, as nodes claim or shares give away."""
        clean = self.work.played[Run(AS_IS, None, self.work.audit.seeds[0])]
        if metric is None or not metric.rises:
            return None
        if metric.source != "server":
            return int(clean["num_evaluated"]) or None
        played = self.work.played.values()
        return num_examples_behind([v for p in played for v in metric.history(p)])

    def _chance(self, metric: Metric) -> float:
        classes = len(self._task_of().get("classes") or ())
        return 1 / classes if metric.name == "accuracy" and classes else 0.0

    def _task_of(self) -> dict[str, Any]:
        found = (d["task"] for d in self.work.disclosed.values() if d.get("task"))
        return next(found, {})

    def _disclosure(self, attack: str, defence: str, seed: int) -> dict[str, Any]:
        family, seat = ("inversion", "server") if attack == INVERSION else ("membership", "user")
        row = self._row(attack, family, seat, defence, seed)
        if attack == INVERSION and not self.work.sees_updates(defence):
            return row | {
                "blocked": (
                    "InvertingGradients needs ServerView[Update]; behind SecAgg+ the server sees "
                    "ServerView[Masked], and the sum of all"
                )
            }
        if missing := self.work.audit.missing_options:
            return row | {"blocked": f"not tried, for it needs {missing}"}
        none = {"cells": {}, "error": "its clean run failed"}
        found = self.work.disclosed.get((defence, seed), none)
        cell = found["cells"].get(attack, {"error": found.get("error") or "it was not reached"})
        path = self.work.folder.cell(row["key"])
        if cell.get("error"):
            self.work.failed = True
            note_failure(path, cell["error"])
        else:
            write_json(path, {"schema_version": SCHEMA_VERSION, **cell, "seconds": 0.0})
            note_failure(path, None)
        return row

    def _plan(
        self, metric: Metric | None, clean: Mapping[str, Any], command: str
    ) -> dict[str, Any]:
        audit, task = self.work.audit, self._task_of()
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
                "num_test": self._num_test(metric),
                "metric": metric.name if metric else "accuracy",
            },
            "coalition": {"text": self._who(), "members": list(audit.members)},
            "defences": [self._column(d, clean) for d in self.work.defences],
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

    def _who(self) -> str:
        members, audit = self.work.audit.members, self.work.audit
        named = ", ".join(str(m) for m in members)
        known = "their own updates and, where an attack asks, everyone else's (full knowledge)"
        if self.work.secure:
            known += "; behind SecAgg+ their own only"
        word = "node" if len(members) == 1 else "nodes"
        return f"{word} {named}: {len(members)} of {audit.num_nodes} nodes, who know {known}"

    def _column(self, defence: str, clean: Mapping[str, Any]) -> dict[str, Any]:
        sealed = self.work.secure and defence == AS_IS
        strategy = ", ".join(clean["strategies"]) or "a loop of its own"
        title = f"the app as it is: {strategy}{' behind SecAgg+' if sealed else ''}"
        if defence == IN_THE_CLEAR:
            title = f"the same app with SecAgg+ taken out: {strategy}"
        message = "Masked" if sealed else "Update"
        return {
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

    # ---- findings

    def _findings(self, clean: Mapping[str, Any], metric: Metric | None) -> list[dict[str, str]]:
        found = [dict(f) for f in clean["findings"]]
        shown = self._shown(metric)
        if shown:
            about = next((f for f in found if "SecAgg" in f["what"] + f["why"]), None)
            if about is not None:
                about["shown"] = shown
        told = sorted({k for row in clean["seen"] for k in row["metrics"]})
        if told and self.work.sees_updates(AS_IS):
            found.append(
                {
                    "severity": "note",
                    "what": "The server reads every node's update by itself, with the node's id.",
                    "why": (
                        f"Beside the arrays it is told {', '.join(told)}. seen.jsonl lists all "
                        "that it saw in the clean run."
                    ),
                    "cure": "SecAgg+ hides them; a rule that must read them then cannot either.",
                }
            )
        if self.work.audit.missing_options:
            found.append(
                {
                    "severity": "note",
                    "what": "Inversion and membership inference were not tried.",
                    "why": "Nothing but the arrays is known of the app's model and data.",
                    "cure": f"Give {self.work.audit.missing_options}.",
                }
            )
        return found

    def _shown(self, metric: Metric | None) -> str:
        """Say in figures what SecAgg+ in front of a rule does to it, if the runs show it."""
        if metric is None or not self.work.secure:
            return ""
        seed, said = self.work.audit.seeds[0], []
        for forgery in self.work.audit.forgeries:
            if forgery.needs_others:
                continue
            ends = {}
            for defence in self.work.defences:
                for attack in (None, forgery):
                    history = self._history(Run(defence, attack, seed), metric)
                    if history:
                        ends[defence, attack is not None] = history[-1]
            if len(ends) == 4:
                said.append(
                    f"Under {forgery.name} by {_count(len(self.work.audit.members), 'node')} of "
                    f"{self.work.audit.num_nodes} the {metric.name} falls from "
                    f"{_figure(ends[AS_IS, False])} to {_figure(ends[AS_IS, True])}; with SecAgg+ "
                    "taken out, so that the rule reads single updates, from "
                    f"{_figure(ends[IN_THE_CLEAR, False])} to {_figure(ends[IN_THE_CLEAR, True])}."
                )
        return " ".join(said)


def _says(metric: Metric | None) -> str:
    rises = metric is None or metric.rises
    return (_SABOTAGES if rises else _HARMS).replace("{metric}", metric.key if metric else "metric")


def _figure(value: float) -> str:
    return f"{100 * value:.1f} %" if 0 <= value <= 1 else f"{value:.3g}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _versions() -> dict[str, str]:
    found = {}
    for name in ("flwr", "torch", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found

"""What came of an audit's runs, as the files that the report is made from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from turncoat.audit import Log
from turncoat.flower.agenda import agenda
from turncoat.flower.audit import AS_IS, INVERSION, MEMBERSHIP, Run, Work
from turncoat.flower.findings import findings_of
from turncoat.flower.forgeries import Forgery
from turncoat.flower.witness import Metric, chosen_metric
from turncoat.metrics.intervals import wilson
from turncoat.record import SCHEMA_VERSION, note_failure, write_cell, write_json, write_text
from turncoat.trial import Marked, Measurement

ALLOWANCE = 0.02  # of a metric in [0, 1], where nobody says how many examples are behind it
_LOSS_ALLOWANCE = 0.1  # of a clean loss


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
            if whole or self.work.history(run, metric):
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
        plan = agenda(self.work, metric, clean, command)
        plan |= {"cells": rows, "trainings": trainings}
        plan["findings"] = findings_of(self.work, clean, metric)
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
            tuple(self.work.history(run, metric)),
            tuple(played["seconds"]),
            int(played["bytes_up"]),
            int(played["bytes_down"]),
            tuple(played["cohort"]),
            tuple(incidents),
            len(played["halts"]),
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
                    "it needs everybody else's updates, and SecAgg+ hides them from other nodes "
                    "too; sign-flip and scaling need only the members' own"
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
        if marked is None or (error and not self.work.history(run, metric)):
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
        baseline, chance = before[-1], self.work.chance(metric)
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
        number = self.work.num_test(metric)
        if number is not None and metric.name == "accuracy":
            low, high = wilson(min(1.0, max(0.0, value)) * number, number)
            return min(low, value), max(high, value)
        margin = ALLOWANCE if metric.rises else _LOSS_ALLOWANCE * abs(baseline)
        return value - margin, value + margin

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

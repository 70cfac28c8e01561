"""How weak may a defence be? The least noise, the widest clip, ... that keeps a risk below a limit.

The answer is given twice: by theorem, where one bounds the risk, against whoever knows everything
but one record; and by measurement, against one attack, as an audit plays it. Each value that is
tried is a column of an audit in one folder, so that nothing is trained twice.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from math import ceil, inf, isfinite, log, sqrt
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from turncoat.audit import Audit, Entry, Event, run_audit
from turncoat.describe import key
from turncoat.federation import STAGES, Federation
from turncoat.metrics.intervals import Interval, clopper_pearson, of_mean, wilson
from turncoat.metrics.ranking import ROC
from turncoat.metrics.tradeoff import advantage_limit, tpr_limit
from turncoat.plan import Planned, pose, rows
from turncoat.privacy import Private, Unit, guarantees
from turncoat.record import SHOWN, AuditFolder, ended, read_cell, read_log, write_json
from turncoat.runtimes.saved import read_tensors
from turncoat.stage import Plan
from turncoat.trial import Blocked, Cell, Failed, Sabotage, Trial
from turncoat.validate import at_least, nearest

SCHEMA_VERSION = 1
NOISE = "noise_multiplier"
_DIGITS = 4  # of every value that is tried: what people read is what was computed
_MOST_NOISE = 1e5
_CLOSE = 1.002  # two values of which the theorem need not tell the weaker

_FAMILY = {"tpr": "membership", "advantage": "membership", "psnr": "inversion"} | {
    "success": "backdoor"
}
_PROVEN = ("tpr", "advantage")
_NO_THEOREM = "no theorem here bounds the {}"
_METRIC = {"psnr": "psnr", "success": "attack_success_rate"}


class Uncalibratable(ValueError):
    """A wish that no value can be searched for. Says why, and what could be asked instead."""


class AttackFailed(RuntimeError):
    """The attack broke down at a value: nothing was measured there."""


@dataclass(frozen=True)
class Risk:
    """What an attack may reach at most: the upper end of its 95 % interval must not pass ``limit``.

    Args:
        kind: ``"tpr"`` at ``fpr``, ``"advantage"`` (the largest TPR - FPR of any threshold),
            ``"psnr"`` in dB, or ``"success"`` of a backdoor.
    """

    kind: Literal["tpr", "advantage", "psnr", "success"]
    limit: float
    fpr: float | None = None

    def __post_init__(self) -> None:
        if not isfinite(self.limit):
            raise Uncalibratable(f"a limit of {self.limit} is none: give a finite one")
        if (self.kind == "tpr") != (self.fpr is not None):
            raise Uncalibratable("a TPR is one at some FPR: give --tpr and --fpr together")
        if self.kind != "psnr" and not 0 < self.limit < 1:
            raise Uncalibratable(
                f"a limit of {self.limit:g} for the {self.kind} cannot be asked for: it must lie "
                "between 0 and 1, both excluded"
            )
        if self.fpr is None:
            return
        if not 0 < self.fpr < 1:
            raise Uncalibratable(
                f"an FPR of {self.fpr:g} cannot be measured: it must lie between 0 and 1, both "
                "excluded"
            )
        if self.limit <= self.fpr:
            raise Uncalibratable(
                f"no noise keeps the TPR at {self.limit:g} where the FPR is {self.fpr:g}: guessing "
                "reaches a TPR as large as the FPR; give a --tpr above --fpr"
            )

    def check(self, num_members: int, num_others: int) -> None:
        """Refuse too few records to measure it on, with the number needed."""
        if self.fpr is not None:
            needed = ceil((1 if self.fpr >= 0.01 else 10) / self.fpr - 1e-9)
            if num_others < needed:
                raise Uncalibratable(
                    f"an FPR of {self.fpr:g} needs at least {needed} non-members to be told; the "
                    f"game has {num_others}: hold more test records out, let the game have more "
                    "candidates, or ask for a larger --fpr"
                )
        if clopper_pearson(0, num_members)[1] > self.limit:
            needed = ceil(log(0.025) / log(1 - self.limit))
            raise Uncalibratable(
                f"with {num_members} members the upper limit lies above {self.limit:g} even if the "
                f"attack finds none: it needs {needed} of them; let the game have more candidates"
            )

    def bound(self, event: Any) -> float:
        """Return what the theorem says of a whole training's event, at most."""
        return advantage_limit(event) if self.fpr is None else tpr_limit(event, self.fpr)

    def reached(
        self, folder: AuditFolder, cell: Planned, result: Cell, num_members: int, num_others: int
    ) -> tuple[float, float, float]:
        """Return what an attack reached in one cell, with its 95 % interval."""
        if isinstance(result, Blocked):
            raise Uncalibratable(
                f"{cell.attack!r} is blocked behind {cell.defence!r}, whatever the value: "
                f"{result.reason}"
            )
        if isinstance(result, Failed):
            raise AttackFailed(f"{cell.attack!r} failed behind {cell.defence!r}: {result.error}")
        if self.kind in _METRIC:
            figures = (result.marked.headline, *result.marked.others)
            found = [m for m in figures if m.name == _METRIC[self.kind]]
            if not found:
                raise Uncalibratable(
                    f"the game of {cell.attack!r} gives no {_METRIC[self.kind]}; it gives "
                    + ", ".join(m.name for m in figures)
                )
            return found[0].value, found[0].low, found[0].high
        shown = read_tensors(folder.exhibits(cell.key))[0]
        roc = ROC(shown["roc_fpr"].double(), shown["roc_tpr"].double())
        if self.fpr is not None:
            tpr = roc.tpr_at(self.fpr)
            return tpr, *clopper_pearson(round(tpr * num_members), num_members)
        best = int((roc.tpr - roc.fpr).argmax())
        tpr, fpr = float(roc.tpr[best]), float(roc.fpr[best])
        level = 0.975  # of each rate, so that both together have 0.95
        low, high = clopper_pearson(round(tpr * num_members), num_members, level)
        least, most = clopper_pearson(round(fpr * num_others), num_others, level)
        return tpr - fpr, low - most, high - least


@dataclass(frozen=True)
class Knob:
    """A numeric field of a stage of one column, and the ends between which to look.

    Args:
        defence: Whose stage it is: a column of the audit.
        path: Place and fields: ``("train", "noise_multiplier")``, ``("aggregate", "inner", ...)``.
        weakest, strongest: The values that protect least and most. Which way is stronger follows
            from them. Noise may leave them out: from none to what the theorem asks for.
    """

    defence: str
    path: tuple[str, ...]
    weakest: float | None = None
    strongest: float | None = None

    @property
    def name(self) -> str:
        return ".".join(self.path)

    def check(self, federation: Federation[Any, Any]) -> None:
        """Refuse a path that leads nowhere, or to what is no number."""
        here: Any = federation
        for i, step in enumerate(self.path):
            choices = list(STAGES) if not i else _field_names(here)
            if step not in choices:
                raise Uncalibratable(
                    f"{self.name!r} leads nowhere behind {self.defence!r}: there is no {step!r}; "
                    + nearest(step, choices)
                )
            here = getattr(here, step)
        if is_dataclass(here) or isinstance(here, bool | str):
            raise Uncalibratable(
                f"{self.name!r} is {here!r} and no number: name one of its numeric fields"
            )
        if (self.weakest is None) != (self.strongest is None):
            raise Uncalibratable("give --weakest and --strongest together, or none of them")
        if self.weakest is not None and self.weakest == self.strongest:
            raise Uncalibratable(f"--weakest and --strongest are both {self.weakest:g}: give two")
        if self.weakest is None and self.path[-1] != NOISE:
            raise Uncalibratable(
                f"which way {self.name!r} protects is not known: give --weakest and --strongest"
            )

    def turned(self, federation: Federation[Any, Any], value: float) -> Federation[Any, Any]:
        """Return the federation with this value in its place."""
        try:
            new: Federation[Any, Any] = _with(federation, self.path, value)
        except ValueError as error:
            raise Uncalibratable(f"{self.name} = {value:g}: {error}") from error
        return new

    def is_whole(self, federation: Federation[Any, Any]) -> bool:
        """Say whether only whole numbers can stand there."""
        here: Any = federation
        for step in self.path:
            here = getattr(here, step)
        return isinstance(here, int)


@dataclass(frozen=True)
class Point:
    """One value, and what came of it.

    Attributes:
        value: None for the federation as the file has it.
        reached, low, high: What the attack reached, with its 95 % interval; the worst of its seats.
        holds: Whether ``high`` is within the risk's limit.
        accuracy: The task's metric on test records, when nobody attacks, and its interval.
        epsilon: At the audit's delta, if a theorem holds at the attack's seats.
        bound: What the theorem says of the risk at this value.
        seconds: That its trainings, shadow models and attacks took, when they were done.
        num_trainings: Shadow models included.
    """

    value: float | None
    reached: float
    low: float
    high: float
    holds: bool
    accuracy: float
    accuracy_low: float | None
    accuracy_high: float | None
    epsilon: float | None
    bound: float | None
    seconds: float
    num_trainings: int


@dataclass(frozen=True)
class Bound:
    """What the theorem asks for, or why there is none."""

    value: float | None
    reached: float | None = None
    epsilon: float | None = None
    seconds: float = 0.0
    reason: str = ""


@dataclass(frozen=True)
class Calibration:
    """The answer, as ``calibration.json`` has it.

    Attributes:
        measured: The weakest value that was tried and held; None if none did.
        failed: The strongest that was tried and did not hold; None if all did.
        points: Every value that was tried, the weakest first; before them the federation as it is.
    """

    title: str
    task: str
    source: str
    metric: str
    attack: str
    seats: tuple[str, ...]
    defence: str
    parameter: str
    risk: Risk
    num_members: int
    num_others: int
    num_shadows: int
    num_rounds: int
    seeds: tuple[int, ...]
    sizes: tuple[int, ...]
    delta: float
    bound: Bound
    measured: float | None
    failed: float | None
    points: tuple[Point, ...]
    schema_version: int = SCHEMA_VERSION

    def at(self, value: float | None) -> Point | None:
        """Return what came of a value, if it was tried."""
        return next((p for p in self.points if p.value == value), None)


def risk_of(given: Mapping[str, float | None], fpr: float | None) -> Risk:
    """Return the one risk that is asked for, of the limits by kind."""
    wanted = {kind: limit for kind, limit in given.items() if limit is not None}
    if len(wanted) != 1:
        said = f"; {' and '.join('--' + k for k in wanted)} are given" if wanted else ""
        raise Uncalibratable(
            f"say what the attack may reach at most by one of {', '.join('--' + k for k in given)}"
            f"{said}"
        )
    kind, limit = next(iter(wanted.items()))
    return Risk(kind, limit, fpr)  # type: ignore[arg-type]


def noise_of(audit: Audit, parameter: str | None, defence: str | None) -> tuple[str, str]:
    """Return the column and the path that a search is about, where the file leaves no choice.

    Raises:
        Uncalibratable: If no stage adds noise, or several do.
    """
    if defence is not None and defence not in audit.federations:
        raise Uncalibratable(
            f"there is no column {defence!r}; {nearest(defence, audit.federations)}"
        )
    columns = [defence] if defence is not None else list(audit.federations)
    if parameter is not None:
        path = parameter.split(".")
        found = [(c, parameter) for c in columns if _leads(audit.federations[c], path)]
        if not found:  # the check of the knob says what is wrong
            noisy = [c for c in columns if any(_paths(audit.federations[c], NOISE))]
            return (noisy or columns)[0], parameter
    else:
        found = [(c, p) for c in columns for p in _paths(audit.federations[c], NOISE)]
    if not found:
        raise Uncalibratable(
            "no stage of the file adds noise: add a table such as [defence.dp-sgd] train = { use = "
            '"dp-sgd", ... }, or name another number by --parameter, --weakest and --strongest'
        )
    base = next(iter(audit.federations))
    if len(found) > 1 and any(c == base for c, _ in found):
        inherited = {p for c, p in found if c == base}
        found = [(c, p) for c, p in found if c == base or p not in inherited]
    if len(found) > 1:
        told = ", ".join(f"{p} behind {c!r}" for c, p in found)
        raise Uncalibratable(
            f"the search is about one number, and the file has several ({told}): choose by "
            "--defence and --parameter"
        )
    return found[0]


def calibrate(
    audit: Audit,
    folder: Path,
    *,
    attack: str,
    risk: Risk,
    knob: Knob,
    num_probes: int = 5,
    update: bool = False,
    on_event: Callable[[Event], None] = lambda event: None,
    **how: Any,
) -> Calibration:
    """Return the weakest values that keep a risk, and write ``calibration.json`` into ``folder``.

    The search by measurement takes it that a stronger value never lets an attack reach more: it
    tries both ends, then ``num_probes`` values between. It finds the same values, and trains
    nothing again, when it is resumed or repeated.

    Args:
        how: As ``run_audit`` takes it.
    """
    at_least(0, "calibrate", num_probes=num_probes)
    search = _Search(audit, folder, attack, risk, knob, update, on_event, how)
    return search.run(num_probes)


class _Search:
    """Tries values, each as one more column of an audit that grows."""

    def __init__(
        self,
        audit: Audit,
        folder: Path,
        attack: str,
        risk: Risk,
        knob: Knob,
        update: bool,
        on_event: Callable[[Event], None],
        how: Mapping[str, Any],
    ) -> None:
        if attack not in audit.entries:
            raise Uncalibratable(f"there is no attack {attack!r}; {nearest(attack, audit.entries)}")
        self.entry: Entry = audit.entries[attack]
        if self.entry.trial.family != _FAMILY[risk.kind]:
            raise Uncalibratable(
                f"{attack!r} is of the family {self.entry.trial.family}, and the {risk.kind} is a "
                f"figure of {_FAMILY[risk.kind]}: choose another attack, or another risk"
            )
        self.origin = audit.federations[knob.defence]
        knob.check(self.origin)
        base = next(iter(audit.federations))
        self.audit = replace(
            audit,
            federations={base: audit.federations[base]},
            entries={attack: self.entry},
            titles={base: audit.titles.get(base, base)},
        )
        self.attack, self.risk, self.knob, self.base = attack, risk, knob, base
        self.folder, self.update, self.on_event, self.how = folder, update, on_event, how
        self.columns: dict[float, Federation[Any, Any]] = {}
        self.points: dict[float | None, Point] = {}
        self.whole = knob.is_whole(self.origin) and knob.weakest is not None
        for end in (knob.weakest, knob.strongest):
            if end is not None:
                self._at(end)
        both = {base: self.audit.federations[base], knob.defence: self.origin}
        self.seats = rows(replace(audit, federations=both), self.entry)
        self.counts = [self._counts(seed) for seed in audit.seeds]
        if risk.kind in _PROVEN:
            for counts in self.counts:
                risk.check(*counts)

    def run(self, num_probes: int) -> Calibration:
        weak, strong = self.knob.weakest, self.knob.strongest
        if weak is None:  # refused before an hour of training, and not after
            self._refuse_unproven(*self._proof(self._at(1.0)))
        self.points[None] = self._tried(None)
        bound = self._bound()
        if weak is None or strong is None:
            self._refuse_unproven(bound.value, bound.reason)
            weak, strong = 0.0, bound.value or 0.0
        if bound.value is not None:
            self._probe(bound.value)
        measured: float | None = None
        failed: float | None = None
        if self._probe(strong).holds:
            measured = strong
            if self._probe(weak).holds:
                measured = weak
            else:
                measured, failed = self._between(weak, strong, num_probes)
        else:
            failed = strong
        found = self._calibration(bound, measured, failed, weak < strong)
        write_json(self.folder / "calibration.json", asdict(found))
        return found

    def _refuse_unproven(self, found: object, reason: str) -> None:
        if found is None or self.risk.kind not in _PROVEN:
            why = reason if self.risk.kind in _PROVEN else _NO_THEOREM.format(self.risk.kind)
            raise Uncalibratable(
                f"no theorem says how much noise is enough ({why}): give --weakest and --strongest"
            )

    def _between(self, weak: float, strong: float, num_probes: int) -> tuple[float, float]:
        for _ in range(num_probes):
            value = middle(weak, strong, whole=self.whole)
            if value is None:
                break
            weak, strong = (weak, value) if self._probe(value).holds else (value, strong)
        return strong, weak

    def _probe(self, value: float) -> Point:
        if value not in self.points:
            self.points[value] = self._tried(value)
        return self.points[value]

    def _at(self, value: float) -> Federation[Any, Any]:
        return self.knob.turned(self.origin, int(value) if self.whole else value)

    def _tried(self, value: float | None) -> Point:
        """Play the attack against a value, and all before it, of which nothing is left to do."""
        if value is not None:
            self.columns[value] = self._at(value)
        base = self.audit.federations[self.base]
        names = {v: self._column(v) for v in sorted(self.columns)}
        wanted = replace(
            self.audit,
            federations={self.base: base, **{names[v]: self.columns[v] for v in names}},
        )
        cells = run_audit(
            wanted,
            self.folder,
            update=self.update or value is not None,  # the folder is ours by now
            on_event=self.on_event,
            **self.how,
        )
        column = self.base if value is None else names[value]
        mine = {c: result for c, result in cells.items() if c.defence == column}
        return self._point(value, wanted.federations[column], mine)

    def _column(self, value: float) -> str:
        return f"{self.knob.path[-1]} {value:g}"

    def _point(
        self, value: float | None, federation: Federation[Any, Any], cells: Mapping[Planned, Cell]
    ) -> Point:
        there = AuditFolder(self.folder)
        by_seat: list[tuple[float, float, float]] = []
        for seat in dict.fromkeys(c.seat for c in cells):
            here = {c.seed: (c, result) for c, result in cells.items() if c.seat == seat}
            blocked = all(isinstance(result, Blocked) for _, result in here.values())
            if blocked and (by_seat or seat != list(cells)[-1].seat):
                continue  # another seat opens it, or the last one says why none does
            reached = [
                self.risk.reached(there, *here[seed], *counts)
                for seed, counts in zip(self.audit.seeds, self.counts, strict=True)
            ]
            by_seat.append(_pooled(reached, cut=self.risk.kind != "psnr"))
        worst = max(by_seat, key=lambda figure: figure[2])
        clean = {c.seed: (c.clean or c.run, c.defence) for c in cells}
        ends = [ended(self._log(there, k), defence) for k, defence in clean.values()]
        needed = {k for c in cells for k in c.needs}
        seconds = sum(sum(self._log(there, k)["seconds_per_round"]) for k in sorted(needed))
        seconds += sum(found[1] for c in cells if (found := read_cell(there, c.key)))
        proof, _ = self._proof(federation)
        low, high = self._accuracy(ends)
        return Point(
            value,
            *worst,
            worst[2] <= self.risk.limit,
            sum(ends) / len(ends),
            low,
            high,
            proof.epsilon if proof else None,
            self.risk.bound(proof.event) if proof and self.risk.kind in _PROVEN else None,
            seconds,
            len(needed),
        )

    def _log(self, there: AuditFolder, training: str) -> dict[str, Any]:
        log = read_log(there.log(training))
        assert log is not None  # its cell was settled after it
        return log

    def _accuracy(self, ends: list[float]) -> tuple[float | None, float | None]:
        if len(ends) > 1 and max(ends) > min(ends):
            return _cut(of_mean(torch.tensor(ends)))
        if self.audit.task.metric.__name__ != "accuracy":
            return None, None
        num_test = min(len(self.audit.task.test[1]), SHOWN)
        return wilson(ends[0] * num_test, num_test)

    def _counts(self, seed: int) -> tuple[int, int]:
        """Return how many members and others the game asks about; 0 where it asks otherwise."""
        trial = self.entry.trial
        if not isinstance(trial, Trial) or trial.family != "membership":
            return 0, 0
        _, truth = pose(self.audit, self.origin, trial.game, trial.at, seed, trial.by)
        if not isinstance(truth, Tensor) or truth.dtype != torch.bool:
            raise Uncalibratable(
                f"{trial.game!r} does not ask who is a member: choose one that does"
            )
        return int(truth.sum()), int((~truth).sum())

    def _proof(self, federation: Federation[Any, Any]) -> tuple[Private | None, str]:
        """Return the guarantee for a record at all seats of the attack, or why there is none."""
        audit = self.audit
        found = guarantees(
            federation.planned(Plan(audit.num_rounds, audit.task.sizes)),
            num_records=min((n for n in audit.task.sizes if n), default=0),
            num_rounds=audit.num_rounds,
            delta=audit.delta,
            search=audit.search,
        )
        why = ["no stage adds noise of which an accountant knows"]
        fit = []
        for g in found:
            if not isinstance(g, Private):
                why.append(str(g))
            elif g.unit is not Unit.RECORD:
                why.append(f"the noise is for each {g.unit}, and a record is asked about")
            elif not {str(s) for s in self.seats} <= g.against:
                why.append(f"it holds against {', '.join(sorted(g.against))} alone")
            elif isfinite(g.epsilon):
                fit.append(g)
            else:
                why.append("without noise nothing is bounded")
        return min(fit, key=lambda g: g.epsilon, default=None), why[-1]

    def _bound(self) -> Bound:
        """Return the weakest value for which the theorem holds; found once for a folder."""
        name = key(
            asdict(self.risk), self.knob, self.origin, self.audit.task_key, self.audit.num_rounds,
            self.audit.delta, self.audit.search, list(map(str, self.seats)),
        )  # fmt: skip
        note = self.folder / f"bound-{name[:16]}.json"
        with suppress(OSError, ValueError, TypeError):
            return Bound(**json.loads(note.read_text(encoding="utf-8")))
        began = time.perf_counter()
        found = self._by_theorem()
        found = replace(found, seconds=time.perf_counter() - began)
        write_json(note, asdict(found))
        return found

    def _by_theorem(self) -> Bound:
        if self.risk.kind not in _PROVEN:
            return Bound(None, reason=_NO_THEOREM.format(self.risk.kind))
        weak, strong = self.knob.weakest, self.knob.strongest

        def reaches(value: float) -> float:
            proof, _ = self._proof(self._at(value))
            return self.risk.bound(proof.event) if proof else inf

        proof, reason = self._proof(self._at(1.0 if strong is None else strong))
        if proof is None:
            return Bound(None, reason=reason)
        if weak is None or strong is None:
            weak, strong = 0.0, 1.0
            while reaches(strong) > self.risk.limit:
                weak, strong = strong, 2 * strong
                if strong > _MOST_NOISE:
                    return Bound(None, reason=f"not even {_MOST_NOISE:g} is enough noise")
        elif reaches(strong) > self.risk.limit:
            said = f"at {strong:g} it allows {reaches(strong):.3g} still"
            return Bound(None, reason=said)
        elif reaches(weak) == reaches(strong):
            return Bound(None, reason=f"the theorem says the same of every {self.knob.path[-1]}")
        elif reaches(weak) <= self.risk.limit:
            strong = weak
        while (value := middle(weak, strong, whole=self.whole)) is not None:
            if not self.whole and min(weak, strong) > 0 and _ratio(weak, strong) < _CLOSE:
                break
            weak, strong = (weak, value) if reaches(value) <= self.risk.limit else (value, strong)
        proof, _ = self._proof(self._at(strong))
        assert proof is not None
        return Bound(strong, self.risk.bound(proof.event), proof.epsilon)

    def _calibration(
        self, bound: Bound, measured: float | None, failed: float | None, rising: bool
    ) -> Calibration:
        audit, trial = self.audit, self.entry.trial
        tried = sorted((v for v in self.points if v is not None), reverse=not rising)
        shadows = 0
        if not isinstance(trial, Sabotage):
            shadows = getattr(trial.attack, "num_shadows", 0)
        return Calibration(
            audit.title,
            audit.task.name,
            audit.task.source,
            audit.task.metric.__name__,
            self.attack,
            tuple(str(s) for s in self.seats if s),
            self.knob.defence,
            self.knob.name,
            self.risk,
            sum(n for n, _ in self.counts),
            sum(n for _, n in self.counts),
            shadows,
            audit.num_rounds,
            audit.seeds,
            audit.task.sizes,
            audit.delta,
            bound,
            measured,
            failed,
            (self.points[None], *(self.points[v] for v in tried)),
        )


def middle(weak: float, strong: float, *, whole: bool = False) -> float | None:
    """Return a value between two, of few digits; None if there is none.

    By ratio where both are positive, a quarter of the other where one is 0.

    >>> middle(1.0, 4.0), middle(0.0, 2.0), middle(3, 4, whole=True)
    (2.0, 0.5, None)
    """
    if whole:
        value: float = (weak + strong) // 2
    elif weak > 0 and strong > 0:
        value = sqrt(weak) * sqrt(strong)
    elif weak and strong:
        value = (weak + strong) / 2
    else:
        value = (weak or strong) / 4
    value = value if whole else float(f"{value:.{_DIGITS}g}")
    return value if min(weak, strong) < value < max(weak, strong) else None


def _ratio(weak: float, strong: float) -> float:
    return max(weak / strong, strong / weak)


def _pooled(reached: list[tuple[float, float, float]], *, cut: bool) -> tuple[float, float, float]:
    """Return the mean over seeds with its interval; the widest of their own, if they agree."""
    values = [r[0] for r in reached]
    if max(values) > min(values):
        low, high = of_mean(torch.tensor(values))
    else:
        low, high = min(r[1] for r in reached), max(r[2] for r in reached)
    return sum(values) / len(values), *(_cut((low, high)) if cut else (low, high))


def _cut(interval: Interval) -> Interval:
    return max(0.0, interval[0]), min(1.0, interval[1])


def _with(thing: Any, path: tuple[str, ...], value: float) -> Any:
    name, *rest = path
    if rest:
        return replace(thing, **{name: _with(getattr(thing, name), tuple(rest), value)})
    changes: dict[str, Any] = {name: value}
    if name == NOISE and "target_epsilon" in _field_names(thing):
        changes |= {"target_epsilon": None, "delta": None}
    if name == "target_epsilon" and NOISE in _field_names(thing):
        changes |= {NOISE: None}
    return replace(thing, **changes)


def _field_names(thing: Any) -> list[str]:
    if not is_dataclass(thing):
        return []
    return [f.name for f in fields(thing) if f.init]


def _leads(thing: Any, path: list[str]) -> bool:
    for step in path:
        if step not in _field_names(thing):
            return False
        thing = getattr(thing, step)
    return True


def _paths(federation: Federation[Any, Any], name: str) -> Iterator[str]:
    """Yield the paths to a field of all stages that say what a round of them costs."""

    def inside(thing: Any, path: str) -> Iterator[str]:
        for step in _field_names(thing):
            if step == name and hasattr(thing, "event"):
                yield f"{path}.{step}"
            else:
                yield from inside(getattr(thing, step), f"{path}.{step}")

    for place in STAGES:
        yield from inside(getattr(federation, place), place)

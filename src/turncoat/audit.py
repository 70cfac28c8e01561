"""Attacks x federations -> cells. Each training is run once, and each cell is written once.

Everything finished is on disk, under the hash of its whole description, so that an audit that was
killed goes on where it stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from functools import reduce
from operator import add
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

import torch
from torch import Tensor

from turncoat.coalition import Coalition
from turncoat.describe import fingerprint
from turncoat.federation import Federation
from turncoat.games.peers import combined, traitors_of
from turncoat.graphs import distances, neighbours_of
from turncoat.metrics.detection import Caught
from turncoat.plan import (
    Audit,
    Entry,
    Plan,
    Planned,
    Training,
    aimed,
    claim_of,
    is_model,
    num_suspects,
    order_of,
    plan,
    planted_run,
    pose,
    remakers,
    shadow_run,
    shadow_seed,
    shadow_task,
    watch_of,
    world_of,
)
from turncoat.randomness import Randomness
from turncoat.record import (
    SHOWN,
    AuditFolder,
    FolderUnusable,
    note_failure,
    read_cell,
    read_log,
    write_cell,
    write_json,
    write_plan,
    write_records,
)
from turncoat.runtimes.pool import become_worker, context
from turncoat.runtimes.saved import (
    State,
    Unreadable,
    Unwritable,
    read_state,
    read_tensors,
    write_state,
    write_tensors,
)
from turncoat.runtimes.seat import Incident
from turncoat.runtimes.simulate import Played, Run, one_thread, simulate
from turncoat.stage import call, matches
from turncoat.task import Task
from turncoat.trial import Blocked, Cell, Failed, Marked, Sabotage, Scored, Trial
from turncoat.views import ClientView, ModelView, QueryView, Seat, Shadows, Suspects, Worlds

__all__ = ["Audit", "AuditFolder", "Entry", "Event", "FolderUnusable", "run_audit"]

_CHECKPOINT_SECONDS = 20.0

Runtime = Callable[..., Run]  # takes what ``simulate`` takes, and gives the same bits


class WorkerDied(RuntimeError):
    """The system ended a worker process: nobody knows what became of its work."""


_DIED = (
    "a worker process died, as when memory runs out: use fewer --jobs; what is finished is kept, "
    "and the same command goes on"
)


Unit = Training | Planned  # what is computed at once, by one process


@dataclass(frozen=True)
class Fixed:
    """What all units of an audit share; workers get it once."""

    audit: Audit
    folder: AuditFolder
    device: str
    runtime: Runtime | None = None

    def do(self, unit: Unit) -> tuple[Any, float]:
        """Return what became of a unit, and in how many seconds: its error, or its cell."""
        if isinstance(unit, Training):
            return train(self.audit, self.folder, unit, self.device, self.runtime)
        return settle(self.audit, self.folder, unit, self.device, self.runtime)


class Crew(Protocol):
    """Workers who do units at the same time."""

    @property
    def size(self) -> int:
        """How many units may be under way."""

    def hand_out(self, unit: Unit) -> None:
        """Begin a unit, somewhere."""

    def finished(self) -> Iterator[tuple[Unit, tuple[Any, float]]]:
        """Wait until some are done, and yield them with what ``Fixed.do`` returned.

        Raises:
            WorkerDied: If one cannot be done.
        """

    def close(self) -> None:
        """Let the workers go, whatever they are at."""


Executor = Callable[[Fixed, Callable[[str], None]], Crew]
"""What makes the crew of an audit; it is also given whom to tell of a worker that was lost."""


@dataclass(frozen=True)
class Event:
    """Something that happened on the way, for whoever shows progress.

    Attributes:
        what: ``"plan"``, ``"training"``, ``"shadow"``, ``"cell"``, ``"failed"``, or ``"lost"``: a
            worker, whose unit is tried again.
        done, of: How many units of work are finished, of how many.
        text: For people.
    """

    what: str
    done: int
    of: int
    text: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Log:
    """What is known of a finished training beside its state."""

    metric: str
    history: tuple[float, ...]
    seconds_per_round: tuple[float, ...]
    bytes_up: int
    bytes_down: int
    cohort: tuple[int, ...]
    incidents: tuple[tuple[int, int | None, str], ...]
    aborted_rounds: int
    caught_clients: Caught | None = None
    caught_records: Caught | None = None
    remade: dict[str, float | None] = field(default_factory=dict)  # by defence: of what it releases


def run_audit(
    audit: Audit,
    folder: Path,
    *,
    num_jobs: int = 1,
    device: str = "cpu",
    update: bool = False,
    command: str = "",
    on_event: Callable[[Event], None] = lambda event: None,
    runtime: Runtime | None = None,
    executor: Executor | None = None,
) -> dict[Planned, Cell]:
    """Return every cell; what ``folder`` holds is read, the rest is computed and written.

    Afterwards the folder holds ``plan.json``, ``cells.jsonl``, ``trainings.jsonl`` and
    ``config.toml``, from which the report is made.

    Args:
        num_jobs: How many processes train and attack, of one thread each.
        update: Go on in a folder that holds another audit.
        runtime: Who plays the rounds: ``simulate`` without, or Flower, which gives the same bits.
        executor: Who trains and attacks: ``num_jobs`` processes here without, or a cluster.
    """
    there, todo = AuditFolder(folder), plan(audit)
    there.claim(audit, update=update)
    with there.locked():
        write_plan(folder, audit, todo, command)
        try:
            return _Work(audit, there, todo, device, on_event, runtime).run(num_jobs, executor)
        finally:
            write_records(folder)


class _Work:
    """Runs trainings as they are needed and cells as they become possible."""

    def __init__(
        self,
        audit: Audit,
        folder: AuditFolder,
        todo: Plan,
        device: str,
        on_event: Callable[[Event], None],
        runtime: Runtime | None,
    ) -> None:
        self.runtime = runtime
        self.audit, self.folder, self.plan = audit, folder, todo
        self.device, self.on_event = device, on_event
        self.cells: dict[Planned, Cell] = {}
        self.broken: dict[str, str] = {}  # trainings that failed, and why

    def run(self, num_jobs: int, executor: Executor | None = None) -> dict[Planned, Cell]:
        open_cells = []
        for cell in self.plan.cells:
            if cell.settled is not None:
                self.cells[cell] = cell.settled
                if isinstance(cell.settled, Failed):
                    note_failure(self.folder.cell(cell.key), cell.settled.error)
            elif (known := read_cell(self.folder, cell.key)) is not None:
                self.cells[cell] = known[0]
            else:
                open_cells.append(cell)
        needed = {k for cell in open_cells for k in cell.needs}
        wanted = {k: t for k, t in self.plan.trainings.items() if k in needed}
        trainings = [t for t in order_of(wanted) if not self.folder.is_trained(t)]
        self.total, self.done = len(trainings) + len(open_cells), 0
        self._say("plan", summary(self.plan, len(trainings), len(open_cells)))
        self.waiting = {t.key for t in trainings}
        self.open_cells = open_cells
        fixed = Fixed(self.audit, self.folder, self.device, self.runtime)
        if executor is not None:
            if self.total:
                self._spread(trainings, executor(fixed, self._say_lost))
        elif num_jobs == 1 or self.total <= 1 or torch.device(self.device).type != "cpu":
            self._alone(trainings)
        else:
            self._spread(trainings, _Processes(num_jobs, fixed))
        order = {cell: i for i, cell in enumerate(self.plan.cells)}
        return dict(sorted(self.cells.items(), key=lambda item: order[item[0]]))

    def _alone(self, trainings: list[Training]) -> None:
        audit, folder, how = self.audit, self.folder, (self.device, self.runtime)
        with one_thread():
            for training in trainings:
                self._finish(training, *train(audit, folder, training, *how))
                for cell in self._ready():
                    self._settle(cell, *settle(audit, folder, cell, *how))
            for cell in self._ready():
                self._settle(cell, *settle(audit, folder, cell, *how))

    def _spread(self, trainings: list[Training], crew: Crew) -> None:
        queue: list[Unit] = [*self._ready(), *trainings]
        num_running = 0
        try:
            while queue or num_running:
                while queue and num_running < crew.size:
                    crew.hand_out(queue.pop(0))
                    num_running += 1
                for unit, result in crew.finished():
                    num_running -= 1
                    if isinstance(unit, Training):
                        self._finish(unit, *result)
                        queue = [*self._ready(), *queue]
                    else:
                        self._settle(unit, *result)
        finally:
            crew.close()

    def _ready(self) -> list[Planned]:
        """Take and return the cells whose trainings have all ended, well or badly."""
        ready = [c for c in self.open_cells if not self.waiting & set(c.needs)]
        self.open_cells = [c for c in self.open_cells if self.waiting & set(c.needs)]
        possible = []
        for cell in ready:
            if failed := next((self.broken[k] for k in cell.needs if k in self.broken), None):
                self._settle(cell, Failed(f"its training failed: {failed}"), 0.0)
            else:
                possible.append(cell)
        return possible

    def _finish(self, training: Training, error: str | None, seconds: float) -> None:
        self.waiting.discard(training.key)
        self.done += 1
        who = training.attack or ("shadow model" if training.shadow is not None else "honest")
        text = f"{training.defence}, {who}, seed {training.seed}"
        note_failure(self.folder.log(training.key), error)
        if error is not None:
            self.broken[training.key] = error
            self._say("failed", f"training failed ({text}): {error}", seconds)
        else:
            self._say("shadow" if training.shadow is not None else "training", text, seconds)

    def _settle(self, cell: Planned, result: Cell, seconds: float) -> None:
        self.cells[cell] = result
        self.done += 1
        note_failure(
            self.folder.cell(cell.key), result.error if isinstance(result, Failed) else None
        )
        text = f"{cell.attack} at {cell.seat}, {cell.defence}, seed {cell.seed}"
        if isinstance(result, Failed):
            self._say("failed", f"attack failed ({text}): {result.error}", seconds)
        else:
            self._say("cell", text, seconds)

    def _say_lost(self, text: str) -> None:
        self._say("lost", text)

    def _say(self, what: str, text: str, seconds: float = 0.0) -> None:
        self.on_event(Event(what, self.done, self.total, text, seconds))


def summary(todo: Plan, num_trainings: int | None = None, num_cells: int | None = None) -> str:
    """Return how much there is to do, in a sentence."""
    trainings = todo.trainings.values()
    shadows = sum(t.shadow is not None for t in trainings)
    blocked = sum(isinstance(c.settled, Blocked) for c in todo.cells)
    said = (
        f"{len(todo.cells)} cells ({blocked} blocked), {len(todo.trainings) - shadows} trainings "
        f"and {shadows} shadow models"
    )
    if num_trainings is None or num_cells is None:
        return said
    left = f"{num_trainings} trainings and {num_cells} cells"
    return f"{said}; {left} are left to do"


_here: Fixed | None = None


def _begin(fixed: Fixed) -> None:
    global _here
    become_worker()
    _here = fixed


def _do(unit: Unit) -> tuple[Any, float]:
    assert _here is not None
    return _here.do(unit)


class _Processes:
    """A crew of processes on this machine."""

    def __init__(self, num_jobs: int, fixed: Fixed) -> None:
        self.size = num_jobs
        self._running: dict[Future[Any], Unit] = {}
        self._pool = ProcessPoolExecutor(num_jobs, context(), _begin, (fixed,))

    def hand_out(self, unit: Unit) -> None:
        try:
            self._running[self._pool.submit(_do, unit)] = unit
        except BrokenProcessPool as error:
            raise WorkerDied(_DIED) from error

    def finished(self) -> Iterator[tuple[Unit, tuple[Any, float]]]:
        ended, _ = wait(self._running, return_when=FIRST_COMPLETED)
        for future in ended:
            try:
                yield self._running.pop(future), future.result()
            except BrokenProcessPool as error:
                raise WorkerDied(_DIED) from error

    def close(self) -> None:
        workers = list((self._pool._processes or {}).values())  # forgotten by a pool that is shut
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in workers:
            process.terminate()


def train(
    audit: Audit,
    folder: AuditFolder,
    training: Training,
    device: str,
    runtime: Runtime | None = None,
) -> tuple[str | None, float]:
    """Run a training, or the rest of it, and save what it leaves; return why it failed, if so."""
    began = time.perf_counter()
    federation, task, seed = audit.federations[training.defence], audit.task, training.seed
    if (known := folder.played(training)) is not None:  # of a defence less
        ends = _ends(audit, training, task, _params(folder, training.key))
        write_json(folder.log(training.key), known | {"remade": known.get("remade", {}) | ends})
        return None, time.perf_counter() - began
    coalition = training.coalition
    draft, state, log = folder.draft(training.key), None, list[Played]()
    history: list[float] = []
    try:
        if training.shadow is not None:
            federation, task, seed = shadow_run(
                audit, federation, training.game, training.shadow, seed
            )
        if training.planted:
            task, coalition = planted_run(audit, federation, training.game, seed)
        missing = [t for t in training.states if t and not folder.state(training.key, t).exists()]
        if draft.exists():
            state, log, history = _read_draft(draft)
            if state is not None and any(t < state.round for t in missing):
                state, log, history = None, [], []
        saved_at = time.perf_counter()

        def on_round(now: State, played: Played) -> None:
            nonlocal saved_at
            log.append(played)
            if training.shadow is None:
                history.append(_shown(audit, training, task, now.params))
            if now.round in missing:
                write_state(folder.state(training.key, now.round), now)
            if time.perf_counter() - saved_at > _CHECKPOINT_SECONDS:
                _write_draft(draft, now, log, history)
                saved_at = time.perf_counter()

        run = (runtime or simulate)(
            federation,
            task,
            num_rounds=audit.num_rounds,
            seed=seed,
            coalition=coalition,
            server=training.server,
            device=device,
            state=state,
            on_round=on_round,
        )
        if log and all(p.aborted for p in log):
            raise RuntimeError(f"every round was aborted: {log[-1].incidents[-1].what}")
    except Unwritable:
        raise  # of the folder, and not of the training: nothing to go on with
    except Exception as error:
        return f"{type(error).__name__}: {error}", time.perf_counter() - began
    write_tensors(folder.state(training.key), {"params": run.state.params})
    ends = _ends(audit, training, task, run.state.params)
    write_json(folder.log(training.key), asdict(_logged(task, log, history, ends)))
    draft.unlink(missing_ok=True)
    return None, time.perf_counter() - began


def _logged(
    task: Task, log: list[Played], history: list[float], ends: dict[str, float | None]
) -> Log:
    return Log(
        task.metric.__name__,
        tuple(history),
        tuple(p.seconds for p in log),
        round(sum(p.bytes_up for p in log) / max(len(log), 1)),
        round(sum(p.bytes_down for p in log) / max(len(log), 1)),
        tuple(len(p.cohort) for p in log),
        tuple((i.round, i.client, i.what) for p in log for i in p.incidents),
        sum(p.aborted for p in log),
        _sum(p.clients for p in log),
        _sum(p.records for p in log),
        ends,
    )


def _sum(caught: Iterable[Caught | None]) -> Caught | None:
    """Return what was caught in all rounds; None if nobody judged."""
    judged = [c for c in caught if c is not None]
    return reduce(add, judged) if judged else None


def _write_draft(path: Path, state: State, log: list[Played], history: list[float]) -> None:
    write_state(path, state, {"log": [asdict(p) for p in log], "history": history})


def _read_draft(path: Path) -> tuple[State | None, list[Played], list[float]]:
    try:
        state, about = read_state(path)
    except Unreadable:
        return None, [], []
    log = [
        Played(
            **p
            | {
                "cohort": tuple(p["cohort"]),
                "incidents": tuple(Incident(**i) for i in p["incidents"]),
                "clients": p["clients"] and Caught(**p["clients"]),
                "records": p["records"] and Caught(**p["records"]),
            }
        )
        for p in about["log"]
    ]
    return state, log, list(about["history"])


def shown_score(
    federation: Federation[Any, Any],
    task: Task,
    params: Tensor,
    seed: int,
    dealt: slice = slice(None),
) -> float:
    """Return the task's metric on some of the test set; of the model itself, where there is one."""
    if federation.yields_model:
        return _score(ModelView(task.model, params), task, dealt)
    return remade_score(federation, task, params, seed, dealt)


def remade_score(
    federation: Federation[Any, Any],
    task: Task,
    params: Tensor,
    seed: int,
    dealt: slice = slice(None),
) -> float:
    """Return the task's metric on some of the test set, of what is released."""
    return _score(judged(federation, task, params, seed), task, dealt)


def _score(view: ModelView | QueryView, task: Task, dealt: slice) -> float:
    inputs, labels = (t[:SHOWN][dealt] for t in task.test)
    return float(task.metric(view.scores(inputs), labels).mean())


def _shown(
    audit: Audit, training: Training, task: Task, params: Tensor, remade_by: str | None = None
) -> float:
    """Return ``shown_score``; of a graph, the mean of honest nodes: examples are dealt to them.

    Args:
        remade_by: The defence whose released model is meant instead.
    """
    federation = audit.federations[remade_by or training.defence]
    worn, seed = training.coalition, training.seed
    score = shown_score if remade_by is None else remade_score
    if federation.graph is None:
        return score(federation, task, params, seed)
    nodes = list(range(len(params)))
    if worn is not None and not worn.is_supplied:
        traitors = traitors_of(worn, len(params), audit.num_rounds, Randomness(seed))
        nodes = [i for i in nodes if i not in traitors]
    num_shown = min(SHOWN, len(task.test[1]))
    dealt = {i: slice(k % num_shown, None, len(nodes)) for k, i in enumerate(nodes)}
    return fmean(score(federation, task, params[i], seed, dealt[i]) for i in nodes)


def _ends(audit: Audit, training: Training, task: Task, params: Tensor) -> dict[str, float | None]:
    """Return ``_shown`` of what defences release; None where one cannot: its cells say why."""
    found: dict[str, float | None] = {}
    for defence in sorted(training.remakes):
        try:
            found[defence] = _shown(audit, training, task, params, defence)
        except Exception:
            found[defence] = None
    return found


def settle(
    audit: Audit,
    folder: AuditFolder,
    cell: Planned,
    device: str,
    runtime: Runtime | None = None,
) -> tuple[Cell, float]:
    """Mount a cell's attack, mark and save what comes of it."""
    began = time.perf_counter()
    trial = audit.entries[cell.attack].trial
    try:
        marked = (
            _sabotage(audit, folder, cell, trial)
            if isinstance(trial, Sabotage)
            else _play(audit, folder, cell, trial, device, runtime)
        )
    except (Unwritable, Unreadable):
        raise
    except Exception as error:  # a cell that failed says so, and is tried again next time
        return Failed(f"{type(error).__name__}: {error}"), time.perf_counter() - began
    seconds = time.perf_counter() - began
    write_cell(folder, cell.key, marked, seconds)
    folder.drafts(cell.key).drop()
    return Scored(marked), seconds


def _sabotage(audit: Audit, folder: AuditFolder, cell: Planned, trial: Sabotage) -> Marked:
    hurt, clean = (_params(folder, k) for k in (cell.run, cell.clean))
    if audit.federations[cell.defence].graph is None:
        marked = _marked(audit, cell, trial, hurt, clean)
    else:
        marked = _marked_at_peers(audit, cell, trial, hurt, clean)
    log = read_log(folder.log(cell.run)) or {}
    found = [
        measurement
        for what in ("clients", "records")
        if (counts := log.get(f"caught_{what}"))
        for measurement in Caught(**counts).measured(f"flagged_{what}")
    ]
    return replace(marked, others=(*marked.others, *found))


def _marked(
    audit: Audit, cell: Planned, trial: Sabotage, hurt: Tensor, clean: Tensor, *node: int
) -> Marked:
    federation = audit.federations[cell.defence]
    views = (judged(federation, audit.task, params, cell.seed) for params in (hurt, clean))
    rng = Randomness(cell.seed).at("mark" + fingerprint(trial), *node)
    return trial.outcome.mark(*views, task=audit.task, rng=rng)


def _marked_at_peers(
    audit: Audit, cell: Planned, trial: Sabotage, hurt: Tensor, clean: Tensor
) -> Marked:
    """Mark the models of all honest nodes; whoever only was supplied with what is bad is one."""
    graph, randomness = audit.federations[cell.defence].graph, Randomness(cell.seed)
    assert graph is not None and trial.coalition is not None
    traitors = traitors_of(trial.coalition, len(hurt), audit.num_rounds, randomness)
    away = distances(neighbours_of(graph, len(hurt), randomness), traitors)
    nodes = [i for i, steps in enumerate(away) if steps or trial.coalition.is_supplied]
    marks = [_marked(audit, cell, trial, hurt[i], clean[i], i) for i in nodes]
    return combined(marks, [away[i] for i in nodes])


def _play(
    audit: Audit,
    folder: AuditFolder,
    cell: Planned,
    trial: Trial[Any],
    device: str,
    runtime: Runtime | None,
) -> Marked:
    federation, seed = audit.federations[cell.defence], cell.seed
    trial = aimed(audit, federation, trial, seed)
    apart = matches(trial.needs, ClientView)
    question, truth = pose(
        audit, federation, trial.game, trial.at, seed, trial.by, apart, trial.allies
    )
    view: Any
    if trial.planted:
        question, truth = pose(audit, federation, trial.game, -1, seed)
        task, coalition = planted_run(audit, federation, trial.game, seed)
        source = _Source(cell.run, federation, task, seed, coalition)
        view = _view(audit, folder, cell, trial, source, device, runtime)
    elif trial.suspects:
        every = _worlds(audit, folder, cell, trial, (question, truth), device, runtime)
        num = num_suspects(trial)
        view = Suspects(every.views[:num])
        if len(every.views) > num:
            own = Worlds(every.views[num:], every.second[num:])
            question = replace(question, shadows=own)
    else:
        if cell.shadows:
            question = replace(question, shadows=_shadows(audit, folder, cell, trial, question))
        source = _Source(cell.run, federation, audit.task, seed, trial.coalition)
        view = _view(audit, folder, cell, trial, source, device, runtime)
    question = moved(question, device)
    asked = {f.name: getattr(question, f.name) for f in fields(question)}
    randomness, name = Randomness(seed), fingerprint(trial)
    drafts = folder.drafts(cell.key)
    rng = randomness.at("attack" + name)
    guess = call(trial.attack, view, rng=rng, drafts=drafts.of("attack"), **asked)
    if getattr(trial.game, "prior_only", False):
        deaf: Any = getattr(trial.attack, "prior_only")  # noqa: B009
        rng = randomness.at("attack" + name)
        alone = call(deaf, view, rng=rng, drafts=drafts.of("prior-only"), **asked)
        guess = tuple(replace(g, prior_only=a.inputs) for g, a in zip(guess, alone, strict=True))
    guess = moved(guess, "cpu")
    if trial.planted:
        claim = claim_of(audit, federation, trial.game, cell.seat)
        rng = randomness.at("mark" + name)
        return trial.game.mark(guess, truth, rng=rng, claim=claim)  # type: ignore[call-arg]
    return trial.game.mark(guess, truth, rng=randomness.at("mark" + name))


def _shadows(
    audit: Audit, folder: AuditFolder, cell: Planned, trial: Trial[Any], question: Any
) -> Shadows:
    models, inside, federation = [], [], audit.federations[cell.defence]
    for i, k in enumerate(cell.shadows):
        params = federation.held(_params(folder, k), trial.by)
        if cell.seat is Seat.USER:  # who knows how the model is remade does the same to shadows
            own = shadow_seed(trial.game, i, cell.seed)
            params = remade(federation, audit.task, params, own)
        models.append(ModelView(audit.task.model, params))
        inside.append(shadow_task(audit, question.candidates, trial.game, i, cell.seed)[1])
    return Shadows(tuple(models), torch.stack(inside))


def _worlds(
    audit: Audit,
    folder: AuditFolder,
    cell: Planned,
    trial: Trial[Any],
    posed: tuple[Any, Any],
    device: str,
    runtime: Runtime | None,
) -> Worlds[Any]:
    """Return what the seat sees of the suspects, and then of the attacker's own federations."""
    views, second = [], []
    for i, k in enumerate(cell.shadows):
        federation = audit.federations[cell.defence]
        played, task, seed, is_second = world_of(audit, federation, trial.game, i, cell.seed, posed)
        source = _Source(k, played, task, seed, trial.coalition)
        views.append(_view(audit, folder, cell, trial, source, device, runtime))
        second.append(is_second)
    return Worlds(tuple(views), torch.tensor(second))


@dataclass(frozen=True)
class _Source:
    """One training that is looked at, by its key, and how it was played."""

    key: str
    federation: Federation[Any, Any]
    task: Task
    seed: int
    coalition: Coalition[Any] | None


def _view(
    audit: Audit,
    folder: AuditFolder,
    cell: Planned,
    trial: Trial[Any],
    source: _Source,
    device: str,
    runtime: Runtime | None,
) -> Any:
    """Return what the seat sees: the final model as it holds it, or a round that is played again.

    A round is replayed from the state before it, which gives the same bits and keeps on disk one
    vector for what may be hundreds of messages.
    """
    federation, task = source.federation, source.task
    if is_model(trial):
        params = federation.held(_params(folder, source.key), trial.by).to(device)
        if cell.seat is Seat.USER:
            return released(federation, task, params, source.seed)
        return ModelView(task.model, params)
    first = 0 if trial.whole else trial.at % audit.num_rounds
    run = (runtime or simulate)(
        federation,
        task,
        num_rounds=audit.num_rounds,
        seed=source.seed,
        coalition=source.coalition,
        server=trial.server,
        watch=[watch_of(trial, audit.num_rounds)],
        device=device,
        state=read_state(folder.state(source.key, first))[0] if first else None,
        until=None if trial.whole else first + 1,
    )
    kinds = federation.views()[cell.seat] if cell.seat else ()
    kind = next(k for k in kinds if matches(k, trial.needs))
    views = [v for k, v in run.views if k == kind and trial.sits_at(v)]
    if trial.whole:
        return views
    if not views:
        raise RuntimeError(f"round {first} shows the {cell.seat} nothing: choose another 'at'")
    return views[0]


def judged(federation: Federation[Any, Any], task: Task, params: Tensor, seed: int) -> Any:
    """Return the released model for whoever marks it: it answers however often it is asked."""
    view = released(federation, task, params, seed)
    if isinstance(view, QueryView):
        view.budget = None
    return view


def released(federation: Federation[Any, Any], task: Task, params: Tensor, seed: int) -> Any:
    """Return a fresh view of the released model: queries are counted for each attack apart."""
    rng = Randomness(seed).at("release")
    return call(federation.release, task.model, params, rng=rng, public=task.public)


def remade(federation: Federation[Any, Any], task: Task, params: Tensor, seed: int) -> Tensor:
    """Return the parameters of the released model: other ones, where the release makes another."""
    rng = Randomness(seed).at("release")
    for stage in remakers(federation):
        params = stage.remade(task.model, params, rng=rng, public=task.public)
    return params


def moved(thing: Any, device: str) -> Any:
    """Return a value with all tensors in its fields on a device; itself, if they are there."""
    if isinstance(thing, Tensor):
        return thing.to(device)
    if isinstance(thing, tuple | list):
        new_items = [moved(item, device) for item in thing]
        same = all(new is item for new, item in zip(new_items, thing, strict=True))
        return thing if same else type(thing)(new_items)
    if is_dataclass(thing) and not isinstance(thing, type):
        inside = {f.name: getattr(thing, f.name) for f in fields(thing) if f.init}
        new = {name: moved(value, device) for name, value in inside.items()}
        same = all(new[name] is value for name, value in inside.items())
        return thing if same else replace(thing, **new)
    return thing


def _params(folder: AuditFolder, training: str) -> Tensor:
    return read_tensors(folder.state(training))[0]["params"]

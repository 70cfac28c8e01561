"""What an audit will do, before anything is done: trainings, shadow models and cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Generator, Tensor

from turncoat.coalition import Coalition, check_members, check_worn
from turncoat.describe import fingerprint, key
from turncoat.federation import Federation, WhiteBox
from turncoat.games.properties import SameStart
from turncoat.graphs import neighbours_of
from turncoat.privacy import Claim, claim, guarantees
from turncoat.randomness import Randomness
from turncoat.runtimes.simulate import Watch, cohorts
from turncoat.selection import Search
from turncoat.stage import Broadcast, asks, code_of, matches, wants, within
from turncoat.stage import Plan as Schedule
from turncoat.targets import AimedBroadcast, AimedTrain, targets_of
from turncoat.task import Shards, Task
from turncoat.trial import Blocked, Failed, Sabotage, Trial, why_blocked
from turncoat.views import ClientView, ModelView, QueryView, Seat


class Impossible(ValueError):
    """An audit asks for something that its task or its rounds do not have."""


@dataclass(frozen=True)
class Entry:
    """An attack of the matrix, and the seats it is asked for (none named: all that it can take)."""

    trial: Trial[Any] | Sabotage
    seats: tuple[Seat, ...] = ()


@dataclass(frozen=True)
class Audit:
    """Attacks x federations x seeds on one task.

    Attributes:
        federations: The columns by name; the first is the federation as it is.
        entries: The attacks by name.
        delta: At which every ε is stated.
        search: How many trainings with other hyper-parameters each ε covers; None for this one.
        titles: What people call a federation, where its name does not say enough.
        text, overrides, variant: The file this came from, and which of its variants it is.
    """

    title: str
    task: Task
    federations: Mapping[str, Federation[Any, Any]]
    entries: Mapping[str, Entry]
    num_rounds: int
    seeds: tuple[int, ...]
    delta: float = 1e-5
    search: Search | None = None
    titles: Mapping[str, str] = field(default_factory=dict)
    text: str = ""
    overrides: tuple[str, ...] = ()
    variant: str = ""

    @cached_property
    def task_key(self) -> str:
        return key(self.task)

    @cached_property
    def identity(self) -> str:
        """What makes two audits two: the task, the first federation, the number of rounds."""
        return key(next(iter(self.federations.values())), self.task_key, self.num_rounds)


@dataclass(frozen=True)
class Training:
    """One run that some cells need: honest, attacked, or a shadow of the honest one.

    Attributes:
        attack: The name of the active attack in it, or None.
        states: Before which rounds its state is kept, for the views of those rounds.
        remakes: The defences that release another model than this, whose accuracy is noted too.
        shadow: Which of the shadow models of ``game`` it is, if it is one.
        planted: Whether ``game`` plants its canaries in it.
    """

    key: str
    defence: str
    seed: int
    attack: str | None = None
    coalition: Coalition[Any] | None = field(default=None, repr=False)
    server: Broadcast | None = field(default=None, repr=False)
    states: frozenset[int] = frozenset()
    remakes: frozenset[str] = frozenset()
    game: Any = field(default=None, repr=False)
    shadow: int | None = None
    planted: bool = False


@dataclass(frozen=True)
class Planned:
    """One cell of the matrix, with the trainings it needs, or what already settles it."""

    key: str
    defence: str
    attack: str
    seat: Seat | None
    seed: int
    run: str = ""
    clean: str = ""
    shadows: tuple[str, ...] = ()
    settled: Blocked | Failed | None = None

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(k for k in (self.run, self.clean, *self.shadows) if k)


@dataclass(frozen=True)
class Plan:
    """Every cell in its order, and every training by its key."""

    cells: tuple[Planned, ...]
    trainings: Mapping[str, Training]


def plan(audit: Audit) -> Plan:
    """Return what an audit needs. Trainings are shared; impossible cells are settled here.

    Raises:
        Impossible: If an attack names a client or a round that there is not.
    """
    trainings: dict[str, Training] = {}
    cells: list[Planned] = []
    for name, entry in audit.entries.items():
        _check_entry(audit, name, entry.trial)
        for seat in rows(audit, entry):
            for defence, federation in audit.federations.items():
                for seed in audit.seeds:
                    cells.append(_cell(audit, name, entry.trial, seat, defence, federation, seed))
    for cell in cells:
        if cell.settled is None:
            for training in _trainings(audit, cell):
                known = trainings.get(training.key, training)
                trainings[training.key] = replace(
                    known,
                    states=known.states | training.states,
                    remakes=known.remakes | training.remakes,
                )
    return Plan(tuple(cells), trainings)


def _check_entry(audit: Audit, name: str, trial: Trial[Any] | Sabotage) -> None:
    num_clients, last = len(audit.task.clients), audit.num_rounds - 1
    if isinstance(trial, Trial):
        if not -audit.num_rounds <= trial.at <= last:
            raise Impossible(
                f"the attack {name!r} is at round {trial.at}, but the rounds are 0 to {last}: "
                "choose one of these, or -1 for the last"
            )
        for client in (trial.by, *trial.allies):
            if not 0 <= client < num_clients:
                raise Impossible(
                    f"the attack {name!r} is by client {client}, but there are {num_clients} "
                    f"clients, 0 to {num_clients - 1}"
                )
        if trial.planted:
            _check_canaries(audit, name, trial)
    elif told := [s for s in _worn_by(trial) if wants(s, "targets")]:
        raise Impossible(
            f"the attack {name!r}: {told[0]!r} is told whom to aim at by an attack on membership: "
            "name it as that attack's server"
        )
    if trial.coalition is None:
        return
    for seed in audit.seeds:
        try:
            check_members(trial.coalition, num_clients, Randomness(seed))
        except ValueError as error:
            raise Impossible(f"the attack {name!r}: {error}") from None
    if not any(map(trial.coalition.acts, range(audit.num_rounds))):
        raise Impossible(
            f"the attack {name!r} never happens: {trial.coalition.acts!r} is in none of the rounds "
            f"0 to {last}: choose an earlier one, or raise 'rounds'"
        )


def _check_canaries(audit: Audit, name: str, trial: Trial[Any]) -> None:
    federation = next(iter(audit.federations.values()))
    try:
        pose(audit, federation, trial.game, -1, audit.seeds[0])
    except ValueError as error:
        raise Impossible(f"the attack {name!r}: {error}") from None


def _worn_by(trial: Sabotage) -> list[Any]:
    worn = trial.coalition
    return [s for s in (trial.server, worn and worn.train) if s is not None]


def rows(audit: Audit, entry: Entry) -> list[Seat | None]:
    """Return the seats of an attack's rows: one that any federation opens is a row for all."""
    mounted = {s for f in audit.federations.values() for s in entry.trial.seats(f)}
    chosen = [s for s in Seat if s in mounted and (not entry.seats or s in entry.seats)]
    return [*chosen] or [*(entry.seats[:1] or (None,))]


def _cell(
    audit: Audit,
    name: str,
    trial: Trial[Any] | Sabotage,
    seat: Seat | None,
    defence: str,
    federation: Federation[Any, Any],
    seed: int,
) -> Planned:
    address = key(federation, audit.task_key, audit.num_rounds, seed, trial, seat)
    cell = Planned(address, defence, name, seat, seed)
    if seat not in trial.seats(federation):
        return replace(cell, settled=Blocked(why_blocked(trial, federation, seat)))
    if trial.coalition is not None:
        try:
            check_worn(federation, trial.coalition)
        except TypeError as error:
            return replace(cell, settled=Blocked(str(error)))
        if not _meets(audit, trial.coalition, federation, seed):
            missed = "in no round that a member of the coalition is sampled in does it act"
            return replace(cell, settled=Failed(f"{missed}: let it act more often"))
    if isinstance(trial, Sabotage):
        run = training_key(audit, federation, seed, trial.coalition, trial.server)
        return replace(cell, run=run, clean=training_key(audit, federation, seed))
    if trial.planted:
        if (promised := claim_of(audit, federation, trial.game, seat)).other_unit:
            why = f"{trial.game!r} asks what each {promised.unit} costs; here {promised.text}"
            cure = "play 'canaries', of records, or state what is claimed for each client"
            return replace(cell, settled=Blocked(f"{why}: {cure}"))
        run = planted_key(audit, federation, seed, trial.game)
        return replace(cell, run=run, clean=training_key(audit, federation, seed))
    told = aimed(audit, federation, trial, seed)
    run = training_key(audit, federation, seed, told.coalition, told.server)
    shadows = tuple(
        shadow_key(audit, federation, seed, trial.game, k)
        for k in range(num_suspects(trial) + num_shadows(trial))
    )
    return replace(cell, run=run, shadows=shadows)


def _meets(
    audit: Audit, coalition: Coalition[Any], federation: Federation[Any, Any], seed: int
) -> bool:
    """Say whether a coalition takes part at all: what never acts would be told for harmless."""
    num_clients, randomness = len(audit.task.clients), Randomness(seed)
    sampled = cohorts(federation, num_clients, num_rounds=audit.num_rounds, seed=seed)
    return any(
        coalition.acting(num_clients, t, randomness) & set(cohort)
        for t, cohort in enumerate(sampled)
    )


def aimed(
    audit: Audit, federation: Federation[Any, Any], trial: Trial[Any], seed: int
) -> Trial[Any]:
    """Return a trial whose server and coalition know which records it is about, if they ask.

    The question follows from the seed, so that it can be posed before the first round is played.
    """
    server, coalition = trial.server, trial.coalition
    told = [s for s in (server, coalition and coalition.train) if s and wants(s, "targets")]
    if not told:
        return trial
    apart = matches(trial.needs, ClientView)
    question, _ = pose(audit, federation, trial.game, trial.at, seed, trial.by, apart, trial.allies)
    targets = targets_of(question)
    if server in told:
        server = AimedBroadcast(server, *targets)
    if coalition is not None and coalition.train in told:
        coalition = replace(coalition, train=AimedTrain(coalition.train, *targets))
    return replace(trial, server=server, coalition=coalition)


def training_key(
    audit: Audit,
    federation: Federation[Any, Any],
    seed: int,
    coalition: Coalition[Any] | None = None,
    server: Broadcast | None = None,
) -> str:
    return key(trained(federation), audit.task_key, audit.num_rounds, seed, coalition, server)


def trained(federation: Federation[Any, Any]) -> Federation[Any, Any]:
    """Return what matters of a federation until it is trained: how a model is released does not."""
    if federation.release == WhiteBox() or not federation.yields_model:
        return federation  # replaced by an equal one, it would be checked anew
    return replace(federation, release=WhiteBox())


def remakers(federation: Federation[Any, Any]) -> list[Any]:
    """Return the stages at release that make another model of the one that is trained."""
    return [stage for stage in within(federation.release) if hasattr(stage, "remade")]


def shadow_key(
    audit: Audit, federation: Federation[Any, Any], seed: int, game: Any, shadow: int
) -> str:
    own = shadow_seed(game, shadow, seed)  # models of another way to draw seeds are not these
    return key(trained(federation), audit.task_key, audit.num_rounds, seed, game, shadow, own)


def planted_key(audit: Audit, federation: Federation[Any, Any], seed: int, game: Any) -> str:
    return key(trained(federation), audit.task_key, audit.num_rounds, seed, game, "planted")


def planted_run(
    audit: Audit, federation: Federation[Any, Any], game: Any, seed: int
) -> tuple[Task, Coalition[Any] | None]:
    """Return the task of a run with canaries, and the dishonest clients in it, if it has any."""
    _, truth = pose(audit, federation, game, -1, seed)
    task, coalition = game.planted(audit.task, federation, truth)
    return task, coalition


def claim_of(audit: Audit, federation: Federation[Any, Any], game: Any, seat: Seat | None) -> Claim:
    """Return what is claimed for what a game's canaries are, against a seat."""
    if game.claimed is not None:
        return Claim(game.unit, audit.delta, game.claimed, "stated in the game")
    sizes, rounds = audit.task.sizes, audit.num_rounds
    fitted = federation.planned(Schedule(rounds, sizes, audit.task.model))
    found = guarantees(fitted, num_records=min(sizes), num_rounds=rounds, delta=audit.delta)
    return claim(found, game.unit, seat, audit.delta)


def _trainings(audit: Audit, cell: Planned) -> list[Training]:
    trial = audit.entries[cell.attack].trial
    active = isinstance(trial, Sabotage) or trial.coalition is not None or trial.server is not None
    federation = audit.federations[cell.defence]
    remade = federation.yields_model and remakers(federation)
    remakes = frozenset({cell.defence}) if remade else frozenset[str]()
    planted = isinstance(trial, Trial) and trial.planted
    if isinstance(trial, Trial):
        trial = aimed(audit, federation, trial, cell.seed)
    run = Training(
        cell.run,
        cell.defence,
        cell.seed,
        cell.attack if active or planted else None,
        trial.coalition,
        trial.server,
        states=states_needed(trial, federation, audit.num_rounds),
        remakes=remakes,
        game=trial.game if planted else None,  # type: ignore[union-attr]
        planted=planted,
    )
    found = [run]
    if cell.clean and cell.clean != cell.run:
        found.append(Training(cell.clean, cell.defence, cell.seed, remakes=remakes))
    if isinstance(trial, Trial):
        found += [
            Training(
                k,
                cell.defence,
                cell.seed,
                states=run.states if trial.suspects else frozenset(),
                game=trial.game,
                shadow=i,
            )
            for i, k in enumerate(cell.shadows)
        ]
    return found


def states_needed(
    trial: Trial[Any] | Sabotage, federation: Federation[Any, Any], num_rounds: int
) -> frozenset[int]:
    """Return before which rounds a state must be kept so that the trial's view can be made."""
    if isinstance(trial, Sabotage) or trial.whole or is_model(trial):
        return frozenset()
    return frozenset({trial.at % num_rounds})


def is_model(trial: Trial[Any]) -> bool:
    """Say whether the trial attacks the final model, and not a round."""
    return matches(ModelView, trial.needs) or matches(QueryView, trial.needs)


def watch_of(trial: Trial[Any], num_rounds: int) -> Watch:
    """Return which views a run must keep for this trial."""
    rounds = None if trial.whole else frozenset({trial.at % num_rounds})
    return Watch(trial.needs, rounds)


def num_shadows(trial: Trial[Any]) -> int:
    """Return how many shadow models an attack asks for: none, unless it asks for ``shadows``."""
    wants = "shadows" in asks(code_of(trial.attack))[0]
    return int(trial.attack.num_shadows) if wants else 0  # type: ignore[attr-defined]


def num_suspects(trial: Trial[Any]) -> int:
    """Return how many federations a trial tells apart, the first of its shadows; mostly none."""
    return int(trial.game.num_suspects) if trial.suspects else 0  # type: ignore[attr-defined]


def pose(
    audit: Audit,
    federation: Federation[Any, Any],
    game: Any,
    at: int,
    seed: int,
    by: int = 0,
    apart: bool = False,
    allies: tuple[int, ...] = (),
) -> tuple[Any, Any]:
    """Return a game's question and truth: the same for all attacks that play the same game.

    In a graph the cohort of a round is whom the attacker's node, ``by``, hears in it. ``apart``
    leaves a client, ``by``, that attacks with its own data, and its ``allies``, out of its victims.
    """
    rounds, randomness = audit.num_rounds, Randomness(seed)
    num_clients = len(audit.task.clients)
    sampled = cohorts(federation, num_clients, num_rounds=rounds, seed=seed)
    cohort = sampled[at % rounds]
    if federation.graph is not None:
        near = neighbours_of(federation.graph, num_clients, randomness)[by]
        cohort = tuple(c for c in cohort if c in near)
    attackers = {by, *allies} if apart else set()
    cohort = tuple(c for c in cohort if c not in attackers)
    question, truth = game.pose(
        audit.task,
        took_part=frozenset().union(*sampled) - attackers,
        cohort=cohort,
        rng=randomness.at("pose" + fingerprint(game)),
    )
    return question, truth


def shadow_task(
    audit: Audit, candidates: tuple[Tensor, Tensor], game: Any, shadow: int, seed: int
) -> tuple[Task, Tensor]:
    """Return the task of one shadow model, and which candidates are in it.

    Two shadows share a draw: one has a random half of the candidates, the next has the other, so
    that each candidate is in exactly half of an even number of models. What is missing to the size
    of the real training set comes from the population that the attacker knows; clients are as
    large as the real ones, as far as that goes.
    """
    task, (inputs, labels) = audit.task, candidates
    rng = Randomness(seed).at("shadow" + fingerprint(game), shadow // 2)
    order = torch.randperm(len(labels), generator=rng)
    half = len(labels) // 2
    chosen = order[:half] if shadow % 2 == 0 else order[half:]
    inside = torch.zeros(len(labels), dtype=torch.bool)
    inside[chosen] = True
    x, y = inputs[chosen], labels[chosen]
    missing = sum(task.sizes) - len(y)
    if missing > 0 and task.public is not None:
        fill = torch.randperm(len(task.public[1]), generator=rng)[:missing]
        x, y = torch.cat([x, task.public[0][fill]]), torch.cat([y, task.public[1][fill]])
    mixed = torch.randperm(len(y), generator=rng)
    bounds = [0]
    for size in torch.tensor(task.sizes).cumsum(0).tolist():
        bounds.append(round(size * len(y) / sum(task.sizes)))
    clients = Shards(x[mixed], y[mixed], tuple(bounds))
    return replace(task, name=f"{task.name}, shadow {shadow}", clients=clients), inside


def world_of(
    audit: Audit,
    federation: Federation[Any, Any],
    game: Any,
    index: int,
    seed: int,
    posed: tuple[Any, Any],
) -> tuple[Federation[Any, Any], Task, int, bool]:
    """Return one federation of a game with suspects: how it is played, on what, and of which kind.

    Each has a seed of its own, so that no two share noise, nor a start unless the game says so.
    """
    rng = Randomness(seed).at("world" + fingerprint(game), index)
    own_seed = _drawn_seed(rng)
    task, second = game.world(audit.task, *posed, index, rng)
    if game.same_start:
        federation = replace(federation, begin=SameStart(federation.begin, seed))
    return federation, task, own_seed, second


def shadow_run(
    audit: Audit, federation: Federation[Any, Any], game: Any, shadow: int, seed: int
) -> tuple[Federation[Any, Any], Task, int]:
    """Return what a shadow training plays: the federation, the task, and the seed.

    Each has a seed of its own: start, cohorts, batches, dropout and noise are neither those of the
    target nor of another shadow. What is drawn of the data stays at the target's seed. A server or
    client did see the target's start, but does not use it: no attack is told more than its view.
    """
    posed = pose(audit, federation, game, -1, seed)
    if hasattr(game, "num_suspects"):
        return world_of(audit, federation, game, shadow, seed, posed)[:3]
    task, _ = shadow_task(audit, posed[0].candidates, game, shadow, seed)
    return federation, task, shadow_seed(game, shadow, seed)


def shadow_seed(game: Any, shadow: int, seed: int) -> int:
    """Return the seed of one shadow model, drawn from that of the target."""
    return _drawn_seed(Randomness(seed).at("shadow seed" + fingerprint(game), shadow))


def _drawn_seed(rng: Generator) -> int:
    return int(torch.randint(2**31 - 1, (1,), generator=rng))


def order_of(trainings: Mapping[str, Training]) -> Sequence[Training]:
    """Return trainings in the order in which to run them: those that others wait for first."""
    return sorted(trainings.values(), key=lambda t: (t.shadow is not None, t.attack is not None))

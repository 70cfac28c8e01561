"""Canaries: what training really spends, beside the epsilon that it claims."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Generator, Tensor

from turncoat.auditing.canaries import Diracs, Placed
from turncoat.auditing.evidence import Audited, audited
from turncoat.coalition import Clients, Coalition
from turncoat.messages import Envelope, Update
from turncoat.metrics.intervals import clopper_pearson
from turncoat.privacy import Claim, Unit
from turncoat.stage import Train, nested, within
from turncoat.task import Batch, Model, Task
from turncoat.trial import Marked, Measurement, Memberships
from turncoat.validate import at_least, positive

_SAYS = (
    "{who} can tell canaries apart so well that ε for each %s is {value} or more {interval}, where "
    "{baseline} is claimed (0: nothing is)."
)


@dataclass(frozen=True, slots=True)
class Records:
    """Records of which a fair coin let each take part, or not: which did is not here.

    ``client`` is who holds those that did; None if they were dealt to all who took part.
    """

    candidates: Batch = field(repr=False)
    population: Batch = field(repr=False)
    client: int | None = None


@dataclass(frozen=True, slots=True)
class Clutch:
    """What each of some dishonest clients would send; a fair coin let each do so, or not."""

    canaries: Diracs


@dataclass(frozen=True, slots=True)
class Planting:
    """Which canaries take part, and, of records, what they are and who holds each.

    Attributes:
        included: Shape: ``(canaries,)``, bool.
        owners: A client for each. Shape: ``(canaries,)``.
    """

    included: Tensor
    records: Batch | None = field(default=None, repr=False)
    owners: Tensor | None = field(default=None, repr=False)
    canaries: Diracs | None = None


@dataclass(frozen=True)
class Canaries:
    """Hide records in a federation, each by the fall of a coin, and see which can be told [1]_.

    They are added to what clients hold. Any attack on membership may look for them; the sharpest
    for this is ``gradient-regression``, which reads updates. Marked by
    the epsilon that training certainly exceeds, at the ``confidence`` and the audit's delta; the
    baseline is what the federation claims for each record against the attacker's seat, and 0 where
    it claims nothing. Beating it refutes the claim. That it is not beaten proves nothing.

    A claim for each client bounds a record too, but not as it is: to change one record of a client
    is to take that client away and to add another, and so counts twice.

    Args:
        num_canaries: How many, half of which take part on the average.
        client: Who holds them all; None: they are dealt to all who took part.
        records: Held-out records with wrong labels (``"mislabelled"``) or as they are
            (``"natural"``), or ``"noise"``: in every entry ``loudness`` or minus it, by a coin, and
            any label. A record may be anything, as far as a claim goes, and the less it is like
            others the better it is told.
        loudness: Of noise.
        claimed: An epsilon that is claimed for each record, where the stages do not say it.
        confidence: Of the bound.

    .. [1] Steinke, Nasr and Jagielski, NeurIPS 2023, algorithm 1. https://arxiv.org/abs/2305.08846
    """

    num_canaries: int = 200
    client: int | None = None
    records: Literal["mislabelled", "natural", "noise"] = "mislabelled"
    loudness: float = 10.0
    claimed: float | None = None
    confidence: float = 0.95
    family = "audit"
    unit = Unit.RECORD
    says = _SAYS % "record"

    def __post_init__(self) -> None:
        _check(self, self.num_canaries, self.claimed, self.confidence)
        at_least(0, self, client=self.client)
        positive(self, loudness=self.loudness)
        if self.records not in ("mislabelled", "natural", "noise"):
            raise ValueError(
                "Canaries: records must be 'mislabelled', 'natural' or 'noise'; it is "
                f"{self.records!r}"
            )

    def pose(
        self, task: Task, *, took_part: frozenset[int], cohort: tuple[int, ...], rng: Generator
    ) -> tuple[Records, Planting]:
        if self.client is not None and self.client not in took_part:
            raise ValueError(f"{self!r} gives them to a client that never took part: name another")
        holders = sorted(took_part) if self.client is None else [self.client]
        held, num_test = sum(task.sizes[c] for c in holders), len(task.test[1])
        if self.num_canaries > min(held, num_test - 1):
            raise ValueError(
                f"{self!r} has more canaries than data: its holders have {held} records, and of "
                f"the {num_test} that are held out one must be left: lower num_canaries"
            )
        chosen = torch.randperm(num_test, generator=rng)
        mine, left = chosen[: self.num_canaries], chosen[self.num_canaries :]
        inputs, labels = task.test[0][mine], task.test[1][mine]
        if self.records != "natural":
            labels = _wrong(self, task, labels, rng)
        if self.records == "noise":
            coins = torch.rand(inputs.shape, generator=rng) < 0.5
            inputs = torch.where(coins, self.loudness, -self.loudness).to(inputs)
        included = torch.rand(self.num_canaries, generator=rng) < 0.5
        owners = torch.tensor(holders)[torch.arange(self.num_canaries) % len(holders)]
        population = task.public or (task.test[0][left], task.test[1][left])
        asked = Records((inputs, labels), population, self.client)
        return asked, Planting(included, (inputs, labels), owners)

    def planted(
        self, task: Task, federation: Any, truth: Planting
    ) -> tuple[Task, Coalition[Any] | None]:
        """Return the task with the canaries among the records of those who hold them."""
        assert truth.records is not None and truth.owners is not None
        clients = []
        for c, (inputs, labels) in enumerate(task.clients):
            mine = truth.included & (truth.owners == c)
            added = truth.records[0][mine].to(inputs), truth.records[1][mine].to(labels)
            clients.append((torch.cat([inputs, added[0]]), torch.cat([labels, added[1]])))
        return replace(task, name=f"{task.name}, canaries", clients=tuple(clients)), None

    def mark(
        self, guess: Memberships, truth: Planting, *, rng: Generator, claim: Claim | None = None
    ) -> Marked:
        groups = {"all": torch.ones_like(truth.included)}
        return _marked(self, guess, truth, groups, claim)


@dataclass(frozen=True)
class ClientCanaries:
    """Let dishonest clients join a federation, each by the fall of a coin, and see which did [1]_.

    Each sends an update of one entry, in the place of what it would have trained, through the
    federation's own sampling, channel and rule; where clients add noise while they train, it adds
    it too. Marked as ``Canaries``, beside what is claimed for each client. What is claimed for each
    record bounds no client, and is not to be had beside.

    Who is left out is not there; but where a guarantee takes for granted that all know who is, it
    sends an update of zeros.

    Args:
        num_canaries: How many clients are added, half of which send theirs on the average.
        length: Of each update: far above any bound that a rule may clip to.
        claimed: An epsilon that is claimed for each client, where the stages do not say it.
        confidence: Of the bound.

    .. [1] Steinke, Nasr and Jagielski, NeurIPS 2023, section 5, with canaries of Nasr et al.,
       USENIX Security 2023. https://arxiv.org/abs/2305.08846, https://arxiv.org/abs/2302.07956
    """

    num_canaries: int = 200
    length: float = 1000.0
    claimed: float | None = None
    confidence: float = 0.95
    family = "audit"
    unit = Unit.CLIENT
    says = _SAYS % "client"

    def __post_init__(self) -> None:
        _check(self, self.num_canaries, self.claimed, self.confidence)
        positive(self, length=self.length)

    def pose(
        self, task: Task, *, took_part: frozenset[int], cohort: tuple[int, ...], rng: Generator
    ) -> tuple[Clutch, Planting]:
        canaries = Placed(
            num_canaries=self.num_canaries, length=self.length, layout=task.model.layout
        )
        included = torch.rand(self.num_canaries, generator=rng) < 0.5
        return Clutch(canaries), Planting(included, canaries=canaries)

    def planted(
        self, task: Task, federation: Any, truth: Planting
    ) -> tuple[Task, Coalition[Any] | None]:
        """Return the task with a client for each canary, and what these clients wear."""
        assert truth.canaries is not None
        if federation.graph is not None:
            raise ValueError(
                f"{self!r} adds clients to a server's, and {federation.graph!r} says who hears "
                "whom: play 'canaries', of records"
            )
        noisy = _noisy(federation)
        present = truth.included.clone()
        if noisy is not None and not getattr(noisy, "amplified", True):
            present[:] = True  # who is there is public: out means zeros
        which, num_clients = present.nonzero().flatten(), len(task.clients)
        if not len(which):
            raise ValueError(f"{self!r} leaves no canary: give it more")
        one = tuple(part[:1] for part in task.population)
        clients = (*task.clients, *[(one[0], one[1])] * len(which))
        sent = Planted(truth.canaries, truth.included, which, num_clients)
        members = Clients(tuple(range(num_clients, num_clients + len(which))))
        worn = _within(federation.train, sent) if noisy in within(federation.train) else sent
        names = task.client_names and (*task.client_names, *("canary",) * len(which))
        planted = replace(
            task, name=f"{task.name}, canaries", clients=clients, client_names=names or ()
        )
        return planted, Coalition(members=members, train=worn)

    def mark(
        self, guess: Memberships, truth: Planting, *, rng: Generator, claim: Claim | None = None
    ) -> Marked:
        assert truth.canaries is not None
        return _marked(self, guess, truth, truth.canaries.groups, claim)


@dataclass(frozen=True, eq=False)
class Planted:
    """A dishonest client's training: its canary is its update, or zeros if it is left out.

    Attributes:
        which: The canaries of the clients from ``first`` on.
    """

    canaries: Diracs
    included: Tensor
    which: Tensor
    first: int

    def __call__(self, model: Model, start: Tensor, data: Batch, *, envelope: Envelope) -> Update:
        i = int(self.which[envelope.sender - self.first])
        delta = torch.zeros_like(start)
        if self.included[i]:
            sign = float(self.canaries.signs(envelope.round)[i])
            delta[int(self.canaries.places[i])] = self.canaries.length * sign
        return Update(delta, 1.0)


def _check(owner: Any, num_canaries: int, claimed: float | None, confidence: float) -> None:
    at_least(10, owner, num_canaries=num_canaries)
    positive(owner, claimed=claimed)
    if not 0 < confidence < 1:
        raise ValueError(
            f"{type(owner).__name__}: confidence must lie between 0 and 1; it is {confidence}"
        )


def _wrong(owner: Canaries, task: Task, labels: Tensor, rng: Generator) -> Tensor:
    """Return other labels than these, each as likely as any other."""
    if labels.ndim != 1 or labels.is_floating_point():
        raise ValueError(
            f"{owner!r} gives records another class, and the labels of {task.name!r} are none: let "
            "records be 'natural'"
        )
    num_classes = max(len(task.classes), int(task.test[1].max()) + 1)
    if num_classes < 2:
        raise ValueError(f"{owner!r} needs a second class: let records be 'natural'")
    shift = torch.randint(1, num_classes, labels.shape, generator=rng).to(labels)
    return (labels + shift) % num_classes


def _noisy(federation: Any) -> Any:
    """Return the stage whose noise is for each client, if there is one."""
    places = (federation.train, federation.channel, federation.aggregate)
    stages = [s for place in places for s in within(place)]
    of_clients = (s for s in stages if hasattr(s, "event") and s.unit is Unit.CLIENT)
    return next(of_clients, None)


def _within(train: Any, sent: Train[Update]) -> Any:
    """Return a training with what it wraps, to the core, replaced."""
    inside = [s for s, _ in nested(train)]
    if not inside:
        return sent
    return replace(train, inner=_within(train.inner, sent))


def _marked(
    game: Canaries | ClientCanaries,
    guess: Memberships,
    truth: Planting,
    groups: dict[str, Tensor],
    claim: Claim | None,
) -> Marked:
    scores = guess.scores.detach().cpu().double()
    if scores.shape != truth.included.shape:
        raise ValueError(
            f"a score for each of {len(truth.included)} canaries is due; the guess has the shape "
            f"{tuple(scores.shape)}"
        )
    promised = claim or Claim(game.unit, 1e-5, game.claimed, "")
    found = audited(
        scores,
        truth.included,
        groups,
        claimed=promised.epsilon if promised.epsilon != float("inf") else None,
        delta=promised.delta,
        confidence=game.confidence,
    )
    base, best = found.claimed or 0.0, found.best

    def epsilon(name: str, value: float) -> Measurement:
        return Measurement(name, value, base, value, value, worst=max(found.most, base))

    interval = clopper_pearson(best.num_right, best.num_guesses)
    right = best.num_right / best.num_guesses
    return Marked(
        epsilon("epsilon_lower_bound", found.epsilon),
        (
            Measurement("guess_accuracy", right, 0.5, *interval, worst=1.0),
            epsilon("epsilon_if_gaussian", found.gaussian_epsilon),
        ),
        _exhibits(game, found),
    )


def _exhibits(game: Canaries | ClientCanaries, found: Audited) -> dict[str, Tensor]:
    claimed = float("nan") if found.claimed is None else found.claimed
    numbers = {
        "claimed_epsilon": claimed,
        "epsilon_lower_bound": found.epsilon,
        "epsilon_most": found.most,
        "delta": found.delta,
        "confidence": found.confidence,
        "num_canaries": found.num_canaries,
        "num_guesses": found.best.num_guesses,
        "num_right": found.best.num_right,
        "of_clients": game.unit is Unit.CLIENT,
    }
    return {name: torch.tensor([float(n)], dtype=torch.float64) for name, n in numbers.items()}

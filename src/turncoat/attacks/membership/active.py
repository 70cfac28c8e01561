"""Membership from how others react: the loss of the records in question is raised, then one looks.

Whoever holds a record lowers its loss again as soon as it trains; all others do so by chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from turncoat.attacks.membership.white_box import (
    ALL,
    Colluders,
    Feature,
    averaged,
    check_read,
    counts,
    evidence,
    suspicion,
)
from turncoat.federation import Same
from turncoat.messages import Envelope, Update
from turncoat.stage import Broadcast, Train, call
from turncoat.task import Batch, Model
from turncoat.trial import Memberships
from turncoat.validate import at_least, positive
from turncoat.views import ClientView, ServerView

_SAME = Same()


@dataclass(frozen=True)
class GradientAscent:
    """Send a state in which the loss of the targets is higher: some steps up its gradient [1]_.

    A malicious server's, who is told the targets by its attack: all records that are in question,
    and those that it knows. Who holds one has reason to undo that, and its update shows it. The
    server's own state stays what it was, so that nothing adds up over the rounds.

    Differs from the paper: with ``num_parts`` not all targets are raised at once.

    Args:
        lr: The step size, on the mean loss of the targets of the round.
        num_steps: How many steps up.
        num_parts: Into how many parts the targets are divided; one is raised in each round, in
            turn.
        first: The round with which to begin. What an honest round tells is told first.

    .. [1] Nasr, Shokri and Houmansadr, S&P 2019, section II.C (the active attacker).
       https://arxiv.org/abs/1812.00910
    """

    lr: float = 0.3
    num_steps: int = 5
    num_parts: int = 1
    first: int = 0

    def __post_init__(self) -> None:
        positive(self, lr=self.lr)
        at_least(1, self, num_steps=self.num_steps, num_parts=self.num_parts)
        at_least(0, self, first=self.first)

    def __call__(
        self, params: Tensor, *, model: Model, envelope: Envelope, targets: Batch
    ) -> Tensor:
        if envelope.round < self.first:
            return params
        part = slice(envelope.round % self.num_parts, None, self.num_parts)
        inputs, labels = targets[0][part], targets[1][part]
        here = params.clone()
        for _ in range(self.num_steps if len(labels) else 0):
            here += self.lr * model.gradient(here, (inputs, labels))
        return here


@dataclass(frozen=True, kw_only=True)
class Isolation:
    """Send one client what it came to itself, round after round, and nothing of the others [1]_.

    It trains alone, and so comes to know its records by heart; the others go on without notice. It
    takes messages that can be read: where they cannot, the victim gets what all get.

    Args:
        victim: Whom to isolate.
        inner: What is done to the state before the victim gets it, such as ``GradientAscent``.

    .. [1] Nasr, Shokri and Houmansadr, S&P 2019, section II.C (isolating).
       https://arxiv.org/abs/1812.00910
    """

    victim: int
    inner: Broadcast = _SAME
    withholds = frozenset({"rng"})

    def __post_init__(self) -> None:
        at_least(0, self, victim=self.victim)

    def __call__(
        self, params: Tensor, *, envelope: Envelope, last: Tensor | None, **offers: Any
    ) -> Tensor:
        if envelope.sender != self.victim:
            return params
        start = params if last is None else last
        sent: Tensor = call(self.inner, start, envelope=envelope, last=last, **offers)
        return sent


@dataclass(frozen=True, kw_only=True)
class ActiveGlobalAttacker:
    """Raise the loss of the records in question, and see whose update brings it down again [1]_.

    A malicious server's. An update is read as ``GlobalAttacker`` reads it. Where all were sent the
    same, what counts is how far a client goes beyond the mean of the others: what is easily
    learnt is learnt by all. Of several senders the most suspicious counts, unless the game names
    the client in question.

    Differs from the paper: no net is trained on known members (``WhiteBoxNet`` is, and may be given
    the same server); the contrast with other clients is not in it.

    Args:
        server: What it sends: ``GradientAscent``, ``Isolation``, or the two together; ``Same`` is
            the passive attack.
        features: As in ``GlobalAttacker``.
        rounds: Which rounds count, by number; None for all.

    .. [1] Nasr, Shokri and Houmansadr, S&P 2019, section II.C. https://arxiv.org/abs/1812.00910
    """

    server: Broadcast = GradientAscent()
    features: tuple[Feature, ...] = ALL
    rounds: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_read(self, self.features, self.rounds)

    def __call__(
        self,
        view: Sequence[ServerView[Update]],
        *,
        candidates: Batch,
        population: Batch,
        client: int | None,
    ) -> Memberships:
        def most(seen: ServerView[Update]) -> Tensor | None:
            if client is not None and client not in seen.senders:
                return None
            alike = all(torch.equal(sent, seen.sent[0]) for sent in seen.sent[1:])
            asked = [i for i, sender in enumerate(seen.senders) if client in (None, sender)]
            deltas = [message.delta for message in seen.messages]
            if alike and len(deltas) > 1:
                every = contrast(seen.model, seen.sent[0], deltas, candidates, self.features)
                return every[asked].amax(dim=0)
            found = [
                suspicion(
                    seen.model, seen.sent[i], deltas[i], candidates, population, self.features
                )
                for i in asked
            ]
            return torch.stack(found).amax(dim=0) if found else None

        return averaged(self, [most(v) for v in view if counts(self.rounds, v.round)])


def contrast(
    model: Model,
    before: Tensor,
    deltas: Sequence[Tensor],
    candidates: Batch,
    features: Sequence[Feature] = ALL,
) -> Tensor:
    """Return how far each update goes beyond the mean of the others for each candidate.

    In standard deviations over the candidates, averaged over layers, then over features.

    Args:
        deltas: Two or more, of those who all began at ``before``.

    Returns:
        Shape: ``(deltas, candidates)``, float64.
    """
    total = torch.zeros(len(deltas), len(candidates[1]), dtype=torch.float64, device=before.device)
    for feature in features:
        every = torch.stack([evidence(model, before, d, candidates, feature) for d in deltas])
        others = (every.sum(dim=0) - every) / (len(every) - 1)
        apart = every - others
        apart = apart - apart.mean(dim=2, keepdim=True)
        apart = apart / apart.std(dim=2, keepdim=True).clamp(min=1e-12)
        total += apart.mean(dim=1) / len(features)
    return total


@dataclass(frozen=True)
class Ascending:
    """Train as ``inner`` does, and add the way up the loss of the targets to the update [1]_.

    .. [1] Nasr, Shokri and Houmansadr, S&P 2019, section II.C. https://arxiv.org/abs/1812.00910
    """

    inner: Train[Update]
    ascent: GradientAscent
    boost: float

    def __call__(
        self,
        model: Model,
        start: Tensor,
        data: Batch,
        *,
        envelope: Envelope,
        targets: Batch,
        **offers: Any,
    ) -> Update:
        payload: Update = call(self.inner, model, start, data, envelope=envelope, **offers)
        above = self.ascent(start, model=model, envelope=envelope, targets=targets)
        return replace(payload, delta=payload.delta + self.boost * (above - start))


@dataclass(frozen=True, kw_only=True)
class ActiveLocalAttacker:
    """Take part, send the way up the targets' loss, and see how the others bring it down [1]_.

    A malicious participant's, the client ``by`` of the trial. In each round it trains, and adds the
    ascent to its update. Of the step it subtracts what it sent itself, as ``Colluders`` do; what is
    left is how the others react to a state in which the targets' loss is raised. The last round's
    reaction is not seen, for the next state tells it. What counts is how far they go beyond its own
    honest update, which began at the same state.

    Differs from the paper: as ``ActiveGlobalAttacker``.

    Args:
        ascent: How the loss is raised.
        boost: By how much the way up is stretched: so many clients as share the mean, if it is to
            arrive in full.
        inner: How it trains; without, as the federation does.
        features: As in ``GlobalAttacker``.
        rounds: Which rounds count, by number; None for all.
        rest: How many examples the others hold together; None: one other is left, as in
            ``Colluders``.

    .. [1] Nasr, Shokri and Houmansadr, S&P 2019, section II.C (the active local attacker).
       https://arxiv.org/abs/1812.00910
    """

    inner: Train[Update]
    ascent: GradientAscent = GradientAscent()
    boost: float = 1.0
    features: tuple[Feature, ...] = ALL
    rounds: tuple[int, ...] | None = None
    rest: float | None = None

    def __post_init__(self) -> None:
        positive(self, boost=self.boost)
        if self.rest is not None:
            positive(self, rest=self.rest)
        check_read(self, self.features, self.rounds)

    @property
    def worn(self) -> Train[Update]:
        """What its client wears in the place of the federation's training."""
        return Ascending(self.inner, self.ascent, self.boost)

    def __call__(self, view: Sequence[ClientView[Update]], *, candidates: Batch) -> Memberships:
        mine = {v.round: v for v in view}
        found: list[Tensor | None] = []
        for t, before, theirs in Colluders(rest=self.rest).residues(view):
            if not counts(self.rounds, t):
                continue
            seen = mine[t]
            envelope = Envelope(seen.client, (seen.client,), t)
            above = self.ascent(before, model=seen.model, envelope=envelope, targets=candidates)
            own = seen.mine.delta - self.boost * (above - before)
            found.append(contrast(seen.model, before, [theirs, own], candidates, self.features)[0])
        return averaged(self, found)

"""Membership from what moved a model: an update, a sum of updates, or what is left of a sum."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Literal

import torch
from torch import Tensor
from torch.func import grad, vmap

from turncoat.attacks.membership.lira import confidence
from turncoat.messages import Update
from turncoat.task import Batch, Model
from turncoat.trial import Memberships
from turncoat.validate import at_least, one_of, positive
from turncoat.views import AggregateView, ClientView, ModelView, ServerView

Feature = Literal["alignment", "gradient-norm", "confidence"]
ALL: tuple[Feature, ...] = ("alignment", "gradient-norm", "confidence")
Moved = tuple[int, Tensor, Tensor]  # the round, a state, and by what it was moved
_CHUNK = 64  # records whose gradients are held at once


@dataclass(frozen=True)
class GlobalAttacker:
    """Read single updates at the server: did the record's gradient shape one of them? [1]_

    For every round and each layer: how far the update points along minus the record's gradient at
    the state that was sent (``"alignment"``, a cosine); how small its gradient has become at the
    client's own model (``"gradient-norm"``); and how much surer than before that model is of the
    label (``"confidence"``). Each is counted in standard deviations of the population, who are no
    members; layers, features and rounds are averaged. Of several senders the most suspicious
    counts, unless the game names the client in question.

    Differs from the paper: no net is trained on records that are known to be members, for none are
    granted; activations of hidden layers are left out, which the paper finds to add nothing.

    Args:
        features: Which of these to read.
        rounds: Which rounds count, by number; None for all.

    .. [1] Nasr, Shokri and Houmansadr, S&P 2019, sections II.B and III (the passive global
       attacker). https://arxiv.org/abs/1812.00910
    """

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
            found = [
                suspicion(seen.model, sent, message.delta, candidates, population, self.features)
                for sender, sent, message in zip(
                    seen.senders, seen.sent, seen.messages, strict=True
                )
                if client in (None, sender)
            ]
            return torch.stack(found).amax(dim=0) if found else None

        return averaged(self, [most(v) for v in view if counts(self.rounds, v.round)])


@dataclass(frozen=True)
class LocalAttacker:
    """Read the global model's steps, as any participant sees them, for whose records they fit [1]_.

    As ``GlobalAttacker`` reads an update; but a step is a sum of all, in which each record is the
    fainter the more there are.

    Differs from the paper: as ``GlobalAttacker``.

    Args:
        features: As in ``GlobalAttacker``.
        rounds: Which rounds count, by number; None for all.

    .. [1] Nasr, Shokri and Houmansadr, S&P 2019, section II.B (the passive local attacker).
       https://arxiv.org/abs/1812.00910
    """

    features: tuple[Feature, ...] = ALL
    rounds: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_read(self, self.features, self.rounds)

    def __call__(
        self, view: Sequence[AggregateView[Update]], *, candidates: Batch, population: Batch
    ) -> Memberships:
        moved = ((v.round, v.before, v.after - v.before) for v in view)
        return _read(self, view[0].model, moved, candidates, population)


@dataclass(frozen=True)
class Colluders:
    """Subtract the coalition's own updates from the step, and read what is left [1]_.

    The members are honest participants who pool what they see: the attacker and its ``allies``.
    Behind a weighted mean what is left is the mean update of all others, with or without secure
    aggregation; where one is left, it is that one's update. The step of the last round is not
    seen, for the next round's state tells it. Another rule than the mean leaves something else.

    Differs from the paper: its attackers do not collude; as ``GlobalAttacker`` else.

    Args:
        features: As in ``GlobalAttacker``.
        rounds: Which rounds count, by number; None for all.
        rest: How many examples the others hold together. None: one other is left, who holds as
            many as a member does on the average.

    .. [1] Nasr, Shokri and Houmansadr, S&P 2019, section II.B. https://arxiv.org/abs/1812.00910
    """

    features: tuple[Feature, ...] = ALL
    rounds: tuple[int, ...] | None = None
    rest: float | None = None

    def __post_init__(self) -> None:
        check_read(self, self.features, self.rounds)
        if self.rest is not None:
            positive(self, rest=self.rest)

    def __call__(
        self, view: Sequence[ClientView[Update]], *, candidates: Batch, population: Batch
    ) -> Memberships:
        return _read(self, view[0].model, self.residues(view), candidates, population)

    def residues(self, view: Sequence[ClientView[Update]]) -> Iterator[Moved]:
        """Yield the others' mean update in each round whose next one is seen too."""
        ordered = sorted(view, key=lambda v: v.round)
        rounds = [(t, list(some)) for t, some in groupby(ordered, key=lambda v: v.round)]
        for (t, now), (following, after) in pairwise(rounds):
            if following == t + 1:
                step = after[0].before - now[0].before
                yield t, now[0].before, residue(step, [v.mine for v in now], self.rest)


def residue(step: Tensor, own: Sequence[Update], rest: float | None = None) -> Tensor:
    """Return the mean update of the others in a weighted mean of theirs and of ``own``.

    In float64, as far as the step's own float32 goes.

    Args:
        rest: The others' weight; None: the mean weight of ``own``.
    """
    known = sum(update.weight for update in own)
    theirs = known / len(own) if rest is None else rest
    left = step.double() * (known + theirs)
    for update in own:
        left -= update.weight * update.delta.double()
    return (left / theirs).to(step)


def moved_by(
    view: ServerView[Update] | AggregateView[Update], client: int | None
) -> Iterator[Moved]:
    """Yield by what a client moved its state in a round, or all did: nothing if it was not there.

    Where single updates are not seen, or no client is named, it is the step of all.
    """
    if isinstance(view, AggregateView):
        yield view.round, view.before, view.after - view.before
    elif client is None:
        yield view.round, torch.stack(view.sent).mean(dim=0), Update.total(view.messages).delta
    elif client in view.senders:
        i = view.senders.index(client)
        yield view.round, view.sent[i], view.messages[i].delta


def suspicion(
    model: Model,
    before: Tensor,
    delta: Tensor,
    candidates: Batch,
    population: Batch,
    features: Sequence[Feature] = ALL,
) -> Tensor:
    """Return how much an update looks as if it was trained on each candidate: the higher, the more.

    In standard deviations of the population, averaged over layers, then over features. Shape:
    ``(candidates,)``, float64.
    """
    total = torch.zeros(len(candidates[1]), dtype=torch.float64, device=delta.device)
    for feature in features:
        theirs = evidence(model, before, delta, population, feature)
        centre, scale = theirs.mean(dim=1), theirs.std(dim=1).clamp(min=1e-12)
        ours = evidence(model, before, delta, candidates, feature)
        total += ((ours - centre[:, None]) / scale[:, None]).mean(dim=0)
    return total / len(features)


def evidence(model: Model, before: Tensor, delta: Tensor, data: Batch, feature: Feature) -> Tensor:
    """Return one feature of each record, layer by layer. Shape: ``(layers, records)``, float64."""
    if feature == "confidence":
        here, there = (ModelView(model, params) for params in (before, before + delta))
        return (confidence(there, data) - confidence(here, data))[None]
    at = before if feature == "alignment" else before + delta
    slots = [slice(s.start, s.stop) for s in model.layout.slots if s.trainable]
    parts = []
    for some in gradients(model, at, data):
        sizes = torch.stack([some[:, s].norm(dim=1) for s in slots]).double()
        if feature == "gradient-norm":
            parts.append(-sizes.clamp(min=1e-30).log())
        else:
            along = torch.stack([-(some[:, s] @ delta[s]) for s in slots]).double()
            length = torch.stack([delta[s].norm() for s in slots]).double()[:, None]
            parts.append(along / (sizes * length).clamp(min=1e-30))
    return torch.cat(parts, dim=1)


def gradients(model: Model, params: Tensor, data: Batch) -> Iterator[Tensor]:
    """Yield the gradients of some records' own losses, in evaluation mode, a row each."""

    def loss(params: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return model.criterion(model.logits(params, x[None]), y[None])

    each = vmap(grad(loss), in_dims=(None, 0, 0))
    for inputs, labels in zip(*(torch.split(part, _CHUNK) for part in data), strict=True):
        yield each(params.detach(), inputs, labels)


def _read(
    attack: LocalAttacker | Colluders,
    model: Model,
    moved: Iterator[Moved],
    candidates: Batch,
    population: Batch,
) -> Memberships:
    return averaged(
        attack,
        [
            suspicion(model, before, delta, candidates, population, attack.features)
            for t, before, delta in moved
            if counts(attack.rounds, t)
        ],
    )


def averaged(attack: object, found: Sequence[Tensor | None]) -> Memberships:
    known = [scores for scores in found if scores is not None]
    if not known:
        raise ValueError(
            f"{attack!r} saw no step of anyone in question in the rounds that count: let it see "
            "two rounds or more, and the client take part in them"
        )
    return Memberships(torch.stack(known).mean(dim=0))


def counts(rounds: tuple[int, ...] | None, t: int) -> bool:
    return rounds is None or t in rounds


def check_read(
    attack: object, features: tuple[Feature, ...], rounds: tuple[int, ...] | None
) -> None:
    name = type(attack).__name__
    if not features or len(set(features)) < len(features):
        raise ValueError(f"{name}: features must name one or more of {', '.join(ALL)}, each once")
    for feature in features:
        one_of(Feature, attack, features=feature)
    if rounds is not None:
        if not rounds:
            raise ValueError(f"{name}: rounds must name one or more, or be None for all")
        at_least(0, attack, **{f"rounds[{i}]": t for i, t in enumerate(rounds)})

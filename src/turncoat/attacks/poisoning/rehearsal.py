"""The round as a coalition can play it beforehand: the server's rule, on what it will read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor

from turncoat.messages import Revealed, Update, rows
from turncoat.stage import PLACES, Aggregate, Memory, Trace, Verdict, asks, call, code_of, within
from turncoat.views import CoalitionView


class RuleUnknown(ValueError):
    """A forge needs the server's rule, and the coalition cannot play it."""


@dataclass(frozen=True)
class Rehearsal:
    """What a rule would make of forged updates, among everyone else's.

    Everyone else's updates are the known ones. Where a coalition knows only its own, it takes them
    for the first of the others and draws the rest: each coordinate normal, with the mean and
    deviation of its own, as Fang et al. (USENIX Security 2020) presume. So the rule meets as many
    messages as in earnest, and keeps its parameters.

    The rule starts without a memory: the server's is not known.
    """

    view: CoalitionView[Update] = field(repr=False)
    messages: tuple[Update, ...] = field(repr=False)
    mean: Tensor = field(repr=False)
    seed: int

    @classmethod
    def of(cls, view: CoalitionView[Update], rng: Generator) -> Rehearsal:
        seed = int(torch.randint(2**31, (), generator=rng))
        known = rows(view.known)
        num_others = max(view.num_clients - len(view.own), len(known))
        matrix = known.new_empty(num_others + len(view.own), known.shape[1])
        matrix[: len(known)] = known
        mean = known.mean(dim=0)
        if len(known) < num_others:
            spread = known.std(dim=0) if len(known) > 1 else torch.zeros_like(mean)
            for i in range(len(known), num_others):
                matrix[i] = mean + spread * torch.randn(mean.shape, generator=rng).to(mean)
        weights = [u.weight for u in view.known]
        weights += [sum(weights) / len(weights)] * (num_others - len(known))
        weights += [u.weight for u in view.own]
        messages = tuple(Update(row, w) for row, w in zip(matrix, weights, strict=True))
        return cls(view, messages, mean, seed)

    def step(self, rule: Aggregate[Update], forged: Tensor) -> Tensor:
        """Return the step of the rule. ``forged``: ``(members, num_params)``, or one for all."""
        rows(self.messages)[-len(self.view.own) :] = forged
        offers: dict[str, Any] = {
            "rng": Generator().manual_seed(self.seed),
            "memory": Memory(),
            "model": self.view.model,
            "before": self.view.before,
            "cohort": tuple(range(len(self.messages))),
            "trace": Trace(),
            "verdict": Verdict(),
        }
        if self.view.public is not None:
            offers["public"] = self.view.public
        for stage in within(rule):
            for name in sorted(asks(code_of(stage))[0] & PLACES[Aggregate].offers - offers.keys()):
                raise RuleUnknown(
                    f"{stage!r} asks for {name!r}, which no coalition has: it cannot be rehearsed; "
                    "wear a forge that needs no rule (min-max)"
                )
        made = call(rule, self.messages, **offers)
        step: Tensor = made.open() if isinstance(made, Revealed) else made
        return step

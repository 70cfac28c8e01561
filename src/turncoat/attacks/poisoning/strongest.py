"""All attacks at once: whichever leads the model furthest astray in this round is sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Literal

import torch
from torch import Generator, Tensor

from turncoat.attacks.poisoning.alie import ALIE
from turncoat.attacks.poisoning.fang import FangKrum, FangTrimmedMean
from turncoat.attacks.poisoning.ipm import IPM
from turncoat.attacks.poisoning.min_max import MinMax, MinSum
from turncoat.attacks.poisoning.rehearsal import Rehearsal, RuleUnknown
from turncoat.attacks.poisoning.sign_flip import SignFlip
from turncoat.attacks.poisoning.tailored import Tailored
from turncoat.coalition import Forge
from turncoat.messages import Update, rows
from turncoat.randomness import Randomness
from turncoat.stage import Aggregate, Memory, call
from turncoat.stages.aggregate.coordinatewise import Median, TrimmedMean
from turncoat.stages.aggregate.krum import MultiKrum
from turncoat.stages.aggregate.mean import Mean
from turncoat.validate import one_of
from turncoat.views import CoalitionView

By = Literal["distance", "against"]
FORGES: tuple[Forge[Update], ...] = (
    SignFlip(),
    IPM(),
    ALIE(),
    MinMax(),
    MinSum(),
    FangKrum(),
    FangTrimmedMean(),
    Tailored(),
    Tailored("unit"),
)


@dataclass(frozen=True)
class Strongest:
    """Try several forges on the server's rule, and send what leads it furthest astray. A forge.

    As AutoAttack does for evasion [1]_: an ensemble without a parameter, of which the worst counts,
    round by round. Where the rule is not known, or cannot be rehearsed, a panel of rules stands for
    it, and the forge is kept that does best on average, each rule's best counting 1. Forges that
    need a rule are left out then.

    Differs from what it is modelled on: members hold no data when they forge, so that damage is
    measured by the step alone: by how far it goes against the mean of the honest, to which the loss
    answers in first order, or by its distance from that mean (which counts where it is zero), the
    second: but a rule that picks an honest outlier has gone far too. Forges that remember believe
    that theirs was sent in every round.

    Args:
        forges: In the order in which equals are preferred.
        panel: None for mean, median, trimmed mean and Multi-Krum against as many as the coalition.
        by: What is maximised.

    .. [1] Croce & Hein, ICML 2020. https://arxiv.org/abs/2003.01690
    """

    forges: tuple[Forge[Update], ...] = FORGES
    panel: tuple[Aggregate[Update], ...] | None = None
    by: By = "against"

    def __post_init__(self) -> None:
        if not self.forges:
            raise ValueError("Strongest: forges is empty: give at least one")
        if self.panel is not None and not self.panel:
            raise ValueError("Strongest: panel is empty: give at least one rule, or none at all")
        one_of(By, self, by=self.by)

    def __call__(
        self, view: CoalitionView[Update], *, rng: Generator, memory: Memory[None]
    ) -> Sequence[Update]:
        root = Randomness(int(torch.randint(2**31, (), generator=rng)))
        rehearsal = Rehearsal.of(view, root.at("rehearsal"))
        made: list[Sequence[Update]] = []
        for i, forge in enumerate(self.forges):
            own = Memory[None](memory.cell, f"{memory.path}/{i}")
            try:
                made.append(call(forge, view, rng=root.at("forge", i), memory=own))
            except RuleUnknown:
                continue
        if not made:
            raise RuleUnknown(f"{self!r}: each of the forges needs a rule that is known: add one")
        try:
            if view.rule is None:
                raise RuleUnknown
            scores = self._scores(rehearsal, (view.rule,), made)
        except RuleUnknown:
            scores = self._scores(rehearsal, self.panel or _panel(view), made)
        return made[int(scores.argmax())]

    def _scores(
        self,
        rehearsal: Rehearsal,
        rules: Sequence[Aggregate[Update]],
        made: Sequence[Sequence[Update]],
    ) -> Tensor:
        """Return how well each did. Shape: ``(forges,)``."""
        damage = torch.tensor(
            [[self._damage(rehearsal, rule, rows(forged)) for forged in made] for rule in rules]
        )
        best = damage.amax(dim=1, keepdim=True)
        return (damage / best.where(best > 0, torch.ones_like(best))).mean(dim=0)

    def _damage(self, rehearsal: Rehearsal, rule: Aggregate[Update], forged: Tensor) -> float:
        if not bool(torch.isfinite(forged).all()):
            return 0.0  # the server drops it
        astray = (rehearsal.step(rule, forged) - rehearsal.mean).double()
        if self.by == "distance" or not rehearsal.mean.any():
            damage = float(astray.norm())
        else:
            damage = -float(astray @ rehearsal.mean.double())
        return damage if isfinite(damage) else 0.0


def _panel(view: CoalitionView[Update]) -> tuple[Aggregate[Update], ...]:
    n, m = view.num_clients, len(view.own)
    rules: list[Aggregate[Update]] = [Mean(), Median()]
    if n > 2 * m:
        rules.append(TrimmedMean(m))
    if n >= 2 * m + 3:
        rules.append(MultiKrum(m))
    return tuple(rules)

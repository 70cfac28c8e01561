"""The forgery that leads one rule furthest astray: the rule itself is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor, inf, isfinite, log2

from torch import Generator

from turncoat.attacks.poisoning.min_max import Line, Perturbation, diameter, least_root
from turncoat.attacks.poisoning.rehearsal import Rehearsal, RuleUnknown
from turncoat.messages import Update, rows, with_rows
from turncoat.validate import at_least, one_of
from turncoat.views import CoalitionView


@dataclass(frozen=True)
class Tailored:
    """Go from the honest mean as far as leads the server's rule furthest from it [1]_. A forge.

    ``mean + gamma p`` for the gamma that leads the rule furthest along p. Of rules that select it
    is the largest at which the forged are taken: beyond, the rule comes back. Gamma is looked for
    from an eighth of what Min-Max allows upwards, doubled each time, and then halved in towards the
    best; so the rule is led at least as far as by Min-Max.

    Differs from the paper: one measure, ``(rule(forged, honest) - mean) p / |p|``, in the place of
    two: the distance, for rules that average, and whether all forged are taken, for rules that
    select (by the distance, Krum had better pick an honest outlier). A gamma at which some of the
    forged are left out counts if it leads further. Where honest updates are not known, the paper
    tunes m' = 3 forged updates among 10 of its own; here the round is rehearsed at its true size,
    see ``Rehearsal``.

    Args:
        perturbation: As in ``MinMax``.
        reach: How many times as far as Min-Max it may go: some rules never come back.
        num_steps: Of the search between the best probe and the next.

    Raises:
        RuleUnknown: If the coalition does not know the rule.

    .. [1] Shejwalkar & Houmansadr, NDSS 2021.
       https://doi.org/10.14722/ndss.2021.24498
    """

    perturbation: Perturbation = "std"
    reach: float = 1000.0
    num_steps: int = 10

    def __post_init__(self) -> None:
        one_of(Perturbation, self, perturbation=self.perturbation)
        at_least(1, self, reach=self.reach)
        at_least(0, self, num_steps=self.num_steps)

    def __call__(self, view: CoalitionView[Update], *, rng: Generator) -> Sequence[Update]:
        rule = view.rule
        if rule is None:
            raise RuleUnknown(
                f"{self!r} is made for the server's rule, and the coalition does not know it, or "
                "its clients' updates are not what the rule reads: set knows_rule, or wear a forge "
                "that needs none (min-max)"
            )
        known = rows(view.known)
        line, rehearsal = Line.of(known, self.perturbation), Rehearsal.of(view, rng)

        def moved(gamma: float) -> float:
            step = rehearsal.step(rule, line.at(gamma).to(known)) - rehearsal.mean
            along = float(step.double() @ line.away)
            return along if isfinite(along) else -inf

        if not line.slope:
            return with_rows(view.own, line.at(0.0).to(known).expand(len(view.own), -1))
        scale = least_root(line, diameter(known))
        if not scale:  # all are equal: as far as they are long
            scale = float(line.origin.norm()) / line.slope**0.5
        probes = [0.0, *(scale * 2.0**k for k in range(-3, floor(log2(self.reach)) + 1))]
        found = [moved(gamma) for gamma in probes]
        best = max(range(len(probes)), key=found.__getitem__)
        far, gamma = found[best], probes[best]
        beyond = probes[best + 1] if best + 1 < len(probes) else scale * self.reach
        for _ in range(self.num_steps):
            middle = (gamma + beyond) / 2
            if (there := moved(middle)) > far:
                far, gamma = there, middle
            else:
                beyond = middle
        return with_rows(view.own, line.at(gamma).to(known).expand(len(view.own), -1))

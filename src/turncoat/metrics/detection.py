"""How often what a defence distrusts is what was false."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from turncoat.metrics.intervals import clopper_pearson
from turncoat.trial import Measurement


@dataclass(frozen=True, slots=True)
class Caught:
    """Four counts: of what was false or genuine, and was flagged or passed."""

    hits: int = 0
    misses: int = 0
    false_alarms: int = 0
    passed: int = 0

    @classmethod
    def of(cls, flagged: Set[int], false: Set[int], num: int) -> Caught:
        """Return the counts for ``num`` things, of which some were flagged and some were false."""
        hits = len(flagged & false)
        misses, false_alarms = len(false) - hits, len(flagged) - hits
        return cls(hits, misses, false_alarms, num - hits - misses - false_alarms)

    def __add__(self, other: Caught) -> Caught:
        return Caught(
            self.hits + other.hits,
            self.misses + other.misses,
            self.false_alarms + other.false_alarms,
            self.passed + other.passed,
        )

    def measured(self, what: str) -> tuple[Measurement, ...]:
        """Return precision, recall and F1, each beside what flagging as many at random gives.

        Intervals (Clopper-Pearson) take the flags for independent, which those of one client in
        two rounds are not. What does not exist (the precision of no flag) is left out. A defence is
        measured, so "worst" is 0: nothing is caught.
        """
        flagged, false = self.hits + self.false_alarms, self.hits + self.misses
        whole = flagged + self.misses + self.passed
        if not false:
            return ()
        share, base = flagged / whole, false / whole
        found = []
        if flagged:
            interval = clopper_pearson(self.hits, flagged)
            precision = self.hits / flagged
            found.append(Measurement(f"{what}_precision", precision, base, *interval, worst=0.0))
        interval = clopper_pearson(self.hits, false)
        recall = self.hits / false
        found.append(Measurement(f"{what}_recall", recall, share, *interval, worst=0.0))
        f1 = 2 * self.hits / (flagged + false)
        low, high = clopper_pearson(self.hits, self.hits + self.false_alarms + self.misses)
        # F1 = 2j / (1 + j), where j is the share of hits in what is flagged or false or both
        bounds = (2 * low / (1 + low), 2 * high / (1 + high))
        blind = 2 * share * base / (share + base) if share else 0.0
        found.append(Measurement(f"{what}_f1", f1, blind, *bounds, worst=0.0))
        return tuple(found)

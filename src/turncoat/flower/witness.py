"""Which of an app's own metrics says how well its model works, and what it said when."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import isfinite, lcm
from typing import Any

_GOOD = re.compile(r"(^|[_\W])(acc|accuracy|f1|auc|auroc|dice|iou|recall|precision|r2)\b|accuracy")
_MOST_EXAMPLES = 100_000


@dataclass(frozen=True)
class Metric:
    """The one of the app's own metrics that says how well its model works.

    Attributes:
        source: ``server``, ``clients`` or ``replies``: see `rehearsal.Played`.
        scale: 0.01 if the app reports percentages, else 1.
    """

    source: str
    key: str
    rises: bool
    scale: float = 1.0

    @property
    def name(self) -> str:
        """What the report calls it."""
        if re.search(r"acc", self.key):
            return "accuracy"
        return self.key.replace("-", "_")

    @property
    def said(self) -> str:
        where = {
            "server": "evaluated by the server",
            "clients": "evaluated by the nodes and aggregated by the strategy",
            "replies": "evaluated by the nodes and averaged here",
        }
        return f"{self.key}, {where[self.source]}"

    def history(self, played: Mapping[str, Any]) -> list[float]:
        """Return it after each round; what is not a number is not here."""
        rows = played["metrics"].get(self.source, {})
        values = [rows[r].get(self.key) for r in sorted(rows, key=int) if int(r) > 0]
        return [self.scale * v for v in values if v is not None and isfinite(v)]

    def is_broken(self, played: Mapping[str, Any]) -> bool:
        """Say whether it ends as no number at all."""
        rows = played["metrics"].get(self.source, {})
        last = rows[max(rows, key=int)].get(self.key) if rows else None
        return last is not None and not isfinite(last)


def chosen_metric(played: Mapping[str, Any]) -> Metric | None:
    """Return the best witness in a clean run: accuracies before losses, the server's first."""
    for wanted in (True, False):
        for source in ("server", "clients", "replies"):
            rows = played["metrics"].get(source, {})
            told = {k for r, row in rows.items() if int(r) > 0 for k in row}
            for key in sorted(told):
                if wanted == bool(_GOOD.search(key)) and (wanted or "loss" in key):
                    seen = [row[key] for row in rows.values() if key in row]
                    percent = wanted and max(seen) > 1.5
                    return Metric(source, key, wanted, 0.01 if percent else 1.0)
    return None


def num_examples_behind(values: Sequence[float]) -> int | None:
    """Return the fewest examples that shares like these can be of; None if they are no shares.

    >>> num_examples_behind([0.5, 1 / 3, 0.25])
    12
    """
    whole = 1
    for value in values:
        near = Fraction(value).limit_denominator(_MOST_EXAMPLES // 10)
        if abs(float(near) - value) > 1e-12:
            return None
        whole = lcm(whole, near.denominator)
        if whole > _MOST_EXAMPLES:
            return None
    return whole if whole > 1 else None

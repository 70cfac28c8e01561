"""What is handed out instead of a model that has seen private records.

``python -m papers.released`` writes what ``python -m papers.inference`` measured into
docs/privacy.md.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from papers.ledger import HERE, Expectation, Experiment
from papers.taught import Releases
from turncoat.attacks.membership.lira import LiRA
from turncoat.federation import WhiteBox
from turncoat.record import write_text
from turncoat.stages.aggregate.gnmax import GNMax
from turncoat.stages.release.student import Distilled, Student
from turncoat.stages.train.local import LocalSGD
from turncoat.tasks.fetched import mnist
from turncoat.tasks.models import MLP

_STUDYING = LocalSGD(0.05, num_epochs=60, batch_size=32, momentum=0.9)
_TAKEN = (
    "AUC that distilled takes from LiRA",
    "AUC that PATE takes from LiRA",
    "AUC that distilled takes from loss threshold",
    "AUC that PATE takes from loss threshold",
)

RELEASED = (
    Experiment(
        "released-mnist",
        "A student of noisy votes, or of soft answers, tells less of who was in the data than the "
        "model that saw them.",
        Releases(
            mnist,
            LocalSGD(0.1, num_epochs=20, batch_size=50, momentum=0.9),
            LocalSGD(0.1, num_epochs=20, batch_size=10),
            Distilled(WhiteBox(), temperature=4.0, share=0.8, tuning=_STUDYING),
            Student(WhiteBox(), tuning=_STUDYING),
            GNMax(sigma=20.0, num_queries=250),
            num_teachers=100,
            num_candidates=12_000,
            attack=LiRA(6),
            delta=1e-5,
            options={
                "train_size": 6_000,
                "test_size": 6_000,
                "public_size": 1_000,
                "model": MLP(hidden=(64,)),
            },
        ),
        "6,000 members and as many non-members of MNIST, a net with 64 hidden units, 20 epochs; "
        "1,000 public images, whose labels are not used. Distilled: temperature 4, the 800 surest. "
        "PATE: 100 teachers with 60 images each, one answer to each of 250 public images, noise of "
        "20 votes, data-independent ε at δ = 1e-5 for each client. LiRA has 6 shadow models, each "
        "distilled or taught as the target was; the accuracy is that on non-members. Small nets, "
        "few teachers and few shadows, for time; tried out on seed 5.",
        "Papernot et al., ICLR 2018, and Shejwalkar and Houmansadr, AAAI 2021, are the algorithms. "
        "Bounds are this project's own; no published figure is claimed: the former's 98 % at "
        "ε = 2 has 250 teachers with 60,000 images, a GAN, and an ε that looks at the votes.",
        (
            *(Expectation(figure, above=0) for figure in _TAKEN),
            Expectation("accuracy, percent: PATE", at_least=60),
        ),
    ),
)

_ROWS = {"plain": "the model", "distilled": "distilled", "PATE": "PATE, 100 teachers"}
_COLUMNS = {
    "accuracy, percent": 1,
    "AUC of LiRA": 3,
    "TPR of LiRA at 1 % FPR, percent": 1,
    "AUC of loss threshold": 3,
    "ε composed": 2,
}  # figures by name, and the digits that are shown


def table(figures: Mapping[str, Any]) -> str:
    """Return what was measured as Markdown: means and 95 % intervals over the seeds."""
    seeds = len(next(iter(figures.values()))["values"])
    lines = [
        f"| seeds: {seeds} | " + " | ".join(_COLUMNS) + " |",
        "|---|" + "---:|" * len(_COLUMNS),
    ]
    for name, shown in _ROWS.items():
        cells = [_cell(figures.get(f"{c}: {name}"), digits) for c, digits in _COLUMNS.items()]
        lines.append(f"| {shown} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(figure: Mapping[str, Any] | None, digits: int) -> str:
    if figure is None:
        return "none"
    value, low, high = (f"{figure[end]:.{digits}f}" for end in ("value", "low", "high"))
    return value if low == high else f"{value} ({low} to {high})"


def with_table(page: str, ledger: Path = HERE / "inference.json") -> str:
    """Return a page with the table of what is in a ledger."""
    experiments = json.loads(ledger.read_text("utf-8"))["experiments"]
    (figures,) = (e["figures"] for e in experiments if e["name"] == RELEASED[0].name)
    return re.sub(
        r"(<!-- released -->\n).*?(\n<!-- end -->)",
        lambda found: found[1] + table(figures) + found[2],
        page,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    page = HERE.parent / "docs" / "privacy.md"
    write_text(page, with_table(page.read_text("utf-8")))
    sys.exit(0)

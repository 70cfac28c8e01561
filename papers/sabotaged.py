"""What an audit catches of broken private trainers: ``python -m papers.sabotaged --figure PATH``.

Draws claimed epsilons and lower bounds, and writes the table into docs/auditing.md, from what
``python -m papers.inference`` measured.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from papers.audited import RIGHT, RIGHT_RULE, SLIGHT, Correct, Sabotaged, Setting
from papers.ledger import HERE, Expectation, Experiment
from turncoat.record import write_text
from turncoat.report.palette import LIGHT, MARKERS

DOCS = HERE.parent / "docs"
_BROKEN, _CORRECT = Sabotaged(), Correct(setting=Setting(num_rounds=20, num_others=0))
_NEVER = (RIGHT, RIGHT_RULE, SLIGHT)  # what no audit of epsilon shall refute
_BUGS = tuple(name for name in _BROKEN.names if name not in _NEVER)
_OURS = "The bounds are this project's own; no published figure is claimed."


def _figure(name: str, column: str) -> str:
    return f"audit: {name} | {column}"


SABOTAGED = (
    Experiment(
        "sabotaged-trainers",
        "Eight broken private trainers that claim ε = 1 and spend 4 or more are refuted by one run "
        "each; a sampling rate that is 10 % too high is found by the test of batch sizes alone.",
        _BROKEN,
        "2,000 records, of which 1,000 are canaries (a gradient with one entry, each its own, of "
        "norm 1,000; clipped to 1); each is put in by a fair coin. 50 steps at a sampling rate of "
        "0.1, with the noise of ε = 1 at δ = 1e-5; each step is seen. Scores are summed over the "
        "steps; of all canaries, each quarter of the layers, the steady and the alternating ones, "
        "20 % and 80 % are guessed: 14 readings, which share 5 % (Bonferroni). True ε: of the "
        "event that a canary's sum is large, by theory; 99 stands for more, or no bound at all. "
        "The federation has one client for each record, DP-FedAvg and Poisson sampling.",
        "Steinke et al., NeurIPS 2023, and Nasr et al., USENIX Security 2023, are the methods. "
        + _OURS,
        (
            *(Expectation(_figure(name, "lower bound"), above=1) for name in _BUGS),
            *(Expectation(_figure(name, "true, at least"), at_least=4) for name in _BUGS),
            *(Expectation(_figure(name, "lower bound"), at_most=1) for name in _NEVER),
            Expectation(_figure(SLIGHT, "p of the rate"), at_most=0.05),
        ),
    ),
    Experiment(
        "correct-trainers-audited",
        "In 95 % of runs or more the audit of a correct trainer stays below the ε it claims.",
        _CORRECT,
        "The same audit of this package's DP-SGD and DP-FedAvg, with the noise of ε = 0.5, 1, 2, "
        "4 and 8; 20 steps, and no records but the 1,000 canaries. "
        f"{_CORRECT.num_runs} runs of the first and {_CORRECT.num_federations} of the second for "
        "each ε and seed.",
        _OURS,
        (
            Expectation("share_of_runs_below_the_claim", at_least=0.95),
            Expectation("share_of_runs_whose_sampling_is_doubted", at_most=0.1),
        ),
    ),
)


def draw(known: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw the lower bound over the claimed epsilon, of what is right and of what is not."""
    canvas = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes: Axes = canvas.subplots()
    figures = known["correct-trainers-audited"]["figures"]
    claims = list(map(float, _CORRECT.epsilons))
    axes.plot(claims, claims, "--", color=LIGHT.muted, linewidth=1.2, label="as claimed")
    for i, name in enumerate((RIGHT, RIGHT_RULE)):
        means, tops = (
            [figures[f"{head}: {name} | {c:g}"]["value"] for c in claims]
            for head in ("lower bound", "largest lower bound")
        )
        gaps = [[0.0] * len(means), [b - a for a, b in zip(means, tops, strict=True)]]
        places = [c * 1.04 ** (2 * i - 1) for c in claims]
        look: Any = {"color": LIGHT.series[3 * i], "marker": MARKERS[i], "markersize": 4.5}
        axes.errorbar(places, means, gaps, capsize=2, linewidth=1.4, label=name, **look)
    broken = known["sabotaged-trainers"]["figures"]
    for i, name in enumerate((*_BUGS, SLIGHT)):
        value = broken[_figure(name, "lower bound")]["value"]
        hue = LIGHT.series[1 + i % (len(LIGHT.series) - 1)]
        place = _BROKEN.epsilon * 1.06 ** (i - len(_BUGS) / 2)
        axes.plot(place, value, MARKERS[i % len(MARKERS)], color=hue, label=name, markersize=7)
    axes.set_xscale("log", base=2)
    axes.set_xticks(claims, [f"{c:g}" for c in claims])
    axes.set_xlabel("claimed ε, at δ = 1e-5")
    axes.set_ylabel("lower bound, 95 % confidence")
    axes.grid(color=LIGHT.line, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    canvas.legend(loc="outside right upper", fontsize=7.5, frameon=False)
    canvas.savefig(path, dpi=110, metadata={"Software": None})


def table(known: Mapping[str, Mapping[str, Any]]) -> str:
    """Return which bug is caught by what, as Markdown."""
    figures = known["sabotaged-trainers"]["figures"]
    lines = [
        "| what is wrong | true ε, at least | lower bound (interval) | caught by | canaries "
        "| seconds |",
        "|---|---:|---:|---|---:|---:|",
    ]
    for name in _BROKEN.names:
        bound = figures[_figure(name, "lower bound")]
        true = figures[_figure(name, "true, at least")]["value"]
        values = bound["values"]
        refuted = sum(value > _BROKEN.epsilon for value in values)
        doubted = sum(p < 0.05 for p in figures[_figure(name, "p of the rate")]["values"])
        found = [
            f"the audit, {refuted} of {len(values)} runs" if refuted else "",
            f"the binomial test of batch sizes, {doubted} of {len(values)}" if doubted else "",
        ]
        cells = (
            name,
            "99" if true >= 99 else f"{true:.1f}",
            f"{bound['value']:.2f} ({bound['low']:.2f} to {bound['high']:.2f})",
            "; ".join(filter(None, found)) or "nothing",
            f"{figures[_figure(name, 'canaries')]['value']:,.0f}",
            f"{figures[_figure(name, 'seconds')]['value']:.1f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def summary(known: Mapping[str, Mapping[str, Any]]) -> str:
    """Return how correct trainers fared, as Markdown."""
    figures = known["correct-trainers-audited"]["figures"]
    lines = [
        "| claimed ε | " + " | ".join(f"{c:g}" for c in _CORRECT.epsilons) + " |",
        "|---|" + "---:|" * len(_CORRECT.epsilons),
    ]
    for name in (RIGHT, RIGHT_RULE):
        for head in ("lower bound", "largest lower bound", "if Gaussian"):
            cells = [figures[f"{head}: {name} | {c:g}"] for c in _CORRECT.epsilons]
            shown = [max(f["values"]) if "largest" in head else f["value"] for f in cells]
            lines.append(f"| {name}: {head} | " + " | ".join(f"{v:.2f}" for v in shown) + " |")
    share = figures["share_of_runs_below_the_claim"]["value"]
    doubted = figures["share_of_runs_whose_sampling_is_doubted"]["value"]
    num = (_CORRECT.num_runs + _CORRECT.num_federations) * len(_CORRECT.epsilons)
    num *= len(known["correct-trainers-audited"]["seeds"])
    lines += ["", f"Below the claim: {share:.1%} of {num} runs. Sampling doubted: {doubted:.1%}."]
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Draw the figure and write the tables, from the ledger that has the experiments."""
    parser = argparse.ArgumentParser(prog="python -m papers.sabotaged")
    parser.add_argument("--figure", type=Path, required=True, metavar="PATH")
    parser.add_argument("--ledger", type=Path, default=HERE / "inference.json")
    asked = parser.parse_args(arguments)
    experiments = json.loads(asked.ledger.read_text("utf-8"))["experiments"]
    known = {e["name"]: e for e in experiments if e["figures"]}
    for e in SABOTAGED:
        if e.name not in known:
            parser.error(f"{asked.ledger.name} has no figures of {e.name!r}: run the ledger first")
    draw(known, asked.figure)
    page = DOCS / "auditing.md"
    text = page.read_text("utf-8")
    for mark, made in (("sabotaged", table(known)), ("correct", summary(known))):
        text = re.sub(
            rf"(<!-- {mark} -->\n).*?(\n<!-- end -->)",
            lambda found, made=made: found[1] + made + found[2],  # type: ignore[misc]
            text,
            flags=re.DOTALL,
        )
    write_text(page, text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

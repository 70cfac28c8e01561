"""What an audit's runs say of an app beside their figures, and of what `check` said of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from turncoat.flower.audit import AS_IS, IN_THE_CLEAR, Run, Work
from turncoat.flower.check import Severity
from turncoat.flower.witness import Metric


def findings_of(
    work: Work, clean: Mapping[str, Any], metric: Metric | None
) -> list[dict[str, str]]:
    """Return what ``check`` found, what the runs show of it, and what they found themselves."""
    found = [dict(f) for f in clean["findings"]]
    shown = _shown(work, metric)
    if shown:
        about = next((f for f in found if "SecAgg" in f["what"] + f["why"]), None)
        if about is not None:
            about["shown"] = shown
    if clean["halts"]:
        (_, first), *_ = clean["halts"]
        found.append(
            {
                "severity": "danger",
                "what": (
                    f"SecAgg+ halted in {len(clean['halts'])} of the "
                    f"{_count(len(clean['cohort']), 'round')} of the clean run: nothing was "
                    "aggregated there."
                ),
                "why": f"{first}. Flower only logs it, and keeps the old model.",
                "cure": "Lower reconstruction_threshold, ask more nodes, or mend those that fail.",
            }
        )
    told = sorted({k for row in clean["seen"] for k in row["metrics"]})
    if told and work.sees_updates(AS_IS):
        found.append(
            {
                "severity": "note",
                "what": "The server reads every node's update by itself, with the node's id.",
                "why": (
                    f"Beside the arrays it is told {', '.join(told)}. seen.jsonl lists all "
                    "that it saw in the clean run."
                ),
                "cure": "SecAgg+ hides them; a rule that must read them then cannot either.",
            }
        )
    if work.audit.missing_options:
        found.append(
            {
                "severity": "note",
                "what": "Inversion and membership inference were not tried.",
                "why": "Nothing but the arrays is known of the app's model and data.",
                "cure": f"Give {work.audit.missing_options}.",
            }
        )
    order = [str(severity) for severity in Severity]
    return sorted(found, key=lambda finding: order.index(finding["severity"]))


def _shown(work: Work, metric: Metric | None) -> str:
    """Say in figures what SecAgg+ in front of a rule does to it, if the runs show it."""
    if metric is None or not work.secure:
        return ""
    seed, said = work.audit.seeds[0], []
    for forgery in work.audit.forgeries:
        if forgery.needs_others:
            continue
        ends = {}
        for defence in work.defences:
            for attack in (None, forgery):
                history = work.history(Run(defence, attack, seed), metric)
                if history:
                    ends[defence, attack is not None] = history[-1]
        if len(ends) == 4:
            said.append(
                f"Under {forgery.name} by {_count(len(work.audit.members), 'node')} of "
                f"{work.audit.num_nodes} the {metric.name} falls from "
                f"{_figure(ends[AS_IS, False])} to {_figure(ends[AS_IS, True])}; with SecAgg+ "
                "taken out, so that the rule reads single updates, from "
                f"{_figure(ends[IN_THE_CLEAR, False])} to {_figure(ends[IN_THE_CLEAR, True])}."
            )
    return " ".join(said)


def _figure(value: float) -> str:
    return f"{100 * value:.1f} %" if 0 <= value <= 1 else f"{value:.3g}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"

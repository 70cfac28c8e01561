"""An audit in words before it runs, and what there is to name in one."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from typing import Any

from rich.markup import escape

from turncoat.parts import PARTS
from turncoat.plan import Audit, Planned, plan, rows
from turncoat.record import planned_record
from turncoat.stage import PLACES, stands
from turncoat.trial import Blocked, Failed, Trial, name_of

_SHOWN = {"attacks": "attack", "defences": "stage", "tasks": "task"}


def explained(audit: Audit) -> Iterator[str]:
    """Yield what an audit is, a line each, with Rich's markup."""
    about, todo = planned_record(audit), plan(audit)
    task = about["task"]
    sizes = task["sizes"]
    yield f"[bold]{escape(audit.title)}[/bold]"
    yield (
        f"{escape(task['name'])}: {len(sizes)} clients with {min(sizes)} to {max(sizes)} examples, "
        f"{task['num_test']} held out; {task['num_params']} parameters; {audit.num_rounds} rounds"
    )
    if about["coalition"]:
        yield f"dishonest: {escape(about['coalition']['text'])}"
    for defence in about["defences"]:
        yield f"\n[bold]{escape(defence['name'])}[/bold]"
        changed = defence["changed"] or ["train", "channel", "aggregate"]
        for place in changed:
            yield f"  {place}: {escape(defence['stages'][place])}"
        if defence["graph"]:
            yield f"  no server: {defence['graph']}; figures are means over the honest ones"
        for seat, kinds in defence["sees"].items():
            if kinds:
                yield f"  the {seat} sees {escape(', '.join(kinds))}"
        for guarantee in defence["guarantees"]:
            yield f"  {escape(guarantee['text'])}"
        if not defence["guarantees"]:
            yield "  no ε: nothing here adds noise"
        for said in defence["simulated"]:
            yield f"  simulated, so not secure: {escape(said)}"
    yield "\n[bold]attacks[/bold]"
    for name, entry in audit.entries.items():
        trial = entry.trial
        needs = name_of(trial.needs) if isinstance(trial, Trial) else "to take part"
        seats = ", ".join(str(s) for s in rows(audit, entry) if s)
        yield f"  {escape(name)}: at {seats}; needs {escape(needs)}"
    blocked = {_place_of(c): c.settled.reason for c in todo.cells if isinstance(c.settled, Blocked)}
    failed = {_place_of(c): c.settled.error for c in todo.cells if isinstance(c.settled, Failed)}
    for said, found in (
        ("[bold]blocked[/bold], which is not safe: other attacks remain", blocked),
        ("[bold]cannot be run[/bold], which is neither safe nor unsafe", failed),
    ):
        if found:
            yield f"\n{said}"
        for where, why in found.items():
            yield f"  {escape(where)}: {escape(why)}"
    shadows = sum(t.shadow is not None for t in todo.trainings.values())
    num_blocked = sum(isinstance(c.settled, Blocked) for c in todo.cells)
    yield (
        f"\n{len(todo.cells)} cells ({num_blocked} blocked), {len(todo.trainings) - shadows} "
        f"trainings and {shadows} shadow models"
    )


def _place_of(cell: Planned) -> str:
    return f"{cell.attack} at {cell.seat} under {cell.defence}"


def listed(kind: str) -> list[dict[str, Any]]:
    """Return the parts of a kind: name, place, summary and options."""
    found = []
    for name, target in PARTS[_SHOWN[kind]].items():
        module, _, attribute = target.partition(":")
        made = getattr(importlib.import_module(module), attribute)
        options = [
            p.name if p.default is p.empty else f"{p.name} = {_spelt(p.default)}"
            for p in inspect.signature(made).parameters.values()
            if p.kind is not p.VAR_KEYWORD
        ]
        text = inspect.getdoc(made) or ""
        found.append(
            {
                "name": name,
                "place": _place(kind, made),
                "summary": _plain(text.split("\n\n")[0]),
                "options": options,
                "use": target,
            }
        )
    return found


def _plain(text: str) -> str:
    """Return what a docstring says, without its markup, and of a function what it returns.

    >>> _plain("Answer with\\nthe ``votes`` [1]_: CRFL [2]_."), _plain("Return faces.")
    ('Answer with the votes: CRFL.', 'Faces.')
    """
    said = re.sub(r"\s*\[\d+\]_|``", "", text).replace("\n", " ").removeprefix("Return ")
    return said[:1].upper() + said[1:]


def _place(kind: str, made: Any) -> str:
    """Return where in the threat model or in the round a part belongs."""
    if kind == "tasks":
        return "task"
    if kind == "attacks":
        return str(made.__module__.split(".")[2])
    blank = made.__new__(made)  # places are told by the class: no field is looked at
    return next(str(p.__name__).lower() for p in PLACES if stands(blank, p))


def _spelt(default: Any) -> str:
    return repr(default) if isinstance(default, str | int | float | bool | None) else "..."

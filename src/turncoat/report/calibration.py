"""What a calibration found, in words, as a page, as Markdown: all of it from its JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from turncoat.report import words
from turncoat.report.figures import Drawing, style
from turncoat.report.page import css, templates
from turncoat.report.palette import Palette

Found = dict[str, Any]
_KINDS = {
    "tpr": "a TPR",
    "advantage": "an advantage",
    "psnr": "a PSNR",
    "success": "a success of the backdoor",
}
COLUMNS = ("", "value", "measured", "holds", "allowed by theorem", "ε", "model", "seconds")


def read(folder: Path) -> Found:
    """Return what ``calibration.json`` says."""
    found: Found = json.loads((folder / "calibration.json").read_text(encoding="utf-8"))
    return found


def write_calibration(folder: Path) -> Path:
    """Write ``calibration.html`` and ``calibration.md`` from ``calibration.json``."""
    found = read(folder)
    drawing = _drawing(found)
    text = (
        templates()
        .get_template("calibration.html.jinja")
        .render(
            found=found,
            css=Markup(css()),
            asked=asked(found),
            says=list(says(found)),
            columns=COLUMNS,
            note=NOTE,
            table=table(found),
            facts=facts(found),
            panel=Markup(drawing.inline()),
            drawing=drawing,
        )
    )
    (folder / "calibration.md").write_text(markdown(found), encoding="utf-8")
    written = folder / "calibration.html"
    written.write_text(text, encoding="utf-8")
    return written


def asked(found: Found) -> str:
    """Say what was looked for."""
    return f"The weakest {found['parameter']} that keeps {found['attack']} to {_limit(found)}"


def table(found: Found) -> list[tuple[str, ...]]:
    """Return the rows: first the federation as it is, then every value, the weakest first."""
    return [_row(found, point) for point in found["points"]]


def _row(found: Found, point: Found) -> tuple[str, ...]:
    low, high = point["low"], point["high"]
    spread = f"{_figure(found, low, bare=True)} to {_figure(found, high)}"
    model = words.number(point["accuracy"], found["metric"])
    if point["accuracy_low"] is not None:
        ends = words.interval(point["accuracy_low"], point["accuracy_high"], found["metric"])
        model = f"{model} ({ends})"
    return (
        _role(found, point),
        "as it is" if point["value"] is None else f"{point['value']:g}",
        f"{_figure(found, point['reached'])} ({spread})",
        "yes" if point["holds"] else "no",
        "-" if point["bound"] is None else _figure(found, point["bound"]),
        "-" if point["epsilon"] is None else f"{point['epsilon']:.3g}",
        model,
        words.seconds(point["seconds"]),
    )


def _role(found: Found, point: Found) -> str:
    value = point["value"]
    if value is None:
        return "the file's"
    roles = ["by theorem"] * (value == found["bound"]["value"])
    roles += ["by measurement"] * (value == found["measured"])
    return " and ".join(roles)


def says(found: Found) -> Iterator[str]:
    """Yield the findings, a sentence or two each."""
    bound, name = found["bound"], found["parameter"]
    proven = _at(found, bound["value"])
    if bound["value"] is None:
        yield f"By theorem: nothing; {bound['reason']}."
    else:
        yield (
            f"By theorem: {name} = {bound['value']:g} "
            f"(ε = {bound['epsilon']:.3g} at δ = {found['delta']:.1g}). Nobody passes "
            f"{_limit(found)}, whatever else they know."
            + (f" The model then has {_model(found, proven)}." if proven else "")
        )
    smallest = min((n for n in found["sizes"] if n), default=1)
    if bound["value"] is not None and found["delta"] >= 1 / smallest:
        yield (
            f"δ = {found['delta']:.1g} is not below one over the {smallest} records of the "
            "smallest client: an ε at such a δ promises little. The bound does not rest on it."
        )
    measured = found["measured"]
    if measured is None:
        yield (
            f"By measurement: no value. Even at {name} = {found['failed']:g} the upper limit of "
            f"{found['attack']} lies above {_limit(found)}."
            + (
                " The theorem holds there all the same: so few records cannot show it. More "
                "candidates would."
                if proven
                else " Look further, by --strongest."
            )
        )
        return
    here = _at(found, measured)
    assert here is not None
    least = measured == found["points"][1]["value"] if len(found["points"]) > 1 else True
    edge = (
        ", the weakest that was looked at"
        if least and found["failed"] is None
        else f"; at {found['failed']:g} it does not hold"
    )
    yield (
        f"By measurement: {name} = {measured:g}{edge}. {found['attack']} reaches "
        f"{_figure(found, here['reached'])}, with an upper limit of "
        f"{_figure(found, here['high'])}. The model then has {_model(found, here)}."
    )
    if found["points"][0]["holds"]:
        yield (
            f"The federation as the file has it keeps to the limit already: {found['attack']} has "
            f"an upper limit of {_figure(found, found['points'][0]['high'])} there. Against this "
            "attack nothing needs to be added."
        )
    if bound["value"] is not None and bound["value"] != measured:
        yield _gap(found, here)


def _gap(found: Found, here: Found) -> str:
    bound, name = found["bound"]["value"], found["parameter"]
    if here["bound"] is not None and here["bound"] <= found["risk"]["limit"]:
        return (
            f"The gap: the measurement asks for more than the theorem, which holds from {name} = "
            f"{bound:g} on. That is the price of few records: {found['attack']} cannot reach the "
            "limit there, but its upper limit can."
        )
    allowed = "without a bound" if here["bound"] is None else _figure(found, here["bound"])
    times = f", {bound / here['value']:.3g} times as much," if here["value"] > 0 else ""
    said = (
        f"The gap: the theorem asks for {name} = {bound:g}{times} where the measurement is content "
        f"with {here['value']:g}. The theorem is about every attacker, one who knows every record "
        "but one and sees every step included; the measurement is about "
        f"{found['attack']} alone, from the seat {words.listed(found['seats'])}, with "
        f"{words.count(found['num_shadows'], 'shadow model')}, on these records. What lies between "
        "is not safety: it is what better attacks may still take. "
    )
    if here["bound"] is None:
        return said + "At the measured value nothing at all is proven."
    return said + f"At the measured value the theorem allows {_kind(found)} of {allowed}."


def facts(found: Found) -> list[tuple[str, str]]:
    """Return what the search was about, as pairs."""
    sizes = found["sizes"]
    spread = f"{min(sizes)}" if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"
    many = [
        ("task", found["task"]),
        ("clients", f"{len(sizes)}, of {spread} records"),
        ("rounds", str(found["num_rounds"])),
        ("seeds", str(len(found["seeds"]))),
        ("seats", words.listed(found["seats"])),
    ]
    if found["num_members"]:
        many.append(("members, others", f"{found['num_members']}, {found['num_others']}"))
    if found["num_shadows"]:
        many.append(("shadow models", str(found["num_shadows"])))
    if found["bound"]["seconds"]:
        many.append(("seconds of the theorem", f"{found['bound']['seconds']:.1f}"))
    many.append(("trainings", str(sum(p["num_trainings"] for p in found["points"]))))
    total = sum(p["seconds"] for p in found["points"])
    return [*many, ("seconds of trainings and attacks", f"{total:.0f}")]


def markdown(found: Found) -> str:
    """Return all of it as Markdown."""

    def line(cells: tuple[str, ...]) -> str:
        return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"

    head = (COLUMNS[0], found["parameter"], *COLUMNS[2:])
    rows = [line(head), "|" + "---|" * len(head), *map(line, table(found))]
    parts = [f"# {found['title']}", asked(found) + ".", *says(found), "\n".join(rows)]
    parts.append("; ".join(f"{name}: {value}" for name, value in facts(found)) + ".")
    parts.append(NOTE)
    return "\n\n".join(parts) + "\n"


NOTE = (
    "Intervals are 95 %, that of a rate with its threshold taken as given. The search takes it "
    "that a stronger value never helps the attack, and tries few: between the weakest value that "
    "held and the strongest that did not, nothing is known."
)


def _at(found: Found, value: float | None) -> Found | None:
    return next((p for p in found["points"][1:] if p["value"] == value), None)


def _model(found: Found, point: Found) -> str:
    text = f"{words.metric(found['metric'])} {words.number(point['accuracy'], found['metric'])}"
    if point["accuracy_low"] is None:
        return text
    ends = words.interval(point["accuracy_low"], point["accuracy_high"], found["metric"])
    return f"{text} ({ends})"


def _kind(found: Found) -> str:
    return _KINDS[found["risk"]["kind"]]


def _limit(found: Found) -> str:
    risk = found["risk"]
    at = f" at {100 * risk['fpr']:g} % FPR" if risk["fpr"] is not None else ""
    limit = f"{risk['limit']:g} dB" if risk["kind"] == "psnr" else f"{100 * risk['limit']:g} %"
    return f"{_kind(found)} of {limit}{at}"


def _figure(found: Found, value: float, *, bare: bool = False) -> str:
    if found["risk"]["kind"] == "psnr":
        return words.number(value, "psnr", "dB", bare=bare)
    return words.number(value, "rate", bare=bare)


def _drawing(found: Found) -> Drawing:
    """Draw what the attack reached, value by value, and what the theorem allows."""
    points = found["points"][1:]
    values = [p["value"] for p in points]
    scale = 1.0 if found["risk"]["kind"] == "psnr" else 100.0
    limit = found["risk"]["limit"]

    def draw(axes: Axes, palette: Palette, legend: bool) -> None:
        first, second = (palette.series[style(i)[0]] for i in (0, 1))
        axes.axhline(scale * limit, color=palette.muted, lw=0.8, dashes=(3, 2), label="limit")
        middle = [scale * p["reached"] for p in points]
        below = [scale * (p["reached"] - min(p["low"], p["reached"])) for p in points]
        above = [scale * (max(p["high"], p["reached"]) - p["reached"]) for p in points]
        axes.errorbar(
            range(len(points)), middle, yerr=(below, above), fmt="o", color=first, markersize=4,
            lw=1.3, capsize=2.5, label="measured",
        )  # fmt: skip
        proven = [(i, scale * p["bound"]) for i, p in enumerate(points) if p["bound"] is not None]
        if proven:
            axes.plot(*zip(*proven, strict=True), "s", color=second, markersize=4, label="allowed")
        axes.set_xticks(range(len(points)), [f"{v:g}" for v in values], fontsize=7)
        unit = "dB" if scale == 1.0 else "%"
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.3g} {unit}"))
        axes.set(xlabel=found["parameter"], ylabel=_kind(found).partition(" ")[2])
        axes.grid(axis="y", lw=0.5)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        if legend:
            axes.legend(frameon=False, fontsize=7)

    told = [f"{v:g}: {_figure(found, p['reached'])}" for v, p in zip(values, points, strict=True)]
    title = "Dots: measured, with 95 % intervals. Squares: what the theorem allows. Dashes: limit"
    return Drawing("calibration", title, "; ".join(told) + ".", draw)

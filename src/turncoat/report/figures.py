"""The figures: drawn once in stand-in colours for the page, once in ink for files."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, to_rgba
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator
from numpy.typing import NDArray

from turncoat.report import words
from turncoat.report.claims import Audit
from turncoat.report.cost import Cost
from turncoat.report.palette import DASHES, LIGHT, MARKERS, STAND_IN, Palette, to_variables
from turncoat.report.pooled import Square

Array = NDArray[np.float64]
MOST_BARS = 40
MOST_CLASSES = 12
FPR_MARK = 0.01
_WIDTH = 3.25  # inches: with 9 pt, still read at 360 px
_NAMESPACES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "turncoat",
    "pdf.fonttype": 42,
    "text.parse_math": False,
    "axes.unicode_minus": True,
    "path.simplify": True,
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.linewidth": 0.8,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "xtick.major.pad": 5,
    "ytick.major.pad": 4,
    "ytick.minor.size": 0,
}


@dataclass(frozen=True)
class Drawing:
    """A figure with a name for its file, a title, and in words what is to be seen.

    ``draw(axes, palette, legend)`` does the drawing; files have a legend, the page has its own.
    """

    slug: str
    title: str
    describes: str
    draw: Callable[[Axes, Palette, bool], None]
    width: float = _WIDTH
    height: float = 2.25

    def inline(self) -> str:
        """Return an SVG for the page: its colours are variables, its text is the page's."""
        with _styled(STAND_IN):
            canvas = self._canvas(STAND_IN, legend=False, layout="constrained")
            text = _written(canvas, "svg").decode()
        text = to_variables(_strip(text))
        text = re.sub(r"font(-family)?: ?([^;\"]*?)'[^;\"]*sans-serif", _own_font, text)
        label = f'role="img" aria-labelledby="{self.slug}-t {self.slug}-d"'
        head = f'<title id="{self.slug}-t">{_escape(self.title)}</title>'
        head += f'<desc id="{self.slug}-d">{_escape(self.describes)}</desc>'
        opening = re.search(r"<svg[^>]*>", text)
        assert opening is not None
        box = re.search(r'viewBox="[^"]*"', opening[0])
        assert box is not None
        body = text[opening.end() :]
        return _own_ids(f"<svg {_NAMESPACES} {box[0]} {label}>{head}{body}", self.slug)

    def save(self, folder: Path) -> None:
        """Write the figure as SVG and PDF."""
        with _styled(LIGHT):
            canvas = self._canvas(LIGHT, legend=True)
            for kind in ("svg", "pdf"):
                whole = _written(canvas, kind, bbox_inches="tight", pad_inches=0.03)
                (folder / f"{self.slug}.{kind}").write_bytes(whole)

    def _canvas(self, palette: Palette, *, legend: bool, layout: Any = None) -> Canvas:
        canvas = Canvas(figsize=(self.width, self.height), layout=layout)
        canvas.patch.set_visible(False)
        axes = canvas.add_subplot()
        axes.patch.set_visible(False)
        self.draw(axes, palette, legend)
        if legend:
            axes.set_title(self.title, fontsize=9, color=palette.ink)
        return canvas


def _written(canvas: Canvas, kind: str, **how: Any) -> bytes:
    buffer = io.BytesIO()
    metadata = {"Date": None, "Creator": None} if kind == "svg" else {"CreationDate": None}
    canvas.savefig(buffer, format=kind, metadata=metadata, **how)
    return buffer.getvalue()


@contextmanager
def _styled(palette: Palette) -> Iterator[None]:
    colours: Any = {
        "text.color": palette.ink,
        "axes.edgecolor": palette.line,
        "axes.labelcolor": palette.muted,
        "xtick.color": palette.muted,
        "ytick.color": palette.muted,
        "grid.color": palette.line,
    }
    with matplotlib.rc_context(_STYLE | colours), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the page's font has it
        warnings.filterwarnings("ignore", message="constrained_layout not applied")
        yield


def slugs() -> Callable[[str], str]:
    """Return a function that gives each name a file name, no two the same.

    >>> slug = slugs()
    >>> slug("ROC: a/b"), slug("ROC: a.b")
    ('roc-a-b', 'roc-a-b-2')
    """
    used: set[str] = set()

    def slug(name: str) -> str:
        plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:60] or "figure"
        found, number = plain, 2
        while found in used:
            found, number = f"{plain}-{number}", number + 1
        used.add(found)
        return found

    return slug


def style(index: int) -> tuple[int, tuple[float, ...], str]:
    """Return the colour's number, the dashes and the marker of a series."""
    lap = index // len(DASHES)
    return (
        index % len(DASHES),
        DASHES[(index + lap) % len(DASHES)],
        MARKERS[(index + lap) % len(MARKERS)],
    )


def roc(
    slug: str, title: str, curves: Mapping[int, tuple[Array, Array]], names: Sequence[str]
) -> Drawing:
    """Draw ROC curves on two log axes: by defence, with chance and the mark at 1 % FPR."""
    floor = min([float(f[f > 0].min()) for f, _ in curves.values() if (f > 0).any()] or [1e-3])
    floor = float(10 ** np.floor(np.log10(min(max(floor, 1e-4), 1e-2)) + 1e-9))

    def draw(axes: Axes, palette: Palette, legend: bool) -> None:
        axes.plot(
            [floor, 1], [floor, 1], color=palette.muted, lw=0.8, dashes=(2, 2), label="chance"
        )
        axes.axvline(FPR_MARK, color=palette.line, lw=0.8)
        for index, (fpr, tpr) in reversed(list(curves.items())):
            colour, dashes, _ = style(index)
            shown = tpr >= floor
            axes.plot(
                fpr[shown], tpr[shown], color=palette.series[colour], dashes=dashes or (1, 0),
                lw=1.8 if index == 0 else 1.4, label=names[index],
            )  # fmt: skip
        axes.set(xscale="log", yscale="log", xlim=(floor, 1), ylim=(floor, 1))
        axes.set(xlabel="false positive rate", ylabel="true positive rate")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_minor_locator(NullLocator())
            axis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:g} %"))
        _quiet(axes)
        if legend:
            _legend(axes)

    at_mark = [
        f"{names[i]} {100 * float(np.interp(FPR_MARK, fpr, tpr)):.1f} %"
        for i, (fpr, tpr) in curves.items()
    ]
    describes = f"True positive rate at 1 % false positive rate: {words.listed(at_mark, 12)}."
    return Drawing(slug, title, describes, draw, height=2.75)


def pooled_roc(seeds: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    """Average curves over seeds at shared false positive rates, never above what was reached."""
    positive = [float(f[f > 0].min()) for f, _ in seeds if (f > 0).any()]
    lowest = max(min(positive, default=1e-3), 1e-4)
    grid = np.logspace(np.log10(lowest), 0, 121)
    grid[0], grid[-1] = lowest, 1.0
    rows = []
    for fpr, tpr in seeds:
        order = np.lexsort((tpr, fpr))
        reached = np.maximum.accumulate(tpr[order])
        at = np.searchsorted(fpr[order], grid * (1 + 1e-9), side="right") - 1
        rows.append(np.where(at >= 0, reached[np.maximum(at, 0)], 0.0))
    return grid, np.mean(rows, axis=0)


def histories(
    slug: str,
    title: str,
    lines: Mapping[int, Sequence[Sequence[float]]],
    names: Sequence[str],
    metric: str,
) -> Drawing:
    """Draw a metric round by round: the mean over seeds, and the range of the seeds behind it."""
    ends = {i: float(np.mean([run[-1] for run in runs])) for i, runs in lines.items()}
    percent = all(0 <= v <= 1 for runs in lines.values() for run in runs for v in run)

    def draw(axes: Axes, palette: Palette, legend: bool) -> None:
        for index, runs in reversed(list(lines.items())):
            colour, dashes, marker = style(index)
            length = min(len(run) for run in runs)
            table = np.array([run[:length] for run in runs], dtype=np.float64)
            rounds = np.arange(1, length + 1)
            if len(table) > 1 and length > 1:
                axes.fill_between(
                    rounds,
                    table.min(0),
                    table.max(0),
                    color=palette.series[colour],
                    alpha=0.13,
                    lw=0,
                )
            axes.plot(
                rounds, table.mean(0), color=palette.series[colour], dashes=dashes or (1, 0),
                lw=1.8 if index == 0 else 1.4, label=names[index],
                marker=marker if length == 1 else None, markersize=4,
            )  # fmt: skip
        axes.set(xlabel="round", ylabel=words.metric(metric))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        axes.margins(x=0.01)
        if percent:
            axes.set_ylim(0, 1.02)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:.0f} %"))
        _quiet(axes)
        if legend:
            _legend(axes)

    said = [f"{names[i]} {words.number(end, metric)}" for i, end in ends.items()]
    return Drawing(slug, title, f"At the end: {words.listed(said, 12)}.", draw)


def tradeoff(
    slug: str, title: str, prices: Sequence[Cost], left: Sequence[Square | None], metric: str
) -> Drawing:
    """Draw what the strongest attack at a seat still reaches against what the model is worth."""
    points = [
        (i, c.quality.value, s)
        for i, (c, s) in enumerate(zip(prices, left, strict=True))
        if c.quality
    ]

    def draw(axes: Axes, palette: Palette, legend: bool) -> None:
        for index, quality, square in points:
            colour, _, marker = style(index)
            axes.scatter(
                [quality], [square.success if square else 0.0], s=46, marker=marker, zorder=3,
                facecolor=palette.series[colour] if square else "none", clip_on=False,
                edgecolor=palette.series[colour], linewidth=1.3, label=prices[index].defence,
            )  # fmt: skip
        axes.set(xlabel=f"{words.metric(metric)}, clean", ylabel="strongest attack's success")
        axes.set_ylim(-0.03, 1.03)
        values = [quality for _, quality, _ in points]
        if values and min(values) >= 0 and max(values) <= 1:
            margin = max(0.02, 0.08 * (max(values) - min(values)))
            axes.set_xlim(max(0.0, min(values) - margin), min(1.0 + margin, max(values) + margin))
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:.3g} %"))
        _quiet(axes)
        if legend:
            _legend(axes)

    said = [
        f"{prices[i].defence}: {words.number(q, metric)}, success {s.success if s else 0:.2f}"
        for i, q, s in points
    ]
    return Drawing(slug, title, "; ".join(said) + ".", draw)


def partition(
    slug: str, counts: Array, clients: Sequence[str], classes: Sequence[str], sizes: Sequence[int]
) -> Drawing:
    """Draw who holds how much of which class: bars, or a map where bars would be too many."""
    bars = len(clients) <= MOST_BARS and len(classes) <= MOST_CLASSES
    describes = (
        f"{words.count(len(clients), 'client')} hold {min(sizes, default=0):,} to "
        f"{max(sizes, default=0):,} examples each, of {words.count(len(classes), 'class')}."
    )

    def draw_bars(axes: Axes, palette: Palette, legend: bool) -> None:
        left = np.zeros(len(clients))
        for index, name in enumerate(classes):
            axes.barh(
                range(len(clients)), counts[:, index], left=left, height=0.8, label=name,
                color=palette.classes[index], edgecolor=palette.surface, linewidth=0.5,
            )  # fmt: skip
            left += counts[:, index]
        axes.set_yticks(range(len(clients)), [_short(name) for name in clients])
        axes.invert_yaxis()
        axes.set_xlabel("examples")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.margins(y=0.01)
        _quiet(axes, grid="x")
        axes.spines["left"].set_visible(False)
        if legend:
            _legend(axes)

    def draw_map(axes: Axes, palette: Palette, legend: bool) -> None:
        red, green, blue, _ = to_rgba(LIGHT.heat[7])
        shades = ListedColormap([(red, green, blue, a / 255) for a in range(256)])
        image = axes.imshow(
            counts.T,
            aspect="auto",
            cmap=shades,
            interpolation="nearest",
            vmin=0,
            vmax=max(1.0, float(counts.max(initial=1))),
        )
        axes.set_xlabel("client")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        if len(classes) <= 24:
            axes.set_yticks(range(len(classes)), [_short(name) for name in classes])
        else:
            axes.set_ylabel("class")
        bar = axes.figure.colorbar(image, ax=axes, pad=0.02, aspect=24)
        bar.ax.patch.set_visible(False)
        bar.outline.set_visible(False)
        bar.set_label("examples", color=palette.muted)
        _quiet(axes, grid="")

    if bars:
        return Drawing(
            slug, "Who holds what", describes, draw_bars, 4.4, 0.75 + 0.19 * len(clients)
        )
    height = 1.1 + 0.17 * min(len(classes), 24)
    return Drawing(slug, "Who holds what", describes, draw_map, 4.4, max(2.4, height))


def claims(slug: str, found: Sequence[Audit]) -> Drawing:
    """Draw the epsilon that is claimed, and the one that canaries prove, beside each other."""
    labels = [f"{_short(a.attack)} · {a.seat} · {_short(a.defence)}" for a in found]
    most = max([max(a.bound, a.claimed or 0.0, *a.bounds) for a in found])

    def draw(axes: Axes, palette: Palette, legend: bool) -> None:
        for y, audit in enumerate(found):
            colour = palette.heat[7] if audit.state == "refuted" else palette.series[0]
            axes.plot([audit.bound, 1.1 * most], [y, y], color=colour, lw=1.2, alpha=0.35)
            axes.plot(
                [audit.bound], [y], color=colour, marker=">", markersize=6, lw=0, clip_on=False,
                label="proven: this or more" if y == 0 else None,
            )  # fmt: skip
            axes.plot(audit.bounds, [y] * len(audit.bounds), color=colour, marker=".", lw=0, ms=3)
            if audit.claimed is not None:
                axes.plot(
                    [audit.claimed] * 2, [y - 0.35, y + 0.35], color=palette.ink, lw=1.8,
                    label="claimed" if audit is claiming[0] else None,
                )  # fmt: skip
        axes.set_yticks(range(len(found)), labels)
        axes.set(xlabel="ε", xlim=(0, 1.1 * most or 1.0), ylim=(len(found) - 0.5, -0.5))
        _quiet(axes, grid="x")
        if legend:
            _legend(axes)

    claiming = [a for a in found if a.claimed is not None]
    said = [
        f"{label}: {'nothing' if a.claimed is None else f'{a.claimed:.3g}'} claimed, "
        f"{a.bound:.3g} or more proven"
        for label, a in zip(labels, found, strict=True)
    ]
    title = "Claimed ε, and what canaries prove"
    return Drawing(slug, title, f"{'; '.join(said)}.", draw, 5.2, 0.9 + 0.24 * len(found))


def matrix(
    slug: str, squares: Mapping[tuple[str, str, str], Square], defences: Sequence[str]
) -> Drawing:
    """Draw the matrix for print; the page has it as a table."""
    rows = list(dict.fromkeys((attack, seat) for attack, seat, _ in squares))

    def draw(axes: Axes, palette: Palette, legend: bool) -> None:
        for y, (attack, seat) in enumerate(rows):
            for x, defence in enumerate(defences):
                square = squares[attack, seat, defence]
                text, colour, face, hatch = square.status, palette.muted, "none", None
                if square.headline is not None:
                    step = round(square.success * (len(palette.heat) - 1))
                    face, colour, text = (
                        palette.heat[step],
                        palette.on_heat[step],
                        square.headline.text,
                    )
                elif square.status == "blocked":
                    hatch = "////"
                axes.add_patch(
                    Rectangle(
                        (x, y), 1, 1, facecolor=face, edgecolor=palette.line, hatch=hatch, lw=0.8
                    )
                )
                axes.text(
                    x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=7.5, color=colour
                )
        axes.set(xlim=(0, max(1, len(defences))), ylim=(max(1, len(rows)), 0))
        axes.set_xticks(
            np.arange(len(defences)) + 0.5, [_short(d) for d in defences], rotation=30, ha="right"
        )
        axes.set_yticks(
            np.arange(len(rows)) + 0.5, [f"{_short(a)} · {s or 'nobody'}" for a, s in rows]
        )
        for spine in axes.spines.values():
            spine.set_visible(False)

    return Drawing(
        slug,
        "Success against baseline",
        "Attacks by defences.",
        draw,
        2.6 + 0.8 * len(defences),
        1.3 + 0.3 * len(rows),
    )


def _quiet(axes: Axes, grid: str = "y") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    if grid:
        axes.grid(axis=grid, lw=0.6)  # type: ignore[arg-type]


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(
            frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0
        )


def _short(name: str, most: int = 22) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _strip(svg: str) -> str:
    """Leave out what a page does not need: prolog, metadata, a style that would reach beyond."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    return re.sub(r"\n\s*", "\n", svg)


def _own_ids(svg: str, slug: str) -> str:
    """Keep the ids that something points at, and make them this figure's own."""
    used = set(re.findall(r'(?:url\(#|href="#)([\w-]+)', svg))

    def rename(match: re.Match[str]) -> str:
        name = match[2]
        if name.startswith(f"{slug}-"):
            return match[0]
        return f'{match[1]}id="{slug}-{name}"' if name in used else ""

    svg = re.sub(r'( )id="([^"]*)"', rename, svg)
    svg = re.sub(r"url\(#([\w-]+)\)", rf"url(#{slug}-\1)", svg)
    return re.sub(r'href="#([\w-]+)"', rf'href="#{slug}-\1"', svg)


def _own_font(match: re.Match[str]) -> str:
    return f"font{match[1] or ''}: {match[2]}var(--sans)"


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")

"""Colours that hold in light, in dark, on paper and for the colour-blind.

Hues follow Okabe and Ito; a dash pattern and a marker tell apart what colour alone would.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

_SERIES_LIGHT = (
    "#1c2126",
    "#0072b2",
    "#c44e00",
    "#00815f",
    "#b0578d",
    "#a37500",
    "#5b4bb7",
    "#2b8fc4",
)
_SERIES_DARK = (
    "#e9ecef",
    "#56b4e9",
    "#ff9d5c",
    "#3ecba0",
    "#e79ac6",
    "#ecc45c",
    "#a99bf5",
    "#8fd0f5",
)
_HEAT_LIGHT = ("#fdf6ee", "#fbd9b0", "#f5a96b", "#dd6f3c", "#b23f1c", "#7c1d0c")
_HEAT_DARK = ("#20262d", "#3c2e29", "#6b3d29", "#a5522c", "#dd7c43", "#ffc08a")
# Classes have no order and no alarm: Tol's muted hues, some of them lighter in the dark.
_CLASSES_LIGHT = (
    "#88ccee",
    "#cc6677",
    "#ddcc77",
    "#117733",
    "#332288",
    "#aa4499",
    "#44aa99",
    "#999933",
    "#882255",
    "#bbbbbb",
    "#4477aa",
    "#ee8866",
)
_CLASSES_DARK = (
    "#88ccee",
    "#cc6677",
    "#ddcc77",
    "#3a9b5c",
    "#7a6fd1",
    "#aa4499",
    "#44aa99",
    "#999933",
    "#b55a86",
    "#8a8a8a",
    "#4477aa",
    "#ee8866",
)
DASHES: tuple[tuple[float, ...], ...] = (
    (),
    (5, 2),
    (1.2, 1.4),
    (6, 2, 1.2, 2),
    (3, 1.4),
    (8, 2, 2, 2, 2, 2),
    (2, 2),
    (10, 3),
)
MARKERS = "osD^vPXp"
HEAT_STEPS = 11


@dataclass(frozen=True)
class Palette:
    """Colours by their part. ``series`` repeats; its first is the federation as it is."""

    ink: str
    muted: str
    line: str
    surface: str
    series: tuple[str, ...]
    heat: tuple[str, ...]
    classes: tuple[str, ...]

    @property
    def on_heat(self) -> tuple[str, ...]:
        """The colour of text on each step of heat: whichever of two is read more easily."""
        dark, bright = "#000000", "#ffffff"
        return tuple(
            dark if contrast(dark, h) >= contrast(bright, h) else bright for h in self.heat
        )


def contrast(one: str, other: str) -> float:
    """Return the contrast of two colours by WCAG 2, from 1 to 21.

    >>> round(contrast("#000000", "#ffffff"))
    21
    """
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _steps(stops: Sequence[str], number: int) -> tuple[str, ...]:
    found = []
    for step in range(number):
        at = step / (number - 1) * (len(stops) - 1)
        left = min(int(at), len(stops) - 2)
        pairs = zip(_rgb(stops[left]), _rgb(stops[left + 1]), strict=True)
        found.append("#" + "".join(f"{round(a + (b - a) * (at - left)):02x}" for a, b in pairs))
    return tuple(found)


def _rgb(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


LIGHT = Palette(
    "#1c2126",
    "#59636e",
    "#dcd8d1",
    "#ffffff",
    _SERIES_LIGHT,
    _steps(_HEAT_LIGHT, HEAT_STEPS),
    _CLASSES_LIGHT,
)
DARK = Palette(
    "#e9ecef",
    "#a3adb8",
    "#38414b",
    "#1b2026",
    _SERIES_DARK,
    _steps(_HEAT_DARK, HEAT_STEPS),
    _CLASSES_DARK,
)
# Colours that no figure would choose: in the page, each becomes the variable of its part.
STAND_IN = replace(
    LIGHT,
    ink="#010201",
    muted="#010202",
    line="#010203",
    surface="#010204",
    series=tuple(f"#0103{i:02x}" for i in range(len(_SERIES_LIGHT))),
    heat=tuple(f"#0104{i:02x}" for i in range(HEAT_STEPS)),
    classes=tuple(f"#0105{i:02x}" for i in range(len(_CLASSES_LIGHT))),
)


def variables(palette: Palette) -> dict[str, str]:
    """Return a palette as CSS custom properties."""
    named = {"ink": palette.ink, "muted": palette.muted, "line": palette.line}
    named["surface"] = palette.surface
    named |= {f"s{i}": colour for i, colour in enumerate(palette.series)}
    named |= {f"h{i}": colour for i, colour in enumerate(palette.heat)}
    named |= {f"c{i}": colour for i, colour in enumerate(palette.classes)}
    named |= {f"t{i}": colour for i, colour in enumerate(palette.on_heat)}
    return {f"--{name}": colour for name, colour in named.items()}


def to_variables(svg: str) -> str:
    """Let a figure drawn in stand-ins follow the page, light or dark."""
    for name, colour in variables(STAND_IN).items():
        if not name.startswith("--t"):
            svg = svg.replace(colour, f"var({name})")
    return svg

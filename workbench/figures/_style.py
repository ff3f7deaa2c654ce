"""What all figures share: the palette by meaning, the symbols by backend, the look in light and dark, axis ticks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape
from typing import Any, NamedTuple

# Okabe & Ito, "Color Universal Design" (2008): told apart by colour-blind eyes, the same in both themes
FAMILY_COLOURS = {
    "dense": "#999999",
    "pruned": "#E69F00",
    "quantised": "#56B4E9",
    "pruned+quantised": "#009E73",
    "distilled": "#CC79A7",
    "factorised": "#F0E442",
    "clustered": "#F0E442",
    "clipped": "#0072B2",
    "mixed": "#D55E00",
}
FAMILY_NAMES = {"pruned+quantised": "pruned and quantised", "factorised": "low rank", "clustered": "weights shared"}
# in pixels: yellow alone is too faint on white and blue on black, and the heavier line tells one yellow from the other
FAMILY_OUTLINES = {"factorised": 1.2, "clustered": 3.0, "clipped": 1.2}
BAR_COLOUR = "#0072B2"  # bars never stand beside families
UNATTRIBUTED_COLOUR = "#999999"

_SYMBOLS = {
    "PyTorch eager": "circle",
    "torch.compile": "pentagon",
    "ONNX Runtime": "square",
    "OpenVINO": "diamond",
    "TensorRT": "star-triangle-up",
}
_SPARE_SYMBOLS = (
    "triangle-up",
    "triangle-down",
    "cross",
    "x",
    "hexagram",
    "star",
    "bowtie",
    "hourglass",
    "star-square",
)

FONT = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"


class Ink(NamedTuple):
    """Colours that differ between the light and the dark theme."""

    text: str
    muted: str
    grid: str
    surface: str


LIGHT = Ink("rgba(0,0,0,0.87)", "rgba(0,0,0,0.62)", "rgba(0,0,0,0.10)", "#ffffff")
DARK = Ink("rgba(255,255,255,0.90)", "rgba(255,255,255,0.68)", "rgba(255,255,255,0.16)", "#1e1e1e")


def ink(dark: bool) -> Ink:
    """The colours of text, lines and hover boxes for one theme."""
    return DARK if dark else LIGHT


def symbols(backends: Iterable[str]) -> dict[str, str]:
    """A marker symbol for each backend label, in order of first appearance.

    A backend keeps its symbol in every chart; a second setting of the same backend takes the next spare symbol, because
    two settings are two ways to run a model.
    """
    chosen: dict[str, str] = {}
    spare = iter(_SPARE_SYMBOLS * 4)
    for label in backends:
        if label in chosen:
            continue
        own = next((s for title, s in _SYMBOLS.items() if label.startswith(title)), None)
        chosen[label] = own if own is not None and own not in chosen.values() else next(spare)
    return chosen


def family_colour(family: str) -> str:
    """The colour of one family of techniques.

    Raises
    ------
    ValueError
        If the family is not in the palette.
    """
    if family not in FAMILY_COLOURS:
        raise ValueError(f"family {family!r} has no colour. Accepted: {', '.join(FAMILY_COLOURS)}.")
    return FAMILY_COLOURS[family]


def log_ticks(low: float, high: float) -> tuple[list[float], list[str]]:
    """Values and labels of a log axis whose view reaches from `low` to `high`; a decade beyond, for who zooms out.

    The fewer decades are in view, the more values of each.
    """
    decades = math.log10(high / low)
    mantissas: tuple[float, ...] = (1,)
    if decades <= 0.4:
        mantissas = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
    elif decades <= 0.9:
        mantissas = (1, 1.5, 2, 3, 4, 6)
    elif decades <= 2.5:
        mantissas = (1, 2, 5)
    first, last = math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1
    values = [m * 10.0**e for e in range(first, last + 1) for m in mantissas]
    return values, [f"{v:.10f}".rstrip("0").rstrip(".") for v in values]


def plain(text: str) -> str:
    """Text for a place where plotly would read tags; names come from files."""
    return escape(str(text), quote=False)


def layout(dark: bool, **more: Any) -> dict[str, Any]:
    """Layout settings every figure starts from: transparent, small margins, fonts and grid of the theme."""
    colours = ink(dark)
    axis = {
        "gridcolor": colours.grid,
        "linecolor": colours.muted,
        "tickcolor": colours.muted,
        "zeroline": False,
        "showline": True,
        "ticks": "outside",
        "ticklen": 4,
        "automargin": True,
        "title": {"standoff": 8, "font": {"size": 13, "color": colours.text}},
    }
    base = {
        "template": {"layout": {"xaxis": axis, "yaxis": axis}},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": FONT, "size": 12, "color": colours.text},
        "margin": {"l": 8, "r": 16, "t": 16, "b": 8},
        "hoverlabel": {
            "bgcolor": colours.surface,
            "bordercolor": colours.muted,
            "font": {"family": FONT, "size": 12, "color": colours.text},
            "align": "left",
        },
        "legend": {
            "itemclick": False,
            "itemdoubleclick": False,
            "groupclick": "toggleitem",
            "font": {"size": 12, "color": colours.text},
            "grouptitlefont": {"size": 12, "color": colours.muted},
        },
        "autosize": True,
        "uirevision": "kept",  # new data leaves the reader's zoom as it is
    }
    return base | more


def message(text: str, dark: bool) -> dict[str, Any]:
    """Layout of an empty figure that says what to do first."""
    blank = {"visible": False, "range": [0, 1]}
    note = {
        "text": plain(text),
        "showarrow": False,
        "xref": "paper",
        "yref": "paper",
        "x": 0.5,
        "y": 0.5,
        "font": {"size": 13, "color": ink(dark).muted},
    }
    return layout(dark, xaxis=blank, yaxis=blank, annotations=[note], height=280)

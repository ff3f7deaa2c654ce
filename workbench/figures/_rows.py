"""What the figures of a profile's rows share: names and words of a row, a colour for each kind and for each value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Number
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from workbench import formatting as fmt
from workbench.figures import _style as style

ROW_HEIGHT_PX = 22
NO_PROFILE = "No profile yet. Choose an engine and run it."

# what computes nothing of the model is muted, each kind in its own way
KIND_COLOURS = {
    "layer": style.BAR_COLOUR,
    "move": "#BFA678",
    "call": "#6B7785",
    "unknown": "#C9A9B8",
    "unattributed": style.UNATTRIBUTED_COLOUR,
}
KIND_NAMES = {"move": "moves and conversions", "call": "entering and leaving", "layer": "layers"}

# Tol, "Colour Schemes" (2021), scheme "muted": safe for colour-blind eyes, and none of it stands for a technique
_WORD_COLOURS = (*("#88CCEE", "#CC6677", "#DDCC77", "#44AA99", "#AA4499", "#999933", "#332288", "#117733", "#882255"),)
_OTHER_COLOUR = "#BBBBBB"
# Nuñez et al., "Optimizing colormaps with consideration for color vision deficiency", PLOS ONE 2018
_CIVIDIS = (
    *("#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838"),
)
_LINEAR = ("latency_ms", "latency_p95_ms", "share")
_LABEL_LENGTH = 32


class Shades(NamedTuple):
    """How the values of a column colour the rows.

    Attributes
    ----------
    colours
        One for each row.
    entries
        Words and their colours, the one with most time first; empty for a column of numbers.
    low, high
        Ends of the scale of a column of numbers.
    log
        Whether that scale is logarithmic.
    """

    colours: tuple[str, ...]
    entries: tuple[tuple[str, str], ...] = ()
    low: float = math.nan
    high: float = math.nan
    log: bool = False


def words(row: pd.Series, column: str) -> str:
    """The text of a cell; empty where there is none."""
    value = row.get(column)
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else str(value)


def number(row: pd.Series, column: str) -> float:
    """The number of a cell; NaN where there is none."""
    value = row.get(column)
    return math.nan if value is None else float(value)


def shorten(text: str) -> str:
    """Long names lose their middle: the start says which block, the end which layer."""
    if len(text) <= _LABEL_LENGTH:
        return text
    half = (_LABEL_LENGTH - 1) // 2
    return f"{text[:half]}…{text[-half:]}"


def is_selected(layer: str, selected: str | None) -> bool:
    """Whether a row of these layers is set off; both may be several joined by `` + ``, and one in common is enough."""
    return bool(selected) and not set(selected.split(" + ")).isdisjoint(layer.split(" + "))


def written(column: str, value: float) -> str:
    """A number of this column as a person reads it; the sign is a true minus."""
    if column.endswith("_ms"):
        text = fmt.milliseconds(value)
    elif column == "share":
        text = fmt.share(value)
    elif column.endswith("_bytes"):
        text = fmt.size(value)
    elif column in ("macs", "parameters"):
        text = fmt.count(value)
    else:
        text = fmt.significant(value)
    return text.replace("-", "−")


def hover(row: pd.Series) -> list[str]:
    """What hovering says of a row: name, type, time, MACs; safe to show."""
    layer, name, kind = (words(row, key) for key in ("layer", "name", "type"))
    lines = [f"<b>{style.plain(layer or name)}</b>"]
    if kind != "unattributed":
        lines.append(" · ".join(style.plain(w) for w in (kind, name) if w and w != layer))
    latency, share = number(row, "latency_ms"), number(row, "share")
    lines.append(f"{fmt.milliseconds(latency)} · {fmt.share(share)} of the call")
    if not math.isnan(p95 := number(row, "latency_p95_ms")):
        lines.append(f"p95 {fmt.milliseconds(p95)}")
    if (macs := number(row, "macs")) > 0:
        lines.append(f"{fmt.count(macs)} MACs · {fmt.count(number(row, 'parameters'))} parameters")
    return lines


def traffic(row: pd.Series) -> list[str]:
    """Further lines: shapes, bytes, intensity and precision, as far as they are known."""
    lines = []
    shapes = [row.get(key) for key in ("input_shape", "output_shape")]
    if all(isinstance(shape, tuple) for shape in shapes):
        lines.append(" → ".join(str(shape) for shape in shapes))
    read, wrote, intensity = (number(row, key) for key in ("read_bytes", "written_bytes", "intensity"))
    if math.isfinite(read) and math.isfinite(wrote):
        lines.append(f"{fmt.size(read)} read · {fmt.size(wrote)} written")
    if math.isfinite(intensity):
        lines.append(f"{fmt.significant(intensity)} operations per byte")
    if precision := words(row, "precision"):
        lines.append(style.plain(precision))
    return lines


def shades(frame: pd.DataFrame, column: str) -> Shades:
    """Colours by the values of a column: cividis for numbers, a colour each for words, grey where nothing is known.

    Times and shares are on a linear scale, so that what takes long stands out; other numbers that span two decades are
    on a logarithmic one.

    Raises
    ------
    ValueError
        If the frame has no such column, or one that is neither numbers nor words.
    """
    if column not in frame:
        raise ValueError(f"There is no column {column!r} to colour by. Accepted: {', '.join(map(str, frame.columns))}.")
    cells = frame[column]
    if any(isinstance(cell, tuple | list) for cell in cells):
        raise ValueError(f"Column {column!r} holds shapes; colour by a column of numbers or words.")
    if all(cell is None or isinstance(cell, Number) for cell in cells):
        return _by_number(cells.to_numpy(float), column)
    return _by_word([words(row, column) for _, row in frame.iterrows()], frame["latency_ms"])


def _by_number(values: np.ndarray, column: str) -> Shades:
    known = values[np.isfinite(values)]
    if not len(known):
        return Shades((_OTHER_COLOUR,) * len(values))
    positive = known[known > 0]
    log = column not in _LINEAR and len(positive) > 0 and positive.max() >= 100 * positive.min()
    low, high = (positive.min(), positive.max()) if log else (min(known.min(), 0.0), known.max())
    ends = np.log10([low, high]) if log else np.array([low, high])
    places = np.log10(np.maximum(values, low)) if log else values
    places = (places - ends[0]) / (ends[1] - ends[0] or 1.0)
    anchors = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in _CIVIDIS])
    channels = np.array([np.interp(places, np.linspace(0, 1, len(anchors)), anchors[:, i]) for i in range(3)]).T
    colours = tuple(
        "#{:02x}{:02x}{:02x}".format(*np.rint(rgb).astype(int)) if math.isfinite(value) else _OTHER_COLOUR
        for rgb, value in zip(channels, values, strict=True)
    )
    return Shades(colours, (), float(low), float(high), bool(log))


def _by_word(values: Sequence[str], latency_ms: pd.Series) -> Shades:
    total: dict[str, float] = {}
    for word, latency in zip(values, latency_ms.fillna(0), strict=True):
        total[word] = total.get(word, 0.0) + latency
    ranked = sorted((word for word in total if word), key=lambda word: -total[word])
    colour = dict(zip(ranked, _WORD_COLOURS, strict=False))
    entries = [*colour.items()]
    if len(ranked) > len(colour):
        entries.append(("other", _OTHER_COLOUR))
    return Shades(tuple(colour.get(word, _OTHER_COLOUR) for word in values), tuple(entries))


def key(shading: Shades, title: str, ink: style.Ink) -> list[dict[str, Any]]:
    """Traces without points that explain the colours: an entry for each word, or a colour bar, above the chart."""
    if shading.entries:
        return [legend_entry(word, colour, ink) for word, colour in shading.entries]
    if math.isnan(shading.low):
        return []
    ends = [math.log10(v) if shading.log else v for v in (shading.low, shading.high)]
    bar: dict[str, Any] = {
        "orientation": "h",
        "x": 0,
        "xanchor": "left",
        "y": 1,
        "yanchor": "bottom",
        "len": 0.5,
        "thickness": 10,
        "xpad": 0,
        "ypad": 0,
        "outlinewidth": 0,
        "tickcolor": ink.muted,
        "ticks": "outside",
        "ticklen": 4,
        "title": {"text": style.plain(title), "side": "top", "font": {"size": 12, "color": ink.muted}},
        "nticks": 5,
    }
    if shading.log:
        ticks, labels = style.log_ticks(shading.low, shading.high)
        inside = [
            (math.log10(v), t if v < 1000 else fmt.count(v).replace(".00", "").replace(".0", ""))
            for v, t in zip(ticks, labels, strict=True)
            if shading.low <= v <= shading.high
        ]
        bar |= {"tickvals": [v for v, _ in inside], "ticktext": [t for _, t in inside]}
    marker = {"color": ends, "cmin": ends[0], "cmax": ends[1], "colorscale": list(_CIVIDIS), "colorbar": bar}
    return [_unseen() | {"marker": marker | {"showscale": True}, "showlegend": False}]


def legend_entry(name: str, colour: str, ink: style.Ink) -> dict[str, Any]:
    """A trace without points that puts a square of this colour into the legend."""
    marker = {"size": 11, "color": colour, "symbol": "square", "line": {"color": ink.muted, "width": 1}}
    return _unseen() | {"name": style.plain(name), "marker": marker, "showlegend": True}


def beside(ends: Sequence[float], texts: Sequence[str], ink: style.Ink) -> dict[str, Any]:
    """A trace of texts at the ends of horizontal bars, from the first bar down."""
    return {
        "type": "scatter",
        "mode": "text",
        "x": [max(end, 0.0) for end in ends],  # beside the axis for a negative rest, clear of the names
        "y": list(range(len(ends))),
        "text": [f"\u2009{text}" for text in texts],
        "textposition": "middle right",
        "textfont": {"size": 12, "color": ink.muted},
        "hoverinfo": "skip",
        "showlegend": False,
        "cliponaxis": False,
    }


def _unseen() -> dict[str, Any]:
    return {"type": "scatter", "mode": "markers", "x": [None], "y": [None], "hoverinfo": "skip"}


def legend_above() -> dict[str, Any]:
    """Where a legend stands that explains colours."""
    return {"orientation": "h", "x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom"}

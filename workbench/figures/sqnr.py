"""How far two versions of a model are apart: SQNR by layer, in execution order."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import pandas as pd

from workbench import formatting as fmt
from workbench.figures import _rows as rows
from workbench.figures import _style as style

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_FRAME_HEIGHT_PX = 64
_LEAST_SPAN_DB = 10.0


class Distance(NamedTuple):
    """One point as it is drawn; `end_db` is where its bar ends, which for equal layers is the right end of all bars."""

    label: str
    layer: str
    end_db: float
    text: str
    hover: str


class DistancesInfo(NamedTuple):
    """The bars from the top down, and the ends of the axis in decibels."""

    bars: tuple[Distance, ...]
    low_db: float
    high_db: float


def _info(frame: pd.DataFrame) -> DistancesInfo:
    """The data of the chart: a bar per row of the frame of `Distances`, in its order."""
    finite = [v for v in frame["sqnr_db"] if math.isfinite(v)]
    low, high = min([0.0, *finite]), max([_LEAST_SPAN_DB, *finite])
    return DistancesInfo(tuple(_bar(row, high) for _, row in frame.iterrows()), low, high)


def _bar(row: pd.Series, high: float) -> Distance:
    layer, value = str(row["layer"]), float(row["sqnr_db"])
    shape = " × ".join(str(n) for n in row["shape"])
    if math.isnan(value):
        text, end = "no signal", 0.0
    elif math.isinf(value):
        text, end = "equal", high
    else:
        text, end = f"{value:.1f} dB".replace("-", "−"), value
    lines = [f"<b>{style.plain(layer)}</b>", style.plain(f"{row['type']} · {shape}"), f"SQNR {text}"]
    lines.append(f"cosine {float(row['cosine']):.4f} · largest error {fmt.significant(float(row['max_error']))}")
    return Distance(rows.shorten(layer), layer, end, text, "<br>".join(lines))


def sqnr_figure(frame: pd.DataFrame, *, selected: str | None = None, dark: bool = False) -> Figure:
    """Horizontal bars of SQNR by layer in execution order; the shorter, the further the two versions are apart.

    Parameters
    ----------
    frame
        The frame of `workbench.profiling.sqnr`: a row per layer, SQNR in decibels.
    selected
        The layer to set off from the others; several joined by `` + `` set off every row that shares one.
    dark
        Whether it will lie on a dark page; the background is transparent.

    Returns
    -------
    plotly.graph_objects.Figure
        As tall as its rows need; customdata holds the layer's name.
    """
    from plotly.graph_objects import Figure

    info = _info(frame)
    if not info.bars:
        return Figure(layout=style.message("Nothing compared yet. Choose two versions of the model.", dark))
    ink = style.ink(dark)
    chosen = [rows.is_selected(b.layer, selected) for b in info.bars]
    positions = list(range(len(info.bars)))
    bars = {
        "type": "bar",
        "orientation": "h",
        "x": [b.end_db for b in info.bars],
        "y": positions,
        "customdata": [b.layer for b in info.bars],
        "hovertext": [b.hover for b in info.bars],
        "hovertemplate": "%{hovertext}<extra></extra>",
        "marker": {
            "color": style.BAR_COLOUR,
            "opacity": [1.0 if c or not any(chosen) else 0.45 for c in chosen],
            "line": {"color": ink.text, "width": [2 if c else 0 for c in chosen]},
        },
    }
    span = info.high_db - info.low_db
    labels = [style.plain(b.label) for b in info.bars]
    layout = style.layout(
        dark,
        height=_FRAME_HEIGHT_PX + rows.ROW_HEIGHT_PX * max(len(info.bars), 4),
        bargap=0.25,
        xaxis={
            "title": {"text": "SQNR (dB) · right is closer"},
            "range": [info.low_db - 0.04 * span if info.low_db < 0 else 0, info.high_db + 0.14 * span],
            "zeroline": True,
            "zerolinecolor": ink.muted,
        },
        yaxis={
            "range": [len(info.bars) - 0.5, -0.5],
            "tickvals": positions,
            "ticktext": [f"<b>{t}</b>" if c else t for t, c in zip(labels, chosen, strict=True)],
            "ticks": "",
            "showgrid": False,
        },
        showlegend=False,
    )
    return Figure(data=[bars, rows.beside(bars["x"], [b.text for b in info.bars], ink)], layout=layout)

"""Where the time goes: horizontal bars by layer, in execution order."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import pandas as pd

from workbench.figures import _rows as rows
from workbench.figures import _style as style

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

ROW_HEIGHT_PX = rows.ROW_HEIGHT_PX
_FRAME_HEIGHT_PX = 64
_UNATTRIBUTED = "unattributed"


class Bar(NamedTuple):
    """One row of a profile as it is drawn; `share` in per cent of the whole call."""

    label: str
    layer: str
    share: float
    text: str
    hover: str
    unattributed: bool


class BarsInfo(NamedTuple):
    """The bars from the top down, and how tall the figure has to be to keep each readable."""

    bars: tuple[Bar, ...]
    height_px: int


def _info(frame: pd.DataFrame) -> BarsInfo:
    """The data of the chart: a bar per row of a profile's frame, in its order."""
    bars = tuple(_bar(row) for _, row in frame.iterrows())
    return BarsInfo(bars, _FRAME_HEIGHT_PX + ROW_HEIGHT_PX * max(len(bars), 4))


def _bar(row: pd.Series) -> Bar:
    layer = rows.words(row, "layer")
    latency = float(row["latency_ms"])
    return Bar(
        label=rows.shorten(layer or rows.words(row, "name")),
        layer=layer,
        share=100 * float(row["share"]),
        text=rows.written("latency_ms", latency),
        hover="<br>".join(rows.hover(row)),
        unattributed=rows.words(row, "type") == _UNATTRIBUTED,
    )


def profile_bars_figure(frame: pd.DataFrame, *, selected: str | None = None, dark: bool = False) -> Figure:
    """Horizontal bars by layer in execution order, the share of the call on the axis, the unattributed rest in grey.

    Parameters
    ----------
    frame
        A profile's frame: a row per layer or kernel; latency in milliseconds, share from 0 to 1.
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
        return Figure(layout=style.message(rows.NO_PROFILE, dark))
    ink = style.ink(dark)
    chosen = [rows.is_selected(b.layer, selected) for b in info.bars]
    positions = list(range(len(info.bars)))
    bars = {
        "type": "bar",
        "orientation": "h",
        "x": [b.share for b in info.bars],
        "y": positions,  # positions, not names: two kernels of one layer must stay two bars
        "customdata": [b.layer for b in info.bars],
        "hovertext": [b.hover for b in info.bars],
        "hovertemplate": "%{hovertext}<extra></extra>",
        "marker": {
            "color": [style.UNATTRIBUTED_COLOUR if b.unattributed else style.BAR_COLOUR for b in info.bars],
            "opacity": [1.0 if c or not any(chosen) else 0.45 for c in chosen],
            "line": {"color": ink.text, "width": [2 if c else 0 for c in chosen]},
        },
    }
    latencies = rows.beside(bars["x"], [b.text for b in info.bars], ink)
    highest = max(max(b.share for b in info.bars), 1.0)
    lowest = min(min(b.share for b in info.bars), 0.0)
    span = highest - lowest
    layout = style.layout(
        dark,
        height=info.height_px,
        bargap=0.25,
        xaxis={
            "title": {"text": "share of the call (%)"},
            "range": [lowest - 0.04 * span if lowest < 0 else 0, highest + 0.14 * span],
            "zeroline": True,
            "zerolinecolor": ink.muted,
        },
        yaxis={
            "range": [len(info.bars) - 0.5, -0.5],
            "tickvals": positions,
            "ticktext": [_tick(b, c) for b, c in zip(info.bars, chosen, strict=True)],
            "ticks": "",
            "showgrid": False,
        },
        showlegend=False,
    )
    return Figure(data=[bars, latencies], layout=layout)


def _tick(bar: Bar, chosen: bool) -> str:
    return f"<b>{style.plain(bar.label)}</b>" if chosen else style.plain(bar.label)

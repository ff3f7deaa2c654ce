"""Which kinds of operation the time goes to: bars by type, the slowest first."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import pandas as pd

from workbench import formatting as fmt
from workbench.figures import _rows as rows
from workbench.figures import _style as style

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_HEADROOM_PX = 40
_FRAME_HEIGHT_PX = _HEADROOM_PX + 56


class TypeBar(NamedTuple):
    """All rows of one type and kind; `share` in per cent of the whole call, `layers` theirs, joined by `` + ``."""

    type: str
    kind: str
    latency_ms: float
    share: float
    count: int
    layers: str
    text: str
    hover: str


def _info(frame: pd.DataFrame) -> tuple[TypeBar, ...]:
    """The data of the chart: a bar for each type of operation by falling time, the unattributed rest last."""
    bars = [_bar(str(type_), str(kind), group) for (type_, kind), group in frame.groupby(["type", "kind"], sort=False)]
    return tuple(sorted(bars, key=lambda bar: (bar.kind == "unattributed", -bar.latency_ms)))


def _bar(type_: str, kind: str, group: pd.DataFrame) -> TypeBar:
    latency, share = float(group["latency_ms"].sum()), float(group["share"].sum())
    counted = kind not in ("call", "unattributed")
    layers = dict.fromkeys(layer for cell in group["layer"] for layer in str(cell).split(" + ") if layer)
    text = rows.written("latency_ms", latency)
    lines = [f"<b>{style.plain(type_)}</b>", f"{text} · {rows.written('share', share)} of the call"]
    if counted:
        slowest = group.loc[group["latency_ms"].idxmax()]
        lines.append(_times(len(group), "operation"))
        name = rows.shorten(rows.words(slowest, "layer") or rows.words(slowest, "name"))
        lines.append(f"slowest: {style.plain(name)}, {fmt.milliseconds(float(slowest['latency_ms']))}")
        if (macs := float(group["macs"].sum())) > 0:
            lines.append(f"{fmt.count(macs)} MACs")
    return TypeBar(
        type=type_,
        kind=kind,
        latency_ms=latency,
        share=100 * share,
        count=len(group),
        layers=" + ".join(layers),
        text=f"{text} · {_times(len(group), 'row')}" if counted else text,
        hover="<br>".join(lines),
    )


def _times(count: int, thing: str) -> str:
    return f"{count} {thing}{'s' if count > 1 else ''}"


def profile_types_figure(frame: pd.DataFrame, *, selected: str | None = None, dark: bool = False) -> Figure:
    """Horizontal bars by type of operation, the slowest type first; what computes nothing of the model is muted.

    Parameters
    ----------
    frame
        A profile's frame: a row per layer or kernel; latency in milliseconds, share from 0 to 1.
    selected
        The layer whose types are set off from the others; several joined by `` + `` set off those of each.
    dark
        Whether it will lie on a dark page; the background is transparent.

    Returns
    -------
    plotly.graph_objects.Figure
        As tall as its bars need; customdata holds the names of a bar's layers, joined by `` + ``.
    """
    from plotly.graph_objects import Figure

    bars = _info(frame)
    if not bars:
        return Figure(layout=style.message(rows.NO_PROFILE, dark))
    ink = style.ink(dark)
    chosen = [rows.is_selected(bar.layers, selected) for bar in bars]
    positions = list(range(len(bars)))
    shares = {
        "type": "bar",
        "orientation": "h",
        "x": [bar.share for bar in bars],
        "y": positions,
        "customdata": [bar.layers for bar in bars],
        "hovertext": [bar.hover for bar in bars],
        "hovertemplate": "%{hovertext}<extra></extra>",
        "marker": {
            "color": [rows.KIND_COLOURS[bar.kind] for bar in bars],
            "opacity": [1.0 if c or not any(chosen) else 0.45 for c in chosen],
            "line": {"color": ink.text, "width": [2 if c else 0 for c in chosen]},
        },
        "showlegend": False,
    }
    texts = rows.beside(shares["x"], [bar.text for bar in bars], ink)
    kinds = [kind for kind in rows.KIND_COLOURS if kind in {bar.kind for bar in bars}]
    entries = [rows.legend_entry(rows.KIND_NAMES.get(kind, kind), rows.KIND_COLOURS[kind], ink) for kind in kinds]
    highest, lowest = max(*(bar.share for bar in bars), 1.0), min(*(bar.share for bar in bars), 0.0)
    span = highest - lowest
    layout = style.layout(
        dark,
        height=_FRAME_HEIGHT_PX + rows.ROW_HEIGHT_PX * max(len(bars), 4),
        margin={"l": 8, "r": 16, "t": _HEADROOM_PX, "b": 8},
        bargap=0.25,
        xaxis={
            "title": {"text": "share of the call (%)"},
            "range": [lowest - 0.04 * span if lowest < 0 else 0, highest + 0.32 * span],
            "zeroline": True,
            "zerolinecolor": ink.muted,
        },
        yaxis={
            "range": [len(bars) - 0.5, -0.5],
            "tickvals": positions,
            "ticktext": [style.plain(rows.shorten(bar.type)) for bar in bars],
            "ticks": "",
            "showgrid": False,
        },
        legend=style.layout(dark)["legend"] | rows.legend_above(),
    )
    return Figure(data=[shares, texts, *entries], layout=layout)

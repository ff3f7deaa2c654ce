"""Two profiles beside each other: what each group of layers takes on the one engine and on the other."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd

from workbench import formatting as fmt
from workbench.figures import _rows as rows
from workbench.figures import _style as style

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

COLOUR_A, COLOUR_B = style.BAR_COLOUR, "#D55E00"  # blue and vermilion of the palette, the farthest apart
_PAIR_HEIGHT_PX = 34
_HEADROOM_PX = 40
_FRAME_HEIGHT_PX = _HEADROOM_PX + 56


class Pair(NamedTuple):
    """One group of rows that stand for the same layers; a side without rows has NaN."""

    label: str
    layers: str
    latency_a_ms: float
    latency_b_ms: float
    text: str
    hover: str
    matched: bool


def _info(frame: pd.DataFrame, label_a: str, label_b: str) -> tuple[Pair, ...]:
    """The data of the chart: a pair of bars for each group in execution order, then the unmatched time of each side."""
    return tuple(_pair(row, label_a, label_b) for _, row in frame.iterrows())


def _pair(row: pd.Series, label_a: str, label_b: str) -> Pair:
    matched = row["how"] != "unmatched"
    # the side that a row of unmatched time is not about has no names, and no bar
    latency_a, latency_b = (
        rows.number(row, f"latency_{side}_ms") if row[f"names_{side}"] else math.nan for side in "ab"
    )
    layers = tuple(dict.fromkeys((*row["layers_a"], *row["layers_b"]))) if matched else ()
    names = tuple(row["names_a"]) or tuple(row["names_b"])
    if matched:
        title = " + ".join(layers or names)
    else:
        title = f"unmatched in {label_b if math.isnan(latency_a) else label_a}"
    ratio = rows.number(row, "ratio")
    lines = [f"<b>{style.plain(title)}</b>"]
    for label, key, latency in ((label_a, "names_a", latency_a), (label_b, "names_b", latency_b)):
        if math.isfinite(latency):
            lines.append(f"{style.plain(label)}: {fmt.milliseconds(latency)}")
            if matched:
                lines.append(f"  {style.plain(' + '.join(row[key]))}")
    if matched:
        lines.append(f"{fmt.factor(ratio)} · matched by {style.plain(row['how'])}")
    return Pair(
        label=rows.shorten(title),
        layers=" + ".join(layers),
        latency_a_ms=latency_a,
        latency_b_ms=latency_b,
        text=fmt.factor(ratio) if matched else fmt.milliseconds(latency_b if math.isnan(latency_a) else latency_a),
        hover="<br>".join(lines),
        matched=matched,
    )


def side_by_side_figure(
    frame: pd.DataFrame,
    label_a: str,
    label_b: str,
    *,
    selected: str | None = None,
    dark: bool = False,
) -> Figure:
    """Two bars for each group of layers in execution order, one for each profile; what has no partner in grey.

    Parameters
    ----------
    frame
        The frame of an alignment: latencies in milliseconds, their ratio, and how each group was matched.
    label_a, label_b
        What the two profiles are of, for the legend.
    selected
        The layer to set off from the others; several joined by `` + `` set off every group that shares one.
    dark
        Whether it will lie on a dark page; the background is transparent.

    Returns
    -------
    plotly.graph_objects.Figure
        As tall as its groups need; the text says how many times as long the first takes as the second; customdata
        holds the names of a group's layers, joined by `` + ``.
    """
    from plotly.graph_objects import Figure

    pairs = _info(frame, label_a, label_b)
    if not pairs:
        return Figure(layout=style.message("Nothing is aligned yet. Profile on two engines, then compare.", dark))
    ink = style.ink(dark)
    chosen = [rows.is_selected(pair.layers, selected) for pair in pairs]
    longest = [max((v for v in pair[2:4] if math.isfinite(v)), default=0.0) for pair in pairs]
    layout = style.layout(
        dark,
        height=_FRAME_HEIGHT_PX + _PAIR_HEIGHT_PX * max(len(pairs), 3),
        margin={"l": 8, "r": 16, "t": _HEADROOM_PX, "b": 8},
        barmode="group",
        bargap=0.3,
        xaxis={
            "title": {"text": "latency (ms) · ratio: the first over the second"},
            "range": [0, 1.14 * max(*longest, 1e-9)],
        },
        yaxis={
            "range": [len(pairs) - 0.5, -0.5],
            "tickvals": list(range(len(pairs))),
            "ticktext": [
                f"<b>{style.plain(p.label)}</b>" if c else style.plain(p.label)
                for p, c in zip(pairs, chosen, strict=True)
            ],
            "ticks": "",
            "showgrid": False,
        },
        legend=style.layout(dark)["legend"] | rows.legend_above() | {"traceorder": "normal"},
    )
    traces = [
        _bars(pairs, chosen, 0, label_a, COLOUR_A, ink),
        _bars(pairs, chosen, 1, label_b, COLOUR_B, ink),
        rows.beside(longest, [pair.text for pair in pairs], ink),
        rows.legend_entry(label_a, COLOUR_A, ink),
        rows.legend_entry(label_b, COLOUR_B, ink),
        rows.legend_entry("without a partner", style.UNATTRIBUTED_COLOUR, ink),
    ]
    return Figure(data=traces, layout=layout)


def _bars(
    pairs: tuple[Pair, ...], chosen: list[bool], side: int, label: str, colour: str, ink: style.Ink
) -> dict[str, Any]:
    return {
        "type": "bar",
        "name": style.plain(label),
        "orientation": "h",
        "offsetgroup": str(side),
        "x": [(pair.latency_a_ms, pair.latency_b_ms)[side] for pair in pairs],
        "y": list(range(len(pairs))),
        "customdata": [pair.layers for pair in pairs],
        "hovertext": [pair.hover for pair in pairs],
        "hovertemplate": "%{hovertext}<extra></extra>",
        "marker": {
            "color": [colour if pair.matched else style.UNATTRIBUTED_COLOUR for pair in pairs],
            "opacity": [1.0 if c or not any(chosen) else 0.45 for c in chosen],
            "line": {"color": ink.text, "width": [1.5 if c else 0 for c in chosen]},
        },
        "showlegend": False,
    }

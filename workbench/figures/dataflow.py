"""What reads what: the operations of a profile as a graph in execution order, coloured by any column."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd

from workbench.figures import _rows as rows
from workbench.figures import _style as style
from workbench.figures._lanes import Point, lay_out

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

NODES = "operations"
EDGES = "tensors"
_HEADROOM_PX = 72
_ROOM = 24.0  # lanes that would fit beside each other at least, so that a narrow graph leaves room for its labels
_SYMBOLS = {"layer": "circle", "move": "diamond"}
_TITLES = {"latency_ms": "latency (ms)", "latency_p95_ms": "p95 latency (ms)", "macs": "MACs"}


class Node(NamedTuple):
    """One row of a profile as it is drawn: its lane from left to right, its height from the top down."""

    row: int
    lane: int
    height: int
    label: str
    detail: str
    layer: str
    kind: str
    colour: str
    hover: str


class DataflowInfo(NamedTuple):
    """The graph, before anything is drawn; each path is an edge from its first point to its last."""

    nodes: tuple[Node, ...]
    paths: tuple[tuple[Point, ...], ...]
    shades: rows.Shades


def _info(frame: pd.DataFrame, edges: Sequence[tuple[int, int]], column: str) -> DataflowInfo:
    """The data of the chart: every row that computes or moves something, in order, and the edges between them."""
    for edge in edges:
        if not 0 <= edge[0] < edge[1] < len(frame):
            raise ValueError(
                f"Edge {tuple(edge)} does not lead from an earlier to a later of the {len(frame)} rows. Give the "
                "`edges` of the profile whose frame it is."
            )
    # the call and the rest are times, not operations
    drawn = [i for i, kind in enumerate(frame["kind"]) if kind not in ("call", "unattributed")]
    height = {row: i for i, row in enumerate(drawn)}
    inner = [(height[a], height[b]) for a, b in edges if a in height and b in height]
    part = frame.iloc[drawn]
    shading = rows.shades(part, column)
    layout = lay_out(len(drawn), inner)
    nodes = tuple(
        _node(row, index, layout.lanes[i], i, shading.colours[i], column)
        for i, (index, (_, row)) in enumerate(zip(drawn, part.iterrows(), strict=True))
    )
    return DataflowInfo(nodes, layout.paths, shading)


def _node(row: pd.Series, index: int, lane: int, height: int, colour: str, column: str) -> Node:
    layer, kind = rows.words(row, "layer"), rows.words(row, "type")
    value = row.get(column)
    shown = rows.words(row, column) if isinstance(value, str) else rows.written(column, rows.number(row, column))
    return Node(
        row=index,
        lane=lane,
        height=height,
        label=rows.shorten(layer or rows.words(row, "name")),
        detail=" · ".join(dict.fromkeys(word for word in (rows.shorten(kind), shown) if word not in ("", "–"))),
        layer=layer,
        kind=rows.words(row, "kind"),
        colour=colour,
        hover="<br>".join(rows.hover(row) + rows.traffic(row)),
    )


def dataflow_figure(
    frame: pd.DataFrame,
    edges: Sequence[tuple[int, int]],
    *,
    column: str = "latency_ms",
    selected: str | None = None,
    dark: bool = False,
) -> Figure:
    """The data-flow graph from top to bottom in execution order, each branch in a lane of its own.

    Parameters
    ----------
    frame
        A profile's frame: a row per layer or kernel.
    edges
        The profile's `edges`: pairs of row numbers, the first of which writes what the second reads.
    column
        What the colour says: a column of numbers (latency in milliseconds, MACs, bytes) or of words (type, precision).
    selected
        The layer to set off from the others; several joined by `` + `` set off every row that shares one.
    dark
        Whether it will lie on a dark page; the background is transparent.

    Returns
    -------
    plotly.graph_objects.Figure
        As tall as its rows need; the trace `NODES` has the layer's name as customdata.

    Raises
    ------
    ValueError
        If there is no such column, it holds shapes, or an edge names a row that is not there.
    """
    from plotly.graph_objects import Figure

    if frame.empty:
        return Figure(layout=style.message(rows.NO_PROFILE, dark))
    if not len(edges):
        return Figure(layout=style.message("This engine does not tell which operation reads what another wrote.", dark))
    info = _info(frame, edges, column)
    ink = style.ink(dark)
    lanes = [x for path in info.paths for x, _ in path] + [node.lane for node in info.nodes]
    left, right = min(lanes), max(lanes)
    layout = style.layout(
        dark,
        height=_HEADROOM_PX + rows.ROW_HEIGHT_PX * max(len(info.nodes), 4),
        xaxis={"visible": False, "range": [left - 0.7, left - 0.7 + max(_ROOM, 2.0 * (right - left + 1))]},
        yaxis={"visible": False, "range": [len(info.nodes) - 0.5, -0.5]},
        hovermode="closest",
        legend=style.layout(dark)["legend"] | rows.legend_above(),
    )
    # not scattergl: browsers draw no canvas as tall as a graph of 500 rows
    traces = [_edges(info, ink), _nodes(info, selected, ink), _labels(info, selected, right + 0.7, ink)]
    return Figure(
        data=traces + rows.key(info.shades, _TITLES.get(column, column.replace("_", " ")), ink), layout=layout
    )


def _edges(info: DataflowInfo, ink: style.Ink) -> dict[str, Any]:
    """One trace for all, its lines apart from each other by a gap."""
    points = [point for path in info.paths for point in (*path, (None, None))]
    return {
        "type": "scatter",
        "name": EDGES,
        "mode": "lines",
        "x": [x for x, _ in points],
        "y": [y for _, y in points],
        "line": {"color": ink.muted, "width": 1.2},
        "hoverinfo": "skip",
        "showlegend": False,
    }


def _nodes(info: DataflowInfo, selected: str | None, ink: style.Ink) -> dict[str, Any]:
    chosen = [rows.is_selected(node.layer, selected) for node in info.nodes]
    return {
        "type": "scatter",
        "name": NODES,
        "mode": "markers",
        "x": [node.lane for node in info.nodes],
        "y": [node.height for node in info.nodes],
        "customdata": [node.layer for node in info.nodes],
        "hovertext": [node.hover for node in info.nodes],
        "hovertemplate": "%{hovertext}<extra></extra>",
        "marker": {
            "size": [17 if c else 13 for c in chosen],
            "symbol": [_SYMBOLS.get(node.kind, "square") for node in info.nodes],
            "color": [node.colour for node in info.nodes],
            "opacity": 1.0,  # of markers of several sizes it is less by default
            "line": {"color": ink.text, "width": [3 if c else 0.8 for c in chosen]},
        },
        "showlegend": False,
    }


def _labels(info: DataflowInfo, selected: str | None, x: float, ink: style.Ink) -> dict[str, Any]:
    texts = []
    for node in info.nodes:
        name = style.plain(node.label)
        name = f"<b>{name}</b>" if rows.is_selected(node.layer, selected) else name
        texts.append(f"{name}  <span style='color:{ink.muted}'>{style.plain(node.detail)}</span>")
    return {
        "type": "scatter",
        "mode": "text",
        "x": [x] * len(texts),
        "y": [node.height for node in info.nodes],
        "text": texts,
        "textposition": "middle right",
        "textfont": {"size": 12, "color": ink.text},
        "hoverinfo": "skip",
        "showlegend": False,
        "cliponaxis": False,
    }

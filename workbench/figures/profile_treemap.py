"""Which part of the network the time goes to: nested boxes, module within module."""

from __future__ import annotations

import re
from itertools import takewhile
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd

from workbench.figures import _rows as rows
from workbench.figures import _style as style

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

BOXES = "modules"
_HEIGHT_PX = 520
_LABEL_LENGTH = 24  # longer labels would be shrunk until they fit their box
_NODE = re.compile(r"[A-Z][A-Za-z]*_\d+")  # what ONNX exporters call a node that belongs to no module
_APART = {"move": "(moves and conversions)", "unknown": "(unknown)"}  # boxes of rows that belong to no module


class Box(NamedTuple):
    """One box: a row of the profile, or a module around such rows, whose `value` is the sum of what it holds."""

    id: str
    parent: str
    label: str
    value: float
    row: int | None
    layer: str
    colour: str
    hover: str


class TreemapInfo(NamedTuple):
    """The boxes, each after its parent; what has no area because it is below zero; and what the colours say."""

    boxes: tuple[Box, ...]
    below_zero: float
    shades: rows.Shades


def _info(frame: pd.DataFrame, value: str, column: str) -> TreemapInfo:
    """The data of the chart.

    A row lies in the module that holds all its layers: ``layer1.0.conv1 + layer1.0.bn1`` in ``layer1.0``. Rows without
    a value, or with none above zero, have no area and are left out.
    """
    if value not in frame:
        raise ValueError(f"There is no column {value!r} for the areas. Accepted: {', '.join(map(str, frame.columns))}.")
    values = pd.to_numeric(frame[value], errors="coerce")
    drawn = frame[values > 0]
    coloured = drawn["kind"].isin(("layer", "unknown"))
    shading = rows.shades(drawn[coloured], column)
    colours = iter(shading.colours)
    inner: dict[str, Box] = {}
    leaves = []
    for number, (_, row) in zip(_positions(values), drawn.iterrows(), strict=True):
        kind, layers = rows.words(row, "kind"), rows.words(row, "layer").split(" + ")
        home = _home(row, layers)
        area = float(values.iloc[number])
        for depth in range(1, len(home) + 1):
            _grow(inner, home[:depth], area)
        leaves.append(
            Box(
                id=f"row {number}",
                parent=_id(home),
                label=_label(row, layers, home),
                value=area,
                row=number,
                layer=rows.words(row, "layer"),
                colour=next(colours) if kind in ("layer", "unknown") else rows.KIND_COLOURS[kind],
                hover="<br>".join(rows.hover(row) + rows.traffic(row)),
            )
        )
    total = sum(leaf.value for leaf in leaves)
    around = (_about(box, leaves, value, total) for box in inner.values())
    return TreemapInfo((*around, *leaves), float(values[values < 0].sum()), shading)


def _positions(values: pd.Series) -> list[int]:
    return [number for number, value in enumerate(values) if value > 0]


def _home(row: pd.Series, layers: list[str]) -> tuple[str, ...]:
    """The path of the module around a row; empty for one that stands at the top."""
    kind = rows.words(row, "kind")
    if kind in ("call", "unattributed"):
        return ()
    if kind in _APART and (kind == "move" or layers == [""]):
        return (_APART[kind],)
    modules = [layer for layer in layers if not _NODE.fullmatch(layer)] or layers
    parts = zip(*(layer.split(".")[:-1] for layer in modules), strict=False)
    return tuple(names[0] for names in takewhile(lambda names: len(set(names)) == 1, parts))


def _label(row: pd.Series, layers: list[str], home: tuple[str, ...]) -> str:
    names = [layer.removeprefix(".".join(home) + ".") if home else layer for layer in layers]
    name = " + ".join(names) or rows.words(row, "name")
    if len(names) > 1 and len(name) > _LABEL_LENGTH:
        name = f"{names[0]} + {len(names) - 1} more"
    return rows.shorten(name)


def _id(home: tuple[str, ...]) -> str:
    return "module " + ".".join(home) if home else ""


def _grow(inner: dict[str, Box], home: tuple[str, ...], area: float) -> None:
    """Add an area to the box of a module, which is made where it is not there yet."""
    key = _id(home)
    box = inner.get(key) or Box(key, _id(home[:-1]), rows.shorten(home[-1]), 0.0, None, "", "", ".".join(home))
    inner[key] = box._replace(value=box.value + area)


def _about(box: Box, leaves: list[Box], value: str, total: float) -> Box:
    """The box of a module with what hovering says of it, and the layers of all rows inside."""
    inside = [leaf.layer for leaf in leaves if f"{leaf.parent}.".startswith(f"{box.id}.")]
    layers = dict.fromkeys(layer for cell in inside for layer in cell.split(" + ") if layer)
    amount = f"{rows.written(value, box.value)} · {rows.written('share', box.value / total)} of what is drawn"
    return box._replace(hover=f"<b>{style.plain(box.hover)}</b><br>{amount}", layer=" + ".join(layers))


def profile_treemap_figure(
    frame: pd.DataFrame,
    *,
    value: str = "latency_ms",
    column: str = "type",
    selected: str | None = None,
    dark: bool = False,
) -> Figure:
    """Nested boxes by the modules of the network, area for time or another number, colour for type or intensity.

    Parameters
    ----------
    frame
        A profile's frame: a row per layer or kernel.
    value
        The column of numbers that the areas stand for: latency in milliseconds, MACs, parameters, bytes.
    column
        What the colour says: a column of words (type, precision) or of numbers (intensity).
    selected
        The layer to outline; several joined by `` + `` outline every row that shares one.
    dark
        Whether it will lie on a dark page; the background is transparent.

    Returns
    -------
    plotly.graph_objects.Figure
        A click on a module opens it; customdata holds the names of a box's layers, joined by `` + ``.

    Raises
    ------
    ValueError
        If a column does not exist or holds shapes.
    """
    from plotly.graph_objects import Figure

    if frame.empty:
        return Figure(layout=style.message(rows.NO_PROFILE, dark))
    info = _info(frame, value, column)
    if not info.boxes:
        return Figure(layout=style.message(f"No row of this profile has {value.replace('_', ' ')}.", dark))
    ink = style.ink(dark)
    notes = [_left_out(info.below_zero, value, ink)] if info.below_zero < 0 else []
    hidden = {"visible": False}
    layout = style.layout(
        dark,
        height=_HEIGHT_PX,
        margin={"l": 8, "r": 16, "t": 8, "b": 24 if notes else 8},
        annotations=notes,
        xaxis=hidden,
        yaxis=hidden,
        legend=style.layout(dark)["legend"] | rows.legend_above(),
    )
    traces = [_boxes(info, value, selected, ink), *rows.key(info.shades, column.replace("_", " "), ink)]
    return Figure(data=traces, layout=layout)


def _boxes(info: TreemapInfo, value: str, selected: str | None, ink: style.Ink) -> dict[str, Any]:
    chosen = [box.row is not None and rows.is_selected(box.layer, selected) for box in info.boxes]
    return {
        "type": "treemap",
        "name": BOXES,
        "ids": [box.id for box in info.boxes],
        "parents": [box.parent for box in info.boxes],
        "labels": [style.plain(box.label) for box in info.boxes],
        # a module's area is that of its rows; saying it again would leave nothing drawn where rounding differs
        "values": [0.0 if box.row is None else box.value for box in info.boxes],
        "branchvalues": "remainder",
        "text": [rows.written(value, box.value) for box in info.boxes],
        "texttemplate": "%{label}<br>%{text}",
        "customdata": [box.layer for box in info.boxes],
        "hovertext": [box.hover for box in info.boxes],
        "hovertemplate": "%{hovertext}<extra></extra>",
        "marker": {
            "colors": [box.colour or ink.surface for box in info.boxes],
            "line": {"color": ink.text, "width": [3 if c else 0.5 for c in chosen]},
            "pad": {"l": 2, "r": 2, "b": 2, "t": 18},
        },
        "root": {"color": "rgba(0,0,0,0)"},
        "pathbar": {"visible": True, "thickness": 20},
        "tiling": {"pad": 2, "packing": "squarify"},
    }


def _left_out(below_zero: float, value: str, ink: style.Ink) -> dict[str, Any]:
    return {
        "text": f"Not drawn: {rows.written(value, below_zero)} unattributed; the rows took longer than the whole call.",
        "showarrow": False,
        "xref": "paper",
        "yref": "paper",
        "x": 0,
        "y": 0,
        "xanchor": "left",
        "yanchor": "top",
        "font": {"size": 12, "color": ink.muted},
    }

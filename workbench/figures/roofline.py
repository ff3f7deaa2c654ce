"""How near each layer comes to what the machine can do: arithmetic against intensity, under the measured ceilings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd

from workbench import formatting as fmt
from workbench.figures import _rows as rows
from workbench.figures import _style as style

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from workbench.profiling.ceilings import Ceilings

CEILINGS, LAYERS = "ceilings", "layers"
_HEIGHT_PX = 420
_LARGEST_PX, _SMALLEST_PX = 34, 8
_SYMBOLS = {"fp32": "circle", "fp16": "triangle-up", "bf16": "diamond", "int8": "square"}
_UNKNOWN = "precision unknown"
_UNKNOWN_SYMBOL = "x"
# engines spell the same operation in many ways; the first word that a type contains decides
_FAMILIES = {
    "conv": "convolution",
    "attention": "attention",
    "lstm": "recurrent",
    "gru": "recurrent",
    "rnn": "recurrent",
    "matmul": "matrix product",
    "gemm": "matrix product",
    "linear": "matrix product",
    "fullyconnected": "matrix product",
    "mm": "matrix product",
}


class Point(NamedTuple):
    """One layer: operations per byte, 10^9 operations per second, and its share of the call in per cent."""

    layer: str
    intensity: float
    gop_s: float
    share: float
    precision: str
    family: str
    colour: str
    hover: str


class Roof(NamedTuple):
    """The ceiling of one precision: level from its ridge (operations per byte) on."""

    precision: str
    ridge: float
    peak_gop_s: float


class RooflineInfo(NamedTuple):
    """What is drawn, the ends of both axes, and what has no place on them; its share in per cent of the call."""

    points: tuple[Point, ...]
    families: tuple[tuple[str, str], ...]
    roofs: tuple[Roof, ...]
    bandwidth_gb_s: float
    intensity_range: tuple[float, float]
    gop_s_range: tuple[float, float]
    left_out: int
    left_out_share: float


def _info(frame: pd.DataFrame, ceilings: Ceilings) -> RooflineInfo:
    """The data of the chart: a point for each row whose arithmetic, bytes and time are known and not zero."""
    counted = frame[~frame["kind"].isin(["call", "unattributed"])]
    # NaN is not above zero
    drawn = counted[(counted["intensity"] > 0) & (counted["achieved_gop_s"] > 0)]
    rest = counted.drop(drawn.index)
    shades = rows.shades(drawn.assign(family=[_family(str(kind)) for kind in drawn["type"]]), "family")
    points = tuple(_point(row, colour) for (_, row), colour in zip(drawn.iterrows(), shades.colours, strict=True))
    roofs = tuple(Roof(name, ceilings.ridge(name), peak) for name, peak in ceilings.arithmetic_gop_s.items())
    intensities = [p.intensity for p in points] + [r.ridge for r in roofs]
    speeds = [p.gop_s for p in points] + [r.peak_gop_s for r in roofs]
    return RooflineInfo(
        points=points,
        families=shades.entries,
        roofs=roofs,
        bandwidth_gb_s=ceilings.bandwidth_gb_s,
        intensity_range=(min(intensities, default=1.0) / 3, 3 * max(intensities, default=1.0)),
        gop_s_range=(min(speeds, default=1.0) / 3, 3 * max(speeds, default=1.0)),
        left_out=len(rest),
        left_out_share=100 * float(rest["share"].sum()),
    )


def _point(row: pd.Series, colour: str) -> Point:
    lines = rows.hover(row) + rows.traffic(row)
    reached = f"{fmt.significant(row['achieved_gop_s'])} GOP/s · {fmt.significant(row['achieved_gb_s'])} GB/s"
    if row["bound"] == "unknown":
        lines.append(f"{reached} · no ceiling for its precision")
    else:
        least, gain = fmt.milliseconds(row["attainable_ms"]), fmt.milliseconds(row["gain_ms"])
        lines += [f"{reached} · {row['bound']}-bound", f"attainable {least} · to gain {gain}"]
    return Point(
        layer=rows.words(row, "layer"),
        intensity=float(row["intensity"]),
        gop_s=float(row["achieved_gop_s"]),
        share=100 * float(row["share"]),
        precision=rows.words(row, "precision") if row["precision"] in _SYMBOLS else _UNKNOWN,
        family=_family(rows.words(row, "type")),
        colour=colour,
        hover="<br>".join(lines),
    )


def _family(kind: str) -> str:
    # QLinearAdd is no linear layer
    word = kind.removeprefix("QLinear").lower()
    return next((family for part, family in _FAMILIES.items() if part in word), "other")


def roofline_figure(
    frame: pd.DataFrame, ceilings: Ceilings, *, selected: str | None = None, dark: bool = False
) -> Figure:
    """Arithmetic reached against arithmetic intensity, both logarithmic, under the ceilings of each precision.

    Parameters
    ----------
    frame
        A roofline's frame: a row per layer with what it achieved, in 10^9 operations per second.
    ceilings
        What the frame was held against.
    selected
        The layer to set off from the others; several joined by `` + `` set off every row that shares one.
    dark
        Whether it will lie on a dark page; the background is transparent.

    Returns
    -------
    plotly.graph_objects.Figure
        A point per layer, its area its share of the call, its symbol its precision, its colour the family of its type;
        customdata holds the layer's name.
    """
    from plotly.graph_objects import Figure

    if not len(frame):
        return Figure(layout=style.message(rows.NO_PROFILE, dark))
    info = _info(frame, ceilings)
    if not info.points:
        text = "No row of this profile tells its arithmetic, its bytes and its time. Profile it with another engine."
        return Figure(layout=style.message(text, dark))
    ink = style.ink(dark)
    legend = [rows.legend_entry(name, colour, ink) for name, colour in info.families]
    legend += _symbol_entries(info.points, ink)
    return Figure(
        data=[*_ceiling_lines(info, ink), _points(info.points, selected, ink), *legend], layout=_layout(info, dark)
    )


def _ceiling_lines(info: RooflineInfo, ink: style.Ink) -> list[dict[str, Any]]:
    """The slope of memory up to the highest ridge, and a level line for each precision, each with its figure."""
    low, high = info.intensity_range
    bandwidth = info.bandwidth_gb_s
    steepest = max((roof.ridge for roof in info.roofs), default=high)
    # the slope begins where it enters the picture
    start = max(low, info.gop_s_range[0] / bandwidth)
    lines = [
        _line((start, steepest), (start * bandwidth, steepest * bandwidth), ink)
        | _label(0, f"memory {fmt.significant(bandwidth)} GB/s", "bottom right")
    ]
    for roof in info.roofs:
        text = f"{roof.precision} {fmt.significant(roof.peak_gop_s)} GOP/s"
        lines.append(_line((roof.ridge, high), (roof.peak_gop_s,) * 2, ink) | _label(1, text, "top left"))
    return lines


def _line(x: Sequence[float], y: Sequence[float], ink: style.Ink) -> dict[str, Any]:
    return {
        "type": "scatter",
        "name": CEILINGS,
        "mode": "lines+text",
        "x": list(x),
        "y": list(y),
        "line": {"color": ink.text, "width": 1.5},
        "textfont": {"size": 12, "color": ink.text},
        "hoverinfo": "skip",
        "showlegend": False,
    }


def _label(end: int, text: str, position: str) -> dict[str, Any]:
    """A text at the first or the last of two points."""
    return {"text": ["", text] if end else [text, ""], "textposition": position}


def _points(points: Sequence[Point], selected: str | None, ink: style.Ink) -> dict[str, Any]:
    chosen = [rows.is_selected(p.layer, selected) for p in points]
    most = max(max(p.share for p in points), 1e-9)
    return {
        "type": "scatter",
        "name": LAYERS,
        "mode": "markers",
        "x": [p.intensity for p in points],
        "y": [p.gop_s for p in points],
        "customdata": [p.layer for p in points],
        "hovertext": [p.hover for p in points],
        "hovertemplate": "%{hovertext}<extra></extra>",
        "marker": {
            "size": [max(_LARGEST_PX * math.sqrt(max(p.share, 0.0) / most), _SMALLEST_PX) for p in points],
            "symbol": [_SYMBOLS.get(p.precision, _UNKNOWN_SYMBOL) for p in points],
            "color": [p.colour for p in points],
            "opacity": [0.85 if c or not any(chosen) else 0.35 for c in chosen],
            "line": {"color": ink.text, "width": [2 if c else 0.5 for c in chosen]},
        },
        "showlegend": False,
        "cliponaxis": False,
    }


def _symbol_entries(points: Sequence[Point], ink: style.Ink) -> list[dict[str, Any]]:
    """Entries without points that explain the symbols."""
    present = {p.precision for p in points}
    return [
        rows.legend_entry(name, ink.muted, ink) | {"marker": {"size": 11, "color": ink.muted, "symbol": symbol}}
        for name, symbol in [*_SYMBOLS.items(), (_UNKNOWN, _UNKNOWN_SYMBOL)]
        if name in present
    ]


def _layout(info: RooflineInfo, dark: bool) -> dict[str, Any]:
    notes = []
    if info.left_out:
        count = f"{info.left_out} row{'s' if info.left_out > 1 else ''}"
        text = f"{count} without arithmetic or known bytes: {fmt.share(info.left_out_share / 100)} of the call"
        notes.append(
            {
                "text": text,
                "showarrow": False,
                "xref": "paper",
                "yref": "paper",
                "x": 1,
                "y": 0,
                "xanchor": "right",
                "yanchor": "bottom",
                "font": {"size": 12, "color": style.ink(dark).muted},
            }
        )
    return style.layout(
        dark,
        height=_HEIGHT_PX,
        margin={"l": 8, "r": 16, "t": 40, "b": 8},
        xaxis=_log_axis("arithmetic intensity (operations per byte, log scale)", info.intensity_range),
        yaxis=_log_axis("arithmetic reached (GOP/s, log scale)", info.gop_s_range),
        annotations=notes,
        hovermode="closest",
        legend=style.layout(dark)["legend"] | rows.legend_above(),
    )


def _log_axis(title: str, ends: tuple[float, float]) -> dict[str, Any]:
    values, labels = style.log_ticks(*ends)
    return {
        "type": "log",
        "title": {"text": title},
        "range": [math.log10(v) for v in ends],
        "tickvals": values,
        "ticktext": labels,
        "tickangle": 0,
    }

"""Which layers bear compression: accuracy against how far one layer is compressed, a line for each."""

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

BAND, BASELINE = "interval", "as it is"
_HEIGHT_PX = 360
_MARGIN = 0.05  # of the span of accuracies, above and below
_APART = 0.06  # of that span between two names
_LETTER_PX = 7


class Level(NamedTuple):
    """One point of a curve: per cent of channels or bits, and accuracy with its interval in per cent."""

    level: float
    accuracy: float
    low: float
    high: float
    hover: str


class Curve(NamedTuple):
    """What happens to accuracy as one layer is compressed, the mildest level first."""

    layer: str
    levels: tuple[Level, ...]


class SensitivityInfo(NamedTuple):
    """The curves in execution order, the untouched model's accuracy in per cent, and what the axis shows."""

    curves: tuple[Curve, ...]
    baseline: float
    ticks: tuple[float, ...]
    title: str
    reverse: bool


def _info(frame: pd.DataFrame) -> SensitivityInfo:
    """The data of the chart: a curve per layer of the frame of a `Sensitivity`."""
    bits = bool(frame["technique"].eq("quantize").any())
    ordered = frame.sort_values("level", ascending=not bits)
    curves = tuple(
        Curve(layer, tuple(_level(row, bits) for _, row in ordered[ordered["layer"] == layer].iterrows()))
        for layer in frame["layer"].unique()
    )
    first = frame.iloc[0] if len(frame) else None
    return SensitivityInfo(
        curves=curves,
        baseline=math.nan if first is None else 100 * float(first["accuracy"] + first["accuracy_drop"]),
        ticks=tuple(dict.fromkeys(_scaled(level, bits) for level in ordered["level"])),
        title="bits of one layer (the others as they are)" if bits else "channels removed from one layer (%)",
        reverse=bits,
    )


def _scaled(level: float, bits: bool) -> float:
    return float(level) if bits else 100 * float(level)


def _level(row: pd.Series, bits: bool) -> Level:
    accuracy, low, high = (100 * float(row[key]) for key in ("accuracy", "accuracy_low", "accuracy_high"))
    at = f"{int(row['level'])} bits" if bits else f"{100 * row['level']:g} % of channels removed"
    interval = fmt.plus_minus(row["accuracy"], (row["accuracy_low"], row["accuracy_high"]), 100)
    lines = [f"<b>{style.plain(row['layer'])}</b>", at]
    lines.append(f"{fmt.accuracy(row['accuracy'])} {interval} · loss {fmt.significant(row['loss'])}")
    if math.isfinite(saved := float(row["saved_ms"])):
        lines.append(f"{rows.written('saved_ms', abs(saved))} {'saved' if saved >= 0 else 'slower'}")
    if math.isfinite(rate := float(row["saved_ms_per_point"])):
        lines.append(f"{rows.written('saved_ms', rate)} for each point of accuracy lost")
    return Level(_scaled(row["level"], bits), accuracy, low, high, "<br>".join(lines))


def sensitivity_figure(frame: pd.DataFrame, *, selected: str | None = None, dark: bool = False) -> Figure:
    """Accuracy against the level of compression, a line per layer; further right is compressed further.

    Parameters
    ----------
    frame
        The frame of a `Sensitivity`: a row per layer and level, accuracy from 0 to 1.
    selected
        The layer to set off, with its 95 % intervals as a band; several joined by `` + `` set off each of them.
    dark
        Whether it will lie on a dark page; the background is transparent.

    Returns
    -------
    plotly.graph_objects.Figure
        Customdata holds the layer's name; the dotted line is the untouched model.
    """
    from plotly.graph_objects import Figure

    info = _info(frame)
    if not info.curves:
        return Figure(layout=style.message("No sensitivity yet. Choose a technique and run it.", dark))
    ink = style.ink(dark)
    chosen = [c for c in info.curves if rows.is_selected(c.layer, selected)]
    others = [c for c in info.curves if c not in chosen]
    data = [_band(curve) for curve in chosen]
    data += [_line(curve, ink.muted, 0.45 if chosen else 0.8, 1.5) for curve in others]
    data += [_line(curve, style.BAR_COLOUR, 1.0, 3) for curve in chosen]
    return Figure(data=data, layout=_layout(info, chosen, dark))


def _line(curve: Curve, colour: str, opacity: float, width: float) -> dict[str, Any]:
    return {
        "type": "scatter",
        "name": style.plain(curve.layer),
        "mode": "lines+markers",
        "x": [p.level for p in curve.levels],
        "y": [p.accuracy for p in curve.levels],
        "customdata": [curve.layer] * len(curve.levels),
        "hovertext": [p.hover for p in curve.levels],
        "hovertemplate": "%{hovertext}<extra></extra>",
        "line": {"color": colour, "width": width},
        "marker": {"color": colour, "size": 4 + 2 * width},
        "opacity": opacity,
        "cliponaxis": False,
    }


def _band(curve: Curve) -> dict[str, Any]:
    there, back = curve.levels, curve.levels[::-1]
    return {
        "type": "scatter",
        "name": BAND,
        "mode": "lines",
        "x": [p.level for p in (*there, *back)],
        "y": [p.high for p in there] + [p.low for p in back],
        "fill": "toself",
        "fillcolor": "rgba(0,114,178,0.18)",  # the colour of the line it belongs to
        "line": {"width": 0},
        "hoverinfo": "skip",
    }


def _layout(info: SensitivityInfo, chosen: list[Curve], dark: bool) -> dict[str, Any]:
    ink = style.ink(dark)
    values = [p.accuracy for c in info.curves for p in c.levels] + [info.baseline]
    values += [end for c in chosen for p in c.levels for end in (p.low, p.high)]
    margin = _MARGIN * max(max(values) - min(values), 1.0)
    ends = [min(info.ticks), max(info.ticks)]
    room = 0.06 * max(ends[1] - ends[0], 1.0)
    reach = [ends[0] - room, ends[1] + room]
    line = {"color": ink.muted, "width": 1, "dash": "dot"}
    baseline = {"type": "line", "layer": "below", "line": line, "xref": "paper", "x0": 0, "x1": 1}
    name = {"text": BASELINE, "showarrow": False, "xref": "paper", "x": 0, "xanchor": "left", "yanchor": "bottom"}
    named = _named(info.curves, chosen, _APART * (max(values) - min(values)))
    longest = max(len(rows.shorten(curve.layer)) for curve in named)
    return style.layout(
        dark,
        height=_HEIGHT_PX,
        margin={"l": 8, "r": 24 + _LETTER_PX * longest, "t": 16, "b": 8},
        xaxis={
            "title": {"text": info.title},
            "range": reach[::-1] if info.reverse else reach,
            "tickvals": list(info.ticks),
            "ticktext": [f"{tick:g}" for tick in info.ticks],
        },
        yaxis={"title": {"text": "accuracy (%)"}, "range": [min(values) - margin, max(values) + 2 * margin]},
        shapes=[baseline | {"y0": info.baseline, "y1": info.baseline}],
        annotations=[
            name | {"y": info.baseline, "font": {"size": 12, "color": ink.muted}},
            *(_name(curve, curve in chosen, ink) for curve in named),
        ],
        showlegend=False,
        hovermode="closest",
    )


def _named(curves: Sequence[Curve], chosen: Sequence[Curve], apart: float) -> list[Curve]:
    """Whose names there is room for at the end of their lines: the chosen, then those that fall furthest."""
    named: list[Curve] = []
    for curve in sorted(curves, key=lambda c: (c not in chosen, c.levels[-1].accuracy)):
        if all(abs(curve.levels[-1].accuracy - other.levels[-1].accuracy) >= apart for other in named):
            named.append(curve)
    return named


def _name(curve: Curve, chosen: bool, ink: style.Ink) -> dict[str, Any]:
    text = style.plain(rows.shorten(curve.layer))
    return {
        "text": f"<b>{text}</b>" if chosen else text,
        "showarrow": False,
        "x": curve.levels[-1].level,
        "y": curve.levels[-1].accuracy,
        "xanchor": "left",
        "xshift": 10,
        "font": {"size": 12, "color": ink.text if chosen else ink.muted},
    }

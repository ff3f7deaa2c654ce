"""The chart that decides: accuracy against latency, with the Pareto front."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from workbench import formatting as fmt
from workbench.figures import _style as style
from workbench.study.pareto import clearly_dominated

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

POINTS = "candidates"  # name of the one trace whose points can be clicked; customdata holds candidate numbers
SELECTED = "selected"


class Point(NamedTuple):
    """One candidate as it is drawn; accuracies in per cent, latencies in milliseconds."""

    number: int
    family: str
    backend: str
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    latency_ms: float
    latency_low_ms: float
    latency_high_ms: float
    on_front: bool
    faded: bool
    hover: str


class ParetoInfo(NamedTuple):
    """Everything the chart shows, before anything is drawn."""

    points: tuple[Point, ...]
    steps: tuple[tuple[tuple[float, float], ...], ...]
    baseline: Point | None
    accuracy_range: tuple[float, float]
    latency_range: tuple[float, float]


def _info(frame: pd.DataFrame) -> ParetoInfo:
    """The data of the chart.

    A point fades where it is clearly dominated among the candidates of its batch size; one that cannot be told apart
    from the front keeps its colour. There is one step line per batch size, since latencies of different batches do not
    compete. The baseline is the first candidate whose recipe is ``as is``; it never fades.
    """
    usable = frame[np.isfinite(frame["accuracy"].astype(float)) & (frame["latency_ms"].astype(float) > 0)]
    if usable.empty:
        return ParetoInfo((), (), None, (0.0, 100.0), (0.1, 10.0))
    faded = pd.Series(False, index=usable.index)
    steps = []
    for _, group in usable.groupby("batch"):
        faded[group.index] = clearly_dominated(group)
        front = group[group["pareto"]].sort_values(["latency_ms", "accuracy"])
        steps.append(tuple(zip(front["latency_ms"].astype(float), 100 * front["accuracy"].astype(float), strict=True)))
    first = usable.index[usable["recipe"] == "as is"][:1]
    faded[first] = False
    points = tuple(_point(row, bool(faded[index])) for index, row in usable.iterrows())
    baseline = next((p for p, index in zip(points, usable.index, strict=True) if index in first), None)
    return ParetoInfo(points, tuple(steps), baseline, _accuracy_range(points), _latency_range(points))


def _point(row: pd.Series, faded: bool) -> Point:
    accuracy, interval = float(row["accuracy"]), (float(row["accuracy_low"]), float(row["accuracy_high"]))
    latency, between = float(row["latency_ms"]), (float(row["latency_low_ms"]), float(row["latency_high_ms"]))
    lines = [
        f"<b>{int(row['candidate'])}: {style.plain(row['recipe'])}</b>",
        f"{style.plain(row['backend'])} · batch {int(row['batch'])} · {style.plain(row['precision'])}",
        f"accuracy {fmt.accuracy(accuracy)} {fmt.plus_minus(accuracy, interval, 100)}",
        f"latency {fmt.milliseconds(latency)} {fmt.latency_interval(latency, between)}",
        f"{fmt.factor(float(row['speedup']))} · {fmt.size(float(row['size_bytes']))}",
    ]
    if bool(row["contended"]):
        lines.append("measured while the machine was busy")
    return Point(
        number=int(row["candidate"]),
        family=str(row["family"]),
        backend=str(row["backend"]),
        accuracy=100 * accuracy,
        accuracy_low=100 * interval[0],
        accuracy_high=100 * interval[1],
        latency_ms=latency,
        latency_low_ms=between[0],
        latency_high_ms=between[1],
        on_front=bool(row["pareto"]),
        faded=faded,
        hover="<br>".join(lines),
    )


def _accuracy_range(points: tuple[Point, ...]) -> tuple[float, float]:
    low, high = min(p.accuracy_low for p in points), max(p.accuracy_high for p in points)
    pad = max(0.08 * (high - low), 0.5)
    return max(low - pad, -1.0), min(high + pad, 101.0)


def _latency_range(points: tuple[Point, ...]) -> tuple[float, float]:
    # an interval that reaches far out says that one point is uncertain; it must not squeeze all the others together
    first, last = min(p.latency_ms for p in points), max(p.latency_ms for p in points)
    low = max(min(p.latency_low_ms for p in points), first / 1.5)
    high = min(max(p.latency_high_ms for p in points), last * 1.5)
    pad = max((high / low) ** 0.08, 1.15)
    return low / pad, high * pad


def pareto_figure(frame: pd.DataFrame, *, selected: int | None = None, dark: bool = False) -> Figure:
    """Accuracy up, latency on a log axis to the right, so that up and left is better.

    Parameters
    ----------
    frame
        A study's frame: a row per candidate; accuracy from 0 to 1, latency in milliseconds.
    selected
        The number of the candidate to ring.
    dark
        Whether it will lie on a dark page; the background is transparent.

    Returns
    -------
    plotly.graph_objects.Figure
        Its trace named `POINTS` carries candidate numbers as customdata.

    Raises
    ------
    ValueError
        If a candidate's family is not in the palette.
    """
    from plotly.graph_objects import Figure

    info = _info(frame)
    if not info.points:
        return Figure(layout=style.message("No candidates yet. Run a recipe, and it appears here.", dark))
    ink = style.ink(dark)
    data = [
        *_intervals(info.points, ink),
        *_front(info, ink),
        _points(info.points, selected, ink),
        _ring(info.points, selected, ink),
        *_legend(info.points, ink),
    ]
    return Figure(data=data, layout=_layout(info, dark))


def _points(points: tuple[Point, ...], selected: int | None, ink: style.Ink) -> dict[str, Any]:
    symbol = style.symbols(p.backend for p in points)
    return {
        "type": "scatter",
        "name": POINTS,
        "mode": "markers+text",
        "x": [p.latency_ms for p in points],
        "y": [p.accuracy for p in points],
        "customdata": [p.number for p in points],
        "text": [str(p.number) if p.on_front else "" for p in points],
        "textposition": "top left",
        "textfont": {"size": 12, "color": ink.text},
        "hovertext": [p.hover for p in points],
        "hovertemplate": "%{hovertext}<extra></extra>",
        "marker": {
            "size": 12,
            "symbol": [symbol[p.backend] for p in points],
            "color": [style.family_colour(p.family) for p in points],
            "opacity": [0.3 if p.faded and p.number != selected else 1.0 for p in points],
            "line": {"color": ink.muted, "width": [style.FAMILY_OUTLINES.get(p.family, 0) for p in points]},
        },
        "showlegend": False,
        "cliponaxis": False,
    }


def _intervals(points: tuple[Point, ...], ink: style.Ink) -> list[dict[str, Any]]:
    """Both interval bars of each point as thin lines; two traces, since opacity belongs to a trace."""
    traces = []
    for faded in (True, False):
        x: list[float | None] = []
        y: list[float | None] = []
        for p in points:
            if p.faded == faded:
                x += [p.latency_low_ms, p.latency_high_ms, None, p.latency_ms, p.latency_ms, None]
                y += [p.accuracy, p.accuracy, None, p.accuracy_low, p.accuracy_high, None]
        line = {"color": ink.muted, "width": 1}
        about = {"opacity": 0.3 if faded else 0.8, "hoverinfo": "skip", "showlegend": False}
        traces.append({"type": "scatter", "name": "intervals", "mode": "lines", "x": x, "y": y, "line": line, **about})
    return traces


def _front(info: ParetoInfo, ink: style.Ink) -> list[dict[str, Any]]:
    """The front of each batch size as a step: what accuracy a latency buys, to the right edge."""
    traces = []
    for step in info.steps:
        ends = [*step, (info.latency_range[1], step[-1][1])] if step else []
        traces.append(
            {
                "type": "scatter",
                "name": "front",
                "mode": "lines",
                "x": [x for x, _ in ends],
                "y": [y for _, y in ends],
                "line": {"color": ink.text, "width": 1.5, "shape": "hv"},
                "hoverinfo": "skip",
                "showlegend": False,
            }
        )
    return traces


def _baseline_label(info: ParetoInfo, ink: style.Ink) -> dict[str, Any]:
    base, (low, high) = info.baseline, info.latency_range
    left = base.latency_ms > math.sqrt(low * high)  # where there is room for it
    return {
        "text": "baseline",
        "showarrow": False,
        "x": math.log10(base.latency_ms),  # plotly wants the logarithm here, and the value itself everywhere else
        "y": base.accuracy,
        "xanchor": "right" if left else "left",
        "yanchor": "top",
        "xshift": -10 if left else 10,
        "yshift": -4,
        "font": {"size": 12, "color": ink.muted},
    }


def _ring(points: tuple[Point, ...], selected: int | None, ink: style.Ink) -> dict[str, Any]:
    chosen = [p for p in points if p.number == selected]
    return {
        "type": "scatter",
        "name": SELECTED,
        "mode": "markers",
        "x": [p.latency_ms for p in chosen],
        "y": [p.accuracy for p in chosen],
        "marker": {"size": 22, "symbol": "circle-open", "color": ink.text, "line": {"width": 2, "color": ink.text}},
        "hoverinfo": "skip",
        "showlegend": False,
        "cliponaxis": False,
    }


def _legend(points: tuple[Point, ...], ink: style.Ink) -> list[dict[str, Any]]:
    """Entries without points: one per family in the palette's order, one per backend in order of appearance."""
    present = {p.family for p in points}
    entries = [
        (style.FAMILY_NAMES.get(f, f), "Technique", style.FAMILY_COLOURS[f], "circle", style.FAMILY_OUTLINES.get(f, 0))
        for f in style.FAMILY_COLOURS
        if f in present
    ]
    entries += [
        (style.plain(b), "Runs on", ink.muted, s, 0) for b, s in style.symbols(p.backend for p in points).items()
    ]
    return [
        {
            "type": "scatter",
            "name": name,
            "mode": "markers",
            "x": [None],
            "y": [None],
            "marker": {
                "size": 11,
                "color": colour,
                "symbol": symbol,
                "line": {"color": ink.muted, "width": outline},
            },
            "legendgroup": group,
            "legendgrouptitle": {"text": group},
            "hoverinfo": "skip",
        }
        for name, group, colour, symbol, outline in entries
    ]


def _layout(info: ParetoInfo, dark: bool) -> dict[str, Any]:
    ink = style.ink(dark)
    values, labels = style.log_ticks(*info.latency_range)
    dotted = {"type": "line", "line": {"color": ink.muted, "width": 1, "dash": "dot"}, "layer": "below"}
    shapes, annotations = [], []
    if info.baseline is not None:
        annotations.append(_baseline_label(info, ink))
        x, y = info.baseline.latency_ms, info.baseline.accuracy
        shapes.append(dotted | {"xref": "paper", "x0": 0, "x1": 1, "y0": y, "y1": y})
        shapes.append(dotted | {"yref": "paper", "y0": 0, "y1": 1, "x0": x, "x1": x})
    return style.layout(
        dark,
        xaxis={
            "type": "log",
            "title": {"text": "latency (ms, log scale) · left is better"},
            "range": [math.log10(v) for v in info.latency_range],
            "tickvals": values,
            "ticktext": labels,
            "tickangle": 0,
        },
        yaxis={"title": {"text": "accuracy (%) · up is better"}, "range": list(info.accuracy_range)},
        shapes=shapes,
        annotations=annotations,
        hovermode="closest",
        dragmode="zoom",
    )

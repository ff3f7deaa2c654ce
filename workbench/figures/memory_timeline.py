"""Where the memory goes: bytes of live activations at each step of one forward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from workbench import formatting as fmt
from workbench.figures import _rows as rows
from workbench.figures import _style as style

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

LIVE, SELECTED, PEAK = "live", "selected", "peak"
_HEIGHT_PX = 340
_UNITS = (("GB", 1e9), ("MB", 1e6), ("KB", 1e3), ("B", 1.0))


class Step(NamedTuple):
    """One operation; `live` in the unit of the axis."""

    step: int
    layer: str
    live: float
    hover: str


class TimelineInfo(NamedTuple):
    """The steps, the position of the one at the peak, and the unit of the axis; `minimum` in that unit or None."""

    steps: tuple[Step, ...]
    peak: int
    peak_label: str
    minimum: float | None
    minimum_label: str
    unit: str


def _info(frame: pd.DataFrame, minimum_bytes: float | None, minimum_exact: bool) -> TimelineInfo:
    """The data of the chart: a step for each row, in execution order."""
    highest = float(frame["live_bytes"].max()) if len(frame) else 0.0
    unit, scale = next(((name, size) for name, size in _UNITS if highest >= size), _UNITS[-1])
    steps = tuple(
        Step(int(row["step"]), rows.words(row, "layer"), float(row["live_bytes"]) / scale, _hover(row))
        for _, row in frame.iterrows()
    )
    peak = int(np.argmax(frame["live_bytes"])) if len(frame) else 0
    known = minimum_bytes is not None
    order = "any order needs" if minimum_exact else "any order needs at least"
    return TimelineInfo(
        steps=steps,
        peak=peak,
        peak_label=f"peak {fmt.size(highest)}, {rows.shorten(steps[peak].layer)}" if steps else "",
        minimum=minimum_bytes / scale if known else None,
        minimum_label=f"{order} {fmt.size(minimum_bytes)}" if known else "",
        unit=unit,
    )


def _hover(row: pd.Series) -> str:
    lines = [f"<b>{style.plain(rows.words(row, 'layer'))}</b>", style.plain(rows.words(row, "type"))]
    tensors = int(row["tensors"])
    lines.append(f"{fmt.size(row['live_bytes'])} alive in {tensors} tensor{'s' if tensors != 1 else ''}")
    lines.append(f"{fmt.size(row['allocated_bytes'])} allocated · {fmt.size(row['freed_bytes'])} freed after it")
    return "<br>".join(lines)


def memory_timeline_figure(
    frame: pd.DataFrame,
    *,
    minimum_bytes: float | None = None,
    minimum_exact: bool = True,
    selected: str | None = None,
    dark: bool = False,
) -> Figure:
    """Live activations over execution order as a step area, the peak marked, the least of any order dotted.

    Parameters
    ----------
    frame
        A memory timeline's frame: a row per operation, bytes alive while it runs.
    minimum_bytes, minimum_exact
        The least peak of any order of the operations, and whether that is exact or a lower bound; None for no line.
    selected
        The layer whose steps are set off; several joined by `` + `` set off those of each.
    dark
        Whether it will lie on a dark page; the background is transparent.

    Returns
    -------
    plotly.graph_objects.Figure
        customdata holds the name of the layer that runs at each step.
    """
    from plotly.graph_objects import Figure

    info = _info(frame, minimum_bytes, minimum_exact)
    if not info.steps:
        return Figure(layout=style.message("No memory timeline yet. Choose a batch and run it.", dark))
    ink = style.ink(dark)
    return Figure(data=[_area(info), _chosen(info, selected, ink), _peak(info, ink)], layout=_layout(info, dark))


def _area(info: TimelineInfo) -> dict[str, Any]:
    return {
        "type": "scatter",
        "name": LIVE,
        "mode": "lines",
        "x": [step.step for step in info.steps],
        "y": [step.live for step in info.steps],
        "customdata": [step.layer for step in info.steps],
        "hovertext": [step.hover for step in info.steps],
        "hovertemplate": "%{hovertext}<extra></extra>",
        # a step is as wide as the operation it stands for, with its number in the middle
        "line": {"color": style.BAR_COLOUR, "width": 1.5, "shape": "hvh"},
        "fill": "tozeroy",
        "fillcolor": "rgba(0,114,178,0.25)",
        "showlegend": False,
    }


def _chosen(info: TimelineInfo, selected: str | None, ink: style.Ink) -> dict[str, Any]:
    """The steps of the selected layer, as bars over the area."""
    chosen = [step for step in info.steps if rows.is_selected(step.layer, selected)]
    return {
        "type": "bar",
        "name": SELECTED,
        "x": [step.step for step in chosen],
        "y": [step.live for step in chosen],
        "width": 1,
        "customdata": [step.layer for step in chosen],
        "marker": {"color": style.BAR_COLOUR, "line": {"color": ink.text, "width": 1.5}},
        "hoverinfo": "skip",
        "showlegend": False,
    }


def _peak(info: TimelineInfo, ink: style.Ink) -> dict[str, Any]:
    top = info.steps[info.peak]
    right = info.peak > len(info.steps) / 2
    return {
        "type": "scatter",
        "name": PEAK,
        "mode": "markers+text",
        "x": [top.step],
        "y": [top.live],
        "customdata": [top.layer],
        "text": [style.plain(info.peak_label)],
        "textposition": "top left" if right else "top right",
        "textfont": {"size": 12, "color": ink.text},
        "marker": {"size": 9, "color": ink.text},
        "hoverinfo": "skip",
        "showlegend": False,
        "cliponaxis": False,
    }


def _layout(info: TimelineInfo, dark: bool) -> dict[str, Any]:
    ink, last = style.ink(dark), info.steps[-1].step
    shapes, notes = [], []
    if info.minimum is not None:
        line = {"color": ink.muted, "width": 1.5, "dash": "dot"}
        across = {"xref": "paper", "x0": 0, "x1": 1, "y0": info.minimum, "y1": info.minimum}
        shapes.append({"type": "line", "line": line, **across})
        notes.append(
            {
                "text": info.minimum_label,
                "showarrow": False,
                "xref": "paper",
                "x": 1,
                "xanchor": "right",
                "y": info.minimum,
                "yanchor": "bottom",
                "font": {"size": 12, "color": ink.muted},
            }
        )
    return style.layout(
        dark,
        height=_HEIGHT_PX,
        xaxis={"title": {"text": "step, in execution order"}, "range": [-0.5, last + 0.5], "showgrid": False},
        yaxis={
            "title": {"text": f"live activations ({info.unit})"},
            "range": [0, 1.15 * max(info.steps[info.peak].live, info.minimum or 0.0)],
        },
        shapes=shapes,
        annotations=notes,
        hovermode="x",
    )

"""How a training went: loss by epoch on both splits, and the epoch that was kept."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd

from workbench import formatting as fmt
from workbench.figures import _style as style

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_HEIGHT_PX = 300
_TRAINING, _HELD_OUT = "training samples", "held-out samples"
_COLOURS = {_TRAINING: "#0072B2", _HELD_OUT: "#D55E00"}  # of the palette; they stand for no technique here


class Curve(NamedTuple):
    """Loss by epoch on one kind of samples."""

    name: str
    epochs: tuple[int, ...]
    losses: tuple[float, ...]
    hover: tuple[str, ...]


class TrainingInfo(NamedTuple):
    """The curves, and the epoch whose weights were kept; None where none was."""

    curves: tuple[Curve, ...]
    kept: int | None


def _info(frame: pd.DataFrame) -> TrainingInfo:
    """The data of the chart: a curve for each column of losses that holds any."""
    if frame.empty:
        return TrainingInfo((), None)
    columns = ((_TRAINING, "loss"), (_HELD_OUT, "validation_loss"))
    curves = tuple(_curve(frame, name, column) for name, column in columns if frame[column].notna().any())
    kept = frame.loc[frame["kept"].astype(bool), "epoch"]
    return TrainingInfo(curves, int(kept.iloc[-1]) if len(kept) else None)


def _curve(frame: pd.DataFrame, name: str, column: str) -> Curve:
    rows = frame[frame[column].notna()]
    return Curve(
        name,
        tuple(int(epoch) for epoch in rows["epoch"]),
        tuple(float(loss) for loss in rows[column]),
        tuple(_hover(row, name, float(row[column])) for _, row in rows.iterrows()),
    )


def _hover(row: pd.Series, name: str, loss: float) -> str:
    lines = [f"<b>epoch {int(row['epoch'])}</b>", f"loss {fmt.significant(loss)} on {name}"]
    right = row["validation_accuracy"]
    if right is not None and math.isfinite(float(right)):
        lines.append(f"{fmt.accuracy(float(right))} of the held-out samples right")
    return "<br>".join(lines)


def training_figure(frame: pd.DataFrame, *, dark: bool = False) -> Figure:
    """Loss against epoch, on a logarithmic axis, on the training and the held-out samples; the kept epoch is marked.

    Parameters
    ----------
    frame
        The frame of a training's `Record`: epoch, loss, validation_loss, validation_accuracy (0 to 1), kept.
    dark
        Whether it will lie on a dark page; the background is transparent.
    """
    from plotly.graph_objects import Figure

    info = _info(frame)
    if not info.curves:
        return Figure(layout=style.message("No training yet. Add a step that trains, and run the recipe.", dark))
    ink = style.ink(dark)
    values = [loss for curve in info.curves for loss in curve.losses if loss > 0]
    ticks, words = style.log_ticks(min(values) / 1.1, max(values) * 1.1)
    layout = style.layout(
        dark,
        height=_HEIGHT_PX,
        margin={"l": 8, "r": 16, "t": 40, "b": 8},
        xaxis={"title": {"text": "epoch"}, "dtick": max(1, len(frame) // 10), "tick0": 1},
        yaxis={"title": {"text": "loss"}, "type": "log", "tickvals": ticks, "ticktext": words},
        legend=style.layout(dark)["legend"] | {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
    )
    if info.kept is not None:
        layout |= _mark(info.kept, ink)
    return Figure(data=[_line(curve) for curve in info.curves], layout=layout)


def _line(curve: Curve) -> dict[str, Any]:
    return {
        "type": "scatter",
        "name": curve.name,
        "mode": "lines+markers",
        "x": list(curve.epochs),
        "y": list(curve.losses),
        "hovertext": list(curve.hover),
        "hovertemplate": "%{hovertext}<extra></extra>",
        "line": {"color": _COLOURS[curve.name], "width": 2},
        "marker": {"color": _COLOURS[curve.name], "size": 6},
    }


def _mark(epoch: int, ink: style.Ink) -> dict[str, Any]:
    line = {"color": ink.muted, "width": 1, "dash": "dot"}
    return {
        "shapes": [{"type": "line", "yref": "paper", "y0": 0, "y1": 1, "x0": epoch, "x1": epoch, "line": line}],
        "annotations": [
            {
                "text": f"kept: epoch {epoch}",
                "showarrow": False,
                "x": epoch,
                "yref": "paper",
                "y": 1,
                "xanchor": "right",
                "yanchor": "top",
                "xshift": -4,
                "font": {"size": 12, "color": ink.muted},
            }
        ],
    }

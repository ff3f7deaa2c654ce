"""Accuracy against bits: a line for each way to round, each point with its interval."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd

from workbench import formatting as fmt
from workbench.figures import _style as style

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_HEIGHT_PX = 380
# Okabe & Ito without the colours of the techniques these lines compare
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star")


class Scheme(NamedTuple):
    """One line: accuracy and its 95 % interval in per cent at each number of bits, the most first."""

    name: str
    bits: tuple[int, ...]
    accuracies: tuple[float, ...]
    above: tuple[float, ...]
    below: tuple[float, ...]
    hover: tuple[str, ...]


def _info(frame: pd.DataFrame) -> tuple[Scheme, ...]:
    """The data of the chart: a line for each scheme, in order of appearance."""
    return tuple(_scheme(name, frame[frame["scheme"] == name]) for name in frame["scheme"].unique())


def _scheme(name: str, rows: pd.DataFrame) -> Scheme:
    rows = rows.sort_values("bits", ascending=False)
    accuracy, low, high = (100 * rows[key] for key in ("accuracy", "accuracy_low", "accuracy_high"))
    return Scheme(
        str(name),
        tuple(int(b) for b in rows["bits"]),
        tuple(float(a) for a in accuracy),
        tuple(float(v) for v in high - accuracy),
        tuple(float(v) for v in accuracy - low),
        tuple(
            f"<b>{style.plain(name)}</b><br>{int(row['bits'])} bits: {fmt.accuracy(row['accuracy'])} "
            f"{fmt.plus_minus(row['accuracy'], (row['accuracy_low'], row['accuracy_high']), 100)}"
            for _, row in rows.iterrows()
        ),
    )


def bits_figure(frame: pd.DataFrame, *, baseline: float | None = None, dark: bool = False) -> Figure:
    """Accuracy against bits, fewer to the right, a line per scheme with the interval of each point.

    Parameters
    ----------
    frame
        Columns scheme, bits, accuracy with accuracy_low and accuracy_high (0 to 1).
    baseline
        Accuracy (0 to 1) of the model in float32, drawn dotted; None for none.
    dark
        Whether it will lie on a dark page; the background is transparent.
    """
    from plotly.graph_objects import Figure

    schemes = _info(frame)
    if not schemes:
        return Figure(
            layout=style.message("Nothing rounded yet. Run wb.FakeQuantize at several numbers of bits.", dark)
        )
    ink = style.ink(dark)
    ticks = sorted({bits for scheme in schemes for bits in scheme.bits})
    layout = style.layout(
        dark,
        height=_HEIGHT_PX,
        margin={"l": 8, "r": 16, "t": 16, "b": 8},
        xaxis={
            "title": {"text": "bits"},
            "range": [ticks[-1] + 0.5, ticks[0] - 0.5],
            "tickvals": ticks,
            "ticktext": [str(tick) for tick in ticks],
        },
        yaxis={"title": {"text": "accuracy (%)"}},
        legend=style.layout(dark)["legend"] | {"x": 0.02, "y": 0.02, "xanchor": "left", "yanchor": "bottom"},
    )
    if baseline is not None:
        layout |= _baseline(100 * baseline, ink)
    return Figure(data=[_line(scheme, number) for number, scheme in enumerate(schemes)], layout=layout)


def _line(scheme: Scheme, number: int) -> dict[str, Any]:
    colour, symbol = _COLOURS[number % len(_COLOURS)], _SYMBOLS[number % len(_SYMBOLS)]
    return {
        "type": "scatter",
        "name": style.plain(scheme.name),
        "mode": "lines+markers",
        "x": list(scheme.bits),
        "y": list(scheme.accuracies),
        "error_y": {"array": list(scheme.above), "arrayminus": list(scheme.below), "thickness": 1, "width": 3},
        "hovertext": list(scheme.hover),
        "hovertemplate": "%{hovertext}<extra></extra>",
        "line": {"color": colour, "width": 2},
        "marker": {"color": colour, "size": 8, "symbol": symbol},
    }


def _baseline(accuracy: float, ink: style.Ink) -> dict[str, Any]:
    line = {"color": ink.muted, "width": 1, "dash": "dot"}
    font = {"size": 12, "color": ink.muted}
    place = {"xref": "paper", "x": 1, "xanchor": "right", "y": accuracy, "yanchor": "bottom"}
    return {
        "shapes": [{"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": accuracy, "y1": accuracy, "line": line}],
        "annotations": [{"text": "float32", "showarrow": False, "font": font, **place}],
    }

"""What a step made of a layer's weights: each weight before against after, over how many there are."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from workbench import formatting as fmt
from workbench.figures import _style as style

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_HEIGHT_PX = 360
_BINS = 80
_MOST_POINTS = 4000  # drawn; the bars count all
_BEFORE, _AFTER, _EACH = "before", "after", "each weight"
_COLOURS = {_BEFORE: "#999999", _AFTER: "#0072B2"}


class WeightsInfo(NamedTuple):
    """Counts of weights by value before and after, and a sample of pairs.

    Attributes
    ----------
    centres
        Middle of each bin.
    before, after
        How many weights lie in it.
    pairs
        Weights before and after, at most so many as are drawn.
    values
        How many different values there are after.
    zeros
        Share (0 to 1) of weights that are exactly zero after.
    """

    centres: tuple[float, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    pairs: tuple[tuple[float, ...], tuple[float, ...]]
    values: int
    zeros: float


def _info(frame: pd.DataFrame) -> WeightsInfo:
    """The data of the chart; the bins span both columns."""
    before, after = (frame[key].to_numpy(np.float64) for key in ("before", "after"))
    edges = np.histogram_bin_edges(np.concatenate([before, after]), bins=_BINS)
    step = max(1, -(-len(frame) // _MOST_POINTS))
    order = np.argsort(before, kind="stable")[::step]
    return WeightsInfo(
        tuple((edges[:-1] + edges[1:]) / 2),
        tuple(int(n) for n in np.histogram(before, edges)[0]),
        tuple(int(n) for n in np.histogram(after, edges)[0]),
        (tuple(before[order]), tuple(after[order])),
        len(np.unique(after)),
        float(np.mean(after == 0)),
    )


def weights_figure(frame: pd.DataFrame, *, layer: str = "", dark: bool = False) -> Figure:
    """One layer's weights: how many have each value before and after, and below it what became of each.

    Parameters
    ----------
    frame
        Columns ``before`` and ``after``: the same weights of one layer in two models, a row each.
    layer
        Its name, for the title.
    dark
        Whether it will lie on a dark page; the background is transparent.

    Returns
    -------
    plotly.graph_objects.Figure
        The lower part is the step as a function: a straight line where nothing changed, a staircase after rounding
        (``Q(w) = s · round(w / s)``), a flat piece at zero after pruning, flat ends after clipping.
    """
    from plotly.graph_objects import Figure

    if frame.empty:
        return Figure(layout=style.message("No weights to show. Choose a layer that has some in both models.", dark))
    info = _info(frame)
    bars = [
        {
            "type": "bar",
            "name": name,
            "x": list(info.centres),
            "y": list(counts),
            "marker": {"color": _COLOURS[name], "line": {"width": 0}},
            "opacity": 0.75,
            "hovertemplate": f"{name}: %{{y:,}} weights near %{{x:.4g}}<extra></extra>",
        }
        for name, counts in ((_BEFORE, info.before), (_AFTER, info.after))
    ]
    points = {
        "type": "scattergl",
        "name": _EACH,
        "mode": "markers",
        "x": list(info.pairs[0]),
        "y": list(info.pairs[1]),
        "yaxis": "y2",
        "marker": {"color": _COLOURS[_AFTER], "size": 3},
        "hovertemplate": "%{x:.4g} became %{y:.4g}<extra></extra>",
        "showlegend": False,
    }
    said = f"{len(frame):,} weights, {info.values:,} different values after, {fmt.share(info.zeros)} zero"
    layout = style.layout(
        dark,
        height=_HEIGHT_PX,
        margin={"l": 8, "r": 16, "t": 56, "b": 8},
        barmode="overlay",
        bargap=0,
        title={
            "text": style.plain(f"{layer}: {said}" if layer else said),
            "font": {"size": 13, "color": style.ink(dark).text},
            "x": 0,
            "xref": "paper",
        },
        xaxis={"title": {"text": "weight before"}, "anchor": "y2"},
        yaxis={"title": {"text": "weights"}, "type": "log", "domain": [0.56, 1], "nticks": 4},
        yaxis2={"title": {"text": "weight after"}, "domain": [0, 0.46]} | _axis(dark),
        legend=style.layout(dark)["legend"] | {"orientation": "h", "x": 1, "xanchor": "right", "y": 1.02},
    )
    return Figure(data=[*bars, points], layout=layout)


def _axis(dark: bool) -> dict[str, object]:
    ink = style.ink(dark)
    return {"gridcolor": ink.grid, "linecolor": ink.muted, "zeroline": False, "showline": True, "automargin": True}

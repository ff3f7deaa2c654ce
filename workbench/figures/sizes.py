"""What a model weighs in each way of counting: bars of bytes, the dense one first."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import pandas as pd

from workbench import formatting as fmt
from workbench.figures import _rows as rows
from workbench.figures import _style as style

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_FRAME_HEIGHT_PX = 64
_WAYS = {
    "dense_bytes": "dense float32",
    "sparse_bytes": "sparse rows (CSR)",
    "coded_bytes": "coded file",
    "size_bytes": "deployed, deflated",
}
_COLOURS = {
    "dense_bytes": "#999999",
    "sparse_bytes": "#E69F00",
    "coded_bytes": "#009E73",
    "size_bytes": "#0072B2",
}


class Way(NamedTuple):
    """One way of counting: bytes of each candidate, from the top down, written out beside its bar."""

    name: str
    colour: str
    sizes_bytes: tuple[float, ...]
    texts: tuple[str, ...]
    hover: tuple[str, ...]


class SizesInfo(NamedTuple):
    """Label and number of each candidate, and the bars in each way of counting."""

    labels: tuple[str, ...]
    candidates: tuple[int, ...]
    ways: tuple[Way, ...]


def _info(frame: pd.DataFrame) -> SizesInfo:
    """The data of the chart, in the order of the frame."""
    labels = tuple(f"{row['candidate']}: {row['label']}" for _, row in frame.iterrows())
    return SizesInfo(
        labels,
        tuple(int(number) for number in frame["candidate"]),
        tuple(_way(frame, labels, column, name) for column, name in _WAYS.items()),
    )


def _way(frame: pd.DataFrame, labels: tuple[str, ...], column: str, name: str) -> Way:
    sizes = tuple(float(value) for value in frame[column])
    texts = [fmt.size(value) for value in sizes]
    if column == "coded_bytes":
        texts = [f"{t} · 1 / {fmt.significant(c)}" for t, c in zip(texts, frame["compression"], strict=True)]
    hover = tuple(
        f"<b>{style.plain(label)}</b><br>{name}: {text}<br>{style.plain(faster)}"
        for label, text, faster in zip(labels, texts, frame["faster"], strict=True)
    )
    return Way(name, _COLOURS[column], sizes, tuple(texts), hover)


def sizes_figure(frame: pd.DataFrame, *, selected: int | None = None, dark: bool = False) -> Figure:
    """Horizontal bars of bytes: each candidate dense, sparse, coded, and as it is deployed.

    Parameters
    ----------
    frame
        What `workbench.size_table` gives: a row per candidate.
    selected
        Number of the candidate to set off from the others.
    dark
        Whether it will lie on a dark page; the background is transparent.

    Returns
    -------
    plotly.graph_objects.Figure
        As tall as its bars need; customdata holds the candidate's number.
    """
    from plotly.graph_objects import Figure

    if frame.empty:
        return Figure(layout=style.message("No candidates yet. Run a recipe.", dark))
    info = _info(frame)
    ink = style.ink(dark)
    positions = list(range(len(info.labels)))
    chosen = [number == selected for number in info.candidates]
    labels = [style.plain(rows.shorten(label)) for label in info.labels]
    bars = [
        {
            "type": "bar",
            "orientation": "h",
            "name": way.name,
            "x": list(way.sizes_bytes),
            "y": positions,
            "text": list(way.texts),
            "textposition": "outside",
            "cliponaxis": False,
            "customdata": list(info.candidates),
            "hovertext": list(way.hover),
            "hovertemplate": "%{hovertext}<extra></extra>",
            "marker": {"color": way.colour, "opacity": [1.0 if c or not any(chosen) else 0.45 for c in chosen]},
        }
        for way in info.ways
    ]
    largest = max(size for way in info.ways for size in way.sizes_bytes)
    layout = style.layout(
        dark,
        height=_FRAME_HEIGHT_PX + len(_WAYS) * rows.ROW_HEIGHT_PX * len(positions) + 24,
        margin={"l": 8, "r": 16, "t": 40, "b": 8},
        barmode="group",
        bargap=0.2,
        xaxis={"title": {"text": "bytes"}, "range": [0, 1.3 * largest], "tickformat": "~s"},
        yaxis={
            "range": [len(positions) - 0.5, -0.5],
            "tickvals": positions,
            "ticktext": [f"<b>{t}</b>" if c else t for t, c in zip(labels, chosen, strict=True)],
            "ticks": "",
            "showgrid": False,
        },
        legend=style.layout(dark)["legend"] | {"font": {"size": 12, "color": ink.text}} | rows.legend_above(),
    )
    return Figure(data=bars, layout=layout)

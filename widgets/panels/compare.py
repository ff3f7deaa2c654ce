"""Which one should I take?"""

from __future__ import annotations

from html import escape
from typing import Any

import ipywidgets as W
import pandas as pd

from widgets._panel import Panel
from widgets._plot import ClickPlot
from widgets._table import Column, Row, Table
from workbench import formatting as fmt
from workbench.figures.pareto import POINTS, pareto_figure

_COLUMNS = (
    Column("no."),
    Column("recipe", number=False),
    Column("runs on", number=False),
    Column("accuracy, %"),
    Column("latency, ms"),
    Column("speed-up"),
    Column("size"),
    Column("notes", number=False),
)
_NOTES = {"pareto": "front", "contended": "busy"}
_ALL = ("all", 0)


class ComparePanel(Panel):
    """Accuracy against latency with the front; a click picks a candidate here and everywhere."""

    title = "Compare"
    question = "Which one should I take?"

    def _build(self) -> list[W.Widget]:
        self.batch = W.Dropdown(description="Batch size", options=[_ALL], layout=W.Layout(width="200px"))
        self.hint = W.HTML(
            '<span class="wb-muted">Click a point to see all about it; drag to zoom, double-click to zoom out.</span>'
        )
        controls = W.HBox([self.batch, self.hint])
        controls.add_class("wb-controls")
        self.hint.add_class("wb-hint")
        self.chart = ClickPlot(POINTS, height_px=400)
        self.table = Table(
            _COLUMNS,
            caption="Bold: on the front. Faded in the chart: clearly beaten. Busy: measured beside other work",
            empty="No candidates yet. Run a recipe in Compress, or study.run([]) for the model as it is.",
            height="190px",
        )
        self._refresh()
        return [controls, self.chart, self.table]

    def _listen(self) -> None:
        self.bindings.connect(self.study.added, lambda _candidate: self._refresh(), "Drawing the candidates")
        self.bindings.connect(self.selection.events.candidate, lambda *_: self._draw(), "Showing the selection")
        self.chart.on_click(self.bindings.handler(self._picked, "Picking a candidate"))
        self.table.on_pick(self.bindings.handler(self._picked, "Picking a candidate"))
        self.on(self.batch, "value", self._draw, "Filtering by batch size")
        self.on(self.theme, "dark", self._draw, "Following the theme")

    def come_into_view(self) -> None:
        if self.chart.figure is None:
            self.chart.load()
            self._draw()

    def _picked(self, number: Any) -> None:
        self.selection.candidate = int(number)

    def _refresh(self) -> None:
        """Take in the study's candidates."""
        self.frame = self.study.frame()
        sizes = sorted({int(b) for b in self.frame["batch"]})
        options = [_ALL, *((str(b), b) for b in sizes)]
        if list(self.batch.options) != options:
            kept = self.batch.value
            self.batch.options = options
            # latencies of different batch sizes do not compare, so the first batch size is shown, not all of them
            self.batch.value = kept if kept in sizes else sizes[0] if sizes else 0
        self.batch.disabled = len(sizes) < 2
        self._draw()

    def _shown(self) -> pd.DataFrame:
        size = self.batch.value
        return self.frame if size == 0 else self.frame[self.frame["batch"] == size]

    def _draw(self) -> None:
        shown, chosen = self._shown(), self.selection.candidate
        if self.chart.figure is not None:
            self.chart.show(pareto_figure(shown, selected=chosen, dark=self.theme.dark))
        self.table.fill(_rows(shown))
        self.table.selected = [] if chosen is None else [str(chosen)]

    def to_html(self) -> str:
        return f"<h3>{escape(self.question)}</h3>{self.table.to_html()}"

    def to_text(self) -> str:
        front = int(self.frame["pareto"].sum())
        return f"{self.study.name}: {len(self.frame)} candidates, {front} on the front of accuracy against latency"


def _rows(frame: pd.DataFrame) -> list[Row]:
    rows = []
    for _, c in frame.iterrows():
        accuracy, latency = float(c["accuracy"]), float(c["latency_ms"])
        cells = (
            str(c["candidate"]),
            str(c["recipe"]),
            str(c["backend"]),
            fmt.accuracy(accuracy, unit=False),
            fmt.milliseconds(latency, unit=False),
            fmt.factor(float(c["speedup"])),
            fmt.size(float(c["size_bytes"])),
            ", ".join(_NOTES[k] for k in _NOTES if c[k]),
        )
        sort = (
            int(c["candidate"]),
            cells[1],
            cells[2],
            accuracy,
            latency,
            float(c["speedup"]),
            float(c["size_bytes"]),
            cells[-1],
        )
        rows.append(Row(str(c["candidate"]), cells, sort, strong=bool(c["pareto"])))
    return rows

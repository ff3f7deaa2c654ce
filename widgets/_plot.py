"""Where figures appear.

`Plot` is an Output widget that holds plotly's mime JSON (a few KB), and is what a chart is by default. `ClickPlot` is
plotly's own widget: it reports clicks, and carries 5 MB into a saved notebook, so there is one in an app.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import ipywidgets as W

if TYPE_CHECKING:
    from plotly.graph_objects import Figure, FigureWidget

MIME = "application/vnd.plotly.v1+json"
_CONFIG = {
    "responsive": True,
    "displaylogo": False,
    "displayModeBar": False,
    "doubleClick": "reset",
    "showTips": False,
    "topojsonURL": "",  # maps would be fetched from a CDN; nothing here is
}


class Plot(W.Output):
    """A figure to look at; taller figures scroll inside its height."""

    def __init__(self, height: str):
        super().__init__(layout=W.Layout(height=height, overflow="hidden auto"))
        self.add_class("wb-plot")
        self.add_class("wb-chart")

    def show(self, figure: Figure, words: str) -> None:
        """Show `figure` instead of the one before; `words` stand where it cannot be drawn."""
        content = json.loads(figure.to_json())
        content["config"] = _CONFIG
        data = {MIME: content, "text/plain": words}
        self.outputs = ({"output_type": "display_data", "data": data, "metadata": {}},)

    def redraw(self) -> None:
        """Draw the same again: a figure that changed while its panel was hidden found no room, and keeps none."""
        outputs, self.outputs = self.outputs, ()
        self.outputs = outputs


class ClickPlot(W.VBox):
    """A figure whose points can be clicked; its widget is made by `load`, on which plotly's own 5 MB go to the page.

    Sent with everything else, they would hold up the other widgets, and one that is not there within two seconds
    anywidget gives up.

    Parameters
    ----------
    points
        Name of the trace whose points report clicks.
    height_px
        Height of the chart in pixels; it fills it, and its width follows the page.
    """

    def __init__(self, points: str, height_px: int):
        self._points = points
        self._clicked: list[Callable[[Any], None]] = []
        self.figure: FigureWidget | None = None
        super().__init__(layout=W.Layout(height=f"{height_px}px", overflow="hidden"))
        self.add_class("wb-chart")
        self.add_class("wb-filled")

    def load(self) -> None:
        """Make the widget, still empty; nothing where it is made already."""
        from plotly.graph_objects import FigureWidget

        if self.figure is None:
            self.figure = FigureWidget()
            self.figure._config = _CONFIG
            self.children = (self.figure,)

    def on_click(self, function: Callable[[Any], None]) -> None:
        """Call `function` with the customdata of each point that is clicked."""
        self._clicked.append(function)

    def show(self, figure: Figure) -> None:
        """Show `figure` instead of the one before; the reader's zoom stays. Only after `load`."""
        widget = self.figure
        figure.layout.height = None  # a height that is set would make plotly fix the width too
        with widget.batch_update():
            widget.data = []
            widget.layout = figure.layout
        widget.add_traces(list(figure.data))
        for trace in widget.data:
            if trace.name == self._points:
                trace.on_click(self._received)

    def _received(self, trace: Any, points: Any, _state: Any) -> None:
        for index in points.point_inds:
            for function in self._clicked:
                function(trace.customdata[index])

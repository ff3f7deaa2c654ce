"""Where a view of the Profile panel stands: a figure, a table, or words about why there is neither yet."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import ipywidgets as W

from widgets._plot import Plot
from widgets._table import Table
from widgets.panels.profile_views._base import Held, View

_HEIGHT_PX = 300


class Stage(W.VBox):
    """One place of a set height, in which one thing is seen at a time.

    Parameters
    ----------
    tables
        The bodies of the views that have one.
    """

    def __init__(self, tables: Sequence[Table]):
        self.plot = Plot(height=f"{_HEIGHT_PX}px")
        self.message = W.HTML()
        self.message.add_class("wb-instead")
        super().__init__(
            [self.plot, self.message, *tables], layout=W.Layout(height=f"{_HEIGHT_PX}px", overflow="hidden")
        )
        self.add_class("wb-stage")

    def say(self, words: str) -> None:
        """Show words in place of a view."""
        self.message.value = f"<p>{escape(words)}</p>"
        self._bring(self.message)

    def show(self, view: View) -> None:
        """Make room for the view: for its table, or for a figure."""
        self.message.value = ""
        self._bring(self.plot if view.body is None else view.body)

    def draw(self, view: View, held: Held, result: object, words: str) -> None:
        """Draw the figure of a view that has one; `words` stand where it cannot be drawn."""
        if view.body is not None:
            return
        figure = view.figure(held, result)
        if view.fits:
            figure.layout.height = _HEIGHT_PX - 2  # the border is within the height
        self.plot.show(figure, words)

    def _bring(self, seen: W.DOMWidget) -> None:
        for widget in self.children:
            widget.layout.display = None if widget is seen else "none"

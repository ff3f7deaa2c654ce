"""`Workbench`: the panels as one app."""

from __future__ import annotations

from html import escape

import ipywidgets as W

from widgets._bind import Bindings
from widgets._errors import Notices
from widgets._inspector import Inspector
from widgets._jobbar import JobBar
from widgets._panel import Panel, WithFallback
from widgets._theme import Theme
from widgets.panels import ComparePanel, CompressPanel, ModelPanel, ProfilePanel
from widgets.selection import Selection
from workbench.study import Study

PANELS: tuple[type[Panel], ...] = (ModelPanel, ProfilePanel, CompressPanel, ComparePanel)


class Workbench(WithFallback):
    """One view of a study: the panels as tabs, the selected candidate beside them, jobs above, errors below.

    Two apps on one study agree; closing one loses nothing.

    Parameters
    ----------
    study
        The study it shows.
    selection
        What is picked, to share with another app; its own if not given.
    """

    def __init__(self, study: Study, selection: Selection | None = None):
        super().__init__()
        self.study = study
        self.selection = selection if selection is not None else Selection()
        self.notices = Notices()
        self.theme = Theme()
        self.bindings = Bindings(self.notices)
        self.heading = W.HTML()
        self.jobs = JobBar(self.notices)
        self.panels = [kind(study, within=self) for kind in PANELS]
        self.inspector = Inspector(study, within=self)
        self.tabs = W.Tab(self.panels, titles=[panel.title for panel in self.panels])
        top = W.HBox([self.heading, self.jobs])
        main = W.HBox([self.tabs, self.inspector])
        self.children = (self.theme, top, main, self.notices)
        for widget, name in (
            (self, "app"),
            (top, "top"),
            (main, "main"),
            (self.tabs, "tabs"),
            (self.inspector, "inspector"),
        ):
            widget.add_class(f"wb-{name}")
        self._count()
        self.bindings.connect(study.added, lambda _candidate: self._count(), "Counting the candidates")
        self.tabs.observe(self.bindings.handler(lambda _change: self._turned(), "Showing the panel"), "selected_index")
        self._turned()

    def __getitem__(self, title: str) -> Panel:
        """The panel of that title: ``app["Compare"]``."""
        return next(panel for panel in self.panels if panel.title == title)

    def show(self, title: str) -> None:
        """Bring the panel of that title to the front."""
        self.tabs.selected_index = self.panels.index(self[title])

    def _turned(self) -> None:
        self.panels[self.tabs.selected_index or 0].come_into_view()

    def _count(self) -> None:
        number = len(self.study.candidates)
        facts = (
            f"<b>{escape(self.study.name)}</b>",
            f"{number} candidate{'s' if number != 1 else ''}",
        )
        self.heading.value = f'<h1 class="wb-title">{" · ".join(facts)}</h1>'

    def to_html(self) -> str:
        parts = "".join(panel.to_html() for panel in (*self.panels, self.inspector))
        return f"<h2>{escape(self.study.name)}</h2>{parts}"

    def to_text(self) -> str:
        return f"Workbench on {self['Compare'].to_text()}"

    def close(self) -> None:
        """Stop listening and take the app off the page; the study keeps everything, and its jobs go on."""
        self.bindings.close()
        for part in (*self.panels, self.inspector, self.jobs):
            part.close()
        for widget in (self.theme, self.heading, self.tabs, *self.children, self.notices):
            widget.close()
        super().close()

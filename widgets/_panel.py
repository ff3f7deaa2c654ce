"""What every panel is made of: a heading with its one question, its own listening, its fallbacks."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from typing import Any, ClassVar, Protocol

import ipywidgets as W

from widgets._bind import Bindings
from widgets._errors import Notices
from widgets._jobbar import JobBar
from widgets._theme import Theme
from widgets.selection import Selection
from workbench.jobs import Job
from workbench.study import Study

_VIEW = "application/vnd.jupyter.widget-view+json"


class Host(Protocol):
    """What panels of one app share; a panel that stands alone makes its own."""

    selection: Selection
    notices: Notices
    theme: Theme


class WithFallback(W.VBox):
    """A box that also says what it shows as HTML and as text, for where there are no widgets."""

    def to_html(self) -> str:
        """What it shows, as plain HTML; escapes all names."""
        raise NotImplementedError

    def to_text(self) -> str:
        """What it shows, in a line or a few."""
        raise NotImplementedError

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        """The widget for JupyterLab, HTML and text for the rest; JupyterLab prefers the widget."""
        bundle = super()._repr_mimebundle_(**kwargs) or {}
        return {"text/plain": self.to_text(), "text/html": self.to_html()} | {
            k: v for k, v in bundle.items() if k == _VIEW
        }

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.to_text()}>"


class Panel(WithFallback):
    """One question about a study, usable alone in a cell or within an app.

    Parameters
    ----------
    study
        The study it shows.
    selection
        What is picked, to share with other panels; its own if not given.
    within
        The app it is part of, whose selection, theme and notices it uses.
    """

    title: ClassVar[str]
    question: ClassVar[str]
    runs_jobs: ClassVar[bool] = False

    def __init__(self, study: Study, selection: Selection | None = None, *, within: Host | None = None):
        super().__init__()
        self.study = study
        self.selection = within.selection if within else selection if selection is not None else Selection()
        self.notices = within.notices if within else Notices()
        self.theme = within.theme if within else Theme()
        self.bindings = Bindings(self.notices)
        heading = W.HTML(f'<h2 class="wb-h">{escape(self.question)}</h2>')
        self._bar = JobBar(self.notices) if self.runs_jobs and not within else None
        alone = [] if within else [self.theme]
        bar = [] if self._bar is None else [self._bar]
        self.children = (*alone, heading, *bar, *self._build(), *([] if within else [self.notices]))
        self.add_class("wb-panel")
        self._listen()
        if not within:
            self.come_into_view()

    def _build(self) -> list[W.Widget]:
        """The controls and views, top down, already filled."""
        raise NotImplementedError

    def _listen(self) -> None:
        """Connect to the signals and controls; called last, when everything they touch is there."""

    def come_into_view(self) -> None:
        """Make what is too heavy to make unseen; called when the panel is shown, the first time and again."""

    def on(self, widget: W.Widget, name: str, function: Any, doing: str) -> None:
        """Call `function()` when a trait of a control changes."""
        handler = self.bindings.handler(lambda _change: function(), doing)
        widget.observe(handler, name)

    def follow(
        self, job: Job, done: Callable[[Any], None], doing: str, otherwise: Callable[[], None] | None = None
    ) -> None:
        """Call `done` with the job's result when it is done; `otherwise`, if given, when it failed or was cancelled.

        The job bar tells why.
        """
        told = False

        def changed(_job: Job) -> None:
            nonlocal told
            if not job.ended or told:
                return
            told = True
            self.bindings.disconnect(job.changed)
            if job.state == "done":
                done(job.result)
            elif otherwise is not None:
                otherwise()

        self.bindings.connect(job.changed, changed, doing)
        self.bindings.handler(changed, doing)(job)  # it may have ended before anybody listened

    def close(self) -> None:
        """Stop listening and take the panel off the page; the study keeps everything."""
        self.bindings.close()
        if self._bar is not None:
            self._bar.close()
        for widget in _below(self):
            widget.close()
        super().close()


def _below(box: W.Box) -> list[W.Widget]:
    """The widgets inside a box, the innermost first."""
    found: list[W.Widget] = []
    for child in box.children:
        if isinstance(child, W.Box):
            found += _below(child)
        found.append(child)
    return found

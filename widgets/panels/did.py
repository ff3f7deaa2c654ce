"""What did it do?"""

from __future__ import annotations

from html import escape
from typing import Any

import ipywidgets as W

from widgets._copy import CopyButton
from widgets._panel import Panel
from widgets._plot import Plot
from widgets._table import Table
from widgets.panels.candidate_views import VIEWS, CandidateView, Drawn, Listing, Seen
from widgets.panels.profile_views import Network, Work, has_result
from widgets.panels.profile_views.listing import columns, rows
from widgets.selection import SEPARATOR
from workbench.jobs import Job

_TALL = 8  # rows of a table that does not scroll


class WhatItDid(Panel):
    """The selected candidate from within: what its steps measured, trained, made of weights and saved.

    Nothing is computed or drawn before the panel comes into view; then what the view needs is computed by a job, once.
    """

    title = "What it did"
    question = "What did it do?"
    runs_jobs = True

    def _build(self) -> list[W.Widget]:
        self.work: dict[tuple, Job] = {}
        self.views = {kind.title: kind() for kind in VIEWS}
        self._in_view = self._filling = False
        self._waits_for: tuple | None = None
        self._listings: list[tuple[Listing, Table]] = []
        self.view = W.Dropdown(description="Show", options=list(self.views), layout=W.Layout(width="280px"))
        self.again = W.Button(description="Try again", tooltip="Compute what this view shows, as a job")
        self.again.layout.display = "none"
        self.copy = CopyButton()
        self.controls = W.HBox([self.view, self.again, self.copy])
        self.controls.add_class("wb-controls")
        self.message = W.HTML()
        self.plot = Plot(height="380px")
        self.plot.layout.display = "none"
        self.tables = W.VBox()
        self.tables.add_class("wb-found")
        return [self.controls, self.message, self.plot, self.tables]

    def _listen(self) -> None:
        self.bindings.connect(self.selection.events.candidate, lambda *_: self._draw(), "Showing what it did")
        self.bindings.connect(self.selection.events.layer, lambda *_: self._layer_picked(), "Highlighting the layer")
        self.bindings.connect(self.study.added, lambda _candidate: self._draw(), "Showing what it did")
        self.again.on_click(self.bindings.handler(lambda _button: self._try_again(), "Starting the work"))
        self.on(self.theme, "dark", self._draw, "Following the theme")
        self.on(self.view, "value", self._draw, "Changing the view")
        for view in self.views.values():
            for control in view.controls:
                self.on(control, "value", lambda view=view: self._chosen(view), "Changing the view")

    def come_into_view(self) -> None:
        # on the drawing thread like all else: from a cell it would meet what a signal draws
        self.bindings.handler(self._came_into_view, "Showing what it did")()

    def _came_into_view(self) -> None:
        self._in_view = True
        self._draw()
        self.plot.redraw()

    @property
    def _view(self) -> CandidateView:
        return self.views[self.view.value]

    def _seen(self, result: Any = None) -> Seen:
        number = self.selection.candidate
        there = any(c.number == number for c in self.study.candidates)
        network = Network(self.study, number) if there else None
        return Seen(self.study, network, result, self.selection.layer, self.theme.dark)

    def _chosen(self, view: CandidateView) -> None:
        if self._filling:
            return
        layer = view.chosen_layer
        if layer is None or layer == self.selection.layer:
            self._draw()
        else:
            self.selection.layer = layer  # which draws

    # what takes time

    def _started(self, work: Work) -> Job:
        if work.key not in self.work:
            self.work[work.key] = job = work.start()
            self.follow(
                job,
                lambda _result: self._worked(work),
                "Showing what it did",
                otherwise=lambda: self._redraw_if(work.key),
            )
        return self.work[work.key]

    def _worked(self, work: Work) -> None:
        if work.code:
            self.study.note(work.code)
        self._redraw_if(work.key)

    def _redraw_if(self, key: tuple) -> None:
        if self._waits_for == key:
            self._draw()

    def _try_again(self) -> None:
        self.work.pop(self._waits_for, None)
        self._draw()

    # what is seen

    def _draw(self) -> None:
        """Draw the view that is chosen; start its work if it has not been asked for yet."""
        if not self._in_view:
            return
        view, seen = self._view, self._seen()
        children = (self.view, *view.controls, self.again, self.copy)
        if self.controls.children != children:
            self.controls.children = children
        self.again.layout.display = "none"
        self._waits_for = None
        missing = view.missing(seen)
        if missing:
            self._show(Drawn(missing), "")
            return
        work = view.work(seen)
        self._waits_for = work.key
        job = self._started(work)
        if not has_result(job):
            self._wait(job)
            return
        seen = self._seen(job.result)
        self._filling = True
        try:
            view.fill(seen)
        finally:
            self._filling = False
        self._show(view.drawn(seen), view.code(seen))

    def _wait(self, job: Job) -> None:
        if job.state in ("failed", "cancelled"):
            how = "failed; the notice says why" if job.state == "failed" else "was cancelled"
            self.again.layout.display = None
            self._show(Drawn(f"{job.name} {how}."), "")
        else:
            self._show(Drawn(f"Under way: {job.name}. The job bar shows how far it is."), "")

    def _show(self, drawn: Drawn, code: str) -> None:
        self.copy.text = code
        self.message.value = f"<p>{escape(drawn.words)}</p>"
        self.plot.layout.display = "none" if drawn.figure is None else None
        if drawn.figure is not None:
            self.plot.show(drawn.figure, drawn.words)
        old = self.tables.children
        self._listings = [(listing, self._table(listing)) for listing in drawn.listings]
        self.tables.children = tuple(table for _, table in self._listings)
        for table in old:
            table.close()
        self._mark()

    def _table(self, listing: Listing) -> Table:
        height = "auto" if len(listing.frame) <= _TALL else "240px"
        empty = f"{listing.caption}: none."
        table = Table(columns(listing.fields), caption=listing.caption, empty=empty, height=height)
        table.fill(rows(listing.frame, listing.fields))
        if listing.picks:
            table.on_pick(self.bindings.handler(lambda key: self._picked(listing, int(key)), "Picking a row"))
        return table

    def _picked(self, listing: Listing, row: int) -> None:
        value = listing.frame[listing.picks].iloc[row]
        setattr(self.selection, listing.picks, int(value) if listing.picks == "candidate" else str(value))

    def _layer_picked(self) -> None:
        if self._view.chosen_layer is not None:
            self._draw()
        else:
            self._mark()

    def _mark(self) -> None:
        """Highlight the rows of what is selected."""
        for listing, table in self._listings:
            if listing.picks:
                values = map(str, listing.frame[listing.picks])
                table.selected = [str(key) for key, value in enumerate(values) if self._is_selected(listing, value)]

    def _is_selected(self, listing: Listing, value: str) -> bool:
        if listing.picks == "candidate":
            return value == str(self.selection.candidate)
        return not self.selection.layers.isdisjoint(value.split(SEPARATOR))

    def to_html(self) -> str:
        tables = "".join(table.to_html() for _, table in self._listings)
        return f"<h3>{escape(self.question)}</h3>{self.message.value}{tables}"

    def to_text(self) -> str:
        seen = self._seen()
        if seen.network is None:
            return f"{self.study.name}: no candidate is selected"
        return f"{self.study.name}: what the steps of {seen.network.label} did"

    def close(self) -> None:
        """Stop listening and take the panel off the page, controls of views out of sight included."""
        for control in (c for view in self.views.values() for c in view.controls):
            control.close()
        super().close()

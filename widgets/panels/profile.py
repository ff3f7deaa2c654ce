"""Where do time and memory go?"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import ipywidgets as W

from widgets._copy import CopyButton
from widgets._engines import EngineChoice
from widgets._panel import Panel
from widgets._table import Table
from widgets.panels.profile_views import FIRST, VIEWS, Held, Network, Source, View, Work, has_result
from widgets.panels.profile_views.listing import PROFILE_FIELDS, columns, of_profile, rows
from widgets.panels.profile_views.stage import Stage
from widgets.selection import SEPARATOR
from workbench import jobs
from workbench.deployment import Backend
from workbench.jobs import Job, Progress
from workbench.profiling import Profile, profile, read_tensorrt

_NONE = ("none yet", 0)


class ProfilePanel(Panel):
    """Profiles taken here or recorded elsewhere, looked at in one of several views at a time.

    What a view needs computed is computed by a job when it is first asked for, and kept; only the view in sight is
    drawn.
    """

    title = "Profile"
    question = "Where do time and memory go?"
    runs_jobs = True

    def _build(self) -> list[W.Widget]:
        self.sources: dict[int, Source] = {}
        self.work: dict[tuple, Job] = {}
        self.views = {kind.title: kind() for kind in VIEWS}
        self._layers: list[str] = []
        self._drawn: tuple[View, Held, Any] | None = None
        self._waits_for: tuple | None = None
        self._pair, self._filling = (0, 0), False
        self.what = W.Dropdown(description="Network", layout=_wide("250px"))
        self.engine = EngineChoice()
        self.batch = W.IntText(value=1, description="Batch size", layout=W.Layout(width="120px"))
        self.run = W.Button(description="Run profile", button_style="primary", tooltip="Measure it, as a job")
        self.folder = W.Text(
            description="TensorRT folder",
            placeholder="with graph.json and profile.json",
            layout=W.Layout(width="380px"),
        )
        self.open_recorded = W.Button(
            description="Open recorded profile", tooltip="Read what TensorRT wrote; needs neither GPU nor TensorRT"
        )
        self.shown = W.Dropdown(description="Profile", options=[_NONE], disabled=True, layout=_wide("280px"))
        self.beside = W.Dropdown(description="Beside", options=[_NONE], disabled=True, layout=_wide("280px"))
        self.view = W.ToggleButtons(description="View", options=list(self.views), style={"button_width": "auto"})
        self.start = W.Button(tooltip="Compute what this view shows, as a job")
        self.copy = CopyButton()
        self.refused = W.HTML()
        self.refused.add_class("wb-refused")
        self.facts = W.HTML()
        self.facts.add_class("wb-facts-lines")
        self.stage = Stage([view.body for view in self.views.values() if view.body is not None])
        self.table = Table(columns(PROFILE_FIELDS), empty="Nothing to list yet.", height="130px")
        self.about = W.HBox()
        controls = W.HBox([self.what, self.engine, self.batch, self.run])
        recorded = W.HBox([self.folder, self.open_recorded, self.engine.missing])
        choice = W.HBox([self.view])
        for row in (controls, recorded, choice, self.about):
            row.add_class("wb-controls")
        self._list_networks()
        self._draw()
        return [
            *(controls, self.refused, recorded, choice, self.about),
            *(self.facts, self.stage, self.table),
        ]

    def _listen(self) -> None:
        for button, function, doing in (
            (self.run, self._run, "Starting the profile"),
            (self.open_recorded, self._open, "Opening the recorded profile"),
            (self.start, self._start_again, "Starting the work"),
        ):
            button.on_click(self.bindings.handler(lambda _button, function=function: function(), doing))
        self.bindings.connect(self.study.added, lambda _candidate: self._list_networks(), "Listing the candidates")
        self.bindings.connect(self.selection.events.layer, lambda *_: self._mark(), "Highlighting the layer")
        self.table.on_pick(self.bindings.handler(lambda key: self._picked(self._layers, key), "Picking a layer"))
        for view in self.views.values():
            if view.body is not None:
                picked = self.bindings.handler(lambda key, view=view: self._picked(view.layers, key), "Picking a layer")
                view.body.on_pick(picked)
            for control in view.controls:
                self.on(control, "value", self._draw, "Drawing the view")
        self.on(self.theme, "dark", self._draw_figure, "Following the theme")
        self.on(self.view, "value", self._draw, "Changing the view")
        for menu in (self.shown, self.beside):
            self.on(menu, "value", self._chosen, "Choosing the profile")
        for control in (self.what, self.engine.menu, self.batch):
            self.on(control, "value", self._menus_changed, "Reading the controls")

    def come_into_view(self) -> None:
        self.stage.plot.redraw()

    def add_profile(self, profiled: Profile, code: str, network: Network | None = None) -> None:
        """Show a profile, beside the others the panel has.

        Parameters
        ----------
        profiled
            A profile taken here, or read from files.
        code
            The Python expression that makes it.
        network
            What was profiled, where that is one of the study's networks.
        """
        # on the drawing thread like all else: from a cell it would meet what a job draws
        self.bindings.handler(self._add, "Showing the profile")(profiled, code, network)

    def _add(self, profiled: Profile, code: str, network: Network | None) -> None:
        source = Source(len(self.sources) + 1, profiled, code, network)
        self.sources[source.number] = source
        self._list_profiles(source.number, beside=self.shown.value)
        self._draw()

    # what there is to choose

    def _list_networks(self) -> None:
        chosen = self.what.value
        numbers = [0, *(c.number for c in self.study.candidates if c.recipe.steps)]
        self.what.options = [(Network(self.study, number).label, number) for number in numbers]
        self.what.value = chosen if chosen in numbers else 0

    def _list_profiles(self, shown: int, beside: int) -> None:
        """Fill both menus of profiles, the newest first, and choose these two; 0 for none."""
        newest_first = [(source.label, source.number) for source in reversed(self.sources.values())]
        others = [(label, number) for label, number in newest_first if number != shown]
        self._pair, self._filling = (shown, beside), True
        for menu, options, value in ((self.shown, newest_first, shown), (self.beside, others or [_NONE], beside)):
            menu.options = options
            menu.value = value
            menu.disabled = len(options) < 2
        self._filling = False

    def _chosen(self) -> None:
        shown, beside = self.shown.value, self.beside.value
        if self._filling or (shown, beside) == self._pair:
            return
        if shown == beside:
            beside = next((n for n in reversed(self.sources) if n != shown), 0)
        self._list_profiles(shown, beside)
        self._draw()

    def _menus_changed(self) -> None:
        self.refused.value = ""
        if self._view.follows_menus:
            self._draw()
        else:
            self.copy.text = self._view.code(self._held())

    @property
    def _view(self) -> View:
        return self.views[self.view.value]

    def _held(self) -> Held:
        return Held(
            network=Network(self.study, self.what.value),
            backend=self.engine.backend,
            batch=self.batch.value,
            shown=self.sources.get(self.shown.value),
            beside=self.sources.get(self.beside.value),
            results={key: job.result for key, job in self.work.items() if has_result(job)},
            selected=self.selection.layer,
            dark=self.theme.dark,
        )

    # what takes time

    def _run(self) -> None:
        held = self._held()
        if held.refused_batch:
            # the kernel would refuse it only once the job runs; its words belong beside the control, now
            self._refuse(held.refused_batch)
            return
        name = f"Profile {held.network.label} on {held.backend.label}"
        job = jobs.submit(name, _profile, held.network, held.backend, held.batch)
        self.follow(job, lambda found: self._came(found, held.run_code, held.network), "Showing the profile")

    def _open(self) -> None:
        folder = self.folder.value.strip()
        if not folder:
            self._refuse("Give the folder that TensorRT's graph.json and profile.json are in.")
            return
        self.refused.value = ""
        job = jobs.submit(f"Open {folder}", _read, Path(folder).expanduser())
        self.follow(
            job, lambda found: self._came(found, f"wb.profiling.read_tensorrt({folder!r})"), "Showing the profile"
        )

    def _came(self, profiled: Profile, code: str, network: Network | None = None) -> None:
        self.study.note(code)
        self._add(profiled, code, network)

    def _start_again(self) -> None:
        held = self._held()
        if not self._view.missing(held):
            self._submit(self._view.work(held))
            self._draw()

    def _submit(self, work: Work) -> None:
        self._wait_for(work, work.start())

    def _wait_for(self, work: Work, job: Job) -> None:
        self.work[work.key] = job
        self.follow(
            job,
            lambda result: self._worked(work, result),
            "Showing the view",
            otherwise=lambda: self._redraw_if(work.key),
        )

    def _worked(self, work: Work, result: Any) -> None:
        if isinstance(result, Job):
            self._wait_for(work, result)
            return
        self.study.note(work.code)
        self._redraw_if(work.key)

    def _redraw_if(self, key: tuple) -> None:
        """Draw the view again if it is the one that waits for this result."""
        if self._waits_for == key:
            self._draw()

    def _refuse(self, words: str) -> None:
        self.refused.value = f'<div role="alert">{escape(words)}</div>'

    # what is seen

    def _draw(self) -> None:
        """Draw the view that is chosen, and no other; start its work if it has not been asked for yet."""
        view, held = self._view, self._held()
        self._place(view)
        self.copy.text = view.code(held)
        wanting = view.missing(held)
        work = None if wanting else view.work(held)
        if work is not None and work.key not in self.work and view.automatic:
            self._submit(work)
        job = None if work is None else self.work.get(work.key)
        if work is not None:
            wanting = view.waiting(job)
        result = None if job is None else job.result
        self.start.disabled = work is None or not view.can_start(job)
        self._waits_for = None if work is None else work.key
        self._drawn = None if wanting else (view, held, result)
        if wanting:
            self.stage.say(wanting)
        else:
            self.stage.show(view)
        self._list(view, held, result)
        self._draw_figure()

    def _place(self, view: View) -> None:
        """Put the controls of the view in their row, which keeps its height."""
        self.start.description = view.action
        children = (
            *(() if view.follows_menus else (self.shown,)),
            *((self.beside,) if view.compares else ()),
            *view.controls,
            *((self.start,) if view.action else ()),
            self.copy,
        )
        if self.about.children != children:
            self.about.children = children

    def _list(self, view: View, held: Held, result: Any) -> None:
        """Fill facts and table: of the view, or of the profile alone while the view has nothing to show."""
        found = held.shown is not None and not view.follows_menus
        facts = [held.shown.facts] if found else []
        fields, frame, caption = PROFILE_FIELDS, None, View.caption
        if self._drawn is not None:
            facts.append(escape(view.words(held, result)))
            fields, frame, caption = view.fields, view.listed(held, result), view.caption
        elif found:
            frame = of_profile(held.shown.profile)
        self.facts.value = "<br>".join(facts)
        self._layers = [] if frame is None else frame["layer"].tolist()
        with self.table.hold_sync():
            self.table.columns = [column._asdict() for column in columns(fields)]
            self.table.caption = caption
            self.table.fill([] if frame is None else rows(frame, fields))
        if self._drawn is not None and view.body is not None:
            view.fill(held, result)
        self._mark_rows()

    def _draw_figure(self) -> None:
        if self._drawn is None:
            return
        view, held, result = self._drawn
        now = dataclasses.replace(held, selected=self.selection.layer, dark=self.theme.dark)
        self.stage.draw(view, now, result, self.to_text())

    def _mark(self) -> None:
        self._mark_rows()
        self._draw_figure()

    def _mark_rows(self) -> None:
        self.table.selected = self._keys(self._layers)
        body = self._view.body
        if body is not None:
            body.selected = self._keys(self._view.layers)

    def _keys(self, layers: Sequence[str]) -> list[str]:
        """Keys of the rows that share a layer with the selection."""
        picked = self.selection.layers
        return [str(key) for key, layer in enumerate(layers) if not picked.isdisjoint(layer.split(SEPARATOR))]

    def _picked(self, layers: Sequence[str], key: str) -> None:
        self.selection.layer = layers[int(key)] or None

    def to_html(self) -> str:
        said = self.facts.value + self.stage.message.value
        body = self._view.body
        found = "" if self._drawn is None or body is None else body.to_html()
        return f"<h3>{escape(self.question)}</h3><p>{said}</p>{found}{self.table.to_html()}"

    def to_text(self) -> str:
        source = self.sources.get(self.shown.value)
        return FIRST if source is None else repr(source.profile)[1:-1]

    def close(self) -> None:
        """Stop listening and take the panel off the page, controls of views out of sight included; jobs go on."""
        for control in (
            self.shown,
            self.beside,
            self.start,
            *(c for view in self.views.values() for c in view.controls),
        ):
            control.close()
        super().close()


def _wide(least: str) -> W.Layout:
    """A menu of long names takes what room its row has left."""
    return W.Layout(flex=f"1 1 {least}", width="auto", min_width=least, max_width="520px")


def _profile(network: Network, backend: Backend, batch: int, *, progress: Progress) -> Profile:
    """The profile of one of the study's networks; runs on the worker, where making a model may take long."""
    return profile(network.model(), on=backend, batch=batch, progress=progress)


def _read(folder: Path, *, progress: Progress) -> Profile:
    progress(0.0, "reading")
    return read_tensorrt(folder)

"""Where do time and memory go?"""

from __future__ import annotations

from html import escape
from typing import Any

import ipywidgets as W
import numpy as np
import pandas as pd

from widgets._copy import CopyButton
from widgets._engines import EngineChoice
from widgets._panel import Panel
from widgets._plot import Plot
from widgets._table import Column, Row, Table
from workbench import formatting as fmt
from workbench import jobs
from workbench.deployment import Backend
from workbench.figures.profile_bars import profile_bars_figure
from workbench.jobs import Progress
from workbench.profiling import Profile, profile
from workbench.study import Study

_COLUMNS = (
    Column("layer", number=False),
    Column("type", number=False),
    Column("latency, ms"),
    Column("p95, ms"),
    Column("share, %"),
    Column("MACs"),
    Column("parameters"),
)
_FIRST = "No profile yet. Choose what to profile and where it runs, then press Run profile."


class ProfilePanel(Panel):
    """Bars by layer in execution order for one engine and batch size, measured as a job."""

    title = "Profile"
    question = "Where do time and memory go?"
    runs_jobs = True

    def _build(self) -> list[W.Widget]:
        self.profile: Profile | None = None
        self.what = W.Dropdown(description="Network", layout=W.Layout(width="320px"))
        self.engine = EngineChoice()
        self.batch = W.IntText(value=1, description="Batch size", layout=W.Layout(width="160px"))
        self.run = W.Button(description="Run profile", button_style="primary", tooltip="Measure it, as a job")
        self.copy = CopyButton()
        self.refused = W.HTML()
        self.refused.add_class("wb-refused")
        controls = W.HBox([self.what, self.engine, self.batch])
        actions = W.HBox([self.run, self.copy, self.engine.missing])
        for row in (controls, actions):
            row.add_class("wb-controls")
        self.facts = W.HTML()
        self.facts.add_class("wb-facts-line")
        self.bars = Plot(height="320px")
        self.table = Table(
            _COLUMNS,
            caption="Layers and kernels in execution order; click a row to mark it",
            empty="No profile yet.",
            height="160px",
        )
        self._list_networks()
        self._describe()
        self._draw()
        return [controls, self.refused, actions, self.facts, self.bars, self.table]

    def come_into_view(self) -> None:
        self.bars.redraw()

    def _listen(self) -> None:
        self.run.on_click(self.bindings.handler(lambda _button: self._run(), "Starting the profile"))
        self.bindings.connect(self.study.added, lambda _candidate: self._list_networks(), "Listing the candidates")
        self.bindings.connect(self.selection.events.layer, lambda *_: self._draw_selected(), "Highlighting the layer")
        self.table.on_pick(self.bindings.handler(self._picked, "Picking a layer"))
        self.on(self.theme, "dark", self._draw_bars, "Following the theme")
        for control in (self.what, self.engine.menu, self.batch):
            self.on(control, "value", self._describe, "Reading the controls")

    def _list_networks(self) -> None:
        chosen = self.what.value
        named = [(f"candidate {c.number}: {c.label}", c.number) for c in self.study.candidates if c.recipe.steps]
        self.what.options = [(f"{self.study.model.name} as it is", 0), *named]
        self.what.value = chosen if chosen in {number for _, number in named} else 0

    def code(self) -> str:
        """The Python that makes the profile the controls describe."""
        number = self.what.value
        model = "study.model"
        lines = ["import workbench as wb"]
        if number:
            candidate = next(c for c in self.study.candidates if c.number == number)
            lines.append(f"candidate = {candidate.to_python()}")
            model = "candidate.model()"
        lines.append(f"wb.profile({model}, on={self.engine.backend.to_python()}, batch={self.batch.value}).frame()")
        return "\n".join(lines)

    def _describe(self) -> None:
        self.refused.value = ""
        self.copy.text = self.code()

    def _run(self) -> None:
        if self.batch.value < 1:
            # the kernel would refuse it only once the job runs; its words belong beside the control, now
            self.refused.value = f"Batch size is {self.batch.value}; a whole number of at least 1 is needed."
            return
        backend = self.engine.backend
        job = jobs.submit(
            f"Profile {self.what.label} on {backend.label}",
            _profile,
            self.study,
            self.what.value,
            backend,
            self.batch.value,
        )
        self.follow(job, self._show, "Showing the profile")

    def _show(self, profiled: Profile) -> None:
        self.profile = profiled
        self._draw()

    def _draw(self) -> None:
        if self.profile is None:
            self._draw_bars()
            return
        p = self.profile
        self.facts.value = (
            f"<b>{escape(p.model_name)}</b> on {escape(p.backend_label)}, batch {p.batch}: "
            f"<b>{fmt.milliseconds(p.end_to_end_ms)}</b> from end to end, "
            f"{_signed_ms(p.unattributed_ms)} of it unattributed"
            + ("; the machine was busy with something else" if p.contended else "")
        )
        self.table.fill(_rows(p.frame()))
        self._draw_selected()

    def _draw_selected(self) -> None:
        layers = self.selection.layers
        self.table.selected = [r["key"] for r in self.table.rows if layers & set(r["cells"][0].split(" + "))]
        self._draw_bars()

    def _draw_bars(self) -> None:
        frame = self.profile.frame() if self.profile is not None else _EMPTY
        self.bars.show(profile_bars_figure(frame, selected=self.selection.layer, dark=self.theme.dark), self.to_text())

    def _picked(self, key: str) -> None:
        self.selection.layer = self.table.rows[int(key)]["cells"][0] or None

    def to_html(self) -> str:
        return f"<h3>{escape(self.question)}</h3><p>{self.facts.value or _FIRST}</p>{self.table.to_html()}"

    def to_text(self) -> str:
        return _FIRST if self.profile is None else repr(self.profile)[1:-1]


_EMPTY = pd.DataFrame(
    columns=["name", "layer", "type", "latency_ms", "latency_p95_ms", "share", "macs", "parameters", "output_shape"]
)


def _profile(study: Study, number: int, backend: Backend, batch: int, *, progress: Progress) -> Profile:
    """The profile of the study's model, or of a candidate's; runs on the worker, where making a model may take long."""
    model = study.model if number == 0 else next(c for c in study.candidates if c.number == number).model()
    return profile(model, on=backend, batch=batch, progress=progress)


def _signed_ms(value: float) -> str:
    return fmt.milliseconds(value).replace("-", "−")


def _rows(frame: pd.DataFrame) -> list[Row]:
    rows = []
    for position, (_, r) in enumerate(frame.iterrows()):
        layer = str(r["layer"]) if pd.notna(r["layer"]) else ""
        numbers: list[Any] = [float(r[k]) for k in ("latency_ms", "latency_p95_ms", "share", "macs", "parameters")]
        latency, p95, share, macs, parameters = numbers
        cells = (
            layer or str(r["name"]),
            str(r["type"]),
            _signed_ms(latency).removesuffix(" ms"),
            "–" if np.isnan(p95) else fmt.milliseconds(p95, unit=False),
            f"{100 * share:.1f}".replace("-", "−"),
            fmt.count(macs),
            fmt.count(parameters),
        )
        rows.append(Row(str(position), cells, (cells[0], cells[1], *numbers)))
    return rows

"""Views of the network that the menus name, whether it was profiled or not: memory, distance, sensitivity."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import ipywidgets as W
import pandas as pd

from widgets.panels.profile_views._base import Held, Network, View, Work
from widgets.panels.profile_views.listing import Field, close_to_one, milliseconds, name
from workbench import formatting as fmt
from workbench import jobs
from workbench.deployment import Backend
from workbench.errors import BackendError
from workbench.figures import memory_timeline_figure, sensitivity_figure, sqnr_figure
from workbench.jobs import Progress
from workbench.models import Model
from workbench.profiling import Distances, MemoryTimeline, memory_counters, memory_timeline, sqnr
from workbench.study import Sensitivity, sensitivity

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


class MemoryFound(NamedTuple):
    """What the Memory view shows.

    Attributes
    ----------
    planned, taken
        What the engine plans for activations, and what the process takes with it, in words.
    """

    timeline: MemoryTimeline
    planned: str
    taken: str


class Memory(View):
    """Live activations step by step through one forward pass, and what the chosen engine makes of them."""

    title = "Memory"
    fits = True
    action = "Trace memory"
    follows_menus = True
    imports = ("from workbench.figures import memory_timeline_figure",)
    fields = (
        Field("step", "step", fmt.count),
        name("layer", "layer"),
        name("type", "type"),
        Field("live", "live_bytes", fmt.size),
        Field("allocated", "allocated_bytes", fmt.size),
        Field("freed", "freed_bytes", fmt.size),
        Field("tensors", "tensors", fmt.count),
    )
    caption = "Bytes of activations alive while each step runs; click a row to mark its layer"

    def missing(self, held: Held) -> str:
        return held.refused_batch

    def work(self, held: Held) -> Work | None:
        of, on, batch = held.network, held.backend, held.batch

        def start() -> jobs.Job:
            return jobs.submit(f"Memory of {of.label} on {on.label}", _memory, of, on, batch)

        code = f"wb.profiling.memory_timeline({of.code}, batch={batch})"
        return Work(("memory", of.number, on, batch), start, code)

    def words(self, held: Held, result: MemoryFound) -> str:
        found = result.timeline
        least = f"{'' if found.minimum_exact else 'at least '}{fmt.size(found.minimum_bytes)} needed in any order"
        return (
            f"{held.network.label}, batch {held.batch}: activations peak at {fmt.size(found.peak_bytes)} in "
            f"{found.peak_layer}, {least}; weights {fmt.size(found.weight_bytes)}. {result.planned} {result.taken}"
        )

    def figure(self, held: Held, result: MemoryFound) -> Figure:
        found = result.timeline
        least = {"minimum_bytes": found.minimum_bytes, "minimum_exact": found.minimum_exact}
        return memory_timeline_figure(found.frame(), **least, **held.look)

    def listed(self, held: Held, result: MemoryFound) -> pd.DataFrame:
        return result.timeline.frame()

    def lines(self, held: Held) -> tuple[str, ...]:
        model = held.network.code
        return (
            f"timeline = wb.profiling.memory_timeline({model}, batch={held.batch})",
            "least = dict(minimum_bytes=timeline.minimum_bytes, minimum_exact=timeline.minimum_exact)",
            "memory_timeline_figure(timeline.frame(), **least)",
        )


def _memory(network: Network, backend: Backend, batch: int, *, progress: Progress) -> MemoryFound:
    progress(0.0, "one forward pass")
    model = network.model()
    timeline = memory_timeline(model, batch=batch)
    progress(0.3, "the least that any order needs")
    _ = timeline.minimum_bytes  # a search that may take long: here, not when it is drawn
    progress(0.5, backend.label)
    return MemoryFound(timeline, *_of_engine(timeline, model, backend, batch, progress.part(0.5, 1.0)))


def _of_engine(
    timeline: MemoryTimeline, model: Model, backend: Backend, batch: int, progress: Progress
) -> tuple[str, str]:
    """What an engine plans and takes, in words; or why it does not say, in its own words."""
    try:
        planned = f"{backend.title} plans {fmt.size(timeline.planned_bytes(backend))}."
    except BackendError as why:
        planned = str(why)
    try:
        rows = memory_counters(model, backend, batch, progress=progress).frame()
    except BackendError as why:
        return planned, str(why)
    taken = [
        f"{row.counter} memory {fmt.size(row.before_bytes)} before, {fmt.size(row.loaded_bytes)} loaded, "
        f"{fmt.size(row.peak_bytes)} at its highest, {fmt.size(row.after_bytes)} after"
        for row in rows.itertuples()
    ]
    return planned, f"Process: {'; '.join(taken)}."


class Distance(View):
    """How far each layer of the chosen candidate is from the same layer of the study's model, on real samples."""

    title = "Distance"
    action = "Measure distance"
    follows_menus = True
    imports = ("from workbench.figures import sqnr_figure",)
    fields = (
        name("layer", "layer"),
        name("type", "type"),
        Field("SQNR, dB", "sqnr_db", fmt.significant),
        Field("cosine", "cosine", close_to_one),
        Field("largest error", "max_error", fmt.significant),
    )
    caption = "Outputs of each layer against the network as it is; click a row to mark its layer"

    def missing(self, held: Held) -> str:
        if held.network.number:
            return ""
        return (
            "Choose a candidate under Network: its layers are compared with the same layers of "
            f"{held.network.label}. Compress makes candidates."
        )

    def work(self, held: Held) -> Work | None:
        def start() -> jobs.Job:
            return jobs.submit(f"Distance of {held.network.label}", _distances, held.network)

        code = f"wb.profiling.sqnr(study.model, {held.network.code}, study.task)"
        return Work(("sqnr", held.network.number), start, code)

    def words(self, held: Held, result: Distances) -> str:
        frame = result.frame()
        found = f"{held.network.label} against the network as it is, {len(frame)} layers on {result.samples} samples."
        noisy = frame["sqnr_db"].dropna()
        if not noisy.empty:
            found += f" Farthest at {frame.loc[noisy.idxmin(), 'layer']}: {fmt.significant(noisy.min())} dB."
        left_out = len(result.unmatched)
        return found + (f" {left_out} {'layer' if left_out == 1 else 'layers'} left out." if left_out else "")

    def figure(self, held: Held, result: Distances) -> Figure:
        return sqnr_figure(result.frame(), **held.look)

    def listed(self, held: Held, result: Distances) -> pd.DataFrame:
        return result.frame()

    def lines(self, held: Held) -> tuple[str, ...]:
        if not held.network.number:
            return ()
        return (
            f"distances = wb.profiling.sqnr(study.model, {held.network.code}, study.task)",
            "sqnr_figure(distances.frame())",
        )


def _distances(network: Network, *, progress: Progress) -> Distances:
    study = network.study
    return sqnr(study.model, network.model(), study.task, progress=progress)


class SensitivityView(View):
    """Accuracy against pruning ratio or bit width, one layer at a time."""

    title = "Sensitivity"
    fits = True
    action = "Run sensitivity"
    automatic = False
    follows_menus = True
    imports = ("from workbench.figures import sensitivity_figure",)
    fields = (
        name("layer", "layer"),
        name("technique", "technique"),
        Field("level", "level", fmt.significant),
        Field("accuracy, %", "accuracy", lambda value: fmt.accuracy(value, unit=False)),
        Field("drop, points", "accuracy_drop", lambda value: fmt.accuracy(value, unit=False).replace("-", "−")),
        Field("latency, ms", "latency_ms", milliseconds),
        Field("saved, ms", "saved_ms", milliseconds),
        Field("saved per point, ms", "saved_ms_per_point", milliseconds),
    )
    caption = "Accuracy with one layer changed and the others as they are; click a row to mark its layer"

    def __init__(self) -> None:
        super().__init__()
        self.technique = W.Dropdown(
            description="Change",
            options=[("prune: share of channels removed", "prune"), ("quantise: bits", "quantize")],
            layout=W.Layout(width="320px"),
        )
        self.controls = (self.technique,)

    def missing(self, held: Held) -> str:
        return ""

    def work(self, held: Held) -> Work | None:
        technique, backend = self.technique.value, held.backend

        def start() -> jobs.Job:
            return jobs.submit(f"Sensitivity of {held.network.label}", _sensitivity, held.network, technique, backend)

        return Work(("sensitivity", held.network.number, technique, backend), start, self._code(held))

    def _code(self, held: Held) -> str:
        on = held.backend.to_python()
        return f'wb.sensitivity({held.network.code}, study.task, "{self.technique.value}", on={on}, cache=study)'

    def words(self, held: Held, result: Sensitivity) -> str:
        frame = result.frame()
        found = f"{held.network.label}: {fmt.accuracy(result.baseline.accuracy)} untouched."
        drops, rates = frame["accuracy_drop"].dropna(), frame["saved_ms_per_point"].dropna()
        if not drops.empty:
            worst = frame.loc[drops.idxmax()]
            found += f" Falls furthest with {worst['layer']}, by {fmt.accuracy(drops.max(), unit=False)} points."
        if not rates.empty:
            best = frame.loc[rates.idxmax()]
            found += f" Best exchange: {best['layer']}, {fmt.milliseconds(rates.max())} saved per point lost."
        return found

    def figure(self, held: Held, result: Sensitivity) -> Figure:
        return sensitivity_figure(result.frame(), **held.look)

    def listed(self, held: Held, result: Sensitivity) -> pd.DataFrame:
        return result.frame()

    def lines(self, held: Held) -> tuple[str, ...]:
        return f"sensitivity = {self._code(held)}.wait()", "sensitivity_figure(sensitivity.frame())"


def _sensitivity(network: Network, technique: str, backend: Backend, *, progress: Progress) -> jobs.Job:
    """The job that does it, submitted here because making the model may take long too."""
    progress(0.0, "making the model")
    study = network.study
    return sensitivity(network.model(), study.task, technique, on=backend, cache=study)

"""Where the memory goes: the activations alive at each step of one forward pass, and what a process takes for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape

import pandas as pd
import psutil
import torch

from workbench import formatting
from workbench.deployment import Backend, Compiled, Eager, OnnxRuntime
from workbench.errors import BackendError, DataError
from workbench.jobs import SILENT, Progress
from workbench.measure import MemoryMeter, trim
from workbench.models.model import Model
from workbench.profiling import _graph_trace, _ort_plan, _recording
from workbench.profiling._schedule import Trace, live_bytes, minimum_bytes
from workbench.profiling.profile import example_batch

INPUT = "(input)"
COLUMNS = ["step", "layer", "type", "live_bytes", "allocated_bytes", "freed_bytes", "tensors"]
COUNTERS = ["counter", "before_bytes", "loaded_bytes", "peak_bytes", "after_bytes"]


@dataclass(frozen=True, eq=False)
class MemoryTimeline:
    """Activations alive during one forward pass; weights are counted apart.

    Attributes
    ----------
    rows
        See `frame`.
    trace
        What made and what needed each of them.
    weight_bytes
        Of parameters and buffers, or of what a graph stores.
    measured
        Whether a forward pass was watched; worked out from a graph otherwise.
    """

    rows: pd.DataFrame
    trace: Trace
    weight_bytes: int
    measured: bool
    model: Model
    batch: int

    def frame(self) -> pd.DataFrame:
        """A row per operation that makes or changes memory, in execution order, after one for the inputs.

        Columns: step, layer, type, live_bytes (while it runs), allocated_bytes (by it), freed_bytes (after it, before
        the next row) and tensors (alive while it runs). What only gives a view of memory has no row; an operation in
        place allocates nothing.
        """
        return self.rows.copy()

    @property
    def peak_bytes(self) -> int:
        """The most that is alive at once."""
        return int(self.rows["live_bytes"].max())

    @property
    def peak_layer(self) -> str:
        """The layer that runs when most is alive, the first of several."""
        return str(self.rows["layer"].iloc[int(self.rows["live_bytes"].argmax())])

    @property
    def minimum_bytes(self) -> int:
        """The least peak of any order of these operations, each buffer given back after its last use.

        An engine that fuses operations or computes in place where this model does not may need less still. A lower
        bound where `minimum_exact` is False.
        """
        return self._minimum[0]

    @property
    def minimum_exact(self) -> bool:
        """Whether there is an order that needs no more than `minimum_bytes`; else the search was given up."""
        return self._minimum[1]

    @cached_property
    def _minimum(self) -> tuple[int, bool]:
        return minimum_bytes(self.trace)

    def planned_bytes(self, on: Backend) -> int:
        """Bytes `on` lays out for the activations between inputs and outputs of one run, its kernels' scratch included.

        Raises
        ------
        BackendError
            If that engine does not tell; ONNX Runtime on the CPU does, in the log of its arena.
        """
        if not isinstance(on, OnnxRuntime) or on.provider != "cpu":
            raise BackendError(
                f"{on.label} does not tell what memory it plans; ONNX Runtime on the CPU does: "
                "planned_bytes(wb.OnnxRuntime()). memory_counters says what its process takes."
            )
        on.require()
        on.check(self.model)
        arrays = example_batch(self.model, self.batch)
        return _ort_plan.planned_bytes(self.model, on, dict(zip(self.model.example, arrays, strict=True)))

    def __repr__(self) -> str:
        peak, least, weights = (formatting.size(n) for n in (self.peak_bytes, self.minimum_bytes, self.weight_bytes))
        return (
            f"<MemoryTimeline {self.model.name}, batch {self.batch}: peak {peak} in {self.peak_layer}, "
            f"{'' if self.minimum_exact else 'at least '}{least} needed; weights {weights}>"
        )

    def _repr_html_(self) -> str:
        return f"<p>{escape(repr(self)[1:-1])}</p>" + self.rows.to_html(index=False, border=0, escape=True)


def memory_timeline(model: Model, batch: int = 1) -> MemoryTimeline:
    """What is alive at each step of one forward pass.

    A torch module runs once while every buffer is followed from the operation that makes it until torch gives it back,
    so that what Python still refers to counts as alive. Scratch memory that a kernel takes and gives back by itself is
    not seen, and attention runs part by part. A model that is only a graph is worked out from its shapes, each tensor
    from the node that writes it to the last that reads it.

    Parameters
    ----------
    batch
        Samples; the model's example inputs are repeated to that many.

    Raises
    ------
    DataError
        If `batch` is below 1, or a graph does not say all its shapes.
    LoadError
        If the module fails; the layer that failed is named.
    """
    _check_batch(batch)
    if model.module is None:
        trace = _graph_trace.trace(model, batch)
        released = [[], *(after for _, after in live_bytes(trace))]
        weights = _graph_trace.weight_bytes(model.graph)
    else:
        picks = torch.arange(batch)
        example = {name: value[picks % len(value)] for name, value in model.example.items()}
        trace, released = _recording.recorded(model, example)
        stored = [t.untyped_storage() for t in (*model.module.parameters(), *model.module.buffers())]
        weights = sum({storage.data_ptr(): storage.nbytes() for storage in stored}.values())
    return MemoryTimeline(_rows(trace, released), trace, weights, model.module is not None, model, batch)


def _rows(trace: Trace, released: Sequence[Sequence[int]]) -> pd.DataFrame:
    """`released` holds the buffers given back after the inputs were there, and after each operation."""
    rows, live, tensors = [], 0, 0
    made = [(INPUT, "input", trace.inputs), *((o.layer, o.type, o.writes) for o in trace.operations)]
    for step, ((layer, kind, writes), gone) in enumerate(zip(made, released, strict=True)):
        allocated, freed = trace.bytes(writes), trace.bytes(gone)
        live, tensors = live + allocated, tensors + len(writes)
        rows.append((step, layer, kind, live, allocated, freed, tensors))
        live, tensors = live - freed, tensors - len(gone)
    return pd.DataFrame(rows, columns=COLUMNS)


@dataclass(frozen=True, eq=False)
class MemoryCounters:
    """What the process, and the device where there is one, say of their memory around one run of an engine.

    Attributes
    ----------
    rows
        See `frame`.
    """

    rows: pd.DataFrame
    backend_label: str
    batch: int

    def frame(self) -> pd.DataFrame:
        """A row per counter.

        Columns: counter (``resident``: of this process, by the system; ``CUDA allocated`` and ``CUDA reserved``: of
        torch's allocator), before_bytes (without the engine), loaded_bytes (compiled, not yet run at this batch),
        peak_bytes (the highest during the run; NaN where the system keeps no such mark) and after_bytes (after it, the
        engine still open).
        """
        return self.rows.copy()


def memory_counters(
    model: Model, on: Backend | None = None, batch: int = 1, *, progress: Progress = SILENT
) -> MemoryCounters:
    """The memory counters before an engine is made, when it is loaded, at the highest of a run, and after it.

    Parameters
    ----------
    on
        The backend; eager by default, or `OnnxRuntime` for a model that is only a graph.
    batch
        Samples; the model's example inputs are repeated to that many.

    Raises
    ------
    DataError
        If `batch` is below 1.
    BackendError
        If the backend cannot run this model.
    """
    _check_batch(batch)
    backend = on if on is not None else Eager() if model.module is not None else OnnxRuntime()
    backend.require()
    backend.check(model)
    # what is exported for the engine's sake is not the engine's
    backend.prepare(model)
    inputs = example_batch(model, batch)
    device = backend.device if isinstance(backend, (Eager, Compiled)) and backend.device != "cpu" else ""
    meter = MemoryMeter()
    before = _counted(device)
    progress(0.1, f"compiling for {backend.label}")
    with backend.compile(model) as engine:
        progress(0.8, "running")
        meter.reset()
        loaded = _counted(device)
        if device:
            torch.cuda.reset_peak_memory_stats(device)
        engine(*inputs)
        peak = {"resident": before["resident"] + 1e6 * meter.added_mb()}
        if device:
            peak |= {
                "CUDA allocated": torch.cuda.max_memory_allocated(device),
                "CUDA reserved": torch.cuda.max_memory_reserved(device),
            }
        trim()  # what the allocator keeps for later is not the engine's
        after = _counted(device)
    rows = [(name, before[name], loaded[name], peak[name], after[name]) for name in before]
    return MemoryCounters(pd.DataFrame(rows, columns=COUNTERS), backend.label, batch)


def _counted(device: str) -> dict[str, int]:
    counters = {"resident": psutil.Process().memory_info().rss}
    if device:
        counters |= {
            "CUDA allocated": torch.cuda.memory_allocated(device),
            "CUDA reserved": torch.cuda.memory_reserved(device),
        }
    return counters


def _check_batch(batch: int) -> None:
    if not isinstance(batch, int) or batch < 1:
        raise DataError(f"batch is {batch!r}; a whole number of at least 1 is needed.")

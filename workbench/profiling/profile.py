"""`Profile`: one row per layer or kernel, with what is left over as a row of its own."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

import numpy as np
import pandas as pd

from workbench import environment, formatting
from workbench.deployment import Backend, Eager, OnnxRuntime, OpTiming
from workbench.errors import DataError
from workbench.jobs import SILENT, Progress
from workbench.measure import latency
from workbench.models.model import Model

UNATTRIBUTED = "(unattributed)"
_COLUMNS = ["name", "layer", "type", "latency_ms", "latency_p95_ms", "share", "macs", "parameters", "output_shape"]


@dataclass(frozen=True, eq=False)
class Profile:
    """Where the time of one call goes on one engine.

    Attributes
    ----------
    rows
        See `frame`.
    end_to_end_ms
        Median of the whole call, measured without the profiler.
    batch
        Samples per call.
    contended
        Whether the machine was busy with something else while the whole call was timed.
    environment
        Where it was taken.
    """

    rows: pd.DataFrame
    end_to_end_ms: float
    model_name: str
    backend_label: str
    batch: int
    contended: bool
    environment: environment.Environment

    def frame(self) -> pd.DataFrame:
        """A row per layer or kernel in execution order, the last one what no row accounts for.

        Columns: name (the engine's own), layer (the model's; several that were fused are joined by `` + ``; empty for
        what the engine inserted), type, latency_ms (median), latency_p95_ms, share (of `end_to_end_ms`), macs and
        parameters (of the layers, at this batch; NaN where the row has no layer), output_shape (of one sample).
        `latency_ms` adds up to `end_to_end_ms`, because the last row is the difference. It is negative where the
        profiler made the rows slower than they are unobserved.
        """
        return self.rows.copy()

    @property
    def unattributed_ms(self) -> float:
        """End-to-end time that no row accounts for; negative where profiling slowed the rows."""
        return float(self.rows["latency_ms"].iloc[-1])

    def __repr__(self) -> str:
        return (
            f"<Profile {self.model_name} on {self.backend_label}, batch {self.batch}: {len(self.rows) - 1} rows, "
            f"{formatting.milliseconds(self.end_to_end_ms)}, "
            f"{formatting.share(self.unattributed_ms / self.end_to_end_ms)} unattributed>"
        )

    def _repr_html_(self) -> str:
        return f"<p>{escape(repr(self)[1:-1])}</p>" + self.rows.to_html(index=False, border=0, escape=True)


def profile(
    model: Model,
    on: Backend | None = None,
    batch: int = 1,
    repeats: int = 50,
    *,
    progress: Progress = SILENT,
) -> Profile:
    """Where the time of one forward pass goes, layer by layer.

    Parameters
    ----------
    on
        The backend; eager by default, or `OnnxRuntime` for a model that is only a graph.
    batch
        Samples per call; the model's example inputs are repeated to that many.
    repeats
        Profiled calls.

    Returns
    -------
    Profile
        Its ``frame()`` has a row per layer.

    Raises
    ------
    DataError
        If `batch` or `repeats` is below 1.
    BackendError
        If the backend cannot run or cannot profile this model.
    """
    for name, value in (("batch", batch), ("repeats", repeats)):
        if not isinstance(value, int) or value < 1:
            raise DataError(f"{name} is {value!r}; a whole number of at least 1 is needed.")
    backend = on if on is not None else Eager() if model.module is not None else OnnxRuntime()
    backend.require()
    backend.check(model)
    inputs = example_batch(model, batch)
    progress(0.0, f"compiling for {backend.label}")
    with backend.compile(model, progress.part(0.0, 0.3)) as engine:
        whole = latency([lambda: engine(*inputs)], blocks=10, progress=progress.part(0.3, 0.6, "end to end"))[0]
        progress(0.6, "profiling")
        timings = engine.profile(inputs, repeats)
    progress(0.95, "layers")
    return Profile(
        rows=_rows(model, timings, whole.median_ms, batch),
        end_to_end_ms=whole.median_ms,
        model_name=model.name,
        backend_label=backend.label,
        batch=batch,
        contended=whole.contended,
        environment=environment.current(),
    )


def example_batch(model: Model, batch: int) -> tuple[np.ndarray, ...]:
    """The model's example inputs, repeated along the batch axis to `batch` samples, contiguous."""
    return tuple(
        np.ascontiguousarray(np.resize(value.numpy(), (batch, *value.shape[1:]))) for value in model.example.values()
    )


def _rows(model: Model, timings: list[OpTiming], whole_ms: float, batch: int) -> pd.DataFrame:
    table = model.layers.drop_duplicates("layer").set_index("layer")
    medians = [float(np.median(t.times_ms)) for t in timings]
    owner = _owners(timings, medians)
    rows = []
    for index, (timing, median) in enumerate(zip(timings, medians, strict=True)):
        known = [layer for layer in timing.layers if layer in table.index]
        mine = [layer for layer in known if owner[layer] == index]
        rows.append(
            {
                "name": timing.name,
                "layer": " + ".join(timing.layers),
                "type": timing.type,
                "latency_ms": median,
                "latency_p95_ms": float(np.percentile(timing.times_ms, 95)),
                "macs": batch * float(table.loc[mine, "macs"].sum()) if known else np.nan,
                "parameters": float(table.loc[mine, "parameters"].sum()) if known else np.nan,
                "output_shape": table.loc[known[-1], "output_shape"] if known else None,
            }
        )
    rows.append(
        {"name": UNATTRIBUTED, "layer": UNATTRIBUTED, "type": "unattributed", "latency_ms": whole_ms - sum(medians)}
    )
    frame = pd.DataFrame(rows).reindex(columns=_COLUMNS)
    frame["share"] = frame["latency_ms"] / whole_ms
    return frame


def _owners(timings: list[OpTiming], medians: list[float]) -> dict[str, int]:
    """For each layer the row that counts its MACs: the slowest of those it is spread over, so that it counts once."""
    owner: dict[str, int] = {}
    for index, timing in enumerate(timings):
        for layer in timing.layers:
            if layer not in owner or medians[index] > medians[owner[layer]]:
                owner[layer] = index
    return owner

"""`Profile`: one row per layer or kernel, with what is left over as a row of its own."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import pandas as pd

from workbench import environment, formatting
from workbench.deployment import Backend, Eager, Engine, OnnxRuntime, OpTiming
from workbench.errors import DataError
from workbench.jobs import SILENT, Progress
from workbench.measure import Latency, OtherProcesses, block, quiesce, summary
from workbench.models.model import Model
from workbench.profiling import _call, _rows

_PLAIN_BLOCKS = 4  # of the plain call, before, between and after the recorded blocks
_PLAIN_S = 0.045
_PATIENCE = 3  # times as many blocks as wanted, at most, in search of enough at one pace
_SAME_PACE = 0.08
_RECORDINGS = 3  # at most, in search of one whose threads work as the plain calls' do
_ANOTHER_STATE = 0.12  # of the call: rows that miss it by more than this were recorded in another state


@dataclass(frozen=True, eq=False)
class Profile:
    """Where the time of one call goes on one engine.

    Attributes
    ----------
    rows
        See `frame`.
    operations
        What the engine told of each row but the last, in the same order.
    end_to_end_ms
        Median of the whole call, measured without the profiler.
    overhead_ms
        How much longer the whole call takes with the profiler on: what was measured and taken out. NaN for a profile
        that was read from files.
    backend
        What it ran on; None for a profile that was read from files.
    batch
        Samples per call.
    contended
        Whether the machine was busy with something else while the whole call was timed.
    environment
        Where it was taken; None for a profile that was read from files.
    """

    rows: pd.DataFrame
    operations: tuple[OpTiming, ...]
    end_to_end_ms: float
    overhead_ms: float
    model_name: str
    backend: Backend | None
    backend_label: str
    precision: str
    batch: int
    contended: bool
    environment: environment.Environment | None

    def frame(self) -> pd.DataFrame:
        """A row per layer or kernel in execution order, the last one what no row accounts for.

        Columns: name (the engine's own), layer (the model's; several that were fused are joined by `` + ``; empty for
        what the engine inserted), type, kind (layer, move, call, unknown, unattributed; see `OpTiming`), latency_ms
        (median), latency_p95_ms, share (of `end_to_end_ms`), macs and parameters (of the layers, at this batch; NaN
        where the row has no layer), input_shape and output_shape (of one sample), read_bytes (inputs and weights),
        written_bytes, activation_bytes (of both, what is not weights), intensity (floating-point or integer operations,
        two per MAC, for each byte read or written) and precision (of the arithmetic).

        `latency_ms` adds up to `end_to_end_ms`, because the last row is the difference. It is negative where the rows
        took longer when they were recorded than they do unobserved.
        """
        return self.rows.copy()

    @property
    def unattributed_ms(self) -> float:
        """End-to-end time that no row accounts for; negative where profiling slowed the rows."""
        return float(self.rows["latency_ms"].iloc[-1])

    @property
    def edges(self) -> tuple[tuple[int, int], ...]:
        """Pairs of row numbers, the first of which writes a tensor that the second reads."""
        writer: dict[str, int] = {}
        found: dict[tuple[int, int], None] = {}
        for index, operation in enumerate(self.operations):
            for port in operation.reads:
                if port.name in writer:
                    found[writer[port.name], index] = None
            writer.update((port.name, index) for port in operation.writes)
        return tuple(found)

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

    Calls with the profiler take turns with calls without it, so that a drift of the machine hits both alike.

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
        operations, whole, overhead_ms = _recorded(engine, inputs, repeats, progress.part(0.3, 0.95, "timing"))
    progress(0.95, "layers")
    return Profile(
        rows=_rows.table(operations, whole.median_ms, model.layers, batch),
        operations=tuple(operations),
        end_to_end_ms=whole.median_ms,
        overhead_ms=overhead_ms,
        model_name=model.name,
        backend=backend,
        backend_label=backend.label,
        precision=engine.precision,
        batch=batch,
        contended=whole.contended,
        environment=environment.current(),
    )


def example_batch(model: Model, batch: int) -> tuple[np.ndarray, ...]:
    """The model's example inputs, repeated along the batch axis to `batch` samples, contiguous."""
    return tuple(
        np.ascontiguousarray(np.resize(value.numpy(), (batch, *value.shape[1:]))) for value in model.example.values()
    )


def _recorded(
    engine: Engine, inputs: Sequence[np.ndarray], repeats: int, progress: Progress
) -> tuple[list[OpTiming], Latency, float]:
    """What `_timed` gives; where the recording is a session apart, the best of a few until one meets the plain call.

    ONNX Runtime's second thread takes part in one session and sleeps in the next, for as long as it lives, and a
    convolution takes twice as long without it. Rows of one state say nothing of calls in the other.
    """
    found = []
    for number in range(_RECORDINGS):
        part = progress.part(number / _RECORDINGS, (number + 1) / _RECORDINGS)
        timed, apart = _timed(engine, inputs, repeats, part)
        operations, whole, _ = timed
        missed = abs(whole.median_ms - sum(float(np.median(op.times_ms)) for op in operations)) / whole.median_ms
        found.append((missed, timed))
        if not apart or missed <= _ANOTHER_STATE:
            break
    return min(found, key=lambda entry: entry[0])[1]


def _timed(
    engine: Engine, inputs: Sequence[np.ndarray], repeats: int, progress: Progress
) -> tuple[tuple[list[OpTiming], Latency, float], bool]:
    """The engine's operations, the whole call without the profiler, and the milliseconds the profiler adds to it.

    Besides, whether what was recorded is a session apart from the engine's.

    Recorded blocks lie between stretches of plain calls. A processor changes its pace, by half within seconds; blocks
    count only where the plain calls before and after them went at one pace, the same for all.
    """
    call = functools.partial(engine, *inputs)
    plain: list[list[np.ndarray]] = []
    recorded: list[list[float]] = []
    others = OtherProcesses()

    def plainly() -> None:
        quiesce()
        plain.append([block(call, _PLAIN_S) for _ in range(_PLAIN_BLOCKS)])

    with engine.recorder(inputs) as recorder:
        parts = recorder.parts(repeats)
        plainly()
        used: list[int] = []
        while len(used) < len(parts) and len(recorded) < _PATIENCE * len(parts):
            progress(len(used) / len(parts), f"block {len(used) + 1} of {len(parts)}")
            quiesce()
            recorded.append(recorder.block(parts[len(used)]))
            plainly()
            used = steady([float(np.median(np.concatenate(stretch))) for stretch in plain])
        settled = len(used) >= len(parts)
        used = used or list(range(len(recorded)))
        around = sorted({i for u in used for i in (u, u + 1)})
        whole = summary([times for i in around for times in plain[i]], others.busy() or not settled)
        operations = recorder.rows(whole.median_ms, used)
    operations = [*_call.row(engine, inputs, operations), *operations]
    profiled_ms = float(np.median([wall for u in used for wall in recorded[u]]))
    return (operations, whole, profiled_ms - whole.median_ms), recorder.apart


def steady(levels_ms: Sequence[float]) -> list[int]:
    """The most blocks at one pace, by number, where block i lies between the plain calls of levels i and i + 1."""
    pairs = [
        (number, (before + after) / 2)
        for number, (before, after) in enumerate(itertools.pairwise(levels_ms))
        if abs(before - after) <= _SAME_PACE * (before + after) / 2
    ]
    groups = [[i for i, level in pairs if abs(level - pace) <= _SAME_PACE * pace] for _, pace in pairs]
    return max(groups, key=len, default=[])

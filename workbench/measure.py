"""Latency, throughput, accuracy, memory and size of an engine, each with its interval and its environment.

Latency is taken in blocks: the engines compared take turns, each for a block of calls after its own short warm-up, so
that a drift of the machine hits all alike. A block is the unit of the bootstrap, because calls inside one are not
independent.
"""

from __future__ import annotations

import ctypes
import gc
import math
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from workbench import environment
from workbench.data.task import Task
from workbench.deployment import Engine
from workbench.errors import DataError
from workbench.jobs import SILENT, Progress

_BLOCK_S = 0.02  # a block lasts this long, or MIN_CALLS calls if they are slower
_SETTLE_S = 0.004  # calls before a block that are not counted: caches and clocks come back
_WATCH_S = 0.01  # a stretch in which this process computes next to nothing before a block begins
_QUIET_WITHIN_S = 1.0
_MIN_CALLS = 3
_RESAMPLES = 1000
_SCATTER = 0.25  # spread of block medians (interquartile over median) past which a measurement is marked
_OTHERS = 0.2  # cores that other processes kept busy meanwhile, past which it is marked


@dataclass(frozen=True)
class Latency:
    """Time of one call of an engine.

    Attributes
    ----------
    median_ms, p95_ms
        Over all counted calls.
    interval_ms
        95 % bootstrap interval of the median, resampling blocks.
    blocks_ms
        Median of each block, in the order taken: what ratios are computed from.
    contended
        Whether something else was using the machine: other processes kept more than a fifth of a core busy, or the
        blocks scatter. Threads of one operation wait for each other, so that a busy neighbour can slow them tenfold.
    """

    median_ms: float
    p95_ms: float
    interval_ms: tuple[float, float]
    blocks_ms: tuple[float, ...]
    contended: bool


@dataclass(frozen=True)
class Measurement:
    """What one candidate costs and how right it is.

    Attributes
    ----------
    accuracy, accuracy_interval
        The task's metric on its whole test split (0 to 1), with its 95 % interval.
    latency_ms, latency_interval_ms, latency_p95_ms
        Median, its 95 % interval, and 95th percentile of one call at `batch`.
    throughput_per_s
        Samples per second at that batch, one call after another.
    reference_ms, speedup
        Latency of the study's reference engine in the same interleaved run, and how many times faster this one is:
        the ratio to compare across days, because both sides drift together.
    size_bytes, file_bytes
        Bytes of the deployable artefact after DEFLATE, and as the files stand.
    memory_mb
        Resident memory in 10^6 bytes that the engine adds while it runs; NaN where the system cannot tell.
    provider
        What was actually loaded to run it.
    contended
        Whether the machine was busy with something else during the timing.
    environment
        Processor, libraries, load and date, as JSON values.
    """

    accuracy: float
    accuracy_interval: tuple[float, float]
    latency_ms: float
    latency_interval_ms: tuple[float, float]
    latency_p95_ms: float
    throughput_per_s: float
    reference_ms: float
    speedup: float
    size_bytes: int
    file_bytes: int
    memory_mb: float
    batch: int
    threads: int
    provider: str
    precision: str
    contended: bool
    environment: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """JSON values; NaN becomes None."""
        values = asdict(self)
        return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Measurement:
        """What `to_dict` wrote."""
        values = {f.name: data[f.name] for f in fields(cls)}
        values["memory_mb"] = math.nan if values["memory_mb"] is None else values["memory_mb"]
        for key in ("accuracy_interval", "latency_interval_ms"):
            values[key] = tuple(values[key])
        return cls(**values)


def latency(
    calls: Sequence[Callable[[], Any]], *, blocks: int = 20, min_s: float = 0.0, progress: Progress = SILENT
) -> list[Latency]:
    """Time several calls against each other, interleaved in blocks (A B C A B C …).

    Parameters
    ----------
    calls
        Functions without arguments, one per thing compared.
    blocks
        Blocks of each; at least 5, because the interval comes from resampling them.
    min_s
        Go on with more blocks until this many seconds have passed.

    Returns
    -------
    list of Latency
        In the order of `calls`.
    """
    if blocks < 5:
        raise ValueError(f"blocks is {blocks}; at least 5 are needed for an interval.")
    samples: list[list[np.ndarray]] = [[] for _ in calls]
    for call in calls:
        call()
    begin = time.perf_counter()
    others = OtherProcesses()
    done = 0
    # the collector would stop one side's call in the middle; it runs between blocks instead
    enabled = gc.isenabled()
    gc.disable()
    try:
        while done < blocks or time.perf_counter() - begin < min_s:
            progress(min(done / blocks, 0.99), f"timing, block {done + 1} of {blocks}")
            # every second round goes backwards, so that no side always follows the same neighbour
            order = range(len(calls)) if done % 2 == 0 else range(len(calls) - 1, -1, -1)
            for index in order:
                quiesce()
                samples[index].append(block(calls[index]))
            done += 1
    finally:
        if enabled:
            gc.enable()
    busy = others.busy()
    return [summary(side, busy) for side in samples]


class OtherProcesses:
    """How many cores everything but this process keeps busy, the hypervisor's share included."""

    def __init__(self) -> None:
        self._start = self._used()

    def cores(self) -> float:
        """Mean since this object was made; NaN, which is above nothing, for too short a time to tell."""
        now, everyone, mine = (b - a for a, b in zip(self._start, self._used(), strict=True))
        return (everyone - mine) / now if now >= 0.1 else math.nan

    def busy(self) -> bool:
        """Whether they kept more than a fifth of a core busy."""
        return self.cores() > _OTHERS

    @staticmethod
    def _used() -> tuple[float, float, float]:
        times, own = psutil.cpu_times(), psutil.Process().cpu_times()
        busy = sum(getattr(times, kind, 0.0) for kind in ("user", "system", "irq", "softirq", "steal"))
        return time.perf_counter(), busy, own.user + own.system


def quiesce() -> None:
    """Wait until the engine before has stopped.

    Its pool of threads goes on spinning after its last call, ONNX Runtime's for about 0.1 s. On as many cores as
    threads that made an eager ResNet-20 three times slower than it is.
    """
    give_up = time.monotonic() + _QUIET_WITHIN_S
    while time.monotonic() < give_up:
        used, start = time.process_time(), time.monotonic()
        time.sleep(_WATCH_S)
        if time.process_time() - used < 0.1 * (time.monotonic() - start):
            return


def block(call: Callable[[], Any], seconds: float = _BLOCK_S) -> np.ndarray:
    """Milliseconds of each call, one after another for `seconds`, at least three, after a few not counted."""
    clock = time.perf_counter
    settled = clock() + _SETTLE_S
    call()
    while clock() < settled:
        call()
    times = []
    end = clock() + seconds
    while len(times) < _MIN_CALLS or clock() < end:
        start = clock()
        call()
        times.append(clock() - start)
    return np.asarray(times) * 1e3


def summary(blocks: Sequence[np.ndarray], busy: bool) -> Latency:
    """The latency in blocks of times in milliseconds; `busy` says whether other processes were."""
    medians = np.array([np.median(b) for b in blocks])
    everything = np.concatenate(blocks)
    low, high = bootstrap_median(medians)
    quartiles = np.percentile(medians, [25, 75])
    return Latency(
        median_ms=float(np.median(medians)),
        p95_ms=float(np.percentile(everything, 95)),
        interval_ms=(low, high),
        blocks_ms=tuple(float(m) for m in medians),
        contended=busy or bool((quartiles[1] - quartiles[0]) / np.median(medians) > _SCATTER),
    )


def bootstrap_median(values: np.ndarray, *, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the median (Efron 1979) of independent `values`, 1000 resamples."""
    values = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(0, len(values), size=(_RESAMPLES, len(values)))
    medians = np.median(values[picks], axis=1)
    low, high = np.percentile(medians, [50 * (1 - level), 100 - 50 * (1 - level)])
    return float(low), float(high)


def ratio(a: Latency, b: Latency) -> tuple[float, tuple[float, float]]:
    """How many times slower `a` is than `b`, block by block, with the 95 % interval of the median ratio.

    Both must come from one call of `latency`; otherwise their blocks do not pair.
    """
    if len(a.blocks_ms) != len(b.blocks_ms):
        raise ValueError(f"{len(a.blocks_ms)} and {len(b.blocks_ms)} blocks do not pair; time both in one call.")
    ratios = np.asarray(a.blocks_ms) / np.asarray(b.blocks_ms)
    return float(np.median(ratios)), bootstrap_median(ratios)


def accuracy(
    engine: Engine, task: Task, *, batch: int = 200, limit: int | None = None, progress: Progress = SILENT
) -> tuple[float, tuple[float, float]]:
    """The task's metric on its test split, and its 95 % interval.

    Parameters
    ----------
    batch
        Samples per call of the engine; changes speed, not the result.
    limit
        Only the first so many samples; None for the whole split.

    Raises
    ------
    DataError
        If the engine's output is not finite.
    """
    total = min(task.count("test"), limit or task.count("test"))
    values = []
    seen = 0
    for inputs, labels in task.batches("test", batch, limit):
        progress(seen / total, f"accuracy, {seen} of {total}")
        outputs = engine(*inputs)
        first = outputs[0] if isinstance(outputs, tuple) else outputs
        if not np.isfinite(first).all():
            raise DataError(
                f"{engine.name} on {engine.backend.label} gives NaN or infinite outputs for test samples {seen} to "
                f"{seen + len(labels) - 1}. Undo the last step, or use a wider precision."
            )
        values.append(task.metric.per_sample(outputs, labels))
        seen += len(labels)
    mean, low, high = task.metric.interval(np.concatenate(values))
    return float(mean), (float(low), float(high))


def artifact_size(files: dict[str, bytes]) -> tuple[int, int]:
    """Bytes of the artefact after DEFLATE at level 6 (as a zip would store it), and as it stands."""
    return sum(len(zlib.compress(data, 6)) for data in files.values()), sum(len(data) for data in files.values())


class MemoryMeter:
    """Resident memory that something adds while it runs, by the kernel's own high-water mark.

    Start it before the engine is made, call `reset` before the runs, read `added_mb` after them. Freed memory is
    given back to the system first, so that an engine is not hidden in what its predecessor left.
    """

    def __init__(self) -> None:
        trim()
        self._before = psutil.Process().memory_info().rss
        self._marked = False

    def reset(self) -> None:
        """Forget the high-water mark so far (Linux: ``clear_refs``, see proc(5))."""
        trim()
        if sys.platform == "linux":
            try:
                Path("/proc/self/clear_refs").write_text("5")
                self._marked = True
            except OSError:  # a sandbox may forbid it; `added_mb` then says that it does not know
                self._marked = False

    def added_mb(self) -> float:
        """10^6 bytes above the start at the highest since `reset`; NaN where the system keeps no such mark."""
        if not self._marked:
            return math.nan
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return max(int(line.split()[1]) * 1024 - self._before, 0) / 1e6
        return math.nan


def trim() -> None:
    """Collect what nothing refers to, and give what is free back to the system."""
    gc.collect()
    if sys.platform == "linux":
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        except (OSError, AttributeError):  # a C library other than glibc keeps nothing back to trim
            return


def measure(
    engine: Engine,
    task: Task,
    *,
    batch: int = 1,
    reference: Engine | None = None,
    memory: MemoryMeter | None = None,
    progress: Progress = SILENT,
) -> Measurement:
    """Everything that is measured of one engine, its latency interleaved with the `reference` engine's.

    Parameters
    ----------
    engine
        Freshly compiled; see `Backend.compile`.
    batch
        Samples per timed call, taken from the test split.
    reference
        What `speedup` is against; None to time the engine alone (`speedup` is then 1).
    memory
        A meter started before the engine was made; without one `memory_mb` is NaN.
    """
    inputs = task.inputs("test", batch)
    if len(inputs[0]) < batch:
        raise DataError(f"batch is {batch}, but the test split has {len(inputs[0])} samples; use a smaller batch.")
    if memory is not None:
        memory.reset()
    for _ in range(3):
        engine(*inputs)
    added_mb = math.nan if memory is None else memory.added_mb()

    score, interval = accuracy(engine, task, progress=progress.part(0.0, 0.5))
    calls = [lambda: engine(*inputs)]
    if reference is not None:
        calls.append(lambda: reference(*inputs))
    times = latency(calls, progress=progress.part(0.5, 1.0))
    speedup = 1.0 if reference is None else ratio(times[1], times[0])[0]
    size, raw = artifact_size(engine.artifact())
    return Measurement(
        accuracy=score,
        accuracy_interval=interval,
        latency_ms=times[0].median_ms,
        latency_interval_ms=times[0].interval_ms,
        latency_p95_ms=times[0].p95_ms,
        throughput_per_s=1e3 * batch / times[0].median_ms,
        reference_ms=times[-1].median_ms,
        speedup=speedup,
        size_bytes=size,
        file_bytes=raw,
        memory_mb=added_mb,
        batch=batch,
        threads=engine.threads,
        provider=engine.provider,
        precision=engine.precision,
        contended=any(t.contended for t in times),
        environment=environment.current().to_dict(),
    )

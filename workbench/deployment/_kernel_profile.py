"""Torch's profiler, read back: which kernel of a compiled program took how long in which call."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from workbench.deployment._timing import OpTiming, Recorder
from workbench.errors import BackendError

_WARM_UP = 3
_CALL = "workbench.call"
_LOG_LEVEL = "KINETO_LOG_LEVEL"
_CHAIN = 48  # operations of the chain that the profiler's own cost is measured on
_CHAINS = 30


@dataclass(frozen=True)
class Event:
    """Something a thread did, within which others may lie; `device_us` is what the kernels took that it launched."""

    name: str
    start_us: float
    end_us: float
    device_us: float = 0.0


@dataclass(frozen=True)
class Spent:
    """What one launch took: on the thread that made it, with so many recorded events within it, and on the device."""

    thread_ms: float
    within: int
    device_ms: float


class KernelRecorder(Recorder):
    """A compiled program that says which kernel it runs, under torch's profiler.

    On the CPU the profiler adds to a kernel's time, and more for each operation that the kernel calls itself; what it
    adds is measured on operations that do next to nothing, and taken off. A GPU has a clock of its own.

    Parameters
    ----------
    call
        Runs the program once.
    launches
        The kernels it launches, in order.
    on_device
        Whether the kernels run on a CUDA device.
    """

    def __init__(self, call: Callable[[], Any], launches: Sequence[OpTiming], on_device: bool):
        self._call, self._launches, self._on_device = call, tuple(launches), on_device
        self._blocks: list[list[list[Event]]] = []
        self._added_ms: tuple[float, float] | None = None

    def block(self, calls: int) -> list[float]:
        for _ in range(_WARM_UP):
            self._call()
        walls = []
        with _profiler(self._on_device) as profiler:
            for _ in range(1 + calls):
                with record_function(_CALL):
                    start = time.perf_counter()
                    self._call()
                    walls.append((time.perf_counter() - start) * 1e3)
        # the first call under a fresh profiler pays for its buffers
        self._blocks.append(within(_events(profiler.events()), _CALL)[1:])
        return walls[1:]

    def rows(self, plain_ms: float, blocks: Sequence[int] | None = None) -> list[OpTiming]:
        """The launches of the calls with what each took.

        What the profiler adds to each is known without `plain_ms`.
        """
        names = [launch.name for launch in self._launches]
        used = self._blocks if blocks is None else [self._blocks[block] for block in blocks]
        calls = [matched(events, names) for block in used for events in block]
        if None in calls:
            raise BackendError(
                "torch's profiler did not see the kernels of the compiled program in the order it launches them, so "
                "that its profile has no rows"
                + (". It records compiled kernels on Linux and Windows" if calls.count(None) == len(calls) else "")
                + ". Profile with wb.Eager()."
            )
        times_ms = np.array([[self._time_ms(spent) for spent in call] for call in calls])
        if self._on_device and not times_ms.any():
            raise BackendError(
                "torch's profiler saw no kernel on the GPU: another tool may hold its counters. Close other profilers, "
                "or profile with wb.Eager()."
            )
        if not self._on_device:
            own_ms, within_ms = self._added_ms = self._added_ms or _added_ms()
            inner = np.array([[spent.within for spent in call] for call in calls])
            times_ms = np.maximum(times_ms - own_ms - within_ms * inner, 0.0)
        return [replace(row, times_ms=tuple(times_ms[:, i].tolist())) for i, row in enumerate(self._launches)]

    def _time_ms(self, spent: Spent) -> float:
        return spent.device_ms if self._on_device else spent.thread_ms

    def close(self) -> None:
        self._call = None
        self._blocks.clear()


def within(events: Sequence[Event], name: str) -> list[list[Event]]:
    """For each event of that name, in order of time, the events inside it, outer before inner."""
    ordered = sorted(events, key=lambda event: (event.start_us, -event.end_us))
    found: list[list[Event]] = []
    end = -math.inf
    for event in ordered:
        if event.start_us >= end and event.name == name:
            found.append([])
            end = event.end_us
        elif event.start_us < end:
            found[-1].append(event)
    return found


def matched(events: Sequence[Event], names: Sequence[str]) -> list[Spent] | None:
    """What each launch of one call took; None unless they were all seen, in this order.

    Parameters
    ----------
    events
        Of one call, outer before inner, as `within` gives them.
    names
        Of the launches. The code of a kernel may record itself with a number before its name.
    """
    found: list[list[Event]] = []
    end = -math.inf
    for event in events:
        if event.start_us < end:
            found[-1].append(event)
        elif len(found) < len(names) and _is(event.name, names[len(found)]):
            found.append([event])
            end = event.end_us
    if len(found) < len(names):
        return None
    return [
        Spent(
            (launch[0].end_us - launch[0].start_us) / 1e3,
            len(launch) - 1,
            sum(event.device_us for event in launch) / 1e3,
        )
        for launch in found
    ]


def _is(event: str, launch: str) -> bool:
    space, _, operation = launch.rpartition("::")
    if not space:
        return event == launch or (event.startswith("graph_") and event.endswith(f"_{launch}"))
    seen_in, _, seen = event.rpartition("::")
    # a helper of the compiler's, such as bias_addmm, runs the operation it is named after
    return seen_in == space and (seen == operation or operation.endswith(f"_{seen}"))


def _events(recorded: Sequence[FunctionEvent]) -> list[Event]:
    """The events of the thread that made the calls."""
    on_cpu = [event for event in recorded if event.device_type == DeviceType.CPU and not event.is_async]
    thread = next((event.thread for event in on_cpu if event.name == _CALL), None)
    return [
        Event(
            event.name,
            event.time_range.start,
            event.time_range.end,
            sum(kernel.duration for kernel in event.kernels),
        )
        for event in on_cpu
        if event.thread == thread
    ]


@contextmanager
def _profiler(on_device: bool) -> Iterator[profile]:
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_device else [])
    # its library writes a line to the terminal at every start and stop, unless told not to before the first
    silenced = _LOG_LEVEL not in os.environ
    if silenced:
        os.environ[_LOG_LEVEL] = "99"
    try:
        with profile(activities=activities) as profiler:
            yield profiler
    finally:
        if silenced:
            del os.environ[_LOG_LEVEL]


def _added_ms() -> tuple[float, float]:
    """What the profiler adds to the recorded time of an operation: by itself, and for each operation within it.

    From an operation that calls many small ones. Their true time is how much longer it takes than with one of them,
    without the profiler.
    """
    numbers = [torch.zeros(1) for _ in range(_CHAIN)]
    with torch.inference_mode():
        plain_us = [_median_us(lambda n=n: torch._foreach_neg_(numbers[:n])) for n in (_CHAIN, 1)]
        with _profiler(False) as profiler:
            for _ in range(_CHAINS):
                torch._foreach_neg_(numbers)
                torch._foreach_neg_(numbers[:1])
    true_us = max(plain_us[0] - plain_us[1], 0.0) / (_CHAIN - 1)
    recorded = [e for e in profiler.events() if e.device_type == DeviceType.CPU]
    inner = [e.time_range.elapsed_us() for e in recorded if e.name == "aten::neg_"]
    long_us, short_us = (
        np.median([e.time_range.elapsed_us() for e in recorded if len(e.cpu_children) == n]) for n in (_CHAIN, 1)
    )
    own_us = float(np.median(inner)) - true_us
    within_us = float(long_us - short_us) / (_CHAIN - 1) - true_us
    return max(own_us, 0.0) / 1e3, max(within_us, 0.0) / 1e3


def _median_us(call: Callable[[], Any]) -> float:
    times = []
    for _ in range(_WARM_UP + _CHAINS):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e6)
    return float(np.median(times[_WARM_UP:]))

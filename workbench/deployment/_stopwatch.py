"""Times what a torch module runs, leaf by leaf and operation by operation, and takes off what timing adds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from workbench.deployment._base import reason
from workbench.deployment._plan import plan
from workbench.deployment._timing import OpTiming, Recorder
from workbench.errors import BackendError, ProfileError, WorkbenchError
from workbench.models.operations import SHY, Handler, aside, intercept

_WARM_UP = 3
_FAILING_CALLS = 5  # of a model that does not run to its end: enough to tell what comes before
_CHAIN = 64  # calls of what does nothing, one after another
_CHAIN_REPEATS = 9


class Stopwatch(Recorder):
    """Times the leaves of a module and the operations between them.

    What is timed is the plain call, between two readings of a clock. Two things are wrong with it: the clock's own
    time is in it, and what leads up to the call in an unobserved pass is not. Both are measured together, on modules
    and operations that do nothing: as their row less what such a call takes unobserved. That is taken off each row of
    the same sort.

    Parameters
    ----------
    module
        What `call` runs once.
    call
        One call of the engine.
    name, about
        The model's name, and what is called in words, for the rows and for errors.
    device
        ``cpu``, ``cuda`` or ``cuda:1``; on a GPU its own clock is read, without waiting for it.

    Raises
    ------
    ProfileError
        If the module fails half way; its `rows` are those before.
    """

    def __init__(self, module: nn.Module, call: Callable[[], Any], name: str, about: str, device: str = "cpu"):
        self._call, self._name, self._about, self._device = call, name, about, device
        self._plan = plan(module, call, name)
        self._timer = _Timer(module, self._plan.leaves, device)
        self._blocks: list[list[list[float]]] = []
        self._steady = True
        if self._plan.error is not None:
            self.block(_FAILING_CALLS)

    def block(self, calls: int) -> list[float]:
        module_ms, operation_ms = added_ms(self._device)
        times: list[list[float]] = []
        self._blocks.append(times)
        walls, failure = [], None
        with self._timer.reading():
            for index in range(_WARM_UP + calls):
                self._timer.marks.clear()
                start = time.perf_counter()
                try:
                    self._call()
                except Exception as error:  # a stranger's code raises what it likes
                    failure = error
                wall_ms = (time.perf_counter() - start) * 1e3
                if index >= _WARM_UP:
                    walls.append(wall_ms)
                    times.append(self._read(module_ms, operation_ms))
        if isinstance(failure, WorkbenchError) and failure.__cause__ is None:
            raise failure  # the engine refuses the inputs, or is closed: the module was not called
        if failure is not None:
            raise self._failed(failure, times)
        return walls

    def rows(self, plain_ms: float, blocks: Sequence[int] | None = None) -> list[OpTiming]:
        """One row per layer and time it is called in a forward pass.

        What timing adds to each row is known without `plain_ms`.
        """
        used = self._blocks if blocks is None else [self._blocks[block] for block in blocks]
        calls = [times for block in used for times in block]
        if not self._steady or any(len(times) != len(self._plan.keys) for times in calls):
            raise BackendError(
                "The model runs other layers from call to call, so its profile has no fixed rows. Profile it with "
                "wb.OnnxRuntime(), whose graph is fixed."
            )
        return self._rows(calls)

    def _rows(self, calls: Sequence[Sequence[float]]) -> list[OpTiming]:
        """The rows that every call came to."""
        done = min(len(times) for times in calls)
        return [
            replace(row, times_ms=tuple(times[index] for times in calls))
            for index, row in self._plan.rows
            if index < done
        ]

    def _read(self, module_ms: float, operation_ms: float) -> list[float]:
        """Milliseconds of each leaf and function of the call just made, without what timing adds."""
        marks = self._timer.read()
        keys = tuple(key for key, _ in marks)
        self._steady = self._steady and keys == self._plan.keys[: len(keys)]
        return [max(0.0, ms - (module_ms if isinstance(key, str) else operation_ms)) for key, ms in marks]

    def _failed(self, error: Exception, calls: Sequence[Sequence[float]]) -> ProfileError:
        done = min(len(times) for times in calls)
        # where it failed the first time is known; later it can only be the first row that has no time
        late = (f"layer {row.name}" for index, row in self._plan.rows if index >= done)
        where = self._plan.failed or next(late, "its own forward")
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        return ProfileError(
            f"{self._name} fails in {where} on {self._about}: {reason(cause)} Give it inputs of a shape and batch size "
            "that it takes.",
            self._rows(calls) if self._steady else (),
        )


class _Clock(Protocol):
    def mark(self) -> Any:
        """A moment."""

    def between_ms(self, start: Any, stop: Any) -> float:
        """Milliseconds from one moment to another, both of which have passed."""

    def settle(self) -> None:
        """Wait until every moment marked has passed."""


class _HostClock:
    mark = staticmethod(time.perf_counter_ns)

    def between_ms(self, start: int, stop: int) -> float:
        return (stop - start) * 1e-6

    def settle(self) -> None:
        """Nothing is under way when a call on the CPU returns."""


class _DeviceClock:
    """Marks moments in the device's own queue, which does not wait for them."""

    def __init__(self, device: str):
        self._device = torch.device(device)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def between_ms(self, start: torch.cuda.Event, stop: torch.cuda.Event) -> float:
        return start.elapsed_time(stop)

    def settle(self) -> None:
        torch.cuda.synchronize(self._device)


class _Timer:
    """Puts down, while it is reading, a key and two moments for each leaf and each function called outside leaves."""

    def __init__(self, module: nn.Module, leaves: frozenset[str], device: str):
        self.marks: list[tuple[Any, Any, Any]] = []
        self.clock: _Clock = _HostClock() if device == "cpu" else _DeviceClock(device)
        self._mode = _Mode(self.marks, self.clock.mark)
        self._handlers: dict[nn.Module, Handler] = {}
        for path, inner in module.named_modules():
            if path in leaves:
                self._handlers[inner] = self._leaf(path)
            elif isinstance(inner, SHY):
                self._handlers.update(dict.fromkeys(inner.modules(), self._heard))
                self._handlers[inner] = self._unheard
        self._handlers.setdefault(module, self._heard)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Time the calls of this thread."""
        with intercept(self._handlers):
            yield

    def read(self) -> list[tuple[Any, float]]:
        """Keys and milliseconds of what was put down last."""
        self.clock.settle()
        return [(key, self.clock.between_ms(start, stop)) for key, start, stop in self.marks]

    def _heard(self, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _get_current_function_mode() is self._mode:
            return plain(*args, **kwargs)
        with self._mode:
            return plain(*args, **kwargs)

    def _unheard(self, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with aside(self._mode):
            return plain(*args, **kwargs)

    def _leaf(self, path: str) -> Handler:
        mode, mark, put_down = self._mode, self.clock.mark, self.marks.append

        def call(plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            # functions inside a leaf are not timed, and run as if nobody watched
            listening = _get_current_function_mode() is mode
            if listening:
                mode.__exit__(None, None, None)
            try:
                start = mark()
                output = plain(*args, **kwargs)
                stop = mark()
            finally:
                if listening:
                    mode.__enter__()
            put_down((path, start, stop))
            return output

        return call


class _Mode(TorchFunctionMode):
    def __init__(self, marks: list[tuple[Any, Any, Any]], mark: Callable[[], Any]):
        super().__init__()
        self._put_down, self._mark = marks.append, mark

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        mark = self._mark
        if kwargs:
            start = mark()
            output = func(*args, **kwargs)
            stop = mark()
        else:
            start = mark()
            output = func(*args)
            stop = mark()
        self._put_down((func, start, stop))
        return output


class _Nothing(nn.Module):
    """Calls an operation that gives back what it is given."""

    def __init__(self, times: int):
        super().__init__()
        self.times = range(times)

    def forward(self, x: Tensor) -> Tensor:
        for _ in self.times:
            x = x.contiguous()
        return x


def added_ms(device: str) -> tuple[float, float]:
    """Milliseconds that timing adds to the row of a module and to that of an operation; negative where it hides some.

    The row of one that does nothing, less what a call of it takes unobserved.
    """
    x = torch.zeros(1, device=device)
    identities = nn.Sequential(*(nn.Identity() for _ in range(_CHAIN)))
    modules = _added_ms(identities, nn.Sequential(), frozenset(map(str, range(_CHAIN))), x)
    return modules, _added_ms(_Nothing(_CHAIN), _Nothing(0), frozenset(), x)


def _added_ms(chain: nn.Module, empty: nn.Module, leaves: frozenset[str], x: Tensor) -> float:
    timer = _Timer(chain, leaves, x.device.type if x.device.index is None else str(x.device))
    rows, plain, without = [], [], []
    with torch.inference_mode():
        for _ in range(_CHAIN_REPEATS):
            timer.marks.clear()
            with timer.reading():
                chain(x)
            rows.append(np.median([ms for _, ms in timer.read()]))
            plain.append(_taken_ms(timer.clock, chain, x))
            without.append(_taken_ms(timer.clock, empty, x))
    return float(np.median(rows) - (np.median(plain) - np.median(without)) / _CHAIN)


def _taken_ms(clock: _Clock, module: nn.Module, x: Tensor) -> float:
    start = clock.mark()
    module(x)
    stop = clock.mark()
    clock.settle()
    return clock.between_ms(start, stop)

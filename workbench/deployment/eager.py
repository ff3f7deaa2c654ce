"""`Eager`: the torch module itself, operation by operation."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from workbench.deployment._timing import OpTiming, Recorder
from workbench.deployment._torch import TorchBackend, TorchEngine
from workbench.errors import BackendError

_WARM_UP = 3


@dataclass(frozen=True)
class Eager(TorchBackend):
    """PyTorch as it is: what every other backend is compared with.

    Parameters
    ----------
    device
        ``cpu``, ``cuda`` or ``cuda:1``; inputs and outputs are numpy arrays either way.
    threads
        None for all physical cores. Torch has one thread count for the whole process: the engine sets it when it
        runs, and the last engine to close restores it.
    """

    title: ClassVar[str] = "PyTorch eager"

    device: str = "cpu"
    threads: int | None = None

    @property
    def _engine(self) -> type[EagerEngine]:
        return EagerEngine


class EagerEngine(TorchEngine):
    """The module, called."""

    def recorder(self, inputs: Sequence[np.ndarray]) -> Recorder:
        return _Stopwatch(self, tuple(inputs))


class _Stopwatch(Recorder):
    """Times the modules that call no other module, by hooks; functional operations between them are not seen.

    Most are leaves. One that computes with its children's weights itself, such as attention, counts as one row.
    """

    def __init__(self, engine: EagerEngine, inputs: tuple[np.ndarray, ...]):
        self._module, self._device = engine._module, engine._device
        self._call = lambda: engine(*inputs)
        self._inner = self._callees(self._call)
        self._started: list[float] = []
        self._calls: list[list[tuple[str, float]]] = []

    def block(self, calls: int) -> list[float]:
        hooks, walls = [], []
        try:
            for path, module in self._inner.items():
                hooks.append(module.register_forward_pre_hook(self._start))
                hooks.append(module.register_forward_hook(self._stop(path)))
            before = len(self._calls)
            for index in range(_WARM_UP + calls):
                if index == _WARM_UP:
                    del self._calls[before:]
                self._calls.append([])
                start = time.perf_counter()
                self._call()
                walls.append((time.perf_counter() - start) * 1e3)
        finally:
            for hook in hooks:
                hook.remove()
        return walls[_WARM_UP:]

    def rows(self, plain_ms: float, blocks: Sequence[int] | None = None) -> list[OpTiming]:
        """One row per module and time it is called in a forward pass."""
        paths = [tuple(path for path, _ in call) for call in self._calls]
        if len(set(paths)) != 1:
            raise BackendError(
                "The model runs other layers from call to call, so its profile has no fixed rows. Profile it with "
                "wb.OnnxRuntime(), whose graph is fixed."
            )
        rows, seen = [], {}
        modules = dict(self._module.named_modules())
        for index, path in enumerate(paths[0]):
            seen[path] = seen.get(path, 0) + 1
            name = path if seen[path] == 1 else f"{path} (call {seen[path]})"
            times = tuple(call[index][1] for call in self._calls)
            rows.append(OpTiming(name or "(model)", type(modules[path]).__name__, (path,) if path else (), times))
        return rows

    def _callees(self, call: Callable[[], Any]) -> dict[str, nn.Module]:
        """The modules that run without calling another, by path."""
        inner: dict[str, nn.Module] = {}
        stack: list[list[Any]] = []

        def enter(*_: Any) -> None:
            if stack:
                stack[-1][0] = True
            stack.append([False])

        def leave(path: str) -> Callable[..., None]:
            def hook(module: nn.Module, *_: Any) -> None:
                if not stack.pop()[0]:
                    inner[path] = module

            return hook

        hooks = []
        try:
            for path, module in self._module.named_modules():
                hooks.append(module.register_forward_pre_hook(enter))
                hooks.append(module.register_forward_hook(leave(path)))
            call()
        finally:
            for hook in hooks:
                hook.remove()
        return inner

    def _clock_ms(self) -> float:
        if self._device != "cpu":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() * 1e3

    def _start(self, *_: Any) -> None:
        self._started.append(self._clock_ms())

    def _stop(self, path: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            stopped = self._clock_ms()
            self._calls[-1].append((path, stopped - self._started.pop()))

        return hook

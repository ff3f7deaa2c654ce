"""`Compiled`: the torch module through ``torch.compile`` and its C++ or Triton back end."""

from __future__ import annotations

import functools
import shutil
import sys
import sysconfig
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler

from workbench.deployment import _torch
from workbench.deployment._base import Availability, Backend, Engine, OpTiming
from workbench.deployment._onnx import example_arrays, output_specs
from workbench.deployment.package import Contents
from workbench.errors import BackendError
from workbench.jobs import SILENT, Progress
from workbench.models.model import Model

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclass(frozen=True)
class Compiled(Backend):
    """``torch.compile``: one program per input shape, compiled when a batch size is first seen.

    The whole module becomes one graph, or it is refused: what torch.compile leaves to the interpreter without a word
    would be measured as if it were compiled.

    Parameters
    ----------
    mode
        ``default``, ``reduce-overhead``, ``max-autotune`` or ``max-autotune-no-cudagraphs``, as torch has them.
    threads
        None for all physical cores; see `Eager`.
    device
        ``cpu``, ``cuda`` or ``cuda:1``.
    """

    title: ClassVar[str] = "torch.compile"

    mode: str = "default"
    threads: int | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        self._check_choice("mode", MODES)
        _torch.check_device(self)
        self._check_threads()

    @classmethod
    def variants(cls) -> tuple[Backend, ...]:
        return (cls(), cls(device="cuda"))

    def _settings(self) -> tuple[str, ...]:
        mode = () if self.mode == "default" else (self.mode,)
        return (*mode, *(() if self.device == "cpu" else (self.device,)))

    def availability(self) -> Availability:
        found = _torch.device_availability(self.device)
        return _compiler() if found.usable else found

    def check(self, model: Model) -> None:
        _torch.check_module(self, model)

    def compile(self, model: Model, progress: Progress = SILENT) -> Engine:
        self.require()
        self.check(model)
        engine = self._engine(model.name, model.precision, model.inputs, (), model.module, model.keywords)
        arrays = tuple(x[:1] for x in example_arrays(model))
        progress(0.1, "compiling for a batch of one")
        outputs = _torch.flattened(engine.raw(arrays))
        names, tensors = zip(*outputs, strict=True)
        engine.outputs = output_specs(names, [_torch.array(t) for t in tensors], 1)
        progress(1.0, "compiled")
        return engine

    def open(self, contents: Contents) -> Engine:
        self.require()
        module, keywords = _torch.opened_module(contents)
        engine = self._engine(contents.name, contents.precision, contents.inputs, contents.outputs, module, keywords)
        engine.about = contents.about
        return engine

    def _engine(self, name: str, precision: str, inputs: Any, outputs: Any, module: nn.Module, keywords: bool) -> Engine:
        return CompiledEngine(
            self, name, precision, inputs, outputs, _torch.provider(self.device), self.thread_count,
            module=_torch.on_device(module, self.device), keywords=keywords,
        )  # fmt: skip


class CompiledEngine(_torch.TorchEngine):
    """A compiled program for each shape of the inputs seen so far."""

    def _callable(self) -> Callable[..., Any]:
        plain = super()._callable()
        programs: dict[tuple[torch.Size, ...], Callable[..., Any]] = {}
        name, mode = self.name, self.backend.mode

        def call(*tensors: Tensor) -> Any:
            shapes = tuple(t.shape for t in tensors)
            program = programs.get(shapes)
            if program is None:
                program = torch.compile(_own_code(plain), fullgraph=True, dynamic=False, mode=mode)
                try:
                    result = program(*tensors)
                except RuntimeError as error:
                    raise _refusal(name, error) from error
                programs[shapes] = program
                return result
            return program(*tensors)

        return call

    def profile(self, inputs: Sequence[np.ndarray], repeats: int = 50) -> list[OpTiming]:
        raise BackendError("Per-layer profiles of compiled models are not available; profile with wb.Eager().")


def _own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls `function` and shares its code object with no other.

    Torch counts compiled versions per code object and, past eight, goes on interpreting without an error: the ninth
    candidate of one architecture would be timed uncompiled. With a code object of its own each program is the first.
    """

    def call(*tensors: Tensor) -> Any:
        return function(*tensors)

    own = types.FunctionType(call.__code__.replace(), call.__globals__, "call", None, call.__closure__)
    return functools.wraps(call)(own)


def _refusal(name: str, error: RuntimeError) -> BackendError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = lines[0] if lines else type(error).__name__
    where = [line for line in lines if line.startswith("File ") and "site-packages/torch/" not in line and ", in call" not in line]
    return BackendError(
        f"torch.compile cannot make one program of {name}: {reason}"
        + (f" ({where[-1]})" if where else "")
        + " wb.Eager() runs it as it is."
    )


def _compiler() -> Availability:
    """Whether the C++ compiler that torch.compile calls is there, with Python's headers, which its programs include."""
    try:
        compiler = get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError):
        return Availability(False, "torch.compile needs a C++ compiler and finds none", _install("g++"))
    if shutil.which(compiler) is None:
        return Availability(False, f"torch.compile needs a C++ compiler, but {compiler} is not there", _install("g++"))
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        return Availability(False, "torch.compile needs Python's C headers (Python.h)", _install("python3-dev"))
    return Availability(True)


def _install(package: str) -> str:
    if sys.platform == "darwin":
        return "xcode-select --install"
    if sys.platform == "win32":
        return "winget install Microsoft.VisualStudio.2022.BuildTools"
    return f"sudo apt-get install {package}"

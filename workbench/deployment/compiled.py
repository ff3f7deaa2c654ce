"""`Compiled`: the torch module through ``torch.compile`` and its C++ or Triton back end."""

from __future__ import annotations

import copy
import functools
import io
import os
import shutil
import subprocess
import sys
import sysconfig
import types
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from workbench.deployment._base import Availability
from workbench.deployment._fx_layers import Modules
from workbench.deployment._inductor import Listener
from workbench.deployment._kernel_profile import KernelRecorder
from workbench.deployment._timing import Recorder
from workbench.deployment._torch import TorchBackend, TorchEngine
from workbench.errors import BackendError

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclass(frozen=True)
class Compiled(TorchBackend):
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
        super().__post_init__()
        self._check_choice("mode", MODES)

    def _settings(self) -> tuple[str, ...]:
        return (*(() if self.mode == "default" else (self.mode,)), *super()._settings())

    def availability(self) -> Availability:
        found = super().availability()
        return _compiler() if found.usable else found

    @property
    def _engine(self) -> type[CompiledEngine]:
        return CompiledEngine


class CompiledEngine(TorchEngine):
    """A compiled program for each shape of the inputs seen so far."""

    def start(self, example: tuple[np.ndarray, ...]) -> None:
        # a batch of one is what is asked for most, and each size is a program of its own
        super().start(tuple(x[:1] for x in example))

    def _callable(self) -> Callable[..., Any]:
        settings = {"mode": self.backend.mode}
        return self._programs(lambda _: settings)

    def _programs(self, settings: Callable[[Sequence[Tensor]], dict[str, Any]]) -> Callable[..., Any]:
        """What compiles a program for each shape of the inputs; `settings` are those of ``torch.compile`` for them."""
        plain = self._by_position()
        programs: dict[tuple[torch.Size, ...], Callable[..., Any]] = {}
        name = self.name

        def call(*tensors: Tensor) -> Any:
            shapes = tuple(t.shape for t in tensors)
            program = programs.get(shapes)
            if program is not None:
                return program(*tensors)
            how = settings(tensors)
            try:
                programs[shapes], result = _compiled(plain, how, tensors)
            except RuntimeError as error:
                try:
                    programs[shapes], result = _compiled(_exported(plain, tensors), how, tensors)
                except Exception:  # what the exporter says of a stranger's module is no clearer than the first error
                    raise _refusal(name, error) from error
            return result

        return call

    def recorder(self, inputs: Sequence[np.ndarray]) -> Recorder:
        """A program of its own for these inputs, of the same kernels, that torch's profiler can tell apart."""
        listener = Listener(self.backend.mode)

        def settings(tensors: Sequence[Tensor]) -> dict[str, Any]:
            listener.modules = Modules(self._module, self._by_position(), tensors)
            return {"backend": listener}

        recorded = copy.copy(self)
        recorded._call = self._programs(settings)
        try:
            recorded(*inputs)
            launches = listener.launches()
        finally:
            listener.forget()
        return KernelRecorder(lambda: recorded(*inputs), launches, self._device != "cpu")


def _compiled(module: nn.Module, settings: dict[str, Any], tensors: Sequence[Tensor]) -> tuple[Callable[..., Any], Any]:
    """A program for inputs like these, and what it gives for them."""
    program = torch.compile(_own_code(module), fullgraph=True, dynamic=False, **settings)
    return program, program(*tensors)


def _exported(module: nn.Module, tensors: Sequence[Tensor]) -> nn.Module:
    """The operations a module runs on inputs like these, without the Python between them that nothing depends on."""
    with redirect_stderr(io.StringIO()):  # a failed export prints the graph it has so far
        return torch.export.export(module, tuple(tensors)).module()


def _own_code(module: nn.Module) -> Callable[..., Any]:
    """A function that calls `module` and shares its code object with no other.

    Torch counts compiled versions per code object and, past eight, goes on interpreting without an error: the ninth
    candidate of one architecture would be timed uncompiled. With a code object of its own each program is the first.
    """

    # a trace names modules and inputs after these two variables, which recorders look for
    def call(*tensors: Tensor) -> Any:
        return module(*tensors)

    own = types.FunctionType(call.__code__.replace(), call.__globals__, "call", None, call.__closure__)
    return functools.wraps(call)(own)


def _refusal(name: str, error: RuntimeError) -> BackendError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = lines[0] if lines else type(error).__name__
    frames = [line for line in lines if line.startswith("File ") and ", in call" not in line]
    where = [line for line in frames if "site-packages/torch/" not in line]
    return BackendError(
        f"torch.compile cannot make one program of {name}: {reason}"
        + (f" ({where[-1]})" if where else "")
        + " wb.Eager() runs it as it is."
    )


@functools.cache
def _compiler() -> Availability:
    """Whether the C++ compiler that torch.compile calls works and finds Python's headers, by compiling two lines."""
    if sys.platform == "win32":
        found = shutil.which(os.environ.get("CXX", "cl"))
        return Availability(True) if found else _lacking("finds no C++ compiler", "")
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        return _lacking(f"needs a C++ compiler, and {compiler} is not installed", "g++")
    program = "#include <Python.h>\n#include <cmath>\n"
    command = [compiler, "-fsyntax-only", f"-I{sysconfig.get_paths()['include']}", "-x", "c++", "-"]
    run = subprocess.run(command, input=program, capture_output=True, text=True, check=False)
    if run.returncode == 0:
        return Availability(True)
    if "Python.h" in run.stderr:
        return _lacking("needs Python's C headers, and Python.h is not installed", "python3-dev")
    reason = (run.stderr.strip().splitlines() or [f"exit status {run.returncode}"])[-1]
    return _lacking(f"needs a working C++ compiler, but {compiler} fails: {reason}", "g++")


def _lacking(why: str, package: str) -> Availability:
    commands = {"darwin": "xcode-select --install", "win32": "winget install Microsoft.VisualStudio.2022.BuildTools"}
    return Availability(False, f"torch.compile {why}", commands.get(sys.platform, f"sudo apt-get install {package}"))

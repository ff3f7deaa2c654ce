"""`Ceilings`: the most an engine reaches on this machine, in bytes moved and in operations, measured."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from workbench import formatting
from workbench.deployment import Backend, Compiled, Eager, Engine, OnnxRuntime, OpenVINO
from workbench.errors import DataError
from workbench.jobs import SILENT, Progress
from workbench.measure import OtherProcesses, block, quiesce
from workbench.profiling import _kernels

_BLOCKS = 3  # of calls of each kernel, the fastest of which counts
_HALF = ("fp16", "bf16")
_MEASURED: dict[Backend, Ceilings] = {}


@dataclass(frozen=True)
class Ceilings:
    """What no layer on an engine can exceed for long; made by `ceilings`, or by hand from a data sheet.

    Attributes
    ----------
    bandwidth_gb_s
        10^9 bytes per second between processor and memory.
    arithmetic_gop_s
        10^9 operations per second, two per multiply-accumulate, by precision (``fp32``, ``fp16``, ``bf16``, ``int8``).
        A precision the engine does not compute in is absent.
    backend_label, threads
        What they were measured on; None where no number of threads applies.
    contended
        Whether something else was using the machine meanwhile, so that they may be too low.

    Raises
    ------
    DataError
        If a figure is not a positive finite number.
    """

    bandwidth_gb_s: float
    arithmetic_gop_s: dict[str, float]
    backend_label: str = "as given"
    threads: int | None = None
    contended: bool = False

    def __post_init__(self) -> None:
        figures = {"bandwidth_gb_s": self.bandwidth_gb_s}
        figures |= {f"arithmetic_gop_s[{name!r}]": value for name, value in self.arithmetic_gop_s.items()}
        for name, value in figures.items():
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
                raise DataError(f"{name} is {value!r}; give a positive number of 10^9 per second.")

    def ridge(self, precision: str) -> float:
        """Operations per byte from which arithmetic is the limit and no longer memory; NaN for an absent precision."""
        return self.arithmetic_gop_s.get(precision, math.nan) / self.bandwidth_gb_s

    def __repr__(self) -> str:
        peaks = ", ".join(f"{k} {formatting.significant(v)} GOP/s" for k, v in self.arithmetic_gop_s.items())
        busy = "; measured while the machine was busy" if self.contended else ""
        return f"<Ceilings {self.backend_label}: {formatting.significant(self.bandwidth_gb_s)} GB/s; {peaks}{busy}>"


def ceilings(backend: Backend, *, progress: Progress = SILENT) -> Ceilings:
    """The most `backend` reaches here: memory bandwidth, and arithmetic in each precision it computes in.

    Each is the best median over blocks of calls of a few short kernels, which run through the very library that runs
    the model's layers, with the backend's threads: large square matrix products and 3 × 3 convolutions of many channels
    for arithmetic; for memory, one row times a matrix far larger than the last cache and, in torch, a sum over all of
    it in place. torch.compile leaves products and convolutions to the library that eager calls, so its ceilings are
    eager's. Measured once per process and settings; again where the machine was busy.

    Raises
    ------
    BackendUnavailable
        If the backend's library is missing here.
    BackendError
        If the backend does not run the kernels.
    """
    if isinstance(backend, Compiled):
        eager = Eager(device=backend.device, threads=backend.threads)
        return replace(ceilings(eager, progress=progress), backend_label=backend.label)
    key = replace(backend, threads=backend.thread_count)
    if key in _MEASURED:
        return _MEASURED[key]
    found = _measure(key, progress)
    if not found.contended:
        _MEASURED[key] = found
    return found


def _measure(backend: Backend, progress: Progress) -> Ceilings:
    backend.require()
    size, as_graph = _kernels.size(_accelerated(backend)), not isinstance(backend, Eager)
    precisions = _precisions(backend)
    others = OtherProcesses()
    progress(0.0, "memory bandwidth")
    bandwidth = max(_rate(backend, kernel) for kernel in _kernels.moving(size, as_graph))
    arithmetic = {}
    for done, precision in enumerate(precisions, start=1):
        progress(done / (1 + len(precisions)), f"{precision} arithmetic")
        # OpenVINO computes a float32 graph in bf16 where it is set to
        source = "fp32" if as_graph and precision in _HALF else precision
        arithmetic[precision] = max(_rate(backend, kernel) for kernel in _kernels.computing(size, source, as_graph))
    return Ceilings(bandwidth, arithmetic, backend.label, backend.threads, others.busy())


def _precisions(backend: Backend) -> tuple[str, ...]:
    """What an engine's arithmetic is in, for graphs or modules that ask for it."""
    if isinstance(backend, Eager):
        return ("fp32", "bf16") if backend.device == "cpu" else ("fp32", "fp16", "bf16")
    if isinstance(backend, OpenVINO):
        return (backend.precision, "int8")
    if isinstance(backend, OnnxRuntime):
        # below that level, and on its other providers, Q/DQ nodes stay, and what lies between them is float32
        fuses = backend.provider == "cpu" and backend.graph_level in ("extended", "all")
        return ("fp32", "int8") if fuses else ("fp32",)
    return ("fp32",)


def _accelerated(backend: Backend) -> bool:
    return getattr(backend, "provider", getattr(backend, "device", "cpu")).lower() != "cpu"


def _rate(backend: Backend, kernel: _kernels.Kernel) -> float:
    """10^9 operations or bytes per second of one kernel."""
    x = np.zeros((1, 1), np.float32)
    with backend.compile(kernel.model) as engine:
        quiesce()
        median_ms = min(float(np.median(block(lambda: engine(x)))) for _ in range(_BLOCKS))
        moved = kernel.numbers * _bytes_per_number(engine)
    return (kernel.operations or moved) / median_ms / 1e6


def _bytes_per_number(engine: Engine) -> int:
    return 2 if engine.precision in _HALF else 4

"""What an engine tells of its operations: `OpTiming`, and the `Recorder` that collects them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

_BITS = {"bool": 8, "int4": 4, "uint4": 4, "float16": 16, "bfloat16": 16, "float32": 32, "float64": 64} | {
    f"{sign}int{bits}": bits for sign in ("", "u") for bits in (8, 16, 32, 64)
}

Kind = Literal["layer", "move", "call", "unknown"]


@dataclass(frozen=True)
class Port:
    """A tensor that an operation reads or writes.

    Attributes
    ----------
    name
        The same for everything that reads or writes this tensor: it is what ties operations into a graph.
    shape
        Batch axis included; None for a length that is not known.
    dtype
        numpy's name, ``bfloat16`` and ``int4`` besides; empty where unknown.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: str

    @property
    def nbytes(self) -> float:
        """Bytes of its numbers; NaN where shape or dtype is not known."""
        if None in self.shape or self.dtype not in _BITS:
            return math.nan
        return math.prod(self.shape) * _BITS[self.dtype] / 8


@dataclass(frozen=True)
class OpTiming:
    """What one operation of an engine cost, call by call.

    Attributes
    ----------
    name
        The engine's own name of the kernel or module.
    type
        Its operation: ``Conv``, ``QLinearConv``, ``Linear``.
    layers
        The model's layers it belongs to, those it absorbed by fusion included; empty where unknown.
    times_ms
        One entry per profiled call of the engine; where the engine reports averages only (OpenVINO), one entry per
        group of calls. All rows of a profile have the same number of entries. What the profiler itself adds is
        already taken off.
    kind
        ``layer`` computes something of the model; ``move`` changes how numbers lie or are written (reformat, quantise);
        ``call`` is what entering and leaving the engine takes; ``unknown`` could not be read.
    reads, writes
        Activations; weights are not among them. Empty where the engine does not tell.
    weight_bytes
        Bytes of weights it reads; None where the engine does not tell.
    precision
        Of its arithmetic: ``fp32``, ``fp16``, ``bf16``, ``int8``; empty where unknown.
    macs, parameters, kernel
        Multiply-accumulates of the call, number of weights, and spatial size of a convolution's kernel, where the
        engine tells more than the layers do; None and () otherwise.
    """

    name: str
    type: str
    layers: tuple[str, ...]
    times_ms: tuple[float, ...]
    kind: Kind = "layer"
    reads: tuple[Port, ...] = ()
    writes: tuple[Port, ...] = ()
    weight_bytes: int | None = None
    precision: str = ""
    macs: float | None = None
    parameters: int | None = None
    kernel: tuple[int, ...] = ()


class Recorder(ABC):
    """Calls an engine with its profiler on, in blocks of calls, and says what each operation took.

    Attributes
    ----------
    blocks
        How many blocks give rows worth having; the calls are spread over them.
    apart
        Whether what is recorded is a session of its own, whose threads may settle otherwise than those of the engine.
    """

    blocks: ClassVar[int] = 2
    apart: ClassVar[bool] = False

    def parts(self, calls: int) -> list[int]:
        """`calls` in at most `blocks` parts of nearly equal size."""
        blocks = min(self.blocks, calls)
        return [calls // blocks + (i < calls % blocks) for i in range(blocks)]

    @abstractmethod
    def block(self, calls: int) -> list[float]:
        """Make that many recorded calls, after a few that are not; milliseconds of each as the caller sees it."""

    @abstractmethod
    def rows(self, plain_ms: float, blocks: Sequence[int] | None = None) -> list[OpTiming]:
        """The operations in execution order, without what recording added to them.

        Parameters
        ----------
        plain_ms
            What the same call takes when nothing is recorded.
        blocks
            Numbers of the blocks to use, the first being 0; None for all.

        Raises
        ------
        BackendError
            If the calls executed different operations, so that there are no fixed rows.
        """

    def close(self) -> None:
        """Release what recording holds."""

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

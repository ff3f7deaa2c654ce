"""OpenVINO's performance counters, read back: which operation took how long."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from workbench.deployment._rows import Kernel, Lineage
from workbench.deployment._timing import Kind, OpTiming, Port, Recorder
from workbench.errors import BackendError

_DATA = ("Const", "Constant", "Input", "Parameter", "Output", "Result")
_MOVES = ("Reorder", "Convert", "FakeQuantize", "Transpose")
_WARM_UP = 3
_EVERY = 2  # calls between two readings of the counters, which takes as long as some operations
_DTYPES = {
    "f32": "float32",
    "f16": "float16",
    "bf16": "bfloat16",
    "i8": "int8",
    "u8": "uint8",
    "f64": "float64",
    "i32": "int32",
    "i64": "int64",
    "boolean": "bool",
    "i4": "int4",
    "u4": "uint4",
}
_PRECISIONS = {"FP32": "fp32", "F32": "fp32", "BF16": "bf16", "FP16": "fp16", "F16": "fp16", "I8": "int8", "U8": "int8"}


@dataclass(frozen=True)
class _Operation:
    """One operation of the runtime model: what it came from, and what it reads and writes."""

    name: str
    type: str
    sources: tuple[str, ...]
    precision: str
    reads: tuple[Port, ...]
    writes: tuple[Port, ...]
    weight_bytes: int
    kernel: tuple[int, ...]


class OpenVINORecorder(Recorder):
    """Compiled models with the counters on, one for each block.

    A counter is the mean over all calls of a compiled model, and cannot be reset. It is in whole microseconds, rounded
    down twice: each call, and the mean. So each block of calls gets a compiled model of its own, its counters are read
    every few calls, and an operation's time is the slope of its total over the number of calls.
    """

    blocks: ClassVar[int] = 5

    def __init__(self, compiled: Callable[[], Any], feeds: dict[int, np.ndarray], lineage: Lineage):
        self._compiled, self._feeds, self._lineage = compiled, feeds, lineage
        self._operations: list[_Operation] = []
        self._means_ms: list[tuple[tuple[str, float], ...]] = []

    def block(self, calls: int) -> list[float]:
        compiled = self._compiled()
        request = compiled.create_infer_request()
        walls, readings = [], []
        for made in range(1, _WARM_UP + calls + 1):
            start = time.perf_counter()
            request.infer(self._feeds, share_inputs=True)
            walls.append((time.perf_counter() - start) * 1e3)
            if made >= _WARM_UP and (made - _WARM_UP) % _EVERY == 0:
                readings.append((made, request.get_profiling_info()))
        readings.append((_WARM_UP + calls, request.get_profiling_info()))
        known = {op.get_friendly_name(): op for op in compiled.get_runtime_model().get_ordered_ops()}
        operations, means, seen = [], [], set()
        for index, info in enumerate(readings[-1][1]):
            # the runtime model holds what is executed; the counters list what was fused away or is constant as well
            if info.node_name in known and info.node_type not in _DATA and info.node_name not in seen:
                seen.add(info.node_name)
                operations.append(_described(known[info.node_name], info.node_type, info.exec_type))
                counted = [(made, infos[index].real_time.total_seconds() * 1e3) for made, infos in readings]
                means.append((info.node_type, _slope_ms(counted) if _runs(info) else 0.0))
        self._operations = self._operations or operations
        self._means_ms.append(tuple(means))
        return walls[_WARM_UP:]

    def rows(self, plain_ms: float, blocks: Sequence[int] | None = None) -> list[OpTiming]:
        used = [self._means_ms[i] for i in (range(len(self._means_ms)) if blocks is None else blocks)]
        # names that OpenVINO makes up differ from one compiled model to the next; the order does not
        if len({tuple(kind for kind, _ in block) for block in used}) != 1:
            raise BackendError(
                "OpenVINO compiled this model differently each time, so its profile has no fixed rows. Profile it with "
                "wb.OnnxRuntime()."
            )
        layers = self._lineage.layers([Kernel(op.type, op.sources) for op in self._operations])
        rows = []
        for index, op in enumerate(self._operations):
            times = tuple(block[index][1] for block in used)
            # what has no implementation of its own, such as a reshape, never runs and would be a row of nothing
            if max(times) > 0:
                kind: Kind = "move" if op.type in _MOVES else "layer"
                rows.append(
                    OpTiming(
                        op.name, op.type, layers[index], times, kind,
                        op.reads, op.writes, op.weight_bytes,
                        "" if kind == "move" else op.precision, kernel=op.kernel,
                    )
                )  # fmt: skip
        return rows


def _described(op: Any, kind: str, execution: str) -> _Operation:
    """What the runtime model says of an operation; `execution` ends in its arithmetic: ``brgconv_avx512_1x1_I8``."""
    reads, weights = [], 0
    for value in op.inputs():
        source = value.get_source_output()
        port = _port(source)
        if source.get_node().get_type_name() == "Constant" or _text(source.get_node(), "layerType") == "Const":
            weights += 0 if math.isnan(port.nbytes) else int(port.nbytes)
        else:
            reads.append(port)
    return _Operation(
        name=op.get_friendly_name(),
        type=kind,
        sources=tuple(filter(None, _text(op, "originalLayersNames").split(","))),
        precision=_PRECISIONS.get(execution.rpartition("_")[2].upper(), ""),
        reads=tuple(reads),
        writes=tuple(_port(value) for value in op.outputs()),
        weight_bytes=weights,
        kernel=(),
    )


def _port(output: Any) -> Port:
    shape = tuple(d.get_length() if d.is_static else None for d in output.get_partial_shape())
    name = f"{output.get_node().get_friendly_name()}:{output.get_index()}"
    dtype = output.get_element_type().get_type_name()
    return Port(name, shape, _DTYPES.get(dtype, dtype))


def _slope_ms(counted: list[tuple[int, float]]) -> float:
    """Milliseconds of a call, from pairs of the number of calls so far and their mean as OpenVINO gives it.

    A total is known to within what rounding its mean took away, which grows with the number of calls; so the line
    through the totals weighs each by the inverse square of that number. What rounding took from each call, half a
    microsecond on average, is added.
    """
    calls = np.array([made for made, _ in counted], dtype=float)
    means = np.array([mean for _, mean in counted])
    half = 0.5e-3
    if not means.any():
        return half
    totals = calls * (means + half)
    centred = calls - np.average(calls, weights=calls**-2)
    spread = float(np.sum(centred**2 / calls**2))
    slope = float(np.sum(centred * totals / calls**2)) / spread if spread else float(means[-1] + half)
    return max(slope, 0.0) + half


def _runs(info: Any) -> bool:
    """Whether an operation is executed: one of under a microsecond is reported as not run, yet is implemented."""
    return info.status == info.Status.EXECUTED or not info.exec_type.startswith(("undef", "unknown"))


def _text(op: Any, key: str) -> str:
    info = op.get_rt_info()
    if key not in info:
        return ""
    value = info[key]
    return value.astype(str) if hasattr(value, "astype") else str(value)

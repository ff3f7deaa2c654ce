"""ONNX Runtime's own profiler, read back: which kernel took how long in which run."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from workbench.deployment._rows import Kernel, Lineage
from workbench.deployment._timing import Kind, OpTiming, Port, Recorder
from workbench.errors import BackendError

_WARM_UP = 5
_SUFFIX = "_kernel_time"
_CHAIN = 48  # kernels of the graphs that the profiler's own cost is measured on
_CALLS = 15
_ROUNDS = 3
_FEW, _MANY = 1, 10  # inputs of each of those kernels

Session = Callable[..., Any]  # makes a session of a graph's bytes and further session options

# operations that compute nothing of the model: they change how numbers lie or are written
_MOVES = {
    *("ReorderInput", "ReorderOutput", "Transpose", "Cast", "Identity"),
    *("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MemcpyToHost", "MemcpyFromHost"),
}
_PRECISIONS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "int8": "int8", "uint8": "int8"}
_DTYPES = {"float": "float32", "double": "float64", "half": "float16"}


class OrtRecorder(Recorder):
    """A second session with the profiler on.

    The profiler writes down the shapes of a kernel's inputs and the state of the threads before it stops the kernel's
    clock. That adds some microseconds to each, and can double a small network. How much of what it adds falls within a
    kernel's clock, and how that grows with the kernel's inputs, is measured on kernels that do next to nothing; how
    much it adds to this network in all, on the network.
    """

    apart = True

    def __init__(self, session: Session, data: bytes, feeds: dict[str, np.ndarray]):
        self._make, self._data, self._feeds = session, data, feeds
        self._log = _Log(session, data)
        self._counted: list[range] = []  # of each block the runs that count, by their number
        self._walls: list[list[float]] = []
        self._read: tuple[list[list[dict[str, Any]]], onnx.ModelProto] | None = None

    def block(self, calls: int) -> list[float]:
        walls = []
        for _ in range(_WARM_UP + calls):
            start = time.perf_counter()
            self._log.session.run(None, self._feeds)
            walls.append((time.perf_counter() - start) * 1e3)
        first = (self._counted[-1].stop if self._counted else 0) + _WARM_UP
        self._counted.append(range(first, first + calls))
        self._walls.append(walls[_WARM_UP:])
        return walls[_WARM_UP:]

    def rows(self, plain_ms: float, blocks: Sequence[int] | None = None) -> list[OpTiming]:
        if self._read is None:
            self._read = self._log.read()
        made, optimised = self._read
        used = range(len(self._counted)) if blocks is None else blocks
        wanted = [i for block in used for i in self._counted[block]]
        runs = [made[i] for i in wanted if i < len(made)]
        if len(runs) < len(wanted) or len({tuple(e["name"] for e in run) for run in runs}) != 1 or not runs[0]:
            raise BackendError(
                "ONNX Runtime's profile cannot be laid out as rows: the runs executed different kernels, or too many "
                "for its buffer of a million events. Profile with fewer repeats, or with wb.Eager()."
            )
        profiled_ms = float(np.median([wall for block in used for wall in self._walls[block]]))
        extras_ms = _extras_ms(self._make, runs[0], profiled_ms - plain_ms)
        nodes = {node.name: node for node in optimised.graph.node}
        weights = {t.name: _stored_bytes(t) for t in optimised.graph.initializer}
        kernels = []
        for event in runs[0]:
            name = event["name"].removesuffix(_SUFFIX)
            node = nodes.get(name)
            tensors = ((), ()) if node is None else (tuple(node.input), tuple(node.output))
            kernels.append(Kernel(event["args"]["op_name"], (name,), *tensors))
        layers = Lineage.of(onnx.load_model_from_string(self._data)).layers(kernels)
        rows = []
        known = {name: Port(name, x.shape, str(x.dtype)) for name, x in self._feeds.items()}
        for index, kernel in enumerate(kernels):
            args = runs[0][index]["args"]
            recorded = _within_microsecond([run[index]["dur"] for run in runs])
            times = tuple(np.maximum(recorded / 1e3 - extras_ms[index], 0.0).tolist())
            rows.append(
                OpTiming(
                    kernel.sources[0], kernel.type, layers[index], times,
                    **_about(kernel, args, nodes.get(kernel.sources[0]), weights, known),
                )
            )  # fmt: skip
        return rows

    def close(self) -> None:
        self._log.close()


class _Log:
    """A session that writes down what it does, and that log."""

    def __init__(self, session: Session, data: bytes):
        self._folder = tempfile.TemporaryDirectory()
        self._graph = Path(self._folder.name) / "optimised.onnx"
        prefix = str(Path(self._folder.name) / "run")
        self.session = session(
            data, enable_profiling=True, profile_file_prefix=prefix, optimized_model_filepath=str(self._graph)
        )

    def read(self) -> tuple[list[list[dict[str, Any]]], onnx.ModelProto]:
        """The kernel events of each run, in the order they started, and the graph that ran; once only."""
        events = json.loads(Path(self.session.end_profiling()).read_text(encoding="utf-8"))
        runs: list[list[dict[str, Any]]] = []
        current: list[dict[str, Any]] = []
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith(_SUFFIX):
                current.append(event)
            elif event.get("name") == "model_run":  # written when the run ends, after all its kernels
                runs.append(_outermost(current))
                current = []
        return runs, onnx.load(self._graph)

    def close(self) -> None:
        self.session = None
        self._folder.cleanup()


def _about(
    kernel: Kernel,
    args: Mapping[str, Any],
    node: onnx.NodeProto | None,
    weights: Mapping[str, int],
    known: dict[str, Port],
) -> dict[str, Any]:
    """What the profiler and the optimised graph say of a kernel besides its time; `known` grows by what it writes."""
    kind: Kind = "move" if kernel.type in _MOVES else "layer"
    given = args.get("output_type_shape", ())
    written = tuple(_port(name, entry) for name, entry in zip(kernel.writes, given, strict=False))
    known.update((port.name, port) for port in written)
    first = next((_port("", entry).dtype for entry in args.get("input_type_shape", ())), "")
    about = {"kind": kind, "writes": written, "precision": "" if kind == "move" else _PRECISIONS.get(first, first)}
    if node is None:
        return about
    return about | {
        # the profiler leaves weights packed beforehand out of its list of inputs, so that its order tells nothing
        "reads": tuple(known[name] for name in node.input if name in known and name not in weights),
        "weight_bytes": sum(weights[name] for name in node.input if name in weights),
        "kernel": next((tuple(a.ints) for a in node.attribute if a.name == "kernel_shape"), ()),
    }


def _port(name: str, entry: Mapping[str, list[int]]) -> Port:
    """A tensor as the profiler describes it: ``{"float": [1, 3, 32, 32]}``."""
    ((dtype, shape),) = entry.items()
    return Port(name, tuple(shape), _DTYPES.get(dtype, dtype))


def _stored_bytes(tensor: onnx.TensorProto) -> int:
    return (
        len(tensor.raw_data) or math.prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    )


def _outermost(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the kernels inside the body of a loop or branch, whose own event contains their time."""
    kept, end = [], -1
    for event in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
        if event["ts"] >= end:
            kept.append(event)
            end = event["ts"] + event["dur"]
    return kept


def _extras_ms(session: Session, run: list[dict[str, Any]], added_ms: float) -> np.ndarray:
    """What the profiler adds to the recorded time of each kernel of a run to which it adds `added_ms` in all."""
    rounds = [[_overheads_ms(session, inputs) for inputs in (_FEW, _MANY)] for _ in range(_ROUNDS)]
    (few, few_whole), (many, many_whole) = np.median(rounds, axis=0)
    inputs = np.array([len(event["args"]["input_type_shape"]) for event in run])
    along = (inputs - _FEW) / (_MANY - _FEW)
    within = np.maximum(few + (many - few) * along, 0.0)
    whole = float(np.sum(few_whole + (many_whole - few_whole) * along))
    # longer names, more shapes and colder caches cost more than on the chain, all of it while the kernel's clock runs;
    # never by much, so that a call that was slow for another reason does not make kernels vanish
    dearer = (added_ms - whole) / len(run)
    return within + np.clip(dearer, 0.0, few / 4)


def _overheads_ms(session: Session, inputs: int) -> tuple[float, float]:
    """What the profiler adds to one kernel, to its recorded time and to the time of the call, of a chain of kernels.

    Each sums `inputs` numbers. Its true time is how much longer a long chain takes than a short one without the
    profiler.
    """
    feeds = {"x": np.ones((1, 1, 1, 1), np.float32)}
    long, short = _chain(_CHAIN, inputs), _chain(1, inputs)
    log = _Log(session, long)
    try:
        profiled_ms = _call_ms(log.session, feeds)
        runs = log.read()[0][-_CALLS:]
    finally:
        log.close()
    recorded_us = np.median(_within_microsecond([event["dur"] for run in runs for event in run]))
    long_ms = _call_ms(session(long), feeds)
    true_ms = max(long_ms - _call_ms(session(short), feeds), 0.0) / (_CHAIN - 1)
    return max(float(recorded_us) / 1e3 - true_ms, 0.0), max(profiled_ms - long_ms, 0.0) / _CHAIN


def _within_microsecond(durations_us: list[int]) -> np.ndarray:
    """Durations that were rounded down to whole microseconds, equal ones spread evenly over theirs.

    Their median is then the median of grouped data, which can lie between two whole numbers.
    """
    values = np.asarray(durations_us, dtype=float)
    order = np.argsort(values, kind="stable")
    _, first, counts = np.unique(values[order], return_index=True, return_counts=True)
    rank = np.arange(len(values)) - np.repeat(first, counts)
    spread = np.empty_like(values)
    spread[order] = values[order] + (rank + 0.5) / np.repeat(counts, counts)
    return spread


def _call_ms(session: Any, feeds: dict[str, np.ndarray]) -> float:
    times = []
    for _ in range(_WARM_UP + _CALLS):
        start = time.perf_counter()
        session.run(None, feeds)
        times.append((time.perf_counter() - start) * 1e3)
    return float(np.median(times[_WARM_UP:]))


def _chain(length: int, inputs: int) -> bytes:
    info = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 1, 1, 1]) for name in ("x", f"y{length}")
    ]
    nodes = []
    for index in range(length):
        before = f"y{index}" if index else "x"
        nodes.append(
            onnx.helper.make_node("Sum", [before] + ["x"] * (inputs - 1), [f"y{index + 1}"], name=f"sum{index}")
        )
    graph = onnx.helper.make_graph(nodes, "chain", info[:1], info[1:])
    opset = onnx.helper.make_opsetid("", 17)
    return onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8).SerializeToString()

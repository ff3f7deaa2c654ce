"""ONNX Runtime's own profiler, read back: which kernel took how long in which run."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from workbench.deployment._base import OpTiming
from workbench.deployment._rows import Kernel, Lineage
from workbench.errors import BackendError

_WARM_UP = 5
_SUFFIX = "_kernel_time"
_CHAIN = 48  # kernels of the graphs that the profiler's own cost is measured on
_FEW, _MANY = 2, 10  # inputs of each of those kernels


def profile(session: Callable[..., Any], data: bytes, feeds: dict[str, np.ndarray], repeats: int) -> list[OpTiming]:
    """Time each kernel over `repeats` runs of a second session with the profiler on.

    The profiler writes down the shapes of a kernel's inputs and the state of the threads before it stops the kernel's
    clock. That adds some microseconds to each, and can double a small network; what it adds is measured on kernels
    that do next to nothing, and taken off.

    Parameters
    ----------
    session
        Makes a session of a graph's bytes and further session options.
    """
    few, many = (_overhead_ms(session, inputs) for inputs in (_FEW, _MANY))
    runs, optimised = _runs(session, data, feeds, repeats)
    tensors = {node.name: (tuple(node.input), tuple(node.output)) for node in optimised.graph.node}
    kernels = []
    for event in runs[0]:
        name = event["name"].removesuffix(_SUFFIX)
        kernels.append(Kernel(event["args"]["op_name"], (name,), *tensors.get(name, ())))
    layers = Lineage.of(onnx.load_model_from_string(data)).layers(kernels)
    rows = []
    for index, kernel in enumerate(kernels):
        inputs = len(runs[0][index]["args"]["input_type_shape"])
        extra_ms = max(few + (many - few) * (inputs - _FEW) / (_MANY - _FEW), 0.0)
        times = tuple(max(run[index]["dur"] / 1e3 - extra_ms, 0.0) for run in runs)
        rows.append(OpTiming(kernel.sources[0], kernel.type, layers[index], times))
    return rows


def _runs(
    session: Callable[..., Any], data: bytes, feeds: dict[str, np.ndarray], repeats: int
) -> tuple[list[list[dict[str, Any]]], onnx.ModelProto]:
    """The kernel events of each of the last `repeats` runs, in the order they started, and the graph that ran."""
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / "optimised.onnx"
        prefix = str(Path(folder) / "run")
        profiled = session(data, enable_profiling=True, profile_file_prefix=prefix, optimized_model_filepath=str(graph))
        for _ in range(_WARM_UP + repeats):
            profiled.run(None, feeds)
        events = json.loads(Path(profiled.end_profiling()).read_text(encoding="utf-8"))
        optimised = onnx.load(graph)
    runs: list[list[dict[str, Any]]] = []
    current: list[dict[str, Any]] = []
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(_SUFFIX):
            current.append(event)
        elif event.get("name") == "model_run":  # written when the run ends, after all its kernels
            runs.append(_outermost(current))
            current = []
    runs = runs[-repeats:]
    sequences = {tuple(event["name"] for event in run) for run in runs}
    if len(runs) < repeats or len(sequences) != 1 or not runs[0]:
        raise BackendError(
            "ONNX Runtime's profile cannot be laid out as rows: the runs executed different kernels, or too many for "
            "its buffer of a million events. Profile with fewer repeats, or with wb.Eager()."
        )
    return runs, optimised


def _outermost(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the kernels inside the body of a loop or branch, whose own event contains their time."""
    kept, end = [], -1
    for event in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
        if event["ts"] >= end:
            kept.append(event)
            end = event["ts"] + event["dur"]
    return kept


def _overhead_ms(session: Callable[..., Any], inputs: int) -> float:
    """What the profiler adds to one kernel, from a chain of sums of `inputs` numbers each.

    It is the kernels' mean recorded time less their true time, which is how much longer the chain takes than a short
    one without the profiler. Durations are recorded in whole microseconds, rounded down; the mean includes that.
    """
    feeds = {"x": np.ones((1, 1, 1, 1), np.float32)}
    long, short = _chain(_CHAIN, inputs), _chain(1, inputs)
    recorded = [np.mean([event["dur"] / 1e3 for event in run]) for run in _runs(session, long, feeds, 30)[0]]
    true_ms = max(_plain_ms(session(long), feeds) - _plain_ms(session(short), feeds), 0.0) / (_CHAIN - 1)
    return max(float(np.median(recorded)) - true_ms, 0.0)


def _plain_ms(session: Any, feeds: dict[str, np.ndarray]) -> float:
    times = []
    for _ in range(60):
        start = time.perf_counter()
        session.run(None, feeds)
        times.append((time.perf_counter() - start) * 1e3)
    return float(np.median(times))


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

"""What entering and leaving an engine takes, measured on a network that computes nothing."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from workbench.deployment import Engine, OpTiming
from workbench.errors import BackendError
from workbench.measure import quiesce
from workbench.models.model import Model

NAME = "(call)"
_SECONDS = 0.015
_CALLS = 5
_WIDE = (16, 64)
_FLOAT = onnx.TensorProto.FLOAT
_LARGEST = 64e6  # bytes; nothing stays in a cache beyond that
_MORE = 8


def row(engine: Engine, inputs: Sequence[np.ndarray], operations: Sequence[OpTiming]) -> list[OpTiming]:
    """One operation of kind ``call`` beside the engine's `operations`: taking inputs in and giving outputs back.

    Measured on the same backend with a network of the same inputs whose outputs are constants. A graph of constants
    alone might never be run, so it has one step as well, which starts from a number of its first input and is wide
    enough to wake the engine's threads; what a step takes is known from a graph with more of them. Between two calls as
    much memory is read as the operations read, so that the caches are as cold as they leave them. Empty where the
    backend does not take such a network.
    """
    moved = sum((o.weight_bytes or 0) + sum(port.nbytes for port in o.writes) for o in operations)
    touched = np.ones(int(min(np.nan_to_num(moved), _LARGEST)) // 8 + 1)
    found = engine(*inputs)
    outputs = found if isinstance(found, tuple) else (found,)
    try:
        times = _times(engine, inputs, _empty(engine, inputs, outputs, 1), touched)
        if engine.backend.runs_graphs:
            longer = _times(engine, inputs, _empty(engine, inputs, outputs, 1 + _MORE), touched)
            each = max(float(np.median(longer) - np.median(times)), 0.0) / _MORE
            times = np.maximum(times - each, 0.0)
    except BackendError:
        return []
    # as many as the other rows have, of the same distribution
    entries = len(operations[0].times_ms) if operations else len(times)
    spread = np.quantile(times, (np.arange(entries) + 0.5) / entries)
    return [OpTiming(NAME, "call", (), tuple(spread.tolist()), kind="call")]


def _times(engine: Engine, inputs: Sequence[np.ndarray], model: Model, touched: np.ndarray) -> np.ndarray:
    """Milliseconds of calls of a model on the engine's backend, `touched` being read before each."""
    clock = time.perf_counter
    times = []
    with engine.backend.compile(model) as empty:
        quiesce()
        for _ in range(_CALLS):
            empty(*inputs)
        end = clock() + _SECONDS
        while len(times) < _CALLS or clock() < end:
            touched.sum()
            start = clock()
            empty(*inputs)
            times.append((clock() - start) * 1e3)
    return np.asarray(times)


def _empty(engine: Engine, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray], steps: int) -> Model:
    """A model, as a module and as a graph, that gives `outputs` whatever it is given."""
    example = {spec.name: torch.from_numpy(np.array(x)) for spec, x in zip(engine.inputs, inputs, strict=True)}
    return Model(NAME, example, module=_Constant(outputs), graph=_graph(engine, inputs, outputs, steps))


class _Constant(nn.Module):
    def __init__(self, outputs: Sequence[np.ndarray]):
        super().__init__()
        for index, value in enumerate(outputs):
            self.register_buffer(f"output{index}", torch.from_numpy(np.array(value)))

    def forward(self, *inputs: Tensor) -> Any:
        found = tuple(self.buffers())
        return found[0] if len(found) == 1 else found


def _graph(engine: Engine, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray], steps: int) -> onnx.ModelProto:
    make, tensor = onnx.helper.make_node, onnx.numpy_helper.from_array

    def info(name: str, value: np.ndarray) -> onnx.ValueInfoProto:
        dtype = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
        return onnx.helper.make_tensor_value_info(name, dtype, value.shape)

    axes = inputs[0].ndim
    shape = (*[1] * (axes - 2), *_WIDE) if axes > 1 else (-1,)
    wide = np.linspace(0, 1, math.prod(_WIDE), dtype=np.float32).reshape(shape)
    fixed = [
        *(tensor(np.full(axes, value, np.int64), name) for name, value in (("first", 0), ("second", 1))),
        tensor(wide, "wide"),
    ]
    nodes = [make("Slice", [engine.inputs[0].name, "first", "second"], ["step0"])]
    if inputs[0].dtype != np.float32:
        nodes = [make("Slice", nodes[0].input, ["corner"]), make("Cast", ["corner"], ["step0"], to=_FLOAT)]
    for i in range(steps):
        nodes.append(make("Add", [f"step{i}", "wide"], [f"sum{i}"]))
        nodes.append(make("Softmax", [f"sum{i}"], [f"shares{i}"]))
        nodes.append(make("Slice", [f"shares{i}", "first", "second"], [f"step{i + 1}"]))
    for spec, value in zip(engine.outputs, outputs, strict=True):
        nodes.append(make("Constant", [], [spec.name], value=tensor(np.ascontiguousarray(value))))
    ends = [onnx.helper.make_tensor_value_info(f"step{i + 1}", _FLOAT, [1] * axes) for i in range(steps)]
    graph = onnx.helper.make_graph(
        nodes,
        "call",
        [info(spec.name, x) for spec, x in zip(engine.inputs, inputs, strict=True)],
        [*ends, *(info(spec.name, value) for spec, value in zip(engine.outputs, outputs, strict=True))],
        fixed,
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)

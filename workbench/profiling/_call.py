"""What entering and leaving an engine takes, measured on a network that computes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from workbench.deployment import Engine, OpTiming
from workbench.errors import BackendError
from workbench.measure import block, quiesce
from workbench.models.model import Model

NAME = "(call)"
_SECONDS = 0.02


def row(engine: Engine, inputs: Sequence[np.ndarray], entries: int) -> list[OpTiming]:
    """One operation of kind ``call`` with `entries` times: taking these inputs in and giving such outputs back.

    Measured on the same backend with a network of the same inputs and outputs whose outputs are constants. Empty where
    the backend does not take such a network.
    """
    found = engine(*inputs)
    outputs = found if isinstance(found, tuple) else (found,)
    try:
        with engine.backend.compile(_constant(engine, inputs, outputs)) as empty:
            quiesce()
            times = block(lambda: empty(*inputs), _SECONDS)
    except BackendError:
        return []
    # as many as the other rows have, of the same distribution
    spread = np.quantile(times, (np.arange(entries) + 0.5) / entries)
    return [OpTiming(NAME, "call", (), tuple(spread.tolist()), kind="call")]


def _constant(engine: Engine, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> Model:
    """A model, as a module and as a graph, that gives `outputs` whatever it is given."""
    example = {spec.name: torch.from_numpy(np.array(x)) for spec, x in zip(engine.inputs, inputs, strict=True)}
    return Model(NAME, example, module=_Constant(outputs), graph=_graph(engine, inputs, outputs))


class _Constant(nn.Module):
    def __init__(self, outputs: Sequence[np.ndarray]):
        super().__init__()
        for index, value in enumerate(outputs):
            self.register_buffer(f"output{index}", torch.from_numpy(np.array(value)))

    def forward(self, *inputs: Tensor) -> Any:
        found = tuple(self.buffers())
        return found[0] if len(found) == 1 else found


def _graph(engine: Engine, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> onnx.ModelProto:
    def info(name: str, value: np.ndarray, shape: Sequence[Any]) -> onnx.ValueInfoProto:
        return onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(value.dtype), shape)

    taken = [info(spec.name, x, x.shape) for spec, x in zip(engine.inputs, inputs, strict=True)]
    names = [spec.name for spec in engine.outputs]
    given = [info(name, value, value.shape) for name, value in zip(names, outputs, strict=True)]
    nodes = [
        onnx.helper.make_node("Constant", [], [name], value=onnx.numpy_helper.from_array(np.ascontiguousarray(value)))
        for name, value in zip(names, outputs, strict=True)
    ]
    graph = onnx.helper.make_graph(nodes, "call", taken, given)
    opset = onnx.helper.make_opsetid("", 17)
    return onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8)

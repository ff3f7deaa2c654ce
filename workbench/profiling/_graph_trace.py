"""A forward pass of an ONNX graph, worked out: which node makes which memory, by the shapes it will have."""

from __future__ import annotations

import math

import onnx

from workbench.errors import DataError
from workbench.models import graph_layers
from workbench.models.model import Model
from workbench.models.provenance import provenance
from workbench.profiling._schedule import Operation, Trace

_BODIES = {"If", "Loop", "Scan", "SequenceMap"}


def trace(model: Model, batch: int) -> Trace:
    """The nodes of the model's graph in its order, and the tensors between them.

    Views take no memory, nor do weights and what is computed from them alone; a quantised tensor lies in memory as
    integers.

    Raises
    ------
    DataError
        If the graph is made for another batch, or the shape of a tensor is not known before it runs.
    """
    graph = _at_batch(model, batch)
    shapes, dtypes = graph_layers.tensor_shapes(graph, {k: tuple(v.shape) for k, v in model.example.items()})
    layers, constant = provenance(graph), {tensor.name for tensor in graph.graph.initializer}
    # what a caller gives and takes is in memory as it is
    borders = {value.name for value in (*graph.graph.input, *graph.graph.output)}
    across = {k: v for k, v in graph_layers.across_quantisers(graph).items() if k not in borders}
    number: dict[str, int] = {}
    sizes: list[int] = []

    def make(name: str, where: str) -> int:
        # what goes to a quantiser alone is written as integers
        held = across.get(name, name)
        size = graph_layers.tensor_bytes(shapes.get(held), dtypes.get(held))
        if math.isnan(size):
            raise DataError(
                f"The shape of {held!r} ({where}) is not known before {model.name} runs, so its memory cannot be "
                "worked out. Give the model as a torch module: its forward pass is then watched."
            )
        number[name] = number[held] = len(sizes)
        sizes.append(math.ceil(size))
        return number[name]

    inputs = tuple(make(value.name, "an input") for value in graph.graph.input if value.name not in constant)
    operations = []
    for node in graph.graph.node:
        given, made = ([name for name in names if name] for names in (node.input, node.output))
        if constant.issuperset(given):
            constant.update(made)
            continue
        if node.op_type in _BODIES:
            raise DataError(
                f"{model.name} has a {node.op_type} node, whose body runs as often as the data says, so its memory "
                "cannot be worked out. Give the model as a torch module: its forward pass is then watched."
            )
        reads = tuple(dict.fromkeys(number[name] for name in given if name in number))
        # a view, or the same numbers as they lie in memory anyway
        same = node.op_type in graph_layers.VIEWS
        same |= node.op_type == "QuantizeLinear" and across.get(given[0]) == made[0]
        same |= node.op_type == "DequantizeLinear" and across.get(made[0]) == given[0]
        if same and given[0] in number:
            number.update(dict.fromkeys(made, number[given[0]]))
            continue
        layer = layers.get(node.name or node.output[0]) or (node.name or node.op_type,)
        writes = tuple(make(name, f"{node.op_type}, layer {layer[0]}") for name in made)
        operations.append(Operation(layer[0], node.op_type, reads, writes))
    outputs = tuple(dict.fromkeys(number[value.name] for value in graph.graph.output if value.name in number))
    return Trace(tuple(operations), tuple(sizes), inputs, outputs)


def weight_bytes(graph: onnx.ModelProto) -> int:
    """Bytes of everything the graph stores."""
    constants = (node for node in graph.graph.node if node.op_type == "Constant")
    stored = [*graph.graph.initializer, *(a.t for node in constants for a in node.attribute if a.HasField("t"))]
    return sum(math.ceil(graph_layers.tensor_bytes(tuple(t.dims), t.data_type)) for t in stored)


def _at_batch(model: Model, batch: int) -> onnx.ModelProto:
    """A copy of the graph whose open batch axes are `batch` long."""
    graph = onnx.ModelProto()
    graph.CopyFrom(model.graph)
    for value in graph.graph.input:
        axes = value.type.tensor_type.shape.dim
        if value.name not in model.example or not axes:
            continue
        if not axes[0].HasField("dim_value"):
            axes[0].dim_value = batch
        elif axes[0].dim_value != batch:
            raise DataError(
                f"batch is {batch}, but {model.name} is made for a batch of {axes[0].dim_value}; give that number."
            )
    return graph

"""The points at which two ONNX graphs hold the same mathematical value, found through the layers of their nodes.

A value is told by the layers it took to compute it: the output of a convolution, and that of the same convolution with
its normalisation folded in, took different layers and are no point in common; both graphs have one again after the
normalisation. Names of tensors would not do, because a graph that is quantised or optimised lost some of its values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_

import onnx
from onnx import TensorProto, shape_inference

from workbench.models.export import provenance

_QUANTISERS = {"QuantizeLinear", "DequantizeLinear"}
_FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}
_NO_VALUE = {"Shape", "Size"}  # the same whatever the values are
_UNKNOWN = TensorProto.UNDEFINED
# where a product puts its output channels, and what leaves them where they are
_CHANNEL_AXIS = {"Conv": 1, "ConvTranspose": 1, "ConvInteger": 1, "Gemm": -1, "MatMul": -1, "MatMulInteger": -1}
_KEEPS_CHANNELS = _QUANTISERS | {
    *("Add", "AveragePool", "BatchNormalization", "Cast", "Clip", "Elu", "Gelu", "GlobalAveragePool"),
    *("GlobalMaxPool", "HardSigmoid", "HardSwish", "Identity", "LayerNormalization", "LeakyRelu", "MaxPool", "Mul"),
    *("PRelu", "Relu", "Sigmoid", "Softplus", "Sub", "Tanh"),
}


@dataclass(frozen=True)
class Side:
    """Where one graph holds the value of a point.

    Attributes
    ----------
    tensor
        Name of the tensor to read: dequantised, where the value is quantised.
    operator
        Of the node that computes the value.
    channels
        The layer whose output channels the tensor has, and the axis they lie along; None where that cannot be told.
    """

    tensor: str
    operator: str
    channels: tuple[str, int] | None


@dataclass(frozen=True)
class Point:
    """One value that both graphs compute, and the layers that lie between it and the points before."""

    layers: tuple[str, ...]
    a: Side
    b: Side


@dataclass(frozen=True)
class _Value:
    side: Side
    origin: str  # the tensor before it was quantised
    taken: int  # the layers it took, a bit each
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Common:
    """The points two graphs have in common in execution order, and the layers that have none.

    `only_a` and `only_b` are known to one graph alone; `nowhere` to both, without a value that both compute.
    """

    points: tuple[Point, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    nowhere: tuple[str, ...]


def common(a: onnx.ModelProto, b: onnx.ModelProto) -> Common:
    """The points two graphs have in common; `b` is a version of `a`."""
    layers_a, layers_b = provenance(a), provenance(b)
    known_a, known_b = _known(layers_a), _known(layers_b)
    bits = {layer: 1 << i for i, layer in enumerate(layer for layer in known_a if layer in known_b)}
    values_a, values_b = _values(a, layers_a, bits), _values(b, layers_b, bits)
    points = []
    covered = 0
    for taken, found in values_a.items():
        if taken not in values_b:
            continue
        first, second = _alike(found, values_b[taken])
        between = [layer for layer, bit in bits.items() if bit & taken & ~covered]
        # where two points come together in a layer that the other graph does not know, it still has a name here
        names = between or [layer for layer in first.layers if layer not in bits]
        if names:
            points.append(Point(tuple(names), first.side, second.side))
        covered |= taken
    computed = reduce(or_, (*values_a, *values_b), 0)
    return Common(
        points=tuple(points),
        only_a=tuple(layer for layer in known_a if layer not in bits),
        only_b=tuple(layer for layer in known_b if layer not in bits),
        nowhere=tuple(layer for layer, bit in bits.items() if bit & computed & ~covered),
    )


def with_outputs(graph: onnx.ModelProto, tensors: Iterable[str]) -> onnx.ModelProto:
    """A copy of a graph that also puts out these tensors."""
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    there = {value.name for value in copy.graph.output}
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in dict.fromkeys(tensors) if name not in there)
    return copy


def _known(layers: Mapping[str, tuple[str, ...]]) -> dict[str, None]:
    return dict.fromkeys(layer for node in layers.values() for layer in node)


def _values(
    graph: onnx.ModelProto, layers: Mapping[str, tuple[str, ...]], bits: Mapping[str, int]
) -> dict[int, list[_Value]]:
    """The floating values that another layer or the caller reads, by the layers they took; constants are none.

    Most layers have one such value: those between the nodes of one layer are read by that layer alone.
    """
    weights = {tensor.name for tensor in graph.graph.initializer}
    types = _types(graph)
    known = {v.name: _Value(Side(v.name, "", None), v.name, 0, ()) for v in graph.graph.input if v.name not in weights}
    found: dict[int, dict[str, _Value]] = {}
    left: set[str] = set()  # values that leave their layer
    for node in graph.graph.node:
        read = [known[name] for name in node.input if name in known]
        if not read or node.op_type in _NO_VALUE:
            continue
        own = layers.get(node.name) or layers.get(node.output[0], ())
        for name in filter(None, node.output):
            value = known[name] = _computed(node, name, read, own, bits)
            left.update(before.origin for before in read if before.taken != value.taken)
            if value.taken and types.get(name, _UNKNOWN) in _FLOATS | {_UNKNOWN}:
                # the dequantised form takes the place of the value it was made of
                found.setdefault(value.taken, {})[value.origin] = value
    left.update(known[value.name].origin for value in graph.graph.output if value.name in known)
    kept = {taken: [v for v in values.values() if v.origin in left] for taken, values in found.items()}
    return {taken: values for taken, values in kept.items() if values}


def _computed(
    node: onnx.NodeProto, name: str, read: list[_Value], own: tuple[str, ...], bits: Mapping[str, int]
) -> _Value:
    if node.op_type in _QUANTISERS:
        before = read[0]
        return replace(before, side=replace(before.side, tensor=name))
    taken = reduce(or_, (value.taken for value in read)) | reduce(or_, (bits.get(layer, 0) for layer in own), 0)
    channels = read[0].side.channels if node.op_type in _KEEPS_CHANNELS else None
    if node.op_type in _CHANNEL_AXIS and own:
        channels = own[0], _CHANNEL_AXIS[node.op_type]
    return _Value(Side(name, node.op_type, channels), name, taken, own)


def _alike(a: list[_Value], b: list[_Value]) -> tuple[_Value, _Value]:
    """The last value of each, by name where a layer has several, as a recurrent one does."""
    named = {value.origin: value for value in b}
    shared = next((value for value in reversed(a) if value.origin in named), None)
    return (a[-1], b[-1]) if shared is None else (shared, named[shared.origin])


def _types(graph: onnx.ModelProto) -> dict[str, int]:
    inferred = shape_inference.infer_shapes(graph).graph
    return {v.name: v.type.tensor_type.elem_type for v in (*inferred.value_info, *inferred.output)}

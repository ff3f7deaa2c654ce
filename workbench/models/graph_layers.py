"""What each node of an ONNX graph does: its layer, shapes, parameters, multiply-accumulates and bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, shape_inference

from workbench.models.provenance import provenance

Shape = tuple[int | None, ...]

_HIDDEN = {"Constant", "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"}
_SEEN_THROUGH = {"DequantizeLinear", "QuantizeLinear", "Cast", "Transpose", "Identity"}
# operators that give their input under another shape, which takes no copy
VIEWS = {"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Dropout"}
_WEIGHTS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE} | {
    TensorProto.INT8, TensorProto.UINT8, TensorProto.INT4, TensorProto.UINT4
}  # fmt: skip
_BITS = {
    TensorProto.INT4: 4,
    TensorProto.UINT4: 4,
    TensorProto.BFLOAT16: 16,
    **{helper.np_dtype_to_tensor_dtype(np.dtype(code)): 8 * np.dtype(code).itemsize for code in "?bBhHiIqQefd"},
}
# inputs of the fused integer operators that hold scales and zero points
_NOT_WEIGHTS = {
    "QLinearConv": {1, 2, 4, 5, 6, 7},
    "QLinearMatMul": {1, 2, 4, 5, 6, 7},
    "QGemm": {1, 2, 4, 5, 7, 8},
    "ConvInteger": {2, 3},
    "MatMulInteger": {2, 3},
    "DynamicQuantizeMatMul": {2, 3},
    "MatMulIntegerToFloat": {2, 3, 4, 5},
}


def rows(graph: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]]) -> list[tuple]:
    """One tuple per node in the order of `layers.COLUMNS`; see `layers.graph_table`."""
    known, dtypes = tensor_shapes(graph, shapes)
    layers = provenance(graph)
    weights = _Weights(graph)
    across = across_quantisers(graph)
    found = []

    def nbytes(names: Iterable[str]) -> float:
        """Of activations, as they are written: a quantised one by its integers."""
        tensors = [across.get(name, name) for name in dict.fromkeys(names) if name and not weights.is_constant(name)]
        return sum(tensor_bytes(known.get(name), dtypes.get(name)) for name in tensors)

    for i, node in enumerate(graph.graph.node):
        if node.op_type in _HIDDEN:
            continue
        activation = next((name for name in node.input if name in known and not weights.is_constant(name)), "")
        inside, outside = known.get(activation), known.get(node.output[0])
        macs = _macs(node, [known.get(name) for name in node.input], outside)
        batch = (outside[0] if outside else None) or 1
        layer = layers.get(node.name) or (node.name or f"{node.op_type}_{i}",)
        # one sample is what shapes are inferred for, unless the graph fixes its batch size
        read, written = (0, 0) if node.op_type in VIEWS else (nbytes(node.input), nbytes(node.output))
        used = weights.nbytes(node)
        if node.op_type == "Gather":  # reads the rows looked up
            used = min(used, int(written)) if used and not math.isnan(written) else used
        found.append(
            (
                layer[0],
                node.op_type,
                tuple((inside or ())[1:]),
                tuple((outside or ())[1:]),
                weights.take(node),
                macs // batch,
                read / batch if math.isnan(read) else int(read // batch),
                used,
                written / batch if math.isnan(written) else int(written // batch),
            )
        )
    return found


def declared_shapes(graph: onnx.ModelProto) -> dict[str, Shape]:
    """Shape of each input as the graph declares it, None for open axes; an input without a shape is left out."""
    stored = {t.name for t in graph.graph.initializer}
    return {
        value.name: tuple(d.dim_value if d.dim_value > 0 else None for d in value.type.tensor_type.shape.dim)
        for value in graph.graph.input
        if value.name not in stored and value.type.tensor_type.HasField("shape")
    }


def parameters(graph: onnx.ModelProto) -> int:
    """Weights of a graph, quantised ones included, shared ones counted once; scales and shapes are none."""
    weights = _Weights(graph)
    return sum(weights.take(node) for node in graph.graph.node if node.op_type not in _HIDDEN)


class _Weights:
    """Counts each weight once, where it is first used, looking through dequantisers, casts and transposes."""

    def __init__(self, graph: onnx.ModelProto):
        # single numbers are settings of an operator, not weights
        found = {t.name: t for t in graph.graph.initializer if t.data_type in _WEIGHTS and t.dims}
        self._constants = {t.name for t in graph.graph.initializer}
        self._behind: dict[str, str] = {}
        for node in graph.graph.node:
            if node.op_type == "Constant":
                self._constants.update(node.output)
                value = next((a.t for a in node.attribute if a.name == "value"), None)
                if value is not None and value.data_type in _WEIGHTS and value.dims:
                    found[node.output[0]] = value
            elif node.op_type in _SEEN_THROUGH and node.input and node.input[0] in self._constants:
                self._constants.update(node.output)
                self._behind[node.output[0]] = node.input[0]

        self._bytes = {name: tensor_bytes(tuple(t.dims), t.data_type) for name, t in found.items()}
        self._left = {name: math.prod(t.dims) for name, t in found.items()}

    def is_constant(self, name: str) -> bool:
        return name in self._constants

    def take(self, node: NodeProto) -> int:
        """Numbers in the weights a node uses that no node before used."""
        return sum(self._left.pop(name, 0) for name in self._used(node))

    def nbytes(self, node: NodeProto) -> int:
        """Bytes of the weights a node uses."""
        return math.ceil(sum(self._bytes[name] for name in self._used(node)))

    def _used(self, node: NodeProto) -> list[str]:
        if node.output and node.output[0] in self._constants:
            return []
        skipped = _NOT_WEIGHTS.get(node.op_type, set())
        names = [name for i, name in enumerate(node.input) if i not in skipped]
        for i, name in enumerate(names):
            while name in self._behind:
                name = self._behind[name]
            names[i] = name
        return [name for name in dict.fromkeys(names) if name in self._bytes]


def tensor_bytes(shape: Shape | None, dtype: int | None) -> float:
    """Bytes of a tensor; NaN where its shape or dtype is not known."""
    if shape is None or None in shape or dtype not in _BITS:
        return math.nan
    return math.prod(shape) * _BITS[dtype] / 8


def across_quantisers(graph: onnx.ModelProto) -> dict[str, str]:
    """For the tensors before a quantiser and after a dequantiser: the quantised one, which is what lies in memory."""
    readers: dict[str, list[NodeProto]] = {}
    for node in graph.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    across = {
        name: nodes[0].output[0]
        for name, nodes in readers.items()
        if all(node.op_type == "QuantizeLinear" and node.input[0] == name for node in nodes)
    }
    for node in graph.graph.node:
        if node.op_type == "DequantizeLinear":
            across[node.output[0]] = node.input[0]
    return across


def tensor_shapes(
    graph: onnx.ModelProto, given: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, Shape], dict[str, int | None]]:
    """Shape and dtype of every tensor, for one sample and the example's other axes."""
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    del copy.graph.value_info[:]  # they repeat the symbols that are about to become numbers
    fixed = {t.name for t in graph.graph.initializer}
    for value in copy.graph.input:
        if value.name in fixed:
            continue
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if not dim.HasField("dim_value"):
                example = given.get(value.name, ())
                dim.dim_value = 1 if axis == 0 else example[axis] if axis < len(example) else 0
                if dim.dim_value == 0:
                    dim.ClearField("dim_value")
    for value in copy.graph.output:
        value.type.tensor_type.ClearField("shape")
    inferred = shape_inference.infer_shapes(copy, data_prop=True).graph
    known: dict[str, Shape] = {t.name: tuple(t.dims) for t in graph.graph.initializer}
    dtypes: dict[str, int | None] = {}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        tensor = value.type.tensor_type
        dtypes[value.name] = tensor.elem_type
        if tensor.HasField("shape"):
            known[value.name] = tuple(d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim)
    return known, dtypes


def _macs(node: NodeProto, inside: list[Shape | None], outside: Shape | None) -> int:
    """MACs of one run of the node; 0 for an operator that multiplies nothing, or whose shapes are unknown."""
    rule = _RULES.get(node.op_type)
    if rule is None:
        return 0
    count, weight_at = rule
    shapes = [inside[0], inside[weight_at] if weight_at < len(inside) else None, outside]
    if any(s is None or None in s for s in shapes):
        return 0
    return count(node, *shapes)


def _convolution(node: NodeProto, x: Shape, weight: Shape, y: Shape) -> int:
    return math.prod(y) * math.prod(weight[1:])


def _transposed(node: NodeProto, x: Shape, weight: Shape, y: Shape) -> int:
    return math.prod(x) * math.prod(weight[1:])


def _product(node: NodeProto, a: Shape, b: Shape, y: Shape) -> int:
    return math.prod(y) * a[-1] if a else 0


def _gemm(node: NodeProto, a: Shape, b: Shape, y: Shape) -> int:
    transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
    return math.prod(y) * a[0 if transposed else 1]


def _recurrent(node: NodeProto, x: Shape, weight: Shape, y: Shape) -> int:
    # weight is (directions, gates · hidden, inputs); the recurrent one multiplies `hidden` instead of `inputs`
    hidden = next(helper.get_attribute_value(a) for a in node.attribute if a.name == "hidden_size")
    return x[0] * x[1] * weight[0] * weight[1] * (weight[2] + hidden)


_RULES: dict[str, tuple[Callable[[NodeProto, Shape, Shape, Shape], int], int]] = {
    "Conv": (_convolution, 1),
    "FusedConv": (_convolution, 1),
    "ConvInteger": (_convolution, 1),
    "QLinearConv": (_convolution, 3),
    "ConvTranspose": (_transposed, 1),
    "Gemm": (_gemm, 1),
    "FusedGemm": (_gemm, 1),
    "QGemm": (_gemm, 3),
    "MatMul": (_product, 1),
    "FusedMatMul": (_product, 1),
    "MatMulInteger": (_product, 1),
    "MatMulIntegerToFloat": (_product, 1),
    "DynamicQuantizeMatMul": (_product, 1),
    "QLinearMatMul": (_product, 3),
    "LSTM": (_recurrent, 1),
    "GRU": (_recurrent, 1),
    "RNN": (_recurrent, 1),
}

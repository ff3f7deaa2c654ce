"""Weights in 8 or 4 bits, and arithmetic in float: a `DequantizeLinear` in front of each product.

The form is standard ONNX. Out of a dequantised weight and a MatMul ONNX Runtime makes its MatMulNBits, and OpenVINO
keeps the weight compressed; both are faster than float32 and round what they multiply it with to 8 bits, by block.
ONNX Runtime does so for no Gemm with an activation, and OpenVINO reads no block that is not whole: hence each Gemm
becomes a MatMul, and inputs are padded with zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from workbench.compression._calibration import Reference, Samples, reference
from workbench.compression._int8 import prepared
from workbench.compression._onnx_graph import drop_unread_weights, gemms_as_matmuls
from workbench.models.provenance import provenance

BLOCK = 32  # weights that share a scale, of 4 bits

_OPSET = 21  # the first with 4-bit tensors and scales by block
_SHARES = np.linspace(0.75, 1.0, 11)  # of the largest magnitude, tried as the end of the grid


class WeightOnly:
    """Weights of products, convolutions and embedding tables as integers; see the module.

    Parameters
    ----------
    graph
        A float32 graph.
    samples
        What `reference` is computed on; there may be none.
    precision
        ``int8`` or ``int4``, by the layer of a node. Only MatMul and Gemm are kept in 4 bits; where that is asked for,
        convolutions and tables take 8.

    Attributes
    ----------
    graph
        The float32 graph as it is quantised: optimised, every node named, Gemms as MatMuls.
    reference
        What it puts out for the first calibration samples.
    """

    def __init__(self, graph: onnx.ModelProto, samples: Samples, precision: Callable[[str], str]):
        self.graph = gemms_as_matmuls(prepared(graph, _OPSET), subtract_bias=True)
        self._precision = precision
        self.reference: Reference = reference(self.graph, samples)

    def quantised(self, without: Collection[str] = (), only: Collection[str] = ()) -> onnx.ModelProto:
        """The graph with integer weights; nodes `without` stay float32, and all but `only`, where any are given."""
        rewriter = _Rewriter(self.graph)
        layers = provenance(self.graph)
        for node in self.graph.graph.node:
            if node.name in without or (only and node.name not in only):
                rewriter.keep(node)
            else:
                rewriter.rewrite(node, self._precision(layers[node.name][0]))
        return rewriter.result()


def int8_by_channel(weight: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric 8-bit integers with a scale for each index of one axis, ``s = max |w| / 127``.

    Returns
    -------
    (numpy.ndarray, numpy.ndarray)
        int8 of the weight's shape, and float32 ``(length of the axis,)``.
    """
    others = tuple(i for i in range(weight.ndim) if i != axis)
    scale = _positive(np.abs(weight).max(axis=others, keepdims=True) / np.float32(127))
    return np.rint(weight / scale).clip(-127, 127).astype(np.int8), scale.ravel()


def int4_by_block(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric 4-bit integers, -8 to 7, with a scale for each `BLOCK` rows of a column.

    The scale of a block is the one, of eleven from three quarters of ``max |w| / 7`` on, with the smallest squared
    error.

    Parameters
    ----------
    weight
        ``(rows, columns)`` float32; the rows are a multiple of `BLOCK`.

    Returns
    -------
    (numpy.ndarray, numpy.ndarray)
        int8 ``(rows, columns)`` and float32 ``(rows / BLOCK, columns)``.
    """
    blocks = weight.reshape(-1, BLOCK, weight.shape[1])
    most = _positive(np.abs(blocks).max(axis=1, keepdims=True) / np.float32(7))
    best, least = most, np.full(most.shape, np.inf, np.float32)
    for share in _SHARES.astype(np.float32):
        scale = most * share
        error = np.square(_grid(blocks, scale) * scale - blocks).sum(axis=1, keepdims=True)
        best, least = np.where(error < least, scale, best), np.minimum(error, least)
    return _grid(blocks, best).astype(np.int8).reshape(weight.shape), best[:, 0]


def _grid(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return np.rint(values / scale).clip(-8, 7)


def _positive(scale: np.ndarray) -> np.ndarray:
    return np.where(scale > 0, scale, 1).astype(np.float32)


class _Rewriter:
    """A graph written anew, node by node."""

    def __init__(self, graph: onnx.ModelProto):
        self._graph = graph
        self._weights = {tensor.name: tensor for tensor in graph.graph.initializer}
        self._nodes: list[onnx.NodeProto] = []
        self._added: dict[str, onnx.TensorProto] = {}
        self._dequantised: set[str] = set()

    def keep(self, node: onnx.NodeProto) -> None:
        self._nodes.append(node)

    def rewrite(self, node: onnx.NodeProto, precision: str) -> None:
        """Give a node integer weights, or keep it where it has none or would not shrink."""
        table = node.op_type == "Gather"
        name = node.input[0 if table else 1] if len(node.input) > 1 else ""
        tensor = self._weights.get(name)
        weight = numpy_helper.to_array(tensor) if tensor is not None else np.zeros(0)
        axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
        if weight.dtype != np.float32 or weight.ndim < 2:
            self.keep(node)
        elif node.op_type == "Conv" or node.op_type == "ConvTranspose":
            self._convolution(node, name, weight, axis=0 if node.op_type == "Conv" else 1)
        elif table and weight.ndim == 2 and axis == 0:
            self._table(node, name, weight)
        elif node.op_type == "MatMul" and weight.ndim == 2:
            self._product(node, name, weight, precision)
        else:
            self.keep(node)

    def _convolution(self, node: onnx.NodeProto, name: str, weight: np.ndarray, axis: int) -> None:
        if weight.size // weight.shape[axis] < 2:  # one weight per scale
            self.keep(node)
            return
        copied = onnx.NodeProto()
        copied.CopyFrom(node)
        copied.input[1] = self._by_channel(name, weight, axis)
        self._nodes.append(copied)

    def _table(self, node: onnx.NodeProto, name: str, weight: np.ndarray) -> None:
        """Rows are picked as integers, with their scales, and only those are dequantised."""
        values, scales = int8_by_channel(weight, 0)
        rows, row_scales, floats = (f"{node.name}/{part}" for part in ("rows", "scales", "floats"))
        self._put(numpy_helper.from_array(values, f"{name}_int8"))
        self._put(numpy_helper.from_array(scales[:, None], f"{name}_scale"))
        self._nodes += [
            helper.make_node("Gather", [f"{name}_int8", node.input[1]], [rows], name=rows, axis=0),
            helper.make_node("Gather", [f"{name}_scale", node.input[1]], [row_scales], name=row_scales, axis=0),
            helper.make_node("Cast", [rows], [floats], name=floats, to=TensorProto.FLOAT),
            helper.make_node("Mul", [floats, row_scales], [node.output[0]], name=node.name),
        ]

    def _product(self, node: onnx.NodeProto, name: str, weight: np.ndarray, precision: str) -> None:
        copied = onnx.NodeProto()
        copied.CopyFrom(node)
        if precision == "int4":
            copied.input[0], weight = self._whole_blocks(node, weight)
            copied.input[1] = self._by_block(name, weight)
        else:
            copied.input[1] = self._by_channel(name, weight, 1)
        self._nodes.append(copied)

    def _whole_blocks(self, node: onnx.NodeProto, weight: np.ndarray) -> tuple[str, np.ndarray]:
        """Input and weight with as many zeros as make whole blocks of the rows."""
        rest = -len(weight) % BLOCK
        if not rest:
            return node.input[0], weight
        pads = self._put(numpy_helper.from_array(np.array([0, rest]), f"{node.name}/pads"))
        nothing = self._put(numpy_helper.from_array(np.float32(0), f"{node.name}/zero"))
        last = self._put(numpy_helper.from_array(np.array([-1]), f"{node.name}/axis"))
        padded = f"{node.name}/padded"
        self._nodes.append(helper.make_node("Pad", [node.input[0], pads, nothing, last], [padded], name=padded))
        return padded, np.pad(weight, ((0, rest), (0, 0)))

    def _by_channel(self, name: str, weight: np.ndarray, axis: int) -> str:
        """Name of the dequantised weight; nodes that share a weight share it."""
        out = f"{name}_from_int8"
        if out not in self._dequantised:
            values, scales = int8_by_channel(weight, axis)
            self._dequantise(out, numpy_helper.from_array(values, f"{name}_int8"), scales, axis=axis)
        return out

    def _by_block(self, name: str, weight: np.ndarray) -> str:
        out = f"{name}_from_int4"
        if out not in self._dequantised:
            values, scales = int4_by_block(weight)
            nibbles = values.ravel().view(np.uint8) & 0xF
            packed = (nibbles[0::2] | nibbles[1::2] << 4).tobytes()  # BLOCK is even, and so is the number of weights
            tensor = helper.make_tensor(f"{name}_int4", TensorProto.INT4, values.shape, packed, raw=True)
            self._dequantise(out, tensor, scales, axis=0, block_size=BLOCK)
        return out

    def _dequantise(self, out: str, values: onnx.TensorProto, scales: np.ndarray, **attributes: int) -> None:
        self._dequantised.add(out)
        scale = self._put(numpy_helper.from_array(scales, f"{values.name}_scale"))
        node = helper.make_node("DequantizeLinear", [self._put(values), scale], [out], name=out, **attributes)
        self._nodes.append(node)

    def _put(self, tensor: onnx.TensorProto) -> str:
        self._added[tensor.name] = tensor
        return tensor.name

    def result(self) -> onnx.ModelProto:
        """The graph of the nodes so far, with the weights they read."""
        copied = onnx.ModelProto()
        copied.CopyFrom(self._graph)
        del copied.graph.node[:]
        copied.graph.node.extend(self._nodes)
        copied.graph.initializer.extend(self._added.values())
        drop_unread_weights(copied)
        copied.ir_version = max(copied.ir_version, 10)  # the first with 4-bit tensors
        return copied

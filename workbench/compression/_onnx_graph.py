"""What quantisers need to know of an ONNX graph: its inputs, its kind, and the layers its nodes stand for."""

from __future__ import annotations

import json

import numpy as np
import onnx
from onnx import helper, numpy_helper

from workbench.models.provenance import KEY, provenance

PRODUCTS = ("Gemm", "MatMul")
QUANTISED = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "ConvInteger"}

_NORMALISATION = {"LayerNormalization", "SimplifiedLayerNormalization", "SkipLayerNormalization", "RMSNormalization"}
_ATTENTION = {"Attention", "MultiHeadAttention"}


def input_names(graph: onnx.ModelProto) -> list[str]:
    """Names of the inputs a caller feeds, in order; old files list their weights as inputs too."""
    weights = {tensor.name for tensor in graph.graph.initializer}
    return [value.name for value in graph.graph.input if value.name not in weights]


def without_weight_inputs(graph: onnx.ModelProto) -> onnx.ModelProto:
    """The graph, or a copy in which no weight is listed as an input: a weight that may change cannot be rounded."""
    names = input_names(graph)
    if len(names) == len(graph.graph.input):
        return graph
    copied = onnx.ModelProto()
    copied.CopyFrom(graph)
    kept = [value for value in graph.graph.input if value.name in names]
    del copied.graph.input[:]
    copied.graph.input.extend(kept)
    return copied


def fixed_batch(graph: onnx.ModelProto) -> int | None:
    """The batch size written into the graph, or None where it is free."""
    first = next(value for value in graph.graph.input if value.name in input_names(graph)[:1])
    axes = first.type.tensor_type.shape.dim
    return axes[0].dim_value if axes and axes[0].HasField("dim_value") else None


def is_transformer(graph: onnx.ModelProto) -> bool:
    """Whether there is layer normalisation or attention (a softmax that feeds a product of two activations)."""
    kinds = {node.op_type for node in graph.graph.node}
    if kinds & (_NORMALISATION | _ATTENTION):
        return True
    weights = {tensor.name for tensor in graph.graph.initializer}
    normalised = {node.output[0] for node in graph.graph.node if node.op_type == "Softmax"}
    return any(
        node.op_type == "MatMul" and normalised & set(node.input) and not weights & set(node.input)
        for node in graph.graph.node
    )


def carry_layers(original: onnx.ModelProto, result: onnx.ModelProto) -> None:
    """Write down which layers each node of the result stands for.

    A node kept its name, or the output of one it replaced or absorbed; what is new around it serves a layer: a
    quantised weight the layer that reads it, a quantised activation the layer that puts it out.
    """
    layers = provenance(original)
    by_output = {out: layers[node.name or node.output[0]] for node in original.graph.node for out in node.output}
    constant = {tensor.name for tensor in result.graph.initializer}
    found: dict[str, tuple[str, ...]] = {}
    readers: dict[str, str] = {}
    for node in result.graph.node:
        own = dict.fromkeys(layers.get(node.name, ()))
        own.update(dict.fromkeys(layer for out in node.output for layer in by_output.get(out, ())))
        found[node.output[0]] = tuple(own)
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.input[0] not in constant and not own:
            found[node.output[0]] = found.get(node.input[0], ())
        for name in node.input:
            readers.setdefault(name, node.output[0])
    for node in reversed(result.graph.node):  # in execution order, so a reader is settled before what it reads
        reader = next((readers[out] for out in node.output if out in readers), "")
        stands_for = found[node.output[0]] = found[node.output[0]] or found.get(reader, ())
        if stands_for:
            kept = [entry for entry in node.metadata_props if entry.key != KEY]
            del node.metadata_props[:]
            node.metadata_props.extend(kept)
            node.metadata_props.add(key=KEY, value=json.dumps(stands_for))


def nodes_by_layer(graph: onnx.ModelProto) -> dict[str, set[str]]:
    """Names of the nodes that stand for each layer, alone or among others."""
    found: dict[str, set[str]] = {}
    for node, layers in provenance(graph).items():
        for layer in layers:
            found.setdefault(layer, set()).add(node)
    return found


def gemms_as_matmuls(graph: onnx.ModelProto, *, subtract_bias: bool = False) -> onnx.ModelProto:
    """A copy in which a Gemm with a constant matrix is a MatMul of the same name, and an Add where it has a bias.

    ``alpha`` goes into the matrix, and a Gemm with a ``beta`` or a transposed input stays what it is.

    Parameters
    ----------
    subtract_bias
        Subtract a constant bias's negative instead, which gives the same bits: ONNX Runtime makes a Gemm again of a
        MatMul and an Add.
    """
    result, weights = onnx.ModelProto(), {tensor.name: tensor for tensor in graph.graph.initializer}
    result.CopyFrom(graph)
    del result.graph.node[:]
    added: dict[str, np.ndarray] = {}
    for node in graph.graph.node:
        settings = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        bias = node.input[2] if len(node.input) > 2 else ""
        plain = not settings.get("transA") and (not bias or settings.get("beta", 1.0) == 1.0)
        if node.op_type != "Gemm" or node.input[1] not in weights or not plain:
            result.graph.node.append(node)
            continue
        alpha, matrix = settings.get("alpha", 1.0), numpy_helper.to_array(weights[node.input[1]])
        # nodes that share a matrix go on sharing it
        name = node.input[1] + ("_transposed" if settings.get("transB") else "") + (f"_{alpha:g}" if alpha != 1 else "")
        added[name] = (matrix.T if settings.get("transB") else matrix) * matrix.dtype.type(alpha)
        product, operator = f"{node.output[0]}_product" if bias else node.output[0], "Add"
        parts = [helper.make_node("MatMul", [node.input[0], name], [product], name=node.name)]
        if bias in weights and subtract_bias:
            added[f"{bias}_negative"] = -numpy_helper.to_array(weights[bias])
            bias, operator = f"{bias}_negative", "Sub"
        if bias:
            parts.append(helper.make_node(operator, [product, bias], [node.output[0]], name=f"{node.name}_bias"))
        for part in parts:
            part.metadata_props.extend(node.metadata_props)
        result.graph.node.extend(parts)
    made = [numpy_helper.from_array(np.ascontiguousarray(v), n) for n, v in added.items() if n not in weights]
    result.graph.initializer.extend(made)
    drop_unread_weights(result)
    return result


def drop_unread_weights(graph: onnx.ModelProto) -> None:
    """Without weights that no node reads."""
    read = {name for node in graph.graph.node for name in node.input} | {value.name for value in graph.graph.output}
    kept = [tensor for tensor in graph.graph.initializer if tensor.name in read]
    del graph.graph.initializer[:]
    graph.graph.initializer.extend(kept)


def tidied(result: onnx.ModelProto, original: onnx.ModelProto) -> onnx.ModelProto:
    """A quantiser's result under the original's name, with its layers, and without operator sets nothing refers to."""
    result.graph.name, result.graph.doc_string = original.graph.name, original.graph.doc_string
    drop_unused_domains(result)
    carry_layers(original, result)
    return result


def drop_unused_domains(graph: onnx.ModelProto) -> None:
    """Without operator sets that no node refers to: a reader that lacks one would refuse the graph."""
    used = {"" if node.domain == "ai.onnx" else node.domain for node in graph.graph.node} | {""}
    kept = [opset for opset in graph.opset_import if opset.domain in used]
    del graph.opset_import[:]
    graph.opset_import.extend(kept)


def opset(graph: onnx.ModelProto) -> int:
    """Version of ONNX's own operators."""
    return next(entry.version for entry in graph.opset_import if entry.domain in ("", "ai.onnx"))

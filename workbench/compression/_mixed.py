"""Which layers of a graph are quantised and which stay float, and what that cost."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, Protocol

import onnx

from workbench.compression._calibration import Reference
from workbench.compression._onnx_graph import nodes_by_layer
from workbench.errors import StepError
from workbench.jobs import SILENT, Progress
from workbench.models.provenance import provenance

_WEIGHTED = ("Conv", "ConvTranspose", "Gather", "Gemm", "MatMul")


class Quantiser(Protocol):
    """What quantises all of a graph, or some of its nodes.

    Attributes
    ----------
    graph
        The float graph as it is quantised, every node named.
    reference
        What it puts out for calibration samples.
    """

    graph: onnx.ModelProto
    reference: Reference

    def quantised(self, without: Collection[str] = (), only: Collection[str] = ()) -> onnx.ModelProto:
        """The quantised graph; nodes `without` stay float, and all but `only`, where any are given."""


def kept_nodes(quantiser: Quantiser, layers: Collection[str]) -> set[str]:
    """Nodes that stand for any of these layers."""
    nodes = nodes_by_layer(quantiser.graph)
    return {node for layer in layers for node in nodes.get(layer, ())}


def cheapest_to_keep(
    quantiser: Quantiser,
    count: int,
    *,
    given: Mapping[str, str],
    step: str,
    progress: Progress = SILENT,
) -> list[dict[str, Any]]:
    """The layers whose quantisation alone costs most output SQNR, and what it costs for each layer with a weight.

    Parameters
    ----------
    count
        How many stay float.
    given
        Layers whose precision is settled; they are not tried.
    step
        Label for the error.

    Returns
    -------
    list of dict
        A row each, in execution order: layer, sqnr_db (None where the outputs are equal), precision (``fp32`` for
        those to keep).

    Raises
    ------
    StepError
        If there are not more layers than are to be kept.
    """
    alone = _weighted_layers(quantiser, given)
    if count >= len(alone):
        raise StepError(
            f"{step}: keep_float is {count}, and there are {len(alone)} layers to choose from, of which at least one "
            "is to be quantised. Give a smaller number."
        )
    costs = {}
    for done, (layer, nodes) in enumerate(alone.items()):
        progress(done / len(alone), f"{layer} alone, {done} of {len(alone)} layers")
        costs[layer] = quantiser.reference.sqnr_db(quantiser.quantised(only=nodes))
    kept = sorted(costs, key=costs.__getitem__)[:count]
    return [
        {"layer": layer, "sqnr_db": finite(cost), "precision": "fp32" if layer in kept else "quantised"}
        for layer, cost in costs.items()
    ]


def by_operator(graph: onnx.ModelProto, result: onnx.ModelProto) -> list[dict[str, Any]]:
    """Of each operator of the float graph, how many nodes are quantised and how many are left float."""
    done = quantised_nodes(graph, result)
    kinds = dict.fromkeys(node.op_type for node in graph.graph.node)
    rows = {kind: {"operator": kind, "quantised": 0, "float": 0} for kind in kinds}
    for node in graph.graph.node:
        rows[node.op_type]["quantised" if node.name in done else "float"] += 1
    return list(rows.values())


def quantised_nodes(graph: onnx.ModelProto, result: onnx.ModelProto) -> set[str]:
    """Nodes of the float graph that compute with quantised values in the result.

    They were replaced, or went into the range of the node before, or read a quantised weight; or all they read is
    quantised and, unless they are products, what they put out as well.
    """
    weights = {tensor.name for tensor in result.graph.initializer}
    sources = {node.output[0]: node.input[0] for node in result.graph.node if node.op_type == "DequantizeLinear"}
    rounded = {node.input[0] for node in result.graph.node if node.op_type == "QuantizeLinear"}
    left = {(node.name, node.op_type): node for node in result.graph.node}

    def is_quantised(now: onnx.NodeProto) -> bool:
        if any(sources.get(name) in weights for name in now.input):
            return True
        product = now.op_type in _WEIGHTED
        read = now.input[:2] if product else [name for name in now.input if name and name not in weights]
        return bool(read) and all(name in sources for name in read) and (product or now.output[0] in rounded)

    left_as = ((node.name, left.get((node.name, node.op_type))) for node in graph.graph.node)
    return {name for name, now in left_as if now is None or is_quantised(now)}


def finite(decibels: float) -> float | None:
    """None where there is no ratio: two outputs that are equal, or all zero."""
    return decibels if math.isfinite(decibels) else None


def _weighted_layers(quantiser: Quantiser, given: Mapping[str, str]) -> dict[str, set[str]]:
    """Nodes by layer, for layers that own a product or a table that would be quantised, in execution order."""
    everything = quantised_nodes(quantiser.graph, quantiser.quantised())
    layers, nodes = provenance(quantiser.graph), nodes_by_layer(quantiser.graph)
    owners = dict.fromkeys(
        layers[node.name][0]
        for node in quantiser.graph.graph.node
        if node.op_type in _WEIGHTED and node.name in everything
    )
    return {layer: nodes[layer] for layer in owners if layer not in given}

"""Which layers of the module each node of an ONNX graph stands for, and node names that say so.

Engines report their own kernels under the names of nodes or of tensors, so both are written as ``<layer>/<operator>``:
``layer1.0.conv1/Conv`` puts out ``layer1.0.conv1/Conv_out``. What a node stands for beyond its name, such as the batch
normalisation folded into it, is kept in its metadata under `KEY`.
"""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import onnx
import onnx_ir as ir

KEY = "workbench.layers"
_SCOPES = "pkg.torch.onnx.name_scopes"
_CLASSES = "pkg.torch.onnx.class_hierarchy"
_KEPT = (_SCOPES, _CLASSES)

# what torch.onnx calls a parameter after its module
_PARAMETERS = {"weight", "bias", "in_proj_weight", "in_proj_bias", "kernel", "gamma", "beta"}


@dataclass(frozen=True)
class Origin:
    """One node of a graph before it was optimised: its layer, its operator, and the names of what it reads."""

    order: int
    layer: str
    operator: str
    inputs: tuple[str, ...]


def provenance(graph: onnx.ModelProto) -> dict[str, tuple[str, ...]]:
    """Layers each node stands for, the one that gave it its name first.

    A graph of ours says so itself. For any other, in this order: the name scopes `torch.onnx` leaves in the metadata;
    a node name made of a path and the operator; the name of its weight; for quantisers and casts, the node they serve;
    else the node's own name.

    Returns
    -------
    dict
        By node name, or by the first output of a node without one.
    """
    weights = {t.name for t in graph.graph.initializer}
    found = {_name(node): _said(node) or _guessed(node, weights) for node in graph.graph.node}
    producers = {name: node for node in graph.graph.node for name in node.output}
    consumers: dict[str, onnx.NodeProto] = {}
    for node in graph.graph.node:
        for name in node.input:
            consumers.setdefault(name, node)
    for node in graph.graph.node:
        if not found[_name(node)]:
            found[_name(node)] = _served(node, found, producers, consumers) or (_name(node),)
    return found


def leaves(model: ir.Model, paths: Collection[str]) -> dict[str, bool]:
    """Which modules call no other module: those are the layers, even where they own parts, as attention does.

    Parameters
    ----------
    model
        As exported, before optimisation.
    paths
        Of all modules.

    Returns
    -------
    dict
        By path; a module that was never called is none.
    """
    called = {path for node in model.graph for path in _scopes(node.metadata_props)[0][:-1]}
    # every level above a call, containers that are not called themselves included
    above = {path.rsplit(".", i)[0] for path in called for i in range(1, path.count(".") + 1)} | {""}
    return {path: path in called and path not in above for path in paths}


def layer_of(model: ir.Model, paths: Collection[str], known: Mapping[str, str]) -> Callable[[ir.Node], str]:
    """A function that gives the layer of a node as exported or kept by the optimiser; empty where it has none.

    Parameters
    ----------
    model
        As exported, before optimisation.
    paths
        Of all modules.
    known
        Layers by name of the node in torch's graph. A node that is not among them belongs to the module it ran in where
        that is a layer, and else to none: it computes with lengths, or which operation it is cannot be told.
    """
    modules = leaves(model, paths)
    found = dict(known)
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        layer = _scoped_layer(node.metadata_props, modules)
        found.setdefault(_traced_name(node), layer if modules.get(layer) else "")
    return lambda node: found.get(_traced_name(node), "")


def snapshot(model: ir.Model, layer: Callable[[ir.Node], str]) -> dict[str, Origin]:
    """Each value's origin in a graph before optimisation; `layer` is what `layer_of` made."""
    origins = {}
    for order, node in enumerate(model.graph):
        origin = Origin(order, layer(node), node.op_type, _names(node.inputs))
        origins.update((value.name, origin) for value in node.outputs)
    return origins


def layers_after(
    model: ir.Model, origins: Mapping[str, Origin], layer: Callable[[ir.Node], str]
) -> Callable[[ir.Node], tuple[str, ...]]:
    """A function that gives the layers of a node of the optimised graph: those of every node it replaced.

    A node replaced those that lay between what it reads and what it writes.
    """
    alive = {value.name for node in model.graph for value in node.outputs}

    def layers(node: ir.Node) -> tuple[str, ...]:
        reads = set(_names(node.inputs))
        found: dict[int, Origin] = {}
        for value in node.outputs:
            _between(value.name, reads, alive - {value.name}, origins, found)
        own = layer(node)
        # what did the same before comes first: a convolution is named after itself, not the dropout it swallowed
        ordered = sorted(found.values(), key=lambda origin: (origin.operator != node.op_type, origin.order))
        unique = dict.fromkeys(origin.layer for origin in ordered if origin.layer)
        return tuple(unique) or ((own,) if own else ())

    return layers


def layers_by_name(model: ir.Model, paths: Collection[str]) -> Callable[[ir.Node], tuple[str, ...]]:
    """The same for the older exporter, whose nodes are called ``/layer1/layer1.0/conv1/Conv``.

    It numbers its own operators, not torch's: where a module's operator repeats, each keeps the exporter's name
    (``layer1.0.Relu_1``), because which of torch's it was cannot be told.
    """
    nodes = list(ir.traversal.RecursiveGraphIterator(model.graph))
    counts = Counter(_split(node.name or "") for node in nodes)

    def layers(node: ir.Node) -> tuple[str, ...]:
        path, operator = _split(node.name or "")
        if path in paths and path:
            return (path,)
        if not (node.name or "").startswith("/"):
            return ()
        stem = f"{path}." if path else ""
        alone = counts[path, operator] == 1 and stem + operator.lower() not in paths
        return (stem + (operator.lower() if alone else node.name.rpartition("/")[2]),)

    return layers


def rename(model: ir.Model, layers: Callable[[ir.Node], tuple[str, ...]], kept: Collection[str]) -> None:
    """Name nodes and tensors after their layers, write the provenance down, and drop what is private or bulky.

    Parameters
    ----------
    model
        Changed in place.
    layers
        Gives the layers of one node.
    kept
        Names of inputs, outputs and parameters, which stay as they are.
    """
    taken, kept = set(kept), set(kept)
    nodes = list(ir.traversal.RecursiveGraphIterator(model.graph))
    for node in nodes:
        stands_for = layers(node)
        node.name = _unique("/".join((*stands_for[:1], node.op_type)), taken)
        node.doc_string = ", ".join(stands_for)
        scopes = {key: node.metadata_props[key] for key in _KEPT if key in node.metadata_props}
        node.metadata_props.clear()
        if stands_for:
            node.metadata_props.update({**scopes, KEY: json.dumps(stands_for)})
    for node in nodes:
        for i, value in enumerate(node.outputs):
            if value.name not in kept:
                value.name = _unique(f"{node.name}_out" + (f"_{i}" if i else ""), taken)
        for value in node.inputs:
            if value is not None and value.is_initializer() and value.name not in kept:
                value.name = _unique(f"{node.name}_const", taken)
                kept.add(value.name)
    _strip(model)


def rename_batch(model: ir.Model, name: str = "batch") -> bool:
    """Call the first axis of every input `name`, wherever it appears; False if it is a fixed number in any input."""
    symbols = set()
    for value in model.graph.inputs:
        first = value.shape[0] if value.shape else None
        if not isinstance(first, ir.SymbolicDim) or first.value is None:
            return False
        symbols.add(first.value)
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, symbols)) + r")\b")
    for value in _values(model):
        if value.shape is None:
            continue
        dims = [
            ir.SymbolicDim(pattern.sub(name, d.value)) if isinstance(d, ir.SymbolicDim) and d.value else d
            for d in value.shape
        ]
        value.shape = ir.Shape(dims)
    return True


def _between(
    name: str, reads: set[str], alive: set[str], origins: Mapping[str, Origin], found: dict[int, Origin]
) -> bool:
    """Collect the origins on every way back from a value to what is read; whether there is such a way."""
    if name in reads:
        return True
    origin = origins.get(name)
    if origin is None or name in alive:
        return False
    if origin.order in found:
        return True
    # all of them, where a generator would stop at the first
    ways = [_between(source, reads, alive, origins, found) for source in origin.inputs]
    if any(ways):
        found[origin.order] = origin
        return True
    return False


def _scoped_layer(metadata: Mapping[str, str], modules: Mapping[str, bool] | None) -> str:
    """The layer in a node's name scopes: its module, followed by the operation where the module calls others.

    `modules` is what `leaves` says of them; None where the module is not at hand.
    """
    scopes, classes = _scopes(metadata)
    if len(scopes) < 2:
        return ""
    # tracing adds scopes of its own, which are no modules
    called = (scope.partition("@")[0] for scope in reversed(scopes[:-1]))  # a second call is numbered so
    path = next((p for p in called if modules is None or p in modules), "")
    if path and (_is_layer(classes) if modules is None else modules[path]):
        return path
    parts = classes[-1].split(".") if classes else []
    operation = parts[1] if len(parts) > 1 else re.sub(r"_\d+$", "", scopes[-1])
    return ".".join(part for part in (path, operation.strip("_<> ")) if part)


def _traced_name(node: ir.Node) -> str:
    """Name in torch's graph of what a node was made from."""
    scopes, _ = _scopes(node.metadata_props)
    return scopes[-1] if scopes else ""


def _scopes(metadata: Mapping[str, str]) -> tuple[list[str], list[str]]:
    try:
        return ast.literal_eval(metadata.get(_SCOPES, "[]")), ast.literal_eval(metadata.get(_CLASSES, "[]"))
    except (ValueError, SyntaxError):
        return [], []


def _is_layer(classes: list[str]) -> bool:
    """Whether the innermost class is one of torch's own layers, which are childless for the most part."""
    return len(classes) > 1 and classes[-2].startswith("torch.nn.modules.") and ".container." not in classes[-2]


def _said(node: onnx.NodeProto) -> tuple[str, ...]:
    metadata = {p.key: p.value for p in node.metadata_props}
    if KEY in metadata:
        try:
            layers = json.loads(metadata[KEY])
        except json.JSONDecodeError:
            layers = None
        if isinstance(layers, list) and layers and all(isinstance(layer, str) for layer in layers):
            return tuple(layers)
    layer = _scoped_layer(metadata, None)
    return (layer,) if layer else ()


def _guessed(node: onnx.NodeProto, weights: Collection[str]) -> tuple[str, ...]:
    path, _ = _split(node.name, node.op_type)
    if path:
        return (path,)
    for name in node.input:
        owner, _, last = name.rpartition(".")
        if name in weights and owner and last in _PARAMETERS:
            return (owner,)
    return ()


def _split(name: str, operator: str = "") -> tuple[str, str]:
    """``/layer1/layer1.0/conv1/Conv_2`` as ``layer1.0.conv1`` and ``Conv``; an empty path for any other form."""
    *scopes, last = name.strip("/").split("/")
    last = re.sub(r"_\d+$", "", last)
    # quantised forms keep the name of the operator they replace
    if operator and not (last == operator or operator.endswith(last) or last.removesuffix("_quant") in operator):
        return "", last
    path = ""
    for scope in scopes:
        path = scope if not path or scope.startswith(f"{path}.") else f"{path}.{scope}"
    return path, last


def _served(
    node: onnx.NodeProto,
    found: Mapping[str, tuple[str, ...]],
    producers: Mapping[str, onnx.NodeProto],
    consumers: Mapping[str, onnx.NodeProto],
) -> tuple[str, ...]:
    """For a node that only changes how numbers are written: the layers of what it reads from, or else writes to."""
    if node.op_type not in ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "Cast", "Identity"):
        return ()
    before, seen = node, set()
    while before is not None and before.input and _name(before) not in seen:
        seen.add(_name(before))
        before = producers.get(before.input[0])
        if before is not None and found[_name(before)]:
            return found[_name(before)]
    after, seen = node, set()
    while after is not None and after.output and _name(after) not in seen:
        seen.add(_name(after))
        after = consumers.get(after.output[0])
        if after is not None and found[_name(after)]:
            return found[_name(after)]
    return ()


def _name(node: onnx.NodeProto) -> str:
    return node.name or (node.output[0] if node.output else node.op_type)


def _names(values: Iterable[ir.Value | None]) -> tuple[str, ...]:
    return tuple(value.name for value in values if value is not None and value.name)


def _unique(wanted: str, taken: set[str]) -> str:
    name, number = wanted, 0
    while name in taken:
        number += 1
        name = f"{wanted}_{number}"
    taken.add(name)
    return name


def _values(model: ir.Model) -> Iterable[ir.Value]:
    yield from model.graph.inputs
    yield from model.graph.initializers.values()
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        yield from node.outputs


def _strip(model: ir.Model) -> None:
    """Drop what holds paths of the machine that exported, or repeats the graph."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for value in _values(model):
        value.metadata_props.clear()

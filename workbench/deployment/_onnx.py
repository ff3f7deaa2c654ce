"""What the backends that run ONNX graphs have in common."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import onnx
from google.protobuf.message import EncodeError

from workbench.deployment._base import reason
from workbench.errors import BackendError
from workbench.models import export
from workbench.models.model import Model, TensorSpec


def serialized(model: Model, title: str) -> bytes:
    """The model's ONNX graph as bytes.

    Raises
    ------
    BackendError
        If it is past the 2 GB that one ONNX file can hold.
    """
    try:
        return model.onnx().SerializeToString()
    except (ValueError, EncodeError) as error:
        raise BackendError(
            f"{model.name} does not fit one ONNX file, which holds at most 2 GB: {error}. {title} cannot take it; "
            "compress the model first, or use wb.Eager()."
        ) from None


def example_arrays(model: Model) -> tuple[np.ndarray, ...]:
    """The model's example inputs as numpy arrays, in order."""
    return tuple(np.ascontiguousarray(value.detach().cpu().numpy()) for value in model.example.values())


def output_specs(names: Sequence[str], arrays: Sequence[np.ndarray], batch: int) -> tuple[TensorSpec, ...]:
    """Specification of each output, from what one call with `batch` samples gave."""
    return tuple(
        TensorSpec(name, tuple(None if i == 0 and n == batch else n for i, n in enumerate(a.shape)), a.dtype.name)
        for name, a in zip(names, arrays, strict=True)
    )


def wanted_inputs(asked: Sequence[str], specs: Sequence[TensorSpec], title: str) -> list[int]:
    """Position among `specs` of each input the engine asks for; a graph may ignore some of the model's inputs.

    Raises
    ------
    BackendError
        If the engine asks for an input the model does not have.
    """
    known = [spec.name for spec in specs]
    for name in asked:
        if name not in known:
            raise BackendError(
                f"{title} asks for an input {name!r} that the model does not have ({', '.join(known)}). Load the model "
                "with wb.load(…, inputs={name: array, …}), one array for each input of the graph."
            )
    return [known.index(name) for name in asked]


def refusal(title: str, name: str, graph: onnx.ModelProto, error: Exception) -> BackendError:
    """What to raise where an engine does not take a graph: the operation and the layer, in the engine's own reason."""
    why = reason(error)
    return BackendError(
        f"{title} cannot run {name}{_culprit(graph, why)}: {why} "
        "Another backend may: wb.Eager() runs every model that has a torch module."
    )


def first_product(model: Model) -> str:
    """The first convolution or matrix product of a model, in words: ``Conv2d (layer conv1)``."""
    if model.module is not None:
        for path, module in model.module.named_modules():
            kind = type(module).__name__
            if re.match(r"Conv|Linear", kind) and not list(module.children()):
                return f"{kind} (layer {path})"
        return "its products"
    where = export.provenance(model.onnx())
    for node in model.onnx().graph.node:
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            return f"{node.op_type} ({_layers(where.get(node.name, ())) or f'node {node.name}'})"
    return "its products"


def _culprit(graph: onnx.ModelProto, why: str) -> str:
    """The node the reason speaks of, with its layer: by its name, or else the first of an operation it names."""
    named = [n for n in graph.graph.node if n.name and _mentions(why, n.name)]
    node = max(named, key=lambda n: len(n.name), default=None)
    if node is None:
        # engines write the operation's domain before it
        operations = re.sub(r"[\w.]+[.:](?=\w)", "", why)
        node = next((n for n in graph.graph.node if _mentions(operations, n.op_type)), None)
    if node is None:
        return ""
    layers = _layers(export.provenance(graph).get(node.name, ()))
    return f" because of {node.op_type}" + (f" ({layers})" if layers else f" (node {node.name})" if node.name else "")


def _mentions(text: str, word: str) -> bool:
    return re.search(rf"(?<![\w./]){re.escape(word)}(?![\w/])", text) is not None


def _layers(layers: Sequence[str]) -> str:
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(layers)}" if layers else ""

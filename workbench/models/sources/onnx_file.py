"""An ONNX file."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError
from onnx import TensorProto, checker, helper, shape_inference
from onnx.external_data_helper import load_external_data_for_model
from torch import Tensor

from workbench.errors import LoadError, nearest
from workbench.models import inputs
from workbench.models.model import Model
from workbench.models.sources._base import Request

TITLE = "An ONNX file"
OPTIONS = {"inputs"}

_TYPED = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data")
# several numbers in one stored, or one in several
_PACKED = {
    TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT4E2M1, TensorProto.COMPLEX64, TensorProto.COMPLEX128
}  # fmt: skip
_EXAMPLES = 2  # samples of the example made up for an open batch axis


def fits(request: Request) -> bool:
    """A file by its ending."""
    return request.suffix == ".onnx"


def read(request: Request) -> Model:
    """The graph, checked, with shapes inferred and a name for every node."""
    graph = _parsed(request)
    _check_sizes(graph, request)
    _load_external(graph, request)
    stored = {t.name for t in graph.graph.initializer}
    declared = [value for value in graph.graph.input if value.name not in stored]
    if not declared:
        raise LoadError(f"{request.path} takes no inputs; its output is a constant.")
    example = _given(request, declared) if request.inputs is not None else _made_up(request, declared)
    inputs.check(example, request.title)
    _settle_ranks(declared, example)
    graph = _checked(graph, request)
    _name_nodes(graph)
    return Model(request.title, example, graph=graph, source=request.path.name, weights="as given")


def _parsed(request: Request) -> onnx.ModelProto:
    try:
        graph = onnx.load(request.path, load_external_data=False)
    except (DecodeError, OSError, ValueError) as error:
        raise request.damaged(f"it does not parse as ONNX ({error})") from error
    if not graph.graph.node:
        raise request.damaged("it parses to a graph without nodes")
    return graph


def _tensors(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    """Every stored tensor, those in attributes and inner graphs included."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _tensors(inner)


def _bytes(tensor: TensorProto) -> int | None:
    """Bytes the declared shape asks for; None for strings."""
    if tensor.data_type == TensorProto.STRING:
        return None
    bits = 4 if tensor.data_type in (TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT4E2M1) else 0
    count = math.prod(tensor.dims)
    return (count * bits + 7) // 8 if bits else count * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def _check_sizes(graph: onnx.ModelProto, request: Request) -> None:
    """Refuse a tensor whose shape asks for other than what is stored, before anything is allocated for it."""
    for tensor in _tensors(graph.graph):
        if any(dim < 0 for dim in tensor.dims):
            raise LoadError(f"{request.path}: tensor {tensor.name} has the impossible shape {tuple(tensor.dims)}.")
        try:
            wanted = _bytes(tensor)
        except KeyError:
            raise LoadError(
                f"{request.path}: tensor {tensor.name} is of the unknown type {tensor.data_type}."
            ) from None
        if wanted is None or tensor.data_location == TensorProto.EXTERNAL:
            continue
        if tensor.HasField("raw_data"):
            held, unit = len(tensor.raw_data), "bytes"
        else:
            held, unit = max(len(getattr(tensor, field)) for field in _TYPED), "numbers"
            wanted = math.prod(tensor.dims) if tensor.data_type not in _PACKED else held
        if held != wanted:
            raise LoadError(
                f"{request.path}: tensor {tensor.name} has shape {tuple(tensor.dims)}, which takes {wanted:,} {unit}, "
                f"but the file holds {held:,}. Save or download it again."
            )


def _load_external(graph: onnx.ModelProto, request: Request) -> None:
    """Read weights kept in files beside the graph, none of which may lie outside its folder."""
    folder = request.path.resolve().parent
    outside = [t for t in _tensors(graph.graph) if t.data_location == TensorProto.EXTERNAL]
    for tensor in outside:
        entry = {e.key: e.value for e in tensor.external_data}
        location = entry.get("location", "")
        file = (folder / location).resolve()
        if not location or Path(location).is_absolute() or not file.is_relative_to(folder):
            raise LoadError(
                f"{request.path}: tensor {tensor.name} wants its data from {location!r}, outside the model's folder; "
                "that is refused. Save the model with its data beside it."
            )
        if not file.is_file():
            raise LoadError(
                f"{request.path}: the weights of {tensor.name} are in {location!r}, which is missing. Put that file "
                "beside the model."
            )
        try:
            offset = int(entry.get("offset", 0))
            length = int(entry.get("length", file.stat().st_size - offset))
        except ValueError:
            raise request.damaged(f"offset or length of {tensor.name} is no number") from None
        wanted = _bytes(tensor)
        if offset < 0 or length != wanted or offset + length > file.stat().st_size:
            held = max(0, min(length, file.stat().st_size - offset))
            raise LoadError(
                f"{request.path}: tensor {tensor.name} of shape {tuple(tensor.dims)} takes {wanted} bytes, but "
                f"{location!r} has {held} for it. Save or download both again."
            )
    if outside:
        load_external_data_for_model(graph, str(folder))


def _settle_ranks(declared: list[onnx.ValueInfoProto], example: dict[str, Tensor]) -> None:
    """Give an input declared without any shape as many axes as its example has, all of them open."""
    for value in declared:
        if not value.type.tensor_type.HasField("shape"):
            for axis in range(example[value.name].ndim):
                value.type.tensor_type.shape.dim.add().dim_param = "batch" if axis == 0 else f"{value.name}_{axis}"


def _checked(graph: onnx.ModelProto, request: Request) -> onnx.ModelProto:
    try:
        graph = shape_inference.infer_shapes(graph, data_prop=True)
        unknown = [v for v in graph.graph.output if not v.type.tensor_type.HasField("shape")]
        for value in unknown:  # the checker insists on what custom operators leave unsaid
            value.type.tensor_type.shape.SetInParent()
        checker.check_model(graph)
        for value in unknown:
            value.type.tensor_type.ClearField("shape")
        # operators outside the standard have no inference, so that a strict one would refuse what follows them
        if all(node.domain in ("", "ai.onnx", "ai.onnx.ml") for node in graph.graph.node):
            graph = shape_inference.infer_shapes(graph, check_type=True, strict_mode=True, data_prop=True)
        return graph
    except (checker.ValidationError, shape_inference.InferenceError, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = " ".join(lines[:2]) if lines else type(error).__name__
        raise LoadError(f"{request.path} is no valid ONNX graph: {reason.rstrip('.')}. Export it again.") from error


def _name_nodes(graph: onnx.ModelProto) -> None:
    """A name of its own for every node, which profiles need; names that are there stay."""
    taken: set[str] = set()
    for i, node in enumerate(graph.graph.node):
        name = node.name or f"{node.op_type}_{i}"
        while name in taken:
            name = f"{name}_{i}"
        node.name = name
        taken.add(name)


def _shape(value: onnx.ValueInfoProto, request: Request) -> list[int | None] | None:
    kind = value.type.WhichOneof("value")
    if kind != "tensor_type":
        kind = (kind or "value").removesuffix("_type")
        raise LoadError(f"{request.path}: input {value.name} is a {kind}; only tensors can be given.")
    if not value.type.tensor_type.HasField("shape"):
        return None
    return [
        d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else None for d in value.type.tensor_type.shape.dim
    ]


def _dtype(value: onnx.ValueInfoProto, request: Request) -> torch.dtype:
    kind = value.type.tensor_type.elem_type
    if kind == TensorProto.BFLOAT16:
        return torch.bfloat16
    try:
        return torch.from_numpy(np.zeros(1, helper.tensor_dtype_to_np_dtype(kind))).dtype
    except (KeyError, TypeError):
        name = TensorProto.DataType.Name(kind).lower()
        raise LoadError(
            f"{request.path}: input {value.name} is of type {name}, which no tensor here can hold."
        ) from None


def _made_up(request: Request, declared: list[onnx.ValueInfoProto]) -> dict[str, Tensor]:
    """Noise of the declared shapes; ids are zeros, which every table has."""
    noise = torch.Generator().manual_seed(0)
    example = {}
    for value in declared:
        shape = _shape(value, request)
        if shape is None or None in shape[1:]:
            what = "any number of axes" if shape is None else "axes of open length besides the batch"
            raise LoadError(
                f"{request.path}: input {value.name} has {what}; give one batch of real inputs: "
                f"wb.load({request.path.name!r}, inputs={{{value.name!r}: …}})."
            )
        if not shape:
            raise LoadError(f"{request.path}: input {value.name} is a single number; inputs need a batch axis.")
        size, dtype = (shape[0] or _EXAMPLES, *shape[1:]), _dtype(value, request)
        example[value.name] = (
            torch.rand(size, generator=noise).to(dtype) if dtype.is_floating_point else torch.zeros(size, dtype=dtype)
        )
    return example


def _given(request: Request, declared: list[onnx.ValueInfoProto]) -> dict[str, Tensor]:
    """The caller's inputs, held against what the graph declares."""
    names = [value.name for value in declared]
    given = request.inputs
    if not isinstance(given, dict):
        listed = list(given) if isinstance(given, (tuple, list)) else [given]
        if len(listed) != len(names):
            raise LoadError(
                f"{request.path} takes {len(names)} inputs ({', '.join(names)}), but {len(listed)} are given."
            )
        given = dict(zip(names, listed, strict=True))
    for name in given:
        if name not in names:
            raise LoadError(f"{request.path} has no input {name!r}. {nearest(str(name), names)}")
    example = {}
    for value in declared:
        if value.name not in given:
            raise LoadError(
                f"{request.path} also takes the input {value.name!r}; give inputs= all of {', '.join(names)}."
            )
        tensor = inputs.tensor(given[value.name], f"inputs[{value.name!r}]")
        shape, dtype = _shape(value, request), _dtype(value, request)
        fits = shape is None or (
            len(shape) == tensor.ndim and all(n in (None, m) for n, m in zip(shape, tensor.shape, strict=True))
        )
        if not fits or tensor.dtype != dtype:
            axes = "any shape" if shape is None else "(" + ", ".join("N" if n is None else str(n) for n in shape) + ")"
            raise LoadError(
                f"{request.path}: input {value.name} is {str(dtype).removeprefix('torch.')} {axes}, but "
                f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)} is given."
            )
        example[value.name] = tensor
    return example

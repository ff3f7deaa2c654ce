"""The tensors a model keeps, as bit patterns: what a file of weights holds, whatever their dtypes are."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from workbench.models.model import Model

_FOUR_BITS = (TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT4E2M1)
_INTEGERS = ("int", "uint", "bool")


@dataclass(frozen=True, eq=False)
class Stored:
    """One tensor of a model.

    Attributes
    ----------
    name
        In the state dict, or of the initialiser.
    dtype
        torch's or numpy's word for it.
    shape
        Empty for a single number.
    bits
        Of one element where all are written one after another.
    patterns
        ``(n,)``, unsigned, as wide as an element in memory.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    bits: int
    patterns: np.ndarray

    @property
    def is_weight(self) -> bool:
        """Whether it has two axes or more: not a bias, a statistic, a scale."""
        return len(self.shape) >= 2

    @property
    def dense_bytes(self) -> int:
        """As it is written without any compression."""
        return math.ceil(self.patterns.size * self.bits / 8)

    @property
    def without_negative_zeros(self) -> np.ndarray:
        """`patterns` with -0.0, which masks leave behind, as the 0.0 that it is equal to."""
        if self.dtype.startswith(_INTEGERS) or self.bits < 8:
            return self.patterns
        negative = self.patterns.dtype.type(1 << (8 * self.patterns.itemsize - 1))
        return np.where(self.patterns == negative, self.patterns.dtype.type(0), self.patterns)


def stored(model: Model) -> list[Stored]:
    """Parameters and buffers of a module, or the initialisers of a graph, each once; words are left out."""
    if model.module is not None:
        return [_of_torch(name, tensor) for name, tensor in _state(model.module)]
    return [_of_onnx(tensor) for tensor in _initialisers(model.graph)]


def with_patterns(model: Model, patterns: Mapping[str, np.ndarray]) -> Model:
    """A copy of `model` whose tensors are these; `patterns` has each that `stored` lists, in its size and dtype."""
    if model.module is None:
        graph = onnx.ModelProto()
        graph.CopyFrom(model.graph)
        for tensor in _initialisers(graph):
            dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
            values = patterns[tensor.name].view(dtype).reshape(tuple(tensor.dims))
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
        return replace(model, graph=graph)
    with torch.inference_mode(False), torch.no_grad():
        module = copy.deepcopy(model.module)
        for name, tensor in _state(module):
            values = torch.from_numpy(patterns[name].view(np.uint8)).view(tensor.dtype)
            tensor.copy_(values.view(tensor.shape))
    return replace(model, module=module, graph=None)


def _state(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The state dict with what is at several places, as tied weights are, at the first alone."""
    seen: set[int] = set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


def _initialisers(graph: onnx.ModelProto) -> Iterator[TensorProto]:
    return (tensor for tensor in graph.graph.initializer if tensor.data_type != TensorProto.STRING)


def _of_torch(name: str, tensor: torch.Tensor) -> Stored:
    plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    size = tensor.element_size()
    return Stored(
        name=name,
        dtype=str(tensor.dtype).removeprefix("torch."),
        shape=tuple(tensor.shape),
        bits=8 * size,
        patterns=_unsigned(plain, size),
    )


def _of_onnx(tensor: TensorProto) -> Stored:
    values = numpy_helper.to_array(tensor)
    return Stored(
        name=tensor.name,
        dtype=values.dtype.name,
        shape=values.shape,
        bits=4 if tensor.data_type in _FOUR_BITS else 8 * values.itemsize,
        patterns=_unsigned(np.ascontiguousarray(values).reshape(-1).view(np.uint8), values.itemsize),
    )


def _unsigned(plain: np.ndarray, size: int) -> np.ndarray:
    # complex128 is two patterns an element
    return plain.view(f"<u{min(size, 8)}").copy()

"""The short kernels that ceilings are measured on, each as a model of its own: a module, or an ONNX graph.

Each takes one number and gives few, so that what goes in and out of the engine costs next to nothing; the large tensors
are made inside.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import torch
from onnx import helper
from torch import Tensor, nn
from torch.nn import functional

from workbench.models.model import Model

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_LEAST_BYTES, _MOST_BYTES = 2**27, 2**30
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_STEP, _ZERO = np.float32(1 / 32), np.uint8(128)  # of quantised activations that spread about 0 by 1


class Size(NamedTuple):
    """How large the kernels are: long enough on their kind of device that starting one does not count.

    Attributes
    ----------
    side
        Of the square matrices that are multiplied.
    images, channels, pixels
        Shape of what is convolved: (images, channels, pixels, pixels).
    chain
        Products or convolutions one after another in one call.
    stream
        Side of the square matrix that is read once, float32.
    passes
        How often it is read in one call.
    """

    side: int
    images: int
    channels: int
    pixels: int
    chain: int
    stream: int
    passes: int


@dataclass(frozen=True)
class Kernel:
    """A model to time.

    Attributes
    ----------
    operations
        Of one call, two per multiply-accumulate.
    numbers
        How many numbers one call moves between processor and memory at the least, however it is run.
    """

    name: str
    model: Model
    operations: float = 0
    numbers: float = 0


def size(accelerated: bool) -> Size:
    """The size for a processor, or for an accelerator beside it."""
    if accelerated:
        return Size(side=8192, images=32, channels=512, pixels=56, chain=4, stream=16384, passes=8)
    wanted = min(max(4 * _last_level_cache_bytes(), _LEAST_BYTES), _MOST_BYTES)
    stream = 256 * -(-int((wanted / 4) ** 0.5) // 256)
    return Size(side=1024, images=1, channels=256, pixels=28, chain=2, stream=stream, passes=1)


def moving(size: Size, as_graph: bool) -> Iterator[Kernel]:
    """Kernels that wait for memory: one row times a large matrix, and a sum over all of it in place.

    A graph has no sum in place: its result would leave the engine, or go to an operation it may be fused with, and how
    many bytes that moves is not known. A matrix that is multiplied is read, however that is done.
    """
    one = np.ones((1, size.stream), np.float32)
    # each number its own in memory; zeros may share one page, which then stays in the cache
    large = np.full((size.stream, size.stream), 1 / size.stream, np.float32)
    read = size.passes * size.stream**2
    if as_graph:
        yield Kernel("row by matrix", _model(graph=_chain("MatMul", one, large, size.passes)), numbers=read)
        return
    weight = torch.from_numpy(large)
    yield Kernel("row by matrix", _model(module=_Chain(torch.from_numpy(one), weight, size.passes)), numbers=read)
    yield Kernel("sum", _model(module=_Sum(weight, size.passes)), numbers=2 * read)


def computing(size: Size, precision: str, as_graph: bool) -> Iterator[Kernel]:
    """Kernels that wait for arithmetic: square matrix products, and 3 × 3 convolutions of many channels."""
    noise = np.random.default_rng(0)

    def kernel(name: str, operator: str, start: Sequence[int], weight: Sequence[int], macs: float) -> Kernel:
        first = noise.standard_normal(start, np.float32)
        # of a spread that leaves what comes out of each product as large as what went in
        factor = noise.standard_normal(weight, np.float32) / np.float32((macs / np.prod(start)) ** 0.5)
        operations = 2 * size.chain * macs
        if as_graph:
            graph = _chain(operator, first, factor, size.chain, quantised=precision == "int8")
            return Kernel(name, _model(precision, graph=graph), operations)
        tensors = [torch.from_numpy(array).to(_DTYPES[precision]) for array in (first, factor)]
        return Kernel(name, _model(precision, module=_Chain(*tensors, size.chain)), operations)

    n, image = size.side, (size.images, size.channels, size.pixels, size.pixels)
    yield kernel("products", "MatMul", (n, n), (n, n), float(n) ** 3)
    weight = (size.channels, size.channels, 3, 3)
    yield kernel("convolutions", "Conv", image, weight, float(np.prod(image)) * 9 * size.channels)


class _Chain(nn.Module):
    """`count` products or convolutions of the same weight, one after another."""

    def __init__(self, start: Tensor, weight: Tensor, count: int):
        super().__init__()
        self.register_buffer("start", start)
        self.register_buffer("weight", weight)
        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        """(1, 1) to the largest number of each row, or of each channel, in float32."""
        y = self.start + x.to(self.start.dtype)
        for _ in range(self.count):
            y = functional.linear(y, self.weight) if y.ndim == 2 else functional.conv2d(y, self.weight, padding=1)
        return y.flatten(-2).amax(-1).float() if y.ndim == 4 else y.amax(1).float()


class _Sum(nn.Module):
    """Adds a number to each of a large matrix, in place."""

    def __init__(self, numbers: Tensor, count: int):
        super().__init__()
        self.register_buffer("numbers", numbers)
        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        """(1, 1) to (1, 1)."""
        for _ in range(self.count):
            self.numbers.add_(x)
        return self.numbers[:1, :1] + x


def _model(precision: str = "fp32", *, module: nn.Module | None = None, graph: onnx.ModelProto | None = None) -> Model:
    example = {"x": torch.zeros(1, 1)}
    return Model("ceiling", example, module=module, graph=graph, precision=precision, weights="made up")


def _chain(
    operator: str, start: np.ndarray, weight: np.ndarray, count: int, *, quantised: bool = False
) -> onnx.ModelProto:
    """The graph of `_Chain`; quantised, with u8 activations and s8 weights per output channel between Q/DQ nodes."""
    constants = {"start": start, "weight": weight}
    nodes = [helper.make_node("Add", ["start", "x"], ["h0"])]
    settings = {"kernel_shape": [3, 3], "pads": [1] * 4} if operator == "Conv" else {}
    factor = "weight"
    if quantised:
        axis = 0 if operator == "Conv" else 1
        constants |= _quantised(weight, axis) | {"step": _STEP, "zero": _ZERO}
        scale = ["weight", "weight_scale", "weight_zero"]
        nodes.append(helper.make_node("DequantizeLinear", scale, ["w"], axis=axis))
        factor = "w"
    current = "h0"
    for index in range(count + 1):
        if index:
            nodes.append(helper.make_node(operator, [current, factor], [f"h{index}"], **settings))
            current = f"h{index}"
        if quantised:
            nodes.append(helper.make_node("QuantizeLinear", [current, "step", "zero"], [f"q{index}"]))
            nodes.append(helper.make_node("DequantizeLinear", [f"q{index}", "step", "zero"], [f"d{index}"]))
            current = f"d{index}"
    axes = list(range(2 if operator == "Conv" else 1, start.ndim))
    constants["axes"] = np.array(axes)
    nodes.append(helper.make_node("ReduceMax", [current, "axes"], ["y"], keepdims=0))
    return _graph(nodes, constants, start.shape[: axes[0]])


def _quantised(weight: np.ndarray, axis: int) -> dict[str, np.ndarray]:
    others = tuple(i for i in range(weight.ndim) if i != axis)
    scale = np.abs(weight).max(others, keepdims=True) / np.float32(127)
    return {
        "weight": np.round(weight / scale).astype(np.int8),
        "weight_scale": scale.reshape(-1),
        "weight_zero": np.zeros(scale.size, np.int8),
    }


def _graph(nodes: Sequence[onnx.NodeProto], constants: dict[str, np.ndarray], output: Sequence[int]) -> onnx.ModelProto:
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 1])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, list(output))
    graph = helper.make_graph(list(nodes), "ceiling", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    for index, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{index}"
    for name, value in constants.items():
        # straight into its place: the helpers would copy a large matrix three times
        array = np.asarray(value)
        data_type = helper.np_dtype_to_tensor_dtype(array.dtype)
        model.graph.initializer.add(name=name, dims=array.shape, data_type=data_type, raw_data=array.tobytes())
    return model


def _last_level_cache_bytes() -> int:
    """Of the processor's largest cache, as Linux tells it; 0 where the system does not."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    texts = [path.read_text().strip() for path in _CACHES.glob("index*/size")]
    return max((int(text[:-1]) * units[text[-1]] for text in texts if text[-1:] in units), default=0)

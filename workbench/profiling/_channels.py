"""How many channels a row of a profile reads and writes, and the width that suits what it runs on."""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import pandas as pd

from workbench.environment import Environment

_CONVOLUTION = re.compile("conv", re.IGNORECASE)
_PRODUCT = re.compile("gemm|linear|matmul|fullyconnected", re.IGNORECASE)
_OTHER_DEVICE = re.compile(r"\b(GPU|NPU)\b")
# bytes of a vector register, the widest first; SVE is left out, since its width differs from processor to processor
_REGISTER_BYTES = {"avx512f": 64, "avx512": 64, "avx2": 32, "asimd": 16, "neon": 16}
_SUM_BYTES = 4  # products are added up in 32 bits, those of 8-bit and 16-bit numbers too
# TREx, lint.py, alignment_lint
_TENSOR_CORE = {"fp32": 8, "fp16": 8, "bf16": 8, "int8": 16}


class Widths(NamedTuple):
    """Channels of a convolution or a matrix product; grouped where an output does not see all input channels."""

    inputs: int
    outputs: int
    grouped: bool


class Fit(NamedTuple):
    """The number that channel counts should be a multiple of, and why."""

    multiple: int
    why: str


def widths(row: Any, batch: int, layers: pd.DataFrame | None) -> Widths | None:
    """The channels of a row of a profile's frame; None where they cannot be told for certain.

    Parameters
    ----------
    row
        Named as the frame's columns.
    batch
        Samples per call.
    layers
        The model's layer table: an engine may hold channels last or pad them. Without it the channels are read off the
        row's own shapes, in the order of axes with which shapes, MACs and parameters agree.
    """
    if not row.macs > 0 or not isinstance(row.output_shape, tuple) or None in row.output_shape:
        return None
    found = _of_layer(row, layers) if layers is not None else _of_shapes(row, batch)
    if found is None:
        return None
    # each number that is written takes one product for each input it sees, times the size of the kernel
    products = row.macs / (batch * found[2])
    return Widths(found[0], found[1], products < found[0])


def _of_layer(row: Any, layers: pd.DataFrame) -> tuple[int, int, int] | None:
    """Channels in and out and numbers written, of the one layer of this row that has products."""
    mine = layers[layers["layer"].isin(row.layer.split(" + ")) & (layers["macs"] > 0)].drop_duplicates("layer")
    if len(mine) != 1:
        return None
    own = mine.iloc[0]
    axis = 0 if _CONVOLUTION.search(own["type"]) else -1 if _PRODUCT.search(own["type"]) else None
    shapes = own["input_shape"], own["output_shape"]
    if axis is None or not all(isinstance(shape, tuple) and shape and None not in shape for shape in shapes):
        return None
    return shapes[0][axis], shapes[1][axis], math.prod(shapes[1])


def _of_shapes(row: Any, batch: int) -> tuple[int, int, int] | None:
    """The same from the row's own shapes."""
    shapes = row.input_shape, row.output_shape
    if not all(isinstance(shape, tuple) and shape and None not in shape for shape in shapes):
        return None
    written = math.prod(row.output_shape)
    if _PRODUCT.search(row.type):
        return shapes[0][-1], shapes[1][-1], written
    if not _CONVOLUTION.search(row.type):
        return None
    fitting = set()
    for axis in (0, -1):
        outputs = row.output_shape[axis]
        weights = row.macs * outputs / (batch * written)
        # a bias, and normalisations that were folded into it, have some parameters for each output channel
        rest = row.parameters - weights
        if 0 <= rest <= 5 * outputs and rest % outputs == 0:
            fitting.add((shapes[0][axis], outputs, written))
    return fitting.pop() if len(fitting) == 1 else None


def fit(precision: str, backend_label: str, environment: Environment | None) -> Fit | None:
    """The width that suits arithmetic of this precision there; None where it is not known what it ran on."""
    if precision not in _TENSOR_CORE:
        return None
    if "TensorRT" in backend_label or "CUDA" in backend_label.upper():
        multiple = _TENSOR_CORE[precision]
        return Fit(multiple, f"tensor cores take {precision} channels in multiples of {multiple}")
    if _OTHER_DEVICE.search(backend_label):
        return None
    known = () if environment is None else environment.isa
    size = next((size for name, size in _REGISTER_BYTES.items() if name in known), None)
    if size is None:
        return None
    multiple = size // _SUM_BYTES
    return Fit(multiple, f"a vector register of this processor holds the sums of {multiple} channels")

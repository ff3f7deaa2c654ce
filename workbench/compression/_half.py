"""float16 and bfloat16: a cast of the module, or of the graph where there is no module."""

from __future__ import annotations

import onnx
from onnxruntime.transformers.float16 import convert_float_to_float16
from torch import nn

from workbench.errors import StepError
from workbench.models.cast import DTYPES, cast

_DTYPE = {"fp16": DTYPES["float16"], "bf16": DTYPES["bfloat16"]}


def cast_module(module: nn.Module, precision: str) -> nn.Module:
    """A copy that takes and gives float32 and computes in `precision`, ``fp16`` or ``bf16``."""
    return cast(module, _DTYPE[precision])


def cast_graph(graph: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in float16 between casts; operations that lose too much in it stay float32.

    Raises
    ------
    StepError
        If the graph holds something the converter does not know.
    """
    copied = onnx.ModelProto()
    copied.CopyFrom(graph)
    try:
        return convert_float_to_float16(copied, keep_io_types=True)
    except Exception as error:  # the converter raises ONNX's own C++ types, which share no base class
        raise StepError(f"This graph cannot become fp16: {type(error).__name__}: {error}") from error

"""`Quantize`: fewer bits for weights and arithmetic, written into the artefact itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx

from workbench.compression import _checks, _half, _int8
from workbench.compression._base import NO_CHECKPOINT, Checkpoint, Step
from workbench.data.task import Task
from workbench.errors import StepError
from workbench.jobs import SILENT, Progress
from workbench.models import structure
from workbench.models.model import Model

_PRECISIONS = ("int8", "fp16", "bf16")
_MODES = ("static", "dynamic")
_CHUNK = 32  # samples; a calibrator holds what every node puts out for one chunk


@dataclass(frozen=True)
class Quantize(Step):
    """Compute in int8, float16 or bfloat16.

    Parameters
    ----------
    precision
        ``int8`` turns the model into an ONNX graph. ``fp16`` and ``bf16`` cast a torch module, which stays one and is
        exported with its casts; a model that is only a graph becomes an fp16 graph, and cannot become bf16. Inputs and
        outputs stay float32.
    mode
        Of int8. ``static``: u8 activations, with ranges from the task's calibration split by min-max, and s8 weights
        per output channel, as Q/DQ nodes; in a network with layer normalisation or attention MatMul and Gemm alone.
        ``dynamic``: s8 weights of MatMul and Gemm, activations by the range of each batch; needs no calibration data,
        pays for finding the range at every call, and leaves convolutions as they are.
    reduce_range
        Of int8: weights in 7 bits. Without VNNI (CPUs before 2019, most AVX2 ones) u8 × s8 products are summed in 16
        bits and can saturate; there it restores accuracy, elsewhere it only loses a bit.

    Raises
    ------
    StepError
        If a setting is not one of these, or is given where it means nothing.

    Notes
    -----
    Min-max per channel on ResNet-20 with 512 calibration images: 91.75 % on ONNX Runtime and 91.80 % on OpenVINO, of
    91.73 % in float32. Quantising the slices and paddings of its shortcuts, its additions and its pooled mean or not
    changed batch-1 latency by 0.01 ms or less and accuracy by 0.06 points or less on both engines, so ONNX Runtime's
    own choice of operations is kept. In a 4-layer transformer encoder with random weights, quantising the inputs of
    products alone left 20.9 dB, their outputs as well 18.0 dB, every operation 16.4 dB, dynamic int8 23.0 dB.
    Scheme after Jacob et al., CVPR 2018, equation 1.
    """

    family: ClassVar[str] = "quantised"

    precision: str = field(metadata={"choices": _PRECISIONS})
    mode: str = field(default="static", metadata={"choices": _MODES})
    reduce_range: bool = False

    def __post_init__(self) -> None:
        _checks.choice("Quantize", "precision", self.precision, _PRECISIONS)
        _checks.choice("Quantize", "mode", self.mode, _MODES)
        _checks.flag("Quantize", "reduce_range", self.reduce_range)
        if self.precision != "int8" and (self.mode != "static" or self.reduce_range):
            raise StepError(f'Quantize: mode and reduce_range are settings of "int8", not of {self.precision!r}.')

    @property
    def label(self) -> str:
        """``Quantise int8``, ``Quantise int8 dynamic``, ``bf16``."""
        if self.precision != "int8":
            return self.precision
        dynamic = " dynamic" if self.mode == "dynamic" else ""
        return f"Quantise int8{dynamic}" + (", 7-bit weights" if self.reduce_range else "")

    def check(self, model: Model) -> None:
        """Refuse a model that is quantised or cast already, and a graph that is to become bf16."""
        nodes = model.graph.graph.node if model.graph is not None else ()
        if model.precision != "fp32" or any(node.op_type in _int8.QUANTISED for node in nodes):
            held = model.precision if model.precision != "fp32" else "int8"
            raise StepError(
                f"{model.name} is already {held}, and rounding twice only loses accuracy. Quantise the float32 model "
                "instead: keep one wb.Quantize in the recipe."
            )
        if self.precision == "bf16" and model.module is None:
            raise StepError(
                f"{model.name} is an ONNX graph only, and bf16 is made by casting a torch module. "
                'Use wb.Quantize("fp16") or wb.Quantize("int8"), or load the network as a module.'
            )

    def preview(self, model: Model) -> Model:
        """The kind and precision that `apply` gives; the graph of an int8 model is still the old one, or empty."""
        if self.precision == "int8" or model.module is None:
            graph = model.graph if model.graph is not None else onnx.ModelProto()
            return model.changed(self.family, graph=graph, module=None, precision=self.precision)
        return model.changed(self.family, module=model.module, precision=self.precision)

    def apply(
        self,
        model: Model,
        task: Task,
        *,
        seed: int = 0,
        progress: Progress = SILENT,
        checkpoint: Checkpoint = NO_CHECKPOINT,
    ) -> Model:
        """The quantised model; raises `StepError` where there is nothing to calibrate with or to quantise."""
        self.check(model)
        progress(0.0, "exporting")
        if self.precision != "int8" and model.module is not None:
            module = _half.cast_module(model.module, self.precision)
            edit = structure.difference(model.module, module)
            return model.changed("quantised", module=module, precision=self.precision, edits=(*model.edits, edit))
        source = model.onnx()
        if self.precision == "fp16":
            graph = _half.cast_graph(source)
        elif self.mode == "dynamic":
            graph = _int8.dynamic(source, reduce_range=self.reduce_range)
        else:
            graph = self._calibrated(source, task, progress)
        progress(1.0)
        return model.changed("quantised", graph=graph, module=None, precision=self.precision)

    def _calibrated(self, source: onnx.ModelProto, task: Task, progress: Progress) -> onnx.ModelProto:
        size = _int8.fixed_batch(source) or _CHUNK
        count = task.count("calibration")

        def report(chunks: int) -> None:
            done = min(chunks * size, count)
            progress(0.1 + 0.8 * done / max(count, 1), f"calibrating, {done} of {count} samples")

        def batches() -> Iterator[tuple[np.ndarray, ...]]:
            if count:
                for inputs, labels in task.batches("calibration", size):
                    if _int8.fixed_batch(source) in (None, len(labels)):  # a fixed batch has no room for a rest
                        yield inputs

        return _int8.static(source, batches(), reduce_range=self.reduce_range, report=report)

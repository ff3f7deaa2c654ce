"""`Quantize`: fewer bits for weights and arithmetic, written into the artefact itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import onnx

from workbench.compression import _checks, _half, _mixed, _ranges, one_layer
from workbench.compression._base import NO_CHECKPOINT, Checkpoint, PerLayer, Step
from workbench.compression._calibration import Samples
from workbench.compression._corrections import corrected
from workbench.compression._int8 import DynamicInt8, StaticInt8
from workbench.compression._onnx_graph import QUANTISED, fixed_batch, tidied
from workbench.compression._weight_only import WeightOnly
from workbench.data.task import Task
from workbench.errors import StepError
from workbench.jobs import SILENT, Progress
from workbench.models import structure
from workbench.models.model import Model
from workbench.models.provenance import provenance
from workbench.models.record import Record

_WEIGHTS = {"int8 weights": "int8", "int4 weights": "int4"}
_PRECISIONS = ("int8", "fp16", "bf16", *_WEIGHTS)
_MODES = ("static", "dynamic")
_LAYERS = {"int8": ("fp32", "int8"), "int8 weights": ("fp32", "int8", "int4"), "int4 weights": ("fp32", "int8", "int4")}
_FLOAT_BITS = 32
_CORRECTIONS = {
    "equalize": "equalised",
    "correct_bias": "bias corrected",
    "adaptive_rounding": "adaptive rounding",
}


@dataclass(frozen=True)
class Quantize(Step):
    """Compute in int8, float16 or bfloat16, or keep weights in 8 or 4 bits.

    Parameters
    ----------
    precision
        ``int8``, ``int8 weights`` and ``int4 weights`` turn the model into an ONNX graph. ``fp16`` and ``bf16`` cast a
        torch module, which stays one and is exported with its casts; a model that is only a graph becomes an fp16
        graph, and cannot become bf16. Inputs and outputs stay float32.
    mode
        Of int8. ``static``: u8 activations, with ranges from the task's calibration split, and s8 weights per output
        channel, as Q/DQ nodes; in a network with layer normalisation or attention MatMul and Gemm alone. ``dynamic``:
        s8 weights of MatMul and Gemm, activations by the range of each batch; needs no calibration data, pays for
        finding the range at every call, and leaves convolutions as they are.
    calibration
        Of static int8, how ranges are chosen: ``minmax``, ``percentile`` (99.99 of 100 values), ``entropy``, ``mse``.
        All but the first run through the calibration data twice.
    reduce_range
        Of int8: weights in 7 bits. Without VNNI (CPUs before 2019, most AVX2 ones) u8 × s8 products are summed in 16
        bits and can saturate; there it restores accuracy, elsewhere it only loses a bit.
    layers
        Precision of single layers: ``fp32`` leaves one float, ``int8`` quantises it whatever `keep_float` finds. With
        weights alone also ``int4``.
    keep_float
        So many layers stay float: those whose quantisation alone costs most output SQNR, by calibration samples.
    equalize, correct_bias, adaptive_rounding
        Of int8 and ``int8 weights``: corrections of the module's weights before they are rounded; see `FakeQuantize`.

    Raises
    ------
    StepError
        If a setting is not one of these, or is given where it means nothing.

    Notes
    -----
    Weights alone: MatMul and Gemm in 8 bits per output channel, or in 4 bits with a scale for each 32 weights;
    convolutions and embedding tables in 8 bits. ONNX Runtime and OpenVINO multiply by such matrices faster than by
    float32 ones, and round what they multiply to 8 bits meanwhile. A convolution's weight is turned back at each call
    by ONNX Runtime, which costs time, and at loading by OpenVINO, which costs nothing: there only the file is smaller.

    The records hold the output SQNR against the float graph, as the nodes say and without an engine's own rounding, and
    how many nodes of each operator were quantised.

    ResNet-20, CIFAR-10, 512 calibration images. Min-max: 91.75 % on ONNX Runtime and 91.80 % on OpenVINO, of 91.73 % in
    float32. On the first 4,000 test images (92.13 % in float32) the methods cannot be told apart: min-max 92.08 %,
    percentile 91.98 %, entropy 92.13 %, mse 92.23 %, at 29.8, 28.7, 28.0 and 29.9 dB; weights alone in 8 bits 92.20 %
    at 37.7 dB. Quantising the slices and paddings of its shortcuts, its additions and its pooled mean or not changed
    batch-1 latency by 0.01 ms or less and accuracy by 0.06 points or less on both engines, so ONNX Runtime's own choice
    of operations is kept. In a 4-layer transformer encoder with random weights, quantising the inputs of products alone
    left 20.9 dB, their outputs as well 18.0 dB, every operation 16.4 dB, dynamic int8 23.0 dB.
    Scheme after Jacob et al., CVPR 2018, equation 1.
    """

    family: ClassVar[str] = "quantised"

    precision: str = field(metadata={"choices": _PRECISIONS})
    mode: str = field(default="static", metadata={"choices": _MODES})
    calibration: str = field(default="minmax", metadata={"choices": _ranges.METHODS})
    reduce_range: bool = False
    layers: PerLayer = field(default=PerLayer(), metadata={"each": "precision"})
    keep_float: int = 0
    equalize: bool = False
    correct_bias: bool = False
    adaptive_rounding: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", PerLayer(self.layers))
        _checks.choice("Quantize", "precision", self.precision, _PRECISIONS)
        _checks.choice("Quantize", "mode", self.mode, _MODES)
        _checks.choice("Quantize", "calibration", self.calibration, _ranges.METHODS)
        _checks.whole("Quantize", "keep_float", self.keep_float, least=0)
        for name in ("reduce_range", *_CORRECTIONS):
            _checks.flag("Quantize", name, getattr(self, name))
        self._check_meaning()
        for layer, precision in self.layers.items():
            _checks.choice("Quantize", f"precision of layer {layer}", precision, _LAYERS[self.precision])

    def _check_meaning(self) -> None:
        """Refuse settings that mean nothing beside the others."""
        given = f"Quantize({self.precision!r})"
        if self.precision != "int8" and (self.mode != "static" or self.reduce_range):
            raise StepError(f'Quantize: mode and reduce_range are settings of "int8", not of {self.precision!r}.')
        if (self.precision != "int8" or self.mode != "static") and self.calibration != "minmax":
            dynamic = " of mode='dynamic'" if self.precision == "int8" else ""
            raise StepError(f'{given}{dynamic} takes no ranges, so that calibration means nothing. Use static "int8".')
        if self.precision not in _LAYERS and (self.layers or self.keep_float):
            raise StepError(f"{given} casts the whole model; layers and keep_float are settings of {_either(_LAYERS)}.")
        if self._corrections and self.precision not in ("int8", "int8 weights"):
            raise StepError(
                f"{given}: {', '.join(self._corrections)} correct what rounding to 8 bits per channel does. Use "
                'wb.Quantize("int8", …) or wb.Quantize("int8 weights", …), or wb.FakeQuantize for other widths.'
            )
        if self.adaptive_rounding and self.reduce_range:
            raise StepError(
                "Quantize: adaptive_rounding settles each weight in 8 bits, and reduce_range would round it again to "
                "7. Leave one of them out."
            )

    @property
    def _corrections(self) -> tuple[str, ...]:
        return tuple(name for name in _CORRECTIONS if getattr(self, name))

    @property
    def label(self) -> str:
        """``Quantise int8``, ``Quantise int8 dynamic``, ``Quantise int4 weights, 2 layers fp32``, ``bf16``."""
        if self.precision not in _LAYERS:
            return self.precision
        counts = Counter({"fp32": self.keep_float}) + Counter(self.layers.values())
        settings = (
            f"Quantise {self.precision}" + (" dynamic" if self.mode == "dynamic" else ""),
            self.calibration if self.calibration != "minmax" else "",
            "7-bit weights" if self.reduce_range else "",
            *(f"{n} layer{'s' if n > 1 else ''} {precision}" for precision, n in sorted(counts.items())),
            *(_CORRECTIONS[name] for name in self._corrections),
        )
        return ", ".join(part for part in settings if part)

    def check(self, model: Model) -> None:
        """Refuse a model that is quantised or cast already, a graph that is to become bf16, and unknown layers."""
        nodes = model.graph.graph.node if model.graph is not None else ()
        if model.precision != "fp32" or any(node.op_type in QUANTISED for node in nodes):
            held = model.precision if model.precision != "fp32" else "int8"
            raise StepError(
                f"{model.name} is already {held}, and rounding twice only loses accuracy. Quantise the float32 model "
                "instead: keep one of the steps that quantise."
            )
        if self.precision == "bf16" and model.module is None:
            raise StepError(
                f"{model.name} is an ONNX graph only, and bf16 is made by casting a torch module. "
                'Use wb.Quantize("fp16") or wb.Quantize("int8"), or load the network as a module.'
            )
        if self._corrections and model.module is None:
            raise StepError(
                f"{model.name} is an ONNX graph only, and {', '.join(self._corrections)} work on a torch module. Leave "
                "them out, or load the network as a module."
            )
        if self.layers:
            known = model.layers["layer"] if model.module is not None else _graph_layers(model.graph)
            _checks.layers("Quantize", self.layers, dict.fromkeys(known), f"layers of {model.name}")

    def preview(self, model: Model) -> Model:
        """The kind and precision that `apply` gives; a model turned into a graph still has the old one, or none."""
        if self.precision in _LAYERS or model.module is None:
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
        if self.precision in _LAYERS:
            return self._in_integers(model, task, seed, progress)
        if model.module is None:
            graph = _half.cast_graph(model.onnx())
            return model.changed("quantised", graph=graph, module=None, precision=self.precision)
        module = _half.cast_module(model.module, self.precision)
        edit = structure.difference(model.module, module)
        return model.changed("quantised", module=module, precision=self.precision, edits=(*model.edits, edit))

    def _in_integers(self, model: Model, task: Task, seed: int, progress: Progress) -> Model:
        share = 0.5 if self._corrections else 1.0
        quantiser = self._quantiser(model, task, progress.part(0.05, 0.8 * share))
        records, kept = [], [layer for layer, precision in self.layers.items() if precision == "fp32"]
        if self.keep_float:
            self._check_reference(quantiser, task)
            part = progress.part(0.8 * share, 0.95 * share)
            rows = _mixed.cheapest_to_keep(
                quantiser, self.keep_float, given=self.layers, step=self.label, progress=part
            )
            records.append(Record.of(self.label, "output SQNR with one layer quantised", rows))
            kept += [row["layer"] for row in rows if row["precision"] == "fp32"]
        source, reference = model, quantiser.reference
        if self._corrections:
            source = self._corrected(model, task, quantiser, kept, seed, progress.part(0.5, 0.75))
            quantiser = self._quantiser(source, task, progress.part(0.75, 0.95))
        result = quantiser.quantised(without=_mixed.kept_nodes(quantiser, kept))
        counts = _mixed.by_operator(quantiser.graph, result)
        self._check_any(counts, kept)
        if reference.samples:
            progress(0.95, "comparing outputs")
            row = {"samples": reference.samples, "sqnr_db": _mixed.finite(reference.sqnr_db(result))}
            records.append(Record.of(self.label, "outputs against float32", [row]))
        records.append(Record.of(self.label, "nodes by operator", counts))
        progress(1.0)
        return source.changed(
            "quantised",
            graph=tidied(result, source.onnx()),
            module=None,
            precision=self.precision,
            records=(*source.records, *records),
        )

    def _quantiser(self, model: Model, task: Task, progress: Progress) -> _mixed.Quantiser:
        graph = model.onnx()
        samples = Samples(task, graph)
        if self.precision in _WEIGHTS:
            return WeightOnly(graph, samples, lambda layer: self.layers.get(layer, _WEIGHTS[self.precision]))
        if self.mode == "dynamic":
            return DynamicInt8(graph, samples, reduce_range=self.reduce_range)
        if not samples.count:
            raise StepError(
                f"Static int8 needs calibration samples, and {_too_few(task, graph)}. Build it with "
                'wb.Task.from_arrays(…, calibration=512), or use wb.Quantize("int8", mode="dynamic").'
            )
        return StaticInt8(
            graph, samples, calibration=self.calibration, reduce_range=self.reduce_range, progress=progress
        )

    def _corrected(
        self, model: Model, task: Task, quantiser: _mixed.Quantiser, kept: list[str], seed: int, progress: Progress
    ) -> Model:
        """The module with corrected weights; those of layers that stay float, or take 4 bits, are as they were."""
        done = _mixed.quantised_nodes(quantiser.graph, quantiser.quantised(without=_mixed.kept_nodes(quantiser, kept)))
        layers = provenance(quantiser.graph)
        rounded = {layer for node in done for layer in layers[node] if self.layers.get(layer) != "int4"}
        return corrected(
            model,
            task,
            bits=7 if self.reduce_range else 8,
            per_channel=True,
            **{name: getattr(self, name) for name in _CORRECTIONS},
            layers={layer: _FLOAT_BITS for layer in one_layer.weighted(model) if layer not in rounded},
            activation_bits=8 if self.precision == "int8" else 0,
            step=self.label,
            seed=seed,
            progress=progress,
        )

    def _check_reference(self, quantiser: _mixed.Quantiser, task: Task) -> None:
        if not quantiser.reference.samples:
            raise StepError(
                f"{self.label}: keep_float chooses layers by calibration samples, and {_too_few(task, quantiser.graph)}"
                ". Build it with wb.Task.from_arrays(…, calibration=512), or name the layers: layers={'…': 'fp32'}."
            )

    def _check_any(self, counts: list[dict[str, Any]], kept: list[str]) -> None:
        if any(row["quantised"] for row in counts):
            return
        if kept:
            raise StepError(f"{self.label}: nothing is left to quantise once {', '.join(kept)} stay float.")
        if self.mode == "dynamic":
            raise StepError(
                "Dynamic int8 quantises products with a constant matrix (MatMul, Gemm), and this graph has none. "
                'Use wb.Quantize("int8"), which also covers convolutions.'
            )
        raise StepError(
            f"{self.label}: this graph has no operation that can be quantised, such as a convolution or a product with "
            "a constant matrix."
        )


def _graph_layers(graph: onnx.ModelProto) -> list[str]:
    return [layer for layers in provenance(graph).values() for layer in layers]


def _too_few(task: Task, graph: onnx.ModelProto) -> str:
    held, least = task.count("calibration"), fixed_batch(graph) or 1
    return f"the task has {held}, fewer than the graph's batch of {least}" if held else "the task has none"


def _either(words: Mapping[str, Any]) -> str:
    return ", ".join(f'"{word}"' for word in words)

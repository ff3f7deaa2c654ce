"""`FakeQuantize`: what fewer bits would cost, simulated in float: any width from 2 to 16, on any grid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from workbench.compression import (
    _bit_widths,
    _checks,
    _corrections,
    _folding,
    _grids,
    _ranges,
    _simulated,
    _training,
    one_layer,
)
from workbench.compression._base import NO_CHECKPOINT, Checkpoint, PerLayer, Step
from workbench.compression._calibrated import samples
from workbench.compression._run import device_of
from workbench.compression._scheme import FLOAT, Scheme, simulate
from workbench.data.task import Task
from workbench.errors import StepError
from workbench.jobs import SILENT, Progress
from workbench.models.model import Model
from workbench.models.record import Record

_NAME = "FakeQuantize"
_CODEBOOK_BITS = 8  # a codebook of more values takes more room than it saves


@dataclass(frozen=True)
class FakeQuantize(Step):
    """Round weights, and inputs of layers where asked, to what a few bits hold, and compute with them in float32.

    It answers what a width would cost before an engine has it; nothing becomes smaller or faster. Batch norms are
    first folded into the layers before them, as engines do. The layers are the convolutions and linear layers that the
    network calls; their biases stay in float, and so do weights that are used without a call, such as those inside
    torch's attention.

    Parameters
    ----------
    bits
        Of the weights, 2 to 16.
    activation_bits
        Of the inputs of those layers, 2 to 16, on an asymmetric uniform grid with one scale and zero point per tensor;
        0 leaves them in float.
    grid
        Of the weights. ``uniform``: even steps. ``log``: zero and powers of two, with their negatives. ``kmeans``: a
        codebook of ``2^bits`` values, 8 bits at most. See `_grids`.
    symmetric
        Of a uniform grid: as far below zero as above it. False gives it a zero point.
    per_channel
        A grid for each output channel, or one for the tensor. A clustered model always gets one for the tensor, and
        keeps its norms, so that its shared values stay shared; the record says how many grids each layer has.
    calibration
        How the range of each input is found on the calibration split: ``minmax``, ``percentile``, ``entropy`` or
        ``mse``; see `_ranges.range_from_histogram`.
    layers
        Bits of the weights of single layers, by name; 32 leaves a layer, its input too, as it is.
    clip
        Range of a uniform grid for weights. ``none``: that of the weights. ``mse``: so narrow that the squared error is
        smallest. ``percentile``: without the largest magnitudes.
    percentile
        How many of 100 values that method keeps, of inputs or weights.
    average_bits
        Above 0: each layer that `layers` does not name gets a width of its own, from `bits` down to 2, so that the mean
        over all weights is at most this; see `_bit_widths.chosen`.
    equalize
        Cross-layer equalisation first; see `_equalize`.
    correct_bias
        Bias correction; see `_bias`.
    adaptive_rounding
        Round each weight up or down as the layer's output is better, not to nearest; see `_adaptive_rounding`. On the
        uniform symmetric grid without clipping.

    Raises
    ------
    StepError
        If a setting is out of range, or is given where it means nothing.

    Notes
    -----
    A correction that makes the error of the outputs larger on calibration samples held out is not applied, and the
    record says so. Grids after Nagel et al., "A White Paper on Neural Network Quantization", 2021, section 2.
    """

    family: ClassVar[str] = "quantised"

    bits: int = field(default=8, metadata={"low": _simulated.BITS[0], "high": _simulated.BITS[1]})
    activation_bits: int = field(default=0, metadata={"low": 0, "high": _simulated.BITS[1]})
    grid: str = field(default="uniform", metadata={"choices": _grids.GRIDS})
    symmetric: bool = True
    per_channel: bool = True
    calibration: str = field(default="minmax", metadata={"choices": _ranges.METHODS})
    layers: Mapping[str, int] = field(default=PerLayer(), metadata={"each": "bits"})
    clip: str = field(default="none", metadata={"choices": _grids.CLIPS})
    percentile: float = field(default=_ranges.PERCENTILE, metadata={"low": 50.0, "high": 100.0})
    average_bits: float = field(default=0.0, metadata={"low": 0.0, "high": float(_simulated.BITS[1])})
    equalize: bool = False
    correct_bias: bool = False
    adaptive_rounding: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", PerLayer(self.layers))
        _simulated.check_bits(self.bits, "weights")
        if self.activation_bits != 0 or isinstance(self.activation_bits, bool):
            _simulated.check_bits(self.activation_bits, "activations")
        for layer, bits in self.layers.items():
            if bits != FLOAT:
                _simulated.check_bits(bits, layer)
        _checks.choice(_NAME, "grid", self.grid, _grids.GRIDS)
        _checks.choice(_NAME, "calibration", self.calibration, _ranges.METHODS)
        _checks.choice(_NAME, "clip", self.clip, _grids.CLIPS)
        for flag in ("symmetric", "per_channel", *_corrections.NAMES):
            _checks.flag(_NAME, flag, getattr(self, flag))
        _checks.number(_NAME, "percentile", self.percentile, 50, 100)
        self._check_average()
        self._check_together()

    def _check_average(self) -> None:
        if self.average_bits != 0 or isinstance(self.average_bits, bool):
            _checks.number(
                _NAME,
                "average_bits",
                self.average_bits,
                _simulated.BITS[0],
                self.bits,
                low_allowed=True,
                high_allowed=True,
            )

    def _check_together(self) -> None:
        if self.grid != "uniform" and (not self.symmetric or self.clip != "none"):
            raise StepError(f'{_NAME}: symmetric and clip are settings of grid="uniform", not of {self.grid!r}.')
        widest = max(bits for bits in (self.bits, *self.layers.values()) if bits != FLOAT)
        if self.grid == "kmeans" and widest > _CODEBOOK_BITS:
            raise StepError(
                f'{_NAME}: grid="kmeans" takes at most {_CODEBOOK_BITS} bits, and {widest} were given: a codebook of '
                f"2^{widest} values takes more room than it saves. Give fewer bits, or another grid."
            )
        if self.calibration != "minmax" and not self.activation_bits:
            raise StepError(
                f"{_NAME}: calibration finds ranges of activations, which stay in float here. Give activation_bits, or "
                "clip for the ranges of weights."
            )
        if self.adaptive_rounding and not (self.grid == "uniform" and self.symmetric and self.clip == "none"):
            raise StepError(
                f'{_NAME}: adaptive_rounding works on the symmetric grid up to the largest weight: grid="uniform", '
                'symmetric=True, clip="none".'
            )

    @property
    def label(self) -> str:
        """``Simulate 4-bit weights``, ``Simulate 4-bit weights, 8-bit activations, per tensor, equalised``."""
        words = [f"Simulate {self.bits}-bit weights"]
        if self.average_bits:
            words.append(f"{self.average_bits:g} on average")
        if self.activation_bits:
            by = "" if self.calibration == "minmax" else f" by {self.calibration}"
            words.append(f"{self.activation_bits}-bit activations{by}")
        words += [self.grid] if self.grid != "uniform" else []
        words += ["asymmetric"] if not self.symmetric else []
        words += ["per tensor"] if not self.per_channel else []
        words += [f"clipped by {self.clip}"] if self.clip != "none" else []
        words += [f"{len(self.layers)} layer{'s' if len(self.layers) > 1 else ''} apart"] if self.layers else []
        words += ["equalised"] if self.equalize else []
        words += ["rounding adapted"] if self.adaptive_rounding else []
        words += ["biases corrected"] if self.correct_bias else []
        return ", ".join(words)

    def check(self, model: Model) -> None:
        """Refuse a model without a float32 module that calls convolutions or linear layers, and unknown layers."""
        _checks.trainable(_NAME, model)
        _checks.has_weighted_layers(_NAME, model)
        _checks.layers(_NAME, self.layers, one_layer.weighted(model), "layers it can round")
        _corrections.check(model, self._corrections, _NAME)

    def preview(self, model: Model) -> Model:
        """The kind and precision that `apply` gives, with the old weights."""
        return model.changed(self.family, module=model.module, precision="simulated")

    def apply(
        self,
        model: Model,
        task: Task,
        *,
        seed: int = 0,
        progress: Progress = SILENT,
        checkpoint: Checkpoint = NO_CHECKPOINT,
    ) -> Model:
        """The rounded model, with a record of each layer's width and error; of precision ``simulated``.

        Raises
        ------
        StepError
            If `average_bits` cannot be reached, or there are too few calibration samples for a correction.
        DataError
            If calibration samples are needed and there are none, or what comes out on them is NaN or infinite.
        """
        self.check(model)
        # an inference tensor made by the caller must not reach in here, nor its number of threads move the last bits
        with torch.inference_mode(False), _training.settled(seed, device_of(model)):
            return self._rounded(model, task, seed, progress)

    def _rounded(self, model: Model, task: Task, seed: int, progress: Progress) -> Model:
        progress(0.0, "folding batch norms")
        current = _folding.folded(model)
        scheme = self._scheme(current)
        if self.average_bits:
            bits, rows = _bit_widths.chosen(
                current, task, scheme, self.average_bits, step=self.label, progress=progress.part(0.0, 0.3)
            )
            scheme = replace(scheme, layers=bits)
            record = Record.of(self.label, "bits, chosen by layer", rows)
            current = replace(current, records=(*current.records, record))
        if self._corrections:
            current = _corrections.improved(
                current, task, scheme, self._corrections, step=self.label, seed=seed, progress=progress.part(0.3, 0.8)
            )
        given = samples(current, task) if self.activation_bits else None
        found = simulate(current, scheme, given, progress=progress.part(0.8, 1.0))
        record = Record.of(self.label, "rounding, by layer", found.rows)
        return found.model.changed(
            self.family, module=found.model.module, precision="simulated", records=(*current.records, record)
        )

    @property
    def _corrections(self) -> list[str]:
        return [name for name in _corrections.NAMES if getattr(self, name)]

    def _scheme(self, model: Model) -> Scheme:
        return Scheme(
            names=one_layer.weighted(model),
            bits=self.bits,
            activation_bits=self.activation_bits,
            calibration=self.calibration,
            percentile=self.percentile,
            # one grid maps equal values to equal ones
            per_channel=self.per_channel and "clustered" not in model.changes,
            grid=self.grid,
            symmetric=self.symmetric,
            clip=self.clip,
            layers=self.layers,
        )

"""How a whole network is rounded: the width of each layer, the grids, and the ranges of what the layers are given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from workbench.compression import _activations, _folding, _simulated, _training
from workbench.compression._activations import Range
from workbench.compression._calibrated import Samples
from workbench.compression._ranges import PERCENTILE
from workbench.jobs import SILENT, Progress
from workbench.models.model import Model
from workbench.profiling.sqnr import sqnr_db

FLOAT = 32  # bits of a layer that stays as it is


@dataclass(frozen=True)
class Scheme:
    """The settings of a simulated quantisation.

    Attributes
    ----------
    names
        Layers in execution order.
    bits
        Of their weights; `layers` has those of single ones, where `FLOAT` keeps a layer, its input too, as it is.
    activation_bits
        Of their inputs; 0 leaves them in float.
    calibration, percentile
        How the ranges of inputs are found, and how many of 100 values ``percentile`` keeps, of weights too.
    per_channel, grid, symmetric, clip
        Of the weights; see `_simulated.weight`.
    """

    names: Sequence[str]
    bits: int
    activation_bits: int = 0
    calibration: str = "minmax"
    percentile: float = PERCENTILE
    per_channel: bool = True
    grid: str = "uniform"
    symmetric: bool = True
    clip: str = "none"
    layers: Mapping[str, int] = field(default_factory=dict)

    def bits_of(self, layer: str) -> int:
        """Width of a layer's weight."""
        return self.layers.get(layer, self.bits)

    @property
    def rounded(self) -> list[str]:
        """The layers that do not stay in float."""
        return [layer for layer in self.names if self.bits_of(layer) != FLOAT]

    def weight(self, layer: nn.Module, bits: int) -> Tensor:
        """A layer's weight, rounded to that width."""
        return _simulated.weight(
            layer,
            bits,
            per_channel=self.per_channel,
            grid=self.grid,
            symmetric=self.symmetric,
            clip=self.clip,
            percentile=self.percentile,
        )


@dataclass(frozen=True, eq=False)
class Simulated:
    """A network rounded by a scheme, and what was done to each layer, a row each."""

    model: Model
    rows: list[dict[str, Any]]


def simulate(model: Model, scheme: Scheme, samples: Samples | None, *, progress: Progress = SILENT) -> Simulated:
    """Round the weights, and the inputs where the scheme says so; biases stay as they are.

    Parameters
    ----------
    samples
        What the ranges of inputs are taken from; None where inputs stay in float.

    Returns
    -------
    Simulated
        With the columns layer, bits, grids (one per output channel, or one) and sqnr_db (of the weight); where inputs
        are rounded also activation_bits, activation_low, activation_high and clipped_share (of the input's values, 0
        to 1).
    """
    ranges: Mapping[str, Range] = {}
    if scheme.activation_bits:
        ranges = _activations.ranges(
            model,
            scheme.rounded,
            samples,
            method=scheme.calibration,
            bits=scheme.activation_bits,
            percentile=scheme.percentile,
            progress=progress.part(0.0, 0.8),
        )
    module = _training.copied(model).module
    rows, done = [], {}
    for number, name in enumerate(scheme.rounded):
        progress(0.8 + 0.2 * number / len(scheme.rounded), f"rounding {name}")
        layer = module.get_submodule(name)
        with torch.no_grad():
            if layer.weight not in done:  # two layers that share a weight go on sharing it
                before = layer.weight.clone()
                layer.weight.copy_(scheme.weight(layer, scheme.bits_of(name)))
                done[layer.weight] = {
                    "bits": scheme.bits_of(name),
                    "grids": len(_simulated.rows(layer, before)) if scheme.per_channel else 1,
                    "sqnr_db": _sqnr_db(before, layer.weight),
                }
        row = {"layer": name, **done[layer.weight]}
        if scheme.activation_bits:
            found = ranges[name]
            _simulated.round_input(module, name, scheme.activation_bits, found.low, found.high)
            row |= {
                "activation_bits": scheme.activation_bits,
                "activation_low": found.low,
                "activation_high": found.high,
                "clipped_share": found.clipped_share,
            }
        rows.append(row)
    return Simulated(_folding.changed(model, module), rows)


def _sqnr_db(before: Tensor, after: Tensor) -> float:
    # a layer that pruning emptied has no signal, and loses nothing
    return sqnr_db(before, after) if bool(before.any()) else float("inf")

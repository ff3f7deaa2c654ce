"""Simulated quantisation: tensors rounded to what so many bits can hold, and computed with in float."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from workbench.compression import _grids
from workbench.compression._ranges import PERCENTILE
from workbench.errors import StepError
from workbench.models import parts
from workbench.models.parts import fake_quantised

BITS = (2, 16)  # the fewest and the most that are simulated


def check_bits(bits: Any, what: str = "") -> None:
    """Refuse a width that cannot be simulated; `what` says whose it is, for the error."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not BITS[0] <= bits <= BITS[1]:
        of = f" for {what}" if what else ""
        raise StepError(f"{bits!r} bits{of} cannot be simulated; a whole number from {BITS[0]} to {BITS[1]} is needed.")


def weight(
    layer: nn.Module,
    bits: int,
    *,
    per_channel: bool = True,
    grid: str = "uniform",
    symmetric: bool = True,
    clip: str = "none",
    percentile: float = PERCENTILE,
) -> Tensor:
    """A layer's weight, rounded; by default symmetric with one scale per output channel.

    Parameters
    ----------
    layer
        A convolution, transposed or not, or a linear layer.
    bits
        At least 2.
    per_channel
        One grid per output channel, or one for the tensor.
    grid
        One of `_grids.GRIDS`.
    symmetric, clip, percentile
        Of a uniform grid; see `_grids.uniform`.

    Returns
    -------
    Tensor
        Shape and dtype of the weight; at most ``2^bits`` different values on each grid.
    """
    given = rows(layer, layer.weight.detach())
    together = given if per_channel else given.reshape(1, -1)
    if grid == "log":
        found = _grids.logarithmic(together, bits)
    elif grid == "kmeans":
        found = _grids.codebook(together, bits)
    else:
        found = _grids.uniform(together, bits, symmetric=symmetric, clip=clip, percentile=percentile)
    return back(layer, found.reshape(given.shape))


def rows(layer: nn.Module, values: Tensor) -> Tensor:
    """A tensor of the shape of a layer's weight, a row per output channel."""
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        # (inputs, outputs of a group, …): an output channel is one column of one group
        values = values.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(0, 1)
    return values.flatten(1)


def back(layer: nn.Module, by_row: Tensor) -> Tensor:
    """What `rows` gave, in the shape of the layer's weight."""
    shape = layer.weight.shape
    if not isinstance(layer, nn.modules.conv._ConvTransposeNd):
        return by_row.reshape(shape)
    columns = by_row.reshape(layer.groups, shape[1], shape[0] // layer.groups, *shape[2:])
    return columns.transpose(1, 2).flatten(0, 1)


def activation(values: Tensor, bits: int, low: float, high: float) -> Tensor:
    """An activation, asymmetric with one scale and zero point for the whole tensor, rounded to nearest.

    ``x̂ = s · (clamp(round(x / s) + z, 0, 2^bits - 1) - z)`` with ``s = (high - low) / (2^bits - 1)`` and
    ``z = round(-low / s)``. Zero is always one of the values, so that padding stays what it is.

    Parameters
    ----------
    values
        Any shape, floating.
    bits
        At least 2.
    low, high
        The range that is kept; what lies outside becomes its nearer end.
    """
    return fake_quantised.rounded(values, *_affine(bits, low, high), bits)


def round_input(module: nn.Module, layer: str, bits: int, low: float, high: float) -> None:
    """Let a layer of `module`, changed in place, round its input as `activation` does."""
    parts.put(module, layer, "fake_quantised", bits=bits)
    part = module.get_submodule(layer)
    scale, zero_point = _affine(bits, low, high)
    part.input_scale.fill_(scale)
    part.input_zero_point.fill_(zero_point)


def _affine(bits: int, low: float, high: float) -> tuple[float, int]:
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / (2**bits - 1)
    if not math.isfinite(scale) or scale <= 0:
        scale = 1.0  # a range of nothing but zero
    return scale, round(-low / scale)

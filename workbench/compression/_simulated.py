"""Simulated quantisation: tensors rounded to what so many bits can hold, and computed with in float.

Scheme after Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference", 2018, sections 2.1, 2.2
and 2.6, and Nagel et al., "A White Paper on Neural Network Quantization", 2021, section 2.2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def weight(layer: nn.Module, bits: int) -> Tensor:
    """A layer's weight, symmetric with one scale per output channel, rounded to nearest.

    ``ŵ = s · clamp(round(w / s), -n, n)`` with ``n = 2^(bits - 1) - 1`` and ``s = max |w| / n`` of the output channel.

    Parameters
    ----------
    layer
        A convolution, transposed or not, or a linear layer.
    bits
        At least 2.

    Returns
    -------
    Tensor
        Shape and dtype of the weight; at most ``2^bits - 1`` different values in each output channel.
    """
    values = layer.weight.detach()
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        # (inputs, outputs of a group, …): an output channel is one column of one group
        return _symmetric(values.unflatten(0, (layer.groups, -1)), bits, (0, 2)).flatten(0, 1)
    return _symmetric(values, bits, (0,))


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
    low, high = min(low, 0.0), max(high, 0.0)
    steps = 2**bits - 1
    scale = (high - low) / steps or 1.0  # a range of nothing but zero
    zero = round(-low / scale)
    return ((values / scale).round() + zero).clamp(0, steps).sub(zero).mul(scale)


def _symmetric(values: Tensor, bits: int, channels: tuple[int, ...]) -> Tensor:
    most = 2 ** (bits - 1) - 1
    others = [axis for axis in range(values.ndim) if axis not in channels]
    scale = values.abs().amax(others, keepdim=True) / most
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (values / scale).round().clamp(-most, most) * scale

"""Part "fake_quantised": a convolution or linear layer whose input is rounded to what so many bits hold, in float."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn


def rounded(values: Tensor, scale: Tensor | float, zero_point: Tensor | float, bits: int) -> Tensor:
    """Values on an asymmetric grid of ``2^bits`` steps: ``s · (clamp(round(x / s) + z, 0, 2^bits - 1) - z)``.

    Parameters
    ----------
    values
        Any shape, floating.
    scale
        Above 0.
    zero_point
        A whole number from 0 to ``2^bits - 1``, so that zero is one of the values.
    bits
        At least 2.

    Notes
    -----
    Halves are rounded to even, as ONNX and torch do. Scheme after Jacob et al., "Quantization and Training of Neural
    Networks for Efficient Integer-Arithmetic-Only Inference", CVPR 2018, equation 1.
    """
    return ((values / scale).round() + zero_point).clamp(0, 2**bits - 1).sub(zero_point).mul(scale)


class RoundedInput:
    """What a layer is besides: its input is rounded by the buffers ``input_scale`` and ``input_zero_point``."""

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: A002 torch's own name for it
        """The layer's output for the rounded input."""
        return super().forward(
            rounded(input, self.input_scale, self.input_zero_point, self.input_bits), *args, **kwargs
        )

    def extra_repr(self) -> str:
        """The layer's settings, and the width of its input."""
        return f"{super().extra_repr()}, input_bits={self.input_bits}"


@cache
def _kind(layer: type[nn.Module]) -> type[nn.Module]:
    return type(f"FakeQuantised{layer.__name__}", (RoundedInput, layer), {"__module__": __name__})


def build(old: nn.Module, bits: int) -> nn.Module:
    """The same layer with a rounded input; its scale is 1 and its zero point 0 until they are set."""
    new = copy.deepcopy(old)
    new.__class__ = _kind(type(old))
    new.input_bits = bits
    like = {"dtype": old.weight.dtype, "device": old.weight.device}
    new.register_buffer("input_scale", torch.ones((), **like))
    new.register_buffer("input_zero_point", torch.zeros((), **like))
    return new

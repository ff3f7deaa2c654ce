"""Part "quantisation_aware": a layer that rounds its weight, what it takes and what it gives while it is trained.

Rounding is torch's own fake quantisation: in float, with the gradient of the identity inside the range and none outside
(Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", CVPR
2018, section 3). For ONNX such a layer becomes an `integer` one, whose weight and bias are whole numbers already.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.onnx.ops import symbolic

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

_STEPS = 255  # of an activation
_LARGEST_BIAS = 2.0**30
_MOVING = 0.01  # how far a range moves towards that of one batch


class Aware:
    """What any layer is besides: what it gives is rounded, where it has an ``output_range``.

    Attributes
    ----------
    input_range, output_range
        Buffers ``(2,)``: the least and the greatest value kept, zero between them. None where nothing is rounded.
    observing
        Whether ranges grow to hold all that passes, which goes on unrounded.
    following
        Whether ranges move towards those of each batch while the layer is trained.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output, rounded."""
        return self._rounded(super().forward(*args, **kwargs), self.output_range)

    def _rounded(self, values: Tensor, kept: Tensor | None) -> Tensor:
        if kept is None:
            return values
        if self.observing or (self.following and self.training):
            self._see(values.detach(), kept)
        if self.observing:
            return values
        return torch.fake_quantize_per_tensor_affine(values, *affine(kept), 0, _STEPS)

    def _see(self, values: Tensor, kept: Tensor) -> None:
        low, high = values.aminmax()
        seen = torch.stack([low.clamp_max(0), high.clamp_min(0)])
        if not self.observing:
            kept.lerp_(seen, _MOVING)
            return
        kept[0], kept[1] = torch.minimum(kept[0], seen[0]), torch.maximum(kept[1], seen[1])

    def extra_repr(self) -> str:
        """The layer's settings, and what of it is rounded."""
        ends = [end for end in ("input", "output") if getattr(self, f"{end}_range") is not None]
        bits = [f"weight_bits={self.weight_bits}"] if self.weight_bits else []
        return ", ".join(filter(None, (super().extra_repr(), *bits, *(f"{end}_bits=8" for end in ends))))


class AwareWeighted(Aware):
    """The same for a convolution or linear layer: its weight is rounded per output channel, and its input may be."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 torch's own name for it
        """The layer's output for the rounded weight."""
        scale, most = weight_scale(self.weight, self.weight_bits), 2 ** (self.weight_bits - 1) - 1
        zero = torch.zeros(len(scale), dtype=torch.int32, device=scale.device)
        weight = torch.fake_quantize_per_channel_affine(self.weight, scale, zero, 0, -most, most)
        given = self._rounded(input, self.input_range)
        return self._rounded(_product(self, given, weight, self.bias), self.output_range)


class Integer:
    """The same in whole numbers, for ONNX alone: inputs, outputs, weight and bias go through Q/DQ nodes.

    Attributes
    ----------
    weight, weight_scale, weight_zero_point
        s8 and a scale per output channel; transposed where `rows` is False.
    bias, bias_scale, bias_zero_point
        s32 in units of weight_scale × scale of the input, as integer kernels add it; float32 where `rows` is False.
    rows
        Whether the layer takes one row per sample, or is a convolution; else it becomes a MatMul and an Add.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """What ONNX is to compute; only while it is exported."""
        if not self.weight_bits:
            return _through_u8(self, "output", super().forward(*args, **kwargs))
        given = _through_u8(self, "input", args[0])
        weight = _dequantised(self, "weight", 0 if self.rows else 1)
        if not self.rows:
            output = given @ weight
            return _through_u8(self, "output", output if self.bias is None else output + self.bias)
        bias = None if self.bias is None else _dequantised(self, "bias", 0)
        return _through_u8(self, "output", _product(self, given, weight, bias))


def build(old: nn.Module, *, weight_bits: int = 0, takes: bool = False, gives: bool = False) -> nn.Module:
    """The same layer, rounding what it is told to; its ranges hold nothing but zero until they are set.

    Parameters
    ----------
    weight_bits
        Of the weight of a convolution (1 to 3 dimensions) or a linear layer; 0 for any other layer.
    takes
        Whether its input is rounded; only of a layer with a weight.
    gives
        Whether its output is rounded, which is one tensor.
    """
    new = copy.deepcopy(old)
    new.__class__ = _kind(type(old), AwareWeighted if weight_bits else Aware)
    new.weight_bits, new.observing, new.following = weight_bits, False, False
    weight = getattr(old, "weight", None)
    device = weight.device if isinstance(weight, Tensor) else None
    for name, rounds in (("input_range", takes), ("output_range", gives)):
        new.register_buffer(name, torch.zeros(2, device=device) if rounds else None)
    return new


def integer(part: nn.Module, input_range: Tensor | None, *, rows: bool) -> nn.Module:
    """A copy of an aware part that `torch.onnx.export` writes with Q/DQ nodes, int8 weights and int32 biases.

    Parameters
    ----------
    input_range
        Of what the layer is given, which it rounds itself or a layer before it does; None where it has no weight.
    rows
        See `Integer`.
    """
    new = copy.deepcopy(part).cpu().requires_grad_(False)
    new.__class__ = _kind(type(part).__bases__[1], Integer)
    new.rows = rows
    for end in ("input", "output"):
        kept = getattr(new, f"{end}_range")
        if kept is not None:
            scale, zero = affine(kept)
            new.register_buffer(f"{end}_scale", scale)
            new.register_buffer(f"{end}_zero_point", zero.to(torch.uint8))
    if not part.weight_bits:
        return new
    weight, bias = new.weight.detach(), None if new.bias is None or not rows else new.bias.detach()
    scale = weight_scale(weight, part.weight_bits)
    if bias is not None:
        step = affine(input_range.cpu())[0]
        # weights so small beside their bias that it would not fit into 32 bits
        scale = torch.maximum(scale, bias.abs() / (step * _LARGEST_BIAS))
        del new.bias
        _hold(new, "bias", (bias / (scale * step)).round().to(torch.int32), scale * step, torch.int32)
    whole = (weight / scale.view(-1, *[1] * (weight.dim() - 1))).round().to(torch.int8)
    del new.weight
    _hold(new, "weight", whole if rows else whole.T.contiguous(), scale, torch.int8)
    return new


def affine(kept: Tensor) -> tuple[Tensor, Tensor]:
    """Scale (float32) and zero point (int32, 0 to 255) of u8 values over a range ``(2,)`` with zero in it."""
    scale = (kept[1] - kept[0]) / _STEPS
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # a range of nothing but zero
    return scale, (-kept[0] / scale).round().to(torch.int32)


def weight_scale(weight: Tensor, bits: int) -> Tensor:
    """Scale ``(channels,)`` of a weight, symmetric per output channel: ``max |w| / (2^(bits - 1) - 1)``.

    A channel of zeros takes the layer's largest, since its bias is written in units of it.
    """
    scale = weight.detach().flatten(1).abs().amax(1) / (2 ** (bits - 1) - 1)
    largest = scale.max()
    return torch.where(scale > 0, scale, torch.where(largest > 0, largest, torch.ones_like(largest)))


def _product(layer: nn.Module, given: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if isinstance(layer, nn.Linear):
        return functional.linear(given, weight, bias)
    return layer._conv_forward(given, weight, bias)


def _through_u8(layer: nn.Module, end: str, values: Tensor) -> Tensor:
    if getattr(layer, f"{end}_range") is None:
        return values
    grid = getattr(layer, f"{end}_scale"), getattr(layer, f"{end}_zero_point")
    whole = symbolic("QuantizeLinear", (values, *grid), dtype=torch.uint8, shape=values.shape)
    return symbolic("DequantizeLinear", (whole, *grid), dtype=torch.float32, shape=values.shape)


def _hold(layer: nn.Module, name: str, whole: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
    layer.register_buffer(name, whole)
    layer.register_buffer(f"{name}_scale", scale)
    layer.register_buffer(f"{name}_zero_point", torch.zeros(len(scale), dtype=dtype))


def _dequantised(layer: nn.Module, name: str, axis: int) -> Tensor:
    given = tuple(getattr(layer, name + suffix) for suffix in ("", "_scale", "_zero_point"))
    return symbolic("DequantizeLinear", given, {"axis": axis}, dtype=torch.float32, shape=given[0].shape)


@cache
def _kind(layer: type[nn.Module], what: type) -> type[nn.Module]:
    return type(f"{what.__name__}{layer.__name__}", (what, layer), {"__module__": __name__})

"""Parts "low_rank_linear" and "low_rank_conv": a layer as two plain ones with a narrow waist between them."""

from __future__ import annotations

from typing import Any

from torch import nn

SPLITS = ("spatial", "channel")

_CONVOLUTIONS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def linear(old: nn.Linear, rank: int) -> nn.Sequential:
    """Two linear layers in the place of one: inputs to `rank`, `rank` to outputs, the bias in the second; zeros."""
    return nn.Sequential(
        _empty(nn.Linear, old, old.in_features, rank, bias=False),
        _empty(nn.Linear, old, rank, old.out_features, bias=old.bias is not None),
    )


def convolution(old: nn.modules.conv._ConvNd, rank: int, split: str) -> nn.Sequential:
    """Two convolutions in the place of one, the bias in the second; zeros.

    Parameters
    ----------
    old
        Neither grouped nor transposed.
    rank
        Channels between the two.
    split
        ``channel``: the old kernel, stride and padding to `rank` channels, then 1 × 1. ``spatial``, in two dimensions:
        k × 1 over the rows, then 1 × k over the columns, each with its axis's stride, padding and dilation.
    """
    kind = _CONVOLUTIONS[len(old.kernel_size)]
    place = {name: getattr(old, name) for name in ("kernel_size", "stride", "padding", "dilation")}
    if split == "channel":
        first, second = place, {"kernel_size": 1}
    else:
        first, second = ({name: _axis(name, value, axis) for name, value in place.items()} for axis in (0, 1))
    mode = old.padding_mode
    return nn.Sequential(
        _empty(kind, old, old.in_channels, rank, bias=False, padding_mode=mode, **first),
        _empty(kind, old, rank, old.out_channels, bias=old.bias is not None, padding_mode=mode, **second),
    )


def _axis(name: str, value: tuple[int, int] | str, axis: int) -> tuple[int, ...] | str:
    """A setting of a two-dimensional convolution for one axis, the other left alone; words hold for any axis."""
    if isinstance(value, str):
        return value
    neutral = 0 if name == "padding" else 1
    return tuple(value[i] if i == axis else neutral for i in (0, 1))


def _empty(kind: type[nn.Module], old: nn.Module, *widths: int, **settings: Any) -> nn.Module:
    # skip_init draws no random weights, which would move torch's generator under the caller's feet
    weight = old.weight
    layer = nn.utils.skip_init(kind, *widths, device=weight.device, dtype=weight.dtype, **settings)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer.requires_grad_(weight.requires_grad)

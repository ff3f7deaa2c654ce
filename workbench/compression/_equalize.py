"""Cross-layer equalisation: the channels between two layers rescaled so that neither has much larger ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from workbench.compression import _checks, _flow, _folding, _training
from workbench.models.model import Model

# f(s · x) = s · f(x) for s > 0, each value by itself
_ELEMENTWISE = (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.Identity, nn.Dropout, nn.Dropout2d, nn.Dropout3d)
_ELEMENTWISE_CALLS = ("relu", "leaky_relu", "prelu", "dropout")
# the same, each channel by itself
_POOLS = tuple(
    getattr(nn, f"{kind}Pool{axes}d") for kind in ("Max", "Avg", "AdaptiveMax", "AdaptiveAvg") for axes in (1, 2, 3)
)
_POOL_CALLS = tuple(f"{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_max", "adaptive_avg") for n in (1, 2, 3))
_FLATTENING_CALLS = ("flatten", "reshape", "view")

_SWEEPS = 50
_STEADY = 1e-3  # a sweep that scales nothing by more than this share is the last


@dataclass(frozen=True)
class Pair:
    """Two layers, the second of which alone reads the first through nothing that a scale would not pass."""

    first: str
    second: str


def pairs(model: Model) -> list[Pair]:
    """The pairs of layers between which a channel can be rescaled, in execution order."""
    calls = _flow.calls(model)
    single = _flow.called_once(model, calls)
    found = []
    for call in calls:
        if call.module in single and _has_channels(call.module):
            reader = _next_layer(call)
            if reader is not None and reader.module in single and _reads_channels(call, reader):
                found.append(Pair(call.path, reader.path))
    return found


def equalized(model: Model, between: list[Pair]) -> Model:
    """The same function, the ranges of each channel made equal on both sides of each pair.

    The outputs of channel i of the first layer are divided by ``s_i = √(r1_i · r2_i) / r2_i`` and the weights of the
    second that read it multiplied, where ``r`` is the largest magnitude of the channel's weights in either layer; pair
    after pair, until nothing moves. A channel whose weights are all zero on one side stays as it is.

    Notes
    -----
    After Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019, section
    4.1, equations 9 and 11.
    """
    module = _training.copied(model).module
    with torch.no_grad():
        for _ in range(_SWEEPS):
            moved = [_equalize(module.get_submodule(p.first), module.get_submodule(p.second)) for p in between]
            if max(moved) < _STEADY:
                break
    return _folding.changed(model, module)


def _equalize(first: nn.Module, second: nn.Module) -> float:
    rows, columns = first.weight.flatten(1), _by_input_channel(second, len(first.weight))
    scale = (rows.abs().amax(1) / columns.abs().amax((1, 3)).flatten()).sqrt()
    scale = torch.where(scale.isfinite() & (scale > 0), scale, torch.ones_like(scale))
    first.weight.copy_((rows / scale[:, None]).view_as(first.weight))
    second.weight.copy_((columns * scale.view(len(columns), 1, -1, 1)).view_as(second.weight))
    if first.bias is not None:
        first.bias.div_(scale)
    return float((scale - 1).abs().max())


def _by_input_channel(layer: nn.Module, channels: int) -> Tensor:
    """The weight as (groups, outputs of a group, input channels of a group, weights of each)."""
    groups = getattr(layer, "groups", 1)
    return layer.weight.reshape(groups, len(layer.weight) // groups, channels // groups, -1)


def _has_channels(module: nn.Module | None) -> bool:
    return isinstance(module, _checks.WEIGHTED) and not getattr(module, "transposed", False)


def _next_layer(call: _flow.Call) -> _flow.Call | None:
    """The convolution or linear layer that alone reads a call, through what passes a scale of each channel."""
    linear = isinstance(call.module, nn.Linear)
    reader = call.reader
    while reader is not None and not isinstance(reader.module, _checks.WEIGHTED):
        channelwise = isinstance(reader.module, _POOLS) or reader.operation in _POOL_CALLS or _flattens(reader)
        elementwise = isinstance(reader.module, _ELEMENTWISE) or reader.operation in _ELEMENTWISE_CALLS
        # a linear layer's channels lie on the last axis, where a pool would mix them
        reader = reader.reader if elementwise or (channelwise and not linear) else None
    return reader


def _flattens(call: _flow.Call) -> bool:
    """Whether a call makes ``(N, C, …)`` to ``(N, C · …)``, each channel's values staying together."""
    named = isinstance(call.module, nn.Flatten) or call.operation in _FLATTENING_CALLS
    return named and len(call.taken) > 2 and len(call.given) == 2 and call.taken[0] == call.given[0]


def _reads_channels(first: _flow.Call, second: _flow.Call) -> bool:
    """Whether the input channels of the second are the output channels of the first, in order."""
    if not _has_channels(second.module):
        return False
    if isinstance(first.module, nn.Linear):
        return isinstance(second.module, nn.Linear)
    if isinstance(second.module, nn.Linear):
        return len(second.taken) == 2 and second.module.in_features % first.module.out_channels == 0
    return second.module.in_channels == first.module.out_channels and len(second.taken) == len(first.given)

"""Batch norms taken into the layers before them, as engines do before they quantise."""

from __future__ import annotations

import torch
from torch import nn

from workbench.compression import _checks, _flow, _simulated, _training
from workbench.models import parts, structure
from workbench.models.model import Model

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def folded(model: Model) -> Model:
    """The same function with each batch norm that alone reads a convolution or linear layer folded into that layer.

    A clustered model stays as it is: channels that are scaled apart no longer share values.

    With ``f = weight / √(variance + eps)`` of the norm, an output channel's weights become ``f · w`` and its bias
    ``f · (b - mean) + bias``.

    Notes
    -----
    After Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
    CVPR 2018, equation 14, with the running statistics.
    """
    if "clustered" in model.changes:
        return model
    calls = _flow.calls(model)
    single = _flow.called_once(model, calls)
    pairs = [
        (call.path, call.reader.path)
        for call in calls
        if call.reader is not None and {call.module, call.reader.module} <= single and _fit(call, call.reader.module)
    ]
    if not pairs:
        return model
    module = _training.copied(model).module
    for layer, norm in pairs:
        _fold(module, layer, norm)
    return changed(model, module)


def changed(model: Model, module: nn.Module) -> Model:
    """`model` with another module of the same function, its edits written down."""
    edit = structure.difference(model.module, module)
    return model.changed("", module=module, edits=(*model.edits, edit) if edit else model.edits)


def with_bias(module: nn.Module, layer: str) -> nn.Module:
    """The layer of that name in `module`, which is changed in place so that it has a bias."""
    if module.get_submodule(layer).bias is None:
        parts.put(module, layer, "biased")
    return module.get_submodule(layer)


def _fit(call: _flow.Call, norm: nn.Module | None) -> bool:
    layer = call.module
    if not isinstance(layer, _checks.WEIGHTED) or type(norm) not in _NORMS or norm.running_var is None:
        return False
    # a linear layer's channels lie on the last axis, which the norm takes for them only where it is the second
    plain = not isinstance(layer, nn.Linear) or len(call.given) == 2
    return plain and call.given[1:2] == (norm.num_features,)


@torch.no_grad()
def _fold(module: nn.Module, layer_path: str, norm_path: str) -> None:
    norm = module.get_submodule(norm_path)
    layer = with_bias(module, layer_path)
    factor = (norm.running_var + norm.eps).rsqrt() * (1 if norm.weight is None else norm.weight)
    layer.weight.copy_(_simulated.back(layer, _simulated.rows(layer, layer.weight) * factor[:, None]))
    layer.bias.sub_(norm.running_mean).mul_(factor)
    if norm.bias is not None:
        layer.bias.add_(norm.bias)
    parts.put(module, norm_path, "folded")

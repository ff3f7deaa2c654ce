"""Parts "folded" and "biased": a batch norm that its layer has taken in, and a layer that was given a bias."""

from __future__ import annotations

import copy

import torch
from torch import nn


class Folded(nn.Identity):
    """Stands where a batch norm was."""


def norm(old: nn.Module) -> nn.Module:
    """Nothing, in the place of a batch norm whose work the layer before it does now."""
    return Folded()


def biased(old: nn.Module) -> nn.Module:
    """The same convolution or linear layer with a bias of its own: the old one's, or zeros."""
    new = copy.deepcopy(old)
    if new.bias is None:
        width = old.out_features if isinstance(old, nn.Linear) else old.out_channels
        zeros = torch.zeros(width, dtype=old.weight.dtype, device=old.weight.device)
        new.bias = nn.Parameter(zeros, requires_grad=old.weight.requires_grad)
    return new

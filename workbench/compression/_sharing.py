"""Weights that share a value go on sharing it while they are trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from workbench.compression import _checks
from workbench.compression._constraints import Constraint


class KeepShared(Constraint):
    """Weights of convolutions and linear layers that have a value in common keep one, and zeros stay zero.

    The gradient of each becomes the sum over all that share its value, so that they move as one centroid would: Han et
    al., "Deep Compression", ICLR 2016, equation 3. Since they move as a sum does, SGD wants a far smaller learning rate
    than it does for single weights; Adam, which goes by the sign, the same.

    Parameters
    ----------
    module
        As clustering left it. Frozen weights, and layers in which no more weights are alike than chance brings about,
        are left alone.
    """

    def __init__(self, module: nn.Module):
        weights = dict.fromkeys(layer.weight for layer in module.modules() if isinstance(layer, _checks.WEIGHTED))
        self._weights = [weight for weight in weights if weight.requires_grad and _is_shared(weight.detach())]
        if not self._weights:
            return
        values, which = torch.unique(self._together(self._weights), return_inverse=True)
        self._zero = values == 0
        self._which = which
        # one member of each value, from which the others take it again after an update
        self._first = torch.full_like(self._zero, len(which), dtype=torch.int64)
        self._first.scatter_reduce_(0, which, torch.arange(len(which), device=which.device), "amin")

    def after_gradients(self) -> None:
        """Replace each gradient by the sum over the weights that share its value; by zero where the value is zero."""
        if not self._weights:
            return
        gradients = [torch.zeros_like(w) if w.grad is None else w.grad for w in self._weights]
        sums = torch.bincount(self._which, self._together(gradients).double(), len(self._zero))
        for weight, alike in self._apart(sums.masked_fill_(self._zero, 0)):
            weight.grad = alike

    def after_update(self) -> None:
        """Make equal again what an optimiser's rounding may have moved apart."""
        if not self._weights:
            return
        values = self._together(self._weights)[self._first].masked_fill_(self._zero, 0)
        for weight, alike in self._apart(values):
            weight.copy_(alike)

    def _apart(self, by_value: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
        parts = by_value.float()[self._which].split([w.numel() for w in self._weights])
        return [(weight, part.view_as(weight)) for weight, part in zip(self._weights, parts, strict=True)]

    @staticmethod
    def _together(tensors: list[Tensor]) -> Tensor:
        return torch.cat([tensor.detach().flatten() for tensor in tensors])


def _is_shared(weight: Tensor) -> bool:
    """Whether more non-zero weights are alike than chance brings about in float32: of n about n² / 2^25."""
    held = weight[weight != 0]
    count = held.numel()
    return count - held.unique().numel() > min(count / 2, count**2 / 2**22)

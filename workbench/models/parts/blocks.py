"""Part "blocks": some of the blocks of a stack, in the place of all of them."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import nn


def blocks(old: nn.Module, keep: Sequence[int]) -> nn.Module:
    """The stack with the blocks at these places only, weights included.

    Parameters
    ----------
    old
        An `nn.Sequential` or `nn.ModuleList`.
    keep
        Places of the blocks that stay, from 0. Blocks that are named by number are numbered anew; others keep their
        names.
    """
    names, children = list(old._modules), list(old._modules.values())
    numbered = all(name.isdigit() for name in names)
    new = copy.copy(old)  # of the same class, with the same settings
    new._modules = {str(place) if numbered else names[i]: children[i] for place, i in enumerate(keep)}
    return new

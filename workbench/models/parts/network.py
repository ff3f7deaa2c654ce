"""Part "network": a network of the zoo in the place of another."""

from __future__ import annotations

from torch import nn

from workbench.models import zoo


def network(old: nn.Module, name: str, seed: int) -> nn.Module:
    """The zoo's network of that name with random weights, on the device of the old one.

    Parameters
    ----------
    name
        A name in `zoo.ZOO`.
    seed
        Of the weights.
    """
    module = zoo.build(name, seed)
    weight = next(old.parameters(), None)
    return module if weight is None else module.to(weight.device)

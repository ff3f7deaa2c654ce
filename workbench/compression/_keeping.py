"""What earlier steps made of the weights goes on holding while they are trained."""

from __future__ import annotations

from workbench.compression import _checks
from workbench.compression._constraints import Constraint, KeepZeros
from workbench.compression._sharing import KeepShared
from workbench.models.model import Model


def constraints(model: Model) -> list[Constraint]:
    """Those under which `model` may be trained: pruned weights stay zero, shared values stay shared.

    Parameters
    ----------
    model
        The one whose module is trained, as `_training.copied` gives it, its `changes` telling what was done to it.
    """
    kept: list[Constraint] = []
    if "pruned" in model.changes:
        weights = [layer.weight for layer in model.module.modules() if isinstance(layer, _checks.WEIGHTED)]
        kept.append(KeepZeros(weights))
    if "clustered" in model.changes:
        kept.append(KeepShared(model.module))
    return kept

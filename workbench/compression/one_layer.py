"""A model with one layer pruned or quantised and all others as they were: what a sensitivity analysis tries."""

from __future__ import annotations

import copy

import torch
from torch import nn

from workbench.compression import _activations, _calibrated, _channels, _checks, _simulated
from workbench.compression._ranking import Rule
from workbench.compression.prune import Prune
from workbench.data.task import Task
from workbench.errors import StepError
from workbench.jobs import SILENT, Progress
from workbench.models.model import Model


def check(model: Model) -> None:
    """Refuse a model without a float32 torch module that has convolutions or linear layers; raises `StepError`."""
    if model.module is None or model.precision != "fp32":
        held = "an ONNX graph only" if model.module is None else model.precision
        raise StepError(
            f"One layer at a time is changed in a float32 torch module, and {model.name} is {held}. Give the model as "
            "it was before wb.Quantize, or load the network as a module."
        )
    _checks.trainable("Sensitivity", model, "…")
    _checks.has_weighted_layers("Sensitivity", model)


def check_ratio(ratio: float) -> None:
    """Refuse a share of channels that `pruned` does not take; raises `StepError`."""
    Prune(ratio)


def check_bits(bits: int) -> None:
    """Refuse a width that `quantised` does not take; raises `StepError`."""
    _simulated.check_bits(bits)


def weighted(model: Model) -> tuple[str, ...]:
    """Names of the convolutions and linear layers that the network calls, in execution order.

    A layer whose weight is used without a call, such as the output projection inside torch's attention, is none.
    """
    modules = dict(model.module.named_modules())
    return tuple(
        layer for layer in dict.fromkeys(model.layers["layer"]) if isinstance(modules.get(layer), _checks.WEIGHTED)
    )


def prunable(model: Model) -> dict[str, tuple[str, ...]]:
    """Layers that can lose output channels, in execution order: the first to run of each group that loses the same.

    Returns
    -------
    dict
        By layer, all that lose the same channels, itself among them.

    Raises
    ------
    StepError
        If the network cannot be traced.
    """
    order = {layer: place for place, layer in enumerate(weighted(model))}
    groups = [tuple(sorted(group.losing, key=order.__getitem__)) for group in _channels.removable(model)]
    return {group[0]: group for group in sorted(groups, key=lambda group: order[group[0]])}


def pruned(model: Model, layer: str, ratio: float) -> Model:
    """`model` with the least important output channels of one layer, by their L2 norm, removed.

    Parameters
    ----------
    layer
        One that `prunable` lists. Those of its group lose the same channels, and what reads them loses inputs.
    ratio
        Above 0 and below 1. Widths are exact, not rounded to what runs fast: the curve is to be read at `ratio`.

    Raises
    ------
    StepError
        If the layer cannot lose channels, or has too few to lose any at this ratio.
    """
    check_ratio(ratio)
    return _channels.Channels(model, Rule(layers={layer: ratio})).cut(model)


def input_ranges(model: Model, task: Task, *, progress: Progress = SILENT) -> dict[str, tuple[float, float]]:
    """Smallest and largest input of each layer `weighted` lists, over the task's calibration split.

    Raises
    ------
    DataError
        If there is no calibration split, or an input is NaN or infinite.
    """
    return _activations.extents(model, weighted(model), _calibrated.samples(model, task), progress=progress)


def quantised(model: Model, layer: str, bits: int, input_range: tuple[float, float]) -> Model:
    """`model` with the weight and the input of one layer rounded to what `bits` hold, and computed with in float.

    The weight is symmetric with a scale per output channel, the input asymmetric for the whole tensor, both rounded to
    nearest; see `_simulated`. The bias stays as it is: engines keep it in 32 bits.

    Parameters
    ----------
    layer
        One that `weighted` lists.
    bits
        From 2 to 16, of both.
    input_range
        What `input_ranges` gives for it.

    Raises
    ------
    StepError
        If `bits` is out of range.
    """
    check_bits(bits)
    module = copy.deepcopy(model.module)
    part = module.get_submodule(layer)
    with torch.no_grad():
        # a parameter of its own: another layer may share the old one, and is to stay as it is
        part.weight = nn.Parameter(_simulated.weight(part, bits), requires_grad=part.weight.requires_grad)
    _simulated.round_input(module, layer, bits, *input_range)
    return model.changed("quantised", module=module)

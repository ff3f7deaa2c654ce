"""A model with one layer pruned or quantised and all others as they were: what a sensitivity analysis tries."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from workbench.compression import _checks, _simulated, _torch_pruning
from workbench.compression.prune import Prune
from workbench.data.task import Task
from workbench.deployment import Eager
from workbench.errors import DataError, StepError
from workbench.jobs import SILENT, Progress
from workbench.models import structure
from workbench.models.model import Model

BITS = (2, 16)  # the fewest and the most that are simulated
_CHUNK = 32  # samples


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
    if isinstance(bits, bool) or not isinstance(bits, int) or not BITS[0] <= bits <= BITS[1]:
        raise StepError(f"{bits!r} bits cannot be simulated; a whole number from {BITS[0]} to {BITS[1]} is needed.")


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
    groups = [tuple(sorted(group, key=order.__getitem__)) for group in _torch_pruning.removable(model)]
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
    width = _torch_pruning.Width(ratio, importance="l2", scope="layer", round_to=1)
    module = _torch_pruning.remove_channels(model, width, only=layer)
    edit = structure.difference(model.module, module)
    return model.changed("pruned", module=module, edits=(*model.edits, edit))


def input_ranges(model: Model, task: Task, *, progress: Progress = SILENT) -> dict[str, tuple[float, float]]:
    """Smallest and largest input of each layer `weighted` lists, over the task's calibration split.

    Raises
    ------
    DataError
        If there is no calibration split, or an input is NaN or infinite.
    """
    count = task.count("calibration")
    if not count:
        raise DataError(
            f"{task.name} has no calibration samples to take ranges from; build it with "
            "wb.Task.from_arrays(…, calibration=512)."
        )
    module = copy.deepcopy(model.module)
    ranges: dict[str, tuple[float, float]] = {}
    with Eager().compile(model.changed("", module=module)) as engine:
        for layer in weighted(model):
            module.get_submodule(layer).register_forward_pre_hook(_noting(ranges, layer), with_kwargs=True)
        done = 0
        for inputs, labels in task.batches("calibration", _CHUNK):
            progress(done / count, f"ranges, {done} of {count} samples")
            engine(*inputs)
            done += len(labels)
    return ranges


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
    part.register_forward_pre_hook(_rounding(bits, *input_range), with_kwargs=True)
    return model.changed("quantised", module=module)


def _noting(ranges: dict[str, tuple[float, float]], layer: str) -> Callable:
    def hook(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        low, high = (float(end) for end in _input(args, kwargs).aminmax())
        if not math.isfinite(high - low):
            raise DataError(
                f"The input of {layer} is NaN or infinite on calibration samples, so that no range can be taken. Check "
                "that preprocessing and weights belong together."
            )
        before = ranges.get(layer, (low, high))
        ranges[layer] = min(low, before[0]), max(high, before[1])

    return hook


def _rounding(bits: int, low: float, high: float) -> Callable:
    def hook(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        rounded = _simulated.activation(_input(args, kwargs), bits, low, high)
        return ((rounded, *args[1:]), kwargs) if args else (args, {**kwargs, "input": rounded})

    return hook


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["input"]

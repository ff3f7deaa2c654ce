"""What every step asks of its settings and of the model it is given."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from workbench.errors import StepError, nearest
from workbench.models.model import Model

WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear)


def choice(step: str, setting: str, value: Any, accepted: Iterable[str]) -> None:
    """Refuse a setting that is not one of the accepted words."""
    accepted = tuple(accepted)
    if value not in accepted:
        raise StepError(f"{step} has no {setting} {value!r}. {nearest(str(value), accepted)}")


def whole(step: str, setting: str, value: Any, least: int = 1) -> None:
    """Refuse a setting that is not a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise StepError(f"{step}: {setting} is {value!r}; a whole number of at least {least} is needed.")


def flag(step: str, setting: str, value: Any) -> None:
    """Refuse a setting that is not True or False."""
    if not isinstance(value, bool):
        raise StepError(f"{step}: {setting} is {value!r}; True or False is needed.")


def layers(step: str, given: Iterable[str], known: Iterable[str], what: str = "layers it can change") -> None:
    """Refuse names that are not among `known`; the nearest one and all accepted are listed.

    Raises
    ------
    StepError
        Naming the first unknown one.
    """
    known = tuple(known)
    for name in given:
        if name not in known:
            raise StepError(f"{step}: there is no layer {name!r} among the {what}. {nearest(name, known)}")


def number(
    step: str, setting: str, value: Any, low: float, high: float = math.inf, *, low_allowed: bool = False
) -> None:
    """Refuse a setting that is not a number strictly between `low` and `high`; `low` itself where allowed."""
    real = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not real or not (low < value < high or (low_allowed and value == low)):
        above = f"at least {low:g}" if low_allowed else f"above {low:g}"
        below = "" if math.isinf(high) else f" and below {high:g}"
        raise StepError(f"{step}: {setting} is {value!r}; a number {above}{below} is needed.")


def trainable(step: str, model: Model, before: str) -> None:
    """Refuse a model without a torch module whose float32 weights a step may change.

    Raises
    ------
    StepError
        If the model is quantised, only a graph, cast to another precision, or holds weights that are not finite.
    """
    if "quantised" in model.changes or model.precision != "fp32":
        raise StepError(
            f"{step} needs float32 weights, and {model.name} is already {model.precision}. "
            f"Put it before wb.Quantize: [{before}, wb.Quantize(…)]."
        )
    if model.module is None:
        raise StepError(
            f"{step} needs a torch module, and {model.name} is an ONNX graph only. Load the network as a module or a "
            "checkpoint with its architecture; a graph can be quantised but not retrained."
        )
    if not any(p.is_floating_point() and p.numel() for p in model.module.parameters()):
        raise StepError(f"{step} needs weights, and {model.name} has none.")
    for name, parameter in model.module.named_parameters():
        if parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
            raise StepError(f"{step}: {name!r} of {model.name} holds NaN or infinity. Load sound weights first.")


def has_weighted_layers(step: str, model: Model) -> None:
    """Refuse a module in which no convolution or linear layer is to be found."""
    if not any(isinstance(layer, WEIGHTED) for layer in model.module.modules()):
        raise StepError(
            f"{step} works on torch's own convolutions and linear layers, and {model.name} shows none. TorchScript "
            "and Keras modules hide theirs: load the network as a module, or a checkpoint with its architecture."
        )

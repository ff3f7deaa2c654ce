"""What every step asks of its settings and of the model it is given."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from workbench.compression._plan import OPTIMISERS
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
    step: str,
    setting: str,
    value: Any,
    low: float,
    high: float = math.inf,
    *,
    low_allowed: bool = False,
    high_allowed: bool = False,
) -> None:
    """Refuse a setting that is not a number strictly between `low` and `high`; the ends themselves where allowed."""
    real = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not real or not (low < value < high or (low_allowed and value == low) or (high_allowed and value == high)):
        above = f"at least {low:g}" if low_allowed else f"above {low:g}"
        below = "" if math.isinf(high) else f" and {'at most' if high_allowed else 'below'} {high:g}"
        raise StepError(f"{step}: {setting} is {value!r}; a number {above}{below} is needed.")


def training(step: str, settings: Any) -> None:
    """Refuse settings of a step that trains that are out of range; `settings` has the fields of `_training.Plan`."""
    whole(step, "epochs", settings.epochs)
    number(step, "learning_rate", settings.learning_rate, 0)
    whole(step, "batch_size", settings.batch_size)
    choice(step, "optimizer", settings.optimizer, OPTIMISERS)
    number(step, "weight_decay", settings.weight_decay, 0, low_allowed=True)
    whole(step, "patience", settings.patience, least=0)
    number(step, "validation", settings.validation, 0, 1, low_allowed=True)
    flag(step, "mixed_precision", settings.mixed_precision)
    if settings.patience and not settings.validation:
        raise StepError(
            f"{step}: patience {settings.patience} waits for a better epoch, which only held-out samples can tell. "
            "Give validation a share above 0, or leave patience at 0."
        )


def any_batch(step: str, model: Model) -> None:
    """Refuse a module that was exported for one batch size alone: the last batch of an epoch is a smaller one."""
    fixed = getattr(model.module, "fixed_batch", None)
    if fixed is not None:
        raise StepError(
            f"{step} needs batches of any size, and {model.name} was exported for batches of {fixed} alone. Export it "
            "with a dynamic batch axis, or load it as a module or a checkpoint with its architecture."
        )


def trainable(step: str, model: Model, before: str = "") -> None:
    """Refuse a model without a torch module whose float32 weights a step may change.

    Parameters
    ----------
    before
        The step as it is to stand before one that quantises; empty for a step that quantises itself.

    Raises
    ------
    StepError
        If the model is quantised, only a graph, cast to another precision, or holds weights that are not finite.
    """
    if "quantised" in model.changes or model.precision != "fp32":
        simulated = model.precision == "simulated"
        held = "simulated in fewer bits" if simulated else model.precision
        quantise = "wb.FakeQuantize(…)" if simulated else "wb.Quantize(…)"
        order = f"Put it before the step that quantises: [{before}, {quantise}]."
        once = "Rounding twice only loses accuracy. Leave one of the steps that quantise out."
        raise StepError(
            f"{step} needs float32 weights, and {model.name} is already {held}. {order if before else once}"
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

"""One layer's weights in two models, side by side: what a step made of each."""

from __future__ import annotations

import pandas as pd
from torch import Tensor

from workbench.compression import _checks
from workbench.errors import StepError, nearest
from workbench.models.model import Model


def comparable_layers(before: Model, after: Model) -> tuple[str, ...]:
    """Names of the convolutions and linear layers that both models have with weights of one shape, in order."""
    if before.module is None or after.module is None:
        return ()
    old, new = _weights(before), _weights(after)
    return tuple(name for name, weight in old.items() if name in new and new[name].shape == weight.shape)


def weight_pairs(before: Model, after: Model, layer: str) -> pd.DataFrame:
    """Each weight of a layer before and after.

    Parameters
    ----------
    before, after
        Two versions of one network, both torch modules.
    layer
        One of `comparable_layers`.

    Returns
    -------
    pandas.DataFrame
        Columns ``before`` and ``after``, float32, a row per weight in the order they are stored.

    Raises
    ------
    StepError
        If one of them is only a graph, or the layer has no weights of one shape in both.
    """
    for model in (before, after):
        if model.module is None:
            raise StepError(
                f"{model.name} is an ONNX graph, whose weights are stored in the engine's own form. Compare the model "
                "as it was before wb.Quantize, or round it with wb.FakeQuantize, which keeps a torch module."
            )
    names = comparable_layers(before, after)
    if layer not in names:
        raise StepError(
            f"{layer!r} has no weights of one shape in both models. {nearest(layer, names) if names else ''}".strip()
        )
    old, new = (_weights(model)[layer].detach().float().flatten().numpy() for model in (before, after))
    return pd.DataFrame({"before": old, "after": new})


def _weights(model: Model) -> dict[str, Tensor]:
    return {name: part.weight for name, part in model.module.named_modules() if isinstance(part, _checks.WEIGHTED)}

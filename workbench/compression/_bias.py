"""Bias correction: what rounding shifts the mean of a layer's outputs by, taken out of its bias."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from workbench.compression import _activations, _folding, _training
from workbench.compression._calibrated import Samples
from workbench.deployment import Eager, Engine
from workbench.jobs import SILENT, Progress
from workbench.models.model import Model


def corrected(
    model: Model,
    reference: Model,
    simulated: Model,
    layers: Sequence[str],
    samples: Samples,
    *,
    progress: Progress = SILENT,
) -> Model:
    """`model` with ``E[y] - E[ŷ]`` of each output channel added to the biases, layer after layer.

    Parameters
    ----------
    model
        What `simulated` was rounded from; a layer without a bias is given one.
    reference
        The float network, of the same layers, whose outputs are right.
    simulated
        The rounded one. Each layer's mean is taken with the biases before it corrected.
    layers
        In execution order. Of a layer that is called more than once, the first call counts.

    Notes
    -----
    After Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019, section
    4.2, with the means taken from data as in its appendix D.
    """
    module, rounded = _training.copied(model).module, _training.copied(simulated)
    for layer in layers:
        for network in (module, rounded.module):
            _folding.with_bias(network, layer)
    exact = _training.copied(reference)
    with Eager().compile(exact) as right, Eager().compile(rounded) as shifted:
        for number, layer in enumerate(layers):
            part = progress.part(number / len(layers), (number + 1) / len(layers), layer)
            wanted = _mean(right, exact.module.get_submodule(layer), samples, part.part(0.0, 0.5))
            found = _mean(shifted, rounded.module.get_submodule(layer), samples, part.part(0.5, 1.0))
            for network in (module, rounded.module):
                bias = network.get_submodule(layer).bias
                with torch.no_grad():
                    bias.add_((wanted - found).to(bias.dtype))
    return _folding.changed(model, module)


def _mean(engine: Engine, layer: nn.Module, samples: Samples, progress: Progress) -> Tensor:
    """Mean output of each channel of a layer, in float64, over samples and positions."""
    sums: list[Tensor] = []
    counts: list[int] = []

    def note(_: Tensor, output: Tensor) -> None:
        by_channel = output.movedim(-1 if isinstance(layer, nn.Linear) else 1, 0).flatten(1)
        sums.append(by_channel.sum(1, dtype=torch.float64))
        counts.append(by_channel.shape[1])

    _activations.up_to(engine, layer, samples, note, progress=progress)
    return torch.stack(sums).sum(0) / sum(counts)

"""The one door: whatever a person has becomes a `Model`."""

from __future__ import annotations

from typing import Any

import torch

from workbench.errors import LoadError
from workbench.models.model import Model
from workbench.models.sources import (
    checkpoint,
    exported,
    keras_file,
    module,
    onnx_file,
    torchscript,
    zoo_name,
)
from workbench.models.sources._base import Request

# asked in this order; a new kind of source is a file with `fits` and `read`, and one line here
_SOURCES = (
    module,
    zoo_name,
    onnx_file,
    keras_file,
    exported,
    torchscript,
    checkpoint,
)


def load(
    source: Any,
    *,
    inputs: Any = None,
    architecture: Any = None,
    weights: str | None = None,
    name: str | None = None,
) -> Model:
    """A `Model` from a module, a name of the zoo, or a file.

    Parameters
    ----------
    source
        A `torch.nn.Module` (with `inputs`); a zoo name such as ``"lenet5"``; or a path: a checkpoint (``.pt``,
        ``.pth``, ``.th``, ``.ckpt``, ``.safetensors``, with `architecture`), ``.onnx``, ``.pt2`` (`torch.export`),
        TorchScript, or Keras 3 (``.keras``, ``.h5``). What a file is, is read from the file where it can be.
    inputs
        One batch of example inputs: a tensor, a tuple of tensors, or a dict of them by keyword; numpy arrays alike.
        Needed where the source does not say what it takes.
    architecture
        For a checkpoint: a zoo name, or a module of the right structure, which is left as it is.
    weights
        For a zoo name: ``"random"``, or the name of the task they were trained on; by default the shipped ones, where
        there are any, and random ones otherwise.
    name
        What a person calls the model; by default the zoo's name, the file's, or the module's class.

    Returns
    -------
    Model
        In evaluation mode, on the CPU, independent of what it was loaded from.

    Raises
    ------
    LoadError
        If the source is missing, damaged, unsafe, not understood, or does not fit the other arguments. Nothing in a
        file is ever run to find out.

    Examples
    --------
    >>> import workbench as wb
    >>> wb.load("lenet5")
    <Model lenet5: module, 61,706 parameters, fp32, weights digits; x: float32 (N, 1, 28, 28)>
    """
    request = Request(source, inputs, architecture, weights, name)
    for kind in _SOURCES:
        if kind.fits(request):
            request.accept_only(kind.OPTIONS, kind.TITLE)
            with torch.random.fork_rng(devices=[]):  # building a network draws its first weights
                return kind.read(request)
    raise LoadError(request.not_understood())

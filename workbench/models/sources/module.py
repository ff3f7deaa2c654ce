"""A module the user holds."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from workbench.errors import LoadError
from workbench.models import inputs, layers
from workbench.models.model import Model
from workbench.models.sources._base import Request

TITLE = "A module"
OPTIONS = {"inputs"}


def fits(request: Request) -> bool:
    """Any `torch.nn.Module`."""
    return isinstance(request.source, nn.Module)


def read(request: Request) -> Model:
    """A copy of the module, checked by one run on its example inputs."""
    module = _unwrapped(request.source)
    name = request.name or type(module).__name__
    module = copied(module, name)
    example, keywords = inputs.example(request.inputs, module, name)
    return checked(module, example, keywords, name, source="module", weights="as given")


def checked(
    module: nn.Module, example: dict[str, Tensor], keywords: bool, name: str, *, source: str, weights: str
) -> Model:
    """A model of a module that is ours to keep, once it has run on its example inputs."""
    layers.run(module.eval(), example, keywords, name)
    return Model(name, example, module=module, keywords=keywords, source=source, weights=weights)


def copied(module: nn.Module, name: str) -> nn.Module:
    """A copy on the CPU: the user's own training must not change a model, nor its evaluation mode the user's training.

    Raises
    ------
    LoadError
        If it cannot be copied.
    """
    try:
        return copy.deepcopy(module).cpu()
    except Exception as error:  # a module's own __deepcopy__ may raise anything
        raise LoadError(
            f"{name} cannot be copied ({error}); compression steps work on copies. Give a freshly built module whose "
            "tensors are parameters or buffers."
        ) from error


def _unwrapped(module: nn.Module) -> nn.Module:
    """Without what `torch.compile` and data parallelism put around it."""
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return _unwrapped(module.module)
    return _unwrapped(module._orig_mod) if hasattr(module, "_orig_mod") else module

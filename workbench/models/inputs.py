"""Example inputs, as a caller may give them, into the one form a `Model` holds; and outputs out of any nesting."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from workbench.errors import LoadError, nearest

_ACCEPTED = "a tensor, a tuple of tensors, or a dict of tensors by name; numpy arrays will do, batch axis first"


def example(inputs: Any, module: nn.Module, name: str) -> tuple[dict[str, Tensor], bool]:
    """Example inputs by name, and whether the module takes them by keyword.

    Parameters
    ----------
    inputs
        A tensor, a tuple or list of them (by position), or a dict (by keyword); numpy arrays alike. A float64 array
        becomes float32, a tensor keeps its dtype.
    module
        What will be called; the names of positional inputs are its own.
    name
        The model's, for the error.

    Raises
    ------
    LoadError
        If they are missing, of another type, without a batch axis, empty, or of different batch sizes; or if a
        keyword is none of the module's.
    """
    if inputs is None:
        raise LoadError(f"{name} does not say what it takes; give wb.load(…, inputs=…): {_ACCEPTED}.")
    parameters = _parameters(module)
    if isinstance(inputs, Mapping):
        named = {str(key): tensor(value, f"inputs[{key!r}]") for key, value in inputs.items()}
        _check_keywords(named, parameters, name)
    else:
        values = list(inputs) if isinstance(inputs, (tuple, list)) else [inputs]
        tensors = [tensor(value, f"inputs[{i}]" if len(values) > 1 else "inputs") for i, value in enumerate(values)]
        named = dict(zip(_positional_names(parameters, len(tensors)), tensors, strict=True))
    check(named, name)
    return named, isinstance(inputs, Mapping)


def tensor(value: Any, where: str) -> Tensor:
    """One example input as a tensor of its own on the CPU; a `LoadError` that says where it stood if it is none."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "fiub":
        # numpy makes float64 of nearly everything; networks that mean it are given as tensors
        array = np.asarray(value, dtype=np.float32 if value.dtype == np.float64 else value.dtype)
        return torch.from_numpy(np.array(array, order="C"))
    kind = f"an array of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
    raise LoadError(f"{where} is {kind}; give {_ACCEPTED}.")


def check(named: Mapping[str, Tensor], name: str) -> None:
    """Refuse example inputs that do not make one batch."""
    if not named:
        raise LoadError(f"{name} is given no inputs; give {_ACCEPTED}.")
    for key, value in named.items():
        if value.ndim == 0 or value.numel() == 0:
            raise LoadError(
                f"Input {key} of {name} has shape {tuple(value.shape)}; give at least one sample, batch axis first."
            )
    sizes = {key: value.shape[0] for key, value in named.items()}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{key} {size}" for key, size in sizes.items())
        raise LoadError(f"The inputs of {name} differ in batch size ({listed}); give each as many samples.")


def described(named: Mapping[str, Tensor]) -> str:
    """Names, dtypes and shapes in a line: ``x: float32 (2, 3, 32, 32)``."""
    return "; ".join(f"{k}: {str(v.dtype).removeprefix('torch.')} {tuple(v.shape)}" for k, v in named.items())


def outputs(value: Any) -> tuple[Tensor, ...]:
    """The tensors of a module's output in order, out of any nesting of tuples, lists and dicts; None is left out.

    Raises
    ------
    LoadError
        If there are none, or something else is among them.
    """
    leaves = [leaf for leaf in pytree.tree_leaves(value) if leaf is not None]
    other = next((leaf for leaf in leaves if not isinstance(leaf, Tensor)), None)
    if other is not None or not leaves:
        kind = type(value if other is None else other).__name__
        raise LoadError(f"The module returns {kind}; wrap it in one whose forward returns tensors, alone or nested.")
    return tuple(leaves)


def output_names(count: int) -> list[str]:
    """``output``, or ``output_0``, ``output_1`` and so on."""
    return ["output"] if count == 1 else [f"output_{i}" for i in range(count)]


def explicit(module: nn.Module, names: Sequence[str]) -> nn.Module:
    """The module with a signature that lists its inputs, where its own says ``*args`` or ``**kwargs``.

    `torch.export` matches open axes to inputs by that signature. The result shares everything with `module`, which is
    returned itself where its signature is explicit.
    """
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    if not any(p.kind in variadic for p in _parameters(module)):
        return module
    base = type(module)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return base.forward(self, *args, **kwargs)

    listed = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("self", *names)]
    forward.__signature__ = inspect.Signature(listed)
    clone = copy.copy(module)
    clone.__class__ = type(base.__name__, (base,), {"forward": forward})
    return clone


def _parameters(module: nn.Module) -> Sequence[inspect.Parameter]:
    try:
        return list(inspect.signature(module.forward).parameters.values())
    except (TypeError, ValueError):  # compiled forwards have none
        return []


def _positional_names(parameters: Sequence[inspect.Parameter], count: int) -> list[str]:
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in parameters if p.kind in by_position][:count]
    if len(names) == count:
        return names
    return ["input"] if count == 1 else [f"input_{i}" for i in range(count)]


def _check_keywords(named: Mapping[str, Tensor], parameters: Sequence[inspect.Parameter], name: str) -> None:
    by_keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    known = [p.name for p in parameters if p.kind in by_keyword]
    if not parameters or any(p.kind == inspect.Parameter.VAR_KEYWORD for p in parameters):
        return
    for key in named:
        if key not in known:
            raise LoadError(f"{name} takes no input {key!r} by keyword. {nearest(key, known)}")

"""Half precision as a property of a module: it takes and gives float32, and computes in float16 or bfloat16."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

DTYPES: dict[str, torch.dtype] = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class _Inwards:
    dtype: torch.dtype

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return pytree.tree_map(self._one, (args, kwargs))

    def _one(self, value: Any) -> Any:
        return value.to(self.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


class _Outwards:
    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        return pytree.tree_map(self._one, output)

    @staticmethod
    def _one(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def cast(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of `module` that computes in `dtype` between two casts.

    The casts are hooks of the module itself, not a module around it: its layers keep their names, so that a profile
    can be laid beside the original's, and an ONNX export holds casts at its borders only.

    Parameters
    ----------
    module
        Any module whose parameters are floating; ids and masks pass as they are.
    dtype
        ``torch.float16`` or ``torch.bfloat16``.

    Returns
    -------
    nn.Module
        Takes floating inputs of any dtype and returns float32.

    Raises
    ------
    ValueError
        If `dtype` is another, or the module is cast already.
    """
    if dtype not in DTYPES.values():
        raise ValueError(f"a module can be cast to {' or '.join(DTYPES)}, not to {dtype}")
    if cast_dtype(module) is not None:
        raise ValueError(f"the module computes in {cast_dtype(module)} already; cast the original instead")
    half = copy.deepcopy(module).to(dtype)
    half.register_forward_pre_hook(_Inwards(dtype), with_kwargs=True)
    half.register_forward_hook(_Outwards())
    return half


def cast_dtype(module: nn.Module) -> torch.dtype | None:
    """The dtype `cast` made it compute in; None for a module it has not touched."""
    return next((hook.dtype for hook in module._forward_pre_hooks.values() if isinstance(hook, _Inwards)), None)

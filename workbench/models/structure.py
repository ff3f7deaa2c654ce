"""What changed in a module's structure, as JSON, and the module rebuilt from it: no module is ever pickled."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from workbench.errors import StepError, nearest
from workbench.models import parts
from workbench.models.cast import DTYPES, cast, cast_dtype

_CAST = "cast"
_PART = "part"  # its value is a mapping, which no setting is


def difference(base: nn.Module, changed: nn.Module) -> dict[str, Any]:
    """The settings in which `changed` differs from `base`, module by module, and the parts that took another's place.

    Returns
    -------
    dict
        JSON values: ``{path: {setting: value}}``, e.g. ``{"conv1": {"out_channels": 8}}``; or
        ``{path: {"part": {"kind": …, "arguments": {…}}}}`` for a part made by `models.parts`; besides
        ``{"cast": "float16"}`` where `changed` computes in half precision and `base` does not. The root's path is
        empty. Weights are no part of it.

    Raises
    ------
    StepError
        If a module was added, removed or replaced by another way than `models.parts`: that cannot be written down.
    """
    edit: dict[str, Any] = {}
    _compare("", base, changed, edit, set())
    dtype = cast_dtype(changed)
    if dtype is not None and dtype != cast_dtype(base):
        edit[_CAST] = str(dtype).removeprefix("torch.")
    return edit


def _compare(path: str, base: nn.Module, changed: nn.Module, edit: dict[str, Any], seen: set[nn.Module]) -> None:
    if changed in seen:  # one module at two paths is written down once
        return
    seen.add(changed)
    built = getattr(changed, "built", None)
    if built is not None and built != getattr(base, "built", None):
        edit[path] = {_PART: built}
        return
    where = path or "The module itself"
    if type(changed).__name__ != type(base).__name__:
        raise StepError(
            f"{where} was a {type(base).__name__} and is now a {type(changed).__name__}. Only changed settings of the "
            "same parts, and parts made by workbench.models.parts, can be stored."
        )
    before, after = dict(base.named_children()), dict(changed.named_children())
    if before.keys() != after.keys():
        raise StepError(
            f"The modules differ in their parts at {where}: added {_some(after.keys() - before.keys())}, removed "
            f"{_some(before.keys() - after.keys())}. Only changed settings of the same parts, and parts made by "
            "workbench.models.parts, can be stored."
        )
    old, new = _settings(base), _settings(changed)
    settings = {key: _json(value) for key, value in new.items() if key not in old or old[key] != value}
    if settings:
        edit[path] = settings
    for name, child in after.items():
        _compare(f"{path}.{name}" if path else name, before[name], child, edit, seen)


def rebuild(base: nn.Module, edits: Sequence[Mapping[str, Any]], state: Mapping[str, Tensor]) -> nn.Module:
    """A copy of `base` with the edits applied in order and the weights of `state`.

    Parameters
    ----------
    base
        The untouched module; it is left as it is.
    edits
        As `difference` gives them.
    state
        Every parameter and buffer by name; their shapes and dtypes are those of the result.

    Raises
    ------
    StepError
        If an edit names a part that is not there or a kind of part that does not exist, or `state` does not hold
        exactly the parameters of `base`.
    """
    module = copy.deepcopy(base)
    for edit in edits:
        for path, value in edit.items():
            if path == _CAST and isinstance(value, str):
                module = cast(module, DTYPES[value])
            elif _PART in value:
                module = _put(module, path, value[_PART])
            else:
                _apply(module, path, value)
    _resize(module, state)
    missing, unexpected = module.load_state_dict(dict(state), strict=False)
    if missing or unexpected:
        raise StepError(
            f"The stored weights do not fit the module: missing {_some(missing)}, unexpected {_some(unexpected)}. "
            "They belong to another model; start a study of this one with a store of its own."
        )
    return module.eval()


def _settings(module: nn.Module) -> dict[str, Any]:
    """What a module's own attributes say of its structure: numbers, words, flags and tuples of them."""
    return {
        key: value
        for key, value in vars(module).items()
        if not key.startswith("_") and key != "training" and _is_setting(value)
    }


def _is_setting(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_setting(v) for v in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _json(value: Any) -> Any:
    return [_json(v) for v in value] if isinstance(value, (tuple, list)) else value


def _put(module: nn.Module, path: str, built: Mapping[str, Any]) -> nn.Module:
    _part(module, path)
    return parts.put(module, path, built["kind"], **built["arguments"])


def _part(module: nn.Module, path: str) -> nn.Module:
    try:
        return module.get_submodule(path)
    except AttributeError:
        paths = [p for p, _ in module.named_modules()]
        raise StepError(f"The stored change is to {path!r}, which the module lacks. {nearest(path, paths)}") from None


def _apply(module: nn.Module, path: str, settings: Mapping[str, Any]) -> None:
    part = _part(module, path)
    for key, value in settings.items():
        old = getattr(part, key, None)
        setattr(part, key, _like(value, old))


def _like(value: Any, old: Any) -> Any:
    """JSON knows no tuples; torch's settings are tuples, unless the module kept a list there."""
    if not isinstance(value, list):
        return value
    return [_like(v, None) for v in value] if isinstance(old, list) else tuple(_like(v, None) for v in value)


def _resize(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give each parameter and buffer the shape and dtype it has in `state`; ties between them stay."""
    resized: dict[int, Tensor] = {}
    for path, part in module.named_modules():
        for tensors in (part._parameters, part._buffers):
            for key, old in tensors.items():
                new = state.get(f"{path}.{key}" if path else key)
                if old is None or new is None or (old.shape == new.shape and old.dtype == new.dtype):
                    continue
                if id(old) not in resized:
                    empty = torch.empty(new.shape, dtype=new.dtype, device=old.device)
                    is_parameter = isinstance(old, nn.Parameter)
                    resized[id(old)] = nn.Parameter(empty, old.requires_grad) if is_parameter else empty
                tensors[key] = resized[id(old)]


def _some(names: Any) -> str:
    listed = sorted(names)
    return (", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")) or "nothing"

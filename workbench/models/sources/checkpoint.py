"""A file of weights and the network they belong to."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from workbench.errors import LoadError
from workbench.models import inputs, zoo
from workbench.models.model import Model
from workbench.models.sources._base import Request
from workbench.models.sources.module import checked, copied

TITLE = "A checkpoint"
OPTIONS = {"architecture", "inputs"}

_PICKLE = b"\x80"
_SUFFIXES = {".pt", ".pth", ".th", ".ckpt", ".bin", ".safetensors"}
# where training scripts put the weights among everything else they save
_NESTED = ("state_dict", "model_state_dict", "model", "module", "net", "network", "ema", "weights", "params")
# what wrappers put before every name: data parallelism, Lightning and the like, torch.compile
_PREFIXES = ("module.", "model.", "_orig_mod.", "net.", "network.")


def fits(request: Request) -> bool:
    """A file by its ending, or any archive of torch's."""
    return request.suffix in _SUFFIXES or "data.pkl" in request.members


def read(request: Request) -> Model:
    """The architecture with the file's weights."""
    state = _weights(request)
    if request.architecture is None:
        raise LoadError(
            f"{request.path} holds weights without a network; give architecture=, a zoo name or a module of the right "
            f"structure.{_guess(state)}"
        )
    module = _architecture(request)
    _fill(module, state, request)
    if request.inputs is None and isinstance(request.architecture, str):
        example, keywords = zoo.example(request.architecture), False
    else:
        example, keywords = inputs.example(request.inputs, module, request.title)
    return checked(module, example, keywords, request.title, source=request.path.name, weights="checkpoint")


def _architecture(request: Request) -> nn.Module:
    wanted = request.architecture
    if isinstance(wanted, str):
        return zoo.build(wanted)
    if isinstance(wanted, nn.Module):
        return copied(wanted, type(wanted).__name__)
    kind = f"the class {wanted.__name__}" if isinstance(wanted, type) else f"a {type(wanted).__name__}"
    raise LoadError(f"architecture is {kind}; give a zoo name ({', '.join(zoo.ZOO)}) or a torch.nn.Module.")


def _weights(request: Request) -> dict[str, Tensor]:
    if request.suffix == ".safetensors":
        try:
            return load_file(request.path)
        except (SafetensorError, OSError, ValueError) as error:
            raise request.damaged(error) from error
    return _state_dict(_unpickled(request), request)


def _unpickled(request: Request) -> Any:
    with request.path.open("rb") as file:
        start = file.read(2)
    if not request.members and start[:1] != _PICKLE and start != b"PK":
        raise LoadError(
            f"{request.path} is no file that torch.save wrote, whatever its name. Save or download it again."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on protocols; what matters is raised
            return torch.load(request.path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"(?:GLOBAL|global|type) '?([\w.]+)", str(error))
        if "Weights only load failed" not in str(error):
            raise request.damaged(error) from error
        raise LoadError(_refusal(request, code.group(1) if code else "other objects")) from error
    except (RuntimeError, EOFError, OSError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise request.damaged(error) from error


def _refusal(request: Request, code: str) -> str:
    path = str(request.path)
    target = str(request.path.with_name(f"{request.path.stem}-weights.pt"))
    command = (
        f"import torch; c = torch.load({path!r}, map_location='cpu', weights_only=False); "
        "c = c.get('state_dict', c.get('model', c)) if isinstance(c, dict) else c; "
        f"torch.save(c.state_dict() if hasattr(c, 'state_dict') else c, {target!r})"
    )
    return (
        f"{path} is a full pickle: besides weights it holds {code}, and reading it would run code of whoever made it. "
        f'If you trust the file, convert it where its classes can be imported: python -c "{command}"; then '
        f"wb.load({target!r}, architecture=…)."
    )


def _state_dict(found: Any, request: Request) -> dict[str, Tensor]:
    """The weights in whatever a checkpoint holds, without the prefixes of wrappers."""
    for _ in range(3):
        if not isinstance(found, Mapping):
            break
        inner = next((found[k] for k in _NESTED if isinstance(found.get(k), Mapping)), None)
        if inner is None:
            break
        found = inner
    tensors = {k: v for k, v in found.items() if isinstance(v, Tensor)} if isinstance(found, Mapping) else {}
    if not tensors:
        held = f"keys {', '.join(map(str, list(found)[:5]))}" if isinstance(found, Mapping) else type(found).__name__
        raise LoadError(
            f"{request.path} holds no weights by name ({held}). Save them with torch.save(module.state_dict(), …)."
        )
    return {str(key): value for key, value in tensors.items()}


def _fill(module: nn.Module, state: dict[str, Tensor], request: Request) -> None:
    own = module.state_dict()
    state = _best(state, own)
    # counters of batch normalisation, which older checkpoints lack and evaluation never reads
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in state if k not in own]
    shapes = [
        f"{k} is {tuple(state[k].shape)} in the file and {tuple(own[k].shape)} in the network"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    if missing or unexpected or shapes:
        name = request.architecture if isinstance(request.architecture, str) else type(module).__name__
        parts = [
            f"missing {_first(missing)}" if missing else "",
            f"unexpected {_first(unexpected)}" if unexpected else "",
            _first(shapes, "; ") if shapes else "",
        ]
        listed = "; ".join(part for part in parts if part)
        raise LoadError(
            f"{request.path} does not fit {name}: {listed}.{_guess(state) or ' Give the network it was trained as.'}"
        )
    for key, value in state.items():
        if value.is_floating_point() != own[key].is_floating_point():
            raise LoadError(
                f"{request.path} does not fit: {key} is {value.dtype} in the file, {own[key].dtype} in the network."
            )
    module.load_state_dict({**own, **state})


def _best(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under the names that fit best: as they are, or without the prefixes all of them carry."""
    candidates = [state]
    for _ in range(4):
        last = candidates[-1]
        prefix = next((p for p in _PREFIXES if all(key.startswith(p) for key in last)), None)
        if prefix is None:
            break
        candidates.append({key.removeprefix(prefix): value for key, value in last.items()})
    return max(candidates, key=lambda names: len(names.keys() & own.keys()))


def _guess(state: dict[str, Tensor]) -> str:
    """A sentence naming the zoo's network these weights are of, if there is one."""
    for name, entry in zoo.ZOO.items():
        with torch.device("meta"):
            own = entry.build().state_dict()
        found = _best(state, own)
        learnt = {k: v.shape for k, v in own.items() if not k.endswith("num_batches_tracked")}
        if learnt == {k: v.shape for k, v in found.items() if not k.endswith("num_batches_tracked")}:
            return f" Its weights are those of architecture={name!r}."
    return ""


def _first(names: list[str], separator: str = ", ") -> str:
    return separator.join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

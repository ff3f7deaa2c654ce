"""A TorchScript file."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch._export.converter import TS2EPConverter
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from workbench.errors import LoadError, nearest
from workbench.models import inputs, layers
from workbench.models.model import Model
from workbench.models.sources import _program
from workbench.models.sources._base import Request
from workbench.models.sources.module import checked

TITLE = "A TorchScript file"
OPTIONS = {"inputs"}


def fits(request: Request) -> bool:
    """An archive with code and constants in it, or the ending."""
    scripted = "constants.pkl" in request.members and any(name.startswith("code/") for name in request.members)
    return scripted or request.suffix == ".ts"


def read(request: Request) -> Model:
    """The network as a module with the layers that own its weights, or else the script itself, which a note then says.

    A script can be run, but neither changed nor watched layer by layer.
    """
    script = _loaded(request)
    example, keywords = inputs.example(request.inputs, script, request.title)
    known = [argument.name for argument in script.forward.schema.arguments[1:]]
    if keywords:
        extra = next((key for key in example if key not in known), None)
        if extra is not None:
            raise LoadError(f"{request.path} takes no input {extra!r}. {nearest(extra, known)}")
    elif len(example) <= len(known):
        example = dict(zip(known, example.values(), strict=False))
    layers.run(script, example, keywords, request.title)
    try:
        module, notes = _as_module(script, example, keywords), ()
    except Exception as error:  # the converter raises anything on operations it lacks
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        module, notes = script, (f"Kept as TorchScript, whose layers cannot be changed: {reason}",)
    model = checked(module, example, keywords, request.title, source=request.path.name, weights="as given")
    return replace(model, notes=notes)


def _loaded(request: Request) -> torch.jit.ScriptModule:
    if not request.members:
        raise request.damaged("it is no archive as torch.jit.save writes it")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, which the user of a file cannot help
        try:
            module = torch.jit.load(request.path, map_location="cpu")
        except (RuntimeError, ValueError, OSError) as error:
            raise request.damaged(error) from error
    if not hasattr(module, "forward"):
        raise LoadError(f"{request.path} holds a module without a forward; script or trace the whole network.")
    return module.eval()


def _as_module(script: torch.jit.ScriptModule, example: Mapping[str, Tensor], keywords: bool) -> nn.Module:
    """The same computation as torch modules.

    Raises
    ------
    Exception
        If the converter cannot, or gives other results.
    """
    logger = logging.getLogger("torch._export.converter")
    level = logger.level
    logger.setLevel(logging.ERROR)
    # a batch of one would be taken for a constant
    example = {key: torch.cat([value, value]) if len(value) == 1 else value for key, value in example.items()}
    args = () if keywords else tuple(example.values())
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # on batch counters that are never read
            program = TS2EPConverter(script, args, dict(example) if keywords else None).convert()
    finally:
        logger.setLevel(level)
    _own(program, script)
    module = _program.module(program, example, keywords)
    if hasattr(module, "fixed_batch"):
        raise ValueError(f"conversion would fix the batch size to {module.fixed_batch}")
    _program.check_against(script, module, example, keywords)
    return module


def _own(program: ExportedProgram, script: torch.jit.ScriptModule) -> None:
    """Write down what the conversion drops: which tensors are parameters, and which layer each operation belongs to.

    An operation belongs to the module whose weights it reads, where no other operation reads them, and one without
    weights to the module around its neighbours.
    """
    parameters = dict(script.named_parameters())
    owners: dict[str, str] = {}
    for spec in program.graph_signature.input_specs:
        if spec.target is None:
            continue
        if spec.kind == InputKind.BUFFER and spec.target in parameters:
            spec.kind, spec.persistent = InputKind.PARAMETER, None
            program.state_dict[spec.target] = nn.Parameter(parameters[spec.target].detach().clone())
        owners[spec.arg.name] = spec.target.rpartition(".")[0]
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    reads = [{owners[source.name] for source in node.all_input_nodes if source.name in owners} for node in calls]
    counts = Counter(path for paths in reads for path in paths)
    layer = [next(iter(paths)) if len(paths) == 1 and counts[min(paths)] == 1 else "" for paths in reads]
    classes = {path: getattr(inner, "original_name", "Module") for path, inner in script.named_modules()}
    # the modules each known layer lies in; attention reads weights of its own and has a layer inside as well
    around = [
        path if any(other.startswith(f"{path}.") for other in layer) else path.rpartition(".")[0] for path in layer
    ]
    for node in program.graph.nodes:
        node.meta.pop("nn_module_stack", None)
    for i, node in enumerate(calls):
        before = next((around[j] for j in range(i, -1, -1) if layer[j]), "")
        after = next((around[j] for j in range(i, len(calls)) if layer[j]), "")
        # what stands between two layers of a block is the block's
        parts = (layer[i] or _common(before, after)).split(".")
        paths = ["", *(".".join(parts[:length]) for length in range(1, len(parts) + 1) if parts[0])]
        node.meta["nn_module_stack"] = {f"L__self__{path}": (path, classes.get(path, "Module")) for path in paths}


def _common(one: str, other: str) -> str:
    """The innermost module that both paths name or lie in."""
    shared = []
    for a, b in zip(one.split("."), other.split("."), strict=False):
        if a != b:
            break
        shared.append(a)
    return ".".join(shared)

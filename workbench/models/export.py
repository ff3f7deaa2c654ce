"""A torch module as an ONNX graph that remembers its layers."""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import Tensor, fx, nn
from torch.export import Dim

from workbench.errors import LoadError
from workbench.models import provenance as naming
from workbench.models.inputs import explicit, output_names, outputs
from workbench.models.provenance import provenance

__all__ = ["ExportWarning", "provenance", "to_onnx"]


class ExportWarning(UserWarning):
    """The export succeeded, but not in the way it usually does; the graph's doc_string says the same."""


def to_onnx(module: nn.Module, example: dict[str, Tensor], keywords: bool, name: str) -> onnx.ModelProto:
    """Export a module; what each node stands for is written into it (see `provenance`).

    Parameters
    ----------
    module
        In evaluation mode. One with an integer attribute ``fixed_batch`` is exported for that batch size alone.
    example
        Inputs by name, batch axis first; the names become those of the graph's inputs.
    keywords
        Whether the module takes them by keyword.
    name
        Of the graph.

    Returns
    -------
    onnx.ModelProto
        Batch axis open and called ``batch``; outputs called ``output``, or ``output_0`` and so on.

    Raises
    ------
    LoadError
        If it cannot be exported: the operation or module that stopped it is named.

    Warns
    -----
    ExportWarning
        If the batch size had to be fixed, or the older exporter was needed.
    """
    ways = _ways(module, example)
    first: Exception | None = None
    with torch.no_grad(), _quiet():
        for way, said in ways:
            try:
                model, note = way(module, example, keywords), said
                break
            except Exception as error:  # the exporters raise whatever a stranger's forward does
                first = first or error
        else:
            raise LoadError(
                f"{name} cannot be exported to ONNX: {_blame(first, module)}. Rewrite that part with operations "
                "torch.onnx knows, or measure it with wb.Eager() or wb.Compiled(), which need no export."
            ) from first
    model.graph.name = name
    model.graph.doc_string = note
    if note:
        reason = f" The usual way failed: {_blame(first, module)}." if first else ""
        warnings.warn(f"{name}: {note}{reason}", ExportWarning, stacklevel=2)
    return ir.to_proto(model)


_FIXED = "Exported for batches of {} only: the batch size is fixed within the network."
_OLDER = "Exported by torch's older exporter (dynamo=False), which follows one run of the network."
_SCRIPT = f"{_OLDER} The newer one does not read TorchScript."

Way = Callable[[nn.Module, dict[str, Tensor], bool], ir.Model]


def _ways(module: nn.Module, example: Mapping[str, Tensor]) -> list[tuple[Way, str]]:
    """Ways to export in the order of preference, each with the note it leaves."""
    batch = getattr(module, "fixed_batch", None)
    size = next(iter(example.values())).shape[0]
    if any(isinstance(m, torch.jit.ScriptModule) for m in module.modules()):
        return [(_older, _SCRIPT)]
    if isinstance(batch, int):
        return [(_newer_fixed, _FIXED.format(batch)), (_older, _OLDER)]
    return [(_newer, ""), (_newer_fixed, _FIXED.format(size)), (_older, _OLDER)]


def _newer(module: nn.Module, example: dict[str, Tensor], keywords: bool) -> ir.Model:
    # torch.export takes a length of one for a constant
    example = {k: torch.cat([v, v]) if v.shape[0] == 1 else v for k, v in example.items()}
    axes = {key: {0: Dim.DYNAMIC} for key in example}
    module = explicit(module, list(example))
    model = _program(module, example, keywords, axes if keywords else tuple(axes.values()))
    if not naming.rename_batch(model):
        raise LoadError("the batch size is fixed within the network")
    return model


def _newer_fixed(module: nn.Module, example: dict[str, Tensor], keywords: bool) -> ir.Model:
    return _program(module, example, keywords, None)


def _program(module: nn.Module, example: dict[str, Tensor], keywords: bool, dynamic: Any) -> ir.Model:
    names = output_names(len(outputs(module(**example) if keywords else module(*example.values()))))
    program = torch.onnx.export(
        module,
        () if keywords else tuple(example.values()),
        kwargs=example if keywords else None,
        dynamo=True,
        dynamic_shapes=dynamic,
        input_names=list(example),
        output_names=names,
        optimize=False,  # done below, once it is noted which node came from where
        verbose=False,
    )
    childless = {path: not any(True for _ in inner.children()) for path, inner in module.named_modules()}
    origins = naming.snapshot(program.model, childless)
    program.optimize()
    layers = naming.layers_after(program.model, origins, childless)
    naming.rename(program.model, layers, _kept(module, example, names))
    return program.model


def _older(module: nn.Module, example: dict[str, Tensor], keywords: bool) -> ir.Model:
    names = output_names(len(outputs(module(**example) if keywords else module(*example.values()))))
    args = () if keywords else tuple(example.values())
    file = io.BytesIO()
    torch.onnx.export(
        module,
        args,
        file,
        kwargs=example if keywords else None,
        dynamo=False,
        input_names=list(example),
        output_names=names,
        dynamic_axes={key: {0: "batch"} for key in (*example, *names)},
        verbose=False,
    )
    model = ir.from_proto(onnx.load_model_from_string(file.getvalue()))
    paths = {path for path, _ in module.named_modules()}
    naming.rename(model, naming.layers_by_name(paths), _kept(module, example, names))
    return model


def _kept(module: nn.Module, example: Mapping[str, Tensor], outputs: Collection[str]) -> set[str]:
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {*example, *outputs, *(key for key, _ in tensors)}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' warnings, advice and log lines off the screen; failures are told by our own error."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # its fused kernel has no counterpart in ONNX
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _blame(error: Exception, module: nn.Module) -> str:
    """What stopped an export, in words: the operation and the module where they can be told, and the reason."""
    paths = {id(inner): path for path, inner in module.named_modules()}
    operation = place = ""
    cause: BaseException | None = error
    while cause is not None:
        trace = cause.__traceback__
        while trace is not None:
            scope = trace.tb_frame.f_locals
            node, inner = scope.get("node"), scope.get("self")
            if isinstance(node, fx.Node) and node.op == "call_function":
                operation = str(node.target)
                stack = list((node.meta.get("nn_module_stack") or {}).values())
                place = stack[-1][0] if stack else place
            if isinstance(inner, nn.Module) and paths.get(id(inner)):
                place = paths[id(inner)]
            trace = trace.tb_next
        last, cause = cause, cause.__cause__ or cause.__context__
    lines = [line.strip() for line in str(last).splitlines() if line.strip()] or [type(last).__name__]
    named = re.search(r"(?:aten|prims|torchvision|onnx)::\w+", str(last))
    operation = operation or (named.group() if named else "")
    where = " in ".join(part for part in (operation, f"layer {place}" if place else "") if part)
    return f"{where}: {lines[0].rstrip('.')}" if where else lines[0].rstrip(".")

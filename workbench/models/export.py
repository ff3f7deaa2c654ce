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
from torch.fx import traceback as fx_traceback
from torch.onnx.errors import OnnxExporterError

from workbench.errors import LoadError
from workbench.models import provenance as naming
from workbench.models.inputs import explicit, output_names, outputs
from workbench.models.operations import Event, Visitor, Watch
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
    first: Exception | None = None
    with torch.no_grad(), _quiet():
        for way in _ways(module):
            try:
                model, note = way(module, example, keywords)
                break
            except (OnnxExporterError, _CannotExport) as error:
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

Way = Callable[[nn.Module, dict[str, Tensor], bool], tuple[ir.Model, str]]


class _CannotExport(Exception):
    """One way to export does not work for this module."""


def _ways(module: nn.Module) -> list[Way]:
    """Ways to export in the order of preference."""
    if any(isinstance(m, torch.jit.ScriptModule) for m in module.modules()):
        return [_older]  # the newer exporter does not read TorchScript
    if hasattr(module, "fixed_batch"):
        return [_newer_fixed, _older]
    return [_newer, _newer_fixed, _older]


def _newer(module: nn.Module, example: dict[str, Tensor], keywords: bool) -> tuple[ir.Model, str]:
    # torch.export takes a length of one for a constant
    example = {k: torch.cat([v, v]) if v.shape[0] == 1 else v for k, v in example.items()}
    axes = {key: {0: Dim.DYNAMIC} for key in example}
    module = explicit(module, list(example))
    model = _program(module, example, keywords, axes if keywords else tuple(axes.values()))
    if not naming.rename_batch(model):
        raise _CannotExport("the batch size is fixed within the network")
    return model, ""


def _newer_fixed(module: nn.Module, example: dict[str, Tensor], keywords: bool) -> tuple[ir.Model, str]:
    return _program(module, example, keywords, None), _FIXED.format(_size(example))


def _program(module: nn.Module, example: dict[str, Tensor], keywords: bool, dynamic: Any) -> ir.Model:
    names = _output_names(module, example, keywords)
    labels = _Labels(module)
    with labels.watch:
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
    paths = [path for path, _ in module.named_modules()]
    layer = naming.layer_of(program.model, paths, labels.of(program.exported_program.graph))
    origins = naming.snapshot(program.model, layer)
    program.optimize()
    layers = naming.layers_after(program.model, origins, layer)
    naming.rename(program.model, layers, _kept(module, example, names))
    return program.model


class _Labels(Visitor):
    """Notes with each node that tracing makes which call it comes from, so that layers have one name everywhere."""

    def __init__(self, module: nn.Module):
        self.watch = Watch(module, self)

    def enter(self, event: Event) -> None:
        event.noted = len(self.watch.events)

    def run(self, event: Event, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # only here: torch.export notes things of its own meanwhile, over which it may stumble later
        with fx_traceback.preserve_node_meta(), fx_traceback.annotate({naming.KEY: event.noted}):
            return function(*args, **kwargs)

    def of(self, graph: fx.Graph) -> dict[str, str]:
        """Layer by name of the node, for those that have one."""
        layers = {event.noted: layer for event, layer in self.watch.layers().items()}
        calls = {node.name: (node.meta.get("custom") or {}).get(naming.KEY) for node in graph.nodes}
        return {name: layers[call] for name, call in calls.items() if layers.get(call)}


def _older(module: nn.Module, example: dict[str, Tensor], keywords: bool) -> tuple[ir.Model, str]:
    # it calls an axis open on request, whether or not the size of the run it followed is written into the graph
    larger = {key: torch.cat([value, value[:1]]) for key, value in example.items()}
    try:
        runs = [_followed(module, inputs, keywords, dynamic=True) for inputs in (example, larger)]
        dynamic = runs[0].graph.node == runs[1].graph.node and runs[0].graph.initializer == runs[1].graph.initializer
    except _CannotExport:
        dynamic = False
    graph = runs[0] if dynamic else _followed(module, example, keywords, dynamic=False)
    model = ir.from_proto(graph)
    layers = naming.layers_by_name(model, {path for path, _ in module.named_modules()})
    naming.rename(model, layers, _kept(module, example, [value.name for value in graph.graph.output]))
    return model, _OLDER if dynamic else f"{_OLDER} {_FIXED.format(_size(example))}"


def _followed(module: nn.Module, example: dict[str, Tensor], keywords: bool, dynamic: bool) -> onnx.ModelProto:
    names = _output_names(module, example, keywords)
    file = io.BytesIO()
    try:
        torch.onnx.export(
            module,
            () if keywords else tuple(example.values()),
            file,
            kwargs=example if keywords else None,
            dynamo=False,
            input_names=list(example),
            output_names=names,
            dynamic_axes={key: {0: "batch"} for key in (*example, *names)} if dynamic else None,
            verbose=False,
        )
    except Exception as error:  # it raises whatever a stranger's forward does
        raise _CannotExport(str(error)) from error
    return onnx.load_model_from_string(file.getvalue())


def _output_names(module: nn.Module, example: Mapping[str, Tensor], keywords: bool) -> list[str]:
    try:
        return output_names(len(outputs(module(**example) if keywords else module(*example.values()))))
    except Exception as error:  # whatever a stranger's forward raises, at a batch size it does not take
        raise _CannotExport(str(error)) from error


def _size(example: Mapping[str, Tensor]) -> int:
    return next(iter(example.values())).shape[0]


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
    log = torch._C._jit_onnx_log
    torch._C._jit_onnx_log = lambda *_: None  # the older exporter prints the graph it fails on, whatever it is told
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        torch._C._jit_onnx_log = log
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

"""Layer tables: a row per layer with its shapes, parameters and multiply-accumulates.

Columns: layer, type, input_shape, output_shape, parameters, macs. Shapes are tuples without the batch axis (of the
first tensor, where a layer takes or gives several; None for a length that is not known), MACs those of one sample.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import onnx
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils import flop_counter

from workbench.errors import LoadError
from workbench.models import graph_layers, inputs

if TYPE_CHECKING:
    from workbench.models.model import Model

COLUMNS = ["layer", "type", "input_shape", "output_shape", "parameters", "macs"]


def _attention_flops(q: tuple, k: tuple, v: tuple, *_: Any, **__: Any) -> int:
    return flop_counter.sdpa_flop_count(q, k, v)


def _recurrent_flops(x: tuple, inwards: tuple, across: tuple, *_: Any, **__: Any) -> int:
    # one direction of one layer, over all steps and samples
    return 2 * x[0] * x[1] * (math.prod(inwards) + math.prod(across))


# kernels of the CPU that torch's own table leaves out
_MORE_FLOPS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten.mkldnn_rnn_layer: _recurrent_flops,
}


def module_table(model: Model) -> pd.DataFrame:
    """The layers of a model's module in execution order, counted while it runs once on its example inputs.

    A layer is a module without children; one called twice has two rows, the second with no parameters. Work or
    parameters that belong to no such layer (a matrix product written out in a block's forward) are a row of the module
    around them. A TorchScript module, whose parts cannot be watched, is one row.

    Raises
    ------
    LoadError
        If the module fails on its example inputs; the layer that failed is named.
    """
    watch = _Watch(model.module, model.name, next(iter(model.example.values())).shape[0])
    watch.run(model.example, model.keywords)
    return pd.DataFrame(watch.rows, columns=COLUMNS)


def graph_table(graph: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]] | None = None) -> pd.DataFrame:
    """The nodes of an ONNX graph in order, each under the layer it came from.

    Constants, quantisers and dequantisers have no row: the parameters behind them are counted where they are used.

    Parameters
    ----------
    graph
        Any valid graph, quantised or not.
    shapes
        Shapes of its inputs, batch axis included, where the graph leaves axes open; by default such axes stay unknown.
    """
    return pd.DataFrame(graph_layers.rows(graph, shapes or {}), columns=COLUMNS)


def graph_parameters(graph: onnx.ModelProto) -> int:
    """Weights of an ONNX graph, quantised ones included, shared ones counted once; scales and shapes are none."""
    return graph_layers.parameters(graph)


def declared_shapes(graph: onnx.ModelProto) -> dict[str, tuple[int | None, ...]]:
    """Shape of each input as an ONNX graph declares it; None for an axis whose length may change."""
    return graph_layers.declared_shapes(graph)


def run(module: nn.Module, example: Mapping[str, Tensor], keywords: bool, name: str) -> tuple[Tensor, ...]:
    """The tensors a module gives for its example inputs.

    Raises
    ------
    LoadError
        If it fails, naming the layer that failed; or if it gives something else than tensors.
    """
    with _track(module, enter=lambda *_: None, leave=lambda *_: None) as path:
        return inputs.outputs(_call(module, example, keywords, name, path))


class _Watch:
    """Counts what each module of a network does while the network runs."""

    def __init__(self, module: nn.Module, name: str, batch: int):
        self.module, self.name, self.batch = module, name, batch
        self.rows: list[tuple] = []
        self._seen: set[int] = set()
        self._ran: set[nn.Module] = set()
        self._open: list[tuple[int, list[int]]] = []  # operations before each running module, and within its children
        self._flops = flop_counter.FlopCounterMode(display=False, custom_mapping=_MORE_FLOPS)

    def run(self, example: Mapping[str, Tensor], keywords: bool) -> None:
        with _track(self.module, self._enter, self._leave) as path, self._flops:
            scripted = isinstance(self.module, torch.jit.ScriptModule)
            if scripted:
                self._enter("", self.module)
            output = _call(self.module, example, keywords, self.name, path)
            if scripted:
                self._leave("", self.module, dict(example), output)

    def _enter(self, path: str, module: nn.Module) -> None:
        self._ran.add(module)
        self._open.append((self._flops.get_total_flops(), [0]))

    def _leave(self, path: str, module: nn.Module, given: Any, output: Any) -> None:
        before, (within,) = self._open.pop()
        total = self._flops.get_total_flops() - before
        if self._open:
            self._open[-1][1][0] += total
        leaf = isinstance(module, torch.jit.ScriptModule) or not any(True for _ in module.children())
        own = total - within
        parameters = self._parameters(module, leaf or own > 0)
        if leaf or own or parameters:
            macs = own // 2 // self.batch
            kind = getattr(module, "original_name", type(module).__name__)
            self.rows.append((path or self.name, kind, _shape(given), _shape(output), parameters, macs))

    def _parameters(self, module: nn.Module, works: bool) -> int:
        """Parameters not yet counted: its own, and those of children it uses without a call, as attention does."""
        owners = [module]
        if works:
            owners += [m for m in module.modules() if m not in self._ran]
        mine = {id(p): p.numel() for owner in owners for p in owner.parameters(recurse=False)}
        new = {key: size for key, size in mine.items() if key not in self._seen}
        self._seen.update(new)
        return sum(new.values())


@contextmanager
def _track(module: nn.Module, enter: Any, leave: Any) -> Any:
    """Call `enter` and `leave` around every submodule's run; yields the paths running, which a failure leaves."""
    stack: list[str] = []
    hooks = []
    here = threading.get_ident()  # a job may run the same module meanwhile

    def before(path: str) -> Any:
        def hook(inner: nn.Module, args: tuple) -> None:
            if threading.get_ident() == here:
                stack.append(path)
                enter(path, inner)

        return hook

    def after(path: str) -> Any:
        def hook(inner: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            if threading.get_ident() == here:
                leave(path, inner, (args, kwargs), output)
                stack.pop()

        return hook

    for path, inner in module.named_modules():
        if isinstance(inner, torch.jit.ScriptModule):
            continue  # takes no hooks; what it does counts for the module around it
        hooks.append(inner.register_forward_pre_hook(before(path)))
        hooks.append(inner.register_forward_hook(after(path), with_kwargs=True))
    # the fused attention of evaluation mode calls no submodule, so that there would be nothing to watch
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield stack
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for hook in hooks:
            hook.remove()


def _call(module: nn.Module, example: Mapping[str, Tensor], keywords: bool, name: str, path: list[str]) -> Any:
    try:
        with torch.no_grad():
            return module(**example) if keywords else module(*example.values())
    except Exception as error:  # whatever a stranger's forward raises
        where = f"layer {path[-1]} ({_kind(module, path[-1])})" if path and path[-1] else "its own forward"
        # TorchScript puts its own stack first and what went wrong last
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        reason = lines[-1] if isinstance(error, torch.jit.Error) else lines[0]
        raise LoadError(
            f"{name} fails in {where} on {inputs.described(example)}: {reason.strip().rstrip('.')}. "
            "Give inputs=… of the shape and dtype it takes, batch axis first."
        ) from error


def _kind(module: nn.Module, path: str) -> str:
    return type(module.get_submodule(path)).__name__


def _shape(value: Any) -> tuple[int, ...]:
    first = next((leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)), None)
    return () if first is None else tuple(first.shape[1:])

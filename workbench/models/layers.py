"""Layer tables: a row per layer with its shapes, parameters, multiply-accumulates and bytes.

Columns: layer, type, input_shape, output_shape, parameters, macs, input_bytes, weight_bytes, output_bytes. Shapes are
tuples without the batch axis (of the first tensor, where a layer takes or gives several; None for a length that is not
known), MACs and bytes those of one sample, in the dtypes the tensors have. What gives a view of its input (a reshape, a
transposition, a slice) reads and writes nothing; a change in place is read and written; of a table of embeddings, the
rows looked up are read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils import flop_counter

from workbench.errors import LoadError
from workbench.models import graph_layers, inputs
from workbench.models.operations import Event, Visitor, Watch
from workbench.models.traffic import Held, Moved, Traffic

if TYPE_CHECKING:
    from workbench.models.model import Model

COLUMNS = [
    *("layer", "type", "input_shape", "output_shape", "parameters", "macs"),
    *("input_bytes", "weight_bytes", "output_bytes"),
]


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

    A layer is a module that calls no other, or an operation between such modules (see `operations`); one called twice
    has two rows, the second with no parameters. Parameters are counted where they are first used. Work or parameters
    that belong to no such layer are a row of the module around them. A TorchScript module is one row.

    Raises
    ------
    LoadError
        If the module fails on its example inputs; the layer that failed is named.
    """
    tally = _Tally(model)
    with unfused(), tally.watch, tally.traffic, tally.flops:
        call(model.module, model.example, model.keywords, model.name, tally.watch)
    return pd.DataFrame(tally.rows(), columns=COLUMNS)


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
    with unfused(), Watch(module) as watch:
        return inputs.outputs(call(module, example, keywords, name, watch))


@dataclass(eq=False, slots=True)
class _Count:
    """What one call did; `flops` and `within` are its operations and those of the calls it made."""

    mark: tuple[int, int]
    flops: int
    within: int = 0
    input_shape: tuple[int | None, ...] = ()
    output_shape: tuple[int | None, ...] = ()
    moved: Moved | None = None


class _Tally(Visitor):
    """Counts what each module and operation of a network does while the network runs."""

    def __init__(self, model: Model):
        self._module, self._name = model.module, model.name
        self._batch = next(iter(model.example.values())).shape[0]
        self.watch = Watch(model.module, self)
        self.traffic = Traffic(model.module)
        self.flops = flop_counter.FlopCounterMode(display=False, custom_mapping=_MORE_FLOPS)
        self._finished: list[Event] = []

    def enter(self, event: Event) -> None:
        event.noted = _Count(self.traffic.mark(), self.flops.get_total_flops())

    def leave(self, event: Event, given: Any, output: Any) -> None:
        count = event.noted
        count.flops = self.flops.get_total_flops() - count.flops
        if event.within is not None:
            event.within.noted.within += count.flops
        moved = count.moved = self.traffic.since(count.mark, given, output)
        count.input_shape = _shape(moved.reads or self.traffic.held(given))
        count.output_shape = _shape(moved.gives)
        self._finished.append(event)

    def rows(self) -> list[tuple]:
        """A tuple per layer in the order of `COLUMNS`."""
        names, parameters = self.watch.layers(), self._parameters()
        found = []
        for event in self._finished:
            count, row = event.noted, self.watch.is_row(event)
            flops = count.flops if row else count.flops - count.within
            if not row and (not event.is_module or not (flops or parameters[event])):
                continue
            moved = count.moved.per_sample(self._batch) if row or flops else (0, 0, 0)
            found.append(
                (
                    *(names[event] or event.path or self._name, event.kind),
                    *(count.input_shape, count.output_shape, parameters[event], flops // 2 // self._batch),
                    *moved,
                )
            )
        return found

    def _parameters(self) -> dict[Event, int]:
        """Parameters of each call that no earlier one counts, and last those that no layer is seen to use.

        A module counts its own and those of parts it uses without a call, as attention does.
        """
        ran = {event.target for event in self.watch.events if event.is_module}
        by_storage: dict[int, list[nn.Parameter]] = {}
        for parameter in self._module.parameters():
            by_storage.setdefault(self.traffic.storage(parameter), []).append(parameter)
        seen: set[nn.Parameter] = set()
        counts = dict.fromkeys(self._finished, 0)
        for layers in (True, False):
            for event in self._finished:
                if self.watch.is_row(event) != layers or not (layers or event.is_module):
                    continue
                if event.is_module:
                    works = layers or event.noted.flops > event.noted.within
                    parts = [m for m in event.target.modules() if m not in ran] if works else []
                    used = [p for m in (event.target, *parts) for p in m.parameters(recurse=False)]
                else:
                    moved = event.noted.moved  # a view of a weight is not yet its use
                    used = [p for key in moved.weights if moved.written for p in by_storage.get(key, ())]
                counts[event] = sum(p.numel() for p in set(used) - seen)
                seen.update(used)
        return counts


@contextmanager
def unfused() -> Iterator[None]:
    """Do without the fused attention of evaluation mode, which calls no submodule: there would be nothing to watch."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def call(module: nn.Module, example: Mapping[str, Tensor], keywords: bool, name: str, watch: Watch) -> Any:
    """What a module gives for its inputs; a `LoadError` that names the layer that failed, which `watch` followed."""
    try:
        with torch.no_grad():
            return module(**example) if keywords else module(*example.values())
    except Exception as error:  # whatever a stranger's forward raises
        # TorchScript puts its own stack first and what went wrong last
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        reason = lines[-1] if isinstance(error, torch.jit.Error) else lines[0]
        raise LoadError(
            f"{name} fails in {watch.failure()} on {inputs.described(example)}: {reason.strip().rstrip('.')}. "
            "Give inputs=… of the shape and dtype it takes, batch axis first."
        ) from error


def _shape(held: Sequence[Held]) -> tuple[int | None, ...]:
    return held[0].shape[1:] if held else ()

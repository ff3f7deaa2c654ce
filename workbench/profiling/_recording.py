"""A forward pass of a torch module, watched: which operation made which memory, and when it was given back."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, UntypedStorage, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from workbench.models import layers
from workbench.models.model import Model
from workbench.models.operations import Event, Visitor, Watch
from workbench.profiling._schedule import Operation, Trace


def recorded(model: Model, example: Mapping[str, Tensor]) -> tuple[Trace, list[list[int]]]:
    """The operations of one forward pass, and the buffers given back after each and, first, before all of them.

    Scratch memory that a kernel takes and gives back by itself is not seen. Attention runs part by part, as in the
    layer table, not as the one fused operation of evaluation mode.

    Raises
    ------
    LoadError
        If the module fails on `example`; the layer that failed is named.
    """
    where = _Where()
    watch = Watch(model.module, where)
    storages = _Storages(model.module, example.values(), where)
    with layers.unfused(), watch, storages:
        output = layers.call(model.module, example, model.keywords, model.name, watch)
        storages.listening = False
    names = watch.layers()
    operations = []
    for step in storages.steps:
        layer, kind = _labelled(step.event, watch, names)
        operations.append(Operation(layer or model.name, kind, step.reads, step.writes, step.changes))
    trace = Trace(
        tuple(operations), tuple(storages.sizes), tuple(range(storages.inputs)), storages.buffers(_tensors(output))
    )
    return trace, [storages.released_first, *(step.released for step in storages.steps)]


def _labelled(event: Event, watch: Watch, names: Mapping[Event, str]) -> tuple[str, str]:
    """Layer and type of the call that an operation belongs to: of the leaf module around it, where there is one."""
    if not event.is_module and watch.is_leaf(event.path):
        return names[event], event.within.kind
    return names[event] or event.path, event.kind or event.within.kind


class _Where(Visitor):
    """Knows the innermost call that is running."""

    def __init__(self) -> None:
        self._calls: list[Event] = []

    @property
    def event(self) -> Event:
        return self._calls[-1]

    def enter(self, event: Event) -> None:
        if event.is_module:
            self._calls.append(event)

    def run(self, event: Event, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._calls.append(event)
        try:
            return function(*args, **kwargs)
        finally:
            self._calls.pop()

    def leave(self, event: Event, given: Any, output: Any) -> None:
        if event.is_module:
            self._calls.pop()


@dataclass
class _Step:
    event: Event
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    changes: tuple[int, ...]
    released: list[int] = field(default_factory=list)


class _Storages(TorchDispatchMode):
    """Numbers the memory that operations make, and notes when torch gives it back.

    Attributes
    ----------
    steps
        Operations that make or change memory, in order; what only gives a view is none.
    sizes
        Bytes of each buffer; those of the inputs come first.
    listening
        Whether what is given back still belongs to the forward pass.
    """

    supports_higher_order_operators = True

    def __init__(self, module: nn.Module, inputs: Iterable[Tensor], where: _Where):
        super().__init__()
        self.steps: list[_Step] = []
        self.sizes: list[int] = []
        self.released_first: list[int] = []
        self.listening = True
        self._where = where
        self._alive: dict[int, tuple[int, weakref.ref]] = {}
        self._weights = {_key(tensor) for tensor in (*module.parameters(), *module.buffers())}
        self._new(inputs, set())
        self.inputs = len(self.sizes)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        given = _tensors((args, kwargs))
        # noted before the call: an operation may give its input other memory
        changed = self.buffers(_tensors(_written(func, args, kwargs)))
        reads = tuple(buffer for buffer in self.buffers(given) if buffer not in changed)
        known = {_key(tensor) for tensor in given}
        output = func(*args, **kwargs)
        writes = self._new(_tensors(output), known)
        if writes or changed:
            self.steps.append(_Step(self._where.event, reads, writes, changed))
        return output

    def buffers(self, tensors: Iterable[Tensor]) -> tuple[int, ...]:
        """The buffers that hold these tensors, each once; weights are in none."""
        found = (self._alive.get(_key(tensor)) for tensor in tensors)
        return tuple(dict.fromkeys(entry[0] for entry in found if entry is not None))

    def _new(self, tensors: Iterable[Tensor], known: set[int]) -> tuple[int, ...]:
        """Number the memory of tensors that is neither a weight's nor in a buffer nor `known` to come from outside."""
        made = []
        for tensor in tensors:
            storage, key = tensor.untyped_storage(), _key(tensor)
            if key in self._alive or key in self._weights or key in known or not storage.nbytes():
                continue
            self._alive[key] = len(self.sizes), weakref.ref(storage, self._release(key, len(self.sizes)))
            made.append(len(self.sizes))
            self.sizes.append(storage.nbytes())
        return tuple(made)

    def _release(self, key: int, buffer: int) -> Callable[[weakref.ref[UntypedStorage]], None]:
        def release(_: weakref.ref[UntypedStorage]) -> None:
            if self.listening:
                del self._alive[key]
                (self.steps[-1].released if self.steps else self.released_first).append(buffer)

        return release


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """The arguments that an operation says it overwrites."""
    if not hasattr(func, "_schema"):  # an operator of a higher order; those inside it come one by one
        return []
    declared = func._schema.arguments
    given = [*zip(declared, args, strict=False), *((a, kwargs[a.name]) for a in declared if a.name in kwargs)]
    return [value for argument, value in given if argument.alias_info is not None and argument.alias_info.is_write]

"""What one call of a torch module runs, in order: found out once, before anything is timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from workbench.deployment._timing import OpTiming, Port
from workbench.models.layers import unfused
from workbench.models.operations import Event, Visitor, Watch
from workbench.models.traffic import Held, Moved, Traffic

PRECISIONS = {"float64": "fp64", "float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "int8": "int8"}


@dataclass(frozen=True)
class Plan:
    """The calls of one forward pass.

    Attributes
    ----------
    leaves
        Paths of the modules that call no other.
    keys
        In execution order: the path of each leaf called, the function of each call outside them.
    rows
        For the keys that are layers their number and what is known of them, without times.
    error
        What stopped the pass; None where it ran to its end.
    failed
        Where, in words; empty where nothing did.
    """

    leaves: frozenset[str]
    keys: tuple[Any, ...]
    rows: tuple[tuple[int, OpTiming], ...]
    error: Exception | None = None
    failed: str = ""


def plan(module: nn.Module, call: Callable[[], Any], name: str) -> Plan:
    """Watch `call`, which runs the module once, and note what it runs.

    Parameters
    ----------
    name
        Of the model: what a network that is one layer is called.

    Raises
    ------
    Exception
        Whatever `call` raises before the module runs. What the module raises is kept in the plan.
    """
    leaves = _leaves(module, call)
    visitor = _Notes(module, leaves)
    watch = Watch(module, visitor, leaves=leaves)
    with watch, visitor.traffic:
        error = _run(call, watch)
    failed = "" if error is None else watch.failure()
    seen = [event for event in watch.events if not event.is_module or watch.is_leaf(event.path)]
    names = watch.layers()
    absorbed = _absorbed(module, call, {names[event] for event in seen if event.is_module}) if error is None else {}
    calls: dict[str, int] = {}
    rows = []
    for index, event in enumerate(seen):
        if event.noted is None:  # it failed, or makes no tensors
            continue
        layer = names[event] or name
        calls[layer] = calls.get(layer, 0) + 1
        title = layer if calls[layer] == 1 else f"{layer} (call {calls[layer]})"
        rows.append((index, _row(event, title, absorbed.get(layer, (layer,)))))
    return Plan(leaves, tuple(e.path if e.is_module else e.target for e in seen), tuple(rows), error, failed)


def _leaves(module: nn.Module, call: Callable[[], Any]) -> frozenset[str]:
    # functions are not watched yet: while they are, torch does not use its fused attention, which makes leaves
    with Watch(module, functions=False) as watch:
        error = _run(call, watch)
    called = {event.path: event.target for event in watch.events if watch.is_leaf(event.path)}
    if error is not None:  # what failed may have been about to call its parts
        called = {path: inner for path, inner in called.items() if not any(True for _ in inner.children())}
    return frozenset(called)


def _run(call: Callable[[], Any], watch: Watch) -> Exception | None:
    try:
        call()
    except Exception as error:
        if watch.failed is None:
            raise
        return error
    return None


def _absorbed(module: nn.Module, call: Callable[[], Any], leaves: set[str]) -> dict[str, tuple[str, ...]]:
    """Layers that a leaf computes with a fused kernel in place of calling its parts, for each that does."""
    modules = dict(module.named_modules())
    if not any(any(True for _ in modules[path].children()) for path in leaves):
        return {}
    with unfused(), Watch(module) as watch:
        call()
    names = watch.layers()
    apart = [names[event] for event in watch.events if watch.is_row(event)]
    found = {}
    for path in leaves.difference(apart):
        parts = tuple(dict.fromkeys(layer for layer in apart if layer.startswith(f"{path}.")))
        if parts:
            found[path] = parts
    return found


def _row(event: Event, name: str, layers: tuple[str, ...]) -> OpTiming:
    moved, reads, writes, kernel = event.noted
    return OpTiming(
        name=name,
        type=event.kind,
        layers=layers,
        times_ms=(),
        reads=reads,
        writes=writes,
        # without it the bytes of a view, which moves none, are left to the table of layers
        weight_bytes=sum(moved.weights.values()) if moved.written else None,
        precision=_precision(moved),
        kernel=kernel,
    )


def _precision(moved: Moved) -> str:
    dtypes = [held.dtype for held in (*moved.gives, *moved.reads)]
    return next((PRECISIONS[dtype] for dtype in dtypes if dtype in PRECISIONS), "")


def _kernel(event: Event, given: Any) -> tuple[int, ...]:
    """Spatial size of a convolution's kernel."""
    if event.is_module:
        size = getattr(event.target, "kernel_size", ()) if "Conv" in event.kind else ()
        return size if isinstance(size, tuple) else ()
    weight = given[0][1] if event.operation.startswith("conv") and len(given[0]) > 1 else None
    return tuple(weight.shape[2:]) if isinstance(weight, Tensor) else ()


class _Notes(Visitor):
    """Keeps with each call what it moved, and a name for every tensor that ties its writer to its readers."""

    def __init__(self, module: nn.Module, leaves: frozenset[str]):
        self.traffic = Traffic(module)
        self._leaves = leaves
        self._marks: dict[Event, tuple[int, int]] = {}
        self._names: dict[tuple[int, tuple[int, ...], tuple[Any, ...]], str] = {}
        self._latest: dict[int, str] = {}  # of what was last written into a storage
        self._count = 0

    def enter(self, event: Event) -> None:
        self._marks[event] = self.traffic.mark()

    def leave(self, event: Event, given: Any, output: Any) -> None:
        if event.is_module != (event.path in self._leaves):
            return  # of a module that calls others, or within a leaf
        moved = self.traffic.since(self._marks.pop(event), given, output)
        reads = tuple(self._port(held) for held in moved.reads)
        for storage in moved.changed:
            # every view of it shows the change
            self._names = {key: name for key, name in self._names.items() if key[0] != storage}
            self._latest.pop(storage, None)
        writes = tuple(self._port(held, new=True) for held in moved.gives)
        event.noted = moved, reads, writes, _kernel(event, given)

    def _port(self, held: Held, new: bool = False) -> Port:
        key = held.storage, held.view, held.shape
        name = None if new else self._names.get(key) or self._latest.get(held.storage)
        if name is None:
            name = f"t{self._count}"
            self._count += 1
            self._names[key] = name
            self._latest.setdefault(held.storage, name)
        return Port(name, held.shape, held.dtype)

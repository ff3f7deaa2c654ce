"""From the kernels of a compiled program back to the model's layers, through the graphs it was lowered from.

The graph that is traced from the module says which module each operation was called in. Lowering splits, replaces and
drops operations, but what it makes carries what was written into the metadata of the operation it came from.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from workbench.deployment._plan import plan
from workbench.deployment._timing import Kind
from workbench.models.operations import operation_name

Role = Literal["fused", "template", "library"]

KEY = "workbench.operation"  # in the part of the metadata that torch leaves to its users and always passes on

# operations that put numbers elsewhere, or write them in another type, and compute none
_COPIES = {"clone", "copy", "_to_copy", "convert_element_type", "device_put"}


@dataclass(frozen=True)
class Operation:
    """One operation of the traced program: torch's name of it, its layers, and the nodes whose results it takes.

    It has one layer, unless it computes a module whose parts are layers of their own.
    """

    name: str
    layers: tuple[str, ...]
    inputs: tuple[str, ...]


@dataclass(frozen=True)
class Share:
    """What one kernel does of a program: kind, layers, and the names of the operations it computes."""

    kind: Kind
    layers: tuple[str, ...]
    operations: tuple[str, ...]


class Modules:
    """The modules that a call of a model runs, as its trace spells them.

    Parameters
    ----------
    model
        Its paths are the names of layers.
    called
        What is called and traced, with `inputs`: the model, or a module around it. The trace calls it
        ``L['module']``; a trace of an exported program has the paths within it instead.
    """

    def __init__(self, model: nn.Module, called: nn.Module, inputs: Sequence[Tensor]):
        planned = plan(model, lambda: called(*inputs), "")
        self._leaves = planned.leaves
        self._layers = {row.name: row.layers for _, row in planned.rows}
        self._called = called
        self._names = {part: path for path, part in model.named_modules()}
        self._paths = set(self._names.values())
        # what runs is a leaf, or has leaves or operations in it; an exported program has modules that only hold weights
        within = (*self._leaves, *self._layers)
        self._ran = {name.rsplit(".", i)[0] for name in within for i in range(name.count(".") + 1)} & self._paths

    def layers(self, node: fx.Node, operation: str, taken: set[str]) -> tuple[str, ...]:
        """Those of a node that computes `operation`, by a name that is not in `taken`, and is added to it."""
        path = self._around(node)
        if path in self._leaves:
            return self._layers.get(path, (path,))
        stem = name = f"{path}.{operation}" if path else operation
        number = 0
        while name in taken or name in self._paths:
            number += 1
            name = f"{stem}_{number}"
        taken.add(name)
        return (name,)

    def _around(self, node: fx.Node) -> str:
        """Path of the innermost module a node was called in."""
        stack = [spelled for spelled, _ in (node.meta.get("nn_module_stack") or {}).values()]
        return next((path for path in map(self._path, reversed(stack)) if path is not None), "")

    def _path(self, spelled: str) -> str | None:
        dotted = re.sub(r"(?:\._modules)?\[['\"]?([^\]'\"]+)['\"]?\]", r".\1", spelled.removeprefix("L['module']"))
        try:
            path = self._names.get(self._called.get_submodule(dotted.strip(".")))
        except AttributeError:
            return None
        return path if path in self._ran else None


def operations(graph: fx.Graph, modules: Modules) -> dict[str, Operation]:
    """The operations of a traced program by node, in execution order, each with its layer.

    That is the module it was called in; where the module calls others as well, the operation is a layer of its own,
    numbered where there are several of one name.
    """
    found: dict[str, Operation] = {}
    taken: set[str] = set()
    for node in graph.nodes:
        if node.op not in ("call_function", "call_method") or not _is_operation(node):
            continue
        inputs = tuple(source.name for source in node.all_input_nodes if source.name in found)
        if node.target is operator.getitem and not isinstance(_value(node.args[0]), Tensor):
            # one of several results; to take it is no operation
            source = found[node.args[0].name]
            found[node.name] = Operation(source.name, source.layers, inputs)
            continue
        name = _operation(node)
        found[node.name] = Operation(name, modules.layers(node, name, taken), inputs)
    return found


def mark(graph: fx.Graph, found: Mapping[str, Operation]) -> None:
    """Write into each node which operation it is, for what it will be lowered to."""
    for node in graph.nodes:
        if node.name in found:
            node.meta["custom"] = {**(node.meta.get("custom") or {}), KEY: node.name}


def shares(kernels: Sequence[tuple[Sequence[fx.Node], Role]], found: Mapping[str, Operation]) -> list[Share]:
    """What each kernel of a program computes.

    An operation that no kernel computes was replaced or dropped. If it lies between what a library's operation takes
    and gives, it was replaced by that; otherwise (a view, a dropout) it goes with the last kernel that computes what it
    takes, or else the first that takes its result.

    Parameters
    ----------
    kernels
        In execution order, each with the nodes of the lowered graph it was made of, in that graph's order. An operation
        of a library is the last of them; a generated kernel fuses them all, around the one operation it was written
        for if it comes from a template.
    found
        The operations of the traced program, which `mark` has written into its graph.
    """
    whole = [nodes[-1:] if role == "library" else [n for n in nodes if not _is_view(n)] for nodes, role in kernels]
    elsewhere = {n for mine, (_, role) in zip(whole, kernels, strict=True) if role != "fused" for n in mine}
    own: list[dict[str, None]] = []
    kinds: list[Kind] = []
    for mine, (nodes, role) in zip(whole, kernels, strict=True):
        mine = [n for n in mine if role != "fused" or n not in elsewhere]
        kinds.append("layer" if any(_base(n) not in _COPIES for n in mine) else "move")
        # a kernel without an operation of its own prepares what another's takes
        own.append(dict.fromkeys(filter(None, map(_source, mine or nodes))))
    owner: dict[str, int] = {}
    for index, mine in enumerate(own):
        owner.update((name, index) for name in mine if kinds[index] == "layer" or name not in owner)
    for index, (nodes, role) in enumerate(kernels):
        if role == "library" and nodes:
            stops = {_source(node) for node in nodes[-1].all_input_nodes}
            for name in [name for name in own[index] if name not in stops]:
                _claim_replaced(name, index, stops, found, owner)
    _claim_dropped(found, owner)
    result = []
    for index, (kind, mine) in enumerate(zip(kinds, own, strict=True)):
        layers = [layer for name in found if name in mine or owner.get(name) == index for layer in found[name].layers]
        computed = [found[name].name for name in found if name in mine]
        result.append(Share(kind, tuple(dict.fromkeys(layers)), tuple(dict.fromkeys(computed))))
    return result


def _claim_replaced(
    name: str, index: int, stops: set[str], found: Mapping[str, Operation], owner: dict[str, int]
) -> None:
    """Give a kernel the operations without one on every way back from `name` to what the kernel takes."""
    for source in found[name].inputs:
        if source not in owner and source not in stops:
            owner[source] = index
            _claim_replaced(source, index, stops, found, owner)


def _claim_dropped(found: Mapping[str, Operation], owner: dict[str, int]) -> None:
    """Give the operations without a kernel the kernel before them, or else the one after."""
    takers: dict[str, list[str]] = {}
    for name, operation in found.items():
        for source in operation.inputs:
            takers.setdefault(source, []).append(name)
        before = [owner[source] for source in operation.inputs if source in owner]
        if name not in owner and before:
            owner[name] = max(before)
    for name in reversed(found):
        after = [owner[taker] for taker in takers.get(name, ()) if taker in owner]
        if name not in owner and after:
            owner[name] = min(after)


def _source(node: fx.Node) -> str:
    """The operation a node was lowered from; what replaced several has the name of what takes its result apart."""
    name = (node.meta.get("custom") or {}).get(KEY, "")
    results = [user for user in node.users if user.target is operator.getitem]
    return name or next(filter(None, map(_source, results)), "")


def _operation(node: fx.Node) -> str:
    """Torch's name of what a node computes: a method, a function, an overload, or one of Python's operators."""
    function = node.target
    if isinstance(function, str):
        function = getattr(Tensor, function)
    elif getattr(function, "__module__", "") == operator.add.__module__:
        function = getattr(Tensor, f"__{function.__name__.strip('_')}__", function)
    return operation_name(function, pytree.tree_map_only(fx.Node, _value, node.args))


def _value(node: fx.Node) -> Any:
    return node.meta.get("example_value", node.meta.get("val"))


def _is_operation(node: fx.Node) -> bool:
    """Whether a node of the traced program makes or changes tensors."""
    values = pytree.tree_leaves(_value(node))
    return node.target is operator.setitem or any(isinstance(value, Tensor) for value in values)


def _base(node: fx.Node) -> str:
    return getattr(node.target, "__name__", str(node.target)).partition(".")[0]


def _is_view(node: fx.Node) -> bool:
    """Whether a node of the lowered graph only names numbers that are there already."""
    if node.op != "call_function" or node.target is operator.getitem or _base(node) == "_unsafe_view":
        return True
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)

"""From the kernels of a compiled program back to the model's layers, through the graphs it was lowered from.

The graph that is traced from the module says which module each operation was called in. Lowering splits, replaces and
drops operations, but what it makes carries what was written into the metadata of the operation it came from.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, fx, nn

from workbench.deployment._timing import Kind

KEY = "workbench.operation"  # in the part of the metadata that torch leaves to its users and always passes on

# operations that put numbers elsewhere, or write them in another type, and compute none
_COPIES = {"clone", "copy", "_to_copy", "convert_element_type", "device_put"}
_SYNONYMS = {"truediv": "div", "floordiv": "floor_divide", "mod": "remainder"}
_IN_PLACE = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor")


@dataclass(frozen=True)
class Operation:
    """One operation of the traced program.

    Attributes
    ----------
    name
        Torch's, without overload and underscores: ``conv2d``, ``add``.
    path
        Of the innermost module it was called in.
    layers
        Those it computes: one, unless it stands for a module with its parts.
    inputs
        The operations whose results it takes, by node.
    """

    name: str
    path: str
    layers: tuple[str, ...]
    inputs: tuple[str, ...]


@dataclass(frozen=True)
class Share:
    """What one kernel does of a program: kind, layers, and the names of the operations it computes."""

    kind: Kind
    layers: tuple[str, ...]
    operations: tuple[str, ...]


def operations(graph: fx.Graph, path_of: Callable[[str], str | None]) -> dict[str, Operation]:
    """The operations of a traced program by node, in execution order.

    An operation belongs to the module it was called in; where that module calls others as well, the operation is a
    layer of its own, numbered where the module calls it more than once.

    Parameters
    ----------
    path_of
        Gives the path in the model of a module as the trace spells it; None for what is no module of the model.
    """
    nodes = [node for node in graph.nodes if node.op in ("call_function", "call_method") and _gives_tensors(node)]
    paths = {node: _paths(node, path_of) for node in nodes}
    # every level above a call, containers that are not called themselves included
    outer = {""} | {path.rsplit(".", i)[0] for p in paths.values() for path in p for i in range(1, path.count(".") + 1)}
    outer |= {path for p in paths.values() for path in p[:-1]}
    found: dict[str, Operation] = {}
    seen: dict[str, int] = {}
    for node in nodes:
        inputs = tuple(source.name for source in node.all_input_nodes if source.name in found)
        if node.target is operator.getitem and not isinstance(_value(node.args[0]), Tensor):
            # one of several results; taking it is no operation
            source = found[node.args[0].name]
            found[node.name] = Operation(source.name, source.path, source.layers, inputs)
            continue
        name, path = _operation(node.target), paths[node][-1]
        layer = path
        if path in outer:
            layer = f"{path}.{name}".lstrip(".")
            seen[layer] = seen.get(layer, 0) + 1
            layer += f"_{seen[layer] - 1}" if seen[layer] > 1 else ""
        found[node.name] = Operation(name, path, (layer,), inputs)
    return found


def mark(graph: fx.Graph, found: Mapping[str, Operation]) -> None:
    """Write into each node which operation it is, for what it will be lowered to."""
    for node in graph.nodes:
        if node.name in found:
            node.meta["custom"] = {**(node.meta.get("custom") or {}), KEY: node.name}


def module_paths(called: nn.Module, model: nn.Module) -> Callable[[str], str | None]:
    """A function for `operations`: the trace calls the module `called` ``L['module']``; paths are those in `model`."""
    names = {part: name for name, part in model.named_modules()} | ({} if called is model else {called: ""})

    def path_of(spelled: str) -> str | None:
        spelled = re.sub(r"(?:\._modules)?\[['\"]?([^\]'\"]+)['\"]?\]", r".\1", spelled.removeprefix("L['module']"))
        try:
            return names.get(called.get_submodule(spelled.strip(".")))
        except AttributeError:
            return None

    return path_of


def shares(kernels: Sequence[tuple[Sequence[fx.Node], bool]], found: Mapping[str, Operation]) -> list[Share]:
    """What each kernel of a program computes.

    An operation that no kernel computes was replaced or dropped. If it lies between what a library's operation takes
    and gives, it was replaced by that; otherwise (a view, a dropout) it goes with the last kernel that computes what it
    takes, or else the first that takes its result.

    Parameters
    ----------
    kernels
        In execution order: the nodes of the lowered graph it was made of, in that graph's order, and whether it is one
        operation of a library, which is the last of them.
    found
        The operations of the traced program, which `mark` has written into its graph.
    """
    single = {nodes[-1] for nodes, library in kernels if library and nodes}
    own: list[dict[str, None]] = []
    kinds: list[Kind] = []
    for nodes, library in kernels:
        mine = list(nodes[-1:]) if library else [n for n in nodes if n not in single and not _is_view(n)]
        kinds.append("layer" if any(_base(n) not in _COPIES for n in mine) else "move")
        # a kernel without an operation of its own prepares what a library's operation takes
        own.append(dict.fromkeys(filter(None, map(_source, mine or nodes))))
    owner: dict[str, int] = {}
    for index, mine in enumerate(own):
        owner.update((name, index) for name in mine if kinds[index] == "layer" or name not in owner)
    for index, (nodes, library) in enumerate(kernels):
        if library and nodes:
            stops = {_source(node) for node in nodes[-1].all_input_nodes}
            for name in [name for name in own[index] if name not in stops]:
                _claim_replaced(name, index, stops, found, owner)
    _claim_dropped(found, owner)
    for name, index in owner.items():
        own[index].setdefault(name)
    order = {name: position for position, name in enumerate(found)}
    result = []
    for kind, mine in zip(kinds, own, strict=True):
        taken = [found[name] for name in sorted(mine, key=order.__getitem__)]
        layers = dict.fromkeys(layer for operation in taken for layer in operation.layers)
        result.append(Share(kind, tuple(layers), tuple(dict.fromkeys(operation.name for operation in taken))))
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


def _paths(node: fx.Node, path_of: Callable[[str], str | None]) -> list[str]:
    """Paths of the modules around a node, outermost first; never empty."""
    stack = [path_of(spelled) for spelled, _ in (node.meta.get("nn_module_stack") or {}).values()]
    return [path for path in stack if path is not None] or [""]


def _operation(target: object) -> str:
    """``flatten`` of a method, a function, an operator or an overload."""
    name = target if isinstance(target, str) else getattr(target, "__name__", str(target)).partition(".")[0]
    name = name.strip("_")
    if name.startswith("i") and name[1:] in _IN_PLACE:
        name = name[1:]
    return _SYNONYMS.get(name, name)


def _value(node: fx.Node) -> object:
    return node.meta.get("example_value", node.meta.get("val"))


def _gives_tensors(node: fx.Node) -> bool:
    value = _value(node)
    return isinstance(value, Tensor) or (
        isinstance(value, (tuple, list)) and any(isinstance(part, Tensor) for part in value)
    )


def _base(node: fx.Node) -> str:
    return getattr(node.target, "__name__", str(node.target)).partition(".")[0]


def _is_view(node: fx.Node) -> bool:
    """Whether a node of the lowered graph only names numbers that are there already."""
    if node.op != "call_function" or node.target is operator.getitem or _base(node) == "_unsafe_view":
        return True
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)

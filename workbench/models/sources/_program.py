"""A `torch.export` program as an ordinary module: named layers, torch's own where they can be told, any batch size."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.export.unflatten import InterpreterModule, unflatten

from workbench.models.inputs import explicit, outputs

_aten = torch.ops.aten
_RESHAPES = (_aten.view.default, _aten.reshape.default, _aten._unsafe_view.default)
_TOLERANCE = 1e-4  # of the largest output


def module(
    program: ExportedProgram, example: Mapping[str, Tensor], keywords: bool, classes: Mapping[str, str] | None = None
) -> nn.Module:
    """The program as a module with the layers it was exported from.

    Layers of one operation become torch's own modules again, so that steps know them; the rest keep their class's name
    as ``original_name``. A program exported for one batch size takes any afterwards, if running it so gives the same
    results; if not, the module's ``fixed_batch`` says which it takes.

    Parameters
    ----------
    program
        Changed in place.
    example
        One batch of the size it was exported for, where that is fixed.
    keywords
        Whether inputs go in by keyword.
    classes
        What the layers' classes were called, by path; by default what the program noted.
    """
    classes = _classes(program.graph) if classes is None else classes
    _tidy(program.graph)
    program._guards_code = []  # Python text, which torch would run
    batch, names = _fixed_batch(program), list(example)
    if batch is None:
        return explicit(_unflattened(program, classes), names)
    closed = explicit(_unflattened(program, classes), names)
    closed.fixed_batch = batch
    if not all(_checks_its_inputs(node) for node in program.graph.nodes):
        return closed
    for node in program.graph.nodes:
        if node.target in _RESHAPES and node.args[1][0] == batch:
            node.update_arg(1, [-1, *node.meta["val"].shape[1:]])
    opened = explicit(_unflattened(program, classes), names)
    opened.check_input_constraints = False
    if _takes_any_batch(opened, closed, example, keywords):
        return opened
    return closed


def check_against(original: nn.Module, module: nn.Module, example: Mapping[str, Tensor], keywords: bool) -> None:
    """Raise an AssertionError unless both compute the same, for the example, one sample, and one sample more."""
    sizes = [
        example,
        {key: value[:1] for key, value in example.items()},
        {key: torch.cat([value, value[:1]]) for key, value in example.items()},
    ]
    for values in sizes:
        with torch.no_grad():
            expected = _run(original, values, keywords)
            found = _run(module, values, keywords)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=_TOLERANCE, atol=_TOLERANCE)


def _run(module: nn.Module, values: Mapping[str, Tensor], keywords: bool) -> tuple[Tensor, ...]:
    return outputs(module(**values) if keywords else module(*values.values()))


def input_names(program: ExportedProgram) -> list[str]:
    """Names of the user's inputs in order."""
    return [node.name for node in _inputs(program)]


def takes_keywords(program: ExportedProgram) -> bool:
    """Whether it was exported with keyword inputs alone."""
    positional, keyword = program.call_spec.in_spec.children() if program.call_spec.in_spec else (None, None)
    return positional is not None and positional.num_leaves == 0 and keyword.num_leaves > 0


def noise(program: ExportedProgram) -> list[Tensor]:
    """Inputs of the shapes it was exported with, two samples where the batch axis is open."""
    made = torch.Generator().manual_seed(0)
    values = []
    for node in _inputs(program):
        fake = node.meta["val"]
        shape = [n if isinstance(n, int) else 2 for n in fake.shape]
        values.append(
            torch.rand(shape, generator=made).to(fake.dtype)
            if fake.is_floating_point()
            else torch.zeros(shape, dtype=fake.dtype)
        )
    return values


def _inputs(program: ExportedProgram) -> list[fx.Node]:
    user = {s.arg.name for s in program.graph_signature.input_specs if s.kind == InputKind.USER_INPUT}
    return [node for node in program.graph.nodes if node.op == "placeholder" and node.name in user]


def _fixed_batch(program: ExportedProgram) -> int | None:
    sizes = [node.meta["val"].shape[0] for node in _inputs(program) if isinstance(node.meta.get("val"), Tensor)]
    return next((size for size in sizes if isinstance(size, int)), None)


def _checks_its_inputs(node: fx.Node) -> bool:
    """Whether an operation may be tried at a size it was not exported for.

    Recurrent kernels and the inner parts of attention leave that check to the module they came from, which is gone, and
    read past the end of what they are given.
    """
    words = ("lstm", "gru", "rnn", "_scaled_dot", "_flash", "_efficient", "mkldnn", "cudnn")
    return not any(word in str(node.target) for word in words)


def _tidy(graph: fx.Graph) -> None:
    """Drop what tracing notes down and no run needs: assertions on dtypes, and casts to the dtype a value has."""
    for node in list(graph.nodes):
        if node.target == _aten._assert_tensor_metadata.default:
            graph.erase_node(node)
        elif node.target in (_aten.to.dtype_layout, _aten.to.dtype):
            before = node.args[0].meta.get("val")
            if before is not None and before.dtype == node.meta["val"].dtype:
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)


def _unflattened(program: ExportedProgram, classes: Mapping[str, str]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about its tree utilities
        root = unflatten(program)
    for path, inner in list(root.named_modules()):
        if hasattr(inner, "_run_with_interpreter"):
            inner._run_with_interpreter = False  # the compiled graph runs several times as fast
        if isinstance(inner, InterpreterModule):
            inner.original_name = classes.get(path.split("@")[0], "Module")
            layer = _layer(inner)
            if layer is not None:
                parent, _, name = path.rpartition(".")
                setattr(root.get_submodule(parent), name, layer)
    for inner in root.modules():
        if isinstance(getattr(inner, "graph", None), fx.Graph):
            for node in inner.graph.nodes:
                node.meta = {}  # shapes as fake tensors, which cannot be copied
    root.meta = {}
    root.module_call_graph = _Shared(root.module_call_graph)
    return root.eval()


class _Shared(list):
    """How inputs are nested: the same for every copy of a network, and torch warns when it is copied."""

    def __deepcopy__(self, memo: dict) -> _Shared:
        return self


def _classes(graph: fx.Graph) -> dict[str, str]:
    """Class of each layer by path, as noted when the program was exported."""
    found = {}
    for node in graph.nodes:
        for path, kind in (node.meta.get("nn_module_stack") or {}).values():
            found[path.split("@")[0]] = (kind if isinstance(kind, str) else kind.__name__).rpartition(".")[2]
    return found


def _takes_any_batch(opened: nn.Module, closed: nn.Module, example: Mapping[str, Tensor], keywords: bool) -> bool:
    """Whether three different batches in one give what they give alone."""
    made = torch.Generator().manual_seed(0)

    def shaken(value: Tensor) -> Tensor:
        return value + torch.randn(value.shape, generator=made).to(value) if value.is_floating_point() else value

    batches = [{key: shaken(value) for key, value in example.items()} for _ in range(3)]
    with torch.no_grad():
        alone = [_run(closed, batch, keywords) for batch in batches]
        try:
            together = _run(opened, {key: torch.cat([batch[key] for batch in batches]) for key in example}, keywords)
        except (RuntimeError, IndexError, AssertionError):  # a size written elsewhere in the network
            return False
    for parts, whole in zip(zip(*alone, strict=True), together, strict=True):
        expected = torch.cat(parts) if parts[0].ndim else torch.stack(parts)
        if expected.shape != whole.shape:
            return False
        if (expected.double() - whole.double()).abs().max() > _TOLERANCE * expected.double().abs().max():
            return False
    return True


def _layer(inner: InterpreterModule) -> nn.Module | None:
    """Torch's own layer for a module of one known operation, on the same parameters; None for any other."""
    nodes = [node for node in inner.graph.nodes if node.op not in ("get_attr", "output")]
    result = next((node.args[0] for node in inner.graph.nodes if node.op == "output"), None)
    results = list(result) if isinstance(result, (tuple, list)) else [result]
    if [n.op for n in nodes] != ["placeholder", "call_function"] or results != [nodes[1]]:
        return None
    call = nodes[1]
    build = _BUILDERS.get(call.target)
    arguments = call.normalized_arguments(nn.Module(), normalize_to_only_use_kwargs=True)
    if build is None or arguments is None:
        return None
    given = {k: _value(inner, v, nodes[0]) for k, v in arguments.kwargs.items()}
    given["axes"] = nodes[1].meta["val"].ndim if isinstance(nodes[1].meta.get("val"), Tensor) else 0
    layer = build(given) if given.get("input", given.get("self")) is _INPUT else None
    if layer is not None:
        for name, tensor in inner.named_buffers(recurse=False):
            if name not in layer._buffers:
                layer.register_buffer(name, tensor)
            layer._buffers[name] = tensor
    return layer


_INPUT = object()


def _value(inner: nn.Module, value: Any, placeholder: fx.Node) -> Any:
    if value is placeholder:
        return _INPUT
    return getattr(inner, value.target) if isinstance(value, fx.Node) and value.op == "get_attr" else value


def _filled(layer: nn.Module, given: Mapping[str, Any]) -> nn.Module:
    for name in ("weight", "bias"):
        if isinstance(given.get(name), Tensor):
            setattr(layer, name, given[name] if isinstance(given[name], nn.Parameter) else nn.Parameter(given[name]))
    return layer


def _convolution(given: Mapping[str, Any]) -> nn.Module | None:
    weight, groups = given["weight"], given.get("groups", 1)
    if given.get("transposed") or weight.ndim != given["axes"]:
        return None
    settings = {k: _tuple(given[k]) for k in ("stride", "padding", "dilation") if k in given}
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[weight.ndim - 3](
        weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:]), **settings, groups=groups,
        bias=given.get("bias") is not None, device="meta",
    )  # fmt: skip
    return _filled(layer, given)


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else value


def _linear(given: Mapping[str, Any]) -> nn.Module:
    outwards, inwards = given["weight"].shape
    return _filled(nn.Linear(inwards, outwards, bias=given.get("bias") is not None, device="meta"), given)


def _batch_norm(given: Mapping[str, Any]) -> nn.Module | None:
    if given["training"] or not isinstance(given["running_mean"], Tensor) or not isinstance(given["weight"], Tensor):
        return None
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}.get(given["axes"])
    if kind is None:
        return None
    layer = kind(len(given["running_mean"]), given["eps"], given["momentum"], device="meta")
    del layer._buffers["num_batches_tracked"]
    layer.running_mean, layer.running_var = given["running_mean"], given["running_var"]
    layer.register_buffer("num_batches_tracked", torch.tensor(0))
    return _filled(layer, given)


def _max_pool(given: Mapping[str, Any]) -> nn.Module:
    size, stride = _tuple(given["kernel_size"]), _tuple(given.get("stride")) or None
    rest = {k: _tuple(given[k]) for k in ("padding", "dilation", "ceil_mode") if k in given}
    return nn.MaxPool2d(size, stride, **rest)


_BUILDERS: dict[Any, Callable[[Mapping[str, Any]], nn.Module | None]] = {
    _aten.conv1d.default: _convolution,
    _aten.conv2d.default: _convolution,
    _aten.conv2d.padding: _convolution,
    _aten.conv3d.default: _convolution,
    _aten.convolution.default: _convolution,
    _aten.linear.default: _linear,
    _aten.batch_norm.default: _batch_norm,
    _aten.relu.default: lambda _: nn.ReLU(),
    _aten.relu_.default: lambda _: nn.ReLU(),
    _aten.max_pool2d.default: _max_pool,
}

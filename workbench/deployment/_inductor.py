"""What Inductor, the compiler behind ``torch.compile``, tells of a program it makes.

Most of it is private to torch and the same from 2.11 to 2.13: the hook that is given the generated code, the table of
the nodes each kernel was made of, and how the code is laid out. It is used in this file only, and looked up when a
program is recorded, so that another version of torch costs the profile and nothing else.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import fx

from workbench.deployment import _fx_layers
from workbench.deployment._inductor_code import Step, View, launched
from workbench.deployment._plan import PRECISIONS
from workbench.deployment._timing import OpTiming, Port
from workbench.errors import BackendError

_INPUTS = "L_tensors"  # how the trace begins the names of what the compiled function takes as ``*tensors``

_OPTIONS = {
    # a function record in each generated kernel, and the table of what each was made of
    "cpp.enable_kernel_profile": True,
    "trace.provenance_tracking_level": 1,
    # a program from the cache comes without the graphs it was made of
    "fx_graph_cache": False,
    # a replayed graph is one launch; its kernels are the same as when each is launched
    "triton.cudagraphs": False,
}


class Listener:
    """Compiles as ``torch.compile`` does by default, and keeps what it makes and what it was made of.

    Parameters
    ----------
    mode
        One of those of ``torch.compile``.

    Attributes
    ----------
    modules
        Those of the model, for the names of its layers; to be set before it is called.
    """

    modules: _fx_layers.Modules | None = None

    def __init__(self, mode: str):
        self._options = {**torch._inductor.list_mode_options(mode), **_OPTIONS}
        self._operations: dict[str, _fx_layers.Operation] = {}
        self._inputs: list[bool] = []
        self._programs: list[tuple[str, dict[str, list[str]] | None, Any]] = []

    def __call__(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile a traced program; what ``torch.compile`` calls a backend."""
        self._programs.clear()
        self._operations = _fx_layers.operations(module.graph, self.modules)
        _fx_layers.mark(module.graph, self._operations)
        self._inputs = [str(n.target).startswith(_INPUTS) for n in module.graph.nodes if n.op == "placeholder"]
        with _hooked(self._keep):
            return torch._inductor.compile(module, inputs, options=self._options)

    def _keep(self, code: str) -> None:
        table = _private("torch._inductor.debug", "_inductor_triton_kernel_to_post_grad_node_info")
        lowered = getattr(_private("torch._inductor.virtualized", "V"), "graph", None)
        self._programs.append((code, None if table is None else dict(table), lowered))

    def launches(self) -> list[OpTiming]:
        """The kernels of the program compiled last, in the order they are launched, without times.

        Raises
        ------
        BackendError
            If this version of torch does not tell, or the program has none.
        """
        if len(self._programs) > 1:
            raise _untold(f"{len(self._programs)} programs were written")
        code, table, lowered = self._programs[0] if self._programs else ("", None, None)
        steps = launched(code)
        if not steps:
            raise BackendError(
                f"torch {torch.__version__} wrote no kernel for this model that could be timed: it computes nothing, "
                "or this version of torch does not tell, as 2.11 to 2.13 do. Profile with wb.Eager()."
            )
        try:
            return self._read(steps, table, lowered)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise _untold(f"{type(error).__name__}: {error}") from error

    def forget(self) -> None:
        """Let go of the model and its program: torch keeps whatever it has once called as a backend."""
        self.modules = None
        self._operations = {}
        self._programs.clear()

    def _read(self, steps: Sequence[Step], table: dict[str, list[str]], lowered: Any) -> list[OpTiming]:
        nodes = {node.name: (index, node) for index, node in enumerate(lowered.module.graph.nodes)}
        if sorted(step.handle for step in steps) != sorted(table):
            raise ValueError("the kernels of the code are not those of the table")
        made_of = []
        for step in steps:
            known = sorted(nodes[name] for name in table[step.handle] if name in nodes)
            made_of.append(([node for _, node in known], step.role))
        shares = _fx_layers.shares(made_of, self._operations)
        placeholders = [node.name for _, node in nodes.values() if node.op == "placeholder"]
        weights = {n for n, taken in zip(placeholders, self._inputs, strict=True) if not taken} | set(lowered.constants)
        return [
            _launch(step, share, made, weights, lowered)
            for step, share, (made, _) in zip(steps, shares, made_of, strict=True)
        ]


def _launch(step: Step, share: _fx_layers.Share, nodes: Sequence[fx.Node], weights: set[str], lowered: Any) -> OpTiming:
    read, written = step.arguments, [(name, None) for name in step.results]
    if step.role != "library":
        pairs = list(zip(step.parameters, step.arguments, strict=False))
        read = [argument for name, argument in pairs if not name.startswith("out_ptr")]
        written = [argument for name, argument in pairs if "out_ptr" in name]
    elif nodes and len(read) == len(nodes[-1].all_input_nodes):
        # a weight stays one when another kernel has put it into another order
        taken = zip(read, nodes[-1].all_input_nodes, strict=True)
        weights = weights | {name for (name, _), source in taken if source.name in weights}
    held = dict.fromkeys(name for name, _ in read if name in weights)
    reads = _ports([entry for entry in read if entry[0] not in weights], lowered)
    writes = _ports(written, lowered)
    dtype = (writes or reads)[0].dtype if writes or reads else ""
    return OpTiming(
        name=step.event,
        type=_type(step, share, reads, writes),
        layers=share.layers,
        times_ms=(),
        kind=share.kind,
        reads=reads,
        writes=writes,
        weight_bytes=int(sum(port.nbytes for port in _ports([(name, None) for name in held], lowered))),
        precision="" if share.kind == "move" else PRECISIONS.get(dtype, dtype),
        kernel=() if step.role == "fused" else _window(nodes),
    )


def _type(step: Step, share: _fx_layers.Share, reads: Sequence[Port], writes: Sequence[Port]) -> str:
    if step.role == "library":
        return step.event.partition("::")[2].strip("_")
    if share.kind != "move":
        return " ".join(("fused", *share.operations))
    return "convert" if {port.dtype for port in reads} != {port.dtype for port in writes} else "reorder"


def _ports(entries: Sequence[View], lowered: Any) -> tuple[Port, ...]:
    found = {}
    for name, shape in entries:
        buffer = lowered.try_get_buffer(name)
        size = None if buffer is None else buffer.maybe_get_size()
        if size is not None:
            dtype = str(buffer.get_dtype()).removeprefix("torch.")
            found.setdefault(name, Port(name, tuple(int(n) for n in (shape or size)), dtype))
    return tuple(found.values())


def _window(nodes: Sequence[fx.Node]) -> tuple[int, ...]:
    """Spatial size of the kernel of the convolution among the nodes."""
    weights = [n.args[1] for n in nodes if n.op == "call_function" and "convolution" in str(n.target)]
    return tuple(int(n) for n in weights[0].meta["val"].shape[2:]) if weights else ()


_HOOK = threading.Lock()


@contextmanager
def _hooked(keep: Callable[[str], None]) -> Iterator[None]:
    """Have the code of the programs that this thread compiles given to `keep` while they are being written."""
    graph = _private("torch._inductor.graph", "GraphLowering") or SimpleNamespace()
    here = threading.get_ident()
    with _HOOK:
        before = getattr(graph, "save_output_code", None)

        def hook(code: str) -> None:
            if threading.get_ident() == here:
                keep(code)
            if before is not None:
                before(code)

        graph.save_output_code = staticmethod(hook)
        try:
            yield
        finally:
            graph.save_output_code = before


def _private(module: str, name: str) -> Any:
    """Something of torch's that another version may not have; None where it has not."""
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None


def _untold(what: str) -> BackendError:
    return BackendError(
        f"torch {torch.__version__} does not tell which operations its compiled kernels were made of ({what}); the "
        "profile of wb.Compiled() reads what torch 2.11 to 2.13 write. Profile with wb.Eager()."
    )

"""The code that Inductor generates, read back: which kernels it launches, on which buffers."""

from __future__ import annotations

import ast
import re
from contextlib import suppress
from dataclasses import dataclass, field

from workbench.deployment._fx_layers import Role

_HANDLE = re.compile(r"\s*# \[Provenance debug handles\] ((\S+):\d+)$")

View = tuple[str, tuple[int, ...] | None]  # a buffer, and the shape it is looked at in where that is not its own


@dataclass
class Step:
    """One launch in the generated code: arguments and results as (buffer, shape of a view of it or None)."""

    kernel: str
    handle: str
    parameters: list[str]  # names in the kernel's own signature; empty for an operation of a library
    arguments: list[View] = field(default_factory=list)
    results: list[str] = field(default_factory=list)

    @property
    def role(self) -> Role:
        """Where its code comes from."""
        if not self.parameters:
            return "library"
        return "template" if "_tem_" in self.kernel else "fused"

    @property
    def event(self) -> str:
        """What the profiler calls it: ``aten::addmm`` for ``extern_kernels.addmm``."""
        if self.role != "library":
            return self.kernel
        parts = self.kernel.removeprefix("torch.ops.").split(".")
        return f"{'aten' if parts[0] == 'extern_kernels' else parts[0]}::{parts[1] if len(parts) > 1 else parts[0]}"


def launched(code: str) -> list[Step]:
    """The launches of a generated program; its buffers under the name of the storage they lie in."""
    storage: dict[str, str] = {}
    maker: dict[str, Step] = {}
    found: list[Step] = []
    waiting: Step | None = None
    for line in code[max(code.find("def call("), 0) :].splitlines():
        marked = _HANDLE.match(line)
        if marked:
            handle, kernel = marked.groups()
            waiting = Step(kernel, handle, _parameters(code, kernel))
            found.append(waiting)
            continue
        statement = _statement(line)
        value = getattr(statement, "value", None)
        target = statement.targets[0].id if _assigns(statement) else ""
        if waiting is not None and isinstance(value, ast.Call) and _is_call_of(value, waiting.kernel):
            for argument in [*value.args, *(k.value for k in value.keywords if k.arg != "out")]:
                waiting.arguments += _tensors(argument, storage)
            outputs = [name for k in value.keywords if k.arg == "out" for name, _ in _tensors(k.value, storage)]
            waiting.results = outputs or ([target] if target else [])
            maker.update({target: waiting} if target else {})
            waiting = None
        elif target and _taken_from(value) in maker and not line.endswith("# reuse"):
            # one of several results, or the only one under its own name
            step = maker[_taken_from(value)]
            step.results = [name for name in step.results if name != _taken_from(value)] + [target]
        elif target:
            storage.update((target, name) for name, _ in _tensors(value, storage))
    return found


def _statement(line: str) -> ast.stmt | None:
    with suppress(SyntaxError):  # the head of a block
        body = ast.parse(line.strip()).body
        return body[0] if body else None
    return None


def _assigns(statement: ast.stmt | None) -> bool:
    return isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)


def _taken_from(value: ast.AST | None) -> str:
    """The variable in ``buf0`` or ``buf0[1]``."""
    return getattr(value.value if isinstance(value, ast.Subscript) else value, "id", "")


def _is_call_of(call: ast.Call, kernel: str) -> bool:
    return ast.unparse(call.func).removesuffix(".run") == kernel


def _tensors(value: ast.AST | None, storage: dict[str, str]) -> list[View]:
    """The buffers an expression names, each with the shape it is looked at in where that is another."""
    if isinstance(value, ast.Name):
        return [(storage.get(value.id, value.id), None)]
    if isinstance(value, (ast.List, ast.Tuple)):
        return [found for part in value.elts for found in _tensors(part, storage)]
    if isinstance(value, ast.Call) and getattr(value.func, "id", "") == "reinterpret_tensor":
        with suppress(ValueError):
            shape = ast.literal_eval(value.args[1])
            return [(name, shape) for name, _ in _tensors(value.args[0], storage)]
    return []


def _parameters(code: str, kernel: str) -> list[str]:
    """The parameters of a generated kernel; none for an operation of a library.

    One that only hands a value from one of the kernel's loops to the next is named as an output.
    """
    start = code.find(f"\n{kernel} = async_compile.")
    if start < 0:
        return []
    source = code[start : code.find("\n'''", start)]
    head = re.search(rf"(?:void\s+\w*\s*\w+|def\s+{re.escape(kernel)})\s*\(([^)]*)\)", source)
    pointers = [re.search(r"\b(?:in_out|in|out)_ptr\d+", part) for part in (head[1].split(",") if head else [""])]
    written_first = set(re.findall(r"auto out_ptr\d+ = (in_out_ptr\d+);", source))
    names = [found[0] if found else "" for found in pointers]
    return ["out_ptr" if name in written_first else name for name in names]

"""What a forward pass runs: its leaf modules, and the functional operations between them, under their layers' names.

A leaf is a module that calls no other. An operation is a torch function that makes or changes tensors, called by a
module that calls others as well; what a leaf calls is part of the leaf. The network as a whole is never a leaf. The
name of a layer is the path of the module, or for an operation that of the module around it and torch's name of the
function: ``layer1.0.add``, a second one in the same forward pass ``layer1.0.add_1``.
"""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode
from torch.utils import _pytree as pytree

# Python's names of operators that torch calls otherwise; those that begin with r take their operands in reverse
_RENAMED = {
    "truediv": "div",
    "floordiv": "floor_divide",
    "mod": "remainder",
    "invert": "bitwise_not",
    "and": "bitwise_and",
    "or": "bitwise_or",
    "xor": "bitwise_xor",
    "lshift": "bitwise_left_shift",
    "rshift": "bitwise_right_shift",
}
_OPERATORS = {"add", "sub", "mul", "div", "pow", "matmul", *_RENAMED}
# modules that run otherwise while functions are watched, as if there were tensors of another class
SHY = (nn.TransformerEncoder,)
# attributes of a tensor that are operations
_ATTRIBUTES = {"T": "transpose", "mT": "transpose", "H": "adjoint", "mH": "adjoint", "real": "real", "imag": "imag"}


def operation_name(function: Callable[..., Any], args: tuple[Any, ...] = ()) -> str:
    """Torch's name of what a function computes, without overload, underscores or reversal: ``add`` for ``__iadd__``.

    Indexing is ``index`` with tensors or lists, else ``select`` where an axis goes, else ``slice``. Empty for what
    only reads an attribute.
    """
    name = getattr(function, "__name__", type(function).__name__)
    if name in ("__get__", "__set__", "__delete__"):
        attribute = getattr(getattr(function, "__self__", None), "__name__", "")
        return _ATTRIBUTES.get(attribute, "") if name == "__get__" else ""
    if name == "__getitem__":
        return _indexing(args[1])
    bare = re.sub(r"\W.*", "", name).strip("_")  # an overload follows a dot
    if name.startswith("__") or bare == "rsub":
        if bare[:1] in ("r", "i") and bare[1:] in _OPERATORS:
            bare = bare[1:]
        return _RENAMED.get(bare, bare)
    return bare


def _indexing(index: Any) -> str:
    parts = index if isinstance(index, tuple) else (index,)
    if any(isinstance(part, (Tensor, list)) or type(part).__module__ == "numpy" for part in parts):
        return "index"
    return "select" if any(isinstance(part, (int, torch.SymInt)) for part in parts) else "slice"


def kind(module: nn.Module) -> str:
    """Class of a module, or the class it had before it was exported."""
    return getattr(module, "original_name", type(module).__name__)


@dataclass(eq=False, slots=True)
class Event:
    """One call within a forward pass.

    Attributes
    ----------
    path
        Of the module called, or of the module that calls the function.
    target
        The module or the function.
    operation
        Torch's name of the function; empty for a module, and for a function that neither makes nor changes tensors.
    within
        The call of a module it is part of; None for that of the whole network.
    noted
        Whatever a `Visitor` keeps with it.
    """

    path: str
    target: Any
    operation: str
    within: Event | None
    noted: Any = field(default=None, repr=False)

    @property
    def is_module(self) -> bool:
        """Whether a module is called."""
        return isinstance(self.target, nn.Module)

    @property
    def kind(self) -> str:
        """Class of the module, or name of the operation."""
        return kind(self.target) if self.is_module else self.operation


class Visitor:
    """Is told of each call while it happens; this one does nothing."""

    def enter(self, event: Event) -> None:
        """Before a call."""

    def run(self, event: Event, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function; what it returns is returned."""
        return function(*args, **kwargs)

    def leave(self, event: Event, given: Any, output: Any) -> None:
        """After a call that succeeded, with its arguments and what it gave."""


class Watch:
    """Follows the forward passes of a module on the thread that enters it; other threads run it unobserved.

    Parameters
    ----------
    module
        Its calls, and those of every module within it.
    visitor
        Is told of each call.
    functions
        Whether calls of functions are followed as well.
    leaves
        Paths of the modules known to be leaves, within which functions run unobserved, as those of `SHY` modules do;
        None to find them out.

    Attributes
    ----------
    events
        Calls of the latest forward pass in the order in which they began.
    failed
        The innermost call that raised; None where none did.
    """

    def __init__(
        self,
        module: nn.Module,
        visitor: Visitor | None = None,
        *,
        functions: bool = True,
        leaves: frozenset[str] | None = None,
    ):
        self.module, self.visitor = module, visitor or Visitor()
        self.events: list[Event] = []
        self.failed: Event | None = None
        self._mode = _Mode(self) if functions else None
        self._leaves = leaves
        self._paths = {path for path, _ in module.named_modules()}
        self._callers: set[str] = set()
        self._running: list[Event] = []
        self._deaf = False  # within a function, and while the visitor is told
        self._exit = ExitStack()

    def __enter__(self) -> Watch:
        handlers = {inner: self._handler(path, inner) for path, inner in self.module.named_modules()}
        self._exit.enter_context(intercept(handlers))
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    def is_leaf(self, path: str) -> bool:
        """Whether the module is a leaf in every call so far."""
        if self._leaves is not None:
            return path in self._leaves
        return path not in self._callers and (path != "" or isinstance(self.module, torch.jit.ScriptModule))

    def is_row(self, event: Event) -> bool:
        """Whether a call is a layer's: of a leaf, or an operation outside all leaves."""
        return self.is_leaf(event.path) if event.is_module else bool(event.operation) and not self.is_leaf(event.path)

    def layers(self) -> dict[Event, str]:
        """The layer of each call of the latest forward pass; empty for what belongs to none."""
        found: dict[Event, str] = {}
        counts: Counter[str] = Counter()
        taken = set(self._paths)  # a module may be called like an operation
        for event in self.events:
            if self.is_leaf(event.path) or not event.operation:
                found[event] = event.path if self.is_leaf(event.path) else ""
                continue
            stem = name = f"{event.path}.{event.operation}" if event.path else event.operation
            while name in taken:
                counts[stem] += 1
                name = f"{stem}_{counts[stem]}"
            taken.add(name)
            found[event] = name
        return found

    def failure(self) -> str:
        """Where the innermost call failed: ``layer block.fc (Linear)``, ``layer block.add``, ``its own forward``."""
        event = self.failed
        if event is None or not (event.path or event.operation):
            return "its own forward"
        owner = event if event.is_module else event.within
        if event.is_module or self.is_leaf(owner.path):
            return f"layer {owner.path} ({kind(owner.target)})"
        return f"layer {self.layers()[event]}" if event.path else f"its own forward, at {self.layers()[event]}"

    def _handler(self, path: str, module: nn.Module) -> Callable[..., Any]:
        def call(plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self._deaf or torch.compiler.is_dynamo_compiling():
                return plain(*args, **kwargs)
            if not self._running:
                self.events, self.failed = [], None
            event = Event(path, module, "", self._running[-1] if self._running else None)
            if event.within is not None:
                self._callers.add(event.within.path)
            self._tell(self.visitor.enter, event)
            self.events.append(event)
            self._running.append(event)
            try:
                with self._listening(event):
                    output = plain(*args, **kwargs)
            except Exception:
                self.failed = self.failed or event
                raise
            finally:
                self._running.pop()
            self._tell(self.visitor.leave, event, (args, kwargs), output)
            return output

        return call

    @contextmanager
    def _listening(self, event: Event) -> Iterator[None]:
        if self._mode is None:
            yield
        elif self._leaves is not None and (event.path in self._leaves or isinstance(event.target, SHY)):
            with aside(self._mode):
                yield
        elif event.within is None or (
            isinstance(event.within.target, SHY) and _get_current_function_mode() is not self._mode
        ):
            with self._mode:
                yield
        else:
            yield

    def function(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function that the network calls."""
        if self._deaf or not self._running or torch.compiler.is_dynamo_compiling():
            return function(*args, **kwargs)
        around = self._running[-1]
        event = Event(around.path, function, "", around)
        self._tell(self.visitor.enter, event)
        self.events.append(event)
        self._deaf = True
        try:
            output = self.visitor.run(event, function, args, kwargs)
        except Exception:
            event.operation = operation_name(function, args)
            self.failed = self.failed or event
            raise
        finally:
            self._deaf = False
        if function is Tensor.__setitem__ or any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(output)):
            event.operation = operation_name(function, args)
            self._tell(self.visitor.leave, event, (args, kwargs), output)
        return output

    def _tell(self, method: Callable[..., None], *about: Any) -> None:
        self._deaf = True
        try:
            method(*about)
        finally:
            self._deaf = False


class _Mode(TorchFunctionMode):
    def __init__(self, watch: Watch):
        super().__init__()
        self._watch = watch

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return self._watch.function(func, args, kwargs or {})


@contextmanager
def aside(mode: TorchFunctionMode) -> Iterator[None]:
    """Take a mode off the stack for a while, where nothing was entered above it."""
    if _get_current_function_mode() is not mode:
        yield
        return
    mode.__exit__(None, None, None)
    try:
        yield
    finally:
        mode.__enter__()


_LOCK = threading.Lock()
_SLOT = "_compiled_call_impl"  # what torch calls in place of a module's own call, where Module.compile has set it

Handler = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


@contextmanager
def intercept(handlers: Mapping[nn.Module, Handler]) -> Iterator[None]:
    """Let this thread's calls of modules go through functions, each given the plain call and its arguments.

    Hooks would do as well, but torch's fused attention is not used on modules that have any, and TorchScript takes
    none.
    """
    here = threading.get_ident()
    before: dict[nn.Module, Handler | None] = {}
    with _LOCK:
        for module, handler in handlers.items():
            door = vars(module).get(_SLOT)
            if not isinstance(door, _Door):
                door = vars(module)[_SLOT] = _Door(module, door)
            before[module] = door.handlers.get(here)
            door.handlers[here] = handler
    try:
        yield
    finally:
        with _LOCK:
            for module, handler in before.items():
                vars(module)[_SLOT].leave(module, here, handler)


class _Door:
    """Stands in for a module's call and leads each thread to its own handler."""

    def __init__(self, module: nn.Module, replaced: Callable[..., Any] | None):
        self.replaced = replaced
        self.plain = replaced or module._call_impl
        self.handlers: dict[int, Handler] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        handler = self.handlers.get(threading.get_ident())
        return self.plain(*args, **kwargs) if handler is None else handler(self.plain, args, kwargs)

    def leave(self, module: nn.Module, thread: int, before: Handler | None) -> None:
        """Give a thread the handler it had before; the last to leave restores the module."""
        if before is not None:
            self.handlers[thread] = before
            return
        del self.handlers[thread]
        if not self.handlers:
            del vars(module)[_SLOT]
            if self.replaced is not None:
                vars(module)[_SLOT] = self.replaced

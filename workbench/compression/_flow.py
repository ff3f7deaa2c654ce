"""Who reads what in a forward pass: the layers a network calls, and the tensors that go from one to the next."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from workbench.models import layers
from workbench.models.model import Model
from workbench.models.operations import Event, Visitor, Watch


@dataclass(eq=False)
class Call:
    """One call of a leaf module, or of a function between such modules.

    Attributes
    ----------
    path
        Of the module; of the module that calls the function.
    module
        None for a function.
    operation
        Torch's name of the function; empty for a module.
    taken, given
        Shapes of the first tensor it takes and of the first it gives; empty where there is none.
    readers
        Calls that read what it gives, in order; None stands for the caller of the network.
    """

    path: str
    module: nn.Module | None
    operation: str
    taken: tuple[int, ...]
    given: tuple[int, ...]
    readers: list[Call | None] = field(default_factory=list)

    @property
    def reader(self) -> Call | None:
        """The call that alone reads what this one gives; None where there are more, or the network's caller does."""
        return self.readers[0] if len(self.readers) == 1 else None


def calls(model: Model) -> list[Call]:
    """The calls of one forward pass on the model's example inputs, in the order in which they ended.

    A tensor changed in place counts as a new one, which the call that changed it gives.

    Raises
    ------
    LoadError
        If the module fails on its example inputs.
    """
    visitor = _Noting()
    with layers.unfused(), Watch(model.module, visitor) as watch:
        output = layers.call(model.module, model.example, model.keywords, model.name, watch)
    found: list[Call] = []
    giver: dict[int, Call] = {}
    for event, taken, given in visitor.noted:
        if not watch.is_row(event):
            continue
        call = Call(
            event.path,
            event.target if event.is_module else None,
            event.operation,
            *(tuple(tensors[0].shape) if tensors else () for tensors in (taken, given)),
        )
        for key in {id(tensor): None for tensor in taken}:
            if key in giver:
                giver[key].readers.append(call)
        giver.update(dict.fromkeys(map(id, given), call))
        found.append(call)
    for tensor in _tensors(output):
        if id(tensor) in giver:
            giver[id(tensor)].readers.append(None)
    return found


def called_once(model: Model, found: list[Call]) -> set[nn.Module]:
    """Modules called once in the pass that share no parameter with another: what may be changed for one reader."""
    counts = Counter(call.module for call in found if call.module is not None)
    owners = Counter(p for part in model.module.modules() for p in set(part.parameters(recurse=False)))
    return {
        module
        for module, count in counts.items()
        if count == 1 and all(owners[p] == 1 for p in module.parameters(recurse=False))
    }


class _Noting(Visitor):
    """Keeps what each call takes and gives; the tensors stay alive, so that no two have one identity."""

    def __init__(self) -> None:
        self.noted: list[tuple[Event, list[Tensor], list[Tensor]]] = []

    def leave(self, event: Event, given: Any, output: Any) -> None:
        taken = _tensors(given)
        # an assignment to a part of a tensor gives nothing and changes its first argument
        self.noted.append((event, taken, taken[:1] if event.target is Tensor.__setitem__ else _tensors(output)))


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]

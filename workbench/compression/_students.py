"""Students for distillation, and the places in two networks where what they compute can be compared."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from workbench.compression import _checks
from workbench.errors import LoadError, StepError
from workbench.models import inputs as model_inputs
from workbench.models import layers, parts, zoo
from workbench.models.model import Model
from workbench.models.operations import Event, Visitor, Watch


@dataclass(frozen=True)
class Stage:
    """What one module of a network gives when the network is called.

    Attributes
    ----------
    layer
        Path of the module.
    shape
        Of what it gives in its last call, batch axis first.
    channels_last
        Whether the channels are the last axis, as in a transformer's tokens ``(N, length, width)``.
    hidden
        Whether it ends before the last weighted layer begins.
    """

    layer: str
    shape: tuple[int, ...]
    channels_last: bool
    hidden: bool

    @property
    def channels(self) -> int:
        """How wide it is."""
        return self.shape[-1 if self.channels_last else 1]

    @property
    def places(self) -> tuple[int, ...]:
        """Lengths of the axes that are neither samples nor channels: height and width, or tokens."""
        return self.shape[1:-1] if self.channels_last else self.shape[2:]

    def channels_first(self, value: Tensor) -> Tensor:
        """What the module gave, as ``(N, channels, …places)``."""
        return value.movedim(-1, 1) if self.channels_last else value

    def __str__(self) -> str:
        return f"{self.layer} {('N', *self.shape[1:])}".replace("'", "")


class _Calls(Visitor):
    """What goes into and comes out of each module in its last call, and the order in which they end."""

    def __init__(self) -> None:
        self.given: dict[nn.Module, tuple[int, ...]] = {}
        self.gave: dict[nn.Module, tuple[int, ...]] = {}
        self._ended: dict[str, tuple[int, tuple[int, ...], bool]] = {}
        self._clock = self._last_weighted = 0
        self._in_convolutions = False

    def enter(self, event: Event) -> None:
        self._clock += 1
        if isinstance(event.target, _checks.WEIGHTED):
            self._last_weighted = self._clock
            self._in_convolutions = not isinstance(event.target, nn.Linear)

    def leave(self, event: Event, given: Any, output: Any) -> None:
        self._clock += 1
        before, after = _first(given), _first(output)
        if before is None or after is None or after.dim() < 2:
            return
        self.given[event.target], self.gave[event.target] = tuple(before.shape), tuple(after.shape)
        if after.is_floating_point():
            self._ended.pop(event.path, None)  # so that it stands where its last call ends
            tokens = after.dim() == 3 and not self._in_convolutions
            self._ended[event.path] = self._clock, tuple(after.shape), tokens

    def stages(self) -> list[Stage]:
        return [Stage(path, *what, end < self._last_weighted) for path, (end, *what) in self._ended.items() if path]


def _first(value: Any) -> Tensor | None:
    return next((leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)), None)


def _called(model: Model) -> _Calls:
    calls = _Calls()
    with layers.unfused(), Watch(model.module, calls, functions=False) as watch:
        layers.call(model.module, model.example, model.keywords, model.name, watch)
    return calls


def stages(model: Model) -> list[Stage]:
    """Every module that gives two axes or more, the network itself apart, in the order in which they end."""
    return _called(model).stages()


def counterparts(step: str, teacher: Model, student: Model, names: tuple[str, str], maps: bool) -> tuple[Stage, Stage]:
    """The stage of the teacher and the one of the student that are compared.

    Parameters
    ----------
    names
        Paths of the two; where one is empty, the last hidden stage of the other's kind; where both are, of the first
        kind both have among feature maps, tokens and (unless `maps`) vectors.
    maps
        Whether what is compared are maps over places, which vectors have none of.

    Raises
    ------
    StepError
        If a name is not there, the two are not of one kind, or there are none of one kind.
    """
    both = stages(teacher), stages(student)
    for name, known, whose in zip(names, both, ("teacher", "student"), strict=True):
        if name:
            _checks.layers(step, [name], [stage.layer for stage in known], f"layers of the {whose}")
    named = [next((s for s in known if s.layer == name), None) for name, known in zip(names, both, strict=True)]
    kinds = [len(stage.places) for stage in named if stage is not None] or [3, 2, 1, *([] if maps else [0])]
    for kind in kinds:
        found = [stage or _last(known, kind) for stage, known in zip(named, both, strict=True)]
        if None not in found and len({len(stage.places) for stage in found}) == 1 and (found[0].places or not maps):
            return found[0], found[1]
    given = " and ".join(str(stage) for stage in named if stage is not None)
    raise StepError(
        f"{step} finds no layer of {teacher.name} and of the student whose outputs can be compared"
        f"{': ' + given if given else ''}. Both must be feature maps (N, channels, height, width), both tokens (N, "
        f"length, width){'' if maps else ', or both vectors (N, width)'}; give teacher_layer and student_layer."
    )


def _last(known: Sequence[Stage], kind: int) -> Stage | None:
    fitting = [s for s in known if s.hidden and len(s.places) == kind and (kind == 0 or math.prod(s.places) > 1)]
    return fitting[-1] if fitting else None


# students


def every_second_block(step: str, model: Model) -> nn.Module:
    """A copy of the module in which each stack of blocks keeps its blocks 0, 2, 4 and so on.

    A stack is an `nn.Sequential` or `nn.ModuleList` of two or more modules of one class that have parts of their own,
    whose dropped ones give a tensor of the shape they are given.

    Raises
    ------
    StepError
        If there is no such stack, or the network does not run without the dropped blocks.
    """
    stacks = _stacks(model.module, _called(model))
    if not stacks:
        raise StepError(
            f"{step}: {model.name} has no repeated blocks, of which every second could be left out: it takes an "
            "nn.Sequential or nn.ModuleList of blocks of one class that keep the shape of their input. Give a student "
            "of the zoo by name."
        )
    module = copy.deepcopy(model.module)
    for path, count in stacks.items():
        module = parts.put(module, path, "blocks", keep=list(range(0, count, 2)))
    try:
        layers.run(module, model.example, model.keywords, model.name)
    except LoadError as error:
        raise StepError(
            f"{step}: without every second block of {', '.join(stacks)} the network does not run. {error}"
        ) from error
    return module


def _stacks(module: nn.Module, calls: _Calls) -> dict[str, int]:
    """Path and length of each stack whose every second block can be left out; none within another."""
    found: dict[str, int] = {}
    for path, part in module.named_modules():
        inside = any(path.startswith(f"{stack}.") for stack in found) or "" in found
        if isinstance(part, (nn.Sequential, nn.ModuleList)) and not inside and _are_blocks(list(part), calls):
            found[path] = len(part)
    return found


def _are_blocks(blocks: Sequence[nn.Module], calls: _Calls) -> bool:
    dropped = blocks[1::2]
    if not dropped or len(set(blocks)) < len(blocks) or len({type(block) for block in blocks}) > 1:
        return False
    if not all(any(True for _ in block.children()) for block in blocks):
        return False
    # a class of its own says that blocks are of one kind; plain sequences must also hold alike weights
    if type(blocks[0]) in (nn.Sequential, nn.ModuleList) and not all(
        any(_weights(block) == _weights(kept) for kept in blocks[::2]) for block in dropped
    ):
        return False
    return all(block in calls.given and calls.given[block] == calls.gave[block] for block in dropped)


def _weights(block: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in block.state_dict().items()}


def of_the_zoo(step: str, name: str, model: Model, seed: int) -> nn.Module:
    """The zoo's network of that name with random weights, in the place of a model's module.

    Raises
    ------
    StepError
        If it takes other inputs than the model.
    """
    wanted = [(tuple(x.shape[1:]), x.dtype) for x in zoo.example(name).values()]
    given = [(tuple(x.shape[1:]), x.dtype) for x in model.example.values()]
    if wanted != given or model.keywords:
        raise StepError(
            f"{step}: {name} takes {model_inputs.described(zoo.example(name))} by position, but {model.name} is given "
            f"{model_inputs.described(model.example)}{' by keyword' if model.keywords else ''}. Give a student that "
            "takes the same inputs."
        )
    return parts.put(model.module, "", "network", name=name, seed=seed)


def check_outputs(step: str, teacher: Model, student: Model) -> None:
    """Refuse a student that does not give as many outputs as its teacher; raises `StepError`."""
    theirs, its = (layers.run(m.module, m.example, m.keywords, m.name)[0].shape[1:] for m in (teacher, student))
    if theirs != its:
        raise StepError(
            f"{step}: the student gives {tuple(its)} per sample and its teacher {teacher.name} gives {tuple(theirs)}. "
            "Give a student with as many outputs as the teacher."
        )

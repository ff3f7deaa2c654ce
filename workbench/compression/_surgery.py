"""Channels cut out of a module by torch-pruning 1.6.1, and the proof that the cut was right.

torch-pruning's dependency graph tells which layers lose a channel together, and its functions cut them; which channels
go, and whether the result may be trusted, is decided here. Its own pruner is not used: it rounds widths down (30 % of
16 channels in multiples of 8 takes half of them, 50 % of 6 takes none), leaves a layer whole where its ranking would
empty it, and keeps channel groups in mutable default arguments that one model hands on to the next.

Whether a cut is right is *proved by running it*: a channel that is gone must be the same as a channel that no later
layer reads. Groups for which that fails are left alone: the residual stream of a ResNet with zero-padded shortcuts
(the padding shifts its channels), and whatever else a trace cannot follow.

The network is traced once. What a set of groups loses is worked out on that graph, in the channels of the untouched
network, and then cut out of a copy; so that an attempt costs a copy and a run, not a trace.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn
from torch_pruning import ops

from workbench.compression._checks import WEIGHTED
from workbench.errors import StepError
from workbench.models import inputs as model_inputs
from workbench.models.model import Model

KEPT = "kept_channels"  # an attribute of a narrowed layer, which its model's edits therefore hold
_TOLERANCE = 1e-4  # of the largest output; float32 rounding through a hundred layers stays below

Choice = Callable[[Sequence[str]], Mapping[str, Sequence[int]]]
Patch = Callable[[nn.Module, Mapping[str, Sequence[int]]], None]


@dataclass(frozen=True, eq=False)
class Group:
    """Channels that go together.

    Attributes
    ----------
    name
        Of the layer that heads the group.
    losing
        Convolutions and linear layers that lose these output channels, itself among them.
    reading
        Those that lose inputs.
    channels
        How many there are.
    parts
        Into how many equal parts a layer splits the channels: groups of a convolution, of a group norm. Channels go
        in step, one from each part.
    likeness
        The kinds of operations it runs through, in words; the same for groups of the same shape of sub-graph.
    traced
        torch-pruning's own group, whose layers are those of `Surgery.module`.
    """

    name: str
    losing: tuple[str, ...]
    reading: tuple[str, ...]
    channels: int
    parts: int
    likeness: str
    traced: Any


@dataclass(frozen=True)
class Trial:
    """A pruned copy, how many channels its groups lost, and why it may not be trusted; empty where it may."""

    pruned: nn.Module
    removed: int
    fault: str


@contextmanager
def tracing() -> Iterator[None]:
    """Follow grad_fn, which a caller's no_grad or inference_mode would leave empty, and keep the tracer quiet."""
    with torch.inference_mode(False), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its guesses about bare parameters are checked by running the result
        yield


class Surgery:
    """One network under the knife; to be used inside `tracing`.

    Attributes
    ----------
    module
        A copy of the model's in evaluation mode, every parameter of it with gradients: what was traced.
    groups
        Those that can be cut as far as the trace tells, by name, the largest first.
    fixed
        Layers whose channels reach the output.

    Raises
    ------
    StepError
        If the network cannot be traced.
    """

    def __init__(self, model: Model):
        noise = torch.Generator().manual_seed(0)
        self._original = model.module
        self._inputs = [_shaken(value, noise) for value in model.example.values()]
        self._names = list(model.example) if model.keywords else None
        self.module = _traceable(model.module)
        try:
            self._graph = self._traced()
        except Exception as error:  # a stranger's forward and the tracer raise what they like
            raise StepError(f"The network cannot be traced for pruning: {type(error).__name__}: {error}") from error
        self._paths = {layer: path for path, layer in self.module.named_modules()}
        self.groups, self.fixed = self._listed()

    def _traced(self) -> torch_pruning.DependencyGraph:
        return torch_pruning.DependencyGraph().build_dependency(
            self.module,
            example_inputs=self._inputs,
            forward_fn=lambda module, _: self._run(module),
            output_transform=lambda outputs: [t for t in outputs if t.grad_fn is not None],
        )

    def _listed(self) -> tuple[dict[str, Group], tuple[str, ...]]:
        found, fixed = [], []
        for traced in self._graph.get_all_groups(root_module_types=list(WEIGHTED)):
            out = [dep for dep, _ in traced if self._graph.is_out_channel_pruning_fn(dep.handler)]
            losing = self._weighted(out)
            if any(dep.target.type == ops.OPTYPE.OUTPUT or not dep.target.outputs for dep in out):
                fixed += losing
                continue
            reading = self._weighted(dep for dep, _ in traced if self._graph.is_in_channel_pruning_fn(dep.handler))
            likeness = " ".join(f"{type(dep.target.module).__name__}:{dep in out}" for dep, _ in traced)
            head, indices = traced[0].dep.target.module, traced[0].idxs
            parts = max(self._parts(dep) for dep, _ in traced)
            found.append(Group(self._paths[head], losing, reading, len(indices), parts, likeness, traced))
        found.sort(key=lambda group: -len(group.traced))
        return {group.name: group for group in found}, tuple(dict.fromkeys(fixed))

    def _weighted(self, deps: Iterable[Any]) -> tuple[str, ...]:
        layers = (dep.target.module for dep in deps)
        return tuple(dict.fromkeys(self._paths[layer] for layer in layers if isinstance(layer, WEIGHTED)))

    def _parts(self, dep: Any) -> int:
        layer = dep.target.module
        if isinstance(layer, nn.modules.conv._ConvNd) and layer.groups == layer.out_channels:
            return 1
        pruner = self._graph.get_pruner_of_module(layer)
        outgoing = self._graph.is_out_channel_pruning_fn(dep.handler)
        return (pruner.get_out_channel_groups if outgoing else pruner.get_in_channel_groups)(layer)

    def safe(self, names: Sequence[str], attempt: Callable[[Sequence[str]], Trial], front: int = 1) -> list[str]:
        """Those of `names` that can be cut and leave the network right, found by splitting what fails.

        Large groups come first and are the likely culprits, so a front part is split off that grows as it goes.
        """
        if not names or not attempt(names).fault:
            return list(names)
        if len(names) == 1:
            return []
        front = min(front, len(names) - 1)
        return self.safe(names[:front], attempt) + self.safe(names[front:], attempt, 2 * front)

    def attempt(self, lost: Mapping[str, Sequence[int]], patch: Patch | None = None) -> Trial:
        """Cut channels out of a copy, and compare it with the network in which nothing reads those channels.

        Parameters
        ----------
        lost
            By group, numbers of its channels.
        patch
            Changes the copy's own settings once the channels are gone: a number of heads.
        """
        pruned = copy.deepcopy(self._original).eval()
        try:
            unread = self._cut(pruned, lost)
            if patch is not None:
                patch(pruned, lost)
            with torch.no_grad():
                found = self._run(pruned)
        # a shape fixed in a stranger's forward, an index the tracer got wrong: a failed trial
        except Exception as error:
            return Trial(pruned, 0, f"{type(error).__name__}: {error}")
        if sum(1 for _ in pruned.parameters()) != sum(1 for _ in self._original.parameters()):
            return Trial(pruned, 0, "two layers that share a weight would come to have one each")
        expected = self._without(unread)
        same = len(expected) == len(found) and all(map(_close, expected, found))
        removed = sum(map(len, lost.values()))
        return Trial(pruned, removed, "" if same else "the rest would not compute what it computed before")

    def _cut(self, pruned: nn.Module, lost: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
        """Remove the channels from `pruned`, and tell which inputs each weighted layer no longer reads."""
        cuts: dict[tuple[Any, Callable], set[int]] = {}
        for name, channels in lost.items():
            head = self.groups[name].traced[0].dep
            group = self._graph.get_pruning_group(head.target.module, head.handler, list(channels))
            for dep, indices in group:
                cuts.setdefault((dep.target, dep.handler), set()).update(indices)
        unread = {}
        for (node, function), indices in cuts.items():
            if node.type == ops.OPTYPE.PARAMETER:
                self._cut_parameter(pruned, node, function, indices)
            if node.module not in self._paths:  # an operation between layers
                continue
            path = self._paths[node.module]
            layer = pruned.get_submodule(path)
            if isinstance(layer, WEIGHTED):
                if self._graph.is_out_channel_pruning_fn(function):
                    kept = getattr(layer, KEPT, range(outputs_of(layer)))
                    setattr(layer, KEPT, tuple(channel for i, channel in enumerate(kept) if i not in indices))
                if self._graph.is_in_channel_pruning_fn(function):
                    unread[path] = sorted(indices)
            function(layer, sorted(indices))
        return unread

    def _cut_parameter(self, pruned: nn.Module, node: Any, function: Callable, indices: set[int]) -> None:
        owner, _, key = self._graph._param_to_name[node.module].rpartition(".")
        holder = pruned.get_submodule(owner)
        function.__self__.pruning_dim = node.pruning_dim  # torch-pruning hands it over this way
        setattr(holder, key, function(getattr(holder, key), sorted(indices)))

    def _without(self, unread: Mapping[str, list[int]]) -> tuple[Tensor, ...]:
        """What the untouched network gives when layers do not read those inputs."""
        hooks = [
            self.module.get_submodule(path).register_forward_pre_hook(_zeroing(channels))
            for path, channels in unread.items()
        ]
        try:
            with torch.no_grad():
                return self._run(self.module)
        finally:
            for hook in hooks:
                hook.remove()

    def _run(self, module: nn.Module) -> tuple[Tensor, ...]:
        if self._names is not None:
            return model_inputs.outputs(module(**dict(zip(self._names, self._inputs, strict=True))))
        return model_inputs.outputs(module(*self._inputs))


def outputs_of(layer: nn.Module) -> int:
    """Output channels of a convolution or linear layer."""
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def _shaken(value: Tensor, noise: torch.Generator) -> Tensor:
    """A copy outside inference mode; floats get noise, for an all-zero example would make any check pass."""
    value = value.detach().clone()
    if not value.is_floating_point():
        return value
    return value + torch.randn(value.shape, generator=noise).to(value)


def _traceable(module: nn.Module) -> nn.Module:
    module = copy.deepcopy(module).eval()
    for parameter in module.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return module


def _zeroing(channels: list[int]) -> Callable:
    def hook(layer: nn.Module, args: tuple) -> tuple:
        value = args[0].clone()
        value.index_fill_(-1 if isinstance(layer, nn.Linear) else 1, torch.tensor(channels, device=value.device), 0)
        return (value, *args[1:])

    return hook


def _close(expected: Tensor, found: Tensor) -> bool:
    if expected.shape != found.shape:
        return False
    if not expected.is_floating_point():
        return bool(torch.equal(expected, found))
    # a NaN compares as different, so an output that is not finite is never taken as proof
    return bool((expected - found).abs().max() <= _TOLERANCE * expected.abs().max())

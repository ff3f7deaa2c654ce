"""Structured pruning by torch-pruning 1.6.1, the one file that knows it.

Its dependency graph tells which layers lose a channel together; which channels go, and whether the result may be
trusted, is decided here. Its own pruner is not used: it rounds widths down (30 % of 16 channels in multiples of 8
takes half of them, 50 % of 6 takes none), leaves a layer whole where its ranking would empty it, and keeps channel
groups in mutable default arguments that one model hands on to the next.

Whether a removal is right is *proved by running it*: a channel that is gone must be the same as a channel that no later
layer reads. Groups for which that fails are left alone: the residual stream of a ResNet with zero-padded shortcuts
(the padding shifts its channels), attention heads, and whatever else a trace cannot follow.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn
from torch_pruning import ops
from torch_pruning.pruner.importance import GroupMagnitudeImportance

from workbench.compression._checks import WEIGHTED
from workbench.errors import StepError
from workbench.models import inputs as model_inputs
from workbench.models.model import Model

_KEPT = "kept_channels"  # an attribute of a narrowed layer, which its model's edits therefore hold
_LEAST_KEPT = 0.1  # of each layer under global ranking: a layer cut to nothing cannot recover
_TOLERANCE = 1e-4  # of the largest output; float32 rounding through a hundred layers stays below


@dataclass(frozen=True)
class Width:
    """How wide the layers are to become; the fields are those of `Prune`."""

    ratio: float
    importance: str
    scope: str
    round_to: int

    def keep(self, channels: int, wanted: float) -> int:
        """Channels left of `channels` where `wanted` were asked for: the nearest multiple of `round_to`, at least one.

        A layer narrower than two multiples has no narrower multiple to go to and keeps the exact number.
        """
        step = self.round_to if channels >= 2 * self.round_to else 1
        return min(channels, max(1, int(wanted / step + 0.5)) * step)


@dataclass(frozen=True)
class _Trial:
    """A pruned copy, how many channels it lost, and why it may not be trusted; empty where it may."""

    pruned: nn.Module
    removed: int
    fault: str


def removable(model: Model) -> list[tuple[str, ...]]:
    """Groups of layers that can lose channels without changing what the rest computes; each loses the same ones.

    Raises
    ------
    StepError
        If the network cannot be traced.
    """
    with _tracing():
        surgery = _Surgery(model, Width(ratio=0.5, importance="l2", scope="layer", round_to=1))
        groups = surgery.prunable()
        return [groups[name] for name in surgery.safe(list(groups))]


def remove_channels(model: Model, width: Width, only: str | None = None) -> nn.Module:
    """A copy of the model's module with its least important channels physically removed.

    Parameters
    ----------
    model
        One whose module autograd can trace; frozen parameters are allowed and stay frozen.
    width
        How many channels to keep, and by what measure.
    only
        This layer alone is narrowed, with those that lose the same channels.

    Returns
    -------
    nn.Module
        In evaluation mode; the layers that produce the output keep their width. Each narrowed layer has an attribute
        ``kept_channels``: the numbers, in the untouched module, of the output channels it still has.

    Raises
    ------
    StepError
        If no layer can lose a channel, or none would at this ratio.

    Notes
    -----
    Dependency groups after Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023.
    """
    with _tracing():
        surgery = _Surgery(model, width)
        names = [name for name, losing in surgery.prunable().items() if only is None or only in losing]
        safe = surgery.safe(names)
        if not safe:
            subject = f"No layer of {model.name} can" if only is None else f"Layer {only} of {model.name} cannot"
            raise StepError(
                f"{subject} lose a channel: {_why(names, surgery.trial, only)} Zero single weights "
                f"instead: wb.Prune({width.ratio:g}, structured=False)."
            )
        trial = surgery.attempt(safe)
        if trial.fault:
            raise StepError(
                f"Layers of {model.name} can be pruned one by one but not together: {trial.fault}. Zero single weights "
                f"instead: wb.Prune({width.ratio:g}, structured=False)."
            )
        if not trial.removed:
            raise StepError(
                f"A ratio of {width.ratio:g} removes no channel of {only or model.name} in widths that are multiples "
                f"of {width.round_to}. Give a larger ratio or a smaller round_to."
            )
        for name, parameter in model.module.named_parameters():
            trial.pruned.get_parameter(name).requires_grad_(parameter.requires_grad)
        return trial.pruned.eval()


@contextmanager
def _tracing() -> Iterator[None]:
    """Follow grad_fn, which a caller's no_grad or inference_mode would leave empty, and keep the tracer quiet."""
    with torch.inference_mode(False), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its guesses about bare parameters are checked by running the result
        yield


def _why(names: Sequence[str], trial: _Trial | None, only: str | None) -> str:
    if not names:
        return f"{'each of its layers' if only is None else 'it'} feeds the output directly."
    return (
        f"the channels of {', '.join(names[:3])}{' and others' * (len(names) > 3)} cannot be followed ({trial.fault})."
    )


class _Surgery:
    """Attempts at pruning one model to one width; `trial` is the latest."""

    def __init__(self, model: Model, width: Width):
        noise = torch.Generator().manual_seed(0)
        self.module, self.width = model.module, width
        self._inputs = [_shaken(value, noise) for value in model.example.values()]
        self._names = list(model.example) if model.keywords else None
        self._tried: tuple[str, ...] = ()
        self.trial: _Trial | None = None

    def prunable(self) -> dict[str, tuple[str, ...]]:
        """Layers that head a group of channels which ends before the output, the largest group first.

        With each, all layers that lose output channels with it.
        """
        module = _traceable(self.module)
        try:
            graph = self._graph(module)
        except Exception as error:  # a stranger's forward and the tracer raise what they like
            raise StepError(f"The network cannot be traced for pruning: {type(error).__name__}: {error}") from error
        names = {layer: name for name, layer in module.named_modules()}
        found = []
        for group in _groups(graph):
            reaches_output = any(
                graph.is_out_channel_pruning_fn(dep.handler)
                and (dep.target.type == ops.OPTYPE.OUTPUT or not dep.target.outputs)
                for dep, _ in group
            )
            if not reaches_output:
                losing = [
                    names[dep.target.module]
                    for dep, _ in group
                    if isinstance(dep.target.module, WEIGHTED) and graph.is_out_channel_pruning_fn(dep.handler)
                ]
                found.append((len(group), names[group[0].dep.target.module], tuple(dict.fromkeys(losing))))
        return {name: losing for _, name, losing in sorted(found, key=lambda entry: -entry[0])}

    def safe(self, names: Sequence[str], front: int = 1) -> list[str]:
        """Those of `names` that can be pruned and leave the network right, found by splitting what fails.

        Large groups come first and are the likely culprits, so a front part is split off that grows as it goes.
        """
        if not names or not self.attempt(names).fault:
            return list(names)
        if len(names) == 1:
            return []
        front = min(front, len(names) - 1)
        return self.safe(names[:front]) + self.safe(names[front:], 2 * front)

    def attempt(self, names: Sequence[str]) -> _Trial:
        """Prune the groups headed by `names` in a copy, and compare it with one that ignores those channels."""
        if self.trial is None or self._tried != tuple(names):
            self._tried, self.trial = tuple(names), self._attempt(names)
        return self.trial

    def _attempt(self, names: Sequence[str]) -> _Trial:
        pruned, removed = _traceable(self.module), 0
        layers = {name: layer for name, layer in pruned.named_modules() if isinstance(layer, WEIGHTED)}
        name_of = {layer: name for name, layer in layers.items()}
        left = {name: list(range(_inputs_of(layer))) for name, layer in layers.items()}
        kept = {name: list(getattr(layer, _KEPT, range(_outputs_of(layer)))) for name, layer in layers.items()}
        unread: dict[str, list[int]] = {}
        try:
            graph = self._graph(pruned)
            groups = [group for group in _groups(graph) if name_of.get(group[0].dep.target.module) in names]
            for layer, function, indices in _choose(graph, groups, self.width):
                group = graph.get_pruning_group(layer, function, indices)
                for dep, dropped in group:
                    name, gone = name_of.get(dep.target.module), set(dropped)
                    if name is not None and graph.is_out_channel_pruning_fn(dep.handler):
                        kept[name] = [channel for i, channel in enumerate(kept[name]) if i not in gone]
                        setattr(dep.target.module, _KEPT, tuple(kept[name]))
                    if name is not None and graph.is_in_channel_pruning_fn(dep.handler):
                        unread.setdefault(name, []).extend(left[name][i] for i in gone)
                        left[name] = [channel for i, channel in enumerate(left[name]) if i not in gone]
                group.prune()
                removed += len(indices)
            with torch.no_grad():
                found = self._run(pruned)
        except (
            Exception
        ) as error:  # a shape fixed in a stranger's forward, an index the tracer got wrong: a failed trial
            return _Trial(pruned, removed, f"{type(error).__name__}: {error}")
        masked = copy.deepcopy(self.module).eval()
        for name, channels in unread.items():
            masked.get_submodule(name).register_forward_pre_hook(_zeroing(channels))
        with torch.no_grad():
            expected = self._run(masked)
        same = len(expected) == len(found) and all(map(_close, expected, found))
        return _Trial(pruned, removed, "" if same else "the rest would not compute what it computed before")

    def _graph(self, module: nn.Module) -> torch_pruning.DependencyGraph:
        return torch_pruning.DependencyGraph().build_dependency(
            module,
            example_inputs=self._inputs,
            forward_fn=lambda module, _: self._run(module),
            output_transform=lambda outputs: [t for t in outputs if t.grad_fn is not None],
        )

    def _run(self, module: nn.Module) -> tuple[Tensor, ...]:
        if self._names is not None:
            return model_inputs.outputs(module(**dict(zip(self._names, self._inputs, strict=True))))
        return model_inputs.outputs(module(*self._inputs))


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


def _groups(graph: torch_pruning.DependencyGraph) -> Iterator[Any]:
    return graph.get_all_groups(root_module_types=list(WEIGHTED))


def _inputs_of(layer: nn.Module) -> int:
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


def _outputs_of(layer: nn.Module) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def _choose(
    graph: torch_pruning.DependencyGraph, groups: Sequence[Any], width: Width
) -> list[tuple[nn.Module, Callable, list[int]]]:
    """Each group's heading layer, its pruning function, and the channels to remove; ranked before any is removed."""
    score = GroupMagnitudeImportance(p={"l1": 1, "l2": 2}[width.importance])
    ranked = []
    for group in groups:
        parts = max(_parts(graph, dep) for dep, _ in group)
        # channels of a grouped layer go in step, one from each part, so they are ranked by their mean
        ranked.append((group, parts, score(group).view(parts, -1).mean(dim=0)))
    if not ranked:
        return []
    everything = torch.cat([scores.repeat(parts) for _, parts, scores in ranked]).sort().values
    threshold = everything[min(len(everything) - 1, round(width.ratio * len(everything)))]
    chosen = []
    for group, parts, scores in ranked:
        size = len(scores)
        if width.scope == "global":
            wanted = max(int((scores >= threshold).sum()), _LEAST_KEPT * size)
        else:
            wanted = size * (1 - width.ratio)
        kept = width.keep(size * parts, wanted * parts) // parts
        order = torch.argsort(scores, stable=True)[: size - max(1, kept)].tolist()
        indices = sorted(part * size + i for part in range(parts) for i in order)
        if indices:
            chosen.append((group[0].dep.target.module, group[0].dep.handler, indices))
    return chosen


def _parts(graph: torch_pruning.DependencyGraph, dep: Any) -> int:
    """Into how many equal parts a layer splits the channels in question: groups of a convolution, of a group norm."""
    layer = dep.target.module
    if isinstance(layer, nn.modules.conv._ConvNd) and layer.groups == layer.out_channels:
        return 1
    pruner = graph.get_pruner_of_module(layer)
    outgoing = graph.is_out_channel_pruning_fn(dep.handler)
    return (pruner.get_out_channel_groups if outgoing else pruner.get_in_channel_groups)(layer)


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

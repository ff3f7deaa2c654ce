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

Call = Callable[[nn.Module, Sequence[Tensor]], Any]

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
    pruned: nn.Module
    removed: int
    faithful: bool


def remove_channels(model: Model, width: Width) -> nn.Module:
    """A copy of the model's module with its least important channels physically removed.

    Parameters
    ----------
    model
        One whose module autograd can trace; frozen parameters are allowed and stay frozen.
    width
        How many channels to keep, and by what measure.

    Returns
    -------
    nn.Module
        In evaluation mode; the layers that produce the output keep their width.

    Raises
    ------
    StepError
        If no layer can lose a channel, or none would at this ratio.

    Notes
    -----
    Dependency groups after Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023.
    """
    # tracing follows grad_fn, which a caller's no_grad or inference_mode would leave empty
    with torch.inference_mode(False), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its guesses about bare parameters are checked by running the result
        noise = torch.Generator().manual_seed(0)
        inputs = [_shaken(value, noise) for value in model.example.values()]
        module, call = model.module, _caller(model)
        names = _prunable(_traceable(module), call, inputs)
        safe = _safe(module, call, inputs, width, names)
        if not safe:
            raise StepError(
                f"No layer can lose a channel: of {len(names)} candidates every one is tied to the output or to an "
                "operation that cannot be followed. Prune single weights instead: wb.Prune(ratio, structured=False)."
            )
        trial = _try(module, call, inputs, width, safe)
        if not trial.removed:
            raise StepError(
                f"A ratio of {width.ratio:g} removes no channel in widths that are multiples of {width.round_to}. "
                "Give a larger ratio, or a smaller round_to."
            )
        if not trial.faithful:
            raise StepError(
                "Each layer can be pruned alone but not all together: the pruned network would not compute what the "
                "remaining channels computed. Prune single weights instead: wb.Prune(ratio, structured=False)."
            )
        for name, parameter in module.named_parameters():
            trial.pruned.get_parameter(name).requires_grad_(parameter.requires_grad)
        return trial.pruned.eval()


def _caller(model: Model) -> Call:
    names = list(model.example)
    if model.keywords:
        return lambda module, inputs: module(**dict(zip(names, inputs, strict=True)))
    return lambda module, inputs: module(*inputs)


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


def _graph(module: nn.Module, call: Call, inputs: Sequence[Tensor]) -> torch_pruning.DependencyGraph:
    return torch_pruning.DependencyGraph().build_dependency(
        module,
        example_inputs=inputs,
        forward_fn=call,
        output_transform=lambda output: [t for t in model_inputs.outputs(output) if t.grad_fn is not None],
    )


def _groups(graph: torch_pruning.DependencyGraph) -> Iterator[Any]:
    return graph.get_all_groups(root_module_types=list(WEIGHTED))


def _prunable(module: nn.Module, call: Call, inputs: Sequence[Tensor]) -> list[str]:
    """Names of the layers that head a group of channels which does not reach the output; the largest group first."""
    graph, names = _graph(module, call, inputs), {layer: name for name, layer in module.named_modules()}
    found = []
    for group in _groups(graph):
        reaches_output = any(
            graph.is_out_channel_pruning_fn(dep.handler)
            and (dep.target.type == ops.OPTYPE.OUTPUT or not dep.target.outputs)
            for dep, _ in group
        )
        if not reaches_output:
            found.append((len(group), names[group[0].dep.target.module]))
    return [name for _, name in sorted(found, key=lambda pair: -pair[0])]


def _safe(module: nn.Module, call: Call, inputs: Sequence[Tensor], width: Width, names: list[str]) -> list[str]:
    """Those of `names` that can be pruned and leave the network right, found by splitting what fails.

    Large groups come first and are the likely culprits, so a small front part is split off.
    """
    if not names or _try(module, call, inputs, width, names).faithful:
        return names
    if len(names) == 1:
        return []
    cut = max(1, len(names) // 8)
    return [name for part in (names[:cut], names[cut:]) for name in _safe(module, call, inputs, width, part)]


def _try(module: nn.Module, call: Call, inputs: Sequence[Tensor], width: Width, names: Sequence[str]) -> _Trial:
    """Prune the groups headed by `names` in a copy, and compare it with one whose later layers skip those channels."""
    pruned = _traceable(module)
    graph, layer_names = _graph(pruned, call, inputs), {layer: name for name, layer in pruned.named_modules()}
    groups = [group for group in _groups(graph) if layer_names[group[0].dep.target.module] in names]
    unread: dict[str, list[int]] = {}
    left = {name: list(range(_inputs_of(layer))) for layer, name in layer_names.items() if isinstance(layer, WEIGHTED)}
    removed = 0
    for layer, function, indices in _choose(graph, groups, width):
        group = graph.get_pruning_group(layer, function, indices)
        for dep, dropped in group:
            target = dep.target.module
            if isinstance(target, WEIGHTED) and graph.is_in_channel_pruning_fn(dep.handler):
                name = layer_names[target]
                gone = set(dropped)
                unread.setdefault(name, []).extend(left[name][i] for i in gone)
                left[name] = [c for i, c in enumerate(left[name]) if i not in gone]
        group.prune()
        removed += len(indices)
    return _Trial(pruned, removed, _same(module, pruned, unread, call, inputs))


def _inputs_of(layer: nn.Module) -> int:
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


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


def _same(
    module: nn.Module, pruned: nn.Module, unread: dict[str, list[int]], call: Call, inputs: Sequence[Tensor]
) -> bool:
    """Whether `pruned` computes what `module` does when its layers read the `unread` input channels as zero."""
    masked = copy.deepcopy(module).eval()
    for name, channels in unread.items():
        masked.get_submodule(name).register_forward_pre_hook(_zeroing(channels))
    with torch.no_grad():
        expected = model_inputs.outputs(call(masked, inputs))
        try:
            found = model_inputs.outputs(call(pruned, inputs))
        except (RuntimeError, ValueError, TypeError, IndexError):  # a fixed shape in forward that no longer fits
            return False
    return len(expected) == len(found) and all(_close(e, f) for e, f in zip(expected, found, strict=True))


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

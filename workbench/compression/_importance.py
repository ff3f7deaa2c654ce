"""How much a channel or a weight matters, by magnitude, by what the loss loses, or by chance."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch_pruning.pruner.importance import (
    BNScaleImportance,
    GroupMagnitudeImportance,
    GroupTaylorImportance,
    LAMPImportance,
    RandomImportance,
)

from workbench.compression import _calibrated, _losses
from workbench.compression._checks import WEIGHTED
from workbench.compression._surgery import Surgery
from workbench.data.task import Task
from workbench.jobs import SILENT, Progress
from workbench.models.model import Model

IMPORTANCE = ("l2", "l1", "random", "bn", "lamp", "fpgm", "taylor")
NO_SCALE = "no batch norm follows it"
UNFOLLOWED = "its channels cannot be followed"

_CHANNELS: Mapping[str, Callable[[], Callable[[Any], Tensor | None]]] = {
    "l1": lambda: GroupMagnitudeImportance(p=1),
    "l2": lambda: GroupMagnitudeImportance(p=2),
    "random": RandomImportance,
    "bn": BNScaleImportance,
    "lamp": LAMPImportance,
    "fpgm": lambda: _geometric_median,
    "taylor": GroupTaylorImportance,
}


def of_channels(
    surgery: Surgery, model: Model, task: Task, importance: str, seed: int, progress: Progress = SILENT
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A score per channel of each group of a network; for the others, why there is none.

    Parameters
    ----------
    surgery
        Of `model`.
    importance
        One of `IMPORTANCE`. ``l1``, ``l2``, ``fpgm``, ``bn`` and ``taylor`` are in units of the group's mean.
    seed
        Of ``random``.

    Returns
    -------
    dict
        ``(channels,)`` float32 by group. Channels that go in step, of a grouped convolution, have the mean of theirs
        and are counted once.
    dict
        Words by group: no batch norm for ``bn``, or channels that the trace got wrong.

    Notes
    -----
    By torch-pruning: l1 and l2 (Li et al., ICLR 2017), bn (Liu et al., "Network Slimming", ICCV 2017), lamp (Lee et
    al., ICLR 2021) and taylor (Molchanov et al., CVPR 2019). Its fpgm takes squares of the weights before it takes
    distances, so that a filter and its opposite count as one; see `_geometric_median`.
    """
    if importance == "taylor":
        slopes = gradients(model, task, progress)
        for name, parameter in surgery.module.named_parameters(remove_duplicate=False):
            parameter.grad = slopes[name] if parameter.is_floating_point() else None
    measure, scores, unscored = _CHANNELS[importance](), {}, {}
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        for name, group in surgery.groups.items():
            try:
                found = measure(group.traced)
            except (IndexError, RuntimeError):  # an index past the end of a layer: the trace took a wrong turn
                unscored[name] = UNFOLLOWED
                continue
            if found is None:
                unscored[name] = NO_SCALE
            else:
                # a group that is zero throughout has no mean to be measured by
                scores[name] = torch.nan_to_num(found).view(group.parts, -1).mean(dim=0).cpu()
    for parameter in surgery.module.parameters():
        parameter.grad = None
    return scores, unscored


def _geometric_median(group: Any) -> Tensor:
    """Sum of a filter's Euclidean distances to the others of its layer, the mean over layers that lose it; mean 1.

    The least are near the geometric median, so that the others stand in for them. He et al., "Filter Pruning via
    Geometric Median", CVPR 2019, equation 4.
    """
    scores = torch.zeros(len(group[0].idxs))
    for item in group.items:
        layer = item.dep.target.module
        if isinstance(layer, WEIGHTED) and group._DG.is_out_channel_pruning_fn(item.dep.handler):
            filters = layer.weight.detach().transpose(0, int(getattr(layer, "transposed", False)))[item.idxs].flatten(1)
            distances = torch.cdist(filters, filters).sum(dim=1)
            scores.index_add_(0, torch.tensor(item.root_idxs), torch.nan_to_num(distances / distances.mean()))
    return scores / scores.mean()


def of_weights(
    weights: Mapping[str, nn.Parameter], importance: str, seed: int, slopes: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """A score per single weight, of each layer's shape; to be summed over what goes together.

    Parameters
    ----------
    weights
        By layer.
    importance
        ``l1`` (the magnitude), ``l2`` and ``lamp`` (its square), ``random``, or ``taylor``: the magnitude of weight
        times gradient.
    seed
        Of ``random``.
    slopes
        Gradients by layer, for ``taylor``.
    """
    noise = torch.Generator().manual_seed(seed)
    scores = {}
    for layer, parameter in weights.items():
        weight = parameter.detach()
        if importance == "random":
            scores[layer] = torch.rand(weight.shape, generator=noise).to(weight.device)
        elif importance == "taylor":
            scores[layer] = (weight * slopes[layer]).abs()
        else:
            scores[layer] = weight.abs() if importance == "l1" else weight.square()
    return scores


def layer_adaptive(scores: Tensor) -> Tensor:
    """Squared magnitudes, each over the sum of those not smaller: LAMP scores, which compare across layers.

    Lee et al., "Layer-adaptive Sparsity for the Magnitude-based Pruning", ICLR 2021, equation 2.
    """
    ascending, order = scores.flatten().sort(stable=True)
    above = ascending.flip(0).cumsum(0).flip(0)
    adapted = torch.empty_like(ascending)
    adapted[order] = torch.nan_to_num(ascending / above)
    return adapted.view_as(scores)


def gradients(model: Model, task: Task, progress: Progress = SILENT) -> dict[str, Tensor]:
    """The mean gradient of a classifier's cross-entropy over the task's calibration split, by parameter name.

    Frozen parameters have one too; integers, and what the loss does not depend on, have zeros.

    Raises
    ------
    DataError
        If the task has no calibration samples.
    StepError
        If the outputs are not logits for the task's classes.
    """
    samples = _calibrated.samples(model, task)
    with torch.inference_mode(False), torch.enable_grad():
        probe = replace(model, module=copy.deepcopy(model.module), graph=None)
        named = dict(probe.module.named_parameters(remove_duplicate=False))
        wanted = [p.requires_grad_() for p in probe.module.parameters() if p.is_floating_point()]
        sums = [torch.zeros_like(p) for p in wanted]
        loss, done, device = None, 0, wanted[0].device
        for inputs, labels in samples.chunks("gradients", progress):
            here = torch.arange(done, done + len(labels))
            batch = _losses.Batch(
                tuple(torch.from_numpy(x).to(device) for x in inputs), torch.from_numpy(labels).to(device), here
            )
            output = probe.run_module(*batch.inputs)
            if loss is None:
                loss = _losses.cross_entropy(_losses.are_probabilities(_losses.logits("Prune", output, batch.labels)))
            found = torch.autograd.grad(loss(output, batch), wanted, allow_unused=True)
            for total, slope in zip(sums, found, strict=True):
                if slope is not None:
                    total.add_(slope, alpha=len(labels) / len(samples))
            done += len(labels)
        by_parameter = dict(zip(map(id, wanted), sums, strict=True))
        return {name: by_parameter.get(id(p), torch.zeros_like(p)) for name, p in named.items()}

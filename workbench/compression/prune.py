"""`Prune`: take away what matters least, whole channels or single weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from workbench.compression import _checks, _torch_pruning
from workbench.compression._base import NO_CHECKPOINT, Checkpoint, Step
from workbench.data.task import Task
from workbench.jobs import SILENT, Progress
from workbench.models import structure
from workbench.models.model import Model

_IMPORTANCE = ("l1", "l2")
_SCOPES = ("layer", "global")


@dataclass(frozen=True)
class Prune(Step):
    """Remove the least important channels, so that the network becomes smaller and faster; or zero single weights.

    Parameters
    ----------
    ratio
        Structured: the share of its output channels that each prunable layer loses. Layers joined by an addition lose
        the same channels, as one. The layers that produce the output keep their width, and so do those that cannot be
        narrowed without changing what the rest computes: the residual stream of a ResNet with zero-padded shortcuts,
        attention heads. A convolution between two narrowed layers loses ``ratio`` of its inputs as well, so parameters
        and MACs fall by more than the ratio.
        Unstructured: the share of all convolution and linear weights, biases apart, that becomes zero.
    structured
        True removes channels. False zeroes the weights of smallest magnitude: it saves bytes once the file is
        compressed, and no time on any engine here.
    importance
        Of a channel: its norm over the layers it runs through, ``l1`` or ``l2``. Single weights go by magnitude, to
        which both norms come down.
    scope
        ``layer``: every layer gives up the same share. ``global``: the least important of the whole network go first,
        so that layers lose unlike shares; each keeps at least a tenth of its channels.
    round_to
        Widths become the nearest multiple of this, at least one and ties to the wider; a layer narrower than two
        multiples gets the exact width. The default is measured on int8 ResNet-20, batch 1, 2 threads, ONNX Runtime:
        0.35 ms unpruned; pruned by 30 % it took 0.47 ms without rounding, 0.37 in multiples of 4, 0.36 of 8, 0.41 of
        16; by 60 %, 0.41 ms without rounding and 0.32 in multiples of 8. OpenVINO was indifferent (0.33 to 0.34 ms).
        Unstructured pruning has no use for it.

    Raises
    ------
    StepError
        If a setting is out of range.

    Notes
    -----
    Channels: Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017, over the dependency groups of Fang et al.,
    CVPR 2023. Weights: Han et al., "Learning both Weights and Connections", NeurIPS 2015.
    """

    family: ClassVar[str] = "pruned"

    ratio: float = field(metadata={"low": 0.0, "high": 1.0})
    structured: bool = True
    importance: str = field(default="l2", metadata={"choices": _IMPORTANCE})
    scope: str = field(default="layer", metadata={"choices": _SCOPES})
    round_to: int = 8

    def __post_init__(self) -> None:
        _checks.number("Prune", "ratio", self.ratio, 0, 1)
        _checks.flag("Prune", "structured", self.structured)
        _checks.choice("Prune", "importance", self.importance, _IMPORTANCE)
        _checks.choice("Prune", "scope", self.scope, _SCOPES)
        _checks.whole("Prune", "round_to", self.round_to)

    @property
    def label(self) -> str:
        """``Prune 50 %``, ``Prune 50 % of weights``, and the settings that are not the default."""
        words = [f"Prune {100 * self.ratio:g} %" + ("" if self.structured else " of weights")]
        if self.scope != "layer":
            words.append(self.scope)
        if self.structured and self.importance != "l2":
            words.append(self.importance.upper())
        if self.structured and self.round_to != 8:
            words.append(f"multiples of {self.round_to}")
        return ", ".join(words)

    def check(self, model: Model) -> None:
        """Refuse a model without a float32 torch module that has convolutions or linear layers."""
        _checks.trainable("Prune", model, f"wb.Prune({self.ratio:g})")
        _checks.has_weighted_layers("Prune", model)

    def apply(
        self,
        model: Model,
        task: Task,
        *,
        seed: int = 0,
        progress: Progress = SILENT,
        checkpoint: Checkpoint = NO_CHECKPOINT,
    ) -> Model:
        """The pruned model; raises `StepError` where nothing can be removed without changing what the rest computes."""
        self.check(model)
        progress(0.0, "ranking")
        if self.structured:
            width = _torch_pruning.Width(self.ratio, self.importance, self.scope, self.round_to)
            module = _torch_pruning.remove_channels(model, width)
        else:
            module = _without_weights(model.module, self.ratio, self.scope)
        edit = structure.difference(model.module, module)
        progress(1.0)
        return model.changed("pruned", module=module, edits=(*model.edits, edit))


def _without_weights(module: nn.Module, ratio: float, scope: str) -> nn.Module:
    """A copy whose smallest weights are exactly zero: ``round(ratio × count)`` of each layer, or of all together."""
    with torch.inference_mode(False), torch.no_grad():
        module = copy.deepcopy(module)
        weights = list(dict.fromkeys(layer.weight for layer in module.modules() if isinstance(layer, _checks.WEIGHTED)))
        for together in [weights] if scope == "global" else [[weight] for weight in weights]:
            magnitudes = torch.cat([weight.detach().abs().flatten() for weight in together])
            dropped = torch.zeros_like(magnitudes, dtype=torch.bool)
            # a stable order makes the choice among equals the same everywhere
            dropped[magnitudes.argsort(stable=True)[: round(ratio * len(magnitudes))]] = True
            for weight, mask in zip(together, dropped.split([w.numel() for w in together]), strict=True):
                weight.masked_fill_(mask.view_as(weight), 0)
    return module.eval()

"""`LowRank`: a layer's weight as the product of two smaller ones, where that costs less."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import pandas as pd
import torch
from torch import nn

from workbench.compression import _checks, _factors, _training, _waist, one_layer
from workbench.compression._base import NO_CHECKPOINT, Checkpoint, PerLayer, Step
from workbench.compression._run import device_of
from workbench.data.task import Task
from workbench.errors import StepError
from workbench.jobs import SILENT, Progress
from workbench.models import parts, structure
from workbench.models.model import Model
from workbench.models.parts.low_rank import SPLITS
from workbench.models.record import Record

_WIDTHS = (8, 16)  # what kernels compute at a time: ranks rounded up to these may cost nothing


@dataclass(frozen=True)
class LowRank(Step):
    """Replace layers by two narrower ones whose product is the nearest weight of a lower rank.

    A linear layer becomes two linear layers, a convolution two convolutions; both are plain layers that later steps
    prune, fine-tune and quantise. A layer is replaced only where that saves multiply-accumulates; the others, and those
    that cannot be factorised (grouped, transposed, or never called), are listed in the record with the reason.

    Parameters
    ----------
    energy
        The rank is the smallest that keeps this share of the sum of squared singular values.
    ratio
        The rank as a share of the full one instead; 0 goes by `energy`.
    layers
        The rank by layer name instead; only these layers are then replaced.
    split
        Of convolutions. ``spatial``: k × 1 over the rows to as many channels as the rank, then 1 × k over the columns.
        ``channel``: the old kernel to as many channels as the rank, then 1 × 1; kernels without two sides (1 × 1, one-
        or three-dimensional) always go this way. Spatial is the default because it keeps more for less: of ResNet-20's
        92.45 % on the first 2,000 test images of CIFAR-10, without any training, 90.30 % at 0.95 energy and 0.87 of the
        multiply-accumulates (channel: 84.55 % at 0.88), 81.55 % at 0.9 energy and 0.69 (channel: 71.90 % at 0.76).
    measured
        Time each layer alone on ONNX Runtime, batch 1, against its replacement, and replace it only where that is
        really faster (95 % interval of the ratio). The rank is then the least one tried: the next multiples of 8 and 16
        that save multiply-accumulates are timed with it, and of those that cannot be told from the fastest the largest
        is taken. A rank given by `layers` is kept. The choice is this machine's and may differ elsewhere.

    Raises
    ------
    StepError
        If a setting is out of range.

    Notes
    -----
    Linear layers: Eckart & Young 1936. Convolutions: Zhang et al., TPAMI 2015 (channel), Jaderberg et al., BMVC 2014
    (spatial), both on the weights, without data. Follow it with `Finetune` where accuracy falls.
    """

    family: ClassVar[str] = "factorised"

    energy: float = field(default=0.9, metadata={"low": 0.0, "high": 1.0})
    ratio: float = field(default=0.0, metadata={"low": 0.0, "high": 1.0})
    split: str = field(default="spatial", metadata={"choices": SPLITS})
    measured: bool = False
    layers: PerLayer = field(default=PerLayer(), metadata={"each": "rank"})

    def __post_init__(self) -> None:
        _checks.number("LowRank", "energy", self.energy, 0, 1)
        _checks.number("LowRank", "ratio", self.ratio, 0, 1, low_allowed=True)
        _checks.choice("LowRank", "split", self.split, SPLITS)
        _checks.flag("LowRank", "measured", self.measured)
        object.__setattr__(self, "layers", PerLayer(self.layers))
        for layer, rank in self.layers.items():
            _checks.whole("LowRank", f"rank of {layer}", rank)
        if self.layers and self.ratio:
            raise StepError(
                f"LowRank: ratio {self.ratio:g} and ranks by layer both say how narrow {', '.join(self.layers)} become"
                "; give one of them."
            )

    @property
    def label(self) -> str:
        """``Low rank, 90 % energy``, and the settings that are not the default."""
        words = [f"Low rank, {100 * self.energy:g} % energy"]
        if self.ratio:
            words = [f"Low rank, {100 * self.ratio:g} % of full rank"]
        if self.layers:
            words = [f"Low rank, {len(self.layers)} layer{'s' if len(self.layers) > 1 else ''}"]
        if self.split != "spatial":
            words.append(self.split)
        if self.measured:
            words.append("measured")
        return ", ".join(words)

    def check(self, model: Model) -> None:
        """Refuse a model without float32 layers that can be factorised, or whose weights must keep zeros or values."""
        _checks.trainable("LowRank", model, "wb.LowRank()")
        _checks.has_weighted_layers("LowRank", model)
        _refuse_what_would_be_lost(model)
        fit = [name for name, why in self._reasons(model).items() if not why]
        _checks.layers("LowRank", self.layers, fit, "layers it can factorise")
        for name, rank in self.layers.items():
            layer = model.module.get_submodule(name)
            full = min(_factors.matrix(layer, _factors.split_of(layer, self.split)).shape)
            if rank > full:
                raise StepError(
                    f"LowRank: a rank of {rank} for {name} is above its full rank, {full}; give at most that."
                )

    def preview(self, model: Model) -> Model:
        """What `apply` would give with nothing timed, so that a later step finds the layers it is to change."""
        return self._replaced(model, [choice for choice in self._choices(model, SILENT) if not choice.reason])

    def apply(
        self,
        model: Model,
        task: Task,
        *,
        seed: int = 0,
        progress: Progress = SILENT,
        checkpoint: Checkpoint = NO_CHECKPOINT,
    ) -> Model:
        """The factorised model, with a record of each layer: its rank, the share of energy kept, its costs, the reason.

        Raises
        ------
        StepError
            If no layer would gain; the ranks from which on each would are named.
        """
        self.check(model)
        with _training.settled(seed, device_of(model)):  # a decomposition's last bits go with the number of threads
            choices = self._choices(model, progress.part(0.0, 0.2 if self.measured else 0.9))
        if self.measured:
            choices = self._timed(model, choices, progress.part(0.2, 0.95))
        chosen = [choice for choice in choices if not choice.reason]
        if not chosen:
            raise StepError(self._no_gain(model, choices))
        record = Record.of(self.label, "ranks, by layer", [choice.row(self.measured) for choice in choices])
        result = self._replaced(model, chosen)
        progress(1.0)
        return replace(result, records=(*model.records, record))

    def _reasons(self, model: Model) -> dict[str, str]:
        """Why each convolution and linear layer cannot be factorised, by name; empty for those that can."""
        called = set(one_layer.weighted(model))
        layers = {n: m for n, m in model.module.named_modules() if isinstance(m, _checks.WEIGHTED)}
        uses = Counter(id(layer.weight) for layer in layers.values())
        reasons = {}
        for name, layer in layers.items():
            reasons[name] = _factors.unfit(layer)
            if uses[id(layer.weight)] > 1:
                reasons[name] = "its weight is another layer's too"
            if name not in called:
                reasons[name] = "its weight is used without a call to it"
        return reasons

    def _choices(self, model: Model, progress: Progress) -> list[_factors.Choice]:
        reasons = self._reasons(model)
        rows = model.layers.drop_duplicates("layer").set_index("layer")
        macs = model.layers.groupby("layer")["macs"].sum()
        choices = []
        for done, (name, why) in enumerate(reasons.items()):
            progress(done / len(reasons), name)
            if not why and self.layers and name not in self.layers:
                why = "not among the layers given"
            if why:
                choices.append(_factors.Choice(name, why, int(macs.get(name, 0))))
            else:
                choices.append(self._choice(name, model.module.get_submodule(name), rows.loc[name], int(macs[name])))
        return choices

    def _choice(self, name: str, layer: nn.Module, row: pd.Series, macs: int) -> _factors.Choice:
        split = _factors.split_of(layer, self.split)
        found = _factors.decompose(layer, split)
        rank = max(1, round(self.ratio * found.full_rank)) if self.ratio else found.rank_of(self.energy)
        rank = self.layers.get(name, rank)
        wider = row["input_shape"][-1] / row["output_shape"][-1]
        each = _factors.macs_of_rank_one(layer, split, macs, wider)
        choice = _factors.Choice(name, "", macs, found, rank, each, tuple(row["input_shape"]))
        most = choice.largest_rank
        if rank <= most:
            return choice
        return replace(choice, reason=f"rank {rank} saves no multiply-accumulates; at most {most} would")

    def _timed(self, model: Model, choices: Sequence[_factors.Choice], progress: Progress) -> list[_factors.Choice]:
        timed = []
        for done, choice in enumerate(choices):
            if choice.reason:
                timed.append(choice)
                continue
            part = progress.part(done / len(choices), (done + 1) / len(choices), f"timing {choice.layer}")
            # a rank given by hand is kept
            widths = () if self.layers else _WIDTHS
            timed.append(_waist.fastest(model.module.get_submodule(choice.layer), choice, widths, part))
        return timed

    def _replaced(self, model: Model, chosen: Sequence[_factors.Choice]) -> Model:
        with torch.inference_mode(False):
            module = copy.deepcopy(model.module)
            for choice in chosen:
                layer = module.get_submodule(choice.layer)
                kind, arguments = _factors.part(layer, choice.rank, choice.found.split)
                module = parts.put(module, choice.layer, kind, **arguments)
                _factors.fill(module.get_submodule(choice.layer), layer, choice.rank, choice.found)
            _do_without_fused_layers(module)
        edit = structure.difference(model.module, module)
        return model.changed(self.family, module=module.eval(), edits=(*model.edits, edit))

    def _no_gain(self, model: Model, choices: Sequence[_factors.Choice]) -> str:
        candidates = [choice for choice in choices if choice.found is not None] or choices
        found = "; ".join(f"{choice.layer}: {choice.reason}" for choice in candidates[:3])
        more = f"; and {len(candidates) - 3} more" if len(candidates) > 3 else ""
        return (
            f"{self.label}: no layer of {model.name} would gain ({found}{more}). Give a smaller energy, ratio or rank, "
            "or leave the step out."
        )


def _refuse_what_would_be_lost(model: Model) -> None:
    """A product of two factors is dense: refuse weights whose zeros or shared values an earlier step made."""
    if "clustered" in model.changes:
        raise StepError(
            f"LowRank would undo the shared values of {model.name}: a product of factors has values of its own. Put it "
            "before wb.Cluster: [wb.LowRank(), wb.Cluster(…)]."
        )
    layers = [layer for layer in model.module.modules() if isinstance(layer, _checks.WEIGHTED)]
    if "pruned" in model.changes and any(0 < int((layer.weight == 0).sum()) < layer.weight.numel() for layer in layers):
        raise StepError(
            f"LowRank: single weights of {model.name} were pruned, and those that are zero would come back, since a "
            "product of factors is dense. Put it before wb.Prune: [wb.LowRank(), wb.Prune(…, granularity='weight')]."
        )


def _do_without_fused_layers(module: nn.Module) -> None:
    """Keep torch's fused encoder layers from reading the weights of linear layers that are no more.

    In evaluation mode they take ``linear1.weight`` and call nothing. Both settings are the ones torch itself leaves the
    fused path by; the module computes the same without it.
    """
    for layer in module.modules():
        if isinstance(layer, nn.TransformerEncoderLayer):
            whole = isinstance(layer.linear1, nn.Linear) and isinstance(layer.linear2, nn.Linear)
            layer.activation_relu_or_gelu = layer.activation_relu_or_gelu if whole else 0
    for encoder in module.modules():
        if isinstance(encoder, nn.TransformerEncoder):
            fused = all(getattr(layer, "activation_relu_or_gelu", 1) for layer in encoder.layers)
            encoder.use_nested_tensor = encoder.use_nested_tensor and fused

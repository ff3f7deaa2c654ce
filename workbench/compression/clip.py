"""`Clip`: weights cut off at a bound, so that a grid for the others can be finer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from workbench.compression import _checks, _grids, _simulated, _training
from workbench.compression._base import NO_CHECKPOINT, Checkpoint, PerLayer, Step
from workbench.data.task import Task
from workbench.errors import StepError
from workbench.jobs import SILENT, Progress
from workbench.models import structure
from workbench.models.model import Model
from workbench.models.record import Record

_METHODS = ("percentile", "std", "absolute", "mse")
_SCOPES = ("layer", "channel")
_JUDGED_BITS = (8, 4)


@dataclass(frozen=True)
class Clip(Step):
    """Cut the weights of convolutions and linear layers off at a bound: ``clamp(w, -bound, bound)``.

    A symmetric grid spreads its values evenly up to the largest weight. A few weights far out therefore make it coarse
    for all others; clipping trades an error on the few for a finer grid. The records say, layer by layer, what was cut
    off and what that does to the error of rounding. Zeros stay zero, and equal weights equal. Biases are left alone.

    Parameters
    ----------
    method
        What the bound is. ``percentile``: that many of 100 magnitudes lie within it. ``std``: so many standard
        deviations about zero, ``value · √(mean w²)``. ``absolute``: the value itself. ``mse``: the one with the
        smallest mean squared error once the weights are rounded to `value` bits. Weights that are zero do not count:
        pruning is not to move the bound.
    value
        A percentile between 0 and 100, a number of standard deviations, a magnitude, or a number of bits from 2 to 16,
        as `method` has it.
    scope
        ``layer``: one bound per layer. ``channel``: one per output channel.
    layers
        The value by layer name, where it is to be another.

    Raises
    ------
    StepError
        If a setting is out of range.

    Notes
    -----
    Clipping by a percentile and by mean squared error: Nagel et al., "A White Paper on Neural Network Quantization",
    2021, section 3.1. Clipping of weights before they are rounded: Zhao et al., "Improving Neural Network Quantization
    without Retraining using Outlier Channel Splitting", ICML 2019, section 3.
    """

    family: ClassVar[str] = "clipped"

    method: str = field(default="percentile", metadata={"choices": _METHODS})
    value: float = 99.9
    scope: str = field(default="layer", metadata={"choices": _SCOPES})
    layers: PerLayer = field(default=PerLayer(), metadata={"each": "value"})

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", PerLayer(self.layers))
        _checks.choice("Clip", "method", self.method, _METHODS)
        _checks.choice("Clip", "scope", self.scope, _SCOPES)
        for name, value in {"value": self.value, **{f"layers[{k!r}]": v for k, v in self.layers.items()}}.items():
            if self.method == "mse":
                _bits(name, value)
            else:
                _checks.number("Clip", name, value, 0, 100 if self.method == "percentile" else math.inf)

    @property
    def label(self) -> str:
        """``Clip at the 99.9 percentile``, ``Clip at 3 standard deviations by channel``."""
        value = f"{self.value:g}"
        words = {
            "percentile": f"at the {value} percentile",
            "std": f"at {value} standard deviations",
            "absolute": f"at {value}",
            "mse": f"for {value} bits",
        }[self.method]
        scope = " by channel" if self.scope == "channel" else ""
        apart = f", {len(self.layers)} layer{'s' if len(self.layers) > 1 else ''} apart" if self.layers else ""
        return f"Clip {words}{scope}{apart}"

    def check(self, model: Model) -> None:
        """Refuse a model without a float32 torch module that has convolutions or linear layers, the named included."""
        _checks.trainable("Clip", model, self.to_python())
        _checks.has_weighted_layers("Clip", model)
        _checks.layers("Clip", self.layers, _weighted(model.module))

    def apply(
        self,
        model: Model,
        task: Task,
        *,
        seed: int = 0,
        progress: Progress = SILENT,
        checkpoint: Checkpoint = NO_CHECKPOINT,
    ) -> Model:
        """The clipped model; raises `StepError` where a bound leaves all weights as they are, or none."""
        self.check(model)
        with torch.inference_mode(False), torch.no_grad():
            module = _training.copied(model).module
            clipped, errors = self._clip(_weighted(module), progress)
        progress(1.0)
        records = (
            Record.of(self.label, "clipping, by layer", clipped),
            Record.of(self.label, "mean squared error of rounding the weights, by layer, grid and bits", errors),
        )
        return model.changed(
            "clipped",
            module=module,
            edits=(*model.edits, structure.difference(model.module, module)),
            records=(*model.records, *records),
        )

    def _clip(
        self, layers: Mapping[str, nn.Module], progress: Progress
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Clip each layer in place; a row for each, and the rows of its rounding errors."""
        clipped, errors, untouched = [], [], []
        for number, (name, layer) in enumerate(layers.items()):
            progress(number / len(layers), name)
            given, before = layer.weight.detach().clone(), _rounding_errors(layer, layer.weight)
            rows = _simulated.rows(layer, given)
            bound = self._bound(rows, self.layers.get(name, self.value))
            layer.weight.copy_(_simulated.back(layer, rows.clamp(-bound, bound)))
            beyond = int((layer.weight != given).sum())
            self._refuse_extremes(name, given, beyond)
            untouched += [] if beyond else [given]
            clipped.append(
                {
                    "layer": name,
                    "largest_weight": float(given.abs().max()),
                    "smallest_bound": float(bound.min()),
                    "largest_bound": float(bound.max()),
                    "clipped_share": beyond / given.numel(),
                    "weight_sqnr_db": _sqnr_db(given, layer.weight) if beyond else None,
                }
            )
            errors += [
                {"layer": name, "grid": grid, "bits": bits, "mse_before": before[grid, bits], "mse_after": mse}
                for (grid, bits), mse in _rounding_errors(layer, given).items()
            ]
        if len(untouched) == len(layers):
            raise StepError(f"Clip: no weight of any layer lies beyond its bound. {self._instead(untouched)}")
        return clipped, errors

    def _bound(self, rows: Tensor, value: float) -> Tensor:
        """``(channels, 1)``, or ``(1, 1)`` for a whole layer; at most the largest weight of those that share it."""
        rows = rows if self.scope == "channel" else rows.reshape(1, -1)
        largest = rows.abs().amax(1, keepdim=True)
        if self.method == "mse":
            # the grid of the smallest error ends at the bound; at its widest it ends at the largest weight
            ends = _grids.uniform(rows, int(value), clip="mse").abs().amax(1, keepdim=True)
            return torch.where(ends < largest * (1 - 1e-6), ends, largest)
        bounds = [_bound_of(row[row != 0].abs(), self.method, value) for row in rows]
        return torch.tensor(bounds, dtype=rows.dtype, device=rows.device)[:, None].minimum(largest)

    def _refuse_extremes(self, name: str, weight: Tensor, beyond: int) -> None:
        """Refuse a layer that would keep its signs alone, and a bound of its own that does nothing."""
        held = weight[weight != 0].abs()
        if beyond and beyond == len(held):
            above = (
                f"above {float(held.min()):.4g}, its smallest weight" if self.method == "absolute" else "much larger"
            )
            raise StepError(
                f"Clip: all {beyond} weights of {name} lie beyond its bound, so that only their signs would be left. "
                f"Give a value {above}, for all layers or for this one by layers={{{name!r}: …}}."
            )
        if name in self.layers and not beyond:
            raise StepError(f"Clip: no weight of {name} lies beyond its bound. {self._instead([weight])}")

    def _instead(self, weights: Sequence[Tensor]) -> str:
        """What to give where nothing is clipped of these weights."""
        if self.method == "mse":
            return "For so many bits the whole range is best: give fewer bits, or leave the weights as they are."
        if self.method == "percentile":
            return "Give a lower percentile."
        held = [magnitudes for w in weights if len(magnitudes := w[w != 0].abs())]
        units = [1.0 if self.method == "absolute" else _bound_of(magnitudes, "std", 1.0) for magnitudes in held]
        most = max((float(m.max()) / unit for m, unit in zip(held, units, strict=True)), default=0.0)
        return f"Give a value below {most:.4g}, where the largest weight lies."


def _weighted(module: nn.Module) -> dict[str, nn.Module]:
    """Convolutions and linear layers by name; of those that share a weight, the first."""
    found: dict[nn.Parameter, tuple[str, nn.Module]] = {}
    for name, layer in module.named_modules():
        if isinstance(layer, _checks.WEIGHTED):
            found.setdefault(layer.weight, (name, layer))
    return dict(found.values())


def _bits(name: str, value: Any) -> None:
    """Bits arrive as a float where a control or a recipe wrote them so."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    _simulated.check_bits(value, f"Clip's {name} by method 'mse'")


def _bound_of(magnitudes: Tensor, method: str, value: float) -> float:
    """The bound of weights that share one, from the magnitudes of those that are not zero."""
    if method == "absolute" or not len(magnitudes):
        return value
    if method == "std":
        return value * math.sqrt(float(magnitudes.double().square().mean()))
    # numpy's, because torch's takes no more than 16 million values
    return float(np.percentile(magnitudes.double().cpu().numpy(), value))


def _rounding_errors(layer: nn.Module, given: Tensor) -> dict[tuple[str, int], float]:
    """Mean squared difference of the layer's weight, rounded on a symmetric grid, from the given one."""
    errors = {}
    for grid in ("per channel", "per layer"):
        for bits in _JUDGED_BITS:
            rounded = _simulated.weight(layer, bits, per_channel=grid == "per channel")
            errors[grid, bits] = float((rounded - given).double().square().mean())
    return errors


def _sqnr_db(given: Tensor, clipped: Tensor) -> float:
    signal, noise = (float(values.double().square().sum()) for values in (given, given - clipped))
    return 10 * math.log10(signal / noise)

"""Adaptive rounding: each weight up or down, as the layer's output on real inputs is better, not to nearest."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from workbench.compression import _activations, _folding, _grids, _simulated, _training
from workbench.compression._calibrated import Samples
from workbench.compression._scheme import Scheme
from workbench.deployment import Eager
from workbench.jobs import SILENT, Progress
from workbench.models.model import Model

_ITERATIONS = 500
_BATCH = 512  # rows of inputs per iteration
_LEARNING_RATE = 5e-2
_STRETCH = (-0.1, 1.1)  # ends of the sigmoid, so that it reaches 0 and 1
_WARM_UP = 0.2  # share of the iterations without the regulariser
_SHARPNESS = (20.0, 2.0)  # exponent of the regulariser, from first to last
_REGULARISER = 60.0  # of its mean over the weights, against the layer's error when rounded to nearest
_ON_GRID = 1e-4  # of a step
_ROWS = (1024, 8192)  # sampled per layer, at least and at most
_VALUES = 2**24  # that these may hold


def adapted(model: Model, scheme: Scheme, samples: Samples, *, seed: int = 0, progress: Progress = SILENT) -> Model:
    """`model` with the weights of its layers on their symmetric grids, each rounded up or down.

    Layer after layer, the squared distance of its output from that of the float layer is made small, on what each is
    given in its own network: the rounded one's input has passed the layers rounded so far. A value that is on the grid
    already, such as zero or the largest, stays. Where the result is no better than rounding to nearest it is not used.

    Parameters
    ----------
    scheme
        Of a uniform symmetric grid without clipping.

    Notes
    -----
    After Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", ICML 2020, equations 21 to 25
    without the activation function of the last one. Transposed convolutions are rounded to nearest. On three layers of
    ResNet-20 at 3 and 4 bits, on inputs held out, a regulariser of 1 left 0.69 to 0.85 of the error of rounding to
    nearest, 20 left 0.23 to 0.51 and 60 as much; half the learning rate, or half the iterations, left more.
    """
    exact, rounded = _training.copied(model), _training.copied(model)
    with Eager().compile(exact) as right, Eager().compile(rounded) as engine:
        for number, name in enumerate(scheme.rounded):
            part = progress.part(number / len(scheme.rounded), (number + 1) / len(scheme.rounded), name)
            layer, bits = rounded.module.get_submodule(name), scheme.bits_of(name)
            weight = scheme.weight(layer, bits)
            if not getattr(layer, "transposed", False):
                wanted, given = (_Drawn(layer, samples, seed + number) for _ in range(2))
                reference = exact.module.get_submodule(name)
                _activations.up_to(right, reference, samples, wanted.outputs, progress=part.part(0.0, 0.2))
                _activations.up_to(engine, layer, samples, given.inputs, progress=part.part(0.2, 0.4))
                rows = _simulated.rows(layer, layer.weight.detach())
                scale = _grids.symmetric_scale(rows if scheme.per_channel else rows.reshape(1, -1), bits)
                groups = getattr(layer, "groups", 1)
                problem = _Problem(rows, scale, 2 ** (bits - 1) - 1, groups, given.rows(), wanted.rows())
                weight = _simulated.back(layer, problem.solve(seed + number, part.part(0.4, 1.0)))
            with torch.no_grad():
                layer.weight.copy_(weight)
    return _folding.changed(model, rounded.module)


class _Drawn:
    """Rows of a layer's inputs, or of its outputs, at places that are the same for the same seed."""

    def __init__(self, layer: nn.Module, samples: Samples, seed: int):
        self._layer = layer
        self._draw = torch.Generator().manual_seed(seed)
        wanted = min(max(_VALUES // layer.weight[0].numel(), _ROWS[0]), _ROWS[1])
        self._per_sample = -(-wanted // len(samples))
        self._found: list[Tensor] = []

    def rows(self) -> Tensor:
        """All that were drawn: ``(rows, values)``, no inference tensor."""
        return torch.cat(self._found).clone()

    def inputs(self, given: Tensor, output: Tensor) -> None:
        """Draw from the inputs: the patch that each output is computed from, in the order of the layer's weight."""
        chosen = self._chosen(output)
        if isinstance(self._layer, nn.Linear):
            self._found.append(given.flatten(0, -2)[chosen])
            return
        layer = self._layer
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        patches = functional.pad(given, layer._reversed_padding_repeated_twice, mode=mode)
        for axis, (size, stride, apart) in enumerate(
            zip(layer.kernel_size, layer.stride, layer.dilation, strict=True), start=2
        ):
            patches = patches.unfold(axis, apart * (size - 1) + 1, stride)[..., ::apart]
        sample, *place = torch.unravel_index(chosen, (len(output), *output.shape[2:]))
        self._found.append(patches[(sample, slice(None), *place)].flatten(1))

    def outputs(self, given: Tensor, output: Tensor) -> None:
        """Draw from the outputs, the layer's bias taken off."""
        by_place = output if isinstance(self._layer, nn.Linear) else output.movedim(1, -1)
        found = by_place.flatten(0, -2)[self._chosen(output)]
        self._found.append(found if self._layer.bias is None else found - self._layer.bias.detach())

    def _chosen(self, output: Tensor) -> Tensor:
        channels = output.shape[-1 if isinstance(self._layer, nn.Linear) else 1]
        places, wanted = output.numel() // channels, self._per_sample * len(output)
        if wanted >= places:
            return torch.arange(places)
        return torch.randint(places, (wanted,), generator=self._draw)


class _Problem:
    """Which of its two neighbours on the grid each weight of one layer becomes.

    Parameters
    ----------
    rows
        ``(outputs, values)``, the weight.
    scale, most
        Step of each row, and the last place of the grid.
    groups
        Of the convolution.
    given, wanted
        ``(rows, values of all groups)`` and ``(rows, outputs)``.
    """

    def __init__(self, rows: Tensor, scale: Tensor, most: int, groups: int, given: Tensor, wanted: Tensor):
        steps = rows / scale
        self._scale, self._most, self._groups = scale, most, groups
        self._given, self._wanted = given.unflatten(1, (groups, -1)), wanted.unflatten(1, (groups, -1))
        self._nearest, self._lower = steps.round(), steps.floor()
        self._free = (steps - self._nearest).abs() > _ON_GRID
        self._share = steps - self._lower

    def solve(self, seed: int, progress: Progress) -> Tensor:
        """The rounded rows; those of rounding to nearest where nothing better is found."""
        nearest = self._rounded(self._nearest)
        unit = self._error(nearest, slice(None))
        if not bool(self._free.any()) or float(unit) == 0:
            return nearest
        # the inverse of `_upwards`, so that it begins where the weights are
        start = torch.logit((self._share - _STRETCH[0]) / (_STRETCH[1] - _STRETCH[0]))
        with torch.inference_mode(False), torch.enable_grad():
            variable = start.clone().requires_grad_()
            self._descend(variable, unit, torch.Generator().manual_seed(seed), progress)
        found = self._rounded(self._lower + (_upwards(variable.detach()) >= 0.5))
        return found if self._error(found, slice(None)) < unit else nearest

    def _descend(self, variable: Tensor, unit: Tensor, draw: torch.Generator, progress: Progress) -> None:
        optimiser = torch.optim.Adam([variable], lr=_LEARNING_RATE)
        for iteration in range(_ITERATIONS):
            share = iteration / _ITERATIONS
            progress(share, "rounding")
            upwards = _upwards(variable)
            batch = torch.randint(len(self._given), (_BATCH,), generator=draw)
            loss = self._error(self._rounded(self._lower + upwards), batch) / unit
            if share >= _WARM_UP:
                along = (share - _WARM_UP) / (1 - _WARM_UP)
                sharpness = _SHARPNESS[0] + along * (_SHARPNESS[1] - _SHARPNESS[0])
                undecided = 1 - (2 * upwards - 1).abs().pow(sharpness)
                loss = loss + _REGULARISER * undecided[self._free].mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()

    def _rounded(self, places: Tensor) -> Tensor:
        kept = torch.where(self._free, places, self._nearest).clamp(-self._most, self._most)
        return kept * self._scale

    def _error(self, rows: Tensor, chosen: Tensor | slice) -> Tensor:
        """Mean squared distance of the outputs from those wanted, on some of the rows of inputs."""
        weight = rows.unflatten(0, (self._groups, -1))
        return (torch.einsum("rgd,god->rgo", self._given[chosen], weight) - self._wanted[chosen]).square().mean()


def _upwards(variable: Tensor) -> Tensor:
    """How far up a weight is rounded, 0 to 1: the rectified sigmoid of the paper's equation 23."""
    return (variable.sigmoid() * (_STRETCH[1] - _STRETCH[0]) + _STRETCH[0]).clamp(0, 1)

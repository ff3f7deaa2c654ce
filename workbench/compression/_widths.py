"""Which multiple of channels is fastest on this machine: the layers that cost most, timed at the widths in question."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import nn

from workbench import measure
from workbench.compression._channels import removable
from workbench.compression._ranking import Rule
from workbench.compression._surgery import outputs_of
from workbench.deployment import Engine, OnnxRuntime
from workbench.errors import StepError
from workbench.jobs import SILENT, Progress
from workbench.models.model import Model

MULTIPLES = (1, 4, 8, 16)
_TIMED_GROUPS = 3
_BLOCKS = 5  # of calls, taken in turns
_OPSET = 17


@dataclass(frozen=True)
class _Part:
    """A layer to be timed, the tensor it reads (without the batch), and whether it loses channels or reads fewer."""

    layer: nn.Module
    input_shape: tuple[int, ...]
    loses: bool


@dataclass(frozen=True)
class _Case:
    """A group to be timed: its layers in words, its channels, the ratio it is to lose, and what it is made of."""

    layers: str
    channels: int
    ratio: float
    parts: tuple[_Part, ...]
    macs: int

    def width(self, rule: Rule, multiple: int) -> int:
        return replace(rule, round_to=multiple).keep(self.channels, self.channels * (1 - self.ratio))


def fastest_multiple(model: Model, rule: Rule, *, progress: Progress = SILENT) -> tuple[int, list[dict[str, Any]]]:
    """The multiple whose widths take least time per channel that is kept.

    The three groups of layers with the most multiply-accumulates are run alone on ONNX Runtime in float32, one sample,
    at the width each multiple leads to, in turns.

    Returns
    -------
    int
        One of 1, 4, 8 and 16; of equally fast ones the largest.
    list of dict
        What was timed: layers, multiple, width, latency_ms, chosen.

    Raises
    ------
    StepError
        If no plain convolution or linear layer can lose a channel.
    """
    cases = _heaviest(model, rule)
    if not cases:
        raise StepError(
            f"Prune: {model.name} has no plain convolution or linear layer whose widths could be timed; give round_to."
        )
    asked = {(case, multiple): case.width(rule, multiple) for case in cases for multiple in MULTIPLES}
    wanted = list(dict.fromkeys((case, width) for (case, _), width in asked.items()))
    took = dict(zip(wanted, _timed(wanted, progress), strict=True))
    cost = {m: sum(took[c, asked[c, m]] for c in cases) / sum(asked[c, m] for c in cases) for m in MULTIPLES}
    best = min(MULTIPLES, key=lambda multiple: (cost[multiple], -multiple))
    rows = [
        {
            "layers": case.layers,
            "multiple": multiple,
            "width": width,
            "latency_ms": took[case, width],
            "chosen": multiple == best,
        }
        for (case, multiple), width in asked.items()
    ]
    return best, rows


def _heaviest(model: Model, rule: Rule) -> list[_Case]:
    """The groups with the most multiply-accumulates that are to lose channels, no two of the same shapes."""
    table = model.layers.drop_duplicates("layer").set_index("layer")
    cases: dict[str, _Case] = {}
    for group in removable(model):
        ratio = next((rule.layers[layer] for layer in group.losing if layer in rule.layers), rule.ratio)
        parts, macs = [], 0
        for name in dict.fromkeys((*group.losing, *group.reading)):
            layer = model.module.get_submodule(name)
            if name in table.index and _is_plain(layer) and None not in table.input_shape[name]:
                parts.append(_Part(layer, tuple(table.input_shape[name]), name in group.losing))
                macs += int(table.macs[name])
        if parts and ratio:
            likeness = f"{ratio} {[(str(part.layer), part.input_shape, part.loses) for part in parts]}"
            cases.setdefault(likeness, _Case(", ".join(group.losing), group.channels, ratio, tuple(parts), macs))
    return sorted(cases.values(), key=lambda case: -case.macs)[:_TIMED_GROUPS]


def _is_plain(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Linear):
        return True
    return layer.groups == 1 and not layer.transposed and layer.padding_mode == "zeros"


def _timed(cases: Sequence[tuple[_Case, int]], progress: Progress) -> list[float]:
    """Median milliseconds of one run of each case's layers at its width."""
    engines = [OnnxRuntime().compile(_network(case, width)) for case, width in cases]
    try:
        calls = [_call(engine) for engine in engines]
        return [latency.median_ms for latency in measure.latency(calls, blocks=_BLOCKS, progress=progress)]
    finally:
        for engine in engines:
            engine.close()


def _call(engine: Engine) -> Callable[[], Any]:
    noise = np.random.default_rng(0)
    inputs = [noise.standard_normal([n or 1 for n in spec.shape]).astype(np.float32) for spec in engine.inputs]
    return lambda: engine(*inputs)


def _network(case: _Case, width: int) -> Model:
    """An ONNX graph of the layers side by side, each with an input of its own, batch 1."""
    nodes, inputs, outputs, weights, example = [], [], [], [], {}
    noise = np.random.default_rng(0)
    for number, part in enumerate(case.parts):
        linear = isinstance(part.layer, nn.Linear)
        size, axis = list(part.input_shape), -1 if linear else 0
        if not part.loses:
            size[axis] = size[axis] * width // case.channels
        gives = width if part.loses else outputs_of(part.layer)
        shape = (size[axis], gives) if linear else (gives, size[axis], *part.layer.kernel_size)
        x, w, y = f"x{number}", f"w{number}", f"y{number}"
        weights.append(numpy_helper.from_array(noise.standard_normal(shape).astype(np.float32), w))
        nodes.append(_node(part.layer, x, w, y))
        inputs.append(helper.make_tensor_value_info(x, onnx.TensorProto.FLOAT, [1, *size]))
        outputs.append(helper.make_tensor_value_info(y, onnx.TensorProto.FLOAT, None))
        example[x] = torch.zeros(1, *size)
    graph = helper.make_graph(nodes, "widths", inputs, outputs, weights)
    opsets = [helper.make_opsetid("", _OPSET)]
    return Model("widths", example, graph=helper.make_model(graph, opset_imports=opsets, ir_version=8))


def _node(layer: nn.Module, x: str, w: str, y: str) -> onnx.NodeProto:
    if isinstance(layer, nn.Linear):
        return helper.make_node("MatMul", [x, w], [y])
    settings = {"strides": layer.stride, "dilations": layer.dilation}
    if layer.padding == "same":
        settings["auto_pad"] = "SAME_UPPER"
    elif layer.padding != "valid":
        settings["pads"] = layer.padding * 2
    return helper.make_node("Conv", [x, w], [y], **settings)

"""A network that rounds while it is trained as its int8 graph will: its parts, their ranges, and that graph."""

from __future__ import annotations

import copy

import onnx
import torch
from torch import nn

from workbench.compression import _onnx_graph, _training
from workbench.compression._calibrated import Samples
from workbench.compression._constraints import Constraint
from workbench.compression._qat_places import Places
from workbench.errors import DataError
from workbench.jobs import SILENT, Progress
from workbench.models import export, parts, structure
from workbench.models.model import Model
from workbench.models.parts.quantisation_aware import Aware, integer

_FOLLOWED = 0.5  # of the training: ranges move first, then the weights settle on fixed ones


class FollowRanges(Constraint):
    """Ranges of activations move with the batches during the first half of the training, and stay from then on."""

    def __init__(self, module: nn.Module):
        self._parts = [part for part in module.modules() if isinstance(part, Aware)]

    def before_update(self, share: float) -> None:
        for part in self._parts:
            part.following = share < _FOLLOWED


def aware(model: Model, where: Places, bits: int, samples: Samples, *, progress: Progress = SILENT) -> Model:
    """The same network, of precision ``simulated``, rounding at these places over the ranges seen on the samples.

    Parameters
    ----------
    bits
        Of the weights; activations have 8.

    Raises
    ------
    DataError
        If what is to be rounded is NaN or infinite on the samples.
    """
    module = _training.copied(model).module
    for path in [*where.sources, *(where.gives - where.sources.keys())]:
        weight_bits = bits if path in where.sources else 0
        takes = where.sources.get(path) == path
        parts.put(module, path, "quantisation_aware", weight_bits=weight_bits, takes=takes, gives=path in where.gives)
    edits = (*model.edits, structure.difference(model.module, module))
    result = model.changed("quantised", module=module, precision="simulated", edits=edits)
    _observe(result, samples, progress)
    return result


def unrounded(trained: Model, like: Model) -> Model:
    """The trained weights in the network that `aware` was given, which computes with them in float32."""
    result = _training.copied(like)
    keys = result.module.state_dict().keys()
    result.module.load_state_dict({k: v for k, v in trained.module.state_dict().items() if k in keys})
    return result


def to_graph(model: Model, where: Places, original: onnx.ModelProto) -> onnx.ModelProto:
    """What `aware` made and training changed, as a graph with Q/DQ nodes that keeps the layers of the float32 one."""
    module = copy.deepcopy(model.module).cpu()
    ranges = {path: part for path, part in module.named_modules() if isinstance(part, Aware)}
    new: dict[nn.Module, nn.Module] = {}
    for path, part in ranges.items():
        source = ranges.get(where.sources.get(path, ""))
        given = None if source is None else source.input_range if source is part else source.output_range
        new[part] = integer(part, given, rows=path in where.rows)
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            parent._modules[name] = new.get(child, child)
    graph = export.to_onnx(module.eval(), model.example, model.keywords, model.name)
    return _onnx_graph.tidied(graph, original)


def _observe(model: Model, samples: Samples, progress: Progress) -> None:
    found = {path: part for path, part in model.module.named_modules() if isinstance(part, Aware)}
    device = next(model.module.parameters()).device
    for part in found.values():
        part.observing = True
    with torch.inference_mode(False), torch.no_grad():
        for inputs, _ in samples.chunks("ranges", progress):
            model.run_module(*(torch.from_numpy(x).to(device) for x in inputs))
    for path, part in found.items():
        part.observing = False
        for end, kept in (("takes", part.input_range), ("gives", part.output_range)):
            if kept is not None and not bool(torch.isfinite(kept).all()):
                raise DataError(
                    f"What {path} {end} is NaN or infinite on calibration samples, so that no range can be taken. "
                    "Check that preprocessing and weights belong together."
                )

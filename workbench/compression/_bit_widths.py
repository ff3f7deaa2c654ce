"""Bits for each layer, chosen so that their mean over the weights keeps to a bound."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch

from workbench.compression import _simulated, _training
from workbench.compression._calibrated import Judge, samples
from workbench.compression._scheme import Scheme
from workbench.data.task import Task
from workbench.errors import StepError
from workbench.jobs import SILENT, Progress
from workbench.models.model import Model

_SAMPLES = 64


def chosen(
    model: Model, task: Task, scheme: Scheme, average_bits: float, *, step: str, progress: Progress = SILENT
) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """Widths by layer, found by lowering, a bit at a time, the layer that this costs least.

    What a width costs is the energy of the error it makes in the network's outputs on calibration samples, rounded in
    that layer alone; the step taken is that which adds least per bit saved of those still needed. Errors of several
    layers are taken to add up.

    Parameters
    ----------
    scheme
        Its `bits` is where each layer begins; those in its `layers` keep their width.
    average_bits
        Mean over all weights of the layers, at most.

    Returns
    -------
    (dict, list)
        Bits by layer, and a row each: layer, bits, weights, sqnr_db (of the outputs with that layer alone rounded).

    Raises
    ------
    StepError
        If the layers that keep their width leave no way to come so low.
    """
    counts = {layer: model.module.get_submodule(layer).weight.numel() for layer in scheme.names}
    bits = {layer: scheme.bits_of(layer) for layer in scheme.names}
    free = [layer for layer in scheme.names if layer not in scheme.layers]
    total = sum(counts.values())
    least = sum(counts[layer] * (_simulated.BITS[0] if layer in free else bits[layer]) for layer in bits) / total
    if least > average_bits:
        raise StepError(
            f"{step}: average_bits is {average_bits:g}, and with the bits given in layers the mean over the weights "
            f"cannot fall below {least:.2f}. Give more average_bits, or fewer bits in layers."
        )
    trial = _Trial(model, task, scheme)
    needed = sum(counts[layer] * bits[layer] for layer in bits) - math.floor(average_bits * total)
    saved = 0
    while saved < needed:
        progress(saved / needed, f"bits, {saved / needed:.0%}")
        lower = [layer for layer in free if bits[layer] > _simulated.BITS[0]]
        added = {k: trial.noise(k, bits[k] - 1) - trial.noise(k, bits[k]) for k in lower}
        # what a large layer saves beyond the need is worth nothing
        layer = min(lower, key=lambda k: added[k] / min(counts[k], needed - saved))
        bits[layer] -= 1
        saved += counts[layer]
    rows = [{"layer": k, "bits": bits[k], "weights": counts[k], "sqnr_db": trial.sqnr_db(k, bits[k])} for k in free]
    return bits, rows


class _Trial:
    """The network with one layer rounded at a time."""

    def __init__(self, model: Model, task: Task, scheme: Scheme):
        self._judge = Judge(model, samples(model, task, most=_SAMPLES), task.metric)
        self._copy, self._scheme = _training.copied(model), scheme
        self.sqnr_db = cache(self._sqnr_db)

    def noise(self, layer: str, bits: int) -> float:
        """Energy of the error in the outputs over that of the outputs."""
        return 10 ** (-self.sqnr_db(layer, bits) / 10)

    def _sqnr_db(self, layer: str, bits: int) -> float:
        part = self._copy.module.get_submodule(layer)
        with torch.no_grad():
            before = part.weight.clone()
            part.weight.copy_(self._scheme.weight(part, bits))
            found = self._judge.score(self._copy).sqnr_db
            part.weight.copy_(before)
        return found

"""The main job: LeNet-5 on handwritten digits, compressed several ways, compared on every engine at hand."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from workbench.compression import Finetune, Prune, Quantize, Step
from workbench.data import tasks
from workbench.deployment import Backend, Eager, OnnxRuntime, OpenVINO
from workbench.models import load
from workbench.study import Study

_HALF = (Prune(0.5), Finetune(epochs=2))
_MOST = (Prune(0.75), Finetune(epochs=4))
_INT8 = (Quantize("int8"),)


def study(store: str | Path | None = None) -> Study:
    """LeNet-5 with its embedded weights, on scikit-learn's digits; nothing is fetched."""
    return Study(load("lenet5"), tasks.digits(), store=store)


def recipes() -> Iterable[tuple[tuple[Step, ...], Backend]]:
    """What the demo runs, baselines first; an engine that is not usable here is left out."""
    engines = [b for b in (OnnxRuntime(), OpenVINO()) if b.availability().usable]
    yield (), Eager()
    for backend in engines:
        yield (), backend
    yield _HALF, Eager()
    for steps in (_INT8, _HALF, (*_HALF, *_INT8), (*_MOST, *_INT8)):
        for backend in engines:
            yield steps, backend
    yield (Quantize("int8", mode="dynamic"),), OnnxRuntime()
    yield (Quantize("bf16"),), Eager()

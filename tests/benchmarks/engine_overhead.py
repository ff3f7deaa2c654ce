"""What `engine(batch)` costs over the bare call of the library beneath it, on ResNet-20.

    python tests/benchmarks/engine_overhead.py

Both calls go to the same session, taking turns, so that the ratio of each pair is taken under the same load. Target: at
batch 1 at most 1.05 for ONNX Runtime and OpenVINO. Weights and images come from ../shared/data/cifar10 where it is
there; otherwise both are random, which takes as long.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import workbench as wb

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "cifar10"
LIMIT = 1.05
PAIRS = {1: 3000, 32: 200}
LONGEST_S = 8.0  # per line; a busy machine gets fewer pairs


def materials() -> tuple[wb.Model, wb.Task]:
    """ResNet-20 and a task to quantise it with."""
    if DATA.is_dir():
        data = np.load(DATA / "cifar10.npz")
        x, y = data["x_test"][:200], data["y_test"][:200]
        model = wb.load(DATA / "resnet20-12fca82f.th", architecture="resnet20")
    else:
        rng = np.random.default_rng(0)
        x, y = rng.integers(0, 256, (200, 32, 32, 3), dtype=np.uint8), np.arange(200) % 10
        model = wb.load("resnet20")
    steps = [wb.data.Scale(1 / 255), wb.data.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    return model, wb.Task.from_arrays(x, y, x, y, calibration=64, preprocess=steps)


def bare(engine: wb.Engine) -> Callable[[np.ndarray], object]:
    """The shortest way to the same numbers without this library."""
    if isinstance(engine.backend, wb.OnnxRuntime):
        session, name = engine._session, engine.inputs[0].name
        return lambda x: session.run(None, {name: x})
    if isinstance(engine.backend, wb.OpenVINO):
        request = engine._request
        return lambda x: request.infer(x, share_inputs=True)
    module = engine._module

    def call(x: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return module(torch.from_numpy(x)).numpy()

    return call


def ratio(engine: wb.Engine, x: np.ndarray, pairs: int) -> tuple[float, float]:
    """Median of the paired ratios engine : bare, and the median bare call in milliseconds."""
    clock, plain = time.perf_counter, bare(engine)
    ratios, times = [], []
    begin = clock()
    for index in range(pairs + 20):
        if index >= 40 and clock() - begin > LONGEST_S:
            break
        # each goes first in every second pair: the second call of two finds warmer caches
        order = (engine, plain) if index % 2 else (plain, engine)
        took = {}
        for call in order:
            start = clock()
            call(x)
            took[call] = clock() - start
        if index >= 20:
            ratios.append(took[engine] / took[plain])
            times.append(took[plain] * 1e3)
    return statistics.median(ratios), statistics.median(times)


def main() -> int:
    """Print a line per engine and batch; 0 if every target holds."""
    model, task = materials()
    int8 = wb.Quantize("int8").apply(model, task)
    missed = False
    engines = (wb.OnnxRuntime(), wb.OpenVINO())
    for backend, kind in ((wb.Eager(), model), *((engine, kind) for engine in engines for kind in (model, int8))):
        if not backend.availability().usable:
            print(f"left out: {backend.label}: {backend.availability().why}")
            continue
        with backend.compile(kind) as engine:
            for batch, pairs in PAIRS.items():
                found, bare_ms = ratio(engine, task.inputs("test", batch)[0], pairs)
                held = batch > 1 or isinstance(backend, wb.Eager) or found <= LIMIT
                missed |= not held
                verdict = "" if batch > 1 or isinstance(backend, wb.Eager) else " holds" if held else " MISSED"
                print(f"{backend.label}, {engine.precision}, batch {batch}: {found:.3f} x {bare_ms:.3f} ms{verdict}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())

"""A 2-layer transformer trained on SST-2 through `study.run`: what int8 costs in accuracy and gains in time.

    python tests/benchmarks/sst2.py

Needs ../shared/data/sst2. It is trained here, on 6920 sentences, in one to two minutes. How much faster int8 is than
float32 on the same engine is the median ratio of interleaved blocks.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path

import workbench as wb
from workbench import environment
from workbench.cli import results
from workbench.measure import latency, ratio

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "sst2"
TRAINED = wb.Finetune(epochs=4, learning_rate=1e-3, batch_size=64, weight_decay=0.01)
INT8 = {"static": wb.Quantize("int8"), "dynamic": wb.Quantize("int8", mode="dynamic")}
BATCHES = (1, 32)


def faster(candidates: list[wb.Candidate], task: wb.Task, batch: int) -> list[tuple[float, tuple[float, float]]]:
    """How many times faster each candidate but the first is than the first, and the interval of that."""
    inputs = task.inputs("test", batch)
    with ExitStack() as stack:
        engines = [stack.enter_context(candidate.engine()) for candidate in candidates]
        first, *others = latency([lambda engine=engine: engine(*inputs) for engine in engines])
        return [ratio(first, other) for other in others]


def compared(s: wb.Study, backend: wb.Backend, batch: int) -> list[tuple[str, bool]]:
    """Each int8 form against float32 on one engine, and whether it is as accurate and faster."""
    recipes = [[TRAINED], *([TRAINED, quantise] for quantise in INT8.values())]
    fp32, *int8 = (s.run(steps, on=backend, batch=batch) for steps in recipes)
    accuracy, found = fp32.measurement.accuracy, []
    for mode, candidate, (times, (low, high)) in zip(INT8, int8, faster([fp32, *int8], s.task, batch), strict=True):
        where, lost = f"{backend.label}, batch {batch}, {mode} int8", accuracy - candidate.measurement.accuracy
        found.append((f"{where} loses {100 * lost:.2f} points, at most 1", lost <= 0.01))
        words = f"{where} is {times:.2f} x float32 ({low:.2f} to {high:.2f})"
        # OpenVINO has no integer kernel for ranges that are found while running: it is slower there, and told as it is
        if mode == "dynamic" and isinstance(backend, wb.OpenVINO):
            print(words)
        else:
            found.append((f"{words}, more than 1", low > 1))
    return found


def main() -> int:
    """Print the table and whether each target holds; 0 if all do."""
    with wb.Study(wb.load("transformer"), wb.tasks.sentences(DATA, classes=["negative", "positive"])) as s:
        backends = wb.OnnxRuntime(threads=2), wb.OpenVINO(threads=2)
        targets = [row for backend in backends for batch in BATCHES for row in compared(s, backend, batch)]
        print(results(s))
        trained = s.candidates[0].measurement.accuracy
        targets.insert(0, (f"float32 has {trained:.2%} test accuracy, at least 77 %", trained >= 0.77))
    here = environment.current()
    print(f"\n{here.processor}, {here.cores} cores, load {here.load_average}, {here.taken}; {here.versions}")
    for words, holds in targets:
        print("holds " if holds else "MISSED", words)
    return 0 if all(holds for _, holds in targets) else 1


if __name__ == "__main__":
    sys.exit(main())

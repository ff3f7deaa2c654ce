"""Whether profiles add up: rows and what they leave over, against a call timed apart, on every engine.

    python tests/benchmarks/reconciliation.py [--runs 10] [--networks resnet20,lenet5]

Each run times plain calls of a fresh engine by itself, profiles the network, and times plain calls again. `sum` is the
sum of all rows of the profile, the unattributed one included, over the mean of the two: the target is 0.97 to 1.03 in
nine runs of ten. `left` is the unattributed share of the end-to-end time: the target is below 15 % either way. Where
the two plain times differ by more than 5 % the processor changed its pace in between and there is nothing to compare
with; such a run is counted under `paces` and made again.
"""

from __future__ import annotations

import argparse
import functools
import statistics

import numpy as np
from _networks import NAMES, network

import workbench as wb
from workbench import measure
from workbench.profiling.profile import example_batch


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--runs", type=int, default=10)
    options.add_argument("--networks", default=",".join(NAMES))
    asked = options.parse_args()
    print(f"{'network':12} {'engine':14} {'precision':9} {'call ms':>8} {'within 3 %':>10} {'sum, worst':>10} "
          f"{'left, median':>12} {'left, worst':>11} {'below 15 %':>10} {'contended':>9} {'paces':>5}")  # fmt: skip
    for name in asked.networks.split(","):
        model, task = network(name)
        int8 = wb.Quantize("int8").apply(model, task)
        for backend in (wb.Eager(), wb.OnnxRuntime(), wb.OpenVINO()):
            for variant in (model, int8):
                if variant is int8 and isinstance(backend, wb.Eager):
                    continue
                print(_line(name, variant, backend, asked.runs), flush=True)


def _line(name: str, model: wb.Model, backend: wb.Backend, runs: int) -> str:
    sums, lefts, contended, paces, calls = [], [], 0, 0, []
    while len(sums) < runs and paces < 3 * runs:
        before = _apart_ms(model, backend)
        p = wb.profile(model, on=backend)
        after = _apart_ms(model, backend)
        if abs(after / before - 1) > 0.05:
            paces += 1
            continue
        sums.append(p.frame()["latency_ms"].sum() / ((before + after) / 2))
        lefts.append(p.unattributed_ms / p.end_to_end_ms)
        contended += p.contended
        calls.append(p.end_to_end_ms)
    within, below = sum(abs(s - 1) <= 0.03 for s in sums), sum(abs(v) < 0.15 for v in lefts)
    return (
        f"{name:12} {backend.title:14} {model.precision:9} {statistics.median(calls):8.3f} {within:>7}/{len(sums)} "
        f"{max(sums, key=lambda s: abs(s - 1)):10.3f} {statistics.median(lefts):12.1%} "
        f"{max(lefts, key=abs):11.1%} {below:>7}/{len(sums)} {contended:>9} {paces:>5}"
    )


def _apart_ms(model: wb.Model, backend: wb.Backend) -> float:
    with backend.compile(model) as engine:
        call = functools.partial(engine, *example_batch(model, 1))
        measure.quiesce()
        return float(np.median([np.median(measure.block(call, 0.03)) for _ in range(8)]))


if __name__ == "__main__":
    main()

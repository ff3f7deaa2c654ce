"""ResNet-20 on CIFAR-10 through `study.run`: accuracy on all 10,000 images, and speed against eager in the same run.

    python tests/benchmarks/resnet20.py

Needs ../shared/data/cifar10. Latencies are of batch 1; every speed-up is the median ratio of interleaved blocks.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

import workbench as wb
from workbench import environment
from workbench.cli import results

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "cifar10"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def study() -> wb.Study:
    """The published checkpoint on the whole test split, as an outside script would set it up."""
    data = np.load(DATA / "cifar10.npz")
    task = wb.Task.from_arrays(
        data["x_train"], data["y_train"], data["x_test"], data["y_test"],
        calibration=512, preprocess=[wb.data.Scale(1 / 255), wb.data.Normalize(MEAN, STD)],
    )  # fmt: skip
    return wb.Study(wb.load(DATA / "resnet20-12fca82f.th", architecture="resnet20"), task)


def main() -> int:
    """Print the table and whether each target holds; 0 if all do."""
    with study() as s:
        engines = [wb.OnnxRuntime(threads=2), wb.OpenVINO(threads=2)]
        fp32 = [s.run([], on=b, batch=1) for b in (wb.Eager(threads=2), *engines)]
        int8 = [s.run([wb.Quantize("int8")], on=b, batch=1) for b in engines]
        print(results(s))
    here = environment.current()
    print(f"\n{here.processor}, {here.cores} cores, load {here.load_average}, {here.taken}; {here.versions}")
    targets = [(f"{c.recipe.backend_label}: fp32 accuracy is 91.73 %", c.measurement.accuracy == 0.9173) for c in fp32]
    for c in int8:
        m = c.measurement
        targets.append(
            (f"{c.recipe.backend_label}: int8 accuracy {m.accuracy:.2%} is at least 91.60 %", m.accuracy >= 0.916)
        )
        targets.append((f"{c.recipe.backend_label}: int8 is {m.speedup:.1f} x eager, at least 5", m.speedup >= 5))
    for words, holds in targets:
        print("holds " if holds else "MISSED", words)
    return 0 if all(holds for _, holds in targets) else 1


if __name__ == "__main__":
    sys.exit(main())

"""ResNet-20 on CIFAR-10 in 8, 6, 5, 4 and 3 simulated bits: what each correction brings, on all 10,000 test images.

    python tests/benchmarks/resnet20_bits.py
    python tests/benchmarks/resnet20_bits.py --limit 1000 --bits 4 3 --rounded weights --grids "per channel"

Needs ../shared/data/cifar10. Weights alone and weights with activations of the same width, a grid per tensor and one
per output channel, without corrections, with each alone and with all. Intervals are Wilson's at 95 %.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np
import pandas as pd
from resnet20 import study

import workbench as wb
from workbench.formatting import accuracy

BITS = (8, 6, 5, 4, 3)
ROUNDED = ("weights", "weights and activations")
GRIDS = ("per tensor", "per channel")
CORRECTIONS = {
    "none": (),
    "equalised": ("equalize",),
    "biases": ("correct_bias",),
    "rounding": ("adaptive_rounding",),
    "all": ("equalize", "correct_bias", "adaptive_rounding"),
}
_BATCH = 200


@dataclass(frozen=True)
class Point:
    """Accuracy (0 to 1) of one setting, with its 95 % interval."""

    bits: int
    accuracy: float
    low: float
    high: float
    applied: tuple[str, ...]

    def __str__(self) -> str:
        return f"{100 * self.accuracy:.2f} ({100 * self.low:.1f}–{100 * self.high:.1f})"


def measured(model: wb.Model, task: wb.Task, bits: int, limit: int) -> Point:
    """The model's accuracy on the first `limit` test images."""
    with wb.Eager().compile(model) as engine:
        right = [task.metric.per_sample(engine(*x), labels) for x, labels in task.batches("test", _BATCH, limit)]
    applied = tuple(
        row["correction"]
        for record in model.records
        for row in record.rows
        if row.get("applied") and "correction" in row
    )
    return Point(bits, *task.metric.interval(np.concatenate(right)), applied)


def curves(
    model: wb.Model, task: wb.Task, widths: list[int], limit: int, whats: list[str], grids: list[str]
) -> dict[tuple[str, str, str], list[Point]]:
    """Accuracy by width, from the widest, for each of: what is rounded, which grid, which corrections."""
    found: dict[tuple[str, str, str], list[Point]] = {}
    for (what, grid), (name, asked) in product(product(whats, grids), CORRECTIONS.items()):
        for bits in widths:
            step = wb.FakeQuantize(
                bits,
                activation_bits=bits if what != "weights" else 0,
                per_channel=grid == "per channel",
                **dict.fromkeys(asked, True),
            )
            point = measured(step.apply(model, task), task, bits, limit)
            found.setdefault((what, grid, name), []).append(point)
            print(
                f"{what}, {grid}, {name}, {bits} bits: {point}; applied: {', '.join(point.applied) or 'nothing'}",
                flush=True,
            )
    return found


def targets(found: dict[tuple[str, str, str], list[Point]]) -> list[tuple[str, bool]]:
    """What must hold of the curves, in words, and whether it does."""
    checks = []
    for (what, grid, name), points in found.items():
        falls = all(fewer.accuracy <= more.high for more, fewer in pairwise(points))
        checks.append((f"{what}, {grid}, {name}: fewer bits are no better than more, within the interval", falls))
        plain = found[what, grid, "none"]
        if name != "none":
            kept = all(point.accuracy >= bare.low for point, bare in zip(points, plain, strict=True))
            checks.append((f"{what}, {grid}: {name} never hurts by more than the interval", kept))
    return checks


def table(found: dict[tuple[str, str, str], list[Point]]) -> str:
    """Accuracy in per cent, a row per curve and a column per width."""
    rows = [
        {"rounded": what, "grid": grid, "corrections": name, **{f"{p.bits} bits": str(p) for p in points}}
        for (what, grid, name), points in found.items()
    ]
    return pd.DataFrame(rows).to_string(index=False)


def main() -> int:
    """Print the table and whether each target holds; 0 if all do."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=int, default=10_000, help="test images")
    parser.add_argument("--bits", type=int, nargs="+", default=list(BITS), help="widths")
    parser.add_argument("--rounded", nargs="+", default=list(ROUNDED), choices=ROUNDED)
    parser.add_argument("--grids", nargs="+", default=list(GRIDS), choices=GRIDS)
    given = parser.parse_args()
    with study() as s:
        exact = measured(s.model, s.task, 32, given.limit)
        found = curves(s.model, s.task, sorted(given.bits, reverse=True), given.limit, given.rounded, given.grids)
    print(f"\nfp32: {accuracy(exact.accuracy)} on {given.limit} test images; accuracy in % with its 95 % interval\n")
    print(table(found) + "\n")
    checks = targets(found)
    for words, holds in checks:
        print("holds " if holds else "MISSED", words)
    return 0 if all(holds for _, holds in checks) else 1


if __name__ == "__main__":
    sys.exit(main())

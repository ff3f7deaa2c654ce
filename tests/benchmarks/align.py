"""What it takes to align two profiles of 500 rows.

    python tests/benchmarks/align.py

Three pairs: every name in common, half of them, none; on a residual network, whose rows are fused on one side. Target:
under 0.5 s each.
"""

from __future__ import annotations

import math
import statistics
import sys
import time

from workbench.deployment import OpTiming, Port
from workbench.profiling import Profile, _rows
from workbench.profiling.align import align

ROWS = 500
LIMIT_S = 0.5
REPEATS = 5


def network(prefix: str, renamed: float) -> Profile:
    """A chain of residual blocks; the share `renamed` of its layers, evenly spread, begins with `prefix`."""
    operations = []
    for i in range(ROWS):
        kind = ("Conv", "BatchNormalization", "Relu", "Conv", "Add")[i % 5]
        name = f"layer{i // 50}.{i // 5}.op{i}"
        if math.floor((i + 1) * renamed) > math.floor(i * renamed):
            name = f"{prefix}{i}"
        maps = 16 << (i // 125)
        reads = [f"t{i}", f"t{i - 4}"] if kind == "Add" else [f"t{i}"]
        operations.append(
            OpTiming(
                name, kind, (name,), (1.0,),
                reads=tuple(Port(tensor, (1, maps, 32, 32), "float32") for tensor in reads),
                writes=(Port(f"t{i + 1}", (1, maps, 32, 32), "float32"),),
                parameters=9 * maps * maps if kind == "Conv" else 0,
                kernel=(3, 3) if kind == "Conv" else (),
            )
        )  # fmt: skip
    return Profile(
        rows=_rows.table(operations, float(ROWS), None, 1), operations=tuple(operations), end_to_end_ms=float(ROWS),
        overhead_ms=math.nan, model_name=prefix, backend=None, backend_label="by hand", precision="fp32", batch=1,
        contended=False, environment=None,
    )  # fmt: skip


def main() -> int:
    """Print a line per pair; 1 where one is over the limit."""
    slow = False
    print(f"{'names in common':16} {'groups':>7} {'median s':>9}")
    for renamed in (0.0, 0.5, 1.0):
        a, b = network("a", renamed), network("b", renamed)
        times = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            alignment = align(a, b)
            times.append(time.perf_counter() - start)
        took = statistics.median(times)
        slow |= took > LIMIT_S
        print(f"{1 - renamed:16.0%} {len(alignment.groups):7} {took:9.3f}")
    print(f"limit {LIMIT_S} s: {'missed' if slow else 'met'}")
    return int(slow)


if __name__ == "__main__":
    sys.exit(main())

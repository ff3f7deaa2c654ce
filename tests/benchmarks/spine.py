"""What the spine may cost: the demo's time and memory, and a repeated run.

python tests/benchmarks/spine.py
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import workbench as wb
from workbench.compression import Prune


def demo() -> list[tuple[str, bool]]:
    """`workbench demo` as a whole process."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-c", "from workbench.cli import main; raise SystemExit(main(['demo']))"],
            cwd=folder,
            check=True,
        )
        seconds = time.perf_counter() - start
        report_mb = (Path(folder) / "report.html").stat().st_size / 1e6
    peak_mb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3
    return [
        (f"demo took {seconds:.0f} s, at most 90 (report {report_mb:.1f} MB)", seconds <= 90),
        (f"demo's peak resident memory was {peak_mb:.0f} MB, at most 2000", peak_mb <= 2000),
    ]


def again() -> list[tuple[str, bool]]:
    """A recipe already run, in this process and after reopening; a shared prefix."""
    applied = []
    original = Prune.apply
    Prune.apply = lambda self, *a, **k: (applied.append(1), original(self, *a, **k))[1]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        steps = [wb.Prune(0.5), wb.Quantize("int8")]
        with wb.Study(wb.load("lenet5"), wb.tasks.digits(), store=folder) as study:
            study.run(steps, on=wb.OnnxRuntime())
            rows.append(_timed("in the same process", study, steps))
            study.run([wb.Prune(0.5)], on=wb.Eager())
        with wb.Study(wb.load("lenet5"), wb.tasks.digits(), store=folder) as study:
            rows.append(_timed("in a reopened study", study, steps))
            study.run([wb.Prune(0.5)], on=wb.OnnxRuntime())
    Prune.apply = original
    rows.append((f"a prefix shared by four runs was computed {len(applied)} time, at most 1", len(applied) == 1))
    return rows


def _timed(where: str, study: wb.Study, steps: list) -> tuple[str, bool]:
    start = time.perf_counter()
    study.run(steps, on=wb.OnnxRuntime())
    cost_ms = (time.perf_counter() - start) * 1e3
    return f"a recipe already run returned in {cost_ms:.2f} ms {where}, under 50", cost_ms < 50


if __name__ == "__main__":
    found = [*demo(), *again()]
    for words, holds in found:
        print("holds " if holds else "MISSED", words)
    sys.exit(0 if all(holds for _, holds in found) else 1)

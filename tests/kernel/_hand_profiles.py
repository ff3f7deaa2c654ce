"""Profiles built by hand, for the tests of advice."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd

from workbench import environment
from workbench.deployment import OpTiming, Port
from workbench.profiling import Profile, _rows
from workbench.profiling.advice import advice

AVX512 = replace(environment.current(), isa=("avx2", "avx512f", "fma"))
AVX2 = replace(environment.current(), isa=("avx2", "fma"))


def tensor(name: str, shape: tuple[int, ...] = (1, 16, 8, 8), dtype: str = "float32") -> Port:
    return Port(name, shape, dtype)


def op(name: str, ms: float, type_: str = "Conv", **about) -> OpTiming:
    about.setdefault("layers", () if about.get("kind", "layer") != "layer" else (name,))
    about.setdefault("precision", "fp32" if about.get("kind", "layer") == "layer" else "")
    return OpTiming(name, type_, times_ms=(ms,), **about)


def conv(name: str, ms: float, inputs: int, outputs: int, *, source="in", groups=1, kernel=9, **about) -> OpTiming:
    """A convolution over 8 × 8 pixels with a bias, channels first."""
    weights = inputs // groups * outputs * kernel
    return op(
        name,
        ms,
        reads=(tensor(source, (1, inputs, 8, 8)),),
        writes=(tensor(name, (1, outputs, 8, 8)),),
        weight_bytes=4 * weights,
        macs=float(weights * 64),
        parameters=weights + outputs,
        **about,
    )


def profile(*operations: OpTiming, whole_ms: float | None = None, **about) -> Profile:
    whole_ms = whole_ms if whole_ms is not None else sum(o.times_ms[0] for o in operations)
    settings = {
        "overhead_ms": 0.0,
        "model_name": "net",
        "backend": None,
        "backend_label": "ONNX Runtime, 1 thread",
        "precision": "fp32",
        "batch": 1,
        "contended": False,
        "environment": AVX512,
    }
    rows = _rows.table(operations, whole_ms, None, 1)
    return Profile(rows=rows, operations=tuple(operations), end_to_end_ms=whole_ms, **(settings | about))


def found(p: Profile, finding: str, **about) -> pd.DataFrame:
    """The advice whose finding begins so."""
    frame = advice(p, **about)
    return frame[frame["finding"].str.startswith(finding)].reset_index(drop=True)

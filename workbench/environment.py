"""What a number was measured on: processor, instruction sets, GPU, threads, library versions, load."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

# the vector extensions that decide how fast inference is, as Linux and macOS spell them
_ISA = ("avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8",
        "neon", "asimd", "asimddp", "sve", "bf16", "i8mm")  # fmt: skip
_LIBRARIES = ("torch", "torch-pruning", "onnx", "onnxruntime", "onnxruntime-gpu", "openvino", "numpy")


@dataclass(frozen=True)
class Environment:
    """Where and with what a measurement was taken.

    Attributes
    ----------
    processor
        The CPU model as the operating system names it.
    isa
        Vector extensions that matter here, sorted.
    cores
        Logical processors this process may use.
    gpus
        Names of the CUDA devices torch sees.
    versions
        Library versions by distribution name; those not installed are absent.
    load_average
        One-minute load average when it was taken; None where the system has none.
    taken
        UTC time in ISO 8601, to the second.
    """

    processor: str
    isa: tuple[str, ...]
    cores: int
    gpus: tuple[str, ...]
    system: str
    python: str
    versions: dict[str, str]
    load_average: float | None
    taken: str

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self) | {"isa": list(self.isa), "gpus": list(self.gpus)}


@cache
def _processor() -> tuple[str, tuple[str, ...]]:
    info = Path("/proc/cpuinfo")
    text = info.read_text(errors="replace") if info.exists() else ""
    name = re.search(r"^(?:model name|Processor)\s*:\s*(.+)$", text, re.M)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.M)
    found = set(flags.group(1).split()) & set(_ISA) if flags else set()
    if not flags:
        # no /proc: torch knows the widest extension it would use
        found = {torch.backends.cpu.get_cpu_capability().lower()}
    return (name.group(1).strip() if name else platform.processor() or platform.machine()), tuple(sorted(found))


@cache
def library_versions() -> dict[str, str]:
    """Versions of the libraries that decide a result, by distribution name; absent where not installed."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@cache
def _gpus() -> tuple[str, ...]:
    if not torch.cuda.is_available():
        return ()
    return tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def load_average() -> float | None:
    """One-minute load average, or None where the system keeps none."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def current() -> Environment:
    """The environment at this moment."""
    name, isa = _processor()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else psutil.cpu_count() or 1
    return Environment(
        processor=name,
        isa=isa,
        cores=cores,
        gpus=_gpus(),
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        versions=library_versions(),
        load_average=load_average(),
        taken=datetime.now(UTC).isoformat(timespec="seconds"),
    )

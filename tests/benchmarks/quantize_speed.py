"""What compression steps may cost: int8 of ResNet-20 against the bare tool, pruning of ResNet-56, k-means of a million.

    python tests/benchmarks/quantize_speed.py [rounds]

Needs ../shared/data/cifar10. Bare is what a script would do with ONNX Runtime alone: the graph exported by the same
exporter, saved, ``quant_pre_process``, and ``quantize_static`` (Q/DQ, per channel, min-max) with a reader over the same
512 preprocessed images in the same chunks of 32. Ours is `Quantize.apply`, its records (a run of the quantised graph,
and the comparison) included. Both take turns in one process; each ratio is the median over rounds of ours to bare in
the same round, once with the export and once from the exported graph on, which is the stricter.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import nn

import workbench as wb

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "cifar10"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Reader(CalibrationDataReader):
    """The task's calibration split, chunk by chunk."""

    def __init__(self, task: wb.Task, name: str):
        self._chunks: Iterator = task.batches("calibration", 32)
        self._name = name

    def get_next(self) -> dict[str, np.ndarray] | None:
        found = next(self._chunks, None)
        return None if found is None else {self._name: found[0][0]}


def bare(model: wb.Model, task: wb.Task) -> None:
    """The tool without the workbench."""
    graph = model.onnx()
    with tempfile.TemporaryDirectory() as folder:
        source, ready, target = (Path(folder, f"{name}.onnx") for name in ("source", "ready", "target"))
        onnx.save(graph, source)
        quant_pre_process(source, ready, skip_symbolic_shape=True)
        quantize_static(
            ready,
            target,
            Reader(task, graph.graph.input[0].name),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        onnx.load(target)


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def int8(rounds: int) -> list[tuple[str, bool]]:
    """Ours against bare, in turns."""
    arrays = np.load(DATA / "cifar10.npz")
    steps = [wb.data.Scale(1 / 255), wb.data.Normalize(MEAN, STD)]
    task = wb.Task.from_arrays(
        arrays["x_train"], arrays["y_train"], arrays["x_test"], arrays["y_test"], calibration=512, preprocess=steps
    )
    model = wb.load(DATA / "resnet20-12fca82f.th", architecture="resnet20")
    step = wb.Quantize("int8")
    found = {False: [], True: []}
    for turn in range(rounds + 1):
        for exported in (True, False):
            pair = []
            for work in (lambda m: step.apply(m, task), lambda m: bare(m, task)):
                fresh = replace(model)  # has not been exported yet
                if exported:
                    fresh.onnx()
                pair.append(seconds(lambda work=work, fresh=fresh: work(fresh)))
            if turn:  # the first warms caches up
                found[exported].append(pair)
    rows = []
    for exported, where in ((False, "with the export"), (True, "from the exported graph on")):
        ours, theirs = np.array(found[exported]).T
        ratio = float(np.median(ours / theirs))
        words = f"int8 of ResNet-20 took {np.median(ours):.2f} s, bare {np.median(theirs):.2f} s {where}: {ratio:.2f} x"
        rows.append((f"{words}, under 1.5", ratio < 1.5))
    return rows


def others() -> list[tuple[str, bool]]:
    """Steps that have a bound in seconds."""
    task = wb.tasks.digits()
    resnet = wb.load("resnet56")
    prune_s = min(seconds(lambda: wb.Prune(0.5).apply(resnet, task)) for _ in range(3))
    torch.manual_seed(0)
    wide = wb.load(nn.Sequential(nn.Linear(1000, 1000, bias=False)), inputs=torch.zeros(2, 1000))
    share_s = min(seconds(lambda: wb.Cluster(16).apply(wide, task)) for _ in range(3))
    return [
        (f"structured pruning of ResNet-56 took {prune_s:.2f} s, under 1", prune_s < 1),
        (f"sharing a million weights among 16 values took {share_s:.2f} s, under 1", share_s < 1),
    ]


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # the bare tool's advice
    held = [*int8(int(sys.argv[1]) if len(sys.argv) > 1 else 5), *others()]
    for words, holds in held:
        print("holds " if holds else "MISSED", words)
    sys.exit(0 if all(holds for _, holds in held) else 1)

"""Whether the rows of a profile are right: ten layers of ResNet-20 against the same layers timed another way.

    python tests/benchmarks/row_times.py [--rounds 3]

A layer by itself is a chain of copies of it: how much longer nine take than one, over eight. Both chains are plain
calls, which no profiler sees, and go through the same engine, so that the same kernels run. They take turns with the
whole network, and both sides are given as parts of its call, because a processor changes its pace between two minutes.
A second convolution, which is fused with the addition of what went round it, is a whole block less its first
convolution. Target: every row within 20 % of that.
"""

from __future__ import annotations

import argparse
import copy
import functools
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from _networks import network, random_task
from torch import Tensor, nn

import workbench as wb
from workbench import measure
from workbench.profiling.profile import example_batch

BLOCKS = ("layer1.0", "layer1.1", "layer1.2", "layer2.1", "layer2.2", "layer3.1", "layer3.2")
# the first convolution of a block with its ReLU, and the second with the addition, where the shape stays
UNITS = tuple((block, 1) for block in BLOCKS) + (("layer1.1", 2), ("layer2.1", 2), ("layer3.1", 2))
LONG = 9

Call = Callable[[], Any]


class First(nn.Module):
    """A block's first convolution with its batch normalisation and ReLU."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.conv1, self.bn1 = copy.deepcopy(block.conv1), copy.deepcopy(block.bn1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn1(self.conv1(x)))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--rounds", type=int, default=3)
    rounds = options.parse_args().rounds
    model, task = network("resnet20")
    int8 = wb.Quantize("int8").apply(model, task)
    for backend, variants in (
        (wb.Eager(), (model,)),
        (wb.Compiled(), (model,)),
        (wb.OnnxRuntime(), (model, int8)),
        (wb.OpenVINO(), (model, int8)),
    ):
        for variant in variants:
            profiles = [wb.profile(variant, on=backend) for _ in range(rounds)]
            print(f"\n{backend.label}, {variant.precision}")
            print(f"  {'layer':16} {'row, % of call':>14} {'alone, % of call':>16} {'ratio':>6}")
            ratios = []
            with backend.compile(variant) as engine:
                call = functools.partial(engine, *example_batch(variant, 1))
                for block, which in UNITS:
                    row = statistics.median(_row_share(p, _layers(block, which)) for p in profiles)
                    alone = _alone_share(model, call, backend, variant.precision, block, which)
                    ratios.append(row / alone)
                    print(f"  {block + f'.conv{which}':16} {row:14.2%} {alone:16.2%} {row / alone:6.2f}")
            right = sum(abs(ratio - 1) <= 0.2 for ratio in ratios)
            print(f"  within 20 %: {right} of {len(ratios)}, {min(ratios):.2f} to {max(ratios):.2f}", flush=True)


def _layers(block: str, which: int) -> set[str]:
    tail = ("relu1",) if which == 1 else ("add", "relu2")
    return {f"{block}.{name}" for name in (f"conv{which}", f"bn{which}", *tail)}


def _row_share(p: wb.Profile, layers: set[str]) -> float:
    frame = p.frame()
    mine = [bool(layers & set(layer.split(" + "))) for layer in frame["layer"]]
    return float(frame.loc[mine, "latency_ms"].sum()) / p.end_to_end_ms


def _alone_share(model: wb.Model, call: Call, backend: wb.Backend, precision: str, block: str, which: int) -> float:
    """Of a whole call, one copy within a chain; for a second convolution, a whole block less its first."""
    whole = model.module.get_submodule(block)
    first = _each_share(First(whole), First(whole), call, backend, precision)
    return first if which == 1 else _each_share(First(whole), whole, call, backend, precision) - first


def _distinct(unit: nn.Module) -> nn.Module:
    """A copy with slightly other numbers: equal weights would be stored once, and engines fuse no shared ones."""
    made = copy.deepcopy(unit)
    with torch.no_grad():
        for value in made.parameters():
            value.mul_(1 + 0.01 * torch.randn_like(value))
    return made


def _each_share(stem: First, unit: nn.Module, call: Call, backend: wb.Backend, precision: str) -> float:
    """Of a whole call, one of many units one after another, behind a stem that gives the layout engines prefer."""
    channels = stem.conv1.in_channels
    shape = (channels, 512 // channels, 512 // channels)
    engines = []
    try:
        for copies in (1, LONG):
            chain = nn.Sequential(stem, *(_distinct(unit) for _ in range(copies)))
            made = wb.load(chain, inputs=torch.rand(2, *shape), name="chain")
            if precision == "int8":
                made = wb.Quantize("int8").apply(made, random_task(shape))
            engines.append(backend.compile(made))
        inputs = example_batch(made, 1)
        calls = [functools.partial(engine, *inputs) for engine in engines]
        short, long, whole = (np.array(t.blocks_ms) for t in measure.latency([*calls, call], blocks=12))
        return float(np.median((long - short) / whole)) / (LONG - 1)
    finally:
        for engine in engines:
            engine.close()


if __name__ == "__main__":
    main()

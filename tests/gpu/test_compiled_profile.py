"""Profiles of compiled models on a GPU: the device's own times, under the names of the kernels that were compiled."""

from __future__ import annotations

import numpy as np
import pytest

import workbench as wb

CUDA = wb.Compiled(device="cuda").availability()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not CUDA.usable, reason=CUDA.why or "-")]

REPEATS = 10


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_every_weighted_layer_has_one_row_that_takes_device_time(mode: str):
    model = wb.load("lenet5")
    inputs = tuple(value.numpy() for value in model.example.values())
    with wb.Compiled(mode, device="cuda").compile(model) as engine, engine.recorder(inputs) as recorder:
        walls = recorder.block(REPEATS) + recorder.block(REPEATS)
        rows = recorder.rows(1.0)
    for layer, module in model.module.named_children():
        if any(True for _ in module.parameters()):
            mine = [row for row in rows if layer in row.layers and row.kind == "layer"]
            assert mine and all(min(row.times_ms) > 0 for row in mine), (layer, rows)
    assert (np.sum([row.times_ms for row in rows], axis=0) <= walls).all()
    assert {row.layers for row in recorder.rows(1.0, [0])} == {row.layers for row in rows}


def test_the_layers_are_those_of_the_processor():
    model = wb.load("lenet5")
    inputs = tuple(value.numpy() for value in model.example.values())
    found = []
    for backend in (wb.Compiled(), wb.Compiled(device="cuda")):
        with backend.compile(model) as engine:
            found.append({layer for row in engine.profile(inputs, 2) for layer in row.layers})
    assert found[0] == found[1]

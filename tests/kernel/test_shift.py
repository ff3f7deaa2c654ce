"""Shifted inputs: static ranges clip what dynamic ones follow."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import workbench as wb
from workbench.errors import Cancelled, DataError
from workbench.jobs import on_progress
from workbench.study.shift import COLUMNS, SHIFTS

STATIC, DYNAMIC = wb.Quantize("int8"), wb.Quantize("int8", mode="dynamic")


@pytest.fixture(scope="module")
def task() -> wb.Task:
    """Which of two values is larger: both are between 0.5 and 1, so that four times both are out of range."""
    rng = np.random.default_rng(0)
    x = rng.uniform(0.5, 1, size=(400, 2)).astype(np.float32)
    x = x[np.abs(x[:, 0] - x[:, 1]) > 0.05]
    labels = x.argmax(1)
    return wb.Task.from_arrays(x[:150], labels[:150], x[150:], labels[150:], calibration=150)


@pytest.fixture(scope="module")
def study(task) -> wb.Study:
    """A network that passes its inputs on through a hidden layer, exactly."""
    first, last = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        first.weight.copy_(torch.eye(2))
        last.weight.copy_(torch.eye(2))
    with wb.Study(wb.load(nn.Sequential(first, nn.ReLU(), last), inputs=torch.zeros(2, 2)), task) as study:
        yield study


def test_static_ranges_lose_to_dynamic_ones_where_inputs_leave_them(study, task):
    candidates = [study.run([]), study.run([STATIC]), study.run([DYNAMIC])]
    frame = wb.under_shift(candidates, task, [wb.Shift(), wb.Shift(4.0)])
    assert list(frame.columns) == COLUMNS and len(frame) == 6
    found = frame["accuracy"].to_numpy().reshape(3, 2)  # an engine a row, in the order given
    assert found[0].tolist() == [1, 1], "a gain changes nothing about which is larger"
    assert found[1, 0] > 0.95 and found[1, 1] < 0.7, "clipped, both are equal"
    assert found[2].min() > 0.95
    assert frame["shift"].tolist() == ["as it is", "gain 4"] * 3
    assert [name.split(":")[0] for name in frame["engine"].unique()] == ["1", "2", "3"]
    assert (frame["accuracy_low"] <= frame["accuracy"]).all() and (frame["accuracy"] <= frame["accuracy_high"]).all()


def test_accuracies_are_those_of_the_shifted_arrays(study, task):
    x, labels = task.inputs("test", task.count("test"))[0], task.labels("test")
    engine = study.run([STATIC]).engine()
    shifts = [wb.Shift(0.25), wb.Shift(gain=2.0, offset=-0.5), wb.Shift(offset=-0.7)]
    frame = wb.under_shift({"static": engine}, task, shifts, limit=100)
    for shift, row in zip(shifts, frame.itertuples(), strict=True):
        moved = (x[:100] * np.float32(shift.gain) + np.float32(shift.offset)).astype(np.float32)
        assert row.accuracy == pytest.approx((engine(moved).argmax(1) == labels[:100]).mean())
        assert (row.gain, row.offset) == (shift.gain, shift.offset)
    assert frame["shift"].tolist() == ["gain 0.25", "gain 2, offset -0.5", "offset -0.7"]
    assert frame["engine"].tolist() == ["static"] * 3
    engine.close()


def test_a_shift_comes_after_the_preprocessing():
    raw = np.full((20, 1, 5, 5), 100, np.uint8)
    raw[::2] = 200
    labels = np.arange(20) % 2
    task = wb.Task.from_arrays(raw, labels, raw, labels, preprocess=[wb.data.Scale(1 / 100)])
    seen = []
    net = nn.Sequential(nn.Flatten(), nn.Linear(25, 2))
    net.register_forward_pre_hook(lambda _, given: seen.append(given[0].unique().tolist()))
    with wb.Eager().compile(wb.load(net, inputs=torch.zeros(2, 1, 5, 5))) as engine:
        seen.clear()
        wb.under_shift({"eager": engine}, task, [wb.Shift(2.0, 0.5)])
    assert seen == [[2.5, 4.5]]


def test_progress_goes_up_to_one_and_a_cancel_stops_it(study, task):
    seen = []
    candidates = [study.run([]), study.run([STATIC])]
    wb.under_shift(candidates, task, progress=on_progress(lambda share, words: seen.append((share, words))))
    assert [share for share, _ in seen] == sorted(share for share, _ in seen) and seen[-1][0] == 1
    assert len({words.split(" · ")[0] for _, words in seen[:-1]}) == 2 * len(SHIFTS)

    def stop(share, _):
        if share > 0.4:
            raise Cancelled("enough")

    with pytest.raises(Cancelled):
        wb.under_shift(candidates, task, progress=on_progress(stop))


@pytest.mark.parametrize(
    "settings", [{"gain": 0}, {"gain": -1.0}, {"gain": math.nan}, {"offset": math.inf}, {"gain": "2"}]
)
def test_a_shift_that_is_none_is_refused(settings):
    with pytest.raises(DataError, match=f"Shift: {next(iter(settings))} is"):
        wb.Shift(**settings)


def test_what_is_no_engine_or_no_shift_is_refused(study, task):
    engine = study.run([]).engine()
    for engines in ({}, [], {"a": 1}, [1], [engine], engine, None):
        with pytest.raises(DataError, match="give open engines by name, or a list of a study's candidates"):
            wb.under_shift(engines, task)
    for shifts in ([], [2.0], 2.0):
        with pytest.raises(DataError, match="give a list such as"):
            wb.under_shift({"a": engine}, task, shifts)
    engine.close()


def test_ids_cannot_be_shifted(study):
    ids = np.zeros((10, 4), np.int64)
    task = wb.Task.from_arrays(ids, np.arange(10) % 2, ids, np.arange(10) % 2)
    with pytest.raises(DataError, match="nothing but ids"):
        wb.under_shift([study.run([])], task)

"""Measurements: intervals that hold, comparisons that do not cry wolf."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest

import workbench as wb
from workbench import measure
from workbench.errors import DataError


class Clock:
    """Time that passes only when a call takes it, so that what is measured is known exactly."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def taking(self, *milliseconds):
        """A call that takes these times in turn."""
        turns = itertools.cycle(milliseconds)

        def call():
            self.now += next(turns) / 1e3

        return call


@pytest.fixture
def clock(monkeypatch):
    fake = Clock()
    monkeypatch.setattr(measure.time, "perf_counter", fake)
    return fake


def test_latency_of_a_known_call_is_that_call(clock):
    found = measure.latency([clock.taking(2.0)], blocks=6)[0]
    assert found.median_ms == pytest.approx(2.0)
    assert found.interval_ms == pytest.approx((2.0, 2.0))
    assert len(found.blocks_ms) == 6


def test_p95_is_of_the_calls_and_not_of_the_blocks(clock):
    found = measure.latency([clock.taking(*[1.0] * 9, 11.0)], blocks=6)[0]
    assert found.median_ms == pytest.approx(1.0)
    assert found.p95_ms == pytest.approx(11.0)


def test_ratio_of_two_calls_comes_from_paired_blocks(clock):
    slow, fast = measure.latency([clock.taking(3.0), clock.taking(1.0)], blocks=8)
    value, (low, high) = measure.ratio(slow, fast)
    assert (low, value, high) == pytest.approx((3.0, 3.0, 3.0))


def test_a_real_call_takes_real_time():
    found = measure.latency([lambda: sum(range(1000))], blocks=5)[0]
    assert 0 < found.interval_ms[0] <= found.median_ms <= found.interval_ms[1]


def test_ratio_refuses_blocks_that_do_not_pair(clock):
    a = measure.latency([clock.taking(1.0)], blocks=5)[0]
    b = measure.latency([clock.taking(1.0)], blocks=6)[0]
    with pytest.raises(ValueError, match="do not pair"):
        measure.ratio(a, b)


def test_too_few_blocks_are_refused():
    with pytest.raises(ValueError, match="at least 5"):
        measure.latency([lambda: None], blocks=4)


def test_bootstrap_interval_of_the_median_covers_it_about_95_times_in_100():
    rng = np.random.default_rng(0)
    covered = [
        low <= 1.0 <= high for low, high in (measure.bootstrap_median(rng.normal(1, 0.1, 20)) for _ in range(300))
    ]
    assert 0.90 <= np.mean(covered) <= 1.0


def test_size_is_what_deflate_leaves_so_zeros_count_for_little():
    rng = np.random.default_rng(0)
    dense = rng.normal(size=10_000).astype(np.float32)
    sparse = np.where(rng.random(10_000) < 0.9, 0, dense).astype(np.float32)
    size_dense, raw_dense = measure.artifact_size({"a": dense.tobytes()})
    size_sparse, raw_sparse = measure.artifact_size({"a": sparse.tobytes()})
    assert raw_dense == raw_sparse == 40_000
    assert size_sparse < 0.25 * size_dense


def test_memory_meter_sees_what_is_touched():
    meter = measure.MemoryMeter()
    meter.reset()
    held = np.ones(25_000_000)  # 200 MB
    added = meter.added_mb()
    if math.isnan(added):
        pytest.skip("this system keeps no resettable high-water mark")
    assert held[0] == 1
    assert 190 <= added <= 230


def test_measurement_survives_json(digits_candidate):
    m = digits_candidate.measurement
    again = wb.Measurement.from_dict(json.loads(json.dumps(m.to_dict())))
    assert again == m


def test_measurement_carries_its_environment(digits_candidate):
    found = digits_candidate.measurement.environment
    assert found["processor"] and found["versions"]["torch"] and found["taken"]


def test_accuracy_is_counted_on_the_whole_split(digits_candidate, digits):
    m = digits_candidate.measurement
    with digits_candidate.engine() as engine:
        hits = sum(int((engine(*x).argmax(1) == y).sum()) for x, y in digits.batches("test", 64))
    assert m.accuracy == hits / digits.count("test")
    assert m.accuracy_interval[0] < m.accuracy < m.accuracy_interval[1]


def test_not_a_number_in_the_output_is_refused(digits):
    model = wb.load("lenet5")
    with wb.Eager().compile(model) as engine:

        class Broken:
            name, backend = engine.name, engine.backend

            def __call__(self, *inputs):
                return engine(*inputs) * np.nan

        with pytest.raises(DataError, match="NaN"):
            measure.accuracy(Broken(), digits)

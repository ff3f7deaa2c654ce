"""The front holds exactly what nobody beats."""

from __future__ import annotations

import numpy as np
import pandas as pd

from workbench.study.pareto import clearly_dominated, front


def frame(points, spread=(0.0, 0.0)):
    f = pd.DataFrame(points, columns=["latency_ms", "accuracy"])
    f["latency_low_ms"], f["latency_high_ms"] = f["latency_ms"] - spread[0], f["latency_ms"] + spread[0]
    f["accuracy_low"], f["accuracy_high"] = f["accuracy"] - spread[1], f["accuracy"] + spread[1]
    return f


def test_front_equals_the_definition_on_random_points():
    rng = np.random.default_rng(0)
    for _ in range(50):
        f = frame(rng.integers(0, 8, size=(30, 2)).astype(float))
        t, a = f["latency_ms"].to_numpy(), f["accuracy"].to_numpy()
        beaten = [((t <= t[i]) & (a >= a[i]) & ((t < t[i]) | (a > a[i]))).any() for i in range(len(f))]
        assert list(front(f)) == [not b for b in beaten]


def test_equal_points_share_the_front():
    assert list(front(frame([(1, 0.9), (1, 0.9), (2, 0.9)]))) == [True, True, False]


def test_unmeasured_points_are_never_on_it():
    assert list(front(frame([(np.nan, 0.99), (1, 0.9)]))) == [False, True]


def test_a_point_within_the_intervals_is_not_clearly_dominated():
    points = [(1.0, 0.90), (1.1, 0.89), (2.0, 0.80)]
    assert list(clearly_dominated(frame(points, spread=(0.2, 0.02)))) == [False, False, True]
    assert list(clearly_dominated(frame(points))) == [False, True, True]

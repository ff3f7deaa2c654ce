"""Accuracy and its Wilson interval."""

from __future__ import annotations

import numpy as np
import pytest

from workbench.data import Accuracy
from workbench.errors import DataError


def test_accuracy_is_one_where_the_largest_output_is_the_label():
    scores = Accuracy().per_sample(np.array([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]], np.float32), np.array([1, 1, 1]))
    assert scores.dtype == np.float64
    assert scores.tolist() == [1.0, 0.0, 1.0]


def test_only_the_first_of_several_outputs_counts():
    first, second = np.array([[0.0, 1.0]]), np.array([[1.0, 0.0]])
    assert Accuracy().per_sample((first, second), np.array([1])).tolist() == [1.0]


def test_a_row_with_nan_counts_as_wrong():
    outputs = np.array([[np.nan, 0.0], [1.0, np.nan], [1.0, 0.0]], np.float16)
    assert Accuracy().per_sample(outputs, np.array([0, 0, 0])).tolist() == [0.0, 0.0, 1.0]


def test_integer_outputs_are_accepted():
    assert Accuracy().per_sample(np.array([[3, 120]], np.uint8), np.array([1])).tolist() == [1.0]


def test_interval_is_the_published_wilson_interval():
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3: 81/263, 15/148, 0/20, 1/29
    for right, n, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        values = np.r_[np.ones(right), np.zeros(n - right)]
        mean, got_low, got_high = Accuracy().interval(values)
        assert mean == right / n
        assert (round(got_low, 4), round(got_high, 4)) == (low, high)


@pytest.mark.parametrize("n", [1, 3, 500, 10_000])
def test_interval_ends_at_0_and_1_exactly(n: int):
    assert Accuracy().interval(np.zeros(n))[:2] == (0.0, 0.0)
    assert Accuracy().interval(np.ones(n))[0::2] == (1.0, 1.0)


def test_interval_is_symmetric_in_right_and_wrong():
    values = np.r_[np.ones(7), np.zeros(30)]
    mean, low, high = Accuracy().interval(values)
    wrong, wrong_low, wrong_high = Accuracy().interval(1 - values)
    assert (wrong, wrong_low, wrong_high) == pytest.approx((1 - mean, 1 - high, 1 - low), abs=1e-15)


@pytest.mark.parametrize(
    ("outputs", "labels", "said"),
    [
        (np.zeros(3), [0, 0, 0], r"shape \(3,\)"),
        (np.zeros((2, 4)), [0, 0, 0], r"needs \(3, classes\)"),
        (np.zeros((3, 1)), [0, 0, 0], "two classes or more"),
        (np.zeros((3, 5, 4)), [0, 0, 0], "needs"),
        (np.zeros((3, 5)), [0, 7, 0], "label 7 lies beyond the model's 5 outputs"),
    ],
)
def test_outputs_that_do_not_fit_the_labels_are_refused(outputs, labels, said):
    with pytest.raises(DataError, match=said):
        Accuracy().per_sample(outputs, np.array(labels))


@pytest.mark.parametrize("values", [np.array([]), np.array([0.5, 1.0]), np.array([np.nan])])
def test_interval_refuses_what_is_no_proportion(values):
    with pytest.raises(DataError, match="one 0 or 1 per sample"):
        Accuracy().interval(values)

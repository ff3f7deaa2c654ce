"""A number is written one way everywhere."""

from __future__ import annotations

import math

import pytest

from workbench import formatting as fmt


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.13149, "0.131"),
        (0.9996, "1.00"),
        (12.44, "12.4"),
        (1080.4, "1080"),
        (99950, "100000"),
        (0, "0"),
        (-2.5, "-2.50"),
    ],
)
def test_three_significant_digits_without_exponent(value, text):
    assert fmt.significant(value) == text


def test_accuracy_is_per_cent_at_two_decimals():
    assert fmt.accuracy(0.9162) == "91.62 %"
    assert fmt.accuracy(0.9162, unit=False) == "91.62"


@pytest.mark.parametrize(
    ("value", "text"), [(97_950, "98 KB"), (1_070_000, "1.07 MB"), (2.5e9, "2.50 GB"), (512, "512 B")]
)
def test_sizes_are_powers_of_1000(value, text):
    assert fmt.size(value) == text


def test_factors_have_two_digits_and_a_times_sign():
    assert fmt.factor(8.24) == "8.2 ×"
    assert fmt.factor(123.4) == "123 ×"


def test_symmetric_interval_is_plus_minus_and_a_lopsided_one_shows_both_ends():
    assert fmt.plus_minus(0.9, (0.8946, 0.9054), 100) == "± 0.54"
    assert fmt.plus_minus(0.99, (0.90, 0.995), 100) == "(90.00 to 99.50)"


@pytest.mark.parametrize(
    ("value", "interval", "words"),
    [
        (0.131, (0.128, 0.134), "± 0.003"),
        (0.0220, (0.02199, 0.02201), "± 0.00001"),
        (12.4, (12.3, 12.5), "± 0.1"),
        (1.0, (0.9, 3.0), "(0.900 to 3.00)"),
        (0.0273, (0.02730, 0.02740), "± 0.0001"),
        (0.5, (0.5, 0.5), "± 0.000"),
    ],
)
def test_latency_interval_has_the_digits_of_its_value_and_is_never_zero_by_rounding(value, interval, words):
    assert fmt.latency_interval(value, interval) == words


def test_differences_carry_a_sign():
    assert fmt.signed(-0.5, "0.50") == "−0.50"
    assert fmt.signed(0.5, "0.50") == "+0.50"


@pytest.mark.parametrize("write", [fmt.significant, fmt.accuracy, fmt.size, fmt.share, fmt.count])
def test_unknown_is_a_dash(write):
    assert write(math.nan) == "–"


def test_time_left_is_minutes_and_seconds():
    assert fmt.duration(68.4) == "1:08"
    assert fmt.duration(None) == ""

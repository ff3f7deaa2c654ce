"""What the figures of compression draw is what their tables say."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from workbench.figures import bits, bits_figure, sizes, sizes_figure, training, training_figure, weights, weights_figure


@pytest.fixture
def epochs() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "epoch": [1, 2, 3],
            "loss": [0.9, 0.4, 0.2],
            "validation_loss": [1.0, 0.5, 0.6],
            "validation_accuracy": [0.5, 0.875, 0.75],
            "learning_rate": [1e-3, 5e-4, 0.0],
            "kept": [False, True, False],
        }
    )


def test_a_training_is_drawn_by_epoch_with_the_kept_one_marked(epochs):
    info = training._info(epochs)
    assert [curve.name for curve in info.curves] == ["training samples", "held-out samples"]
    assert info.curves[0].losses == (0.9, 0.4, 0.2) and info.curves[1].losses == (1.0, 0.5, 0.6)
    assert info.kept == 2 and "87.50 %" in info.curves[1].hover[1]
    drawn = training_figure(epochs)
    assert drawn.layout.shapes[0].x0 == 2 and drawn.layout.annotations[0].text == "kept: epoch 2"


def test_a_training_without_held_out_samples_has_one_curve(epochs):
    epochs["validation_loss"] = epochs["validation_accuracy"] = None
    assert [curve.name for curve in training._info(epochs).curves] == ["training samples"]
    assert len(training_figure(epochs, dark=True).data) == 1


def test_weights_are_counted_in_the_same_bins_before_and_after():
    before = np.linspace(-1, 1, 1001)
    info = weights._info(pd.DataFrame({"before": before, "after": np.round(before * 2) / 2}))
    assert sum(info.before) == sum(info.after) == 1001
    assert info.values == 5  # -1, -0.5, 0, 0.5, 1
    assert info.zeros == np.mean(np.round(before * 2) == 0)
    assert info.pairs[0][0] == -1 and info.pairs[1][0] == -1


def test_the_weights_of_a_large_layer_are_sampled_for_the_points_alone():
    frame = pd.DataFrame({"before": np.arange(9001.0), "after": np.zeros(9001)})
    info = weights._info(frame)
    assert sum(info.before) == 9001 and len(info.pairs[0]) == 3001
    assert "fc1: 9,001 weights" in weights_figure(frame, layer="fc1").layout.title.text


def test_accuracy_against_bits_has_a_line_per_scheme_with_its_intervals():
    frame = pd.DataFrame(
        {
            "scheme": ["per tensor", "per tensor", "per channel"],
            "bits": [3, 8, 8],
            "accuracy": [0.5, 0.9, 0.91],
            "accuracy_low": [0.49, 0.89, 0.9],
            "accuracy_high": [0.52, 0.91, 0.92],
        }
    )
    tensor, channel = bits._info(frame)
    assert tensor.bits == (8, 3) and tensor.accuracies == (90.0, 50.0) and channel.bits == (8,)
    assert tensor.above == pytest.approx((1.0, 2.0)) and tensor.below == pytest.approx((1.0, 1.0))
    drawn = bits_figure(frame, baseline=0.9173)
    assert drawn.layout.shapes[0].y0 == pytest.approx(91.73)
    assert list(drawn.layout.xaxis.range) == [8.5, 2.5]  # fewer bits to the right


def test_sizes_have_a_bar_for_each_way_of_counting():
    frame = pd.DataFrame(
        {
            "candidate": [1, 4],
            "label": ["as is", "Cluster 16"],
            "dense_bytes": [1000, 1000],
            "sparse_bytes": [2000, 200],
            "coded_bytes": [950, 25],
            "size_bytes": [900, 300],
            "compression": [1.05, 40.0],
            "faster": ["", "indistinguishable"],
        }
    )
    info = sizes._info(frame)
    assert info.labels == ("1: as is", "4: Cluster 16") and info.candidates == (1, 4)
    assert [way.sizes_bytes for way in info.ways] == [(1000, 1000), (2000, 200), (950, 25), (900, 300)]
    assert info.ways[2].texts[1] == "25 B · 1 / 40.0" and "indistinguishable" in info.ways[2].hover[1]
    assert list(sizes_figure(frame, selected=4).data[0].marker.opacity) == [0.45, 1.0]


@pytest.mark.parametrize("figure", [training_figure, weights_figure, bits_figure, sizes_figure])
def test_an_empty_figure_says_what_to_do_first(figure):
    columns = ["epoch", "loss", "validation_loss", "kept", "before", "after", "scheme", "candidate"]
    drawn = figure(pd.DataFrame(columns=columns))
    assert not drawn.data and drawn.layout.annotations[0].text

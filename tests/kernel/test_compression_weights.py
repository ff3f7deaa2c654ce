"""A layer's weights in two models, side by side."""

from __future__ import annotations

import numpy as np
import pytest

import workbench as wb
from workbench.compression.weights import comparable_layers, weight_pairs
from workbench.errors import StepError


def test_each_weight_stands_beside_what_became_of_it(digits):
    model = wb.load("mlp")
    cut = wb.Prune(0.5, granularity="weight").apply(model, digits)
    pairs = weight_pairs(model, cut, "fc1")
    assert len(pairs) == 784 * 128
    assert np.array_equal(pairs["before"], model.module.fc1.weight.detach().flatten())
    kept = pairs["after"] != 0
    assert kept.sum() == 784 * 128 / 2 and (pairs["before"][kept] == pairs["after"][kept]).all()


def test_layers_that_changed_their_shape_cannot_be_compared(digits):
    model = wb.load("lenet5")
    narrow = wb.Prune(0.5).apply(model, digits)
    assert comparable_layers(model, narrow) == ()
    with pytest.raises(StepError, match="one shape"):
        weight_pairs(model, narrow, "conv1")


def test_an_unknown_layer_is_answered_with_the_nearest():
    model = wb.load("lenet5")
    with pytest.raises(StepError, match="Did you mean 'conv1'"):
        weight_pairs(model, model, "con1")


def test_a_graph_has_no_weights_to_compare(digits):
    model = wb.load("mlp")
    graph = wb.Quantize("int8", mode="dynamic").apply(model, digits)
    assert comparable_layers(model, graph) == ()
    with pytest.raises(StepError, match="FakeQuantize"):
        weight_pairs(model, graph, "fc1")

"""A layer that rounds while it is trained, by hand-made numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from workbench.compression import _qat
from workbench.models import parts
from workbench.models.parts import quantisation_aware


def by_hand(x: np.ndarray, low: float, high: float) -> np.ndarray:
    scale = (high - low) / 255
    zero = round(-low / scale)
    return (np.clip(np.rint(x / scale) + zero, 0, 255) - zero) * scale


def aware(old: nn.Module, **settings: object) -> nn.Module:
    return parts.put(nn.Sequential(old), "0", "quantisation_aware", **settings)[0]


def test_a_layer_rounds_its_input_weight_and_output_as_the_formula_says():
    torch.manual_seed(0)
    plain = nn.Linear(6, 4)
    layer = aware(plain, weight_bits=4, takes=True, gives=True)
    layer.input_range.copy_(torch.tensor([-1.0, 2.0]))
    layer.output_range.copy_(torch.tensor([-0.5, 1.5]))
    x = torch.randn(20, 6) * 2
    weight = plain.weight.detach().numpy().astype(np.float64)
    scale = np.abs(weight).max(1, keepdims=True) / 7
    inner = by_hand(x.numpy().astype(np.float64), -1, 2) @ (np.rint(weight / scale) * scale).T
    expected = by_hand(inner + plain.bias.detach().numpy(), -0.5, 1.5)
    error = np.abs(layer(x).detach().numpy() - expected)
    assert (error < 1e-5).mean() > 0.95 and error.max() < 1.01 * 2 / 255
    assert "weight_bits=4, input_bits=8, output_bits=8" in repr(layer)


def test_gradients_pass_through_the_rounding_and_stop_outside_the_range():
    layer = aware(nn.ReLU(), gives=True)
    layer.output_range.copy_(torch.tensor([0.0, 1.0]))
    x = torch.tensor([0.3, 0.9, 1.7], requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.tolist() == [1.0, 1.0, 0.0]


def test_ranges_grow_while_observing_move_while_following_and_then_stay():
    layer = aware(nn.Identity(), gives=True)
    follow = _qat.FollowRanges(nn.Sequential(layer))
    layer.observing = True
    for values in ([0.5, 2.0], [-1.0, 1.0]):
        assert layer(torch.tensor(values)).tolist() == values, "nothing is rounded meanwhile"
    assert layer.output_range.tolist() == [-1.0, 2.0]
    layer.observing = False
    layer.train()
    follow.before_update(0.0)
    layer(torch.tensor([0.0, 4.0]))
    assert layer.output_range.tolist() == pytest.approx([-0.99, 2.02])
    layer.eval()
    layer(torch.tensor([0.0, 9.0]))
    layer.train()
    follow.before_update(0.5)
    layer(torch.tensor([0.0, 9.0]))
    assert layer.output_range.tolist() == pytest.approx([-0.99, 2.02])


def test_a_range_of_nothing_but_zero_rounds_to_zero():
    layer = aware(nn.Identity(), gives=True)
    assert layer(torch.tensor([0.0, 0.0])).tolist() == [0.0, 0.0]


def test_a_bias_that_its_weights_scale_cannot_hold_is_kept():
    torch.manual_seed(0)
    plain = nn.Linear(6, 2)
    with torch.no_grad():
        plain.weight[0] *= 1e-9
        plain.bias.fill_(3.0)
    layer = aware(plain, weight_bits=8, takes=True)
    whole = quantisation_aware.integer(layer, torch.tensor([0.0, 1.0]), rows=True)
    assert (whole.bias.double() * whole.bias_scale.double()).tolist() == pytest.approx([3.0, 3.0], rel=1e-5)
    assert whole.weight[0].tolist() == [0] * 6
    assert float(whole.weight_scale[1]) == pytest.approx(float(plain.weight.detach()[1].abs().max()) / 127)

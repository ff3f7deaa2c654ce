"""Grids for weights against torch, the literature and hand calculation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from workbench.compression import _grids, _simulated


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_symmetric_weights_are_those_of_torch(bits):
    torch.manual_seed(0)
    layer, most = nn.Conv2d(3, 5, 3), 2 ** (bits - 1) - 1
    scale = layer.weight.detach().abs().amax((1, 2, 3)) / most
    expected = torch.fake_quantize_per_channel_affine(layer.weight, scale, torch.zeros(5).int(), 0, -most, most)
    assert torch.allclose(_simulated.weight(layer, bits), expected, atol=1e-6)
    whole = torch.fake_quantize_per_tensor_affine(layer.weight, float(scale.max()), 0, -most, most)
    assert torch.allclose(_simulated.weight(layer, bits, per_channel=False), whole, atol=1e-6)


@pytest.mark.parametrize("bits", [3, 8])
def test_asymmetric_weights_are_those_of_torch(bits):
    torch.manual_seed(0)
    layer, steps = nn.Linear(40, 5), 2**bits - 1
    with torch.no_grad():
        layer.weight.add_(torch.linspace(-0.2, 0.2, 5)[:, None])  # each channel off centre in its own way
    low, high = layer.weight.detach().amin(1).clamp(max=0), layer.weight.detach().amax(1).clamp(min=0)
    scale = (high - low) / steps
    zero = (-low / scale).round().int()
    expected = torch.fake_quantize_per_channel_affine(layer.weight, scale, zero, 0, 0, steps)
    assert torch.allclose(_simulated.weight(layer, bits, symmetric=False), expected, atol=1e-6)


def test_logarithmic_weights_are_powers_of_two_counted_down_from_the_largest():
    rows = torch.tensor([[1.1, -0.72, 0.36, 0.2, 0.09, 0.0], [-24.0, 5.0, 3.0, 2.0, 0.1, 1.0]])
    # 3 bits: three exponents; log2 of 0.72, 0.36 and 0.2 is -0.47, -1.47 and -2.3; of 24, 5 and 3 it is 4.6, 2.3, 1.6
    expected = torch.tensor([[1.0, -1.0, 0.5, 0.25, 0.0, 0.0], [-32.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    expected[1, 1] = 0.0  # 2^2 is the fourth from 2^5
    assert torch.equal(_grids.logarithmic(rows, 3), expected)
    assert _grids.logarithmic(rows, 2).tolist() == [[1.0, -1.0, 0.0, 0.0, 0.0, 0.0], [-32.0, 0, 0, 0, 0, 0]]
    assert not _grids.logarithmic(torch.zeros(1, 4), 4).any()


def test_a_codebook_has_no_more_values_than_bits_allow_and_beats_even_steps():
    torch.manual_seed(0)
    layer = nn.Linear(400, 3)
    nn.init.normal_(layer.requires_grad_(False).weight)
    by_channel = _simulated.weight(layer, 3, grid="kmeans")
    assert [len(row.unique()) for row in by_channel] == [8, 8, 8]
    whole = _simulated.weight(layer, 3, grid="kmeans", per_channel=False)
    assert len(whole.unique()) == 8
    errors = [float((w - layer.weight).square().mean()) for w in (by_channel, whole, _simulated.weight(layer, 3))]
    assert errors == sorted(errors)
    # eight levels leave a normal variable an error of 0.03454 at best: Max, "Quantizing for minimum distortion", 1960
    assert errors[1] == pytest.approx(0.03454, rel=0.1)


@pytest.mark.parametrize("grid", _grids.GRIDS)
def test_a_weight_of_zero_stays_zero(grid):
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 4, 3)
    with torch.no_grad():
        layer.weight.mul_(torch.rand_like(layer.weight) < 0.5)
    for symmetric in (True, False) if grid == "uniform" else (True,):
        found = _simulated.weight(layer, 3, grid=grid, symmetric=symmetric)
        assert not found[layer.weight == 0].any() and found.any()


def test_clipping_by_error_finds_the_best_range_of_a_normal_variable():
    rows = torch.randn(1, 50000, generator=torch.Generator().manual_seed(0))
    found = _grids.uniform(rows, 4, clip="mse")
    step = float(found.unique().diff().min())
    # the best even step for 16 levels is 0.3352 (Max 1960, table II); here there are 15, with one at zero
    assert step == pytest.approx(0.3352, rel=0.1)
    errors = [float((rows - _grids.uniform(rows, 4, clip=clip)).square().mean()) for clip in ("mse", "none")]
    assert errors[0] < 0.5 * errors[1]


def test_clipping_by_percentile_ends_the_range_at_that_quantile():
    torch.manual_seed(0)
    rows = torch.randn(2, 2000)
    found = _grids.uniform(rows, 8, clip="percentile", percentile=90.0)
    assert torch.allclose(found.abs().amax(1), torch.quantile(rows.abs(), 0.9, dim=1), rtol=1e-5)
    found = _grids.uniform(rows, 8, symmetric=False, clip="percentile", percentile=90.0)
    width = torch.quantile(rows, 0.95, dim=1) - torch.quantile(rows, 0.05, dim=1)
    assert torch.allclose(found.amax(1) - found.amin(1), width, rtol=1e-5)

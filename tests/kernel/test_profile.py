"""A profile has a row per layer and adds up."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import workbench as wb
from workbench.errors import DataError, ProfileError
from workbench.profiling.profile import steady

COLUMNS = [
    *("name", "layer", "type", "kind", "latency_ms", "latency_p95_ms", "share", "macs", "parameters"),
    *("input_shape", "output_shape", "read_bytes", "written_bytes", "activation_bytes", "intensity", "precision"),
]


@pytest.fixture(scope="module", params=["Eager", "OnnxRuntime", "OpenVINO"])
def taken(request):
    backend = wb.deployment.BACKENDS[request.param]()
    if not backend.availability().usable:
        pytest.skip(backend.availability().why)
    return wb.profile(wb.load("lenet5"), on=backend, batch=2, repeats=20)


def test_rows_and_unattributed_add_up_to_end_to_end(taken):
    frame = taken.frame()
    assert list(frame.columns) == COLUMNS
    assert frame["latency_ms"].sum() == pytest.approx(taken.end_to_end_ms)
    assert frame["share"].sum() == pytest.approx(1.0)
    assert frame["type"].iloc[-1] == "unattributed"


def test_every_weighted_layer_is_in_it_once_with_its_macs(taken):
    frame = taken.frame()
    model = wb.load("lenet5")
    layers = model.layers
    assert frame["macs"].sum() == 2 * layers["macs"].sum()
    assert frame["parameters"].sum() == model.parameters
    named = " + ".join(frame["layer"])
    for layer in layers.loc[layers["parameters"] > 0, "layer"]:
        assert layer in named


def test_a_quantised_graph_is_profiled_under_the_layers_of_the_network(digits_study):
    model = digits_study.run([wb.Quantize("int8")], on=wb.OnnxRuntime()).model()
    frame = wb.profile(model, on=wb.OnnxRuntime(), repeats=10).frame()
    named = " + ".join(frame["layer"])
    for layer in wb.load("lenet5").layers.query("parameters > 0")["layer"]:
        assert layer in named


@pytest.mark.parametrize("bad", [{"batch": 0}, {"repeats": 0}])
def test_nonsense_counts_are_refused(bad):
    with pytest.raises(DataError, match="at least 1"):
        wb.profile(wb.load("lenet5"), **bad)


@pytest.mark.parametrize(
    ("levels_ms", "blocks"),
    [
        ([1.0, 1.0, 1.0], [0, 1]),
        ([1.0, 1.02, 0.99], [0, 1]),
        ([1.0, 1.7, 1.7, 1.7], [1, 2]),  # the pace changed during the first block
        ([1.0, 1.0, 1.7, 1.0, 1.0, 1.0], [0, 3, 4]),
        ([1.0, 1.0, 1.7, 1.7], [0]),  # one block at each pace: they are not mixed
        ([1.0, 1.5, 1.0], []),
    ],
)
def test_blocks_count_where_plain_calls_around_them_went_at_one_pace(levels_ms, blocks):
    assert steady(levels_ms) == blocks


def test_a_model_that_fails_half_way_is_profiled_up_to_there():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            x = torch.relu(self.first(x))
            return self.second(x.reshape(2, 4))  # any other batch does not fit

    with pytest.raises(ProfileError, match=r"fails in .*reshape") as failure:
        wb.profile(wb.load(Fails(), inputs=torch.randn(2, 4)), batch=3)
    assert [row.name for row in failure.value.rows] == ["first", "relu"]
    assert all(min(row.times_ms) > 0 for row in failure.value.rows)

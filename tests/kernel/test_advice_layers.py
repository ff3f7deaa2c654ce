"""Advice about single layers fires where its evidence is, with the saving the profile allows, and not elsewhere."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pandas as pd
import pytest
from _hand_profiles import AVX2, AVX512, conv, found, op, profile, tensor

import workbench as wb
from workbench.deployment import OpTiming
from workbench.errors import DataError
from workbench.profiling import Profile, _call_rules
from workbench.profiling.advice import advice


@pytest.fixture(autouse=True)
def nothing_to_install(monkeypatch):
    """What this machine lacks is no part of these profiles."""
    monkeypatch.setattr(_call_rules, "doctor", list)


@dataclass
class Under:
    """A roofline with these bounds and attainable times, one for each row of a profile and none for the rest."""

    of: Profile
    bound: list[str]
    attainable_ms: list[float]

    def frame(self) -> pd.DataFrame:
        return self.of.frame().assign(bound=[*self.bound, "unknown"], attainable_ms=[*self.attainable_ms, math.nan])


# memory-bound layers


def test_a_memory_bound_product_saves_at_most_what_is_beyond_its_bytes_in_int8():
    fc = op(
        "fc", 4.0, "Gemm", macs=1e6, parameters=10**6, weight_bytes=4 * 10**6,
        reads=(tensor("in", (1, 1000)),), writes=(tensor("out", (1, 1000)),),
    )  # fmt: skip
    p = profile(fc)
    row = found(p, "Memory-bound", roofline=Under(p, ["memory"], [2.0])).iloc[0]
    assert row["saving_ms"] == pytest.approx(4.0 - 2.0 / 4)
    assert row["layer"] == "fc"
    assert "weights" in row["what_to_do"]
    assert "100.0 % of the call" in row["evidence"]


def test_a_memory_bound_activation_saves_at_most_all_of_it():
    p = profile(conv("conv1", 1.0, 16, 16), op("relu", 1.0, "Relu", macs=0.0, parameters=0))
    row = found(p, "Memory-bound", roofline=Under(p, ["compute", "memory"], [0.5, 0.25])).iloc[0]
    assert (row["layer"], row["saving_ms"]) == ("relu", 1.0)
    assert "fuses it" in row["what_to_do"]


def test_what_is_not_memory_bound_or_runs_from_the_cache_or_is_no_layer_is_left_alone():
    p = profile(
        conv("conv1", 1.0, 16, 16), conv("conv2", 1.0, 16, 16, source="conv1"), op("r", 0.01, "Reorder", kind="move")
    )
    assert found(p, "Memory-bound", roofline=Under(p, ["compute", "memory", "memory"], [0.5, 1.5, 0.001])).empty
    assert found(p, "Memory-bound").empty


def test_the_roofline_of_another_profile_is_refused():
    p, other = profile(conv("conv1", 1.0, 16, 16)), profile(conv("conv1", 2.0, 16, 16))
    with pytest.raises(DataError, match=r"another profile.*wb\.profiling\.roofline\(profile\)"):
        advice(p, roofline=Under(other, ["memory"], [0.1]))


# layers that fell back


def test_a_layer_in_fp32_of_an_int8_model_is_held_against_the_rate_of_its_int8_layers():
    p = profile(
        conv("conv1", 1.0, 16, 16, precision="int8"),
        conv("conv2", 3.0, 16, 16, source="conv1"),
        precision="int8",
    )
    row = found(p, "Layer fell back to fp32").iloc[0]
    assert row["layer"] == "conv2"
    assert row["saving_ms"] == pytest.approx(2.0)  # the same work took the int8 layer 1 ms
    assert "75.0 % of the call" in row["evidence"]


def test_without_an_int8_layer_to_compare_with_the_saving_is_unknown():
    p = profile(conv("conv1", 3.0, 16, 16), precision="int8")
    assert math.isnan(found(p, "Layer fell back")["saving_ms"].iloc[0])


def test_layers_in_the_models_precision_and_layers_without_products_did_not_fall_back():
    half = profile(conv("conv1", 1.0, 16, 16, precision="bf16"), op("softmax", 1.0, "Softmax"), precision="fp16")
    assert found(half, "Layer fell back").empty
    assert found(profile(conv("conv1", 1.0, 16, 16)), "Layer fell back").empty


# channels


def test_channels_that_leave_vectors_empty_are_held_against_the_rate_of_aligned_layers():
    p = profile(
        conv("conv1", 1.0, 3, 32),
        conv("conv2", 1.0, 32, 32, source="conv1"),
        conv("conv3", 1.2, 32, 20, source="conv2"),
        conv("conv4", 1.0, 32, 10, source="conv2"),
    )
    rows = found(p, "Channels")
    # 3 inputs and 10 outputs are given by the data
    assert list(rows["layer"]) == ["conv3"]
    # filled up to 32 it would do the work of conv2, at best in its time
    assert rows["saving_ms"].iloc[0] == pytest.approx(0.2)
    assert "20 output channels" in rows["evidence"].iloc[0]
    assert "Use 16 or 32 output channels" in rows["what_to_do"].iloc[0]


def test_an_unaligned_layer_that_is_as_fast_as_an_aligned_one_is_left_alone():
    p = profile(
        conv("conv1", 1.0, 16, 32), conv("conv2", 1.0, 32, 32, source="conv1"), conv("conv3", 0.6, 32, 20),
        conv("conv4", 1.0, 32, 32, source="conv2"),
    )  # fmt: skip
    assert found(p, "Channels").empty


@pytest.mark.parametrize(("isa", "wanted"), [(AVX512, "16 or 32"), (AVX2, "16 or 24")])
def test_the_width_to_use_is_that_of_the_processors_registers(isa, wanted):
    p = profile(conv("conv1", 1.0, 16, 20), conv("conv2", 1.0, 20, 16, source="conv1"), environment=isa)
    rows = found(p, "Channels")
    assert list(rows["layer"]) == ["conv1", "conv2"]
    assert all(text.startswith(f"Use {wanted} ") for text in rows["what_to_do"])
    assert rows["saving_ms"].isna().all()  # no aligned layer to compare with


@pytest.mark.parametrize(("precision", "multiple"), [("fp16", 8), ("int8", 16)])
def test_tensor_cores_have_widths_of_their_own(precision, multiple):
    p = profile(
        conv("conv1", 1.0, 3, 40, precision=precision),
        conv("conv2", 1.0, 40, 20, precision=precision),
        conv("conv3", 1.0, 40, 10, precision=precision),
        backend_label="TensorRT",
        environment=None,
        precision=precision,
    )
    rows = found(p, "Channels")
    assert all(f"round_to={multiple})" in text for text in rows["what_to_do"])
    assert ("conv1" in set(rows["layer"])) == (multiple == 16)


@pytest.mark.parametrize("about", [{"environment": None}, {"backend_label": "OpenVINO, GPU, 1 thread"}])
def test_nothing_is_said_of_channels_where_the_width_of_the_device_is_not_known(about):
    assert found(profile(conv("conv1", 1.0, 16, 20), conv("conv2", 1.0, 20, 16), **about), "Channels").empty


def test_channels_last_are_told_from_channels_first_by_parameters_and_macs():
    last = replace(
        conv("conv1", 1.0, 16, 20), reads=(tensor("in", (1, 8, 8, 16)),), writes=(tensor("conv1", (1, 8, 8, 20)),)
    )
    evidence = found(profile(last, conv("conv2", 1.0, 16, 16)), "Channels")["evidence"].iloc[0]
    assert "20 output channels" in evidence


def test_a_shape_that_fits_neither_order_of_axes_is_left_alone():
    unknown = replace(conv("conv1", 1.0, 16, 20), parameters=17)
    assert found(profile(unknown, conv("conv2", 1.0, 16, 16)), "Channels").empty


def test_the_models_layers_say_the_width_where_the_engine_pads():
    """LeNet-5's 6 channels are padded to 16 in ONNX Runtime's blocked layout."""
    model = wb.load("lenet5")
    padded = OpTiming(
        "conv1_nchwc", "Conv", ("conv1", "relu1"), (1.0,),
        reads=(tensor("in", (1, 1, 28, 28)),), writes=(tensor("conv1", (1, 16, 28, 28)),), weight_bytes=1664,
        precision="fp32", macs=117600.0, parameters=156,
    )  # fmt: skip
    p = profile(padded, conv("other", 1.0, 16, 16))
    row = found(p, "Channels", model=model).iloc[0]
    assert "6 output channels" in row["evidence"]
    assert row["what_to_do"] == "Use 16 output channels."  # pruning makes no layer wider
    assert found(p, "Channels").empty  # 156 parameters are no number of weights for 16 channels


# tiny layers


def small(name: str, ms: float, size: int) -> OpTiming:
    return op(
        name, ms, "Flatten", macs=0.0, parameters=0, weight_bytes=0,
        reads=(tensor("a", (1, size)),), writes=(tensor(name, (1, size)),),
    )  # fmt: skip


def test_a_layer_with_much_time_and_little_work_costs_its_launch():
    p = profile(conv("conv1", 0.9, 64, 64), small("flatten", 0.1, 4))
    rows = found(p, "A tiny layer")
    assert list(rows["layer"]) == ["flatten"]
    assert list(rows["saving_ms"]) == [pytest.approx(0.1)]
    assert "10.0 % of the call, with 0.00 % of the MACs" in rows["evidence"].iloc[0]


def test_a_layer_that_moves_its_share_of_bytes_is_not_tiny():
    p = profile(conv("conv1", 0.9, 64, 64), small("flatten", 0.1, 64 * 64))
    assert found(p, "A tiny layer").empty


def test_where_bytes_are_not_known_no_layer_is_called_tiny():
    p = profile(conv("conv1", 0.9, 64, 64), op("flatten", 0.1, "Flatten", macs=0.0))
    assert found(p, "A tiny layer").empty


# grouped convolutions


def test_a_depthwise_convolution_is_held_against_the_rate_of_ordinary_ones():
    p = profile(conv("conv1", 4.0, 64, 64), conv("dw", 2.0, 64, 64, groups=64))
    rows = found(p, "Grouped convolution")
    assert list(rows["layer"]) == ["dw"]
    assert rows["saving_ms"].iloc[0] == pytest.approx(2.0 - 4.0 / 64)
    assert "32 × fewer MACs" in rows["evidence"].iloc[0]


def test_a_depthwise_convolution_that_keeps_up_is_left_alone():
    p = profile(conv("conv1", 4.0, 64, 64), conv("dw", 0.24, 64, 64, groups=64))
    assert found(p, "Grouped convolution").empty

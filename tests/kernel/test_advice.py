"""Advice on what lies between and around the layers, and its table; the rules about layers have a file of their own."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from _hand_profiles import conv, found, op, profile, tensor

import workbench as wb
from workbench.deployment import OpTiming
from workbench.deployment.doctor import Row
from workbench.profiling import Profile, _call_rules
from workbench.profiling.advice import RULES, advice
from workbench.profiling.tensorrt import read_tensorrt


@pytest.fixture(autouse=True)
def nothing_to_install(monkeypatch):
    """What this machine lacks is no part of these profiles."""
    monkeypatch.setattr(_call_rules, "doctor", list)


def test_a_profile_without_faults_gets_no_advice():
    clean = advice(profile(conv("conv1", 1.0, 16, 16), conv("conv2", 1.0, 16, 32, source="conv1")))
    assert list(clean.columns) == ["finding", "evidence", "what_to_do", "saving_ms", "layer"]
    assert clean.empty
    assert clean["saving_ms"].dtype == float


def test_rows_come_by_falling_saving_with_the_unknown_last():
    p = profile(
        op("(call)", 3.0, "call", kind="call"),
        op("swap", 1.0, "Transpose", kind="move"),
        conv("conv1", 6.0, 16, 16),
        contended=True,
    )
    frame = advice(p)
    assert list(frame["finding"]) == [
        "Entering and leaving the engine costs much",
        "Time goes into reformatting",
        "The machine was busy",
    ]
    assert list(frame["saving_ms"])[:2] == [3.0, 1.0]
    assert math.isnan(frame["saving_ms"].iloc[2])


def test_every_rule_says_its_reason():
    assert all(len(rule.__doc__.split()) > 10 for rule in RULES)


# Q/DQ pairs


def quantiser(name: str, source: str, target: str, ms: float, *, back: bool = False) -> OpTiming:
    kinds = ("int8", "float32") if back else ("float32", "int8")
    ports = tensor(source, dtype=kinds[0]), tensor(target, dtype=kinds[1])
    type_ = "DequantizeLinear" if back else "QuantizeLinear"
    return op(name, ms, type_, kind="move", reads=ports[:1], writes=ports[1:])


def chain(*operations: OpTiming) -> Profile:
    return profile(*operations, precision="int8")


def int8(name: str, source: str) -> OpTiming:
    return op(name, 1.0, precision="int8", reads=(tensor(source),), writes=(tensor(name),), macs=0.0)


def test_a_quantiser_between_two_int8_layers_blocks_a_fusion_and_those_at_the_edges_do_not():
    p = chain(
        quantiser("q0", "in", "a", 0.5),
        int8("conv1", "a"),
        quantiser("q1", "conv1", "b", 0.25),
        int8("conv2", "b"),
        quantiser("dq", "conv2", "out", 0.5, back=True),
    )
    rows = found(p, "Q/DQ")
    assert list(rows["layer"]) == ["conv1 + conv2"]
    assert rows["saving_ms"].iloc[0] == pytest.approx(0.25)
    assert rows["evidence"].iloc[0].startswith("q1 stands between conv1, conv2, all int8")


def test_a_pair_around_a_single_float_operation_is_one_finding_with_the_time_of_both():
    p = chain(
        int8("conv1", "in"),
        quantiser("dq", "conv1", "a", 0.125, back=True),
        op("pool", 1.0, "MaxPool", reads=(tensor("a"),), writes=(tensor("b"),)),
        quantiser("q", "b", "c", 0.25),
        int8("conv2", "c"),
    )
    rows = found(p, "Q/DQ")
    assert list(rows["layer"]) == ["pool"]
    assert rows["saving_ms"].iloc[0] == pytest.approx(0.375)
    assert rows["what_to_do"].iloc[0] == "Quantise pool too, so that its neighbours pass int8 on."


def test_a_pair_around_a_longer_stretch_of_float_is_a_choice_and_not_a_fault():
    p = chain(
        int8("conv1", "in"),
        quantiser("dq", "conv1", "a", 0.5, back=True),
        op("softmax", 1.0, "Softmax", reads=(tensor("a"),), writes=(tensor("b"),)),
        op("norm", 1.0, "LayerNormalization", reads=(tensor("b"),), writes=(tensor("c"),)),
        quantiser("q", "c", "d", 0.5),
        int8("conv2", "d"),
    )
    assert found(p, "Q/DQ").empty


def test_reading_numbers_as_bytes_and_writing_them_as_floats_is_dequantising_whatever_its_name():
    convert = op(
        "Convert_7", 0.5, "Convert", kind="move", reads=(tensor("conv1", dtype="uint8"),), writes=(tensor("a"),)
    )
    p = chain(int8("conv1", "in"), convert, int8("conv2", "a"))
    assert list(found(p, "Q/DQ")["saving_ms"]) == [0.5]
    assert found(p, "Time goes into reformatting").empty


def test_a_copy_named_after_a_quantised_layer_is_a_copy():
    copy = op("Reformatting copy for fc + QuantizeLinear_9", 0.5, "Reformat", kind="move", reads=(tensor("conv1"),))
    p = chain(int8("conv1", "in"), replace(copy, writes=(tensor("a"),)), int8("conv2", "a"))
    assert found(p, "Q/DQ").empty
    assert len(found(p, "Time goes into reformatting")) == 1


def test_quantising_residual_branches_is_what_nvidias_own_comparison_found(shared_data):
    """Its ResNet-18 has a loose quantiser after each residual block, and none where the residuals are quantised too."""
    loose = {}
    for engine in ("qat", "qat-residual"):
        rows = found(read_tensorrt(shared_data / "trex" / "resnet18-a100" / engine), "Q/DQ")
        loose[engine] = sum(" Add_" in layer and ".conv1" in layer for layer in rows["layer"])
    assert loose == {"qat": 7, "qat-residual": 0}


# reformatting


def test_reformatting_is_one_finding_with_its_total_and_its_worst_under_the_layer_it_serves():
    p = profile(
        op("to_blocks", 0.25, "ReorderInput", kind="move", reads=(tensor("in"),), writes=(tensor("a"),)),
        conv("conv1", 9.0, 16, 16, source="a"),
        op("back", 0.75, "ReorderOutput", kind="move", reads=(tensor("conv1"),), writes=(tensor("out"),)),
    )
    rows = found(p, "Time goes into reformatting")
    assert len(rows) == 1
    assert rows["saving_ms"].iloc[0] == pytest.approx(1.0)
    assert rows["evidence"].iloc[0].startswith("2 operations")
    assert "the longest is back, 0.750 ms" in rows["evidence"].iloc[0]
    assert rows["layer"].iloc[0] == "conv1"


def test_a_reformat_of_under_a_hundredth_of_the_call_is_left_alone():
    p = profile(conv("conv1", 9.99, 16, 16), op("back", 0.01, "ReorderOutput", kind="move"))
    assert found(p, "Time goes into reformatting").empty


# what lies around the layers


def test_time_between_the_layers_is_named_from_fifteen_per_cent_on():
    much = found(profile(conv("conv1", 8.0, 16, 16), whole_ms=10.0), "Much time between")
    assert list(much["saving_ms"]) == [pytest.approx(2.0)]
    assert list(much["layer"]) == [""]
    assert found(profile(conv("conv1", 9.0, 16, 16), whole_ms=10.0), "Much time between").empty


def test_a_call_that_costs_little_is_left_alone():
    p = profile(op("(call)", 0.05, "call", kind="call"), conv("conv1", 0.95, 16, 16))
    assert found(p, "Entering").empty


def test_rows_far_over_the_call_are_to_be_measured_again():
    rows = found(profile(conv("conv1", 12.0, 16, 16), whole_ms=10.0), "The rows add up")
    assert "2.00 ms over, 20.0 % of the call" in rows["evidence"].iloc[0]
    assert rows["saving_ms"].isna().all()


def test_an_engine_that_does_not_load_is_named_with_the_line_that_puts_it_right(monkeypatch):
    listed = [
        Row("OnnxRuntime(provider='cuda')", "ONNX Runtime, CUDA", False, "libcudnn.so.9 is missing", "pip install it"),
        Row("OpenVINO()", "OpenVINO", True, "", ""),
        Row("Compiled()", "torch.compile", False, "there is no GPU", ""),
    ]
    monkeypatch.setattr(_call_rules, "doctor", lambda: listed)
    p = profile(conv("conv1", 1.0, 16, 16))
    rows = advice(p)
    assert list(rows["finding"]) == ["ONNX Runtime, CUDA does not load"]
    assert rows["evidence"].iloc[0] == "libcudnn.so.9 is missing."
    assert rows["what_to_do"].iloc[0] == "Run: pip install it"
    # what this machine lacks says nothing of a profile that was recorded elsewhere
    assert advice(replace(p, environment=None)).empty


def test_a_real_profile_passes_through_every_rule():
    model = wb.load("lenet5")
    p = wb.profile(model, on=wb.OnnxRuntime(threads=1), repeats=5)
    frame = advice(p, model=model)
    assert (frame["saving_ms"].dropna() <= p.frame()["latency_ms"].abs().sum()).all()
    assert (frame["saving_ms"].dropna() >= 0).all()
    assert frame["evidence"].str.len().gt(0).all()

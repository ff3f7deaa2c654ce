"""Recorded TensorRT engines open as profiles, and what is wrong with a recording is said."""

from __future__ import annotations

import json
import math
import shutil

import pytest
from _resnet18 import MACS, PARAMETERS, PUBLISHED

from workbench.errors import LoadError
from workbench.profiling.tensorrt import read_tensorrt


@pytest.fixture(scope="module")
def recorded(shared_data):
    return shared_data / "trex" / "resnet18-a100"


@pytest.fixture(scope="module")
def profiles(recorded):
    return {name: read_tensorrt(recorded / name) for name in PUBLISHED}


@pytest.mark.parametrize("name", PUBLISHED)
def test_an_engine_keeps_its_published_latency_and_adds_up(profiles, name):
    profile = profiles[name]
    frame = profile.frame()
    assert round(profile.end_to_end_ms, 3) == PUBLISHED[name]
    assert frame["latency_ms"].sum() == pytest.approx(profile.end_to_end_ms)
    assert frame["share"].sum() == pytest.approx(1.0)
    assert math.isnan(profile.overhead_ms)
    assert profile.environment is None
    assert profile.batch == 32
    assert "A100" in profile.backend_label


@pytest.mark.parametrize("name", PUBLISHED)
def test_macs_and_parameters_are_those_of_the_architecture(profiles, name):
    frame = profiles[name].frame()
    computing = frame[frame["kind"] == "layer"]
    assert computing["macs"].sum() == 32 * sum(MACS.values())
    assert computing["parameters"].sum() == sum(PARAMETERS.values())
    if name.startswith("qat"):  # whose weights name the modules
        first = computing["layer"].str.split(" + ", regex=False).str[0]
        weighted = computing[computing["parameters"] > 0].assign(path=first).set_index("path")
        assert weighted["macs"].to_dict() == {path: 32 * macs for path, macs in MACS.items()}
        assert weighted["parameters"].to_dict() == PARAMETERS


def test_every_row_of_the_profiler_is_a_row_with_its_time(recorded, profiles):
    for name, profile in profiles.items():
        times = {r["name"]: r["medianMs"] for r in json.loads((recorded / name / "profile.json").read_text())[1:]}
        assert {o.name: o.times_ms for o in profile.operations} == {key: (ms,) for key, ms in times.items()}


def test_layers_are_module_paths_where_weights_tell_and_else_onnx_nodes(profiles):
    fp16 = {o.name: o.layers for o in profiles["fp16"].operations}
    qat = {o.name: o.layers for o in profiles["qat"].operations}
    assert fp16["Conv_3 + Relu_4"] == ("Conv_3", "Relu_4")
    assert qat["layer1.0.conv1.weight + QuantizeLinear_20 + Conv_22"] == ("layer1.0.conv1",)
    name = "layer1.0.conv2.weight + QuantizeLinear_32 + Conv_34 + Add_36 + Relu_37"
    assert qat[name] == ("layer1.0.conv2", "Add_36", "Relu_37")
    assert next(layers for key, layers in qat.items() if key.startswith("fc.weight")) == ("fc",)


def test_moves_are_rows_of_their_own_under_the_layer_they_serve(profiles):
    rows = {o.name: o for o in profiles["qat"].operations}
    assert {o.type for o in rows.values() if o.kind == "move"} == {"Reformat", "NoOp"}
    # made for a layer; between two layers, of which the first writes the numbers; at the input
    assert rows["Reformatting CopyNode for Input Tensor 0 to GlobalAveragePool_246"].layers == (
        "GlobalAveragePool_246",
    )
    assert rows["QuantizeLinear_40"].layers == ("layer1.0.conv2", "Add_36", "Relu_37")
    assert rows["QuantizeLinear_2"].layers == ("conv1",)
    assert all(o.macs == 0 for o in rows.values() if o.kind == "move")


def test_precision_and_bytes_are_those_of_the_formats(profiles):
    assert {name: profile.precision for name, profile in profiles.items()} == {
        "fp32": "fp32", "fp16": "fp16", "qat": "int8", "qat-residual": "int8", "qat-residual-qgap": "int8",
    }  # fmt: skip
    for name, width in (("fp32", 4), ("fp16", 2)):
        frame = profiles[name].frame().set_index("name")
        row = frame.loc["Conv_3 + Relu_4"]
        assert row["read_bytes"] == width * (32 * 64 * 56 * 56 + 64 * 64 * 9 + 64)
        assert row["written_bytes"] == width * 32 * 64 * 56 * 56


def test_tensors_tie_the_rows_into_the_graph(profiles):
    profile = profiles["qat-residual"]
    number = {operation.layers[0]: i for i, operation in enumerate(profile.operations) if operation.kind == "layer"}
    edges = set(profile.edges)
    for block in ("layer2.0", "layer3.0", "layer4.0"):
        assert (number[f"{block}.conv1"], number[f"{block}.conv2"]) in edges
        assert (number[f"{block}.downsample.0"], number[f"{block}.conv2"]) in edges
    # every row reads from a row before it, but the first, which reads the input
    assert {reader for _, reader in edges} == set(range(1, len(profile.operations)))


@pytest.fixture
def folder(tmp_path):
    """A recording of two layers, to be spoiled."""
    tensor = {"Location": "Device", "Format/Datatype": "Row major linear FP32"}
    convolution = {
        "Name": "/block/conv/Conv + /block/Relu", "LayerType": "CaskConvolution", "ParameterType": "Convolution",
        "Inputs": [tensor | {"Name": "x", "Dimensions": [2, 8, 10, 12]}],
        "Outputs": [tensor | {"Name": "y", "Dimensions": [2, 16, 8, 5]}],
        "Kernel": [3, 3], "Stride": [1, 2], "OutMaps": 16, "Groups": 4,
        "Weights": {"Type": "Half", "Count": 16 * 2 * 9}, "Bias": {"Type": "Half", "Count": 16},
        "Metadata": "[ONNX Layer: /block/conv/Conv]\u001e[ONNX Layer: /block/Relu]",
    }  # fmt: skip
    pooling = {
        "Name": "/MaxPool", "LayerType": "CaskPooling", "ParameterType": "Pooling", "WindowSize": [2, 2],
        "Inputs": [tensor | {"Name": "y", "Dimensions": [2, 16, 8, 5]}],
        "Outputs": [tensor | {"Name": "z", "Dimensions": [2, 16, 4, 2]}],
    }  # fmt: skip
    write(tmp_path / "graph.json", {"Layers": [convolution, pooling], "Bindings": ["x", "z"]})
    times = [("/block/conv/Conv + /block/Relu", 0.25), ("/MaxPool", 0.125)]
    write(
        tmp_path / "profile.json", [{"count": 10}] + [{"name": n, "averageMs": ms, "medianMs": ms} for n, ms in times]
    )
    return tmp_path


def write(path, value):
    path.write_text(json.dumps(value))


def change(path, edit):
    value = json.loads(path.read_text())
    edit(value)
    write(path, value)


def test_without_metadata_the_rows_are_the_whole(folder):
    profile = read_tensorrt(folder)
    assert profile.end_to_end_ms == 0.375
    assert profile.unattributed_ms == 0
    assert profile.batch == 2
    assert profile.model_name == folder.name


def test_a_grouped_convolution_counts_its_own_channels(folder):
    row = read_tensorrt(folder).operations[0]
    # each of 16 maps of 8 × 5 pixels sees 2 of the 8 channels through 3 × 3
    assert row.macs == 2 * 16 * 8 * 5 * 2 * 9
    assert row.parameters == 16 * 2 * 9 + 16
    assert row.weight_bytes == 2 * row.parameters
    assert row.kernel == (3, 3)


def test_a_transposed_convolution_counts_the_pixels_it_reads(folder):
    change(folder / "graph.json", lambda g: g["Layers"][0].update(LayerType="CaskDeconvolutionV2"))
    assert read_tensorrt(folder).operations[0].macs == 2 * 16 * 10 * 12 * 2 * 9


def test_metadata_names_layers_and_a_module_with_parts_gets_the_operation(folder):
    assert read_tensorrt(folder).operations[0].layers == ("block.conv", "block.relu")
    assert read_tensorrt(folder).operations[1].layers == ("maxpool",)


def test_open_shapes_and_unknown_formats_leave_numbers_out(folder):
    def spoil(graph):
        for port in graph["Layers"][0]["Inputs"]:
            port |= {"Dimensions": [-1, 8, 10, 12], "Format/Datatype": "N/A due to dynamic shapes"}

    change(folder / "graph.json", spoil)
    profile = read_tensorrt(folder)
    assert profile.operations[0].reads[0].shape == (None, 8, 10, 12)
    assert profile.operations[0].macs is None
    assert math.isnan(profile.frame()["read_bytes"][0])
    assert profile.operations[0].precision == "fp16"  # that of its weights


def test_an_engine_that_only_names_its_layers_still_has_them(recorded, profiles, tmp_path):
    for name in ("fp16", "qat"):
        folder = shutil.copytree(recorded / name, tmp_path / name, copy_function=shutil.copyfile)
        folder.chmod(0o755)
        change(folder / "graph.json", lambda g: g.update(Layers=[layer["Name"] for layer in g["Layers"]]))
        profile = read_tensorrt(folder)
        assert profile.end_to_end_ms == profiles[name].end_to_end_ms
        assert [o.times_ms for o in profile.operations] == [o.times_ms for o in profiles[name].operations]
        for plain, detailed in zip(profile.operations, profiles[name].operations, strict=True):
            if detailed.kind == "layer":
                assert (plain.kind, plain.layers) == ("layer", detailed.layers)
                assert plain.macs is None
        assert {o.type for o in profile.operations if o.kind == "layer"} == {
            "Conv",
            "MaxPool",
            "GlobalAveragePool",
            "Gemm",
        }


@pytest.mark.parametrize(
    ("record", "expected_ms"),
    [
        ({"averageMs": 0.5}, 0.5),
        ({"averageMs": 0.5, "medianMs": 0.4}, 0.4),
        ({"timeMs": 5, "percentage": 80}, 0.5),
    ],
)
def test_the_median_counts_then_the_mean_then_the_total_over_the_iterations(folder, record, expected_ms):
    change(folder / "profile.json", lambda p: p.__setitem__(1, {"name": p[1]["name"]} | record))
    assert read_tensorrt(folder).operations[0].times_ms == (expected_ms,)


def test_a_profile_may_begin_without_the_count_of_iterations(folder):
    change(folder / "profile.json", lambda p: p.pop(0))
    assert read_tensorrt(folder).end_to_end_ms == 0.375


def test_a_layer_the_graph_does_not_describe_is_unknown_and_keeps_its_time(folder):
    change(folder / "profile.json", lambda p: p.insert(2, {"name": "surprise", "averageMs": 0.1}))
    profile = read_tensorrt(folder)
    assert [(o.name, o.kind, o.times_ms) for o in profile.operations][1] == ("surprise", "unknown", (0.1,))
    assert profile.end_to_end_ms == pytest.approx(0.475)


def test_latency_measured_with_the_profiler_on_is_not_taken(folder):
    about = {
        "performance_summary": {"Latency": [0.2, 0.4, 0.3, 0.3, 0.4]},
        "inference_options": {"Separate profiling": "Enabled", "Batch": "Explicit"},
    }
    write(folder / "profile.metadata.json", about)
    assert read_tensorrt(folder).end_to_end_ms == 0.3
    about["inference_options"]["Separate profiling"] = "Disabled"
    write(folder / "profile.metadata.json", about)
    assert read_tensorrt(folder).end_to_end_ms == 0.375


def layer(**fields):
    return lambda graph: graph["Layers"][0].update(fields)


def record(**fields):
    return lambda profile: profile[1].update(fields)


@pytest.mark.parametrize(
    ("file", "edit", "expected"),
    [
        ("graph.json", layer(Inputs={"Name": "x"}), r"graph.json, layer 0 .*Inputs is .* where a list is expected"),
        ("graph.json", layer(Kernel=[3, "3"]), r"layer 0 .*Kernel is .* whole numbers"),
        ("graph.json", layer(Weights={"Count": -1}), r"layer 0 .*Weights: Count is -1"),
        ("graph.json", layer(Weights={"Count": 10**20}), r"Count is 1000.* whole number from 0 to"),
        ("graph.json", layer(Outputs=[{"Dimensions": [2, 10**18]}]), r"Outputs\[0\]: Dimensions is .* lengths"),
        ("graph.json", layer(Name=7), r"layer 0: Name is 7, where a text"),
        ("graph.json", layer(Name=""), r"layer 0 has no Name"),
        ("graph.json", lambda g: g["Layers"].append(3), r"layer 2 is 3, where an object is expected"),
        ("graph.json", lambda g: g.update(Layers=[]), r"lists no layers.*profilingVerbosity=detailed"),
        ("graph.json", lambda g: g.pop("Layers"), r"no list of Layers.*exportLayerInfo"),
        ("profile.json", record(medianMs=-1), r"profile.json, record 1 .*medianMs is -1"),
        ("profile.json", record(medianMs=math.nan), r"record 1 .*medianMs is nan"),
        ("profile.json", record(medianMs="0.1"), r"medianMs is '0.1', where a time"),
        ("profile.json", record(medianMs=True), r"medianMs is True"),
        ("profile.json", lambda p: [r.pop(k) for r in p[1:] for k in ("averageMs", "medianMs")], r"neither medianMs"),
        ("profile.json", lambda p: p.pop(), r"graph.json, layer 1 \('/MaxPool'\) has no time in profile.json"),
        ("profile.json", lambda p: [r.update(name=f"other {i}") for i, r in enumerate(p) if i], r"of two engines"),
        ("profile.json", lambda p: p[2].pop("name"), r"record 2 has no name"),
        ("profile.json", lambda p: [r.update(averageMs=0, medianMs=0) for r in p[1:]], r"all times are 0"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_place(folder, file, edit, expected):
    change(folder / file, edit)
    with pytest.raises(LoadError, match=expected):
        read_tensorrt(folder)


@pytest.mark.parametrize(
    ("about", "expected"),
    [
        ({"performance_summary": {"Latency": [1.0, 2.0]}}, "minimum, maximum and mean"),
        ({"performance_summary": {"Latency": [1.0, 2.0, 3.0]}}, "minimum, maximum and mean"),
        ({"performance_summary": []}, "profile.metadata.json, performance_summary is .* object"),
        ({"inference_options": {"Batch": "32"}}, "no batch axis"),
    ],
)
def test_metadata_that_contradicts_itself_is_refused(folder, about, expected):
    write(folder / "profile.metadata.json", about)
    with pytest.raises(LoadError, match=expected):
        read_tensorrt(folder)


@pytest.mark.parametrize("file", ["graph.json", "profile.json"])
def test_a_file_that_was_cut_off_is_named_with_line_and_column(folder, file):
    text = (folder / file).read_text()
    (folder / file).write_text(text[: len(text) // 2])
    with pytest.raises(LoadError, match=rf"{file} is no JSON from line 1, column \d+"):
        read_tensorrt(folder)


@pytest.mark.parametrize("data", [b"\xff\xfe\x00binary", b"[" * 200_000, b"1" * 10_000])
def test_a_file_that_is_no_json_is_refused(folder, data):
    (folder / "graph.json").write_bytes(data)
    with pytest.raises(LoadError, match="graph.json"):
        read_tensorrt(folder)


def test_a_missing_file_is_named_with_what_is_there(folder):
    (folder / "graph.json").rename(folder / "resnet.graph.json")
    with pytest.raises(LoadError, match=r"no file graph.json.*resnet.graph.json.*graph=…"):
        read_tensorrt(folder)
    assert read_tensorrt(folder, graph="resnet.graph.json").end_to_end_ms == 0.375
    with pytest.raises(LoadError, match="is no folder"):
        read_tensorrt(folder / "nowhere")


def test_a_file_past_one_gigabyte_is_refused_unread(folder):
    with (folder / "graph.json").open("wb") as file:
        file.truncate(10**9 + 1)
    with pytest.raises(LoadError, match="at most 1 GB"):
        read_tensorrt(folder)


def test_files_of_two_engines_do_not_open_as_one(recorded, tmp_path):
    shutil.copyfile(recorded / "qat" / "graph.json", tmp_path / "graph.json")
    shutil.copyfile(recorded / "fp16" / "profile.json", tmp_path / "profile.json")
    with pytest.raises(LoadError, match="engines|one engine"):
        read_tensorrt(tmp_path)

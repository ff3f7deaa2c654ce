"""Engines of one network meet at the same layers: recorded ones against the architecture, and those that run here."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from functools import cache

import numpy as np
import pytest
from _alignments import check, made, op, pairs
from _resnet18 import BLOCKS, CONVOLUTIONS, PUBLISHED

import workbench as wb
from workbench.profiling.align import align
from workbench.profiling.tensorrt import read_tensorrt

# The exporter numbers nodes in the order of the forward pass: a block's two convolutions, then its shortcut's, then
# the sum. So the k-th convolution by number is the k-th of the architecture, whatever the engine made of it.
ORDER = [path for path, *_ in CONVOLUTIONS] + ["fc"]


@pytest.fixture(scope="module")
def engines(shared_data):
    return {name: read_tensorrt(shared_data / "trex" / "resnet18-a100" / name) for name in PUBLISHED}


def architecture(profile):
    """The architecture's layer of each weighted or pooling row, by row number; a row of a fused pooling has two."""
    numbers = {"Conv": set(), "Pool": set()}
    parts = {}
    for index, operation in enumerate(profile.operations):
        if operation.kind != "layer":
            continue
        parts[index] = re.findall(r"\b(Conv|Gemm|MaxPool|GlobalAveragePool)_(\d+)", operation.name)
        for kind, number in parts[index]:
            numbers["Pool" if "Pool" in kind else "Conv"].add(int(number))
    names = {
        kind: dict(zip(sorted(found), ORDER if kind == "Conv" else ["maxpool", "avgpool"], strict=True))
        for kind, found in numbers.items()
    }
    return {
        index: {names["Pool" if "Pool" in kind else "Conv"][int(number)] for kind, number in found}
        for index, found in parts.items()
    }


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("fp32", "fp16"), ("fp16", "qat"), ("qat", "qat-residual"), ("qat-residual", "qat-residual-qgap"),
        ("fp32", "qat"), ("fp16", "qat-residual"), ("fp32", "qat-residual-qgap"),
    ],
)  # fmt: skip
def test_engines_of_one_network_meet_at_the_same_layers(engines, a, b):
    alignment = align(engines[a], engines[b])
    check(alignment)
    truth_a, truth_b = architecture(engines[a]), architecture(engines[b])
    assert set().union(*truth_a.values()) == set().union(*truth_b.values()) == {*ORDER, "maxpool", "avgpool"}
    right_ms = [0.0, 0.0]
    for group in alignment.groups:
        sides = [(group.rows_a, truth_a, engines[a]), (group.rows_b, truth_b, engines[b])]
        layers = [set().union(*(truth.get(row, set()) for row in rows)) for rows, truth, _ in sides]
        assert layers[0] == layers[1]
        for side, (rows, truth, profile) in enumerate(sides):
            right_ms[side] += sum(profile.operations[row].times_ms[0] for row in rows if row in truth)
    for side, (profile, truth) in enumerate(((engines[a], truth_a), (engines[b], truth_b))):
        named_ms = sum(profile.operations[row].times_ms[0] for row in truth)
        assert right_ms[side] >= 0.95 * named_ms
    assert alignment.matched_share_a >= 0.95
    assert alignment.matched_share_b >= 0.95


def test_where_names_meet_they_decide_and_else_structure(engines):
    assert {group.how for group in align(engines["fp32"], engines["fp16"]).groups} == {"names"}
    assert {group.how for group in align(engines["fp16"], engines["qat"]).groups} == {"structure"}
    hows = [group.how for group in align(engines["qat"], engines["qat-residual"]).groups]
    assert hows.count("structure") <= 2  # the pooling at the end, whose node is numbered, and its quantiser


def test_numbers_that_two_exports_share_by_chance_do_not_meet(engines):
    # both have a node Add_219: the sum of layer4.0 in one, of layer3.1 in the other
    (theirs,) = [
        b
        for a, b in pairs(align(engines["qat"], engines["qat-residual"]))
        if any("Conv_217 + Add_219" in name for name in a)
    ]
    assert [name.split(".weight")[0] for name in theirs] == ["layer4.0.downsample.0"]


def test_engines_that_only_name_their_layers_meet_in_order(shared_data, engines, tmp_path):
    folder = shutil.copytree(
        shared_data / "trex" / "resnet18-a100" / "qat", tmp_path / "qat", copy_function=shutil.copyfile
    )
    folder.chmod(0o755)
    graph = json.loads((folder / "graph.json").read_text())
    (folder / "graph.json").write_text(json.dumps({"Layers": [layer["Name"] for layer in graph["Layers"]]}))
    plain = read_tensorrt(folder)
    alignment = align(engines["fp16"], plain)
    check(alignment)
    truth_a, truth_b = architecture(engines["fp16"]), architecture(plain)
    met = [(truth_a.get(i), truth_b.get(j)) for g in alignment.groups for i in g.rows_a for j in g.rows_b]
    met = [(x, y) for x, y in met if x and y]
    assert len(met) == len(ORDER) + 2
    assert all(x == y for x, y in met)


@pytest.mark.parametrize("name", ["fp32", "fp16", "qat"])
def test_an_eager_network_meets_an_engine_that_folded_most_of_it(engines, name):
    operations = [op("conv1", "Conv2d", parameters=9408, shape=(64, 112, 112), writes=["t"], kernel=(7, 7))]
    operations += [op("bn1", "BatchNorm2d"), op("relu", "ReLU"), op("maxpool", "MaxPool2d")]
    sizes = {path: (k, k * k * into * out, (out, side, side)) for path, k, into, out, side in CONVOLUTIONS}
    for block, before, maps in BLOCKS:
        for n in (1, 2):
            kernel, count, _ = sizes[f"{block}.conv{n}"]
            operations.append(op(f"{block}.conv{n}", "Conv2d", parameters=count, kernel=(kernel, kernel)))
            operations.append(op(f"{block}.bn{n}", "BatchNorm2d"))
            operations += [op(f"{block}.relu", "ReLU")] if n == 1 else []
        if before != maps:
            path = f"{block}.downsample.0"
            operations.append(op(path, "Conv2d", parameters=sizes[path][1], kernel=(1, 1)))
            operations.append(op(f"{block}.downsample.1", "BatchNorm2d"))
        operations += [op(f"{block}.add", "add"), op(f"{block}.relu_1", "ReLU")]
    operations += [op("avgpool", "AdaptiveAvgPool2d"), op("fc", "Linear", parameters=513000)]
    eager = made(operations)
    alignment = align(eager, engines[name])
    check(alignment)
    truth = architecture(engines[name])
    for group in alignment.groups:
        theirs = set().union(*(truth.get(row, set()) for row in group.rows_b))
        mine = {eager.operations[row].name for row in group.rows_a}
        assert theirs == mine & {*ORDER, "maxpool", "avgpool"}
        # what was folded went to the block it belongs to
        assert len({".".join(layer.split(".")[:2]) for layer in mine if layer.startswith("layer")}) <= 1
    assert alignment.matched_share_a >= 0.99
    assert alignment.matched_share_b >= 0.95


# -- engines that run here ---------------------------------------------------------------------------------------------


def taken(model, backend):
    if not backend.availability().usable:
        pytest.skip(backend.availability().why)
    return wb.profile(model, on=backend, repeats=3)


@pytest.fixture(scope="module")
def lenet(digits):
    """LeNet-5 profiled as asked for, each once."""
    dense = wb.load("lenet5")
    models = {"": lambda: dense, " int8": lambda: wb.Quantize("int8").apply(dense, digits)}
    models[" pruned"] = lambda: wb.Prune(0.5).apply(dense, digits)
    backends = {"eager": wb.Eager, "compiled": wb.Compiled, "ort": wb.OnnxRuntime, "openvino": wb.OpenVINO}

    @cache
    def get(name):
        backend, _, change = name.partition(" ")
        return taken(models[f" {change}" if change else ""](), backends[backend](threads=1))

    return get


def shared_names(alignment):
    """Names must tell: every matched group shares a layer, and no layer of one side is in a wrong group."""
    frame = alignment.frame()
    matched = frame[frame["how"] != "unmatched"]
    where = [{}, {}]
    for i, row in enumerate(matched.itertuples()):
        if not row.layers_a and not row.layers_b:  # two reorders the engine inserted at the same place
            assert row.how == "structure"
            continue
        assert row.how == "names"
        assert set(row.layers_a) & set(row.layers_b), (row.layers_a, row.layers_b)
        for side, layers in enumerate((row.layers_a, row.layers_b)):
            for layer in layers:
                where[side].setdefault(layer, set()).add(i)
    for layer in where[0].keys() & where[1].keys():
        assert where[0][layer] & where[1][layer], layer


@pytest.mark.parametrize(
    ("a", "b"),
    [
        *itertools.combinations(
            ["eager", "ort", "openvino", "ort int8", "openvino int8", "eager pruned", "ort pruned"], 2
        ),
        ("eager", "compiled"),
        ("compiled", "ort int8"),
    ],
)
def test_one_network_meets_itself_on_every_engine_precision_and_width(lenet, a, b):
    alignment = align(lenet(a), lenet(b))
    check(alignment)
    shared_names(alignment)
    weighted = wb.load("lenet5").layers.query("parameters > 0")["layer"]
    matched = alignment.frame().query("how != 'unmatched'")
    for layer in weighted:
        (row,) = [r for r in matched.itertuples() if layer in r.layers_a and layer in r.layers_b]
        # no two weighted layers in one group
        assert [other for other in weighted if other in row.layers_a] == [layer]


@pytest.fixture(scope="module")
def resnet20(shared_data):
    data = np.load(shared_data / "cifar10" / "cifar10.npz")
    task = wb.Task.from_arrays(
        data["x_train"][:128], data["y_train"][:128], data["x_test"][:64], data["y_test"][:64], calibration=32,
        preprocess=[wb.data.Scale(1 / 255), wb.data.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))],
    )  # fmt: skip
    model = wb.load(shared_data / "cifar10" / "resnet20-12fca82f.th", architecture="resnet20")
    return model, wb.Quantize("int8").apply(model, task)


def test_resnet20_meets_its_int8_twin_on_onnx_runtime(resnet20):
    model, int8 = resnet20
    alignment = align(taken(model, wb.Eager(threads=1)), taken(int8, wb.OnnxRuntime(threads=1)))
    check(alignment)
    shared_names(alignment)
    assert alignment.matched_share_a >= 0.95
    assert alignment.matched_share_b >= 0.95
    weighted = model.layers.query("type in ('Conv2d', 'Linear')")["layer"]
    assert len(weighted) == 20
    matched = alignment.frame().query("how != 'unmatched'")
    for layer in weighted:
        (row,) = [r for r in matched.itertuples() if layer in r.layers_a and layer in r.layers_b]
        assert [other for other in weighted if other in row.layers_b] == [layer]

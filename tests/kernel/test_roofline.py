"""Rows against ceilings, by numbers chosen so that the sums are easy; and that the kernels run what they say."""

from __future__ import annotations

import importlib
import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import workbench as wb
from workbench.errors import BackendError, DataError
from workbench.figures import roofline as figure
from workbench.figures.roofline import roofline_figure
from workbench.measure import OtherProcesses
from workbench.profiling import _kernels
from workbench.profiling.ceilings import Ceilings, ceilings
from workbench.profiling.profile import Profile
from workbench.profiling.roofline import ADDED, roofline

# memory gives a byte in 0.1 ns, fp32 an operation in 0.01 ns: ten operations per byte make them equal
CEILINGS = Ceilings(bandwidth_gb_s=10.0, arithmetic_gop_s={"fp32": 100.0, "int8": 400.0}, backend_label="by hand")
TINY = _kernels.Size(side=32, images=2, channels=8, pixels=6, chain=3, stream=64, passes=2)


def row(layer: str, kind: str = "layer", **more) -> dict:
    given = {
        "name": layer,
        "layer": layer,
        "type": "Conv",
        "kind": kind,
        "latency_ms": 0.5,
        "latency_p95_ms": 0.6,
        "share": 0.1,
        "macs": 1e6,
        "parameters": 10.0,
        "read_bytes": 0.6e6,
        "written_bytes": 0.4e6,
        "precision": "fp32",
    }
    return given | more


def profile(*rows: dict) -> Profile:
    frame = pd.DataFrame(rows)
    frame["intensity"] = 2 * frame["macs"] / (frame["read_bytes"] + frame["written_bytes"])
    return Profile(
        rows=frame,
        operations=(),
        end_to_end_ms=1.0,
        overhead_ms=math.nan,
        model_name="net",
        backend=None,
        backend_label="TensorRT, from files",
        precision="fp32",
        batch=1,
        contended=False,
        environment=None,
    )


ROWS = profile(
    row("slow"),
    row("busy", macs=5e7, latency_ms=1.5),
    row("cached", latency_ms=0.05),
    row("relu", type="Relu", macs=0.0),
    row("", type="Reorder", kind="move", macs=math.nan, precision="", name="reorder"),
    row("half", precision="bf16"),
    row("dark", read_bytes=math.nan),
    row("instant", latency_ms=0.0),
    row("", kind="call", name="(call)", macs=math.nan, read_bytes=math.nan, precision=""),
    row("(unattributed)", kind="unattributed", macs=math.nan, read_bytes=math.nan, precision="", latency_ms=-0.1),
)


def held() -> pd.DataFrame:
    return roofline(ROWS, CEILINGS).frame()


def test_a_layer_of_low_intensity_waits_for_memory():
    # 2 operations per byte: 1 MB at 10 GB/s takes 0.1 ms, its 2 M operations 0.02 ms
    slow = held().iloc[0]
    assert slow["bound"] == "memory"
    assert slow[["attainable_ms", "gain_ms", "achieved_gop_s", "achieved_gb_s"]].tolist() == pytest.approx(
        [0.1, 0.4, 4.0, 2.0]
    )


def test_a_layer_of_high_intensity_waits_for_arithmetic():
    busy = held().iloc[1]
    assert busy["bound"] == "compute"
    assert busy[["attainable_ms", "gain_ms"]].tolist() == pytest.approx([1.0, 0.5])


def test_a_layer_faster_than_memory_keeps_its_figures_and_has_nothing_to_gain():
    cached = held().iloc[2]
    assert cached["achieved_gb_s"] == pytest.approx(20.0)
    assert cached["gain_ms"] == 0.0


def test_rows_that_multiply_nothing_are_bound_by_what_they_move():
    assert held().loc[[3, 4], "bound"].tolist() == ["memory", "memory"]
    assert held().loc[[3, 4], "gain_ms"].tolist() == pytest.approx([0.4, 0.4])


def test_what_is_not_known_is_not_invented():
    unknown = held().loc[[5, 6, 8, 9]]
    assert set(unknown["bound"]) == {"unknown"}
    assert unknown[["attainable_ms", "gain_ms"]].isna().all(axis=None)


def test_a_time_below_the_clock_has_no_rate():
    assert held().loc[7, ["achieved_gop_s", "achieved_gb_s"]].isna().all()
    assert held().loc[7, "gain_ms"] == 0.0


def test_the_layers_with_most_to_gain_come_first():
    most = roofline(ROWS, CEILINGS).most_to_gain(2)
    assert most["layer"].tolist() == ["busy", "slow"]
    # those without gain are not listed, however many are asked for
    assert len(roofline(ROWS, CEILINGS).most_to_gain(50)) == 4
    with pytest.raises(DataError, match="n is 0"):
        roofline(ROWS, CEILINGS).most_to_gain(0)


def test_a_profile_from_files_asks_for_ceilings():
    with pytest.raises(BackendError, match=r"net was read from files.*Give them: roofline\(profile, Ceilings\("):
        roofline(ROWS)


def test_a_profile_of_an_engine_here_is_held_against_that_engine(tiny):
    taken = wb.profile(wb.load("mlp"), on=wb.OnnxRuntime(threads=1), repeats=5)
    assert roofline(taken).ceilings is ceilings(wb.OnnxRuntime(threads=1))


@pytest.mark.parametrize("bad", [0, -1.0, math.nan, math.inf, "fast"])
def test_ceilings_that_are_no_rate_are_refused(bad):
    with pytest.raises(DataError, match="bandwidth_gb_s is"):
        Ceilings(bad, {"fp32": 1.0})
    with pytest.raises(DataError, match=r"arithmetic_gop_s\['fp32'\] is"):
        Ceilings(1.0, {"fp32": bad})


def test_the_ridge_is_where_both_limits_meet():
    assert CEILINGS.ridge("fp32") == 10.0
    assert math.isnan(CEILINGS.ridge("bf16"))


def test_a_real_profile_keeps_its_rows_and_gains_columns():
    taken = wb.profile(wb.load("lenet5"), on=wb.OnnxRuntime(), repeats=10)
    frame = roofline(taken, CEILINGS).frame()
    assert list(frame.columns) == [*taken.frame().columns, *ADDED]
    assert frame["latency_ms"].sum() == pytest.approx(taken.end_to_end_ms)
    assert frame.loc[frame["macs"] > 0, "bound"].isin(["memory", "compute"]).all()


@pytest.fixture
def tiny(monkeypatch):
    """Ceilings of kernels that take no time, on a machine said to be quiet, with nothing measured yet."""
    module = importlib.import_module("workbench.profiling.ceilings")
    monkeypatch.setattr(_kernels, "size", lambda accelerated: TINY)
    monkeypatch.setattr(module, "_MEASURED", {})
    monkeypatch.setattr(OtherProcesses, "busy", lambda self: False)


def usable(backend: wb.Backend) -> wb.Backend:
    if not backend.availability().usable:
        pytest.skip(backend.availability().why)
    return backend


@pytest.mark.parametrize(
    ("backend", "precisions"),
    [
        (wb.Eager(), {"fp32", "bf16"}),
        (wb.OnnxRuntime(), {"fp32", "int8"}),
        (wb.OnnxRuntime(graph_level="basic"), {"fp32"}),
        (wb.OpenVINO(), {"fp32", "int8"}),
        (wb.OpenVINO(precision="bf16"), {"bf16", "int8"}),
    ],
    ids=lambda value: value.label if isinstance(value, wb.Backend) else "",
)
def test_each_engine_has_a_ceiling_for_each_precision_it_computes_in(tiny, backend, precisions):
    found = ceilings(usable(backend))
    assert set(found.arithmetic_gop_s) == precisions
    assert (found.backend_label, found.threads) == (backend.label, backend.thread_count)


def test_ceilings_are_measured_once_for_the_same_settings(tiny):
    first = ceilings(wb.Eager())
    assert ceilings(wb.Eager(threads=wb.Eager().thread_count)) is first
    assert ceilings(wb.Compiled()).arithmetic_gop_s is first.arithmetic_gop_s
    assert ceilings(wb.Compiled()).backend_label == wb.Compiled().label


def test_ceilings_of_a_busy_machine_are_marked_and_taken_again(tiny, monkeypatch):
    monkeypatch.setattr(OtherProcesses, "busy", lambda self: True)
    first = ceilings(wb.Eager(threads=1))
    assert first.contended
    assert ceilings(wb.Eager(threads=1)) is not first


def kernels(as_graph: bool, precision: str = "fp32") -> dict[str, _kernels.Kernel]:
    return {kernel.name: kernel for kernel in _kernels.computing(TINY, precision, as_graph)}


@pytest.mark.parametrize("name", ["products", "convolutions"])
def test_a_kernel_does_as_many_operations_as_it_says(name):
    kernel = kernels(as_graph=False)[name]
    with FlopCounterMode(display=False) as counter:
        kernel.model.module(torch.zeros(1, 1))
    assert counter.get_total_flops() == kernel.operations


def test_module_and_graph_are_the_same_convolutions():
    x = np.zeros((1, 1), np.float32)
    results = []
    for backend, as_graph in ((wb.Eager(threads=1), False), (wb.OnnxRuntime(threads=1), True)):
        with backend.compile(kernels(as_graph)["convolutions"].model) as engine:
            results.append(engine(x))
    assert results[0].shape == (TINY.images, TINY.channels)
    np.testing.assert_allclose(results[0], results[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["products", "convolutions"])
@pytest.mark.parametrize("backend", [wb.OnnxRuntime(threads=1), wb.OpenVINO(threads=1)], ids=lambda b: b.title)
def test_what_is_called_int8_runs_in_int8_by_the_engines_own_word(backend, name):
    heavy = {"QLinearMatMul", "QLinearConv", "FullyConnected", "MatMul", "Conv", "Convolution"}
    with usable(backend).compile(kernels(True, "int8")[name].model) as engine:
        ran = [o for o in engine.profile((np.zeros((1, 1), np.float32),), 5) if o.type in heavy]
    assert [o.precision for o in ran] == ["int8"] * TINY.chain


def test_the_matrix_read_once_is_far_larger_than_the_last_cache(monkeypatch):
    monkeypatch.setattr(_kernels, "_last_level_cache_bytes", lambda: 2**26)
    stream = _kernels.size(accelerated=False).stream
    assert 4 * stream**2 >= 4 * 2**26
    monkeypatch.setattr(_kernels, "_last_level_cache_bytes", lambda: 0)
    assert 4 * _kernels.size(accelerated=False).stream ** 2 >= 2**27


def test_the_figure_has_a_point_for_each_row_with_arithmetic_bytes_and_time():
    info = figure._info(held(), CEILINGS)
    assert [(p.layer, p.intensity, p.gop_s) for p in info.points] == [
        ("slow", 2.0, pytest.approx(4.0)),
        ("busy", 100.0, pytest.approx(1e8 / 1.5e6)),
        ("cached", 2.0, pytest.approx(40.0)),
        ("half", 2.0, pytest.approx(4.0)),
    ]
    assert info.roofs == (figure.Roof("fp32", 10.0, 100.0), figure.Roof("int8", 40.0, 400.0))
    # relu, reorder, dark and instant; the call and the unattributed rest are no layers
    assert (info.left_out, info.left_out_share) == (4, pytest.approx(40.0))
    assert info.points[0].hover.endswith(
        "4.00 GOP/s · 2.00 GB/s · memory-bound<br>attainable 0.100 ms · to gain 0.400 ms"
    )
    assert info.points[3].hover.endswith("no ceiling for its precision")
    assert info.intensity_range[0] < 2 and info.intensity_range[1] > 100


@pytest.mark.parametrize(
    ("kind", "family"),
    [
        *(("Conv2d", "convolution"), ("QLinearConv", "convolution"), ("FusedGemm", "matrix product")),
        *(("FullyConnected", "matrix product"), ("QLinearAdd", "other"), ("MultiheadAttention", "attention")),
        *(("LSTM", "recurrent"), ("RNNSeq", "recurrent"), ("addmm", "matrix product")),
    ],
)
def test_engines_spellings_of_an_operation_are_one_family(kind, family):
    assert figure._family(kind) == family


@pytest.mark.parametrize("dark", [False, True])
def test_the_figure_draws_ceilings_and_sets_the_selected_layer_off(dark: bool):
    drawn = roofline_figure(held(), CEILINGS, selected="busy + other", dark=dark)
    points = next(t for t in drawn.data if t.name == figure.LAYERS)
    assert list(points.customdata) == ["slow", "busy", "cached", "half"]
    assert list(points.marker.symbol) == ["circle", "circle", "circle", "diamond"]
    assert list(points.marker.line.width) == [0.5, 2, 0.5, 0.5]
    memory, fp32, int8 = (t for t in drawn.data if t.name == figure.CEILINGS)
    # the slope ends where the highest ceiling begins
    assert (memory.x[1], memory.y[1]) == (40.0, 400.0)
    assert (fp32.x[0], fp32.y) == (10.0, (100.0, 100.0))
    assert (int8.x[0], int8.y) == (40.0, (400.0, 400.0))
    assert drawn.layout.xaxis.type == drawn.layout.yaxis.type == "log"


def test_no_profile_or_none_with_arithmetic_says_so():
    assert roofline_figure(held().iloc[:0], CEILINGS).layout.annotations[0].text.startswith("No profile yet.")
    drawn = roofline_figure(held().iloc[[3]], CEILINGS)
    assert drawn.layout.annotations[0].text.startswith("No row of this profile tells its arithmetic")

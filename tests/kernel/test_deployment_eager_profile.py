"""Eager profiles: a row per leaf and operation, what each moves, and what timing adds taken off."""

from __future__ import annotations

import itertools
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import workbench as wb
from workbench.deployment import OpTiming, _stopwatch
from workbench.deployment._stopwatch import Stopwatch, added_ms
from workbench.errors import BackendError, DataError, ProfileError
from workbench.models.cast import cast

REPEATS = 4


class Block(nn.Module):
    """A residual block with an operation of each sort: copying, in place, a view, and two of one name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.conv(x))
        y += x
        y = functional.relu(self.act(y))
        return self.head(functional.relu(y - 1).mean((2, 3)).view(x.shape[0], 3))


NAMES = ["conv", "act", "add", "act (call 2)", "relu", "sub", "relu_1", "mean", "view", "head"]


def profiled(module: nn.Module, *inputs: np.ndarray) -> list[OpTiming]:
    example = tuple(torch.from_numpy(x) for x in inputs)
    with wb.Eager().compile(wb.load(module, inputs=example, name="net")) as engine:
        return engine.profile(inputs, REPEATS)


def images(count: int = 2) -> np.ndarray:
    return np.random.default_rng(0).random((count, 3, 6, 6), dtype=np.float32)


@pytest.fixture(scope="module")
def rows() -> list[OpTiming]:
    return profiled(Block(), images())


def edges(rows: list[OpTiming]) -> set[tuple[str, str]]:
    """Names of the row that last wrote a tensor and of the row that reads it."""
    found, writer = set(), {}
    for row in rows:
        found |= {(writer[port.name], row.name) for port in row.reads if port.name in writer}
        writer.update((port.name, row.name) for port in row.writes)
    return found


def test_leaves_and_operations_are_rows_in_execution_order_under_the_names_of_the_table(rows: list[OpTiming]):
    table = wb.load(Block(), inputs=torch.from_numpy(images())).layers
    assert [row.name for row in rows] == NAMES
    assert [row.layers for row in rows] == [(name,) for name in table["layer"]]
    assert [row.type for row in rows] == list(table["type"])
    assert all(len(row.times_ms) == REPEATS and min(row.times_ms) >= 0 for row in rows)
    assert {row.kind for row in rows} == {"layer"}


def test_rows_tell_what_they_read_and_write_as_the_table_does_for_one_sample(rows: list[OpTiming]):
    table = wb.load(Block(), inputs=torch.from_numpy(images())).layers
    for row, layer in zip(rows, table.itertuples(), strict=True):
        if layer.output_bytes:
            assert sum(port.nbytes for port in row.reads) == 2 * layer.input_bytes, row.name
            assert sum(port.nbytes for port in row.writes) == 2 * layer.output_bytes, row.name
            assert row.weight_bytes == layer.weight_bytes
        else:
            assert row.weight_bytes is None  # so that the bytes of a view are the table's: none
    assert rows[0].reads[0].shape == (2, 3, 6, 6)
    assert {row.precision for row in rows} == {"fp32"}
    assert [row.kernel for row in rows if row.kernel] == [(3, 3)]


def test_tensors_tie_rows_together_through_views_and_changes_in_place(rows: list[OpTiming]):
    assert edges(rows) == {
        *(("conv", "act"), ("act", "add"), ("add", "act (call 2)"), ("act (call 2)", "relu"), ("relu", "sub")),
        *(("sub", "relu_1"), ("relu_1", "mean"), ("mean", "view"), ("view", "head")),
    }


def test_a_change_through_a_view_reaches_who_reads_the_whole():
    class Through(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            y = self.act(x)
            y[:, 1:].mul_(2)
            return y.sqrt()

    found = edges(profiled(Through(), np.ones((2, 3), np.float32)))
    assert found == {("act", "slice"), ("slice", "mul"), ("mul", "sqrt")}


def test_the_other_branch_reads_from_before_a_view():
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            y = self.act(x)
            return y.flatten(1).sum(1, keepdim=True) + y.sum(2)

    found = edges(profiled(Branches(), np.ones((2, 3, 4), np.float32)))
    assert found == {("act", "flatten"), ("flatten", "sum"), ("act", "sum_1"), ("sum", "add"), ("sum_1", "add")}


def test_edges_of_a_profile_are_those_of_the_rows():
    p = wb.profile(wb.load(Block(), inputs=torch.from_numpy(images()), name="net"), on=wb.Eager(), repeats=REPEATS)
    names = list(p.frame()["name"])
    assert {(names[a], names[b]) for a, b in p.edges} == edges(list(p.operations))


# what runs is what runs unobserved


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 16)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
        self.head = nn.Linear(16, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.encoder(self.table(ids), src_key_padding_mask=ids == 0).mean(1))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_fused_attention_stays_fused_and_its_row_has_the_layers_it_computes():
    ids = np.array([[1, 2, 3, 0, 0], [1, 2, 3, 4, 0]])
    model = wb.load(Text(), inputs=torch.from_numpy(ids))
    with wb.Eager().compile(model) as engine:
        found = engine.profile((ids,), REPEATS)
    assert [row.name for row in found] == ["table", "eq", "encoder.layers.0", "encoder.layers.1", "mean", "head"]
    layers = {layer for layer in model.layers["layer"] if layer.startswith("encoder.layers.1.")}
    assert set(found[3].layers) == layers
    assert "encoder.layers.1.self_attn" in layers
    # torch packs sequences of unlike lengths for its fused kernels, unless somebody watches
    assert found[2].reads[0].shape == (None, None, None)


def test_profiling_changes_no_result_and_leaves_nothing_behind():
    model = wb.load(Block(), inputs=torch.from_numpy(images()))
    before = [dict(vars(module)) for module in model.module.modules()]
    with wb.Eager().compile(model) as engine:
        expected = engine(images())
        engine.profile((images(),), REPEATS)
        assert [dict(vars(module)) for module in model.module.modules()] == before
        np.testing.assert_array_equal(engine(images()), expected)


def test_other_threads_run_the_module_without_being_timed():
    model = wb.load(Block(), inputs=torch.from_numpy(images()))
    with wb.Eager().compile(model) as engine:
        stopwatch = engine.recorder((images(),))
        with stopwatch._timer.reading():
            thread = threading.Thread(target=lambda: model.module(torch.from_numpy(images())))
            thread.start()
            thread.join()
            assert stopwatch._timer.marks == []


@pytest.mark.parametrize(("dtype", "precision"), [(torch.bfloat16, "bf16"), (torch.float16, "fp16")])
def test_precision_is_that_of_the_numbers(dtype: torch.dtype, precision: str):
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    found = profiled(cast(network.eval(), dtype), np.ones((2, 3), np.float32))
    assert [row.precision for row in found if row.type in ("Linear", "ReLU")] == [precision, precision]
    assert [row.weight_bytes for row in found if row.type == "Linear"] == [2 * (12 + 4)]


def test_a_convolution_written_as_a_function_tells_its_kernel():
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.act = nn.Parameter(torch.rand(4, 3, 5, 3)), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(functional.conv2d(x, self.weight))

    first = profiled(Written(), images())[0]
    assert (first.name, first.kernel, first.weight_bytes) == ("conv2d", (5, 3), 4 * 4 * 3 * 5 * 3)


def test_a_script_is_one_row_of_the_models_name():
    with pytest.warns(DeprecationWarning):
        script = torch.jit.script(nn.Sequential(nn.Linear(3, 3), nn.ReLU()).eval())
    model = wb.Model("written", {"x": torch.rand(2, 3)}, module=script)
    with wb.Eager().compile(model) as engine:
        found = engine.profile((np.ones((2, 3), np.float32),), REPEATS)
    assert [(row.name, row.type, row.layers) for row in found] == [("written", "Sequential", ("written",))]
    assert list(model.layers["layer"]) == ["written"]


# what timing adds


def test_what_timing_adds_is_taken_off_each_row_by_its_sort(monkeypatch: pytest.MonkeyPatch):
    # a clock that goes on by a millisecond whenever it is read: every row takes one
    ticks = itertools.count(0, 1_000_000)
    monkeypatch.setattr(_stopwatch._HostClock, "mark", staticmethod(lambda: next(ticks)))
    monkeypatch.setattr(_stopwatch, "added_ms", lambda device: (-0.25, 0.5))
    found = profiled(Block(), images())
    expected = {True: 1.25, False: 0.5}
    assert [row.times_ms for row in found] == [
        (pytest.approx(expected[row.type in ("Conv2d", "ReLU", "Linear")]),) * REPEATS for row in found
    ]


def test_added_time_is_the_row_of_nothing_less_an_unobserved_call(monkeypatch: pytest.MonkeyPatch):
    # each reading of the clock takes 7 µs and each call of a module 3 µs, wherever it is observed
    now = itertools.count(0, 7_000)
    calls = itertools.count(1)
    latest = [0]

    def mark() -> int:
        return next(now) + latest[0] * 3_000

    class Counted(nn.Identity):
        def forward(self, x: Tensor) -> Tensor:
            latest[0] = next(calls)
            return x

    monkeypatch.setattr(_stopwatch._HostClock, "mark", staticmethod(mark))
    monkeypatch.setattr(_stopwatch.nn, "Identity", Counted)
    modules, operations = added_ms("cpu")
    assert modules == pytest.approx(0.007)
    assert operations == pytest.approx(0.007)


def test_rows_can_be_those_of_some_blocks_only(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_stopwatch, "added_ms", lambda device: (0.0, 0.0))
    with wb.Eager().compile(wb.load(Block(), inputs=torch.from_numpy(images()))) as engine:
        recorder = engine.recorder((images(),))
        for calls in (2, 3):
            assert len(recorder.block(calls)) == calls
        whole, second = recorder.rows(1.0), recorder.rows(1.0, [1])
    assert [len(row.times_ms) for row in (whole[0], second[0])] == [5, 3]
    assert whole[0].times_ms[2:] == second[0].times_ms


def test_a_gpu_is_timed_by_its_own_clock(monkeypatch: pytest.MonkeyPatch):
    done: list[object] = []
    ticks = itertools.count(0)

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self, stream: object) -> None:
            self.at = next(ticks)

        def elapsed_time(self, later: Event) -> float:
            assert done, "read before the device had come so far"
            return 0.5 * (later.at - self.at)

    fakes = {"Event": Event, "current_stream": lambda device: device, "synchronize": done.append}
    monkeypatch.setattr(_stopwatch.torch, "cuda", SimpleNamespace(**fakes))
    monkeypatch.setattr(_stopwatch, "added_ms", lambda device: (0.0, 0.25))
    module = nn.Sequential(nn.Linear(3, 3), Block().act).eval()
    stopwatch = Stopwatch(module, lambda: module(torch.rand(2, 3)), "net", "a GPU", "cuda:1")
    stopwatch.block(2)
    assert [row.times_ms for row in stopwatch.rows(1.0)] == [(0.5, 0.5), (0.5, 0.5)]
    assert set(done) == {torch.device("cuda:1")}


# what cannot be profiled


class Narrow(nn.Module):
    """Takes batches of two alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.a(x))
        return self.b(y + torch.ones(2, 1))


def failure(model: wb.Model, *inputs: np.ndarray) -> ProfileError:
    with wb.Eager().compile(model) as engine, pytest.raises(ProfileError) as raised:
        engine.recorder(inputs)
    return raised.value


def test_a_model_that_fails_half_way_is_profiled_up_to_there():
    model = wb.load(nn.Sequential(nn.Linear(3, 3), Narrow()), inputs=torch.rand(2, 3), name="net")
    error = failure(model, np.ones((3, 3), np.float32))
    assert str(error).startswith("net fails in layer 1.add on PyTorch eager")
    assert "with input: float32 (3, 3): The size of tensor a (3) must match" in str(error)
    assert [row.name for row in error.rows] == ["0", "1.a", "1.relu", "1.ones"]
    assert all(row.times_ms and min(row.times_ms) >= 0 for row in error.rows)


def test_a_leaf_that_fails_is_named():
    model = wb.load(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), inputs=torch.rand(2, 3), name="net")
    with wb.Eager().compile(model) as engine:
        model.module[1] = nn.Linear(5, 2)
        with pytest.raises(ProfileError, match=r"net fails in layer 1 \(Linear\) on") as raised:
            engine.recorder((np.ones((2, 3), np.float32),))
    assert [row.name for row in raised.value.rows] == ["0"]


def test_a_model_that_fails_only_later_keeps_what_was_timed():
    class Tires(Narrow):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.b(self.a(x)[:, : 4 if self.calls < 8 else 3])

    model = wb.Model("tires", {"x": torch.rand(2, 3)}, module=Tires())
    with wb.Eager().compile(model) as engine:
        recorder = engine.recorder((np.ones((2, 3), np.float32),))
        with pytest.raises(ProfileError, match="tires fails in layer b on") as raised:
            recorder.block(9)
    assert [(row.name, len(row.times_ms)) for row in raised.value.rows] == [("a", 9), ("slice", 9)]


def test_inputs_that_do_not_fit_are_still_the_engines_to_refuse():
    model = wb.load(nn.Sequential(nn.Linear(3, 4)), inputs=torch.rand(2, 3))
    with wb.Eager().compile(model) as engine:
        with pytest.raises(DataError, match="float64"):
            engine.recorder((np.ones((2, 3)),))
        with pytest.raises(DataError, match="builtins.list"):
            engine.recorder(([[1.0, 2.0, 3.0]],))
        recorder = engine.recorder((np.ones((2, 3), np.float32),))
    with pytest.raises(BackendError, match="is closed") as raised:
        recorder.block(1)
    assert not isinstance(raised.value, ProfileError)


def test_operations_that_change_from_call_to_call_have_no_rows():
    class Moody(nn.Module):
        calls = 0

        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.a(x) + 1 if self.calls % 2 else self.a(x) * 2

    model = wb.Model("moody", {"x": torch.rand(2, 3)}, module=Moody())
    with wb.Eager().compile(model) as engine, pytest.raises(BackendError, match="other layers from call to call"):
        engine.profile((np.ones((2, 3), np.float32),), REPEATS)


def test_a_model_without_modules_or_parameters_is_profiled_by_its_operations():
    class Bare(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * 2).sum(1)

    assert [row.name for row in profiled(Bare(), np.ones((2, 3), np.float32))] == ["mul", "sum"]

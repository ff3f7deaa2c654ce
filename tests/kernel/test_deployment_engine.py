"""Every backend runs the same model to the same numbers, and refuses what does not fit in one clear sentence."""

from __future__ import annotations

import gc
import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnx
import psutil
import pytest
import torch
from torch import Tensor, nn

import workbench as wb
from workbench.deployment import BACKENDS, backend_from_dict, physical_cores
from workbench.errors import BackendError, DataError, RecipeError

QUICK = [wb.Eager(threads=1), wb.OnnxRuntime(threads=1), wb.OpenVINO(threads=1)]


class Pair(nn.Module):
    """Two inputs by keyword, three outputs in a nesting."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 5), nn.Linear(5, 4)

    def forward(self, values: Tensor, weights: Tensor) -> dict[str, object]:
        hidden = torch.relu(self.first(values))
        return {"scores": self.second(hidden), "more": (hidden * weights[:, None], hidden.sum(1))}


class Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids).sum(1)


@pytest.fixture(scope="module")
def lenet() -> wb.Model:
    return wb.load("lenet5")


@pytest.fixture(scope="module")
def pair() -> wb.Model:
    torch.manual_seed(0)
    return wb.load(Pair(), inputs={"values": torch.randn(2, 8), "weights": torch.randn(2)}, name="pair")


@pytest.fixture(scope="module", params=QUICK, ids=lambda b: type(b).__name__)
def engine(request: pytest.FixtureRequest, lenet: wb.Model):
    with request.param.compile(lenet) as made:
        yield made


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((count, 1, 28, 28), dtype=np.float32)


def reference(model: wb.Model, *inputs: np.ndarray) -> Tensor:
    with torch.no_grad():
        return model.run_module(*(torch.from_numpy(x) for x in inputs))


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_any_batch_size_gives_the_modules_numbers(engine: wb.Engine, lenet: wb.Model, batch: int):
    x = images(batch)
    np.testing.assert_allclose(engine(x), reference(lenet, x).numpy(), atol=1e-4)


def test_specifications_name_every_tensor_and_leave_the_batch_open(engine: wb.Engine):
    assert [(s.shape, s.dtype) for s in engine.inputs] == [((None, 1, 28, 28), "float32")]
    assert [(s.name, s.shape, s.dtype) for s in engine.outputs] == [("output", (None, 10), "float32")]
    assert engine.threads == 1
    assert engine.precision == "fp32"


def test_an_output_survives_the_next_call(engine: wb.Engine):
    first = engine(images(2))
    kept = first.copy()
    engine(images(2, seed=1))
    np.testing.assert_array_equal(first, kept)


def test_read_only_strided_and_reversed_arrays_are_read_as_they_look(engine: wb.Engine):
    x = images(3)
    frozen = x.copy()
    frozen.flags.writeable = False
    for view in (frozen, x[:, :, :, ::-1], np.asfortranarray(x), np.repeat(x, 2, axis=0)[::2]):
        np.testing.assert_array_equal(engine(view), engine(np.ascontiguousarray(view)))


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ((), "takes 1 input "),
        ((images(1), images(1)), "but 2 were given"),
        ((images(1).astype(np.float64),), "float64 (1, 1, 28, 28)"),
        ((images(1).astype(np.float16),), "float16"),
        (((images(1) * 255).astype(np.uint8),), ".astype('float32')"),
        ((images(1)[0],), "float32 (1, 28, 28)"),
        ((images(1)[:, :, :14],), "float32 (1, 1, 14, 28)"),
        ((np.float32(1),), "numpy.float32"),
        ((images(1).astype(">f4"),), ">f4"),
        ((torch.zeros(1, 1, 28, 28),), "Call .numpy() on it first"),
        ((images(1).tolist(),), "builtins.list"),
        ((None,), "NoneType"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_naming_both_sides(engine: wb.Engine, bad: tuple, words: str):
    with pytest.raises(DataError) as refusal:
        engine(*bad)
    assert words in str(refusal.value)
    assert "float32 (N, 1, 28, 28)" in str(refusal.value)


@pytest.mark.parametrize("backend", QUICK, ids=lambda b: type(b).__name__)
def test_inputs_by_keyword_and_nested_outputs_work(pair: wb.Model, backend: wb.Backend):
    values, weights = images(1)[0, 0, :3, :8].copy(), np.arange(3, dtype=np.float32)
    wanted = reference(pair, values, weights)
    with backend.compile(pair) as engine:
        got = engine(values, weights)
        assert [s.name for s in engine.outputs] == ["output_0", "output_1", "output_2"]
        assert [s.shape for s in engine.outputs] == [(None, 4), (None, 5), (None,)]
        with pytest.raises(DataError, match=r"takes 2 inputs \(values: float32 \(N, 8\); weights: float32 \(N\)\)"):
            engine(values)
        with pytest.raises(DataError, match="weights is float64"):
            engine(values, weights.astype(np.float64))
    for a, b in zip(got, (wanted["scores"], *wanted["more"]), strict=True):
        np.testing.assert_allclose(a, b.numpy(), atol=1e-5)


@pytest.mark.parametrize("backend", QUICK[:2], ids=lambda b: type(b).__name__)
def test_an_index_out_of_range_is_a_data_error(backend: wb.Backend):
    model = wb.load(Lookup(), inputs=torch.zeros(2, 4, dtype=torch.int64), name="lookup")
    with backend.compile(model) as engine:
        assert engine(np.full((3, 4), 9)).shape == (3, 3)
        with pytest.raises(DataError, match=r"lookup on .* could not run this batch"):
            engine(np.full((3, 4), 99))


@pytest.mark.parametrize("backend", QUICK, ids=lambda b: type(b).__name__)
def test_a_closed_engine_says_so(lenet: wb.Model, backend: wb.Backend, tmp_path):
    engine = backend.compile(lenet)
    engine.close()
    engine.close()
    uses = (lambda: engine(images(1)), lambda: engine.profile((images(1),), 1), lambda: engine.save(tmp_path / "p"))
    for use in uses:
        with pytest.raises(BackendError, match=r"is closed. Compile the model again"):
            use()


@pytest.mark.parametrize("backend", QUICK, ids=lambda b: type(b).__name__)
def test_twenty_engines_leave_no_threads_behind(lenet: wb.Model, backend: wb.Backend):
    process, x = psutil.Process(), images(1)

    def once() -> None:
        with backend.compile(lenet) as engine:
            engine(x)

    for _ in range(3):
        once()
    gc.collect()
    before = process.num_threads()
    for _ in range(20):
        once()
    gc.collect()
    assert process.num_threads() <= before


def threads_in_a_new_process(code: str) -> list[int]:
    """What torch's number of threads was at each `note()` of code that starts with 2, no engine being open."""
    start = (
        "import gc, torch, workbench as wb\ntorch.set_num_threads(2)\nlenet, seen = wb.load('lenet5'), []\n"
        "image = lenet.example['x'].numpy()\nnote = lambda: seen.append(torch.get_num_threads())\n"
    )
    run = subprocess.run([sys.executable, "-c", f"{start}{code}\nprint(*seen)"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return [int(word) for word in run.stdout.split()]


def test_the_last_engine_gives_torch_its_threads_back():
    code = (
        "first, second = wb.Eager(threads=3).compile(lenet), wb.Eager(threads=1).compile(lenet)\n"
        "second(image); note(); first(image); note(); first.close(); second.close(); note()"
    )
    assert threads_in_a_new_process(code) == [1, 3, 2]


def test_a_dropped_engine_gives_torch_its_threads_back():
    code = "engine = wb.Eager(threads=3).compile(lenet)\nengine(image); note(); del engine; gc.collect(); note()"
    assert threads_in_a_new_process(code) == [3, 2]


def test_an_engine_leaves_its_model_as_it_was(lenet: wb.Model):
    before = replace(lenet).fingerprint
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lenet.module.modules()]
    with wb.Eager().compile(lenet) as engine:
        engine.profile((images(1),), 2)
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lenet.module.modules()]
    assert replace(lenet).fingerprint == before


def test_artifacts_hold_every_parameter(lenet: wb.Model):
    for backend in QUICK:
        with backend.compile(lenet) as engine:
            files = engine.artifact()
            assert sum(len(data) for data in files.values()) >= 4 * lenet.parameters
            assert all(isinstance(data, bytes) for data in files.values())


def test_tied_weights_are_stored_once():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(64, 64, bias=False)
            self.b = nn.Linear(64, 64, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    with wb.Eager().compile(wb.load(Tied(), inputs=torch.randn(2, 64))) as engine:
        assert len(engine.artifact()["model.safetensors"]) < 2 * 64 * 64 * 4


def test_a_module_that_fails_on_its_example_is_refused_at_compile():
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("state")

    model = wb.Model("broken", {"x": torch.randn(2, 3)}, module=Broken())
    with pytest.raises(BackendError, match="broken does not run on its own example inputs: KeyError"):
        wb.Eager().compile(model)


@pytest.mark.parametrize("backend", [wb.Eager(), wb.Compiled()], ids=lambda b: type(b).__name__)
def test_torch_backends_refuse_a_model_that_is_only_a_graph(lenet: wb.Model, backend: wb.Backend):
    graph = lenet.changed("quantised", graph=lenet.onnx(), precision="int8")
    with pytest.raises(BackendError, match=r"int8 ONNX graph runs on wb.OnnxRuntime\(\) or wb.OpenVINO\(\)"):
        backend.check(graph)


def test_a_graph_runs_without_its_module(lenet: wb.Model):
    x = images(2)
    graph = lenet.changed("", graph=lenet.onnx())
    for backend in QUICK[1:]:
        with backend.compile(graph) as engine:
            np.testing.assert_allclose(engine(x), reference(lenet, x).numpy(), atol=1e-4)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_takes_and_gives_float32_wherever_it_runs(lenet: wb.Model, digits: wb.Task, precision: str):
    x, half = images(2), wb.Quantize(precision).apply(lenet, digits)
    for backend in QUICK if precision == "fp16" else (QUICK[0], QUICK[2]):
        with backend.compile(half) as engine:
            assert (engine.precision, engine.inputs[0].dtype, engine.outputs[0].dtype) == (
                precision,
                "float32",
                "float32",
            )
            np.testing.assert_allclose(engine(x), reference(lenet, x).numpy(), atol=0.2)


def graph_of(op: str, domain: str = "") -> wb.Model:
    info = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["batch", 2]) for n in ("x", "y")]
    node = onnx.helper.make_node(op, ["x"], ["y"], name=f"block.3/{op}", domain=domain)
    graph = onnx.helper.make_graph([node], "g", info[:1], info[1:])
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("our.ops", 1)]
    proto = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return wb.Model("strange", {"x": torch.zeros(2, 2)}, graph=proto)


@pytest.mark.parametrize("backend", QUICK[1:], ids=lambda b: type(b).__name__)
def test_an_operation_the_engine_lacks_is_named_with_its_layer(backend: wb.Backend):
    with pytest.raises(BackendError, match=r"cannot run strange because of Frobnicate \(layer block\.3\)"):
        backend.compile(graph_of("Frobnicate", "our.ops"))


def test_a_graph_that_asks_for_another_input_is_refused():
    model = graph_of("Relu")
    other = wb.Model("strange", {"image": torch.zeros(2, 2)}, graph=model.graph)
    for backend in QUICK[1:]:
        with pytest.raises(BackendError, match="asks for an input 'x' that the model does not have"):
            backend.compile(other)


@pytest.mark.parametrize("kind", BACKENDS.values(), ids=lambda k: k.__name__)
def test_a_backend_survives_its_dictionary_and_its_python(kind: type[wb.Backend]):
    for backend in (kind(), kind(threads=3), *kind.variants()):
        assert backend_from_dict(backend.to_dict()) == backend
        assert eval(backend.to_python(), {"wb": wb}) == backend
        assert backend.label.startswith(backend.title)
    assert kind(threads=1).label.endswith(", 1 thread")
    assert kind().label.endswith(f"{physical_cores()} thread" + ("s" if physical_cores() > 1 else ""))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: wb.OnnxRuntime(provider="cude"), "Did you mean 'cuda'? Accepted: cpu, cuda, tensorrt."),
        (lambda: wb.OnnxRuntime(graph_level="most"), "Accepted: all, basic, disabled, extended."),
        (lambda: wb.OnnxRuntime(threads=0), "threads is 0"),
        (lambda: wb.Eager(threads=2.0), "threads is 2.0"),
        (lambda: wb.Eager(threads=True), "threads is True"),
        (lambda: wb.Eager(device="tpu"), "Accepted: cpu, cuda"),
        (lambda: wb.Compiled(mode="fast"), "Accepted: default, max-autotune"),
        (lambda: wb.OpenVINO(precision="fp8"), "Accepted: bf16, fp32."),
        (lambda: wb.OpenVINO(hint="quick"), "Accepted: latency, throughput."),
        (lambda: wb.OpenVINO(device="TPU"), "Accepted: CPU, GPU, NPU"),
        (lambda: wb.OpenVINO(device="GPU.x"), "device is 'GPU.x'"),
    ],
)
def test_a_setting_out_of_range_is_refused_with_the_accepted(make, words: str):
    with pytest.raises(BackendError) as refusal:
        make()
    assert words in str(refusal.value)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"backend": "OnnxRunTime"}, "Did you mean 'OnnxRuntime'?"),
        ({"backend": "OpenVINO", "thread": 2}, "Did you mean 'threads'?"),
        ({"threads": 2}, "names no backend"),
        ("OpenVINO", "names no backend"),
    ],
)
def test_a_dictionary_that_is_no_backend_is_refused(data: object, words: str):
    with pytest.raises(RecipeError) as refusal:
        backend_from_dict(data)
    assert words in str(refusal.value)


def test_every_graph_level_and_hint_gives_the_same_numbers(lenet: wb.Model):
    x = images(2)
    wanted = reference(lenet, x).numpy()
    levels = [wb.OnnxRuntime(graph_level=level) for level in ("disabled", "basic", "extended")]
    for backend in (*levels, wb.OpenVINO(hint="throughput")):
        with backend.compile(lenet) as engine:
            np.testing.assert_allclose(engine(x), wanted, atol=1e-4)

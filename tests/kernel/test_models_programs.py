"""Programs of torch.export, TorchScript and Keras files: modules with named layers, and nothing run to read them."""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import os
import subprocess
import sys
import textwrap
import types
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import workbench as wb
from workbench.errors import LoadError
from workbench.models.export import ExportWarning
from workbench.models.sources import keras_file


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.deep = nn.Conv2d(4, 8, 3, stride=2, groups=2)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.deep(self.stem(x)).relu()
        return self.head(y.mean((2, 3)).view(x.shape[0], 8))


class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.norm, self.head = nn.Embedding(9, 4), nn.LayerNorm(4), nn.Linear(4, 2)

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        y = (self.norm(self.table(ids)) * mask[..., None]).sum(1)
        return self.head(y), y


X, IDS, MASK = torch.rand(2, 3, 9, 9), torch.arange(8).reshape(2, 4), torch.ones(2, 4)


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    module = Net()
    module(torch.rand(8, 3, 9, 9))  # gives the batch statistics other values than their first
    return module.eval()


def save(path: Path, module: nn.Module, args=(), kwargs=None, dynamic: bool = True) -> Path:
    axes = {key: {0: Dim.DYNAMIC} for key in kwargs or {}} or tuple({0: Dim.DYNAMIC} for _ in args)
    with torch.no_grad():
        program = torch.export.export(module, args, kwargs, dynamic_shapes=axes if dynamic else None)
    torch.export.save(program, path)
    return path


def same_at_any_batch(model: wb.Model, module: nn.Module) -> bool:
    x = torch.rand(5, 3, 9, 9)
    graph = model.onnx()
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    name = next(iter(model.example))
    with torch.no_grad():
        expected = module(x)
        close = [torch.allclose(model.module(x[:n]), expected[:n], atol=1e-6) for n in (1, 5)]
    found = [np.allclose(session.run(None, {name: x[:n].numpy()})[0], expected[:n], atol=1e-5) for n in (1, 5)]
    return all(close + found)


# torch.export


@pytest.mark.parametrize(("batch", "dynamic"), [(2, True), (1, False), (2, False)])
def test_program_runs_at_any_batch_size_with_the_layers_it_was_exported_from(tmp_path: Path, net, batch, dynamic):
    model = wb.load(save(tmp_path / "net.pt2", net, (X[:batch],), dynamic=dynamic))
    assert model.inputs[0].shape == (None, 3, 9, 9)
    assert list(model.layers["layer"]) == [
        *("stem.0", "stem.1", "stem.2", "stem.3", "deep", "relu", "mean", "view", "head")
    ]
    assert list(model.layers["type"]) == [
        *("Conv2d", "BatchNorm2d", "ReLU", "MaxPool2d", "Conv2d", "relu", "mean", "view", "Linear")
    ]
    assert model.macs == wb.load(net, inputs=X).macs
    assert model.parameters == sum(p.numel() for p in net.parameters())
    assert same_at_any_batch(model, net)
    assert "stem.0/Conv" in [node.name for node in model.onnx().graph.node]


def test_layers_of_a_program_are_torchs_own_so_that_steps_apply(tmp_path: Path, net):
    model = wb.load(save(tmp_path / "net.pt2", net, (X,)))
    pruned = wb.Prune(0.5).apply(model, _task())
    assert pruned.parameters < model.parameters
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert copy.deepcopy(model.module)(X).shape == (2, 5)
    assert model.fingerprint == wb.load(tmp_path / "net.pt2").fingerprint


def _task() -> wb.Task:
    x, y = np.random.default_rng(0).random((16, 3, 9, 9), np.float32), np.arange(16) % 5
    return wb.Task.from_arrays(x, y, x, y, calibration=8)


@pytest.mark.parametrize("kwargs", [False, True])
def test_program_of_several_inputs_keeps_their_names_and_how_they_go_in(tmp_path: Path, kwargs: bool):
    module = Text().eval()
    given = {"args": (), "kwargs": {"ids": IDS, "mask": MASK}} if kwargs else {"args": (IDS, MASK)}
    model = wb.load(save(tmp_path / "t.pt2", module, **given))
    assert model.keywords == kwargs
    assert [str(s) for s in model.inputs] == ["ids: int64 (N, 4)", "mask: float32 (N, 4)"]
    with torch.no_grad():
        for found, expected in zip(model.run_module(IDS[:1], MASK[:1]), module(IDS[:1], MASK[:1]), strict=True):
            assert torch.allclose(found, expected)
    assert [o.name for o in model.onnx().graph.output] == ["output_0", "output_1"]
    assert wb.load(tmp_path / "t.pt2", inputs={"mask": MASK, "ids": IDS}).fingerprint == model.fingerprint


def test_batch_size_written_into_a_program_stays_and_is_declared(tmp_path: Path):
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, torch.zeros(2, 1)], 1)

    model = wb.load(save(tmp_path / "f.pt2", Fixed(), (torch.rand(2, 3),), dynamic=False))
    assert model.inputs[0].shape == (2, 3)
    with pytest.warns(ExportWarning, match="batches of 2 only"):
        graph = model.onnx()
    assert graph.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 2


class Payload:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


def rewritten(path: Path, change: Callable[[dict, dict], None]) -> Path:
    """A saved program with its JSON, and the other files of its archive, changed."""
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    key = next(name for name in files if name.endswith("models/model.json"))
    program = json.loads(files[key])
    change(program, files)
    files[key] = json.dumps(program).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def test_program_that_would_run_code_is_refused_unrun(tmp_path: Path, net):
    ran = tmp_path / "ran"
    run = f"__import__('os').system('touch {ran}')"

    def target(program: dict, files: dict) -> None:
        program["graph_module"]["graph"]["nodes"][0]["target"] = "torch.os.system"

    def file_operator(program: dict, files: dict) -> None:
        program["graph_module"]["graph"]["nodes"][0]["target"] = "torch.ops.aten.from_file.default"

    def name(program: dict, files: dict) -> None:
        program["graph_module"]["graph"]["inputs"][-1]["as_tensor"]["name"] = f"x={run}"

    def expression(program: dict, files: dict) -> None:
        size = {"as_expr": {"expr_str": run, "hint": None}}
        program["graph_module"]["graph"]["tensor_values"]["x"]["sizes"][0] = size

    def guard(program: dict, files: dict) -> None:
        program["guards_code"] = [run]

    def pickled(program: dict, files: dict) -> None:
        buffer = io.BytesIO()
        torch.save((Payload(ran),), buffer)
        files[next(n for n in files if "sample_inputs" in n)] = buffer.getvalue()

    def library(program: dict, files: dict) -> None:
        files["net/data/aotinductor/model/a.so"] = b"\x7fELF"

    for change in (target, file_operator, name, expression, pickled, library):
        path = save(tmp_path / f"{change.__name__}.pt2", net, (X,))
        with pytest.raises(LoadError, match="is refused|code that would run"):
            wb.load(rewritten(path, change))
    # guards are Python text too; they are dropped, for honest programs have them
    wb.load(rewritten(save(tmp_path / "guard.pt2", net, (X,)), guard)).run_module(X)
    assert not ran.exists()


@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_truncated_program_is_called_damaged(tmp_path: Path, net, keep: float):
    data = save(tmp_path / "net.pt2", net, (X,)).read_bytes()
    (tmp_path / "net.pt2").write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(LoadError, match="damaged or incomplete"):
        wb.load(tmp_path / "net.pt2")


# TorchScript


@pytest.fixture(params=["trace", "script"])
def script(request: pytest.FixtureRequest, tmp_path: Path, net) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, but files of it are about
        made = torch.jit.trace(net, X) if request.param == "trace" else torch.jit.script(net)
        torch.jit.save(made, tmp_path / "net.pt")
    return tmp_path / "net.pt"


def test_torchscript_becomes_a_module_with_the_layers_that_own_its_weights(script: Path, net):
    model = wb.load(script, inputs=X)
    table = model.layers.set_index("layer")
    # layers without weights are left as the operations they are
    assert list(table.index) == [*("stem.0", "stem.1", "relu", "max_pool2d", "deep", "relu_1", "mean", "view", "head")]
    assert list(table.loc[["stem.0", "stem.1", "deep", "head"], "type"]) == [
        *("Conv2d", "BatchNorm2d", "Conv2d", "Linear")
    ]
    assert [str(spec) for spec in model.inputs] == ["x: float32 (N, 3, 9, 9)"]
    assert model.parameters == sum(p.numel() for p in net.parameters())
    assert same_at_any_batch(model, net)
    assert not model.notes


def test_torchscript_needs_inputs_that_fit(script: Path):
    with pytest.raises(LoadError, match="inputs="):
        wb.load(script)
    with pytest.raises(LoadError, match="fails in its own forward"):
        wb.load(script, inputs=torch.rand(2, 5))
    with pytest.raises(LoadError, match="no input 'y'"):
        wb.load(script, inputs={"y": X})


def test_traced_attention_runs_at_any_batch_size_whether_converted_or_kept(tmp_path: Path):
    class Attend(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.mix(x, x, x, need_weights=False)[0].mean(1))

    module, x = Attend().eval(), torch.rand(2, 4, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(module, x, check_trace=False), tmp_path / "a.pt")
    model = wb.load(tmp_path / "a.pt", inputs=x)
    assert model.layers["parameters"].sum() == model.parameters
    with torch.no_grad():
        assert torch.allclose(model.run_module(x[:1]), module(x[:1]), atol=1e-6)


def test_recurrent_program_of_one_batch_size_is_never_run_at_another(tmp_path: Path):
    # the kernel would read past the end of its hidden state
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(3, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(x)[0]

    model = wb.load(save(tmp_path / "r.pt2", Recurrent().eval(), (torch.rand(2, 5, 3),), dynamic=False))
    assert model.inputs[0].shape == (2, 5, 3)


def test_truncated_torchscript_is_called_damaged(script: Path):
    script.write_bytes(script.read_bytes()[:3000])
    with pytest.raises(LoadError, match="damaged or incomplete"):
        wb.load(script, inputs=X)


def test_script_that_cannot_be_converted_is_kept_and_says_so(tmp_path: Path):
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            while bool((x.sum() < 10).item()):
                x = self.fc(x) + 1 + x.abs()
            return x

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(Loop().eval()), tmp_path / "loop.ts")
    model = wb.load(tmp_path / "loop.ts", inputs=torch.rand(2, 3))
    assert "Kept as TorchScript" in model.notes[0]
    assert model.run_module(torch.rand(2, 3)).shape == (2, 3)
    assert list(model.layers["layer"]) == ["loop"]
    assert model.layers["parameters"].sum() == model.parameters == 12


# Keras, in a process of its own: its backend is decided once and for all by the first import


with_keras = pytest.mark.skipif(importlib.util.find_spec("keras") is None, reason="needs the extra keras")


def in_new_process(code: str, folder: Path) -> str:
    """Runs code with ``folder`` as its working directory; what it printed."""
    given = {k: v for k, v in os.environ.items() if k != "KERAS_BACKEND"}
    root = str(Path(__file__).parents[2])
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        cwd=folder,
        env={**given, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    return found.stdout


@with_keras
def test_keras_files_load_as_modules_in_their_own_layout_and_export(tmp_path: Path):
    code = """
        import copy, sys
        import workbench as wb
        import numpy as np, onnxruntime, torch
        assert "keras" not in sys.modules
        wb.models.sources.keras_file._keras()
        import keras
        from keras import layers as L
        keras.utils.set_random_seed(0)

        x = keras.Input((12, 12, 3), name="image")
        h = L.ReLU(name="act")(L.BatchNormalization(name="bn")(L.Conv2D(8, 3, padding="same", name="conv")(x)))
        h = L.MaxPooling2D(name="pool")(L.Add(name="add")([h, L.Conv2D(8, 3, padding="same", name="deep")(h)]))
        net = keras.Model(x, L.Dense(5, name="fc")(L.GlobalAveragePooling2D(name="mean")(h)))
        ids, more = keras.Input((6,), dtype="int32", name="ids"), keras.Input((2,), name="more")
        tail = keras.Sequential([keras.Input((6,)), L.Dense(3, activation="gelu", name="a")], name="tail")
        rnn = L.LSTM(4, name="rnn")(L.Embedding(9, 3, name="table")(ids))
        text = keras.Model([ids, more], tail(L.Concatenate()([rnn, more])))

        for file in ("net.keras", "net.h5"):
            net.save(file)
            torch.manual_seed(3); expected = torch.rand(1); torch.manual_seed(3)
            model = wb.load(file)
            assert torch.equal(torch.rand(1), expected)
            print([str(s) for s in model.inputs], list(model.layers["layer"]), list(model.layers["type"]), model.macs)
            session = onnxruntime.InferenceSession(model.onnx().SerializeToString(), providers=["CPUExecutionProvider"])
            for batch in (1, 5):
                values = torch.rand(batch, 12, 12, 3)
                want = net(values).detach().numpy()
                assert np.abs(copy.deepcopy(model.module)(values).detach().numpy() - want).max() < 1e-6
                assert np.abs(session.run(None, {"image": values.numpy()})[0] - want).max() < 1e-5
            with torch.no_grad():
                model.module.fc.bias.add_(1)
            assert np.abs(model.module(values).detach().numpy() - want - 1).max() < 1e-5
            assert not any("keras" in type(m).__module__ for m in model.module.modules())

        text.save("text.keras")
        model = wb.load("text.keras")
        print([str(s) for s in model.inputs], list(model.layers["layer"]))
        values = torch.randint(0, 9, (4, 6), dtype=torch.int32), torch.rand(4, 2)
        want = text(list(values)).detach().numpy()
        session = onnxruntime.InferenceSession(model.onnx().SerializeToString(), providers=["CPUExecutionProvider"])
        assert np.abs(model.module(*values).detach().numpy() - want).max() < 1e-6
        assert np.abs(session.run(None, {"ids": values[0].numpy(), "more": values[1].numpy()})[0] - want).max() < 1e-5

        double = keras.Model(x, L.Lambda(lambda v: v * 2)(x))
        net.save_weights("only.weights.h5")
        for file, says in (("lambda.keras", "Lambda"), ("lambda.h5", "Lambda"), ("only.weights.h5", "weights")):
            if "lambda" in file:
                double.save(file)
            try:
                wb.load(file)
            except wb.errors.LoadError as error:
                assert says in str(error), error
            else:
                raise AssertionError(file)
    """
    found = in_new_process(code, tmp_path).splitlines()
    names = "['conv', 'bn', 'act', 'deep', 'add', 'pool', 'mean', 'fc']"
    types = (
        "['Conv2D', 'BatchNormalization', 'ReLU', 'Conv2D', 'Add', 'MaxPooling2D', 'GlobalAveragePooling2D', 'Dense']"
    )
    macs = 144 * 8 * 27 + 144 * 8 * 72 + 40
    assert found[:2] == [f"['image: float32 (N, 12, 12, 3)'] {names} {types} {macs}"] * 2
    assert found[2] == "['ids: int32 (N, 6)', 'more: float32 (N, 2)'] ['table', 'rnn', 'concatenate', 'tail.a']"


@pytest.fixture
def keras_archive(tmp_path: Path) -> Path:
    with zipfile.ZipFile(tmp_path / "x.keras", "w") as archive:
        archive.writestr("config.json", "{}")
    return tmp_path / "x.keras"


def test_keras_on_another_backend_is_one_clear_error(keras_archive: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "keras", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    with pytest.raises(LoadError, match="KERAS_BACKEND is 'jax'"):
        wb.load(keras_archive)
    other = types.ModuleType("keras")
    other.backend = types.SimpleNamespace(backend=lambda: "jax")
    monkeypatch.setitem(sys.modules, "keras", other)
    with pytest.raises(LoadError, match="already imported with the jax backend"):
        wb.load(keras_archive)


def test_missing_keras_gives_the_line_that_installs_it(keras_archive: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "keras", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LoadError, match=r'pip install "inference-workbench\[keras\]"'):
        wb.load(keras_archive)


@pytest.mark.parametrize("name", ["x.keras", "x.h5"])
def test_damaged_keras_file_is_refused_before_keras_is_asked(tmp_path: Path, monkeypatch, name: str):
    monkeypatch.setattr(keras_file, "_keras", lambda: pytest.fail("keras was asked"))
    (tmp_path / name).write_bytes(b"PK\x03\x04 and then nothing")
    with pytest.raises(LoadError, match="damaged or incomplete"):
        wb.load(tmp_path / name)

"""Packages: what is saved runs elsewhere without the model and without this library, and nothing unsafe is opened."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import workbench as wb
from workbench import deployment
from workbench.errors import BackendError

BACKENDS = [wb.Eager(threads=1), wb.OnnxRuntime(threads=1), wb.OpenVINO(threads=1)]
ABOUT = {"classes": list("0123456789"), "recipe": {"steps": []}}


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 5)

    def forward(self, values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.first(values)
        return hidden, hidden * weights[:, None]


@pytest.fixture(scope="module")
def lenet() -> wb.Model:
    return wb.load("lenet5")


@pytest.fixture(scope="module")
def saved(lenet: wb.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package of ONNX Runtime that tests copy before they damage it."""
    with wb.OnnxRuntime(threads=1).compile(lenet) as engine:
        engine.about = ABOUT
        return engine.save(tmp_path_factory.mktemp("packages") / "lenet")


@pytest.fixture
def package(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "package"))


def images(count: int) -> np.ndarray:
    return np.random.default_rng(0).random((count, 1, 28, 28), dtype=np.float32)


def edit(package: Path, **changes: object) -> None:
    manifest = json.loads((package / "package.json").read_text())
    (package / "package.json").write_text(json.dumps({**manifest, **changes}))


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: type(b).__name__)
def test_an_opened_package_is_the_engine_that_was_saved(lenet: wb.Model, backend: wb.Backend, tmp_path: Path):
    x = images(3)
    with backend.compile(lenet) as engine:
        engine.about = ABOUT
        wanted, rows = engine(x), engine.profile((x,), 5)
        folder = engine.save(tmp_path / "deep" / "package")
        kept = (engine.name, engine.precision, engine.inputs, engine.outputs, engine.provider, engine.about)
    with deployment.open(folder) as again:
        assert again.backend == backend
        assert (again.name, again.precision, again.inputs, again.outputs, again.provider, again.about) == kept
        np.testing.assert_allclose(again(x), wanted, atol=1e-6)
        again_rows = again.profile((x,), 5)
        assert {layer for r in again_rows for layer in r.layers} == {layer for r in rows for layer in r.layers}


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: type(b).__name__)
def test_several_inputs_by_keyword_survive_a_package(backend: wb.Backend, tmp_path: Path):
    model = wb.load(Pair(), inputs={"values": torch.randn(2, 8), "weights": torch.randn(2)})
    x, w = np.ones((3, 8), np.float32), np.arange(3, dtype=np.float32)
    with backend.compile(model) as engine:
        wanted = engine(x, w)
        engine.save(tmp_path / "p")
    with deployment.open(tmp_path / "p") as again:
        for a, b in zip(again(x, w), wanted, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)


def test_int8_stays_int8_in_every_package(lenet: wb.Model, digits: wb.Task, tmp_path: Path):
    x, int8 = images(2), wb.Quantize("int8").apply(lenet, digits)
    for backend in BACKENDS[1:]:
        with backend.compile(int8) as engine:
            wanted, size = engine(x), sum(map(len, engine.artifact().values()))
            engine.save(tmp_path / backend.title)
        with deployment.open(tmp_path / backend.title) as again:
            assert again.precision == "int8"
            np.testing.assert_array_equal(again(x), wanted)
        weights = max(p.stat().st_size for p in (tmp_path / backend.title).glob("model.*"))
        assert weights <= size < 4 * lenet.parameters


RUN = """
import runpy, sys
for name in ("torch", "workbench", "onnx"):
    sys.modules[name] = None
sys.argv = ["run.py", *sys.argv[2:]]
runpy.run_path(%r, run_name="__main__")
"""


@pytest.mark.parametrize("backend", BACKENDS[1:], ids=lambda b: type(b).__name__)
def test_run_py_runs_without_torch_and_without_this_library(lenet: wb.Model, backend: wb.Backend, tmp_path: Path):
    x = images(3)
    with backend.compile(lenet) as engine:
        engine.about = ABOUT
        wanted = engine(x)
        folder = engine.save(tmp_path / "package")
    np.save(tmp_path / "input.npy", x)
    command = [sys.executable, "-c", RUN % str(folder / "run.py"), "-", "input.npy"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    np.testing.assert_allclose(np.load(tmp_path / "outputs.npz")["arr_0"], wanted, atol=1e-5)
    assert run.stdout.splitlines()[-1] == "top class: " + " ".join(ABOUT["classes"][i] for i in wanted.argmax(1))
    assert "torch" not in (folder / "requirements.txt").read_text()
    usage = subprocess.run(command[:4], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert usage.returncode == 1
    assert "usage: python run.py" in usage.stderr


def test_run_py_of_an_eager_package_says_that_it_needs_torch_and_runs(lenet: wb.Model, tmp_path: Path):
    x = images(2)
    with wb.Eager(threads=1).compile(lenet) as engine:
        wanted = engine(x)
        folder = engine.save(tmp_path / "package")
    assert "torch==" in (folder / "requirements.txt").read_text()
    np.save(tmp_path / "input.npy", x)
    command = [sys.executable, str(folder / "run.py"), "input.npy"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    np.testing.assert_allclose(np.load(tmp_path / "outputs.npz")["arr_0"], wanted, atol=1e-5)


def test_a_package_pins_what_it_needs_and_describes_what_it_takes(saved: Path):
    manifest = json.loads((saved / "package.json").read_text())
    assert manifest["inputs"] == [{"name": "x", "shape": [None, 1, 28, 28], "dtype": "float32"}]
    assert manifest["outputs"] == [{"name": "output", "shape": [None, 10], "dtype": "float32"}]
    assert manifest["backend"] == {"backend": "OnnxRuntime", "provider": "cpu", "threads": 1, "graph_level": "all"}
    assert manifest["about"] == ABOUT
    assert set(manifest["files"]) == {p.name for p in saved.iterdir()} - {"package.json"}
    pins = [line for line in (saved / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert [pin.partition("==")[0] for pin in pins] == ["onnxruntime", "numpy"]


def test_a_package_replaces_a_package_and_an_empty_folder(lenet: wb.Model, package: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with wb.OpenVINO().compile(lenet) as engine:
        engine.save(package)
        engine.save(tmp_path / "empty")
    for folder in (package, tmp_path / "empty"):
        assert {p.name for p in folder.iterdir()} == {
            "model.bin", "model.xml", "package.json", "requirements.txt", "run.py",
        }  # fmt: skip
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "package"]


@pytest.mark.parametrize("what", ["file", "other folder", "package with notes"])
def test_nothing_but_a_package_is_overwritten(lenet: wb.Model, package: Path, tmp_path: Path, what: str):
    target = tmp_path / "mine"
    if what == "file":
        target.write_text("thesis")
    elif what == "other folder":
        target.mkdir()
        (target / "thesis.txt").write_text("thesis")
    else:
        package.rename(target)
        (target / "thesis.txt").write_text("thesis")
    with wb.OnnxRuntime().compile(lenet) as engine, pytest.raises(FileExistsError, match="mine"):
        engine.save(target)
    assert (target if what == "file" else target / "thesis.txt").read_text() == "thesis"


def test_a_write_that_fails_leaves_the_old_package_and_nothing_else(lenet: wb.Model, package: Path, monkeypatch):
    before = {p.name: p.read_bytes() for p in package.iterdir()}
    plain = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        if self.name == "run.py":
            raise OSError("No space left on device")
        return plain(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with wb.OpenVINO().compile(lenet) as engine, pytest.raises(OSError, match="No space left"):
        engine.save(package)
    assert {p.name: p.read_bytes() for p in package.iterdir()} == before
    assert [p.name for p in package.parent.iterdir()] == [package.name]


def cut(package: Path) -> None:
    data = (package / "model.onnx").read_bytes()
    (package / "model.onnx").write_bytes(data[: len(data) // 2])


def leave(package: Path) -> None:
    outside = package.parent / "outside.onnx"
    shutil.move(package / "model.onnx", outside)
    (package / "model.onnx").symlink_to(outside)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p: shutil.rmtree(p), "is not a package: it has no package.json"),
        (lambda p: (p / "package.json").unlink(), "is not a package: it has no package.json"),
        (lambda p: (p / "package.json").write_text("{"), "is damaged"),
        (lambda p: (p / "package.json").write_text("[]"), "does not describe a package"),
        (lambda p: (p / "package.json").write_bytes(b"\xff\xfe{"), "is damaged"),
        (lambda p: (p / "model.onnx").unlink(), "model.onnx is missing"),
        (cut, "model.onnx is not the file that was saved"),
        (lambda p: (p / "run.py").write_text("import os"), "run.py is not the file that was saved"),
        (leave, "model.onnx is a link that leaves it"),
        (lambda p: edit(p, version=2), "package format 2; this version reads up to 1"),
        (lambda p: edit(p, version="1"), "package format '1'"),
        (lambda p: edit(p, format="zip"), "does not describe a package"),
        (lambda p: edit(p, files={"../model.onnx": "0"}), "'../model.onnx' is not a plain file name"),
        (lambda p: edit(p, files={"/etc/passwd": "0"}), "is not a plain file name"),
        (lambda p: edit(p, files={"..": "0"}), "is not a plain file name"),
        (lambda p: edit(p, files={"a\\b": "0"}), "is not a plain file name"),
        (lambda p: edit(p, files=["model.onnx"]), "it lists no files"),
        (lambda p: edit(p, files={}), "holds no model.onnx"),
        (lambda p: edit(p, inputs=[{"name": "x"}]), "is damaged: KeyError"),
        (lambda p: edit(p, inputs=[{"name": "x", "shape": [None, -1], "dtype": "float32"}]), "shape [None, -1]"),
        (lambda p: edit(p, inputs=[{"name": "x", "shape": [None], "dtype": "object"}]), "dtype 'object'"),
        (lambda p: edit(p, about=3), "is damaged: TypeError"),
        (lambda p: edit(p, backend={"backend": "Abacus"}), "There is no backend 'Abacus'"),
        (lambda p: edit(p, backend={"backend": "OnnxRuntime", "threads": 0}), "threads is 0"),
    ],
)
def test_a_damaged_or_unsafe_package_is_refused(package: Path, damage, words: str):
    damage(package)
    with pytest.raises(BackendError) as refusal:
        deployment.open(package)
    assert words in str(refusal.value)


def test_a_graph_that_is_whole_but_no_model_is_refused(package: Path):
    (package / "model.onnx").write_bytes(b"not a graph")
    manifest = json.loads((package / "package.json").read_text())
    files = {**manifest["files"], "model.onnx": hashlib.sha256(b"not a graph").hexdigest()}
    edit(package, files=files)
    with pytest.raises(BackendError, match="cannot run the package of lenet5"):
        deployment.open(package)


def test_another_library_version_is_a_warning(package: Path):
    libraries = json.loads((package / "package.json").read_text())["libraries"]
    edit(package, libraries={**libraries, "numpy": "1.0.0"})
    with pytest.warns(UserWarning, match=r"was written with numpy 1\.0\.0 \(here "), deployment.open(package) as engine:
        assert engine(images(1)).shape == (1, 10)

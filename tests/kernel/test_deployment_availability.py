"""What runs here is found out by trying it; what does not says what is missing and how to get it."""

from __future__ import annotations

import importlib
import sys

import numpy as np
import pytest
import torch

import workbench as wb
from workbench.deployment import BACKENDS, compiled, openvino
from workbench.deployment import onnxruntime as ort
from workbench.deployment.doctor import doctor
from workbench.errors import BackendError, BackendUnavailable

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@pytest.fixture(scope="module")
def lenet() -> wb.Model:
    return wb.load("lenet5")


@pytest.fixture(autouse=True)
def _forget():
    """Findings are cached for the life of a process; each test finds out anew."""
    caches = (compiled._compiler, openvino._library, openvino._core, ort._provider_missing)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def test_the_doctor_has_a_row_for_every_backend_and_a_reason_for_every_no():
    rows = doctor()
    for name in BACKENDS:
        assert any(row.name == f"{name}()" for row in rows)
    gpu = {"OnnxRuntime(provider='cuda')", "OnnxRuntime(provider='tensorrt')", "Eager(device='cuda')"}
    assert gpu <= {row.name for row in rows}
    assert all(row.usable or row.why for row in rows)
    assert next(row for row in rows if row.name == "OnnxRuntime()").usable
    assert next(row for row in rows if row.name == "Eager()").usable


def test_a_missing_openvino_gives_the_line_that_installs_it(lenet: wb.Model, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    found = wb.OpenVINO().availability()
    assert not found.usable
    assert found.command == 'pip install "inference-workbench[openvino]"'
    with pytest.raises(BackendUnavailable) as refusal:
        wb.OpenVINO().compile(lenet)
    assert 'To enable it: pip install "inference-workbench[openvino]"' in str(refusal.value)


def test_a_missing_onnx_runtime_is_a_no_and_not_a_crash(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    found = wb.OnnxRuntime().availability()
    assert (found.usable, found.command) == (False, "pip install onnxruntime")


@NO_GPU
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_provider_that_does_not_load_is_an_error_and_not_the_cpu(lenet: wb.Model, provider: str, capfd):
    with pytest.raises(BackendUnavailable) as refusal:
        wb.OnnxRuntime(provider=provider).compile(lenet)
    assert ort.PROVIDERS[provider] in str(refusal.value)
    assert capfd.readouterr() == ("", "")


@NO_GPU
def test_a_listed_provider_that_does_not_load_names_the_library_it_lacks():
    library = importlib.import_module("onnxruntime")
    if "CUDAExecutionProvider" not in library.get_available_providers():
        pytest.skip("this build of ONNX Runtime lists no CUDA provider")
    why = wb.OnnxRuntime(provider="cuda").availability().why
    assert "CUDAExecutionProvider does not load: lib" in why
    assert ".so" in why


@NO_GPU
def test_a_session_on_another_provider_than_asked_for_is_refused(lenet: wb.Model):
    with pytest.raises(BackendUnavailable, match="loaded CPUExecutionProvider instead of CUDAExecutionProvider"):
        ort.open_session(lenet.onnx().SerializeToString(), wb.OnnxRuntime(provider="cuda"))


def test_a_provider_that_does_not_load_warns_of_both_distributions_installed(monkeypatch):
    monkeypatch.setattr(ort.metadata, "version", lambda name: "1.0")
    found = wb.OnnxRuntime().availability()
    assert found.usable
    assert "onnxruntime and onnxruntime-gpu are both installed" in found.why
    assert found.command.startswith("pip uninstall -y onnxruntime onnxruntime-gpu &&")
    monkeypatch.setattr(ort, "_provider_missing", lambda provider: "it is not there")
    gpu = wb.OnnxRuntime(provider="cuda").availability()
    assert not gpu.usable
    assert "both installed" in gpu.why


@NO_GPU
@pytest.mark.parametrize("kind", [wb.Eager, wb.Compiled])
def test_a_gpu_that_is_not_there_is_refused_before_any_work(lenet: wb.Model, kind: type[wb.Backend]):
    with pytest.raises(BackendUnavailable, match="cannot run here: torch"):
        kind(device="cuda").compile(lenet)


def test_an_openvino_device_that_is_not_there_is_refused(lenet: wb.Model):
    with pytest.raises(BackendUnavailable, match=r"finds no device NPU\.7 here, only CPU"):
        wb.OpenVINO(device="NPU.7").compile(lenet)


def test_torch_compile_needs_a_compiler_that_works(monkeypatch):
    if sys.platform == "win32":
        pytest.skip("compilers are found otherwise on Windows")
    monkeypatch.setenv("CXX", "no-such-compiler")
    found = wb.Compiled().availability()
    assert not found.usable
    assert "no-such-compiler is not installed" in found.why
    assert found.command
    compiled._compiler.cache_clear()
    monkeypatch.setenv("CXX", "false")
    assert "false fails: exit status 1" in wb.Compiled().availability().why


def test_bf16_on_onnx_runtime_is_refused_naming_the_operation_and_the_layer(lenet: wb.Model, digits: wb.Task):
    bf16 = wb.Quantize("bf16").apply(lenet, digits)
    with pytest.raises(BackendError, match=r"no bfloat16 kernel for Conv(2d)? \(layer \w+\)"):
        wb.OnnxRuntime().check(bf16)


def test_inputs_that_numpy_cannot_hold_are_refused():
    model = wb.Model("half", {"x": torch.zeros(2, 3, dtype=torch.bfloat16)}, module=torch.nn.Linear(3, 3).bfloat16())
    for backend in (wb.Eager(), wb.OnnxRuntime(), wb.OpenVINO()):
        with pytest.raises(BackendError, match="which have no bfloat16"):
            backend.check(model)


def test_openvino_computes_in_what_was_asked_for_and_says_so(lenet: wb.Model):
    x = np.random.default_rng(0).random((4, 1, 28, 28), dtype=np.float32)
    wanted = lenet.run_module(torch.from_numpy(x)).detach().numpy()
    with wb.OpenVINO().compile(lenet) as engine:
        assert engine.precision == "fp32"
        assert engine._compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name() == "f32"
        np.testing.assert_allclose(engine(x), wanted, atol=1e-4)
    half = wb.OpenVINO(precision="bf16")
    if not half.availability().usable:
        pytest.skip(half.availability().why)
    with half.compile(lenet) as engine:
        assert engine.precision == "bf16"
        error = np.abs(engine(x) - wanted).max()
    assert 1e-4 < error < 0.2

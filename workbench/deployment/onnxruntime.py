"""`OnnxRuntime`: the ONNX graph on ONNX Runtime, on the CPU or through one of its GPU providers."""

from __future__ import annotations

import ctypes
import importlib
import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import onnx

from workbench.deployment._base import (
    Availability,
    Backend,
    Engine,
    Output,
    reason,
    refuse_bfloat16_inputs,
)
from workbench.deployment._nvidia import nvidia_driver
from workbench.deployment._onnx import (
    example_arrays,
    first_product,
    output_specs,
    refusal,
    serialized,
    wanted_inputs,
)
from workbench.deployment._ort_profile import OrtRecorder
from workbench.deployment._timing import Recorder
from workbench.deployment.package import Contents, runner
from workbench.errors import BackendError, BackendUnavailable
from workbench.jobs import SILENT, Progress
from workbench.models.model import Model, TensorSpec

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
GRAPH_LEVELS = {
    "disabled": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}
_BOTH = (
    "onnxruntime and onnxruntime-gpu are both installed; they share one folder, so that the GPU providers vanish and "
    "versions mix"
)
_ONE = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu"


@dataclass(frozen=True)
class OnnxRuntime(Backend):
    """ONNX Runtime.

    Parameters
    ----------
    provider
        ``cpu``, ``cuda`` or ``tensorrt``. A provider that does not load is an error; single operations it has no kernel
        for run on the CPU, as ONNX Runtime places them.
    threads
        Threads inside one operation; None for all physical cores.
    graph_level
        How far the graph is optimised on loading: ``disabled``, ``basic``, ``extended``, ``all``.
    """

    title: ClassVar[str] = "ONNX Runtime"

    provider: str = "cpu"
    threads: int | None = None
    graph_level: str = "all"

    def __post_init__(self) -> None:
        self._check_choice("provider", tuple(PROVIDERS))
        self._check_choice("graph_level", tuple(GRAPH_LEVELS))
        self._check_threads()

    @classmethod
    def variants(cls) -> tuple[Backend, ...]:
        return tuple(cls(provider=name) for name in PROVIDERS)

    def _settings(self) -> tuple[str, ...]:
        provider = {"cpu": (), "cuda": ("CUDA",), "tensorrt": ("TensorRT",)}[self.provider]
        return (*provider, *(() if self.graph_level == "all" else (f"graph {self.graph_level}",)))

    def availability(self) -> Availability:
        try:
            _library()
        except BackendUnavailable as error:
            return Availability(False, error.why, error.command)
        installed = _distributions()
        clash = len(installed) > 1
        if self.provider != "cpu":
            why = _provider_missing(self.provider)
            if why:
                return Availability(False, _BOTH, _ONE) if clash else Availability(False, why, _command(self.provider))
        return Availability(True, _BOTH if clash else "", _ONE if clash else "")

    def check(self, model: Model) -> None:
        refuse_bfloat16_inputs(self, model)
        if self.provider == "cpu" and model.precision == "bf16":
            raise BackendError(
                f"ONNX Runtime's CPU provider has no bfloat16 kernel for {first_product(model)}, so it cannot run "
                f"{model.name}. Run it on wb.OpenVINO() or wb.Eager(), or quantise to fp16 or int8 instead."
            )

    def prepare(self, model: Model) -> None:
        model.onnx()

    def compile(self, model: Model, progress: Progress = SILENT) -> Engine:
        self.require()
        self.check(model)
        progress(0.0, "exporting to ONNX")
        data = serialized(model, self.title)
        progress(0.6, "creating the session")
        try:
            engine = self._engine(data, model.name, model.precision, model.inputs, ())
        except _errors() as error:
            raise refusal(self.title, model.name, model.onnx(), error) from None
        arrays = example_arrays(model)
        try:
            outputs = engine._outputs(arrays)
        except _errors() as error:
            raise refusal(self.title, model.name, model.onnx(), error) from None
        engine.outputs = output_specs(engine._names, outputs, len(arrays[0]))
        progress(1.0, "compiled")
        return engine

    def open(self, contents: Contents) -> Engine:
        self.require()
        data = contents.path("model.onnx").read_bytes()
        try:
            engine = self._engine(data, contents.name, contents.precision, contents.inputs, contents.outputs)
        except _errors() as error:
            raise BackendError(f"{self.title} cannot run the package of {contents.name}: {reason(error)}") from None
        engine.about = contents.about
        return engine

    def _engine(
        self, data: bytes, name: str, precision: str, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]
    ) -> OnnxRuntimeEngine:
        session = open_session(data, self)
        return OnnxRuntimeEngine(
            self, name, precision, inputs, outputs, session.get_providers()[0], self.thread_count,
            session=session, data=data,
        )  # fmt: skip


def open_session(data: bytes, backend: OnnxRuntime, **options: Any) -> Any:
    """An ``InferenceSession`` with the backend's settings; `options` are further attributes of ``SessionOptions``.

    Raises
    ------
    BackendUnavailable
        If the session would run on another provider than the one asked for.
    """
    ort = _library()
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = backend.thread_count
    settings.inter_op_num_threads = 1
    settings.graph_optimization_level = getattr(ort.GraphOptimizationLevel, GRAPH_LEVELS[backend.graph_level])
    settings.log_severity_level = 4  # what goes wrong comes as an exception; the library would print it as well
    for key, value in options.items():
        setattr(settings, key, value)
    wanted = PROVIDERS[backend.provider]
    session = ort.InferenceSession(data, settings, providers=[wanted], enable_fallback=0)
    session.disable_fallback()
    if session.get_providers()[0] != wanted:
        raise BackendUnavailable(
            f"OnnxRuntime(provider={backend.provider!r})",
            f"the session loaded {session.get_providers()[0]} instead of {wanted}",
            _command(backend.provider),
        )
    return session


class OnnxRuntimeEngine(Engine):
    """A session of ONNX Runtime."""

    def __init__(self, *fields: Any, session: Any, data: bytes):
        super().__init__(*fields)
        asked = wanted_inputs([i.name for i in session.get_inputs()], self.inputs, self.backend.title)
        self._feeds = [(self.inputs[i].name, i) for i in asked]
        self._only = self.inputs[0].name if asked == [0] else None
        self._names = [o.name for o in session.get_outputs()]
        self._session, self._data, self._errors = session, data, _errors()

    def _outputs(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        return self._session.run(self._names, {name: inputs[i] for name, i in self._feeds})

    def _run(self, *inputs: np.ndarray) -> Output:
        try:
            if self._only is not None:
                outputs = self._session.run(self._names, {self._only: inputs[0]})
            else:
                outputs = self._outputs(inputs)
        except self._errors as error:
            raise self._failed(inputs, error) from None
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def recorder(self, inputs: Sequence[np.ndarray]) -> Recorder:
        if self.backend.provider != "cpu":
            raise BackendError(
                f"ONNX Runtime times the launch of a kernel on {self.backend.provider}, not the kernel, so that a "
                "profile of it would be wrong. Profile with wb.OnnxRuntime() or wb.Eager()."
            )
        feeds = {name: inputs[i] for name, i in self._feeds}

        def session(data: bytes, **options: Any) -> Any:
            return open_session(data, self.backend, **options)

        return OrtRecorder(session, self._data, feeds)

    def artifact(self) -> dict[str, bytes]:
        return {"model.onnx": self._data}

    def runner(self) -> tuple[str, tuple[str, ...]]:
        name = "onnxruntime" if self.backend.provider == "cpu" else "onnxruntime-gpu"
        return runner("onnxruntime", _RUN), (
            "# onnxruntime and onnxruntime-gpu run this alike on a CPU; never install both",
            f"{name}=={_library().__version__}",
            f"numpy=={np.__version__}",
        )

    def close(self) -> None:
        super().close()
        self._session = None


def _library() -> ModuleType:
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        why = f"onnxruntime is not installed or does not load ({error})"
        raise BackendUnavailable("OnnxRuntime", why, "pip install onnxruntime") from None


def _distributions() -> tuple[str, ...]:
    """Which of the two distributions of ONNX Runtime are installed."""
    found = []
    for name in ("onnxruntime-gpu", "onnxruntime"):
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        found.append(name)
    return tuple(found)


@cache
def _errors() -> tuple[type[Exception], ...]:
    """Everything ONNX Runtime raises; its exceptions share no base of their own."""
    state = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    kinds = (v for v in vars(state).values() if isinstance(v, type) and issubclass(v, Exception))
    return (*kinds, RuntimeError, ValueError)


def _command(provider: str) -> str:
    """The line that installs what a GPU provider needs; nothing where there is no GPU to drive."""
    if not nvidia_driver():
        return ""
    extra = ' "inference-workbench[gpu]"' if provider == "tensorrt" else ""
    return f'pip install "onnxruntime-gpu[cuda,cudnn]"{extra}'


@cache
def _provider_missing(provider: str) -> str:
    """Why a GPU provider does not load, or nothing: found out by running a graph of one node on it."""
    ort = _library()
    wanted = PROVIDERS[provider]
    if wanted not in ort.get_available_providers():
        return f"this build of ONNX Runtime {ort.__version__} has no {wanted}"
    with redirect_stdout(io.StringIO()):  # it prints what it does not find
        ort.preload_dlls()
    info = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "probe", info[:1], info[1:])
    probe = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    # the provider's own complaint goes to the process's standard error; the sentence below says the same
    ort.set_default_logger_severity(4)
    try:
        session = open_session(probe.SerializeToString(), OnnxRuntime(provider=provider))
        session.run(None, {"x": np.ones(1, np.float32)})
    except BackendUnavailable as error:
        return _missing_library(ort, provider) or error.why
    except _errors() as error:
        return _missing_library(ort, provider) or reason(error)
    finally:
        ort.set_default_logger_severity(2)
    return ""


def _missing_library(ort: ModuleType, provider: str) -> str:
    """The shared library a provider fails to find, by loading the provider as ONNX Runtime would."""
    for library in sorted((Path(ort.__file__).parent / "capi").glob(f"*onnxruntime_providers_{provider}.*")):
        try:
            ctypes.CDLL(str(library))
        except OSError as error:
            driver = "" if nvidia_driver() else ", and there is no NVIDIA driver either"
            return f"{PROVIDERS[provider]} does not load: {error}{driver}"
    return ""


_RUN = """options = onnxruntime.SessionOptions()
options.intra_op_num_threads = backend["threads"] or 0
session = onnxruntime.InferenceSession(here / "model.onnx", options, providers=[package["provider"]])
outputs = session.run(None, {i.name: feeds[i.name] for i in session.get_inputs()})
"""

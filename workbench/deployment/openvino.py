"""`OpenVINO`: the ONNX graph on Intel's engine, on the CPU or another device it knows."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np

from workbench.deployment._base import (
    Availability,
    Backend,
    Engine,
    Output,
    reason,
    refuse_bfloat16_inputs,
)
from workbench.deployment._onnx import example_arrays, output_specs, refusal, serialized, wanted_inputs
from workbench.deployment._openvino_profile import OpenVINORecorder
from workbench.deployment._rows import Lineage
from workbench.deployment._timing import Recorder
from workbench.deployment.package import Contents, library_version, runner
from workbench.errors import BackendError, BackendUnavailable
from workbench.jobs import SILENT, Progress
from workbench.models.model import Model, TensorSpec

PRECISIONS = {"fp32": "f32", "bf16": "bf16"}
HINTS = ("latency", "throughput")
DEVICES = ("CPU", "GPU", "NPU")
_INSTALL = 'pip install "inference-workbench[openvino]"'


@dataclass(frozen=True)
class OpenVINO(Backend):
    """OpenVINO.

    Parameters
    ----------
    threads
        None for all physical cores.
    precision
        ``fp32`` or ``bf16``: what floating-point operations are computed in. Left to itself OpenVINO takes bf16 on
        processors that have it. Int8 operations stay int8 under both.
    hint
        ``latency`` (one request at a time, all threads) or ``throughput`` (threads split into streams).
    device
        ``CPU``, ``GPU`` or ``NPU``, with a number where there are several: ``GPU.1``.
    """

    title: ClassVar[str] = "OpenVINO"
    extra: ClassVar[str] = "openvino"

    threads: int | None = None
    precision: str = "fp32"
    hint: str = "latency"
    device: str = "CPU"

    def __post_init__(self) -> None:
        self._check_threads()
        self._check_choice("precision", tuple(PRECISIONS))
        self._check_choice("hint", HINTS)
        kind, _, number = str(self.device).partition(".")
        if kind not in DEVICES or not (number.isdigit() or self.device == kind):
            raise BackendError(f"OpenVINO: device is {self.device!r}. Accepted: {', '.join(DEVICES)}, and e.g. GPU.1.")

    @classmethod
    def variants(cls) -> tuple[Backend, ...]:
        return (cls(), cls(precision="bf16"), cls(device="GPU"), cls(device="NPU"))

    def _settings(self) -> tuple[str, ...]:
        return (
            *(() if self.device == "CPU" else (self.device,)),
            *(() if self.precision == "fp32" else (self.precision,)),
            *(() if self.hint == "latency" else (self.hint,)),
        )

    def availability(self) -> Availability:
        try:
            core = _core()
        except BackendUnavailable as error:
            return Availability(False, error.why, error.command)
        devices = core.available_devices
        if self.device not in devices and f"{self.device}.0" not in devices:
            return Availability(False, f"OpenVINO finds no device {self.device} here, only {', '.join(devices)}")
        if self.precision == "bf16" and "BF16" not in core.get_property(self.device, "OPTIMIZATION_CAPABILITIES"):
            return Availability(False, f"this {self.device} has no bfloat16 instructions")
        return Availability(True)

    def check(self, model: Model) -> None:
        refuse_bfloat16_inputs(self, model)

    def prepare(self, model: Model) -> None:
        model.onnx()

    def compile(self, model: Model, progress: Progress = SILENT) -> Engine:
        self.require()
        self.check(model)
        progress(0.0, "exporting to ONNX")
        data = serialized(model, self.title)
        progress(0.5, "compiling")
        precision = "bf16" if self.precision == "bf16" and model.precision == "fp32" else model.precision
        try:
            network = _core().read_model(data)
            engine = self._engine(network, Lineage.of(model.onnx()), model.name, precision, model.inputs, ())
            arrays = example_arrays(model)
            outputs = engine._outputs(arrays)
        except RuntimeError as error:
            raise refusal(self.title, model.name, model.onnx(), error) from None
        engine.outputs = output_specs([o.name for o in model.onnx().graph.output], outputs, len(arrays[0]))
        progress(1.0, "compiled")
        return engine

    def open(self, contents: Contents) -> Engine:
        self.require()
        try:
            lineage = Lineage.from_list(contents.notes["lineage"])
        except (KeyError, TypeError, ValueError):
            raise BackendError(f"The package of {contents.name} is damaged: its lineage does not read.") from None
        try:
            network = _core().read_model(contents.path("model.xml"), contents.path("model.bin"))
            engine = self._engine(
                network, lineage, contents.name, contents.precision, contents.inputs, contents.outputs
            )
        except RuntimeError as error:
            raise BackendError(f"OpenVINO cannot run the package of {contents.name}: {reason(error)}") from None
        engine.about = contents.about
        return engine

    def _engine(
        self,
        network: Any,
        lineage: Lineage,
        name: str,
        precision: str,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
    ) -> OpenVINOEngine:
        compiled = compile_network(network, self)
        provider = f"OpenVINO {','.join(compiled.get_property('EXECUTION_DEVICES'))}"
        return OpenVINOEngine(
            self, name, precision, inputs, outputs, provider, self.thread_count,
            network=network, compiled=compiled, lineage=lineage,
        )  # fmt: skip


def compile_network(network: Any, backend: OpenVINO, **properties: Any) -> Any:
    """A compiled model with the backend's settings and further `properties`.

    Raises
    ------
    BackendError
        If OpenVINO settles on another floating-point precision than the one asked for.
    """
    settings = {
        "PERFORMANCE_HINT": backend.hint.upper(),
        "INFERENCE_PRECISION_HINT": PRECISIONS[backend.precision],
        **properties,
    }
    if backend.device == "CPU":
        settings["INFERENCE_NUM_THREADS"] = backend.thread_count
    compiled = _core().compile_model(network, backend.device, settings)
    got = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    if got != PRECISIONS[backend.precision]:
        raise BackendError(f"OpenVINO computes in {got} on this {backend.device}, not in {backend.precision} as asked.")
    return compiled


class OpenVINOEngine(Engine):
    """An infer request of OpenVINO."""

    def __init__(self, *fields: Any, network: Any, compiled: Any, lineage: Lineage):
        super().__init__(*fields)
        # an input whose first operation was dropped goes by the name of that operation's output as well
        known = {spec.name for spec in self.inputs}
        names = [next(iter(port.names & known), port.get_any_name()) for port in compiled.inputs]
        self._order = wanted_inputs(names, self.inputs, self.backend.title)
        self._single = self._order == [0]
        self._network, self._compiled, self._lineage = network, compiled, lineage
        self._request = compiled.create_infer_request()

    def _outputs(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        return list(self._request.infer(self._feeds(inputs), share_inputs=True).values())

    def _feeds(self, inputs: Sequence[np.ndarray]) -> dict[int, np.ndarray]:
        return {port: inputs[i] for port, i in enumerate(self._order)}

    def _run(self, *inputs: np.ndarray) -> Output:
        # inputs are read where they lie; outputs are copied, because the request writes the next ones over them
        try:
            if self._single:
                outputs = (*self._request.infer(inputs[0], share_inputs=True).values(),)
            else:
                outputs = tuple(self._outputs(inputs))
        except RuntimeError as error:
            raise self._failed(inputs, error) from None
        return outputs[0] if len(outputs) == 1 else outputs

    def recorder(self, inputs: Sequence[np.ndarray]) -> Recorder:
        def compiled() -> Any:
            return compile_network(self._network, self.backend, PERF_COUNT=True)

        return OpenVINORecorder(compiled, self._feeds(inputs), self._lineage)

    def artifact(self) -> dict[str, bytes]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.xml"
            _library().save_model(self._network, path, compress_to_fp16=False)
            return {p.name: p.read_bytes() for p in (path, path.with_suffix(".bin"))}

    def notes(self) -> dict[str, Any]:
        return {"lineage": self._lineage.to_list()}

    def runner(self) -> tuple[str, tuple[str, ...]]:
        return runner("openvino", _RUN), (f"openvino=={library_version('openvino')}", f"numpy=={np.__version__}")

    def close(self) -> None:
        super().close()
        self._request = self._compiled = self._network = None


@cache
def _library() -> ModuleType:
    try:
        return importlib.import_module("openvino")
    except ImportError as error:
        why = f"openvino is not installed or does not load ({error})"
        raise BackendUnavailable("OpenVINO", why, _INSTALL) from None


@cache
def _core() -> Any:
    """The one core of the process; plug-ins load once."""
    return _library().Core()


_RUN = """settings = {"INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[backend["precision"]]}
if backend["threads"]:
    settings["INFERENCE_NUM_THREADS"] = backend["threads"]
model = openvino.Core().compile_model(here / "model.xml", backend["device"], settings)
outputs = list(model({i: feeds[next(name for name in i.names if name in feeds)] for i in model.inputs}).values())
"""

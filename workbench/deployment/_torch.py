"""What the backends that run torch modules have in common."""

from __future__ import annotations

import copy
import io
import re
import threading
import weakref
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from workbench.deployment._base import Availability, Backend, Engine, Output, reason, refuse_bfloat16_inputs
from workbench.deployment._nvidia import nvidia_driver
from workbench.deployment._onnx import example_arrays, output_specs
from workbench.deployment.package import Contents, library_version, runner
from workbench.errors import BackendError, LoadError, WorkbenchError
from workbench.jobs import SILENT, Progress
from workbench.models.inputs import output_names, outputs
from workbench.models.load import load
from workbench.models.model import Model, TensorSpec


class _Threads:
    """Torch's thread count, one for the whole process: engines set it when they run, the last to close restores it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open = 0
        self._before = 0

    def borrow(self) -> None:
        with self._lock:
            if self._open == 0:
                self._before = torch.get_num_threads()
            self._open += 1

    def give_back(self) -> None:
        with self._lock:
            self._open -= 1
            if self._open == 0 and torch.get_num_threads() != self._before:
                torch.set_num_threads(self._before)


_THREADS = _Threads()


@dataclass(frozen=True)
class TorchBackend(Backend):
    """A backend that runs the model's torch module; a subclass has the fields `threads` and `device`."""

    runs_graphs: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self._check_threads()
        if not isinstance(self.device, str) or not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise BackendError(
                f"{type(self).__name__}: device is {self.device!r}. Accepted: cpu, cuda, or one GPU of several: cuda:1."
            )

    @classmethod
    def variants(cls) -> tuple[Backend, ...]:
        return (cls(), cls(device="cuda"))

    def _settings(self) -> tuple[str, ...]:
        return () if self.device == "cpu" else (self.device,)

    def availability(self) -> Availability:
        if self.device == "cpu":
            return Availability(True)
        if not nvidia_driver():
            return Availability(False, f"torch {torch.__version__} finds no NVIDIA driver")
        if torch.version.cuda is None:
            build = f"torch {torch.__version__} is built without CUDA"
            return Availability(False, build, "pip install --force-reinstall torch")
        try:
            torch.ones(1, device=self.device).add_(1).item()
        except (RuntimeError, AssertionError) as error:
            return Availability(False, f"torch cannot use {self.device}: {str(error).splitlines()[0]}")
        return Availability(True)

    def check(self, model: Model) -> None:
        if model.module is None:
            what = "An int8 ONNX graph" if model.precision == "int8" else "An ONNX graph"
            raise BackendError(
                f"{type(self).__name__} runs torch modules, but {model.name} holds an ONNX graph only. {what} runs on "
                "wb.OnnxRuntime() or wb.OpenVINO()."
            )
        refuse_bfloat16_inputs(self, model)

    def compile(self, model: Model, progress: Progress = SILENT) -> Engine:
        self.require()
        self.check(model)
        # a model is never changed in place, not even by moving it
        module = model.module if self.device == "cpu" else copy.deepcopy(model.module).to(self.device)
        engine = self._engine(
            self, model.name, model.precision, model.inputs, (), _provider(self.device), self.thread_count,
            module=module, keywords=model.keywords,
        )  # fmt: skip
        try:
            progress(0.1, "first run")
            engine.start(example_arrays(model))
        except BaseException:
            engine.close()
            raise
        progress(1.0, "ready")
        return engine

    def open(self, contents: Contents) -> Engine:
        self.require()
        try:
            model = load(contents.path("model.pt2"), name=contents.name)
        except LoadError as error:
            raise BackendError(f"The package of {contents.name} does not open: {error}") from None
        example = model.example
        if not model.keywords and len(example) == len(contents.inputs):
            # a program forgets what its inputs by position are called
            example = dict(zip((spec.name for spec in contents.inputs), example.values(), strict=True))
        engine = self.compile(replace(model, example=example, precision=contents.precision))
        engine.about = contents.about
        return engine

    @property
    @abstractmethod
    def _engine(self) -> type[TorchEngine]:
        """What runs the module."""


def _provider(device: str) -> str:
    return f"torch {torch.__version__.partition('+')[0]} ({device})"


def array(tensor: Tensor) -> np.ndarray:
    """A tensor as a numpy array; bfloat16, which numpy lacks, as float32, which holds it exactly."""
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.float()
    return tensor.cpu().numpy()


def tensor_of(x: np.ndarray) -> Tensor:
    """A tensor over the array's own memory; over a copy where torch cannot use that (read-only, strided)."""
    flags = x.flags
    return torch.from_numpy(x if flags.writeable and flags.c_contiguous else np.array(x, order="C"))


class _ByPosition(nn.Module):
    """A module that takes its inputs by keyword, called by position."""

    def __init__(self, module: nn.Module, names: list[str]):
        super().__init__()
        self.module, self.names = module, names

    def forward(self, *tensors: Tensor) -> Any:
        return self.module(**dict(zip(self.names, tensors, strict=True)))


class TorchEngine(Engine):
    """Runs a torch module; `keywords` says whether it takes its inputs by keyword."""

    def __init__(self, *arguments: Any, module: nn.Module, keywords: bool):
        super().__init__(*arguments)
        self._module, self._keywords = module, keywords
        self._device = self.backend.device
        self._call = self._callable()
        _THREADS.borrow()
        # an engine that is dropped without close() gives its threads back as well
        self._give_back = weakref.finalize(self, _THREADS.give_back)

    def _callable(self) -> Callable[..., Any]:
        """What takes the tensors of one call in order."""
        return self._by_position()

    def _by_position(self) -> nn.Module:
        if not self._keywords:
            return self._module
        return _ByPosition(self._module, [spec.name for spec in self.inputs])

    def raw(self, inputs: tuple[np.ndarray, ...]) -> Any:
        """The module's own return value for one batch."""
        # setting the count rebuilds the thread pool even where it stays the same
        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        tensors = [tensor_of(x) for x in inputs]
        if self._device != "cpu":
            tensors = [t.to(self._device) for t in tensors]
        with torch.inference_mode():
            return self._call(*tensors)

    def start(self, example: tuple[np.ndarray, ...]) -> None:
        """Run the example once and learn the outputs from it.

        Raises
        ------
        BackendError
            If the module does not run on it, or returns something else than tensors.
        """
        try:
            tensors = outputs(self.raw(example))
        except WorkbenchError:
            raise
        except Exception as error:  # the module is a stranger's code and raises what it likes
            raise BackendError(
                f"{self.name} does not run on its own example inputs: {type(error).__name__} {reason(error)} "
                "Load it with inputs that fit: wb.load(module, inputs=…)."
            ) from error
        self.outputs = output_specs(output_names(len(tensors)), [array(t) for t in tensors], len(example[0]))

    def _run(self, *inputs: np.ndarray) -> Output:
        try:
            result = self.raw(inputs)
        except (RuntimeError, IndexError, ValueError) as error:
            raise self._failed(inputs, error) from error
        if type(result) is Tensor:
            return array(result)
        arrays = tuple(array(tensor) for tensor in outputs(result))
        return arrays[0] if len(arrays) == 1 else arrays

    def artifact(self) -> dict[str, bytes]:
        seen: dict[tuple[int, tuple[int, ...]], str] = {}
        weights = {}
        for name, value in self._module.state_dict().items():
            if not isinstance(value, Tensor):
                continue
            # tied weights are one tensor under two names, and take their bytes once
            key = (value.data_ptr(), tuple(value.shape))
            if value.numel() == 0 or seen.setdefault(key, name) == name:
                weights[name] = value.detach().cpu().contiguous().clone()
        return {"model.safetensors": save_safetensors(weights)}

    def files(self) -> dict[str, bytes]:
        return {"model.pt2": self._exported()}

    def _exported(self) -> bytes:
        example = {s.name: _example(s, self._device) for s in self.inputs}
        shapes = {name: {0: torch.export.Dim.DYNAMIC} for name in example}
        try:
            if self._keywords:
                program = torch.export.export(self._module, (), example, dynamic_shapes=shapes)
            else:
                program = torch.export.export(
                    self._module, tuple(example.values()), dynamic_shapes=tuple(shapes.values())
                )
            buffer = io.BytesIO()
            torch.export.save(program, buffer)
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            raise BackendError(
                f"{self.name} cannot be saved as a package, because torch.export does not take it with a batch of any "
                f"size: {reason(error)} Save it from wb.OnnxRuntime() instead."
            ) from error
        return buffer.getvalue()

    def notes(self) -> dict[str, Any]:
        return {"keywords": self._keywords}

    def runner(self) -> tuple[str, tuple[str, ...]]:
        return runner("torch", _RUN), (
            "# this package runs in torch; one saved from wb.OnnxRuntime() or wb.OpenVINO() does without",
            f"torch=={library_version('torch')}",
            f"numpy=={np.__version__}",
        )

    def close(self) -> None:
        super().close()
        self._module = self._call = None
        self._give_back()


def _example(spec: TensorSpec, device: str) -> Tensor:
    # two samples: torch.export takes a batch of one for a constant
    shape = tuple(2 if n is None else n for n in spec.shape)
    return torch.zeros(shape, dtype=getattr(torch, spec.dtype), device=device)


_RUN = """torch.set_num_threads(backend["threads"] or torch.get_num_threads())
module = torch.export.load(here / "model.pt2").module()
tensors = {name: torch.from_numpy(array) for name, array in feeds.items()}
with torch.inference_mode():
    result = module(**tensors) if package["notes"]["keywords"] else module(*tensors.values())
outputs = [t.float() if t.dtype == torch.bfloat16 else t for t in torch.utils._pytree.tree_leaves(result)]
outputs = [t.numpy() for t in outputs if t is not None]
"""

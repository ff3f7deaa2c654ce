"""What the backends that run torch modules have in common."""

from __future__ import annotations

import copy
import io
import re
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from workbench.deployment._base import Availability, Backend, Engine, Output, refuse_bfloat16_inputs
from workbench.deployment._nvidia import nvidia_driver
from workbench.deployment.package import Contents, library_version
from workbench.errors import BackendError
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


def check_device(backend: Backend) -> None:
    """Refuse a `device` that is not ``cpu``, ``cuda`` or ``cuda:1``."""
    if not isinstance(backend.device, str) or not re.fullmatch(r"cpu|cuda(:\d+)?", backend.device):
        raise BackendError(
            f"{type(backend).__name__}: device is {backend.device!r}. Accepted: cpu, cuda, or one GPU of several as cuda:1."
        )


def device_availability(device: str) -> Availability:
    """Whether torch can use `device`, found out by putting a tensor there."""
    if device == "cpu":
        return Availability(True)
    if not nvidia_driver():
        return Availability(False, f"torch {torch.__version__} finds no NVIDIA driver")
    if torch.version.cuda is None:
        build = f"torch {torch.__version__} is built without CUDA"
        return Availability(False, build, "pip install --force-reinstall torch")
    try:
        torch.ones(1, device=device).add_(1).item()
    except (RuntimeError, AssertionError) as error:
        return Availability(False, f"torch cannot use {device}: {str(error).splitlines()[0]}")
    return Availability(True)


def check_module(backend: Backend, model: Model) -> None:
    """Refuse a model that is only a graph, or whose inputs numpy cannot hold."""
    if model.module is None:
        what = "An int8 ONNX graph" if model.precision == "int8" else "An ONNX graph"
        raise BackendError(
            f"{type(backend).__name__} runs torch modules, but {model.name} holds an ONNX graph only. {what} runs on "
            "wb.OnnxRuntime() or wb.OpenVINO()."
        )
    refuse_bfloat16_inputs(backend, model)


def on_device(module: nn.Module, device: str) -> nn.Module:
    """The module itself on the CPU, a copy of it elsewhere: a model is never changed in place."""
    return module if device == "cpu" else copy.deepcopy(module).to(device)


def provider(device: str) -> str:
    """What runs it: ``torch 2.13.0 (cpu)``."""
    return f"torch {torch.__version__.partition('+')[0]} ({device})"


def flattened(value: Any, name: str = "output") -> list[tuple[str, Tensor]]:
    """The tensors in a module's return value with a name each; dicts and dataclasses give the names.

    Raises
    ------
    BackendError
        If it returns something else than tensors in tuples, lists, dicts and dataclasses.
    """
    if isinstance(value, Tensor):
        return [(name, value)]
    if value is None:
        return []
    if isinstance(value, Mapping):
        return [pair for key, part in value.items() for pair in flattened(part, str(key))]
    if is_dataclass(value):
        return [pair for f in fields(value) for pair in flattened(getattr(value, f.name), f.name)]
    if isinstance(value, (tuple, list)):
        parts = [flattened(part, f"{name}_{index}" if index else name) for index, part in enumerate(value)]
        return [pair for part in parts for pair in part]
    raise BackendError(
        f"The module returns a {type(value).__name__} where a tensor is expected. An engine returns tensors, or tuples, "
        "lists, dicts and dataclasses of them: wrap the module so that it returns nothing else."
    )


def array(tensor: Tensor) -> np.ndarray:
    """A tensor as a numpy array; bfloat16, which numpy lacks, as float32, which holds it exactly."""
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.float()
    return tensor.cpu().numpy()


def tensor_of(x: np.ndarray) -> Tensor:
    """A tensor over the array's own memory; over a copy where torch cannot use that (read-only, strided)."""
    flags = x.flags
    return torch.from_numpy(x if flags.writeable and flags.c_contiguous else np.array(x, order="C"))


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
        if not self._keywords:
            return self._module
        names = [spec.name for spec in self.inputs]
        module = self._module
        return lambda *tensors: module(**dict(zip(names, tensors, strict=True)))

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

    def _run(self, *inputs: np.ndarray) -> Output:
        try:
            result = self.raw(inputs)
        except (RuntimeError, IndexError, ValueError) as error:
            raise self._failed(inputs, error) from error
        if type(result) is Tensor:
            return array(result)
        arrays = tuple(array(tensor) for _, tensor in flattened(result))
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
                f"size: {' '.join(str(error).split())[:400]} Save it from wb.OnnxRuntime() instead."
            ) from error
        return buffer.getvalue()

    def notes(self) -> dict[str, Any]:
        return {"keywords": self._keywords}

    def runner(self) -> tuple[str, tuple[str, ...]]:
        return _RUNNER, (
            "# this package runs in torch; one saved from wb.OnnxRuntime() or wb.OpenVINO() does without",
            f"torch=={library_version('torch')}",
            f"numpy=={np.__version__}",
        )

    def close(self) -> None:
        super().close()
        self._module = self._call = None
        self._give_back()


def opened_module(contents: Contents) -> tuple[nn.Module, bool]:
    """The module of a package written by a torch engine, and whether it takes its inputs by keyword."""
    try:
        program = torch.export.load(contents.paths["model.pt2"])
        keywords = bool(contents.notes["keywords"])
    except (KeyError, RuntimeError, ValueError, OSError) as error:
        raise BackendError(f"The package of {contents.name} does not open in torch {torch.__version__}: {error}") from error
    return program.module(), keywords


def _example(spec: TensorSpec, device: str) -> Tensor:
    # two samples: torch.export takes a batch of one for a constant
    shape = tuple(2 if n is None else n for n in spec.shape)
    return torch.zeros(shape, dtype=getattr(torch, spec.dtype), device=device)


_RUNNER = '''"""Run this model: python run.py INPUT.npy …, one file per input of package.json, in its order and preprocessed."""

import json
import sys
from pathlib import Path

import numpy as np
import torch

here = Path(__file__).parent
package = json.loads((here / "package.json").read_text(encoding="utf-8"))
names = [spec["name"] for spec in package["inputs"]]
if len(sys.argv) != 1 + len(names):
    sys.exit(f"usage: python run.py {' '.join(name + '.npy' for name in names)}")
torch.set_num_threads(package["backend"]["threads"] or torch.get_num_threads())
module = torch.export.load(here / "model.pt2").module()
feeds = {name: torch.from_numpy(np.load(path)) for name, path in zip(names, sys.argv[1:], strict=True)}
with torch.inference_mode():
    result = module(**feeds) if package["notes"]["keywords"] else module(*feeds.values())
outputs = [t.float().numpy() if t.dtype == torch.bfloat16 else t.numpy() for t in torch.utils._pytree.tree_leaves(result)]
for spec, output in zip(package["outputs"], outputs, strict=True):
    print(spec["name"], output.dtype, output.shape)
np.savez("outputs.npz", *outputs)
classes = package["about"].get("classes")
if classes:
    print("top class:", *(classes[i] for i in outputs[0].argmax(axis=-1).reshape(-1)))
'''

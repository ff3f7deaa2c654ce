"""A Keras 3 file, run by Keras's own torch backend and kept as a module without Keras."""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from workbench.errors import LoadError
from workbench.models import inputs
from workbench.models.model import Model
from workbench.models.sources import _program
from workbench.models.sources._base import Request
from workbench.models.sources.module import checked

if TYPE_CHECKING:
    import keras

TITLE = "A Keras file"
OPTIONS = {"inputs"}

_HDF5 = b"\x89HDF\r\n\x1a\n"
_OTHERWISE = "export the model to ONNX and load that: model.export('x.onnx', format='onnx')."
_INSTALL = 'pip install "inference-workbench[keras]"'


def fits(request: Request) -> bool:
    """A file by its ending."""
    return request.suffix in (".keras", ".h5", ".hdf5")


def read(request: Request) -> Model:
    """The model with the layers and the input layout the file declares, which is channels last as a rule."""
    _check_file(request)
    keras = _keras()
    network = _loaded(keras, request)
    names = [tensor.name for tensor in network.inputs]
    example = _example(request, network, names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about its tree utilities
        module = _without_keras(_Network(network, keras), example, request)
    return checked(module, example, False, request.title, source=request.path.name, weights="as given")


def _check_file(request: Request) -> None:
    with request.path.open("rb") as file:
        start = file.read(len(_HDF5))
    if request.suffix == ".keras" and not request.members:
        raise request.damaged("it is no archive as Keras 3 writes it")
    if request.suffix != ".keras" and start != _HDF5:
        raise request.damaged("it is no HDF5 file")


def _keras() -> Any:
    """The keras package on torch; importing it decides the backend for the whole process."""
    if "keras" not in sys.modules:
        if importlib.util.find_spec("keras") is None:
            raise LoadError(f"Keras files need the keras package, which is not installed. To enable it: {_INSTALL}")
        before = os.environ.get("KERAS_BACKEND")
        if before not in (None, "torch"):
            raise LoadError(
                f"KERAS_BACKEND is {before!r}, but Keras files are run by torch; set it to 'torch' or unset it."
            )
        os.environ["KERAS_BACKEND"] = "torch"
    try:
        import keras
    except ImportError as error:
        raise LoadError(f"The keras package does not load ({error}). To enable it: {_INSTALL}") from error
    if keras.backend.backend() != "torch":
        raise LoadError(
            f"Keras is already imported with the {keras.backend.backend()} backend, which cannot be changed any more. "
            "Restart Python and load this file first, or set KERAS_BACKEND=torch before importing keras."
        )
    return keras


def _loaded(keras: Any, request: Request) -> Any:
    try:
        network = keras.saving.load_model(request.path, compile=False, safe_mode=True)
    except Exception as error:  # Keras raises whatever a layer's configuration leads to
        text = str(error)
        if "ambda" in text or "safe_mode" in text or "unsafe" in text.lower():
            raise LoadError(
                f"{request.path} holds a Lambda layer, Python code that loading would run; it is refused. Replace the "
                f"layer by built-in ones, or {_OTHERWISE}"
            ) from error
        if "No model config" in text:
            raise LoadError(
                f"{request.path} holds weights without a model; save the whole of it: model.save('x.keras')."
            ) from error
        if "ustom" in text or "locate class" in text or "Unknown layer" in text:
            raise LoadError(
                f"{request.path} needs layers defined in code that is not in the file: {_first(text)}. "
                f"Where that code is, {_OTHERWISE}"
            ) from error
        raise request.damaged(error) from error
    if not isinstance(network, keras.Model) or not getattr(network, "inputs", None):
        raise LoadError(
            f"{request.path} holds no model that says what it takes; save a Functional or Sequential model."
        )
    return network


def _example(request: Request, network: Any, names: list[str]) -> dict[str, Tensor]:
    given = request.inputs
    if given is None:
        given, noise = {}, torch.Generator().manual_seed(0)
        for tensor in network.inputs:
            if None in tensor.shape[1:]:
                raise LoadError(
                    f"{request.path}: input {tensor.name} has axes of open length besides the batch; give one batch of "
                    "real inputs: wb.load(…, inputs=…)."
                )
            shape, dtype = (tensor.shape[0] or 2, *tensor.shape[1:]), getattr(torch, tensor.dtype)
            made = torch.rand(shape, generator=noise) if dtype.is_floating_point else torch.zeros(shape)
            given[tensor.name] = made.to(dtype)
    if not isinstance(given, dict):
        listed = list(given) if isinstance(given, (tuple, list)) else [given]
        given = dict(zip(names, listed, strict=False)) if len(listed) == len(names) else {}
    if set(given) != set(names):
        raise LoadError(
            f"{request.path} takes the inputs {', '.join(names)}; give each of them, by name or in this order."
        )
    example = {name: inputs.tensor(given[name], f"inputs[{name!r}]") for name in names}
    inputs.check(example, request.title)
    return example


class _Layer(nn.Module):
    """One Keras layer under torch's rules: its weights are parameters, and calling it can be watched."""

    def __init__(self, layer: keras.layers.Layer, stateless: Any):
        super().__init__()
        self.__dict__["layer"], self.__dict__["stateless"] = layer, stateless
        self.__dict__["keys"] = []
        for variable in layer.variables:
            key = self._key(variable.name)
            if variable.value.is_floating_point():
                self.register_parameter(key, nn.Parameter(variable.value.detach(), requires_grad=variable.trainable))
            else:
                self.register_buffer(key, variable.value.detach())
            self.keys.append(key)

    def _key(self, name: str) -> str:
        key, number = name, 1
        while key in self.keys:
            key, number = f"{name}_{number}", number + 1
        return key

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # Keras reads variables of its own; in this scope it finds the parameters instead
        values = [(variable, getattr(self, key)) for variable, key in zip(self.layer.variables, self.keys, strict=True)]
        with self.stateless(state_mapping=values):
            return self.layer(*args, **kwargs)


class _Network(nn.Module):
    """A Functional or Sequential model as a module whose children are its layers."""

    def __init__(self, network: Any, keras: Any):
        super().__init__()
        self.__dict__["network"], self.__dict__["in_turn"] = network, isinstance(network, keras.Sequential)
        self.__dict__["names"] = {}
        for layer in network.layers:
            if isinstance(layer, keras.layers.InputLayer):
                continue
            self.names[id(layer)] = layer.name.replace(".", "_")
            inner = isinstance(layer, (keras.Sequential, keras.Model))
            child = _Network(layer, keras) if inner else _Layer(layer, keras.StatelessScope)
            child.original_name = type(layer).__name__
            self.add_module(self.names[id(layer)], child)

    def forward(self, *values: Any, mask: Any = None, training: Any = None) -> Any:
        # a layer around this one hands on its mask; the tensors carry theirs themselves
        if self.in_turn:
            value = values[0]
            for child in self.children():
                value = child(value)
            return value
        return self.network._run_through_graph(pytree.tree_leaves(values), operation_fn=self._child)

    def _child(self, operation: Any) -> Any:
        name = self.names.get(id(operation))
        return operation if name is None else self._modules[name]


def _without_keras(network: nn.Module, example: dict[str, Tensor], request: Request) -> nn.Module:
    """The network traced once: the same layers and weights as plain torch, which can be copied and changed."""
    doubled = {k: torch.cat([v, v]) if len(v) == 1 else v for k, v in example.items()}
    axes = tuple({0: Dim.DYNAMIC} for _ in example)
    classes = {path: inner.original_name for path, inner in network.named_modules() if path}
    network = inputs.explicit(network.eval(), list(example))
    reasons = []
    for dynamic in (axes, None):
        try:
            program = torch.export.export(network, tuple(doubled.values()), dynamic_shapes=dynamic, strict=False)
            module = _program.module(program, doubled, keywords=False, classes=classes)
            if not hasattr(module, "fixed_batch"):
                _program.check_against(network, module, doubled, keywords=False)
            return module
        except Exception as error:  # torch.export raises whatever a layer does
            reasons.append(error)
    raise LoadError(
        f"{request.path} has a layer torch cannot trace: {_first(str(reasons[0]))}. Where it was made, {_OTHERWISE}"
    ) from reasons[0]


def _first(text: str) -> str:
    return next((line.strip().rstrip(".") for line in text.splitlines() if line.strip()), "no reason given")

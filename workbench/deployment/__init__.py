"""Ways to run a model: `Backend`, what it compiles to: `Engine`, and the package an engine is shipped as."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from workbench.deployment import package
from workbench.deployment._base import Availability, Backend, Engine, Output, physical_cores
from workbench.deployment._timing import OpTiming, Port, Recorder
from workbench.deployment.compiled import Compiled
from workbench.deployment.eager import Eager
from workbench.deployment.onnxruntime import OnnxRuntime
from workbench.deployment.openvino import OpenVINO
from workbench.errors import BackendError, RecipeError, nearest

# a new backend is one file and one line here
BACKENDS: dict[str, type[Backend]] = {
    "Eager": Eager,
    "Compiled": Compiled,
    "OnnxRuntime": OnnxRuntime,
    "OpenVINO": OpenVINO,
}

__all__ = [
    "BACKENDS",
    "Availability",
    "Backend",
    "Compiled",
    "Eager",
    "Engine",
    "OnnxRuntime",
    "OpTiming",
    "OpenVINO",
    "Output",
    "Port",
    "Recorder",
    "backend_from_dict",
    "open",
    "physical_cores",
]


def backend_from_dict(data: dict[str, Any]) -> Backend:
    """The backend `Backend.to_dict` wrote.

    Raises
    ------
    RecipeError
        If it names no backend, or one of its settings does not exist.
    BackendError
        If a setting has a value that is not accepted.
    """
    if not isinstance(data, dict) or "backend" not in data:
        raise RecipeError(f"{data!r} names no backend. Give e.g. {{'backend': 'OnnxRuntime'}}.")
    name = data["backend"]
    if name not in BACKENDS:
        raise RecipeError(f"There is no backend {name!r}. {nearest(str(name), BACKENDS)}")
    return BACKENDS[name].from_dict(data)


def open(folder: str | Path) -> Engine:  # noqa: A001 - the public name is deployment.open
    """The engine of a package that `Engine.save` wrote, without the model it was compiled from.

    Every file is checked against the package's description first. Other library versions than those it was written
    with are a warning.

    Raises
    ------
    BackendError
        If the folder is not a package, is damaged, is of a newer format, or does not run.
    BackendUnavailable
        If the library it runs on is missing here.
    """
    contents = package.read(Path(folder))
    try:
        backend = backend_from_dict(contents.backend)
    except RecipeError as error:
        raise BackendError(f"The package {folder} does not open: {error}") from None
    return backend.open(contents)

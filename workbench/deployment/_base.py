"""`Backend`: one way to run a model. `Engine`: the thing that runs."""

from __future__ import annotations

import os
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import psutil

from workbench.deployment import package
from workbench.deployment._timing import OpTiming, Recorder
from workbench.errors import BackendError, BackendUnavailable, DataError, RecipeError, nearest
from workbench.jobs import SILENT, Progress
from workbench.models.model import Model, TensorSpec

Output = np.ndarray | tuple[np.ndarray, ...]


# what engines say of their own source and error codes, which helps nobody who uses them
_NOISE = re.compile(r"Exception from |Check '|FrontEnd API failed|To facilitate|Summary:|Set TORCH")
_CODE = re.compile(r"\[ONNXRuntimeError\] : \d+ : \w+ : ")


def reason(error: Exception) -> str:
    """What an engine's exception says, on one line that ends in a full stop and has at most 600 characters."""
    lines = [line for line in str(error).splitlines() if not _NOISE.match(line)]
    text = " ".join(_CODE.sub("", " ".join(lines)).split())
    return (text[:600].rstrip(" .") or type(error).__name__) + "."


@dataclass(frozen=True)
class Availability:
    """Whether a backend runs on this machine: found out by loading it, not by asking for a list.

    `why` says what is missing, or what is wrong although it runs; `command` is the line that puts it right.
    """

    usable: bool
    why: str = ""
    command: str = ""


def physical_cores() -> int:
    """Physical cores this process may use; the default number of threads."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))


@dataclass(frozen=True)
class Backend(ABC):
    """One way to run a model: a frozen value whose fields are JSON values.

    A subclass declares a field `threads` (None for all physical cores) and checks its fields in ``__post_init__``.

    Attributes
    ----------
    title
        What a person reads: ``ONNX Runtime``.
    extra
        The extra of this package that installs its library; empty where the package itself does.
    runs_graphs
        Whether it runs the model's ONNX graph; its torch module otherwise.
    """

    title: ClassVar[str] = ""
    extra: ClassVar[str] = ""
    runs_graphs: ClassVar[bool] = True

    @property
    def label(self) -> str:
        """Title and the settings that matter: ``ONNX Runtime, 2 threads``."""
        count = self.thread_count
        return ", ".join((self.title, *self._settings(), f"{count} thread{'s' if count > 1 else ''}"))

    def _settings(self) -> tuple[str, ...]:
        """What the label says between title and threads."""
        return ()

    @property
    def thread_count(self) -> int:
        """Threads the engine computes with: the field `threads`, or all physical cores."""
        return self.threads or physical_cores()

    @classmethod
    def variants(cls) -> tuple[Backend, ...]:
        """The settings worth telling a person about when asked what runs here, the ordinary one first."""
        return (cls(),)

    @abstractmethod
    def availability(self) -> Availability:
        """Whether this backend, with these settings, is installed and loads here."""

    @abstractmethod
    def check(self, model: Model) -> None:
        """Refuse, before any work, a model this backend cannot run; raises `BackendError`."""

    def prepare(self, model: Model) -> None:
        """Do what compiling needs and running does not, so that its memory is not counted as the engine's."""

    @abstractmethod
    def compile(self, model: Model, progress: Progress = SILENT) -> Engine:
        """An engine that runs `model`.

        Raises
        ------
        BackendUnavailable
            If the library is missing; the message carries the command that installs it.
        BackendError
            If this backend cannot run this model: the operation and the layer it came from are named.
        """

    @abstractmethod
    def open(self, contents: package.Contents) -> Engine:
        """An engine that runs the checked contents of a package this backend wrote, without the original model."""

    def require(self) -> None:
        """Raise `BackendUnavailable` unless the backend is usable here."""
        found = self.availability()
        if not found.usable:
            raise BackendUnavailable(type(self).__name__, found.why, found.command)

    def to_dict(self) -> dict[str, Any]:
        """``{"backend": "OnnxRuntime", "threads": 2, …}``, every setting included."""
        return {"backend": type(self).__name__, **asdict(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Backend:
        """The backend with these settings; an unknown one is a `RecipeError` that names the accepted."""
        accepted = [f.name for f in fields(cls)]
        for key in data:
            if key != "backend" and key not in accepted:
                raise RecipeError(f"{cls.__name__} has no setting {key!r}. {nearest(str(key), accepted)}")
        return cls(**{k: v for k, v in data.items() if k != "backend"})

    def to_python(self) -> str:
        """The expression that makes this backend: ``wb.OnnxRuntime(threads=2)``."""
        given = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"wb.{type(self).__name__}({', '.join(given)})"

    def _check_threads(self) -> None:
        if self.threads is not None and (type(self.threads) is not int or self.threads < 1):
            raise BackendError(
                f"{type(self).__name__}: threads is {self.threads!r}; give a whole number of at least 1, or None for "
                f"all physical cores ({physical_cores()} here)."
            )

    def _check_choice(self, setting: str, accepted: Sequence[str]) -> None:
        given = getattr(self, setting)
        if given not in accepted:
            raise BackendError(f"{type(self).__name__}: {setting} is {given!r}. {nearest(str(given), accepted)}")


def refuse_bfloat16_inputs(backend: Backend, model: Model) -> None:
    """Raise `BackendError` for a model whose inputs numpy cannot hold."""
    for spec in model.inputs:
        if spec.dtype == "bfloat16":
            raise BackendError(
                f"{backend.title} takes numpy arrays, which have no bfloat16, but {model.name} wants {spec}. Keep the "
                "inputs float32 and cast inside the model, as wb.Quantize('bf16') does."
            )


@dataclass(eq=False)
class Engine(ABC):
    """A compiled model. Call it with numpy arrays in the order of `inputs`; it returns numpy arrays.

    The arrays it returns are the caller's: a later call does not change them. One engine serves one thread at a time.

    Attributes
    ----------
    inputs, outputs
        Specification of each tensor; the batch axis is None.
    provider
        What was actually loaded to run it: ``CPUExecutionProvider``, ``torch 2.13.0 (cpu)``.
    threads
        Threads it computes with.
    about
        What the study knows of it and a package should carry: recipe, preprocessing, classes. JSON values.
    """

    backend: Backend
    name: str
    precision: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    provider: str
    threads: int
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._closed = False
        tails = [spec.shape[1:] for spec in self.inputs]
        # None matches no input, which sends every call to the complete check: of no use on a model with other
        # axes that may change, and after close()
        self._accepted = None
        if not any(None in tail for tail in tails):
            self._accepted = [(np.dtype(s.dtype), tail) for s, tail in zip(self.inputs, tails, strict=True)]

    def __call__(self, *inputs: np.ndarray) -> Output:
        """Run one batch: an array for one output, a tuple of arrays for several.

        Raises
        ------
        DataError
            If the number, shape or dtype of the inputs is not what `inputs` says; nothing is converted silently.
        BackendError
            If the engine is closed.
        """
        # one comparison is all a good call pays for; what is wrong with a bad one is worked out afterwards
        try:
            fits = [(x.dtype, x.shape[1:]) for x in inputs] == self._accepted
        except (AttributeError, TypeError):
            fits = False
        if not fits:
            self._check(inputs)
        return self._run(*inputs)

    def _check(self, inputs: tuple[Any, ...]) -> None:
        if self._closed:
            raise BackendError(f"The engine of {self.name} on {self.backend.label} is closed. Compile the model again.")
        if len(inputs) != len(self.inputs):
            raise DataError(
                f"{self.name} takes {len(self.inputs)} input{'s' if len(self.inputs) > 1 else ''} ({self._wanted()}), "
                f"but {len(inputs)} {'was' if len(inputs) == 1 else 'were'} given."
            )
        for given, spec in zip(inputs, self.inputs, strict=True):
            if not isinstance(given, np.ndarray):
                hint = " Call .numpy() on it first." if type(given).__module__.startswith("torch") else ""
                raise DataError(
                    f"{self.name} takes numpy arrays ({self._wanted()}), but {spec.name} is a "
                    f"{type(given).__module__}.{type(given).__qualname__}.{hint}"
                )
            fits = given.ndim == len(spec.shape) and all(
                want in (None, have) for want, have in zip(spec.shape, given.shape, strict=True)
            )
            if not fits or given.dtype != np.dtype(spec.dtype):
                raise DataError(
                    f"{self.name} takes {spec}, but {spec.name} is {given.dtype} {given.shape}. Give it that shape and "
                    f"dtype, e.g. with .astype({spec.dtype!r}); N is any number of samples."
                )

    def _wanted(self) -> str:
        return "; ".join(str(spec) for spec in self.inputs)

    def _failed(self, inputs: Sequence[np.ndarray], error: Exception) -> DataError:
        """What to raise where the engine itself refuses inputs that look right, such as an index out of range."""
        given = "; ".join(f"{s.name}: {x.dtype} {x.shape}" for s, x in zip(self.inputs, inputs, strict=True))
        return DataError(
            f"{self.name} on {self.backend.label} could not run this batch ({given}): {reason(error)} "
            f"The model's inputs are {self._wanted()}."
        )

    @abstractmethod
    def _run(self, *inputs: np.ndarray) -> Output:
        """Run inputs of the right number, dtype and shape."""

    @abstractmethod
    def recorder(self, inputs: Sequence[np.ndarray]) -> Recorder:
        """What records the operations of calls with these inputs; the engine's own profiler where it has one.

        Raises
        ------
        BackendError
            If the engine cannot tell its operations apart.
        """

    def profile(self, inputs: Sequence[np.ndarray], repeats: int = 50) -> list[OpTiming]:
        """Time each operation over `repeats` calls, in execution order.

        What the profiler adds to each operation is taken off. `workbench.profile` also says how they compare with the
        whole call.

        Raises
        ------
        DataError
            If `inputs` do not fit.
        BackendError
            If the engine is closed, or cannot tell its operations apart.
        """
        self._check(tuple(inputs))
        plain = []
        with self.recorder(inputs) as recorder:
            for calls in recorder.parts(repeats):
                recorder.block(calls)
                for _ in range(calls):
                    start = time.perf_counter()
                    self(*inputs)
                    plain.append((time.perf_counter() - start) * 1e3)
            return recorder.rows(float(np.median(plain)))

    @abstractmethod
    def artifact(self) -> dict[str, bytes]:
        """The files that are the deployed model, by name, without schema and runner; their size is the model's size."""

    def files(self) -> dict[str, bytes]:
        """The model files of a package; the artefact unless another format is what can be run elsewhere."""
        return self.artifact()

    @abstractmethod
    def runner(self) -> tuple[str, tuple[str, ...]]:
        """The Python script that runs the package on its own, and the pinned requirements it needs."""

    def notes(self) -> dict[str, Any]:
        """What the backend itself must find again when it opens the package; JSON values."""
        return {}

    def save(self, folder: str | Path) -> Path:
        """Write a package that runs elsewhere: model, recipe, input and output schema, runner, requirements.

        The folder appears complete or not at all.

        Parameters
        ----------
        folder
            A new folder, an empty one, or a package to replace.

        Returns
        -------
        Path
            The folder; `workbench.deployment.open` runs it, and so does ``python run.py`` inside it.

        Raises
        ------
        FileExistsError
            If `folder` holds something that is not a package written by this method.
        """
        if self._closed:
            self._check(())
        script, requirements = self.runner()
        return package.write(
            Path(folder),
            package.Contents(
                name=self.name,
                backend=self.backend.to_dict(),
                precision=self.precision,
                provider=self.provider,
                inputs=self.inputs,
                outputs=self.outputs,
                about=self.about,
                notes=self.notes(),
            ),
            self.files(),
            script,
            requirements,
        )

    def close(self) -> None:
        """Release what the engine holds; calling it afterwards is an error, closing it again is not."""
        self._closed = True
        self._accepted = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

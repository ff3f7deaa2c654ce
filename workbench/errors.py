"""Every error a user can cause, each saying what was given, what is accepted and what to do next."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


class WorkbenchError(Exception):
    """Base of all errors the workbench raises on purpose; its text is meant to be shown as it is."""


class LoadError(WorkbenchError):
    """A source that cannot become a `Model`: missing, damaged, unsafe, or not fitting its architecture."""


class DataError(WorkbenchError):
    """Arrays that cannot be a `Task`, or that do not fit the model they are given to."""


class StepError(WorkbenchError):
    """A compression step that cannot be applied to this model, or whose settings are out of range."""


class TrainingDiverged(StepError):
    """A loss that is no longer a number.

    Attributes
    ----------
    best
        The `Model` of the best epoch before; None where no epoch was finished.
    """

    def __init__(self, message: str, best: Any = None):
        self.best = best
        super().__init__(message)


class BackendError(WorkbenchError):
    """A backend that cannot compile or run this model."""


class BackendUnavailable(BackendError):
    """A backend whose library is missing or does not load here.

    Parameters
    ----------
    backend
        The backend's name as a user writes it, e.g. ``OpenVINO``.
    why
        What is missing, in words.
    command
        The one command that makes it available; empty where there is none on this machine.
    """

    def __init__(self, backend: str, why: str, command: str = ""):
        self.backend, self.why, self.command = backend, why, command
        super().__init__(f"{backend} cannot run here: {why}." + (f" To enable it: {command}" if command else ""))


class ProfileError(BackendError):
    """A model that fails half way through a profiled call.

    Attributes
    ----------
    rows
        What ran before it failed, as `workbench.deployment.OpTiming`, in execution order.
    """

    def __init__(self, message: str, rows: Iterable[Any] = ()):
        self.rows = list(rows)
        super().__init__(message)


class RecipeError(WorkbenchError):
    """A recipe that does not parse or names a step or backend that does not exist."""


class StoreError(WorkbenchError):
    """A study's store that cannot be opened, or that belongs to another model, task or version."""


class Cancelled(WorkbenchError):
    """Raised inside long work once its job was cancelled; what was finished before is kept.

    Attributes
    ----------
    best
        Of a training: the `Model` of the best epoch so far. None otherwise.
    """

    best: Any = None


def nearest(word: str, choices: Iterable[str]) -> str:
    """The end of an error sentence: the accepted names, the closest to `word` first.

    Returns
    -------
    str
        ``Did you mean 'x'? Accepted: …`` or ``Accepted: …``.
    """
    names = sorted(choices)
    close = get_close_matches(word, names, n=1)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    return f"{hint}Accepted: {', '.join(names)}."

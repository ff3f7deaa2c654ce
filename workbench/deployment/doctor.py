"""Which backends run on this machine, and the command that enables each of the others."""

from __future__ import annotations

from dataclasses import dataclass

from workbench.deployment import BACKENDS


@dataclass(frozen=True)
class Row:
    """One backend with one choice of settings.

    Attributes
    ----------
    name
        How it is written: ``OnnxRuntime(provider='cuda')``.
    title
        What a person reads: ``ONNX Runtime, CUDA``.
    usable
        Whether it loads and runs here.
    why
        What is missing, or what is wrong although it runs; empty where all is well.
    command
        The line that puts it right; empty where none does on this machine.
    """

    name: str
    title: str
    usable: bool
    why: str
    command: str


def doctor() -> list[Row]:
    """Every registered backend with the settings worth telling apart, each one tried rather than looked up."""
    rows = []
    for kind in BACKENDS.values():
        for backend in kind.variants():
            found = backend.availability()
            name = backend.to_python().removeprefix("wb.")
            rows.append(Row(name, backend.label, found.usable, found.why, found.command))
    return rows

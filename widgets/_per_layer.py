"""Values by layer as text and back: ``conv1: 0.3, fc1: 0.9``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workbench.errors import StepError


def read(text: str) -> dict[str, Any]:
    """The value of each layer that `text` names: a number where it reads as one, a word otherwise.

    Raises
    ------
    StepError
        If a part has no layer or no value, or a layer comes twice.
    """
    values: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        layer, colon, written = part.rpartition(":")  # a layer's own name may hold a colon, a value may not
        layer, written = layer.strip(), written.strip()
        if not (colon and layer and written):
            raise StepError(
                f"{part!r} does not say a value of a layer. Write layer: value, with commas between them, for example "
                "conv1: 0.3, fc1: 0.9."
            )
        if layer in values:
            raise StepError(f"{layer} is given twice, as {values[layer]} and as {written}. Leave one of them out.")
        values[layer] = value(written)
    return values


def write(values: Mapping[str, Any]) -> str:
    """What `read` reads as these values."""
    return ", ".join(f"{layer}: {value}" for layer, value in values.items())


def value(text: str) -> Any:
    """A whole number, or else a number, or else the word itself."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text

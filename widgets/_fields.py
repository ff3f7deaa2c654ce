"""A control for each setting of a step, made from the step's own declaration.

The type of a field chooses the control; its metadata, where there is any, gives `choices`, or `low` and `high`. What a
control allows and the step does not is refused by the step, in words. A setting of any other type keeps its default.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, get_type_hints

import ipywidgets as W

from workbench.compression import Step

_WIDTH = "190px"


class Setting:
    """One setting: the control that carries its value, and the box it is shown in."""

    def __init__(self, name: str, control: W.Widget, shown: W.Widget | None = None):
        self.name, self.control = name, control
        self.shown = shown if shown is not None else control

    @property
    def value(self) -> Any:
        """What the control says."""
        return self.control.value

    def on_change(self, function: Callable[[], None]) -> None:
        """Call `function` when the value changes."""
        self.control.observe(lambda _change: function(), "value")


def settings(kind: type[Step], values: dict[str, Any]) -> list[Setting]:
    """The settings of a step class that a control can show, in the order of its fields.

    Parameters
    ----------
    kind
        The step class.
    values
        What the controls say at first; a setting that is left out starts at its default, or in the middle of its range.
    """
    types = get_type_hints(kind)
    made = []
    for field in dataclasses.fields(kind):
        control = _control(field, types[field.name], values.get(field.name, _start(field)))
        if control is not None:
            made.append(control)
    return made


def _start(field: dataclasses.Field) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if "choices" in field.metadata:
        return field.metadata["choices"][0]
    return (field.metadata.get("low", 0) + field.metadata.get("high", 1)) / 2


def _control(field: dataclasses.Field, kind: type, value: Any) -> Setting | None:
    words = field.name.replace("_", " ")
    if "choices" in field.metadata:
        choices = [(_words(c), c) for c in field.metadata["choices"]]
        return Setting(
            field.name, W.Dropdown(description=words, options=choices, value=value, layout={"width": _WIDTH})
        )
    if kind is bool:
        return Setting(field.name, W.Checkbox(description=words, value=value, indent=False, layout={"width": "auto"}))
    if kind is int:
        return Setting(field.name, W.IntText(description=words, value=value, layout={"width": _WIDTH}))
    if kind is float and {"low", "high"} <= field.metadata.keys():
        return _slider(field, words, value)
    if kind is float:
        return Setting(field.name, W.FloatText(description=words, value=value, step=None, layout={"width": _WIDTH}))
    return None


def _words(choice: Any) -> str:
    return str(choice).replace("_", " ")


def _slider(field: dataclasses.Field, words: str, value: float) -> Setting:
    """A slider beside a labelled number box; the box carries the value, since a slider would bend what is typed."""
    low, high = field.metadata["low"], field.metadata["high"]
    box = W.FloatText(description=words, value=value, step=(high - low) / 100, layout={"width": _WIDTH})
    slider = W.FloatSlider(
        value=value, min=low, max=high, step=(high - low) / 100, readout=False, layout={"width": "220px"}
    )

    def dragged(change: dict[str, Any]) -> None:
        box.value = change["new"]

    def typed(change: dict[str, Any]) -> None:
        if low <= change["new"] <= high:
            slider.value = change["new"]

    slider.observe(dragged, "value")
    box.observe(typed, "value")
    return Setting(field.name, box, W.HBox([box, slider]))

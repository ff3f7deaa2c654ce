"""A control for each setting of a step, made from the step's own declaration.

The type of a field chooses the control. Its metadata, where there is any, gives `choices`, or `low` and `high`;
`start`, which is what a fresh card says where the default means that nothing was given; and of values by layer `each`,
the word for one of them, which is the name of the setting they stand in for where there is one. What a control allows
and the step does not is refused by the step, in words.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import ipywidgets as W

from widgets import _per_layer
from workbench.compression import Finetune, Step
from workbench.errors import StepError

_WIDTH = "190px"
_WIDE = "420px"
TRAINING = frozenset(field.name for field in dataclasses.fields(Finetune))  # named alike in every step that trains


def _same(value: Any) -> Any:
    return value


class Setting:
    """One setting: the control that carries its value, and the box it is shown in.

    Parameters
    ----------
    name
        Of the step's field.
    control
        Its trait ``value`` changes with the setting.
    shown
        What is put on the page; the control itself if not given.
    read, write
        The setting's value from the control's and back; `read` may refuse what the control says, in words.
    each
        Of values by layer: the word for one of them. Empty for any other setting.
    """

    def __init__(
        self,
        name: str,
        control: W.Widget,
        shown: W.Widget | None = None,
        *,
        read: Callable[[Any], Any] = _same,
        write: Callable[[Any], Any] = _same,
        each: str = "",
    ):
        self.name, self.control, self.each = name, control, each
        self.shown = shown if shown is not None else control
        self._read, self._write = read, write

    @property
    def value(self) -> Any:
        """What the control says; raises `StepError` where that cannot be read."""
        return self._read(self.control.value)

    def set(self, value: Any) -> None:
        """Make the control say this."""
        self.control.value = self._write(value)

    @property
    def wide(self) -> bool:
        """Whether it takes a line of its own."""
        return bool(self.each) or self.shown is not self.control

    def on_change(self, function: Callable[[], None]) -> None:
        """Call `function` when the value changes."""
        self.control.observe(lambda _change: function(), "value")


def settings(kind: type[Step], values: Mapping[str, Any]) -> list[Setting]:
    """A control for each setting of a step class, in the order of its fields.

    Parameters
    ----------
    kind
        The step class.
    values
        What the controls say at first; a setting that is left out is where a fresh card starts.

    Raises
    ------
    TypeError
        If a field has a type that no control is for.
    """
    types = get_type_hints(kind)
    made = []
    for field in dataclasses.fields(kind):
        value = values[field.name] if field.name in values else _start(field)
        made.append(_control(field, types[field.name], value))
    return made


def _start(field: dataclasses.Field) -> Any:
    if "start" in field.metadata:
        return field.metadata["start"]
    if field.default is not dataclasses.MISSING:
        return field.default
    if "choices" in field.metadata:
        return field.metadata["choices"][0]
    return (field.metadata.get("low", 0) + field.metadata.get("high", 1)) / 2


def _control(field: dataclasses.Field, kind: Any, value: Any) -> Setting:
    said = {"description": field.name.replace("_", " "), "layout": {"width": _WIDTH}}
    if "choices" in field.metadata:
        choices = [(str(choice).replace("_", " "), choice) for choice in field.metadata["choices"]]
        return Setting(field.name, W.Dropdown(options=choices, value=value, **said))
    if kind is bool:
        return Setting(field.name, W.Checkbox(value=value, indent=False, **said))
    if kind is int:
        return Setting(field.name, W.IntText(value=value, **said))
    if kind is float and {"low", "high"} <= field.metadata.keys():
        return _slider(field, said, value)
    if kind is float:
        return Setting(field.name, W.FloatText(value=value, step=None, **said))
    if kind is str:
        return Setting(field.name, W.Text(value=value, continuous_update=False, **said))
    if set(get_args(kind)) in ({int, NoneType}, {float, NoneType}):
        return _optional(field.name, said, value)
    if issubclass(get_origin(kind) or kind, Mapping):
        return _by_layer(field, value)
    raise TypeError(f"{field.name} is {kind!r}, which no control is for; add one to widgets._fields.")


def _slider(field: dataclasses.Field, said: dict[str, Any], value: float) -> Setting:
    """A slider beside a labelled number box; the box carries the value, since a slider would bend what is typed."""
    low, high = field.metadata["low"], field.metadata["high"]
    step = (high - low) / 100
    box = W.FloatText(value=value, step=step, **said)
    slider = W.FloatSlider(value=value, min=low, max=high, step=step, readout=False, layout={"width": "220px"})

    def dragged(change: dict[str, Any]) -> None:
        if abs(change["new"] - box.value) > step / 2:  # less is the page's own rounding to the slider's steps
            box.value = change["new"]

    def typed(change: dict[str, Any]) -> None:
        if low <= change["new"] <= high:
            slider.value = change["new"]

    slider.observe(dragged, "value")
    box.observe(typed, "value")
    return Setting(field.name, box, W.HBox([box, slider]))


def _optional(name: str, said: dict[str, Any], value: float | None) -> Setting:
    """A text box, since a number box cannot be empty; empty is None."""

    def read(text: str) -> Any:
        number = _per_layer.value(text.strip()) if text.strip() else None
        if isinstance(number, str):
            raise StepError(f"{said['description']} is {text!r}; give a number, or leave it empty.")
        return number

    def write(number: float | None) -> str:
        return "" if number is None else str(number)

    box = W.Text(value=write(value), placeholder="not given", continuous_update=False, **said)
    return Setting(name, box, read=read, write=write)


def _by_layer(field: dataclasses.Field, value: Mapping[str, Any]) -> Setting:
    each = field.metadata.get("each", "value")
    box = W.Text(
        value=_per_layer.write(value),
        description=f"{each} by layer",
        placeholder="layer: value, layer: value; or write them in the table",
        continuous_update=False,
        layout={"width": _WIDE},
    )
    return Setting(field.name, box, read=_per_layer.read, write=_per_layer.write, each=each)

"""The tables below the views: rows of a frame written out column by column."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pandas as pd

from widgets._table import Column, Row
from workbench import formatting as fmt
from workbench.profiling import Profile


def text(value: Any) -> str:
    """A name; nothing for none."""
    return "" if value is None or value != value else str(value)


def milliseconds(value: float) -> str:
    """A time under a header that has the unit."""
    return fmt.milliseconds(value, unit=False).replace("-", "−")


def percent(value: float) -> str:
    """A share of 1 under a header that has the unit."""
    return fmt.share(value).removesuffix(" %").replace("-", "−")


def factor(value: float) -> str:
    """A ratio, where there is one."""
    return "–" if math.isnan(value) else fmt.factor(value)


def close_to_one(value: float) -> str:
    """A cosine, whose distance from 1 is what matters."""
    return "–" if math.isnan(value) else f"{value:.5f}".replace("-", "−")


class Field(NamedTuple):
    """One column of a table: its header, the frame's column, and how a value is written."""

    label: str
    column: str
    write: Callable[[Any], str] = text
    number: bool = True


def name(label: str, column: str) -> Field:
    """A column of names."""
    return Field(label, column, text, number=False)


PROFILE_FIELDS = (
    name("layer", "label"),
    name("type", "type"),
    Field("latency, ms", "latency_ms", milliseconds),
    Field("p95, ms", "latency_p95_ms", milliseconds),
    Field("share, %", "share", percent),
    Field("MACs", "macs", fmt.count),
    Field("parameters", "parameters", fmt.count),
)


def of_profile(profile: Profile) -> pd.DataFrame:
    """A profile's frame with a column label: the layer, or the engine's own name where a row has none."""
    return labelled(profile.frame())


def labelled(frame: pd.DataFrame) -> pd.DataFrame:
    """`frame` with a column label, which is its layer, or its name where it has none, for `layer` too."""
    found = frame["layer"].fillna("")
    label = found.where(found != "", frame["name"])
    return frame.assign(label=label, layer=label)


def columns(fields: Sequence[Field]) -> list[Column]:
    """The headers of a table."""
    return [Column(f.label, f.number) for f in fields]


def rows(frame: pd.DataFrame, fields: Sequence[Field]) -> list[Row]:
    """A row of a table for each row of a frame, numbered from 0 in its order."""
    values = [frame[f.column].tolist() for f in fields]
    written = [[f.write(v) for v in column] for f, column in zip(fields, values, strict=True)]
    sort = [column if f.number else shown for f, column, shown in zip(fields, values, written, strict=True)]
    return [
        Row(str(position), cells, keys)
        for position, (cells, keys) in enumerate(zip(zip(*written, strict=True), zip(*sort, strict=True), strict=True))
    ]

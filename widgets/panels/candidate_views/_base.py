"""What a view of a candidate is: what it needs computed, what it draws and lists, and its lines of Python."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import ipywidgets as W
import pandas as pd

from widgets.panels.profile_views import Network, Work
from widgets.panels.profile_views.listing import Field, factor, milliseconds, name, percent
from workbench import formatting as fmt
from workbench import jobs
from workbench.jobs import Progress
from workbench.models import Model
from workbench.study import Study

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

FIRST = "No candidate is selected. Run a recipe above, or click a point in Compare."


@dataclass(frozen=True)
class Seen:
    """What there is to see at the moment of drawing.

    Attributes
    ----------
    study
        Whose candidates they are.
    network
        The selected candidate; None where none is.
    result
        What the view's work has found.
    layer
        The layer that is picked, as in `Selection.layer`.
    dark
        Whether the page is dark.
    """

    study: Study
    network: Network | None
    result: Any = None
    layer: str | None = None
    dark: bool = False


class Listing(NamedTuple):
    """One table.

    Attributes
    ----------
    caption
        What it holds.
    fields, frame
        Its columns and rows.
    picks
        What a click on a row selects: ``layer`` or ``candidate``, a column of the frame; empty for nothing.
    """

    caption: str
    fields: tuple[Field, ...]
    frame: pd.DataFrame
    picks: str = ""


class Drawn(NamedTuple):
    """What a view shows: words, a figure, tables; of each perhaps nothing."""

    words: str = ""
    figure: Figure | None = None
    listings: tuple[Listing, ...] = ()


class CandidateView(ABC):
    """One way to look at what the steps of a candidate did.

    Attributes
    ----------
    title
        What the menu calls it.
    imports
        Lines of Python its own lines need.
    controls
        Its own controls; a change of one draws the view again.
    """

    title: ClassVar[str]
    imports: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        self.controls: tuple[W.DOMWidget, ...] = ()

    @property
    def chosen_layer(self) -> str | None:
        """The layer its controls say; None for a view that shows no single layer."""
        return None

    def missing(self, seen: Seen) -> str:
        """What to do before there is anything to show; empty where there is."""
        return FIRST if seen.network is None else ""

    def work(self, seen: Seen) -> Work:
        """What has to be computed first: the candidate's model, which a study may have to load or make again."""
        network = seen.network

        def start() -> jobs.Job:
            return jobs.submit(f"Loading {network.label}", _model, network)

        return Work(("model", network.number), start, "")

    def fill(self, seen: Seen) -> None:
        """Bring what its controls offer up to date."""

    @abstractmethod
    def drawn(self, seen: Seen) -> Drawn:
        """What to show of the result."""

    @abstractmethod
    def lines(self, seen: Seen) -> tuple[str, ...]:
        """The Python that makes this view; empty where there is nothing to make."""

    def code(self, seen: Seen) -> str:
        """The Python that makes this view, imports included; empty where there is nothing to make."""
        lines = self.lines(seen)
        return "\n".join(("import workbench as wb", *self.imports, *lines)) if lines else ""


def _model(network: Network, *, progress: Progress) -> Model:
    progress(0.0, "from the study's cache, or by its steps")
    return network.model()


def choose(menu: W.Dropdown, options: list[tuple[str, Any]]) -> None:
    """Offer these and keep what is chosen where it is still among them; greyed where there is no choice."""
    if list(menu.options) != options:
        kept = menu.value
        menu.options = options
        menu.value = kept if kept in [value for _, value in options] else options[0][1] if options else None
    menu.disabled = len(options) < 2


def measured_fields(frame: pd.DataFrame) -> tuple[Field, ...]:
    """The columns of a step's record: the unit that a name ends in stands in the header."""
    return tuple(_field(column, frame[column].tolist()) for column in frame.columns)


_UNITS = {
    "_bytes": ("", fmt.size),
    "_ms": (", ms", milliseconds),
    "_db": (", dB", lambda value: fmt.significant(value).replace("-", "−")),
    "accuracy": ("accuracy, %", lambda value: fmt.accuracy(value, unit=False).replace("-", "−")),
    "share": ("share, %", percent),
    "sparsity": ("sparsity, %", percent),
    "speedup": ("speed-up", factor),
}


_SHORT = {"sqnr": "SQNR", "mse": "MSE", "macs": "MACs"}


def _field(column: str, values: list[Any]) -> Field:
    known = [value for value in values if value is not None and value == value]
    if not all(isinstance(value, int | float) for value in known):
        return name(_label(column), column)
    if known and all(isinstance(value, bool) for value in known):
        return Field(_label(column), column, lambda value: "yes" if value is True else "no", number=False)
    for end, (unit, write) in _UNITS.items():
        if column.endswith(end):
            return Field(_label(column.removesuffix(end)) + unit, column, write)
    whole = all(float(value).is_integer() for value in known)
    return Field(_label(column), column, fmt.count if whole else _signed)


def _signed(value: float | None) -> str:
    return fmt.significant(value).replace("-", "−")


def _label(column: str) -> str:
    return " ".join(_SHORT.get(word, word) for word in column.split("_"))

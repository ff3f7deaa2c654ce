"""What a view of the Profile panel is: what it needs, what it has computed, what it draws, and its lines of Python."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import ipywidgets as W
import pandas as pd

from widgets._table import Table
from widgets.panels.profile_views.listing import PROFILE_FIELDS, Field, of_profile
from workbench import formatting as fmt
from workbench.deployment import Backend
from workbench.jobs import Job
from workbench.models import Model
from workbench.profiling import Profile
from workbench.study import Study

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

FIRST = "No profile yet. Choose what to profile and where it runs, then press Run profile."


@dataclass(frozen=True)
class Network:
    """One choice of the Network menu.

    Attributes
    ----------
    number
        A candidate's number in the study; 0 for the study's model as it is.
    """

    study: Study
    number: int

    @property
    def label(self) -> str:
        """What a person calls it."""
        if self.number == 0:
            return f"{self.study.model.name} as it is"
        return f"candidate {self.number}: {self._candidate.label}"

    @property
    def code(self) -> str:
        """The Python expression of its model."""
        return "study.model" if self.number == 0 else f"{self._candidate.to_python()}.model()"

    @property
    def _candidate(self) -> Any:
        return next(c for c in self.study.candidates if c.number == self.number)

    def model(self) -> Model:
        """Its model; for a worker, since making one may take long."""
        return self.study.model if self.number == 0 else self._candidate.model()


@dataclass(frozen=True, eq=False)
class Source:
    """A profile the panel holds.

    Attributes
    ----------
    number
        From 1, in the order they came.
    code
        The Python expression that makes the profile.
    network
        What was profiled; None for a profile that was made elsewhere.
    """

    number: int
    profile: Profile
    code: str
    network: Network | None = None

    @property
    def label(self) -> str:
        """Number, network, engine and batch size."""
        p = self.profile
        name = p.model_name if self.network is None else self.network.label
        return f"{self.number}: {name} on {p.backend_label}, batch {p.batch}"

    @property
    def facts(self) -> str:
        """What the profile is and whether it adds up, in a line of HTML; escapes all names."""
        p = self.profile
        facts = (
            f"<b>{escape(p.model_name)}</b> on {escape(p.backend_label)}, batch {p.batch}: "
            f"whole call <b>{fmt.milliseconds(p.end_to_end_ms)}</b>, unattributed {_ms(p.unattributed_ms)}"
        )
        if not math.isnan(p.overhead_ms):
            facts += f", profiler's {_ms(p.overhead_ms)} taken out"
        return facts + ("; the machine was busy with something else" if p.contended else "")


def _ms(value: float) -> str:
    return fmt.milliseconds(value).replace("-", "−")


@dataclass(frozen=True)
class Held:
    """What the panel holds at the moment of drawing.

    Attributes
    ----------
    network, backend, batch
        What the menus say.
    shown, beside
        The profile that is shown and the one to compare it with.
    results
        What jobs have found, by `Work.key`.
    selected
        The layer that is picked, as in `Selection.layer`.
    dark
        Whether the page is dark.
    """

    network: Network
    backend: Backend
    batch: int
    shown: Source | None = None
    beside: Source | None = None
    results: Mapping[tuple, Any] = field(default_factory=dict)
    selected: str | None = None
    dark: bool = False

    @property
    def run_code(self) -> str:
        """The Python expression that profiles what the menus say."""
        return f"wb.profile({self.network.code}, on={self.backend.to_python()}, batch={self.batch})"

    @property
    def profile_code(self) -> str:
        """The Python expression of the profile that is shown, or of the one that Run profile would make."""
        return self.shown.code if self.shown is not None else self.run_code

    @property
    def refused_batch(self) -> str:
        """What is wrong with the batch size, in words; empty where nothing is."""
        return "" if self.batch >= 1 else f"Batch size is {self.batch}; a whole number of at least 1 is needed."

    @property
    def look(self) -> dict[str, Any]:
        """The settings that every figure takes."""
        return {"selected": self.selected, "dark": self.dark}


class Work(NamedTuple):
    """What a view needs computed, as a job.

    Attributes
    ----------
    key
        What its result is kept under.
    start
        Submits the job; where its result is another job, that one's counts.
    code
        The line of Python that does the same.
    """

    key: tuple
    start: Callable[[], Job]
    code: str


def has_result(job: Job) -> bool:
    """Whether a job of a `Work` has found what was asked for, and not only another job that will."""
    return job.state == "done" and not isinstance(job.result, Job)


class View:
    """One way to look at what the panel holds.

    Attributes
    ----------
    title
        What its button says.
    action
        What the button that starts its work says; empty where it has none.
    automatic
        Whether its work starts when the view is first opened, not only by its button.
    follows_menus
        Whether it shows what the menus say, and not the profile that is shown.
    compares
        Whether it shows a second profile beside the first.
    fits
        Whether its figure is drawn as tall as there is room, instead of as tall as its rows need.
    imports
        Lines of Python its own lines need.
    fields, caption
        The columns and the name of the table below it.
    controls
        Its own controls; a change of one draws the view again.
    body, layers
        A table that stands for a figure, and the layer of each of its rows; None for a view with a figure.
    """

    title: ClassVar[str]
    action: ClassVar[str] = ""
    automatic: ClassVar[bool] = True
    follows_menus: ClassVar[bool] = False
    compares: ClassVar[bool] = False
    fits: ClassVar[bool] = False
    imports: ClassVar[tuple[str, ...]] = ()
    fields: ClassVar[tuple[Field, ...]] = PROFILE_FIELDS
    caption: ClassVar[str] = "Layers and kernels in execution order; click a row to mark it"

    def __init__(self) -> None:
        self.controls: tuple[W.DOMWidget, ...] = ()
        self.body: Table | None = None
        self.layers: list[str] = []

    def missing(self, held: Held) -> str:
        """What to do before there is anything to show; empty where there is."""
        return FIRST if held.shown is None else ""

    def work(self, held: Held) -> Work | None:
        """What has to be computed first; None where the profile says it all."""
        return None

    def doubtful(self, result: Any) -> bool:
        """Whether what was computed is worth computing again."""
        return False

    def waiting(self, job: Job | None) -> str:
        """Why there is nothing to show yet, by the state of its work; empty where there is."""
        if job is None:
            return f"Nothing computed yet. Press {self.action}; it runs as a job and takes a while."
        if job.state in ("failed", "cancelled"):
            how = "failed; the notice says why" if job.state == "failed" else "was cancelled"
            return f"{job.name} {how}. Press {self.action} to try again."
        return "" if has_result(job) else f"Under way: {job.name}. The job bar shows how far it is."

    def can_start(self, job: Job | None) -> bool:
        """Whether the button of its work has anything to do."""
        if job is None or job.state in ("failed", "cancelled"):
            return True
        return has_result(job) and self.doubtful(job.result)

    def words(self, held: Held, result: Any) -> str:
        """What is to be seen, in a line of plain text."""
        return ""

    def figure(self, held: Held, result: Any) -> Figure:
        """The figure, of a view that has no `body`."""
        raise NotImplementedError

    def fill(self, held: Held, result: Any) -> None:
        """Bring `body` and `layers` up to date, of a view that has no figure."""

    def listed(self, held: Held, result: Any) -> pd.DataFrame:
        """The rows of the table below, with the columns `fields` names and a column layer."""
        return of_profile(held.shown.profile)

    def lines(self, held: Held) -> tuple[str, ...]:
        """The Python that makes this view; empty where something has to be chosen first."""
        raise NotImplementedError

    def code(self, held: Held) -> str:
        """The Python that makes this view, imports included; empty where something has to be chosen first."""
        lines = self.lines(held)
        return "\n".join(("import workbench as wb", *self.imports, *lines)) if lines else ""

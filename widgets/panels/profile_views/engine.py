"""Views that set a profile against something else: the machine's ceilings, another profile, what is known to help."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from widgets._table import Table
from widgets.panels.profile_views._base import Held, Network, Source, View, Work
from widgets.panels.profile_views.listing import Field, columns, factor, labelled, milliseconds, name, rows
from widgets.selection import SEPARATOR
from workbench import formatting as fmt
from workbench import jobs
from workbench.deployment import Backend
from workbench.figures import roofline_figure, side_by_side_figure
from workbench.jobs import Progress
from workbench.profiling import Alignment, Ceilings, Profile, advice, align, ceilings, roofline

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_ELSEWHERE = (
    "This profile was recorded on another machine, whose ceilings cannot be measured here. "
    "Choose a profile that ran here, or press Run profile."
)


def _ceilings_key(backend: Backend) -> tuple:
    return "ceilings", backend


class RooflineView(View):
    """Each layer under the ceilings of memory and arithmetic that were measured here."""

    title = "Roofline"
    fits = True
    action = "Measure ceilings"
    imports = ("from workbench.figures import roofline_figure",)
    fields = (
        name("layer", "label"),
        name("type", "type"),
        Field("latency, ms", "latency_ms", milliseconds),
        Field("op/byte", "intensity", fmt.significant),
        Field("GOP/s", "achieved_gop_s", fmt.significant),
        Field("GB/s", "achieved_gb_s", fmt.significant),
        name("bound by", "bound"),
        Field("attainable, ms", "attainable_ms", milliseconds),
        Field("to gain, ms", "gain_ms", milliseconds),
    )
    caption = "What each row could gain if it ran at its ceiling; click a row to mark it"

    def missing(self, held: Held) -> str:
        if held.shown is not None and held.shown.profile.backend is None:
            return _ELSEWHERE
        return super().missing(held)

    def work(self, held: Held) -> Work | None:
        backend = held.shown.profile.backend

        def start() -> jobs.Job:
            return jobs.submit(f"Ceilings of {backend.label}", ceilings, backend)

        return Work(_ceilings_key(backend), start, f"wb.profiling.ceilings({backend.to_python()})")

    def doubtful(self, result: Ceilings) -> bool:
        return result.contended

    def words(self, held: Held, result: Ceilings) -> str:
        most = roofline(held.shown.profile, result).most_to_gain(3)
        named = [f"{row['label']} ({fmt.milliseconds(row['gain_ms'])})" for _, row in labelled(most).iterrows()]
        memory = f"Memory gives {fmt.significant(result.bandwidth_gb_s)} GB/s."
        return f"Most to gain: {', '.join(named)}. {memory}" if named else memory

    def figure(self, held: Held, result: Ceilings) -> Figure:
        return roofline_figure(roofline(held.shown.profile, result).frame(), result, **held.look)

    def listed(self, held: Held, result: Ceilings) -> pd.DataFrame:
        return labelled(roofline(held.shown.profile, result).frame())

    def lines(self, held: Held) -> tuple[str, ...]:
        return (
            f"profile = {held.profile_code}",
            "roofline = wb.profiling.roofline(profile)",
            "roofline_figure(roofline.frame(), roofline.ceilings)",
        )


class SideBySide(View):
    """The profile that is shown against another, row for row, through `align`."""

    title = "Side by side"
    action = "Align"
    compares = True
    imports = ("from workbench.figures import side_by_side_figure",)
    fields = (
        name("first", "label_a"),
        name("second", "label_b"),
        Field("first, ms", "latency_a_ms", milliseconds),
        Field("second, ms", "latency_b_ms", milliseconds),
        Field("first / second", "ratio", factor),
        name("matched by", "how"),
    )
    caption = "Rows that compute the same in both profiles, then those without a partner; click one to mark it"

    def missing(self, held: Held) -> str:
        if held.shown is not None and held.beside is None:
            return (
                "Only one profile is there. Run another engine or network, or open a recorded profile; "
                "then choose what to put beside it."
            )
        return super().missing(held)

    def work(self, held: Held) -> Work | None:
        a, b = held.shown, held.beside

        def start() -> jobs.Job:
            return jobs.submit(f"Aligning {a.label} with {b.label}", _align, a.profile, b.profile)

        return Work(("align", a.number, b.number), start, f"wb.profiling.align({a.code}, {b.code})")

    def words(self, held: Held, result: Alignment) -> str:
        a, b = held.shown.profile.end_to_end_ms, held.beside.profile.end_to_end_ms
        return (
            f"{fmt.milliseconds(a)} against {fmt.milliseconds(b)}: {fmt.factor(a / b)}. Matched: "
            f"{fmt.share(result.matched_share_a)} and {fmt.share(result.matched_share_b)} of their time. "
            f"{_unmatched(result)}"
        )

    def figure(self, held: Held, result: Alignment) -> Figure:
        return side_by_side_figure(result.frame(), _short(held.shown), _short(held.beside), **held.look)

    def listed(self, held: Held, result: Alignment) -> pd.DataFrame:
        frame = result.frame()
        matched = [_pair(row) for row in frame[frame["how"] != "unmatched"].itertuples()]
        alone = [_alone(row) for row in result.unmatched().itertuples()]
        return pd.DataFrame(matched + alone, columns=[*(field.column for field in self.fields), "layer"])

    def lines(self, held: Held) -> tuple[str, ...]:
        if held.shown is None or held.beside is None:
            return ()
        return (
            f"first = {held.shown.code}",
            f"second = {held.beside.code}",
            "alignment = wb.profiling.align(first, second)",
            "side_by_side_figure(alignment.frame(), first.backend_label, second.backend_label)",
        )


def _pair(row: Any) -> dict[str, Any]:
    """One group of an alignment as the table has it."""
    return {
        "label_a": SEPARATOR.join(row.layers_a or row.names_a),
        "label_b": SEPARATOR.join(row.layers_b or row.names_b),
        "latency_a_ms": row.latency_a_ms,
        "latency_b_ms": row.latency_b_ms,
        "ratio": row.ratio,
        "how": row.how,
        "layer": SEPARATOR.join(dict.fromkeys((*row.layers_a, *row.layers_b))),
    }


def _alone(row: Any) -> dict[str, Any]:
    """A row without a partner; the other side stays empty."""
    label = row.layer or row.name
    return {f"label_{row.side}": label, f"latency_{row.side}_ms": row.latency_ms, "how": "unmatched", "layer": label}


def _short(source: Source) -> str:
    return f"{source.number}: {source.profile.backend_label}"


def _align(a: Profile, b: Profile, *, progress: Progress) -> Alignment:
    progress(0.0, "matching rows")
    return align(a, b)


def _unmatched(found: Alignment) -> str:
    rest = found.unmatched()
    if rest.empty:
        return "Nothing is unmatched."
    count = len(rest)
    return f"{count} {'row is' if count == 1 else 'rows are'} unmatched."


class Advice(View):
    """What to try next, from what the profile shows; a table stands for the figure."""

    title = "Advice"
    action = "Look for advice"

    def __init__(self) -> None:
        super().__init__()
        self.body = Table(
            columns(_ADVICE),
            caption="What to try; click a row to mark its layer",
            empty="Nothing stands out.",
            height="268px",
        )
        self.body.add_class("wb-prose")

    def work(self, held: Held) -> Work | None:
        source = held.shown
        known = held.results.get(_ceilings_key(source.profile.backend))

        def start() -> jobs.Job:
            return jobs.submit(f"Advice on {source.label}", _advice, source, known)

        line = _advice_code(source.code, source.network, known is not None)
        return Work(("advice", source.number, known is not None), start, line)

    def words(self, held: Held, result: pd.DataFrame) -> str:
        number = len(result)
        found = f"{number} {'finding' if number == 1 else 'findings'}"
        if held.shown.profile.backend is None or _ceilings_key(held.shown.profile.backend) in held.results:
            return f"{found}."
        return f"{found}, without the ceilings of this machine: open Roofline to measure them."

    def fill(self, held: Held, result: pd.DataFrame) -> None:
        self.layers = result["layer"].fillna("").tolist()
        self.body.fill(rows(result, _ADVICE))

    def lines(self, held: Held) -> tuple[str, ...]:
        network = held.network if held.shown is None else held.shown.network
        known = held.shown is not None and _ceilings_key(held.shown.profile.backend) in held.results
        return f"profile = {held.profile_code}", _advice_code("profile", network, known)


_ADVICE = (
    name("finding", "finding"),
    name("layer", "layer"),
    name("evidence", "evidence"),
    name("what to do", "what_to_do"),
    Field("could save, ms", "saving_ms", milliseconds),
)


def _advice_code(profile: str, network: Network | None, with_roofline: bool) -> str:
    model = "" if network is None else f", model={network.code}"
    under = f", roofline=wb.profiling.roofline({profile})" if with_roofline else ""
    return f"wb.profiling.advice({profile}{under}{model})"


def _advice(source: Source, known: Ceilings | None, *, progress: Progress) -> pd.DataFrame:
    progress(0.0, "reading the profile")
    under = None if known is None else roofline(source.profile, known)
    model = None if source.network is None else source.network.model()
    return advice(source.profile, roofline=under, model=model)

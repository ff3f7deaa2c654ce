"""What every candidate's weights take, beside whether any engine runs them faster."""

from __future__ import annotations

from widgets.panels.candidate_views._base import CandidateView, Drawn, Listing, Seen
from widgets.panels.profile_views import Work
from widgets.panels.profile_views.listing import Field, factor, name
from workbench import formatting as fmt
from workbench import jobs
from workbench.figures import sizes_figure
from workbench.study import size_table

_FIELDS = (
    Field("no.", "candidate", fmt.count),
    name("recipe", "label"),
    name("runs on", "engine"),
    Field("batch", "batch", fmt.count),
    Field("dense", "dense_bytes", fmt.size),
    Field("sparse", "sparse_bytes", fmt.size),
    Field("coded", "coded_bytes", fmt.size),
    Field("deployed", "size_bytes", fmt.size),
    Field("compression", "compression", factor),
    name("against the network as it is", "faster"),
)


class SizesView(CandidateView):
    """Bytes of every candidate in each way of counting; the selected one is set off."""

    title = "Sizes"
    imports = ("from workbench.figures import sizes_figure",)

    def missing(self, seen: Seen) -> str:
        return "" if seen.study.candidates else "No candidates yet. Run a recipe above."

    def work(self, seen: Seen) -> Work:
        study = seen.study

        def start() -> jobs.Job:
            return jobs.submit("Sizes of all candidates", size_table, study)

        return Work(("sizes", study.candidates[-1].number), start, "wb.size_table(study)")

    def drawn(self, seen: Seen) -> Drawn:
        number = None if seen.network is None else seen.network.number
        return Drawn(
            "Zeros of single weights and shared values make files smaller and no engine faster: see the last column.",
            sizes_figure(seen.result, selected=number, dark=seen.dark),
            (Listing("All candidates; click a row to select one", _FIELDS, seen.result, picks="candidate"),),
        )

    def lines(self, seen: Seen) -> tuple[str, ...]:
        if not seen.study.candidates:
            return ()
        return ("sizes_figure(wb.size_table(study))",)

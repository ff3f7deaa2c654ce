"""What the steps measured while they worked, and how their trainings went."""

from __future__ import annotations

import ipywidgets as W

from widgets.panels.candidate_views._base import CandidateView, Drawn, Listing, Seen, choose, measured_fields
from workbench.figures import training_figure
from workbench.models.record import Record

_EPOCHS = {"epoch", "loss", "validation_loss", "validation_accuracy", "kept"}


def _listing(record: Record) -> Listing:
    frame = record.frame()
    return Listing(
        f"{record.step}: {record.title}",
        measured_fields(frame),
        frame,
        picks="layer" if "layer" in frame else "",
    )


class Measured(CandidateView):
    """Each record of each step as a table."""

    title = "What the steps measured"

    def drawn(self, seen: Seen) -> Drawn:
        records = seen.result.records
        if not records:
            return Drawn(f"The steps of {seen.network.label} measured nothing while they worked.")
        return Drawn(
            f"What was measured while {seen.network.label} was made, step by step.", None, tuple(map(_listing, records))
        )

    def lines(self, seen: Seen) -> tuple[str, ...]:
        return (
            f"model = {seen.network.code}",
            "[(record.step, record.title, record.frame()) for record in model.records]",
        )


class Training(CandidateView):
    """One of the candidate's trainings by epoch."""

    title = "Training"
    imports = ("from workbench.figures import training_figure",)

    def __init__(self) -> None:
        super().__init__()
        self.which = W.Dropdown(description="Training", layout=W.Layout(width="320px"))
        self.controls = (self.which,)

    def fill(self, seen: Seen) -> None:
        records = enumerate(seen.result.records)
        choose(self.which, [(record.step, number) for number, record in records if set(record.frame()) >= _EPOCHS])

    def drawn(self, seen: Seen) -> Drawn:
        if self.which.value is None:
            return Drawn(
                f"No step of {seen.network.label} trained. Add Finetune to its recipe, or give a step epochs where it "
                "has that setting."
            )
        record = seen.result.records[self.which.value]
        frame = record.frame()
        kept = [int(epoch) for epoch in frame.loc[frame["kept"].astype(bool), "epoch"]]
        words = f"{record.step}: {len(frame)} epoch{'' if len(frame) == 1 else 's'}"
        words += f"; the weights of epoch {kept[-1]} are kept." if kept else "."
        return Drawn(words, training_figure(frame, dark=seen.dark), (_listing(record),))

    def lines(self, seen: Seen) -> tuple[str, ...]:
        if self.which.value is None:
            return ()
        return f"model = {seen.network.code}", f"training_figure(model.records[{self.which.value}].frame())"

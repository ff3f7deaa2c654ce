"""One layer's weights in the study's model and in the candidate's."""

from __future__ import annotations

import ipywidgets as W

from widgets.panels.candidate_views._base import CandidateView, Drawn, Seen, choose
from widgets.selection import SEPARATOR
from workbench.compression.weights import comparable_layers, weight_pairs
from workbench.errors import StepError
from workbench.figures import weights_figure
from workbench.models import Model


class WeightsView(CandidateView):
    """How many weights have each value before and after, and what became of each."""

    title = "Weights"
    imports = (
        "from workbench.compression.weights import weight_pairs",
        "from workbench.figures import weights_figure",
    )

    def __init__(self) -> None:
        super().__init__()
        self.which = W.Dropdown(description="Layer", layout=W.Layout(width="280px"))
        self.controls = (self.which,)
        self._picked: str | None = None

    @property
    def chosen_layer(self) -> str | None:
        return self.which.value

    def fill(self, seen: Seen) -> None:
        model = seen.result
        names = () if model.origin is None else comparable_layers(model.origin, model)
        choose(self.which, [(name, name) for name in names])
        # only a layer that was just picked: what was chosen here since stays
        if seen.layer != self._picked:
            picked = frozenset((seen.layer or "").split(SEPARATOR))
            self.which.value = next((name for name in names if name in picked), self.which.value)
        self._picked = seen.layer

    def drawn(self, seen: Seen) -> Drawn:
        model, layer = seen.result, self.which.value
        if layer is None:
            return Drawn(_why_none(seen.network.label, model))
        frame = weight_pairs(model.origin, model, layer)
        words = f"{layer} in the network as it is, and in {seen.network.label}."
        return Drawn(words, weights_figure(frame, layer=layer, dark=seen.dark))

    def lines(self, seen: Seen) -> tuple[str, ...]:
        layer = self.which.value
        if layer is None:
            return ()
        return (
            f"model = {seen.network.code}",
            f"weights_figure(weight_pairs(model.origin, model, {layer!r}), layer={layer!r})",
        )


def _why_none(label: str, model: Model) -> str:
    """Why there is no layer to compare, in words."""
    if model.origin is None:
        return f"{label} has no steps, so that its weights are those of the network as it is. Select another candidate."
    if model.module is not None and model.origin.module is not None:
        return f"No layer of {label} has weights of the same shape as before: its steps made each of them narrower."
    try:
        weight_pairs(model.origin, model, "")
    except StepError as why:
        return str(why)
    return ""

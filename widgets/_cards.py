"""A recipe's steps as cards in order: settings to change, and the card to move or remove."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

import ipywidgets as W

from widgets._fields import TRAINING, Setting, settings
from workbench.compression import STEPS, Step
from workbench.errors import StepError, WorkbenchError

_ALWAYS_SHOWN = 2  # settings of a step, the first ones of its declaration; the others unfold


class Card(W.VBox):
    """One step: its label, its settings, and in words what the step refuses.

    Parameters
    ----------
    step
        What the card says at first.
    """

    def __init__(self, step: Step):
        super().__init__()
        self.kind = type(step)
        self.settings = settings(self.kind, {k: v for k, v in step.to_dict().items() if k != "step"})
        self.by_layer = next((s for s in self.settings if s.each), None)
        self.heading = W.HTML()
        self.refused = W.HTML()
        self.refused.add_class("wb-refused")
        self.up = W.Button(description="Up", tooltip="Do this step earlier")
        self.down = W.Button(description="Down", tooltip="Do this step later")
        self.remove = W.Button(description="Remove", tooltip="Take this step out of the recipe")
        top = W.HBox([self.heading, self.up, self.down, self.remove])
        top.add_class("wb-card-top")
        row = W.HBox([s.shown for s in self.settings[:_ALWAYS_SHOWN]])
        row.add_class("wb-controls")
        more = W.VBox(_grouped(self.settings[_ALWAYS_SHOWN:]), layout={"display": "none"})
        if more.children:
            toggle = W.ToggleButton(description="More settings", tooltip="Show the other settings of this step")
            toggle.observe(lambda change: setattr(more.layout, "display", None if change["new"] else "none"), "value")
            row.children = (*row.children, toggle)
        self.children = (top, row, more, self.refused)
        self.add_class("wb-card")

    def step(self, **instead: object) -> Step:
        """The step with the settings the card says, some of them replaced; raises what the step raises."""
        return self.kind.from_dict({s.name: s.value for s in self.settings if s.name not in instead} | instead)

    def number(self, position: int, last: int) -> None:
        """Show where in the recipe the card stands, and what its step is or why it is refused."""
        self.up.disabled, self.down.disabled = position == 1, position == last
        try:
            label, refused = self.step().label, ""
        except WorkbenchError as error:
            label, refused = self.kind.__name__, str(error)
        self.heading.value = f"<b>{position}. {escape(label)}</b>"
        self.refused.value = f'<div role="alert">{escape(refused)}</div>' if refused else ""


def _grouped(rest: Sequence[Setting]) -> list[W.Widget]:
    """The settings that unfold: those of the technique, and those of its training under a heading of their own."""
    own, training = [s for s in rest if s.name not in TRAINING], [s for s in rest if s.name in TRAINING]
    groups: list[W.Widget] = [_grid(own)] if own else []
    if own and training:
        groups.append(W.HTML('<span class="wb-muted">Training</span>'))
    return groups + ([_grid(training)] if training else [])


def _grid(group: Sequence[Setting]) -> W.Box:
    """Controls in columns; those that need a line come after the others, and boxes to tick between the two."""
    order = sorted(group, key=lambda s: (s.wide, isinstance(s.control, W.Checkbox)))
    for setting in order:
        if setting.wide:
            setting.shown.add_class("wb-wide")
        else:
            setting.control.layout.width = "auto"  # its column decides
    grid = W.GridBox([s.shown for s in order])
    grid.add_class("wb-grid")
    return grid


class Cards(W.VBox):
    """The steps of one recipe, in order.

    Parameters
    ----------
    changed
        Called with nothing after every change of a step or of the order.
    bound
        Makes a click's callback out of a function and what it does, so that its errors are shown.
    """

    def __init__(self, changed: Callable[[], None], bound: Callable[[Callable[..., None], str], Callable[..., None]]):
        super().__init__()
        self._told, self._bound = changed, bound
        self.cards: list[Card] = []
        self._touched: Card | None = None
        self.add_class("wb-cards")

    @property
    def focused(self) -> Card | None:
        """The card that was last touched of those with values by layer, or else the first of them; None for none."""
        among = [card for card in self.cards if card.by_layer is not None]
        return self._touched if self._touched in among else among[0] if among else None

    def fill(self, steps: Sequence[Step]) -> None:
        """Show these steps instead of those there were."""
        self.cards = [self._card(step) for step in steps]
        self._arrange()

    def add(self, name: str) -> None:
        """Put a new step, named as it is registered, at the end."""
        self.cards.append(self._card(_fresh(STEPS[name])))
        self._touch(self.cards[-1])
        self._arrange()

    def steps(self) -> tuple[Step, ...]:
        """The steps in order.

        Raises
        ------
        StepError
            Naming the card whose settings its step refuses.
        """
        made = []
        for position, card in enumerate(self.cards, 1):
            try:
                made.append(card.step())
            except WorkbenchError as error:
                raise StepError(f"Step {position}: {error}") from error
        return tuple(made)

    def _card(self, step: Step) -> Card:
        card = Card(step)
        changed = self._bound(lambda *_: self._changed(card), "Reading a step's settings")
        for setting in card.settings:
            setting.on_change(changed)
        card.up.on_click(self._bound(lambda _: self._move(card, -1), "Moving a step"))
        card.down.on_click(self._bound(lambda _: self._move(card, 1), "Moving a step"))
        card.remove.on_click(self._bound(lambda _: self._remove(card), "Removing a step"))
        return card

    def _changed(self, card: Card) -> None:
        self._touch(card)
        self._redraw()

    def _touch(self, card: Card) -> None:
        if card.by_layer is not None:
            self._touched = card

    def _move(self, card: Card, by: int) -> None:
        index = self.cards.index(card)
        target = index + by
        if 0 <= target < len(self.cards):
            self.cards[index], self.cards[target] = self.cards[target], self.cards[index]
            self._arrange()

    def _remove(self, card: Card) -> None:
        self.cards.remove(card)
        self._arrange()
        card.close()

    def _arrange(self) -> None:
        empty = W.HTML(
            '<p class="wb-muted">No steps: this recipe is the model as it is. Add a step, or start from one.</p>'
        )
        self.children = tuple(self.cards) or (empty,)
        self._redraw()

    def _redraw(self) -> None:
        for position, card in enumerate(self.cards, 1):
            card.number(position, len(self.cards))
        self._told()


def _fresh(kind: type[Step]) -> Step:
    """A step with every setting where its control starts."""
    return kind.from_dict({s.name: s.value for s in settings(kind, {})})

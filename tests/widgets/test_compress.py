"""Compress: a recipe built of cards, refused in words or run as a job."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import workbench as wb
from widgets import CompressPanel, _bind
from widgets._fields import settings
from widgets.panels.compress import PRESETS
from workbench.compression import STEPS


@pytest.fixture
def panel(study: wb.Study) -> Iterator[CompressPanel]:
    made = CompressPanel(study)
    made.cards.fill(())
    yield made
    made.close()


def control(panel: CompressPanel, card: int, name: str):
    return next(s for s in panel.cards.cards[card].settings if s.name == name).control


def test_every_step_has_a_card_with_controls_from_its_declaration(panel: CompressPanel):
    for name in STEPS:
        panel.kind.value = name
        panel.add.click()
        _bind.flush()
    assert [type(s).__name__ for s in panel.cards.steps()] == list(STEPS)
    assert all(card.settings for card in panel.cards.cards)
    assert panel.notices.text == ""


def test_choices_and_bounds_are_those_of_the_step():
    made = {s.name: s for s in settings(wb.Prune, {"ratio": 0.5})}
    assert list(made) == ["ratio", "structured", "importance", "scope", "round_to"]
    assert [value for _, value in made["importance"].control.options] == ["l1", "l2"]
    slider = made["ratio"].shown.children[1]
    assert (slider.min, slider.max, slider.value) == (0.0, 1.0, 0.5)
    for _, value in next(s for s in settings(wb.Quantize, {}) if s.name == "precision").control.options:
        wb.Quantize(value)  # each choice is accepted


def test_a_slider_writes_the_number_box_and_a_good_number_moves_the_slider(panel: CompressPanel):
    panel.cards.fill([wb.Prune(0.5)])
    box, slider = next(s for s in panel.cards.cards[0].settings if s.name == "ratio").shown.children
    slider.value = 0.3
    _bind.flush()
    assert panel.cards.steps() == (wb.Prune(0.3),)
    assert panel.copy.text == "study.run([wb.Prune(0.3)], on=wb.OnnxRuntime())"
    box.value = 0.7
    _bind.flush()
    assert slider.value == 0.7


def test_what_a_step_refuses_is_shown_on_its_card_in_its_words(panel: CompressPanel):
    panel.cards.fill([wb.Prune(0.5)])
    control(panel, 0, "ratio").value = 1.5
    _bind.flush()
    with pytest.raises(wb.errors.StepError) as refusal:
        wb.Prune(1.5)
    assert str(refusal.value) in panel.cards.cards[0].refused.value
    assert "Step 1:" in panel.refused.value
    assert panel.copy.text == ""
    control(panel, 0, "ratio").value = 0.5
    _bind.flush()
    assert panel.cards.cards[0].refused.value == panel.refused.value == ""


def test_cards_move_and_go(panel: CompressPanel):
    panel.cards.fill([wb.Prune(0.5), wb.Finetune(epochs=1), wb.Quantize("int8")])
    cards = panel.cards.cards
    cards[1].up.click()
    cards[2].remove.click()
    _bind.flush()
    assert panel.cards.steps() == (wb.Finetune(epochs=1), wb.Prune(0.5))
    assert [card.up.disabled for card in panel.cards.cards] == [True, False]
    assert "1. Finetune 1 epoch" in panel.cards.cards[0].heading.value
    assert panel.notices.text == ""


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_recipe_the_study_takes(panel: CompressPanel, name: str):
    panel.preset.value = name
    _bind.flush()
    assert panel.cards.steps() == PRESETS[name]
    assert panel.draft().steps == PRESETS[name]
    model = panel.study.model
    for step in PRESETS[name]:
        step.check(model)
        model = step.preview(model)


def test_only_usable_engines_can_be_chosen_and_the_others_say_what_they_need(panel: CompressPanel):
    for _, backend in panel.engine.menu.options:
        backend.require()
    for kind in wb.deployment.BACKENDS.values():
        for backend in kind.variants():
            found = backend.availability()
            if not found.usable:
                assert backend.label in panel.engine.missing.value


def test_run_measures_the_recipe_as_a_job_and_selects_the_candidate(fresh: wb.Study, settle):
    panel = CompressPanel(fresh)
    panel.preset.value = "int8"
    settle()
    panel.run.click()
    settle()
    assert panel.notices.text == ""
    assert [c.label for c in fresh.candidates] == ["Quantise int8"]
    assert panel.selection.candidate == 1
    panel.run.click()  # measured already: selected again, not measured twice
    settle()
    assert len(fresh.candidates) == 1
    panel.close()


def test_a_recipe_the_study_refuses_is_told_beside_run_and_starts_no_job(panel: CompressPanel, settle):
    panel.cards.fill([wb.Quantize("int8"), wb.Prune(0.5)])
    before = list(wb.jobs.QUEUE.jobs)
    panel.run.click()
    _bind.flush()
    assert 'role="alert"' in panel.refused.value
    assert wb.jobs.QUEUE.jobs == before
    panel.cards.fill([])
    panel.batch.value = 0
    _bind.flush()
    assert "batch is 0" in panel.refused.value


def test_the_copied_code_rebuilds_the_recipe(panel: CompressPanel):
    steps = [wb.Prune(0.5, scope="global"), wb.Finetune(epochs=1, learning_rate=0.01), wb.Quantize("int8")]
    panel.cards.fill(steps)
    panel.seed.value = 3
    _bind.flush()
    asked = {}

    class Study:
        def run(self, steps, on, batch=1, seed=0):
            asked.update(steps=steps, on=on, batch=batch, seed=seed)

    eval(panel.copy.text, {"wb": wb, "study": Study()})
    assert asked == {"steps": steps, "on": wb.OnnxRuntime(), "batch": 1, "seed": 3}

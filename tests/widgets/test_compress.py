"""Compress: a recipe built of cards, refused in words or run as a job."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest

import workbench as wb
from widgets import CompressPanel, _bind
from widgets._fields import settings
from widgets.panels.compress import PRESETS
from workbench.compression import STEPS
from workbench.errors import StepError


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
    assert panel.notices.text == ""


@pytest.mark.parametrize("name", STEPS)
def test_no_setting_of_a_step_is_without_a_control(name: str):
    made = settings(STEPS[name], {})
    fresh = STEPS[name].from_dict({s.name: s.value for s in made})
    assert [s.name for s in made] == [f.name for f in dataclasses.fields(STEPS[name])]
    assert fresh.to_dict() == {"step": name} | {s.name: s.value for s in made}
    assert all(s.shown.children[0].description if s.shown is not s.control else s.control.description for s in made)


@pytest.mark.parametrize(
    "name", [n for n, kind in STEPS.items() if "layers" in {f.name for f in dataclasses.fields(kind)}]
)
def test_values_by_layer_have_a_word_for_one_of_them(name: str):
    assert next(s for s in settings(STEPS[name], {}) if s.name == "layers").each not in ("", "value") or name == "Clip"


def test_a_setting_of_a_type_that_no_control_is_for_is_an_error_and_not_left_out():
    @dataclasses.dataclass(frozen=True)
    class Odd:
        when: complex = 1j

    with pytest.raises(TypeError, match="when is <class 'complex'>"):
        settings(Odd, {})


def test_a_number_that_may_be_left_out_is_a_box_that_may_be_empty():
    @dataclasses.dataclass(frozen=True)
    class Some:
        share: float | None = None
        count: int | None = 3

    share, count = settings(Some, {})
    assert (share.value, count.value) == (None, 3)
    share.control.value, count.control.value = " 0.25 ", ""
    assert (share.value, count.value) == (0.25, None)
    share.control.value = "much"
    with pytest.raises(StepError, match="share is 'much'; give a number, or leave it empty"):
        _ = share.value


def test_a_fresh_card_starts_where_the_field_says_and_not_at_a_default_that_means_nothing_was_given():
    assert wb.Prune(layers={"conv1": 0.5}).ratio == 0
    assert next(s for s in settings(wb.Prune, {}) if s.name == "ratio").value == 0.5


def test_values_by_layer_are_read_as_numbers_and_words_and_written_back():
    made = next(s for s in settings(wb.Prune, {"layers": {"conv1": 0.3, "fc1": 0.9}}) if s.name == "layers")
    assert made.control.value == "conv1: 0.3, fc1: 0.9"
    made.control.value = " conv1:0.25,fc1 : 2 , a:b: fp32,"
    assert made.value == {"conv1": 0.25, "fc1": 2, "a:b": "fp32"}
    assert type(made.value["fc1"]) is int
    made.set({"fc2": "int8"})
    assert made.control.value == "fc2: int8"


@pytest.mark.parametrize(
    ("written", "said"), [("conv1", "&#x27;conv1&#x27; does not say a value"), ("fc1: 1, fc1: 2", "fc1 is given twice")]
)
def test_a_mistake_in_values_by_layer_is_told_beside_the_card(panel: CompressPanel, written: str, said: str):
    panel.cards.fill([wb.Prune(0.5)])
    control(panel, 0, "layers").value = written
    _bind.flush()
    assert said in panel.cards.cards[0].refused.value
    assert panel.copy.text == ""
    control(panel, 0, "layers").value = "conv1: 0.25"
    _bind.flush()
    assert panel.copy.text == "study.run([wb.Prune(0.5, layers={'conv1': 0.25})], on=wb.OnnxRuntime())"
    assert panel.notices.text == panel.cards.cards[0].refused.value == ""


def test_choices_and_bounds_are_those_of_the_step():
    made = {s.name: s for s in settings(wb.Prune, {"ratio": 0.5})}
    assert list(made)[:5] == ["ratio", "granularity", "importance", "scope", "round_to"]
    assert "2:4" in [value for _, value in made["granularity"].control.options]
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


def test_a_number_between_two_steps_of_a_slider_is_not_bent_to_one_of_them(panel: CompressPanel):
    panel.cards.fill([wb.FakeQuantize(4, percentile=99.99)])
    _, slider = next(s for s in panel.cards.cards[0].settings if s.name == "percentile").shown.children
    slider.value = 100.0  # what the page answers to 99.99, in steps of a half
    _bind.flush()
    assert panel.cards.steps() == (wb.FakeQuantize(4, percentile=99.99),)


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
    assert panel.refused.value == ""
    panel.study._check(panel.draft())  # what a study asks before it starts to work


def test_every_technique_has_a_preset():
    assert {type(step) for steps in PRESETS.values() for step in steps} == set(STEPS.values())


# values by layer


def cells(panel: CompressPanel) -> dict[str, str]:
    """What is written in the cells, where anything is."""
    return {row["cells"][0]: row["cells"][4] for row in panel.layers.table.rows if row["cells"][4]}


def edit(panel: CompressPanel, layer: str, text: str) -> None:
    key = str(panel.layers.names.index(layer))
    panel.layers.table._received(panel.layers.table, {"kind": "edit", "key": key, "text": text}, [])


def test_the_table_has_a_row_for_each_layer_with_weights(panel: CompressPanel):
    panel.cards.fill([wb.Prune(0.5, layers={"conv2": 0.25})])
    rows = [row["cells"] for row in panel.layers.table.rows]
    assert rows == [
        ["conv1", "Conv2d", "156", "28.2", ""],
        ["conv2", "Conv2d", "2.42 k", "57.6", "0.25"],
        ["fc1", "Linear", "48.1 k", "11.5", ""],
        ["fc2", "Linear", "10.2 k", "2.4", ""],
        ["fc3", "Linear", "850", "0.2", ""],
    ]
    assert panel.layers.table.columns[4] == {"label": "ratio", "number": True}
    assert (panel.layers.table.editable, panel.layers.table.hint) == (4, "0.5")


def test_a_cell_writes_into_the_step_and_an_empty_one_takes_the_value_out(panel: CompressPanel, settle):
    panel.cards.fill([wb.FakeQuantize(4)])
    edit(panel, "conv1", " 8 ")
    edit(panel, "fc3", "6")
    settle()
    assert panel.cards.steps() == (wb.FakeQuantize(4, layers={"conv1": 8, "fc3": 6}),)
    assert cells(panel) == {"conv1": "8", "fc3": "6"}
    edit(panel, "conv1", "")
    settle()
    assert panel.cards.steps() == (wb.FakeQuantize(4, layers={"fc3": 6}),)
    assert panel.layers.refused.value == panel.notices.text == ""


def test_a_cell_that_the_step_refuses_shows_why(panel: CompressPanel, settle):
    panel.cards.fill([wb.FakeQuantize(4, layers={"fc1": 8})])
    edit(panel, "conv2", "99")
    settle()
    with pytest.raises(StepError) as refusal:
        wb.FakeQuantize(4, layers={"conv2": 99})
    assert panel.layers.table.faults == {"1": str(refusal.value)}  # and not the row of fc1
    assert "conv2: " in panel.layers.refused.value and 'role="alert"' in panel.layers.refused.value
    assert panel.cards.cards[0].refused.value
    edit(panel, "conv2", "3")
    settle()
    assert panel.layers.table.faults == {} and panel.layers.refused.value == ""


def test_what_is_refused_of_the_other_settings_is_no_fault_of_a_cell(panel: CompressPanel):
    panel.cards.fill([wb.FakeQuantize(4, layers={"fc1": 8})])
    control(panel, 0, "bits").value = 99
    _bind.flush()
    assert panel.cards.cards[0].refused.value
    assert panel.layers.table.faults == {}


def test_a_cell_that_the_network_does_not_take_shows_why_before_anything_is_run(panel: CompressPanel, settle):
    panel.cards.fill([wb.LowRank(layers={"fc1": 8})])
    edit(panel, "fc3", "50")
    settle()
    with pytest.raises(StepError) as refusal:
        wb.LowRank(layers={"fc3": 50}).check(panel.study.model)  # it has ten outputs
    assert panel.layers.table.faults == {"4": str(refusal.value)}
    assert panel.cards.cards[0].refused.value == panel.notices.text == ""


def test_the_cells_are_those_of_the_step_that_was_last_touched(panel: CompressPanel):
    panel.cards.fill([wb.Prune(0.5, layers={"conv1": 0.25}), wb.Finetune(epochs=1), wb.Quantize("int8")])
    assert panel.layers.table.caption == "Ratio by layer of Prune"
    control(panel, 2, "layers").value = "fc3: fp32"
    _bind.flush()
    assert panel.layers.table.columns[4]["label"] == "precision"
    assert cells(panel) == {"fc3": "fp32"}
    control(panel, 1, "epochs").value = 2  # has no values by layer
    _bind.flush()
    assert cells(panel) == {"fc3": "fp32"}
    panel.cards.cards[2].remove.click()
    _bind.flush()
    assert cells(panel) == {"conv1": "0.25"}
    panel.cards.fill([wb.Finetune(epochs=1)])
    assert panel.layers.table.editable == -1
    assert panel.layers.table.caption.startswith("No step above takes values by layer.")


def test_a_row_selects_its_layer_and_the_selected_layer_is_highlighted(panel: CompressPanel):
    panel.layers.table._received(panel.layers.table, {"kind": "pick", "key": "1"}, [])
    _bind.flush()
    assert panel.selection.layer == "conv2"
    assert panel.layers.table.selected == ["1"]
    panel.selection.layer = "conv1 + relu1"
    _bind.flush()
    assert panel.layers.table.selected == ["0"]


# what runs


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

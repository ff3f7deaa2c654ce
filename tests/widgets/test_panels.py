"""Model, Compare and the inspector: what each shows, and what each control does."""

from __future__ import annotations

from pathlib import Path

import pytest

import workbench as wb
from widgets import ComparePanel, ModelPanel, Selection, _bind
from widgets._inspector import Inspector
from workbench.figures.pareto import POINTS, SELECTED


def trace(panel: ComparePanel, name: str):
    return next(t for t in panel.chart.figure.data if t.name == name)


# Model


def test_the_model_panel_has_a_row_per_layer_and_the_totals(study: wb.Study):
    panel = ModelPanel(study)
    cells = [row["cells"] for row in panel.table.rows]
    assert [c[0] for c in cells] == list(study.model.layers["layer"])
    assert cells[0] == ["conv1", "Conv2d", "1 × 28 × 28", "6 × 28 × 28", "156", "118 k", "28.2"]
    assert "61.7 k" in panel.facts.value
    assert "417 k" in panel.facts.value
    assert "lenet5: 61,706 parameters, 416,520 MACs, 12 layers" in repr(panel)
    panel.close()


def test_a_layer_picked_in_one_panel_is_highlighted_in_another(study: wb.Study):
    selection = Selection()
    one, two = ModelPanel(study, selection), ModelPanel(study, selection)
    one.table._received(one.table, {"kind": "pick", "key": "3"}, [])
    _bind.flush()
    assert selection.layer == "conv2"
    assert one.table.selected == two.table.selected == ["3"]
    selection.layer = "conv2 + relu2"
    _bind.flush()
    assert two.table.selected == ["3", "4"]
    one.close()
    two.close()


# Compare


def test_the_chart_and_the_table_hold_every_candidate(study: wb.Study):
    panel = ComparePanel(study)
    assert list(trace(panel, POINTS).customdata) == [1, 2, 3]
    assert [row["key"] for row in panel.table.rows] == ["1", "2", "3"]
    assert panel.table.rows[0]["cells"][:4] == ["1", "as is", study.candidates[0].recipe.backend_label, "99.80"]
    assert [r["strong"] for r in panel.table.rows] == list(study.frame()["pareto"])
    panel.close()


def test_a_click_on_a_point_selects_its_candidate(study: wb.Study):
    panel = ComparePanel(study)
    points = trace(panel, POINTS)
    panel.chart._received(points, type("Points", (), {"point_inds": [1]}), None)
    _bind.flush()
    assert panel.selection.candidate == 2
    assert panel.table.selected == ["2"]
    assert list(trace(panel, SELECTED).x) == [study.candidates[1].measurement.latency_ms]
    panel.close()


def test_a_row_selects_its_candidate(study: wb.Study):
    panel = ComparePanel(study)
    panel.table._received(panel.table, {"kind": "pick", "key": "3"}, [])
    _bind.flush()
    assert panel.selection.candidate == 3
    panel.close()


def test_batch_sizes_are_compared_one_at_a_time(fresh: wb.Study):
    panel = ComparePanel(fresh)
    assert panel.table.rows == []
    assert panel.batch.disabled
    for batch in (1, 8):
        fresh.run([], on=wb.OnnxRuntime(), batch=batch)
    _bind.flush()
    assert panel.notices.text == ""
    assert [label for label, _ in panel.batch.options] == ["all", "1", "8"]
    assert [r["key"] for r in panel.table.rows] == ["1"]
    panel.batch.value = 8
    _bind.flush()
    assert [r["key"] for r in panel.table.rows] == ["2"]
    panel.batch.value = 0
    _bind.flush()
    assert [r["key"] for r in panel.table.rows] == ["1", "2"]
    panel.close()


# the inspector


@pytest.fixture
def inspector(study: wb.Study):
    made = Inspector(study)
    yield made
    made.close()


def test_nothing_selected_says_what_to_do_first(inspector: Inspector):
    assert "Nothing is selected. Click a point" in inspector.about.value
    assert inspector.save.disabled
    assert inspector.copy.text == ""


def test_the_selected_candidate_is_shown_in_full(inspector: Inspector, study: wb.Study):
    inspector.selection.candidate = 3
    _bind.flush()
    shown, m = inspector.about.value, study.candidates[2].measurement
    for words in (
        "Candidate 3: Prune 50 %",
        study.candidates[2].recipe.backend_label,
        wb.formatting.accuracy(m.accuracy),
        wb.formatting.milliseconds(m.latency_ms),
        wb.formatting.size(m.size_bytes),
        "points",
        "Environment",
    ):
        assert words in shown
    assert inspector.copy.text == "study.run([wb.Prune(0.5)], on=wb.OnnxRuntime())"


def test_each_step_says_what_it_changed_where_that_was_measured(inspector: Inspector, study: wb.Study):
    inspector.selection.candidate = 3
    _bind.flush()
    drop = study.candidates[0].measurement.accuracy - study.candidates[2].measurement.accuracy
    assert f"accuracy −{100 * drop:.2f} points" in inspector.about.value
    assert "not measured on its own" not in inspector.about.value


def test_a_number_that_no_candidate_has_selects_nothing(inspector: Inspector):
    inspector.selection.candidate = 99
    _bind.flush()
    assert "Nothing is selected" in inspector.about.value


def test_save_writes_a_package_that_opens(inspector: Inspector, tmp_path: Path, settle):
    inspector.selection.candidate = 2
    _bind.flush()
    inspector.folder.value = str(tmp_path / "package")
    inspector.save.click()
    settle()
    assert f"Saved to {tmp_path / 'package'}" in inspector.notices.text
    with wb.deployment.open(tmp_path / "package") as engine:
        assert engine.precision == "int8"


def test_a_folder_that_cannot_be_written_is_told(inspector: Inspector, tmp_path: Path, settle):
    (tmp_path / "mine.txt").write_text("not a package")
    inspector.selection.candidate = 2
    _bind.flush()
    inspector.folder.value = str(tmp_path)
    inspector.save.click()
    settle()
    assert inspector.notices.text.startswith('<div role="alert"><b>Save candidate 2 failed.</b>')

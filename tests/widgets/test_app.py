"""The app: one view of a study, that agrees with others, says what fails, and leaves nothing behind."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

import workbench as wb
from widgets import ComparePanel, CompressPanel, ModelPanel, ProfilePanel, WhatItDid, Workbench, _bind
from widgets._inspector import Inspector
from workbench import jobs

VIEW = "application/vnd.jupyter.widget-view+json"


@pytest.fixture
def app(study: wb.Study) -> Iterator[Workbench]:
    made = Workbench(study)
    yield made
    made.close()


def test_the_page_names_study_task_and_count(app: Workbench, study: wb.Study):
    assert "lenet5 · digits" in app.heading.value
    assert f"{len(study.candidates)} candidates" in app.heading.value
    assert list(app.tabs.titles) == ["Model", "Profile", "Compress", "Compare"]
    app.show("Compare")
    assert app.tabs.selected_index == 3


def test_one_selection_fills_every_panel(app: Workbench):
    app.selection.candidate = 2
    _bind.flush()
    assert app["Compare"].table.selected == ["2"]
    assert "Candidate 2" in app.inspector.about.value
    assert app.notices.text == ""


def test_two_apps_on_one_study_agree_and_closing_one_leaves_the_other(fresh: wb.Study):
    one, two = Workbench(fresh), Workbench(fresh)
    fresh.run([], on=wb.OnnxRuntime())
    _bind.flush()
    for app in (one, two):
        assert "1 candidate<" in app.heading.value
        assert [r["key"] for r in app["Compare"].table.rows] == ["1"]
    one.close()
    fresh.run([wb.Quantize("int8")], on=wb.OnnxRuntime())
    _bind.flush()
    assert [r["key"] for r in two["Compare"].table.rows] == ["1", "2"]
    two.close()


def test_a_closed_app_listens_to_nothing(study: wb.Study):
    listeners = len(study.added), len(jobs.QUEUE.changed)
    app = Workbench(study)
    assert len(study.added) > listeners[0]
    app.close()
    assert (len(study.added), len(jobs.QUEUE.changed)) == listeners
    assert app.comm is None


def test_a_reopened_app_shows_the_same(study: wb.Study):
    one = Workbench(study)
    shown = one.to_html()
    one.close()
    two = Workbench(study)
    assert two.to_html() == shown
    two.close()


def test_the_clickable_chart_loads_when_it_is_first_seen(app: Workbench):
    assert app["Compare"].chart.figure is None
    app.show("Compare")
    _bind.flush()
    chart = app["Compare"].chart.figure
    assert len(chart.data) > 0
    app.show("Model")
    app.show("Compare")
    _bind.flush()
    assert app["Compare"].chart.figure is chart


def test_a_panel_that_fails_to_redraw_says_so_at_the_bottom(app: Workbench, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(app["Compare"], "_draw", lambda: {}["gone"])
    app.selection.candidate = 1
    _bind.flush()
    assert "<b>Showing the selection failed.</b> KeyError" in app.notices.text
    assert "Candidate 1" in app.inspector.about.value  # the others go on


@pytest.mark.parametrize(
    "kind", [ModelPanel, ProfilePanel, CompressPanel, ComparePanel, WhatItDid, Inspector, Workbench]
)
def test_without_widgets_there_is_html_and_text(kind: type, study: wb.Study):
    shown = kind(study)
    bundle = shown._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "text/html", VIEW}
    assert len(bundle["text/plain"]) > 20
    assert bundle["text/html"].startswith("<h")
    json.dumps(bundle)
    shown.close()


@pytest.mark.parametrize("kind", [ModelPanel, ProfilePanel, CompressPanel, ComparePanel, WhatItDid])
def test_each_panel_stands_alone_with_its_own_errors_and_theme(kind: type, study: wb.Study):
    panel = kind(study)
    assert panel.notices in panel.children
    assert panel.theme in panel.children
    assert panel.question in panel.children[1].value
    panel.close()


def test_names_from_files_are_escaped_everywhere(digits: wb.Task):
    name = "<img src=x onerror=alert(1)>"
    model = wb.load("lenet5")
    x, y = digits.inputs("test", 60)[0], digits.labels("test", 60)
    task = wb.Task.from_arrays(x, y, x, y, name=name)
    with wb.Study(wb.load(model.module, inputs=next(iter(model.example.values())), name=name), task) as study:
        app = Workbench(study)
        study.run([], on=wb.OnnxRuntime())
        app.selection.candidate = 1
        _bind.flush()
        shown = [app.to_html(), app.heading.value, app["Model"].facts.value, app.inspector.about.value]
        assert any("&lt;img" in text for text in shown)
        assert not any("<img" in text for text in shown)
        assert app.notices.text == ""
        app.close()


def test_a_saved_app_is_small_but_for_the_one_clickable_chart(app: Workbench):
    app.show("Compare")
    _bind.flush()
    sizes = [(type(w).__name__, len(json.dumps(w.get_state(), default=lambda o: str(type(o))))) for w in _widgets(app)]
    assert [name for name, size in sizes if size > 100_000] == ["FigureWidget"]
    assert sum(size for name, size in sizes if name != "FigureWidget") < 200_000


def _widgets(widget) -> list:
    return [widget, *(w for child in getattr(widget, "children", ()) for w in _widgets(child))]

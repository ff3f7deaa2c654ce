"""Profile: one view at a time, each drawn from a profile or from what a job found; recorded profiles; the code."""

from __future__ import annotations

import ast
import math
import threading
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import ipywidgets as W
import pandas as pd
import pytest
from plotly.graph_objects import Figure

import workbench as wb
from widgets import ProfilePanel, _bind
from widgets.panels.profile_views import VIEWS, engine, layers, network
from workbench.profiling import Profile

FIGURES = [(file, name) for file in (engine, layers, network) for name in vars(file) if name.endswith("_figure")]


@pytest.fixture
def panel(study: wb.Study) -> Iterator[ProfilePanel]:
    made = ProfilePanel(study)
    yield made
    made.close()


@pytest.fixture
def profiled(panel: ProfilePanel, study: wb.Study) -> ProfilePanel:
    """The panel with a profile of the study's model on ONNX Runtime."""
    add(panel, taken(study, ORT), CODE, panel._held().network)
    return panel


CODE = "wb.profile(study.model, on=wb.OnnxRuntime(), batch=1)"
ORT, EAGER = wb.OnnxRuntime(), wb.Eager()


@cache
def taken(study: wb.Study, backend: wb.Backend) -> Profile:
    """A profile of the study's model, taken once for all tests."""
    return wb.profile(study.model, on=backend, repeats=5)


def synthetic(count: int = 500) -> Profile:
    """`count` layers in a chain, of 1 µs each in a call of (count + 1) µs."""
    rows = [
        {
            "name": f"kernel {i}",
            "layer": f"block{i // 10}.layer{i}",
            "type": ("Conv2d", "ReLU")[i % 2],
            "kind": "layer",
            "latency_ms": 1e-3,
            "latency_p95_ms": 2e-3,
            "share": 1 / (count + 1),
            "macs": 1000.0,
            "parameters": 10.0,
            "input_shape": (4, 8, 8),
            "output_shape": (4, 8, 8),
            "read_bytes": 1024.0,
            "written_bytes": 1024.0,
            "activation_bytes": 2048.0,
            "intensity": 2000 / 2048,
            "precision": "fp32",
        }
        for i in range(count)
    ]
    ports = [wb.deployment.Port(f"t{i}", (1, 4, 8, 8), "float32") for i in range(count + 1)]
    operations = [
        wb.deployment.OpTiming(r["name"], r["type"], (r["layer"],), (1e-3,), reads=(ports[i],), writes=(ports[i + 1],))
        for i, r in enumerate(rows)
    ]
    left = {"name": "(unattributed)", "layer": "(unattributed)", "type": "unattributed", "kind": "unattributed"}
    rows.append(left | {"latency_ms": 1e-3, "share": 1 / (count + 1), "precision": ""})
    return Profile(
        rows=pd.DataFrame(rows),
        operations=tuple(operations),
        end_to_end_ms=1e-3 * (count + 1),
        overhead_ms=math.nan,
        model_name="<b>made up</b>",
        backend=None,
        backend_label="nothing",
        precision="fp32",
        batch=1,
        contended=False,
        environment=None,
    )


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Name and settings of every figure that is drawn."""
    calls: list[tuple[str, dict[str, Any]]] = []

    def counted(name: str, function: Callable[..., Figure]) -> Callable[..., Figure]:
        def call(*args: Any, **settings: Any) -> Figure:
            calls.append((name, settings))
            return function(*args, **settings)

        return call

    for file, name in FIGURES:
        monkeypatch.setattr(file, name, counted(name, getattr(file, name)))
    return calls


def figure(panel: ProfilePanel) -> dict[str, Any]:
    return panel.stage.plot.outputs[0]["data"]["application/vnd.plotly.v1+json"]


def add(panel: ProfilePanel, found: Profile, code: str = "made_up", of: Any = None) -> None:
    panel.add_profile(found, code, of)
    _bind.flush()


def look_at(panel: ProfilePanel, title: str) -> None:
    panel.view.value = title
    _bind.flush()


def pick(panel: ProfilePanel, table: Any, row: int) -> None:
    table._received(table, {"kind": "pick", "key": str(row)}, [])
    _bind.flush()


def says(panel: ProfilePanel) -> str:
    """The words that stand in place of a view; empty while it is drawn."""
    return "" if panel.stage.message.layout.display == "none" else panel.stage.message.value


# profiles


def test_before_the_first_profile_the_panel_says_what_to_do(panel: ProfilePanel):
    assert "press Run profile" in says(panel)
    assert panel.shown.disabled
    assert panel.table.rows == []
    assert panel.stage.plot.outputs == ()


def test_a_profile_runs_as_a_job_and_fills_bars_and_table(panel: ProfilePanel, study: wb.Study, settle):
    before = len(study.log)
    panel.run.click()
    settle()
    assert panel.notices.text == ""
    assert [r["cells"][0] for r in panel.table.rows][-1] == "(unattributed)"
    assert len(figure(panel)["data"][0]["customdata"]) == len(panel.table.rows)
    assert "whole call" in panel.facts.value
    assert "ONNX Runtime" in panel.to_text()
    assert says(panel) == ""
    assert study.log[before:] == [CODE]


def test_a_candidate_can_be_profiled_and_the_code_says_how(panel: ProfilePanel, settle):
    assert panel.copy.text.splitlines()[2] == f"profile = {CODE}"
    panel.what.value = 3
    panel.batch.value = 4
    panel.run.click()
    settle()
    assert panel.notices.text == ""
    assert panel.sources[1].profile.batch == 4
    assert panel.copy.text == (
        "import workbench as wb\n"
        "from workbench.figures import profile_bars_figure\n"
        "profile = wb.profile(study.run([wb.Prune(0.5)], on=wb.OnnxRuntime()).model(), on=wb.OnnxRuntime(), batch=4)\n"
        "profile_bars_figure(profile.frame())"
    )


def test_a_batch_size_of_none_is_refused_beside_the_control(panel: ProfilePanel, settle):
    panel.batch.value = 0
    panel.run.click()
    settle()
    assert "a whole number of at least 1 is needed" in panel.refused.value
    assert panel.sources == {}
    panel.batch.value = 1
    settle()
    assert panel.refused.value == ""


def test_a_profile_recorded_elsewhere_opens_without_its_engine(panel: ProfilePanel, shared_data: Path, settle):
    folder = shared_data / "trex" / "resnet18-a100" / "fp16"
    panel.folder.value = str(folder)
    panel.open_recorded.click()
    settle()
    assert panel.notices.text == ""
    rows = wb.profiling.read_tensorrt(folder).frame()
    assert [r["cells"][1] for r in panel.table.rows] == list(rows["type"])
    assert f"read_tensorrt({str(folder)!r})" in panel.copy.text
    assert panel.study.log[-1] == f"wb.profiling.read_tensorrt({str(folder)!r})"
    look_at(panel, "Roofline")
    assert "cannot be measured here" in says(panel)


@pytest.mark.parametrize("folder", ["", "/nowhere/to/be/found"])
def test_a_folder_without_a_recorded_profile_is_told(panel: ProfilePanel, settle, folder: str):
    panel.folder.value = folder
    panel.open_recorded.click()
    settle()
    told = panel.notices.text if folder else panel.refused.value
    assert 'role="alert"' in told
    assert (folder or "Give the folder") in told
    assert panel.sources == {}


def test_every_profile_taken_can_be_shown_again(profiled: ProfilePanel):
    add(profiled, synthetic(20))
    assert profiled.shown.value == 2
    assert profiled.beside.value == 1
    assert len(profiled.table.rows) == 21
    profiled.shown.value = 1
    _bind.flush()
    assert profiled.beside.value == 2
    assert len(profiled.table.rows) == len(profiled.sources[1].profile.frame())
    assert profiled.notices.text == ""


def test_names_from_files_are_escaped(panel: ProfilePanel):
    add(panel, synthetic(20))
    for shown in (panel.to_html(), panel.facts.value):
        assert "<b>made up" not in shown
        assert "&lt;b&gt;made up" in shown


# what is drawn, and when


def test_every_view_has_a_name_of_its_own_and_every_work_a_button():
    assert len({view.title for view in VIEWS}) == len(VIEWS)
    assert [view.title for view in VIEWS if not view.action and view.work is not VIEWS[0].work] == []


def test_every_control_has_a_label(panel: ProfilePanel):
    for view in panel.views:
        look_at(panel, view)
        for widget in _below(panel):
            if isinstance(widget, (W.Dropdown, W.Text, W.IntText, W.Button, W.ToggleButtons)):
                assert widget.description


def test_of_a_profile_of_500_rows_only_the_view_in_sight_is_drawn(panel: ProfilePanel, drawn: list):
    before = len(_below(panel))
    add(panel, synthetic())
    assert [name for name, _ in drawn] == ["profile_bars_figure"]
    assert len(panel.table.rows) == 501
    assert len(_below(panel)) == before  # no widget per row
    for title, name in (("Types", "profile_types_figure"), ("Data flow", "dataflow_figure")):
        drawn.clear()
        look_at(panel, title)
        assert [name for name, _ in drawn] == [name]


def test_the_figure_follows_the_theme(profiled: ProfilePanel):
    light = figure(profiled)["layout"]["font"]["color"]
    profiled.theme.dark = True
    _bind.flush()
    assert figure(profiled)["layout"]["font"]["color"] != light


def test_a_row_that_is_picked_is_set_off_in_table_and_figure(profiled: ProfilePanel, drawn: list):
    row = next(i for i, r in enumerate(profiled.table.rows) if r["cells"][0].startswith("conv2"))
    pick(profiled, profiled.table, row)
    layer = profiled.selection.layer
    assert layer == profiled.table.rows[row]["cells"][0]
    assert str(row) in profiled.table.selected
    assert [settings["selected"] for _, settings in drawn] == [layer]


def test_another_panels_choice_of_layer_reaches_every_view(profiled: ProfilePanel, drawn: list, settle):
    profiled.what.value = 2
    add(profiled, taken(profiled.study, EAGER), "eager")
    for view in (v for v in profiled.views.values() if v.automatic and v.body is None):
        look_at(profiled, view.title)
        settle()
        profiled.selection.layer = None
        _bind.flush()
        drawn.clear()
        profiled.selection.layer = "conv2"
        _bind.flush()
        assert [settings["selected"] for _, settings in drawn] == ["conv2"], view.title
        assert profiled.table.selected, view.title
    assert profiled.notices.text == ""


def test_a_closed_panel_leaves_no_control_behind(study: wb.Study):
    panel = ProfilePanel(study)
    controls = [panel.shown, panel.beside, panel.start, *(c for view in panel.views.values() for c in view.controls)]
    panel.close()
    assert [c.description for c in (*controls, panel.run, panel.view) if c.comm is not None] == []


# what a job computes


def test_ceilings_are_measured_by_the_worker_once_and_only_when_asked_for(
    profiled: ProfilePanel, monkeypatch: pytest.MonkeyPatch, settle
):
    threads = []

    def ceilings(backend: wb.Backend, *, progress: Any) -> Any:
        threads.append(threading.current_thread().name)
        return wb.profiling.Ceilings(10.0, {"fp32": 100.0, "int8": 200.0})

    monkeypatch.setattr(engine, "ceilings", ceilings)
    look_at(profiled, "Types")
    assert threads == []
    for _ in range(2):
        look_at(profiled, "Roofline")
        settle()
        assert says(profiled) == ""
        look_at(profiled, "Layers")
    assert threads == ["workbench-jobs"]
    assert "wb.profiling.ceilings(wb.OnnxRuntime())" in profiled.study.log


def test_work_that_fails_is_told_and_can_be_tried_again(
    profiled: ProfilePanel, monkeypatch: pytest.MonkeyPatch, settle
):
    answers = iter([wb.errors.BackendError("no kernel runs."), None])

    def ceilings(backend: wb.Backend, *, progress: Any) -> Any:
        if (error := next(answers)) is not None:
            raise error
        return wb.profiling.Ceilings(10.0, {"fp32": 100.0})

    monkeypatch.setattr(engine, "ceilings", ceilings)
    look_at(profiled, "Roofline")
    settle()
    assert "no kernel runs." in profiled.notices.text
    assert "failed; the notice says why. Press Measure ceilings to try again." in says(profiled)
    assert not profiled.start.disabled
    profiled.start.click()
    settle()
    assert says(profiled) == ""
    assert profiled.start.disabled


def test_two_profiles_stand_side_by_side_once_there_are_two(profiled: ProfilePanel, settle):
    look_at(profiled, "Side by side")
    assert "Only one profile is there" in says(profiled)
    assert profiled.copy.text == ""
    add(profiled, taken(profiled.study, EAGER), "wb.profile(study.model, on=wb.Eager())")
    settle()
    assert says(profiled) == ""
    assert profiled.notices.text == ""
    found = wb.profiling.align(taken(profiled.study, EAGER), taken(profiled.study, ORT))
    assert len(profiled.table.rows) == len(found.groups) + len(found.unmatched())
    row = next(i for i, r in enumerate(profiled.table.rows) if r["cells"][0].startswith("conv2"))
    pick(profiled, profiled.table, row)
    both = {*found.frame()["layers_a"][row], *found.frame()["layers_b"][row]}
    assert profiled.selection.layers == both


def test_every_row_without_a_partner_is_listed(profiled: ProfilePanel, settle):
    add(profiled, synthetic(20))
    look_at(profiled, "Side by side")
    settle()
    assert profiled.notices.text == ""
    alone = wb.profiling.align(profiled.sources[2].profile, profiled.sources[1].profile).unmatched()
    assert len(alone) > 5
    listed = [r["cells"] for r in profiled.table.rows if r["cells"][-1] == "unmatched"]
    assert [cells[side == "b"] for cells, side in zip(listed, alone["side"], strict=True)] == [
        layer or name for layer, name in zip(alone["layer"], alone["name"], strict=True)
    ]
    assert all(cells[4] == "–" for cells in listed)


def test_memory_is_traced_for_the_network_of_the_menu_without_a_profile(panel: ProfilePanel, settle):
    look_at(panel, "Memory")
    settle()
    timeline = wb.profiling.memory_timeline(panel.study.model, batch=1)
    assert wb.formatting.size(timeline.peak_bytes) in panel.facts.value
    assert f"plans {wb.formatting.size(timeline.planned_bytes(ORT))}" in panel.facts.value
    assert "resident memory" in panel.facts.value
    assert len(panel.table.rows) == len(timeline.frame())
    panel.batch.value = 0
    _bind.flush()
    assert "a whole number of at least 1" in says(panel)


def test_distance_asks_for_a_candidate_and_measures_it(panel: ProfilePanel, settle):
    look_at(panel, "Distance")
    assert "Choose a candidate under Network" in says(panel)
    assert panel.start.disabled
    panel.what.value = 2
    settle()
    assert panel.notices.text == ""
    assert says(panel) == ""
    assert "conv2" in " ".join(r["cells"][0] for r in panel.table.rows)
    assert "wb.profiling.sqnr(study.model, " in panel.study.log[-1]


def test_sensitivity_runs_only_when_its_button_is_pressed(panel: ProfilePanel, monkeypatch: pytest.MonkeyPatch, settle):
    short = partial(network.sensitivity, layers=["fc2"], levels=[0.25, 0.5], limit=50, latency=False)
    monkeypatch.setattr(network, "sensitivity", lambda *args, on, cache: short(*args))
    look_at(panel, "Sensitivity")
    settle()
    assert "Press Run sensitivity" in says(panel)
    assert panel.work == {}
    panel.start.click()
    settle()
    settle()  # the first job makes the model and submits the second
    assert panel.notices.text == ""
    assert says(panel) == ""
    assert [r["cells"][:3] for r in panel.table.rows] == [["fc2", "prune", "0.250"], ["fc2", "prune", "0.500"]]
    assert panel.start.disabled
    assert panel.study.log[-1] == 'wb.sensitivity(study.model, study.task, "prune", on=wb.OnnxRuntime(), cache=study)'
    panel.views["Sensitivity"].technique.value = "quantize"
    _bind.flush()
    assert "Press Run sensitivity" in says(panel)


def test_a_network_that_cannot_be_changed_layer_by_layer_is_refused_in_words(panel: ProfilePanel, settle):
    panel.what.value = 2  # a graph in int8
    look_at(panel, "Sensitivity")
    panel.start.click()
    settle()
    assert "failed; the notice says why" in says(panel)
    assert "torch module" in panel.notices.text


def test_advice_is_a_table_whose_rows_pick_layers(profiled: ProfilePanel, monkeypatch: pytest.MonkeyPatch, settle):
    told = {
        "finding": ["memory-bound", "no provider"],
        "evidence": ["0.1 ms", "CPU"],
        "what_to_do": ["fuse it", "install it"],
        "saving_ms": [0.1, math.nan],
        "layer": ["conv2", ""],
    }
    monkeypatch.setattr(engine, "advice", lambda profile, **_: pd.DataFrame(told))
    look_at(profiled, "Advice")
    settle()
    body = profiled.views["Advice"].body
    assert [r["cells"] for r in body.rows] == [
        ["memory-bound", "conv2", "0.1 ms", "fuse it", "0.100"],
        ["no provider", "", "CPU", "install it", "–"],
    ]
    assert profiled.stage.plot.layout.display == "none"
    pick(profiled, body, 0)
    assert profiled.selection.layer == "conv2"
    assert body.selected == ["0"]
    assert "fuse it" in profiled.to_html()
    look_at(profiled, "Layers")
    assert body.layout.display == "none"


# the code


@pytest.mark.parametrize("title", [view.title for view in VIEWS if view.automatic])
def test_the_code_of_a_view_makes_what_the_view_shows(profiled: ProfilePanel, title: str, settle):
    profiled.what.value = 2
    add(profiled, taken(profiled.study, EAGER), "wb.profile(study.model, on=wb.Eager(), repeats=2)")
    look_at(profiled, title)
    settle()
    *lines, last = ast.parse(profiled.copy.text).body
    names: dict[str, Any] = {"study": profiled.study}
    exec(compile(ast.Module(lines, []), "copied", "exec"), names)
    made = eval(compile(ast.Expression(last.value), "copied", "eval"), names)
    assert isinstance(made, pd.DataFrame if title == "Advice" else Figure)
    assert title == "Advice" or len(made.data) > 0


def _below(box: Any) -> list[W.Widget]:
    return [found for child in getattr(box, "children", ()) for found in (child, *_below(child))]

"""What a candidate's steps did: records, training, weights, sizes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
import pytest

import workbench as wb
from widgets import CompressPanel, _bind
from widgets.panels.candidate_views import VIEWS
from widgets.panels.candidate_views._base import measured_fields
from widgets.panels.did import WhatItDid
from workbench.models.record import Record


@pytest.fixture(scope="module")
def worked(digits: wb.Task) -> Iterator[wb.Study]:
    """LeNet-5 on digits: 1 as it is, 2 pruned, fine-tuned and in int8, 3 rounded to 4 bits; tests add none."""
    with wb.Study(wb.load("lenet5"), digits) as made:
        made.run([])
        made.run([wb.Prune(0.5, granularity="weight"), wb.Finetune(epochs=2), wb.Quantize("int8")])
        made.run([wb.FakeQuantize(4)])
        yield made


@pytest.fixture
def did(worked: wb.Study) -> Iterator[WhatItDid]:
    made = WhatItDid(worked)
    _bind.flush()
    yield made
    made.close()


def choose(did: WhatItDid, view: str, candidate: int | None) -> None:
    did.selection.candidate, did.view.value = candidate, view


def plotted(did: WhatItDid) -> dict:
    return did.plot.outputs[0]["data"]["application/vnd.plotly.v1+json"]


def namespace(study: wb.Study) -> dict:
    return {"study": study, "wb": wb}


def last_value(code: str, names: dict) -> object:
    *lines, last = code.splitlines()
    exec("\n".join(lines), names)
    return eval(last, names)


def test_the_compress_panel_shows_the_records_of_the_selected_candidate_in_its_fold(worked: wb.Study, settle):
    panel = CompressPanel(worked)
    panel.selection.candidate = 2
    settle()
    assert panel.did.tables.children == ()  # nothing is computed while the fold is closed
    panel.fold.selected_index = 0
    settle()
    settle()
    records = worked.candidates[1].model().records
    tables = panel.did.tables.children
    assert [t.caption for t in tables] == [f"{r.step}: {r.title}" for r in records]
    assert [len(t.rows) for t in tables] == [len(r.rows) for r in records]
    steps = {r.step for r in records}
    assert steps == {step.label for step in worked.candidates[1].recipe.steps}
    assert "training, by epoch" in panel.to_html()
    assert panel.notices.text == ""
    panel.close()


def test_a_training_is_drawn_with_its_epochs_and_the_kept_one_in_words(did: WhatItDid, worked: wb.Study, settle):
    choose(did, "Training", 2)
    settle()
    settle()
    model = worked.candidates[1].model()
    record = next(r for r in model.records if r.title == "training, by epoch")
    assert [label for label, _ in did.views["Training"].which.options] == ["Finetune 2 epochs"]
    assert plotted(did)["data"][0]["y"] == [row["loss"] for row in record.rows]
    kept = [row["epoch"] for row in record.rows if row["kept"]]
    assert f"the weights of epoch {kept[-1]} are kept" in did.message.value
    figure = last_value(did.copy.text, namespace(worked))
    assert list(figure.data[0].y) == [row["loss"] for row in record.rows]
    choose(did, "Training", 3)
    settle()
    settle()
    assert "No step of candidate 3" in did.message.value and "Add Finetune" in did.message.value
    assert did.plot.layout.display == "none"
    assert did.copy.text == did.notices.text == ""


def test_weights_are_compared_with_those_of_the_network_as_it_is(did: WhatItDid, worked: wb.Study, settle):
    did.selection.layer = "conv2 + relu2"
    choose(did, "Weights", 3)
    settle()
    settle()
    which = did.views["Weights"].which
    assert list(which.options) == [(n, n) for n in ("conv1", "conv2", "fc1", "fc2", "fc3")]
    assert which.value == "conv2"
    counts = [sum(trace["y"]) for trace in plotted(did)["data"][:2]]
    assert counts == [worked.model.module.conv2.weight.numel()] * 2
    which.value = "fc3"
    settle()
    assert did.selection.layer == "fc3"
    assert "fc3: 840 weights" in plotted(did)["layout"]["title"]["text"]
    after = worked.candidates[2].model().module.fc3.weight.detach().numpy()
    figure = last_value(did.copy.text, namespace(worked))
    assert len(np.unique(list(figure.data[2].y))) == len(np.unique(after)) <= 16 * 10


def test_weights_of_a_graph_and_of_the_network_itself_are_answered_in_words(did: WhatItDid, settle):
    for candidate, words in ((2, "is an ONNX graph"), (1, "has no steps")):
        choose(did, "Weights", candidate)
        settle()
        settle()
        assert words in did.message.value
        assert did.copy.text == did.notices.text == ""


def test_sizes_list_every_candidate_and_whether_it_runs_faster(did: WhatItDid, worked: wb.Study, settle):
    choose(did, "Sizes", 2)
    settle()
    settle()
    (table,) = did.tables.children
    expected = wb.size_table(worked)
    assert [row["cells"][0] for row in table.rows] == ["1", "2", "3"]
    assert [row["cells"][-1] for row in table.rows] == expected["faster"].tolist()
    assert [row["sort"][6] for row in table.rows] == expected["coded_bytes"].tolist()
    assert table.selected == ["1"]
    assert plotted(did)["data"][0]["marker"]["opacity"] == [0.45, 1.0, 0.45]
    table._received(table, {"kind": "pick", "key": "2"}, [])
    settle()
    assert did.selection.candidate == 3
    assert did.tables.children[0].selected == ["2"]
    assert worked.log[-1] == "wb.size_table(study)"
    assert list(last_value(did.copy.text, namespace(worked)).data[0].customdata) == [1, 2, 3]


@pytest.mark.parametrize("title", [kind.title for kind in VIEWS if kind.title != "Sizes"])
def test_without_a_selected_candidate_a_view_says_what_to_do_first(did: WhatItDid, title: str, settle):
    choose(did, title, None)
    settle()
    assert "No candidate is selected. Run a recipe" in did.message.value
    assert "no candidate is selected" in did.to_text()


def test_a_layer_in_a_record_selects_the_layer(did: WhatItDid, settle):
    choose(did, "What the steps measured", 3)
    settle()
    settle()
    at, table = next(
        (n, t) for n, (listing, t) in enumerate(did._listings) if listing.picks == "layer" and len(t.rows) > 1
    )
    table._received(table, {"kind": "pick", "key": "1"}, [])
    settle()
    assert did.selection.layer == did._listings[at][0].frame["layer"][1]
    assert table.selected == ["1"]


def test_a_model_that_cannot_be_loaded_is_told_and_can_be_asked_for_again(did: WhatItDid, worked: wb.Study, settle):
    broken = [True]
    made = worked._model

    def failing(*args: object, **named: object) -> wb.Model:
        if broken[0]:
            raise wb.errors.StoreError("The state is damaged.")
        return made(*args, **named)

    candidate = worked.candidates[2]
    kept = candidate._make_model
    object.__setattr__(candidate, "_make_model", lambda: failing(*kept.args))
    try:
        choose(did, "What the steps measured", 3)
        settle()
        settle()
        assert "failed; the notice says why" in did.message.value
        assert "The state is damaged." in did.notices.text
        assert did.again.layout.display is None
        broken[0] = False
        did.again.click()
        settle()
        settle()
        assert did.tables.children and did.again.layout.display == "none"
    finally:
        object.__setattr__(candidate, "_make_model", kept)


def test_the_unit_of_a_measured_column_stands_in_its_header():
    record = Record.of(
        "step",
        "title",
        [
            {"layer": "a", "validation_accuracy": 0.875, "weight_bytes": 98000, "sqnr_db": -3.25, "kept": True, "n": 4},
            {"layer": "b", "validation_accuracy": None, "weight_bytes": 120, "sqnr_db": 20.0, "kept": False, "n": None},
        ],
    )
    fields = measured_fields(record.frame())
    assert [f.label for f in fields] == ["layer", "validation accuracy, %", "weight", "SQNR, dB", "kept", "n"]
    written = [[f.write(v) for v in record.frame()[f.column].tolist()] for f in fields]
    assert written == [["a", "b"], ["87.50", "–"], ["98 KB", "120 B"], ["−3.25", "20.0"], ["yes", "no"], ["4", "–"]]


def test_a_column_without_any_known_value_is_written_as_unknown():
    (field,) = measured_fields(pd.DataFrame({"validation_loss": [None, None]}))
    assert field.write(None) == "–"

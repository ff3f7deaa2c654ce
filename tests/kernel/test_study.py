"""A study computes nothing twice, loses nothing, and finds its front."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import textwrap
import threading

import pytest

import workbench as wb
from workbench import measure
from workbench.compression import Finetune, Prune
from workbench.errors import Cancelled, DataError, RecipeError, StepError, StoreError
from workbench.jobs import on_progress

COLUMNS = {
    "candidate", "recipe", "backend", "batch", "family", "precision", "accuracy", "accuracy_low", "accuracy_high",
    "latency_ms", "latency_low_ms", "latency_high_ms", "latency_p95_ms", "speedup", "throughput_per_s", "size_bytes",
    "file_bytes", "memory_mb", "pareto", "contended", "created",
}  # fmt: skip


@pytest.fixture
def counted(monkeypatch):
    """How often each kind of step was really applied."""
    calls = []
    for kind in (Prune, Finetune, wb.Quantize):
        original = kind.apply

        def apply(self, *args, _original=original, **kwargs):
            calls.append(type(self).__name__)
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(kind, "apply", apply)
    return calls


def test_the_five_lines_of_the_readme(digits):
    with wb.Study(wb.load("lenet5"), digits) as study:
        study.run([wb.Prune(0.5), wb.Finetune(epochs=2), wb.Quantize("int8")], on=wb.OnnxRuntime())
        front = study.pareto()
        assert list(front["candidate"]) == [1]
        assert front["accuracy"].iloc[0] > 0.9
        assert study.best(max_drop=0.05).number == 1


def test_frame_has_a_row_per_candidate_with_units_in_the_names(digits_study, digits_candidate):
    frame = digits_study.frame()
    assert set(frame.columns) == COLUMNS
    assert list(frame["candidate"]) == [c.number for c in digits_study.candidates]


def test_empty_study_has_an_empty_frame_with_the_same_columns(digits):
    with wb.Study(wb.load("lenet5"), digits) as study:
        assert set(study.frame().columns) == COLUMNS
        assert len(study.pareto()) == 0
        with pytest.raises(StoreError, match="the study is empty"):
            study.best()


def test_a_recipe_already_run_returns_the_same_candidate_without_work(digits_study, digits_candidate, counted):
    assert digits_study.run([], on=wb.OnnxRuntime()) is digits_candidate
    assert counted == []


def test_a_shared_prefix_is_computed_once(digits, counted):
    with wb.Study(wb.load("lenet5"), digits) as study:
        first = [wb.Prune(0.5), wb.Finetune(epochs=1)]
        study.run(first, on=wb.Eager())
        study.run([*first, wb.Quantize("int8")], on=wb.OnnxRuntime())
        study.run([wb.Prune(0.5), wb.Quantize("int8")], on=wb.OnnxRuntime())
        study.run(first, on=wb.OnnxRuntime())
    assert counted == ["Prune", "Finetune", "Quantize", "Quantize"]


def test_a_study_goes_on_in_a_new_process(tmp_path, digits, counted):
    folder = tmp_path / "study"
    code = f"""
        import workbench as wb
        with wb.Study(wb.load("lenet5"), wb.tasks.digits(), store={str(folder)!r}) as study:
            study.run([wb.Prune(0.5)], on=wb.Eager())
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
    with wb.Study(wb.load("lenet5"), digits, store=folder) as study:
        assert [c.label for c in study.candidates] == [wb.Prune(0.5).label]
        assert study.log == ["study.run([wb.Prune(0.5)], on=wb.Eager())"]
        study.run([wb.Prune(0.5)], on=wb.Eager())
        study.run([wb.Prune(0.5), wb.Quantize("int8")], on=wb.OnnxRuntime())
        assert counted == ["Quantize"]
        with study.candidates[0].engine() as engine:
            (x,), y = next(digits.batches("test", 100))
            assert engine(x).shape == (100, 10)


def test_cached_models_come_back_bit_for_bit(tmp_path, digits):
    steps = [wb.Prune(0.5), wb.Finetune(epochs=1)]
    with wb.Study(wb.load("lenet5"), digits, store=tmp_path / "s") as study:
        made = study.run(steps, on=wb.Eager()).model().fingerprint
    with wb.Study(wb.load("lenet5"), digits, store=tmp_path / "s") as study:
        assert study.candidates[0].model().fingerprint == made


def test_an_altered_artefact_is_made_again_not_trusted(tmp_path, digits, counted):
    with wb.Study(wb.load("lenet5"), digits, store=tmp_path / "s") as study:
        study.run([wb.Prune(0.5)], on=wb.Eager())
    (artefact,) = [p for p in (tmp_path / "s" / "objects").rglob("*") if p.is_file()]
    artefact.write_bytes(artefact.read_bytes()[:-1] + b"x")
    with wb.Study(wb.load("lenet5"), digits, store=tmp_path / "s") as study:
        study.run([wb.Prune(0.5)], on=wb.OnnxRuntime())
    assert counted == ["Prune", "Prune"]


def test_two_studies_on_one_store_see_each_other(tmp_path, digits, counted):
    with (
        wb.Study(wb.load("lenet5"), digits, store=tmp_path / "s") as one,
        wb.Study(wb.load("lenet5"), digits, store=tmp_path / "s") as two,
    ):
        one.run([wb.Prune(0.5)], on=wb.Eager())
        two.run([wb.Prune(0.5)], on=wb.Eager())
        assert [c.number for c in two.candidates] == [1]
    assert counted == ["Prune"]


def test_a_store_of_another_model_is_refused(tmp_path, digits):
    wb.Study(wb.load("lenet5"), digits, store=tmp_path / "s").close()
    with pytest.raises(StoreError, match="another model"):
        wb.Study(wb.load("mlp"), digits, store=tmp_path / "s")


def test_a_damaged_database_is_refused_and_left_alone(tmp_path, digits):
    wb.Study(wb.load("lenet5"), digits, store=tmp_path / "s").close()
    database = tmp_path / "s" / "study.sqlite"
    database.write_bytes(b"not a database" * 100)
    with pytest.raises(StoreError, match="damaged"):
        wb.Study(wb.load("lenet5"), digits, store=tmp_path / "s")
    assert database.read_bytes() == b"not a database" * 100


def test_a_store_from_a_newer_version_is_refused(tmp_path, digits):
    wb.Study(wb.load("lenet5"), digits, store=tmp_path / "s").close()
    with sqlite3.connect(tmp_path / "s" / "study.sqlite") as database:
        database.execute("UPDATE meta SET value = '99' WHERE key = 'schema'")
    database.close()
    with pytest.raises(StoreError, match="newer version"):
        wb.Study(wb.load("lenet5"), digits, store=tmp_path / "s")


def test_a_folder_with_other_files_is_refused(tmp_path, digits):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(StoreError, match="holds other files"):
        wb.Study(wb.load("lenet5"), digits, store=tmp_path)


def test_a_cancelled_run_keeps_the_steps_that_were_finished(tmp_path, digits, counted):
    def stop_in_finetune(fraction, message):
        if "Finetune" in message:
            raise Cancelled("stop")

    steps = [wb.Prune(0.5), wb.Finetune(epochs=1)]
    with wb.Study(wb.load("lenet5"), digits, store=tmp_path / "s") as study:
        with pytest.raises(Cancelled):
            study.run(steps, on=wb.Eager(), progress=on_progress(stop_in_finetune))
        assert study.candidates == []
        study.run(steps, on=wb.Eager())
    assert counted.count("Prune") == 1


def test_a_killed_run_leaves_the_study_readable(tmp_path, digits):
    folder = tmp_path / "s"
    code = f"""
        import os, signal, workbench as wb
        from workbench.jobs import on_progress
        def die(fraction, message):
            if "Finetune" in message:
                os.kill(os.getpid(), signal.SIGKILL)
        study = wb.Study(wb.load("lenet5"), wb.tasks.digits(), store={str(folder)!r})
        study.run([wb.Prune(0.5)], on=wb.Eager())
        study.run([wb.Prune(0.5), wb.Finetune(epochs=1)], on=wb.Eager(), progress=on_progress(die))
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False)
    assert ended.returncode == -9
    with wb.Study(wb.load("lenet5"), digits, store=folder) as study:
        assert [c.label for c in study.candidates] == [wb.Prune(0.5).label]


@pytest.mark.parametrize(
    ("steps", "on", "error", "words"),
    [
        ([wb.Quantize("int8"), wb.Prune(0.5)], wb.OnnxRuntime(), StepError, "before"),
        ([wb.Quantize("int8")], wb.Eager(), wb.errors.BackendError, "OnnxRuntime"),
        (["Prune"], wb.Eager(), RecipeError, "not a step"),
        ([], "cpu", RecipeError, "not a backend"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(digits_study, counted, steps, on, error, words):
    with pytest.raises(error, match=words):
        digits_study.run(steps, on=on)
    assert counted == []


def test_a_batch_larger_than_the_test_split_is_refused(digits_study):
    with pytest.raises(DataError, match="500 samples"):
        digits_study.run([], on=wb.Eager(), batch=501)


def test_a_task_that_does_not_fit_the_model_is_refused(digits):
    with pytest.raises(DataError):
        wb.Study(wb.load("resnet20"), digits)


def test_best_names_the_closest_where_none_is_accurate_enough(digits):
    with wb.Study(wb.load("lenet5"), digits) as study:
        study.run([wb.Prune(0.9)], on=wb.Eager())
        with pytest.raises(StoreError, match="the closest is"):
            study.best(max_drop=0.0)


def test_a_submitted_run_announces_its_candidate(digits_study):
    heard = threading.Event()
    digits_study.added.connect(lambda c: heard.set())
    candidate = digits_study.submit([wb.Prune(0.3)], on=wb.Eager()).wait(60)
    assert heard.wait(10)
    assert candidate in digits_study.candidates


def test_speedup_is_against_the_reference_in_the_same_run(digits, monkeypatch):
    def fixed(calls, **_):
        blocks = [tuple(ms * drift for drift in (1, 2, 1, 3, 1)) for ms in (0.5, 2.0)[: len(calls)]]
        return [measure.Latency(min(b), max(b), (min(b), max(b)), b, False) for b in blocks]

    monkeypatch.setattr(measure, "latency", fixed)
    with wb.Study(wb.load("lenet5"), digits) as study:
        m = study.run([], on=wb.OnnxRuntime()).measurement
    assert m.speedup == 4.0  # however the machine drifted, both sides drifted together
    assert (m.latency_ms, m.reference_ms) == (0.5, 2.0)


def test_recipe_survives_json_yaml_and_python(digits_candidate):
    recipe = wb.Recipe((wb.Prune(0.5), wb.Quantize("int8")), wb.OnnxRuntime(threads=2), batch=4, seed=7)
    assert wb.Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert wb.Recipe.from_yaml(recipe.to_yaml()) == recipe
    called = {}

    class study:
        @staticmethod
        def run(steps, on, batch, seed):
            called["recipe"] = wb.Recipe(tuple(steps), on, batch, seed)

    eval(recipe.to_python(), {"wb": wb, "study": study})
    assert called["recipe"] == recipe


@pytest.mark.parametrize(
    ("steps", "family"),
    [
        ([], "dense"),
        ([wb.Finetune()], "dense"),
        ([wb.Prune(0.5), wb.Finetune(), wb.Prune(0.2)], "pruned"),
        ([wb.Quantize("int8")], "quantised"),
        ([wb.Prune(0.5), wb.Finetune(), wb.Quantize("int8")], "pruned+quantised"),
        ([wb.Cluster(4)], "clustered"),
        ([wb.LowRank()], "factorised"),
        ([wb.Distill()], "distilled"),
        ([wb.Clip()], "clipped"),
        ([wb.Prune(0.5), wb.Cluster(4)], "mixed"),
        ([wb.Prune(0.5), wb.Cluster(4), wb.Quantize("int8")], "mixed"),
    ],
)
def test_a_recipe_belongs_to_the_family_of_its_techniques(steps, family):
    assert wb.Recipe(tuple(steps), wb.OnnxRuntime()).family == family


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("steps: [{step: Prun, ratio: 0.5}]\nbackend: Eager", "Prune"),
        ("steps: [{step: Prune, ration: 0.5}]\nbackend: Eager", "ratio"),
        ("steps: []\nbackend: OnnxRuntim", "OnnxRuntime"),
        ("steps: []", "names no backend"),
        ("steps: 3\nbackend: Eager", "list of mappings"),
        ("[1, 2]", "mapping"),
        ("steps: [", "not YAML"),
        ("steps: []\nbackend: Eager\nbatch: 0", "batch is 0"),
    ],
)
def test_a_broken_recipe_says_what_is_wrong(text, words):
    with pytest.raises((RecipeError, StepError), match=words):
        wb.Recipe.from_yaml(text)


def test_what_was_noted_stands_in_the_log_of_the_next_process(tmp_path, digits):
    folder = tmp_path / "study"
    with wb.Study(wb.load("lenet5"), digits, store=folder) as study:
        study.note("wb.profile(study.model).frame()")
    with wb.Study(wb.load("lenet5"), digits, store=folder) as study:
        assert study.log == ["wb.profile(study.model).frame()"]

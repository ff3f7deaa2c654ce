"""Every command says what it did, or what was wrong, in words and by its status."""

from __future__ import annotations

from pathlib import Path

import pytest

from workbench import cli


def test_profile_prints_a_row_per_layer_and_writes_csv(tmp_path, capsys):
    assert cli.main(["profile", "lenet5", "--csv", str(tmp_path / "p.csv")]) == 0
    out = capsys.readouterr().out
    assert "conv1" in out and "(unattributed)" in out
    assert (tmp_path / "p.csv").read_text().startswith("name,layer,type")


def test_run_reads_recipes_and_writes_the_report(tmp_path, capsys):
    file = tmp_path / "recipes.yaml"
    file.write_text(
        "model: lenet5\ntask: digits\nrecipes:\n"
        "  - backend: Eager\n"
        "  - steps: [{step: Quantize, precision: int8}]\n    backend: {backend: OnnxRuntime, threads: 1}\n"
    )
    assert cli.main(["run", str(file), "--report", str(tmp_path / "r.html"), "--store", str(tmp_path / "s")]) == 0
    out = capsys.readouterr().out
    assert "as is" in out and "int8" in out
    assert "lenet5" in (tmp_path / "r.html").read_text()


def test_run_takes_a_single_recipe_as_the_library_writes_it(tmp_path, capsys):
    import workbench as wb

    file = tmp_path / "one.yaml"
    file.write_text(wb.Recipe((), wb.Eager()).to_yaml())
    assert cli.main(["run", str(file), "--model", "lenet5"]) == 0
    assert "as is" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot be read"),
        ("recipes: [", "not YAML"),
        ("just words", "no mapping"),
        ("model: lenet5\nrecipes: []", "at least one recipe"),
        ("model: lenet5\nrecipes: [{backend: Eager}]\nstroe: x", "store"),
        ("recipes: [{backend: Eager}]", "names no model"),
        ("model: lenet6\nrecipes: [{backend: Eager}]", "lenet5"),
        ("model: lenet5\nweights: imagenet\nrecipes: [{backend: Eager}]", "digits, random"),
        ("model: lenet5\ntask: digit\nrecipes: [{backend: Eager}]", "digits"),
    ],
)
def test_a_broken_file_ends_with_one_clear_line(tmp_path, capsys, text, words):
    file = tmp_path / "x.yaml"
    if text is not None:
        file.write_text(text)
    assert cli.main(["run", str(file)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error
    assert "Traceback" not in error


def test_doctor_lists_every_backend(capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    for name in ("Eager", "Compiled", "OnnxRuntime", "OpenVINO"):
        assert name in out


def test_an_unknown_model_is_an_error_with_the_nearest_name(capsys):
    assert cli.main(["profile", "lenet6"]) == 1
    assert "lenet5" in capsys.readouterr().err


def test_lab_opens_the_first_notebook_and_passes_its_options_on(monkeypatch):
    from jupyterlab import labapp

    given = []
    monkeypatch.setattr(labapp, "main", given.extend)
    assert cli.main(["lab", "--no-browser", "--port=9999"]) == 0
    notebook, *options = given
    assert Path(notebook).is_file() and Path(notebook).name == "00_start.ipynb"
    assert options == ["--no-browser", "--port=9999"]


def test_options_nobody_takes_are_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor", "--no-browser"])
    assert ended.value.code == 2
    assert "--no-browser" in capsys.readouterr().err

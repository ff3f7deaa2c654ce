"""A study loses at most the epoch under way: trainings go on after a cancel, an error or the end of the process."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from _tiny import blobs, fails, heard, mlp, stop_at

import workbench as wb
from workbench import jobs
from workbench.errors import Cancelled, TrainingDiverged
from workbench.jobs import on_progress
from workbench.study.store import Store

STEPS = [wb.Prune(0.5, granularity="weight"), wb.Finetune(epochs=4, batch_size=16)]
ON = wb.Eager()


@pytest.fixture(params=["in memory", "in a folder"])
def study(request, tmp_path) -> Iterator[wb.Study]:
    folder = None if request.param == "in memory" else tmp_path / "study"
    with wb.Study(mlp(), blobs(), store=folder) as study:
        yield study


@pytest.fixture(scope="module")
def uninterrupted() -> wb.Model:
    """What the recipe gives in one go."""
    with wb.Study(mlp(), blobs()) as study:
        return study.run(STEPS, on=ON).model()


def saved(folder: Path) -> list[Path]:
    return [path for path in (folder / "checkpoints").rglob("*") if path.is_file()]


def test_a_training_cancelled_goes_on_where_it_was(study, uninterrupted):
    stop = fails(lambda: study.run(STEPS, on=ON, progress=stop_at("epoch 3 of 4")), Cancelled)
    assert "the best epoch of finetune 4 epochs so far, " in str(stop).lower()
    assert str(stop).endswith("The same recipe goes on from epoch 3.")
    assert stop.best.changes == ("pruned",)
    progress, words = heard()
    model = study.run(STEPS, on=ON, progress=progress).model()
    assert "Finetune 4 epochs · goes on after epoch 2 of 4" in words
    assert not any("epoch 2 of 4, " in word for word in words)
    assert (model.fingerprint, model.records) == (uninterrupted.fingerprint, uninterrupted.records)
    if study.folder is not None:
        assert saved(study.folder) == [], "what was saved of a step is forgotten once its result is kept"


def test_a_job_cancelled_says_from_which_epoch_it_goes_on(study):
    job = None

    def cancel(job_now: jobs.Job) -> None:
        if "epoch 2 of 4" in job_now.message:
            job_now.cancel()

    def run(progress):
        return study.run(STEPS, on=ON, progress=on_progress(lambda share, words: (progress(share, words), cancel(job))))

    job = jobs.Job("Finetune", run, (), {})
    job._run()
    assert job.state == "cancelled"
    assert str(job.error).endswith("The same recipe goes on from epoch 2.")


def test_a_training_goes_on_in_the_next_process_after_a_kill(tmp_path, uninterrupted):
    folder = tmp_path / "study"
    code = f"""
        import os, signal, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import workbench as wb
        from _tiny import blobs, mlp
        from workbench.jobs import on_progress
        def die(fraction, message):
            if "epoch 3 of 4, " in message:
                os.kill(os.getpid(), signal.SIGKILL)
        study = wb.Study(mlp(), blobs(), store={str(folder)!r})
        steps = [wb.Prune(0.5, granularity="weight"), wb.Finetune(epochs=4, batch_size=16)]
        study.run(steps, on=wb.Eager(), progress=on_progress(die))
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False)
    assert ended.returncode == -9
    assert len(saved(folder)) == 1
    progress, words = heard()
    with wb.Study(mlp(), blobs(), store=folder) as study:
        model = study.run(STEPS, on=ON, progress=progress).model()
        assert "Finetune 4 epochs · goes on after epoch 2 of 4" in words
        assert model.fingerprint == uninterrupted.fingerprint
        assert saved(folder) == []
    with wb.Study(mlp(), blobs(), store=folder) as study:
        assert study.candidates[0].model().fingerprint == model.fingerprint
        assert study.candidates[0].model().records == model.records


def test_a_damaged_checkpoint_in_the_store_is_said_and_done_again(tmp_path, uninterrupted):
    with wb.Study(mlp(), blobs(), store=tmp_path / "study") as study:
        fails(lambda: study.run(STEPS, on=ON, progress=stop_at("epoch 3 of 4")), Cancelled)
        (file,) = saved(study.folder)
        file.write_bytes(file.read_bytes()[:-100])
        progress, words = heard()
        model = study.run(STEPS, on=ON, progress=progress).model()
    assert "Finetune 4 epochs · what was saved of this training is damaged: it starts over" in words
    assert model.fingerprint == uninterrupted.fingerprint


def test_another_seed_or_setting_starts_from_the_beginning(study):
    fails(lambda: study.run(STEPS, on=ON, progress=stop_at("epoch 3 of 4")), Cancelled)
    for steps, seed in ((STEPS, 1), ([STEPS[0], wb.Finetune(epochs=4, batch_size=32)], 0)):
        with pytest.raises(Cancelled):  # it comes to the first epoch again
            study.run(steps, on=ON, seed=seed, progress=stop_at("epoch 1 of 4"))


def test_a_training_that_diverges_in_a_study_says_what_is_kept(study):
    steps = [wb.Finetune(epochs=2, learning_rate=1e30, optimizer="sgd")]
    error = fails(lambda: study.run(steps, on=ON), TrainingDiverged)
    assert "No epoch of Finetune 2 epochs was finished" in str(error) and "learning_rate below 1e+30" in str(error)
    assert study.candidates == []


def test_what_one_training_of_a_step_saved_is_not_another_ones(tmp_path):
    for store in (Store(None), Store(tmp_path / "study")):
        checkpoint = store.checkpoint("key")
        first, second = checkpoint.part("first"), checkpoint.part("second")
        first.save(b"1")
        second.save(b"2")
        assert (first.load(), second.load(), checkpoint.load()) == (b"1", b"2", None)
        assert store.checkpoint("key").part("first").load() == b"1"
        assert store.checkpoint("other").part("first").load() is None
        checkpoint.clear()
        assert (first.load(), second.load()) == (None, None)
        checkpoint.clear()
        store.close()

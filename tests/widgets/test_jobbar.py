"""The one place where things that take time are seen."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from widgets import _bind
from widgets._errors import Notices
from widgets._jobbar import JobBar
from workbench.errors import Cancelled, StepError, TrainingDiverged
from workbench.jobs import JobQueue, Progress


class Work:
    """Work that goes on when it is told to, and reports half of it done before."""

    def __init__(self) -> None:
        self.started, self.go_on = threading.Event(), threading.Event()

    def __call__(self, progress: Progress) -> str:
        progress(0.5, "epoch <1> of 2")
        self.started.set()
        self.go_on.wait(60)
        progress(0.9, "epoch 2 of 2")
        return "result"


@pytest.fixture
def queue() -> JobQueue:
    return JobQueue()


@pytest.fixture
def notices() -> Notices:
    return Notices()


@pytest.fixture
def bar(queue: JobQueue, notices: Notices) -> Iterator[JobBar]:
    made = JobBar(notices, queue)
    yield made
    made.close()


@pytest.fixture
def settle(queue: JobQueue) -> Callable[[], None]:
    def wait() -> None:
        queue.submit("settling", lambda progress: None).wait(60)
        _bind.flush()

    return wait


def test_an_idle_bar_has_nothing_to_cancel(bar: JobBar):
    assert "No job is running" in bar.words.value
    assert bar.cancel.disabled


def test_a_running_job_shows_its_step_its_share_and_can_be_cancelled(bar: JobBar, queue: JobQueue):
    work = Work()
    job = queue.submit("Prune <50> %", work)
    work.started.wait(60)
    job._emit()  # reports are throttled to ten a second; this one stands for the next
    _bind.flush()
    assert "epoch &lt;1&gt; of 2 · Prune &lt;50&gt; %" in bar.words.value
    assert 'aria-valuenow="50"' in bar.share.value
    assert "50 %" in bar.share.value
    assert not bar.cancel.disabled
    work.go_on.set()
    job.wait(60)


def test_cancel_stops_the_job_and_says_what_was_kept(bar: JobBar, queue: JobQueue, notices: Notices, settle):
    work = Work()
    job = queue.submit("Quantise", work)
    work.started.wait(60)
    _bind.flush()
    bar.cancel.click()
    _bind.flush()
    assert bar.cancel.disabled
    work.go_on.set()
    settle()
    assert job.state == "cancelled"
    assert "Quantise was cancelled at 50%; what was finished is kept." in notices.text
    assert bar.cancel.disabled


def test_a_failed_job_is_told_once_in_words(bar: JobBar, queue: JobQueue, notices: Notices, settle):
    def fail(progress: Progress) -> None:
        raise StepError("The loss is nan.")

    queue.submit("Finetune", fail)
    settle()
    settle()
    assert notices.text == '<div role="alert"><b>Finetune failed.</b> The loss is nan.</div>'


@pytest.mark.parametrize("kind", [TrainingDiverged, Cancelled])
def test_a_training_that_was_broken_off_says_what_is_kept_and_how_to_go_on(kind, bar, queue, notices):
    told = "Finetune stopped. The best epoch, 2, is kept in the error's `best`. The same recipe goes on from epoch 4."

    def stop(progress: Progress) -> None:
        error = kind(told)
        error.best = object()
        raise error

    job = queue.submit("Prune 50 % → Finetune 9 epochs on OpenVINO", stop)
    with pytest.raises(kind):
        job.wait(60)
    _bind.flush()
    assert "kept in the error&#x27;s <code>best</code>. The same recipe goes on from epoch 4." in notices.text
    assert "Details for a report" not in notices.text
    state = "cancelled" if kind is Cancelled else "failed"
    assert f"Prune 50 % → Finetune 9 epochs on OpenVINO: {state}" in bar.words.value


def test_jobs_that_wait_are_counted(bar: JobBar, queue: JobQueue):
    work = Work()
    queue.submit("first", work)
    work.started.wait(60)
    second = queue.submit("second", lambda progress: None)
    _bind.flush()
    assert "1 waiting" in bar.words.value
    work.go_on.set()
    second.wait(60)


def test_a_closed_bar_leaves_the_job_alone(bar: JobBar, queue: JobQueue, settle):
    work = Work()
    job = queue.submit("going on", work)
    work.started.wait(60)
    bar.close()
    work.go_on.set()
    settle()
    assert (job.state, job.result) == ("done", "result")

"""Jobs run one at a time, can be cancelled, and keep their error."""

from __future__ import annotations

import threading

import pytest

from workbench import jobs
from workbench.errors import Cancelled


def steps(progress, entered=None, leave=None):
    for i in range(1000):
        progress(i / 1000, f"step {i}")
        if entered:
            entered.set()
            leave.wait(5)
    return "finished"


def test_a_job_returns_its_result_and_ends_done():
    job = jobs.JobQueue().submit("count", steps)
    assert job.wait(10) == "finished"
    assert (job.state, job.fraction, job.ended) == ("done", 1.0, True)


def test_a_failing_job_raises_its_own_error_to_whoever_waits():
    def fail(progress):
        raise ValueError("broken")

    job = jobs.JobQueue().submit("fail", fail)
    with pytest.raises(ValueError, match="broken"):
        job.wait(10)
    assert job.state == "failed"


def test_a_running_job_stops_at_its_next_report_and_the_queue_goes_on():
    entered, leave = threading.Event(), threading.Event()
    queue = jobs.JobQueue()
    job = queue.submit("long", steps, entered=entered, leave=leave)
    after = queue.submit("after", steps)
    assert entered.wait(10)
    job.cancel()
    leave.set()
    with pytest.raises(Cancelled, match="long was cancelled"):
        job.wait(10)
    assert job.state == "cancelled"
    assert after.wait(10) == "finished"


def test_a_job_cancelled_while_waiting_never_starts():
    entered, leave = threading.Event(), threading.Event()
    queue = jobs.JobQueue()
    first = queue.submit("first", steps, entered=entered, leave=leave)
    ran = []
    second = queue.submit("second", lambda progress: ran.append(1))
    assert entered.wait(10)
    second.cancel()
    leave.set()
    first.wait(10)
    with pytest.raises(Cancelled):
        second.wait(10)
    assert queue.submit("third", steps).wait(10) == "finished"
    assert ran == []


def test_jobs_never_overlap():
    running, most = [], []

    def work(progress):
        running.append(1)
        most.append(len(running))
        progress(0.5)
        running.pop()

    queue = jobs.JobQueue()
    for job in [queue.submit(f"job {i}", work) for i in range(20)]:
        job.wait(10)
    assert max(most) == 1


def test_states_are_announced_in_order_and_a_raising_listener_does_not_end_the_work():
    seen = []
    entered, leave = threading.Event(), threading.Event()
    queue = jobs.JobQueue()
    job = queue.submit("watched", steps, entered=entered, leave=leave)

    def listener(j):
        seen.append(j.state)
        raise RuntimeError("a panel's fault")

    assert entered.wait(10)
    job.changed.connect(listener)
    leave.set()
    assert job.wait(10) == "finished"
    queue.submit("fence", steps).wait(10)
    assert seen[-1] == "done"


def test_wait_times_out_without_ending_the_job():
    entered, leave = threading.Event(), threading.Event()
    job = jobs.JobQueue().submit("slow", steps, entered=entered, leave=leave)
    assert entered.wait(10)
    with pytest.raises(TimeoutError):
        job.wait(0.01)
    leave.set()
    assert job.wait(10) == "finished"


def test_interrupting_wait_cancels_the_job(monkeypatch):
    entered, leave = threading.Event(), threading.Event()
    job = jobs.JobQueue().submit("interrupted", steps, entered=entered, leave=leave)
    assert entered.wait(10)
    real_wait = job._finished.wait
    calls = []

    def interrupt_once(timeout=None):
        if not calls:
            calls.append(1)
            leave.set()
            raise KeyboardInterrupt
        return real_wait(timeout)

    monkeypatch.setattr(job._finished, "wait", interrupt_once)
    with pytest.raises(KeyboardInterrupt):
        job.wait()
    assert job.state == "cancelled"


def test_parts_of_a_progress_map_onto_the_whole_and_join_their_words():
    seen = []
    whole = jobs.on_progress(lambda fraction, message: seen.append((fraction, message)))
    whole.part(0.5, 1.0, "outer").part(0.0, 0.5, "inner")(0.5, "now")
    assert seen == [(0.625, "outer · inner · now")]

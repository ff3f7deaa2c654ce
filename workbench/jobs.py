"""Long work on one worker thread: progress, cancel, error.

A long function takes ``progress: Progress = SILENT`` and calls it at every point where it may stop. It knows nothing
of threads. A `JobQueue` runs such functions one at a time on a worker, so that a notebook stays responsive and two
measurements never disturb each other.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from psygnal import Signal

from workbench.errors import Cancelled

_EMIT_EVERY_S = 0.1
_LOG = logging.getLogger(__name__)


class Progress:
    """Where a long function reports how far it is, and learns that it was cancelled.

    Calling it with a share of the work done (0 to 1) and a message raises `Cancelled` when a cancel was asked for.
    """

    def __call__(self, fraction: float, message: str = "") -> None:
        """Report; the base class listens to nobody and is never cancelled."""

    def part(self, start: float, stop: float, label: str = "") -> Progress:
        """A progress for one part of the work, whose 0 to 1 lies at `start` to `stop` of this one."""
        return _Part(self, start, stop, label)


class _Part(Progress):
    def __init__(self, whole: Progress, start: float, stop: float, label: str):
        self._whole, self._start, self._stop, self._label = whole, start, stop, label

    def __call__(self, fraction: float, message: str = "") -> None:
        words = " · ".join(w for w in (self._label, message) if w)
        self._whole(self._start + (self._stop - self._start) * min(max(fraction, 0.0), 1.0), words)


class _Callback(Progress):
    def __init__(self, function: Callable[[float, str], None]):
        self._function = function

    def __call__(self, fraction: float, message: str = "") -> None:
        self._function(fraction, message)


SILENT = Progress()


def on_progress(function: Callable[[float, str], None]) -> Progress:
    """A `Progress` that hands every report to `function(fraction, message)`; it may raise `Cancelled`."""
    return _Callback(function)


class Job:
    """One piece of work: what it is doing, how far it is, and how it ended.

    `state` is one of ``waiting``, ``running``, ``done``, ``failed``, ``cancelled``. `changed` is emitted with the job
    itself on every change of state and, at most ten times a second, of progress; it is emitted on the worker thread.
    """

    changed = Signal(object)

    def __init__(self, name: str, function: Callable[..., Any], args: tuple, kwargs: dict):
        self.name = name
        self.state = "waiting"
        self.fraction = 0.0
        self.message = ""
        self.result: Any = None
        self.error: BaseException | None = None
        self._work = (function, args, kwargs)
        self._stop = threading.Event()
        self._finished = threading.Event()
        self._started_s = 0.0
        self._emitted_s = 0.0
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        share = f" {self.fraction:.0%}" if self.state == "running" else ""
        return f"<Job {self.name!r} {self.state}{share}>"

    @property
    def ended(self) -> bool:
        """Whether the job is done, failed or cancelled."""
        return self._finished.is_set()

    @property
    def remaining_s(self) -> float | None:
        """Seconds left if the rest goes as the work so far; None before there is anything to go by."""
        if self.state != "running" or self.fraction <= 0.02:
            return None
        return (time.monotonic() - self._started_s) * (1 - self.fraction) / self.fraction

    def cancel(self) -> None:
        """Ask the work to stop at its next report; a job that has not started never does."""
        with self._lock:
            self._stop.set()
            waiting = self.state == "waiting"
            if waiting:
                self.state, self.error = "cancelled", Cancelled(f"{self.name} was cancelled before it started.")
        if waiting:
            self._end()

    def wait(self, timeout_s: float | None = None) -> Any:
        """Block until the job ends and return its result.

        A KeyboardInterrupt cancels the job, waits for it to stop, and is raised again.

        Raises
        ------
        TimeoutError
            If `timeout_s` seconds pass first; the job goes on.
        Exception
            Whatever the work raised, `Cancelled` included.
        """
        try:
            if not self._finished.wait(timeout_s):
                raise TimeoutError(f"{self.name} has not ended after {timeout_s} s; it goes on.")
        except KeyboardInterrupt:
            self.cancel()
            self._finished.wait()
            raise
        if self.error is not None:
            raise self.error
        return self.result

    def _report(self, fraction: float, message: str) -> None:
        if self._stop.is_set():
            raise Cancelled(f"{self.name} was cancelled at {self.fraction:.0%}; what was finished is kept.")
        self.fraction, self.message = float(fraction), message
        now = time.monotonic()
        if now - self._emitted_s >= _EMIT_EVERY_S:
            self._emitted_s = now
            self._emit()

    def _run(self) -> None:
        with self._lock:
            if self.state != "waiting":
                return
            self.state = "running"
        self._started_s = time.monotonic()
        self._emit()
        function, args, kwargs = self._work
        try:
            self.result = function(*args, progress=on_progress(self._report), **kwargs)
            self.state, self.fraction = "done", 1.0
        except Cancelled as stop:
            self.state, self.error = "cancelled", stop
        except BaseException as error:  # the worker must outlive any work, and the error is kept for whoever asks
            self.state, self.error = "failed", error
        self._end()

    def _end(self) -> None:
        self._work = (lambda **_: None, (), {})  # release what the work held on to
        self._finished.set()
        self._emit()

    def _emit(self) -> None:
        try:
            self.changed.emit(self)
        except Exception:  # a listener's fault must not end the work; a panel's own slots catch and show theirs
            _LOG.exception("a listener of %r failed", self)


class JobQueue:
    """Jobs one after another on one worker thread; `changed` is emitted with the job that changed."""

    changed = Signal(object)

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self._waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._worker: threading.Thread | None = None
        self._lock = threading.Lock()

    def submit(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Job:
        """Put ``function(*args, progress=…, **kwargs)`` in the queue under a name a person reads."""
        job = Job(name, function, args, kwargs)
        job.changed.connect(self._relay)
        with self._lock:
            self.jobs = [j for j in self.jobs if not j.ended][-99:] + [job]
            self._waiting.put(job)
            if self._worker is None:
                self._worker = threading.Thread(target=self._loop, name="workbench-jobs", daemon=True)
                self._worker.start()
        job._emit()
        return job

    def _relay(self, job: Job) -> None:
        # not `emit` itself: psygnal takes a compiled `emit` for Qt's, and tries it out with 255 arguments
        self.changed.emit(job)

    @property
    def current(self) -> Job | None:
        """The job that runs now, or else the next one waiting."""
        open_jobs = [j for j in self.jobs if not j.ended]
        return next((j for j in open_jobs if j.state == "running"), open_jobs[0] if open_jobs else None)

    def _loop(self) -> None:
        while True:
            self._waiting.get()._run()


QUEUE = JobQueue()


def submit(name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Job:
    """Run ``function(*args, progress=…, **kwargs)`` on the process's one worker; see `JobQueue.submit`."""
    return QUEUE.submit(name, function, *args, **kwargs)

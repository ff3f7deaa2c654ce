"""The one place where things that take time are seen: the step, the share, the time left, Cancel."""

from __future__ import annotations

from html import escape
from weakref import WeakSet

import ipywidgets as W

from widgets._bind import Bindings, heard_while_busy
from widgets._errors import Notices
from workbench import formatting as fmt
from workbench import jobs
from workbench.errors import Cancelled


class JobBar(W.HBox):
    """The job that runs, or the last one that ended; failures and cancels go to `notices`, once each."""

    def __init__(self, notices: Notices, queue: jobs.JobQueue = jobs.QUEUE):
        self._notices, self._queue = notices, queue
        self._drawn: jobs.Job | None = None
        self._told: WeakSet[jobs.Job] = WeakSet(j for j in queue.jobs if j.ended)
        self.words = W.HTML()
        self.share = W.HTML()
        self.cancel = W.Button(
            description="Cancel", tooltip="Stop the running job; what is done is kept", disabled=True
        )
        heard_while_busy(self.cancel)
        super().__init__([self.words, self.share, self.cancel])
        self.add_class("wb-jobs")
        self.words.add_class("wb-jobs-words")
        self.share.add_class("wb-jobs-share")
        self._bindings = Bindings(notices)
        self.cancel.on_click(self._bindings.handler(self._cancel, "Cancelling"))
        self._bindings.connect(queue.changed, self._changed, "Showing progress")
        self._draw(queue.current)

    def _cancel(self, _button: W.Button) -> None:
        job = self._queue.current
        if job is not None:
            job.cancel()
            self.cancel.disabled = True  # answers at once; the work stops at its next report

    def _changed(self, job: jobs.Job) -> None:
        if job.ended and job not in self._told:
            self._told.add(job)
            if job.state == "cancelled":
                self._notices.tell(str(job.error))
            elif job.error is not None and not isinstance(job.error, Cancelled):
                self._notices.error(job.name, job.error)
        current = self._queue.current
        self._draw(current if current is not None else job)

    def _draw(self, job: jobs.Job | None) -> None:
        if job is None:
            self._say("No job is running", None)
        elif job.ended:
            self._say(f"{job.name}: {job.state}", None)
        elif job.state == "waiting":
            self._say(f"{job.name}: waiting", None)
        else:
            waiting = sum(j.state == "waiting" for j in self._queue.jobs)
            more = f" · {waiting} waiting" if waiting else ""
            # the step first, since what does not fit is cut at the end
            doing = " · ".join(words for words in (job.message, job.name) if words)
            self._say(f"{doing}{more}", job.fraction, fmt.duration(job.remaining_s))
        running = job is not None and not job.ended
        if not running or job.state == "waiting" or job is not self._drawn:
            self.cancel.disabled = not running
        self._drawn = job

    def _say(self, words: str, share: float | None, left: str = "") -> None:
        self.words.value = f'<div title="{escape(words)}">{escape(words)}</div>'
        percent = 0 if share is None else round(100 * share)
        text = "" if share is None else f"{percent} %" + (f" · {left} left" if left else "")
        self.share.value = (
            f'<div class="wb-bar" role="progressbar" aria-label="Progress of the job" aria-valuemin="0" '
            f'aria-valuemax="100" aria-valuenow="{percent}"><div style="width:{percent}%"></div></div>'
            f'<span class="wb-left">{text}</span>'
        )

    def close(self) -> None:
        """Stop listening; the jobs go on."""
        self._bindings.close()
        super().close()

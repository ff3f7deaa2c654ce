"""Signals and clicks run one after another on one drawing thread, and their errors are shown.

A click arrives on the kernel's main thread or, since JupyterLab sends widget messages to a subshell, on another; a
signal arrives on the worker of a job. One thread of our own takes them all in order: no two handlers meet, one that
waits for the kernel's lock holds up neither cell nor worker, and Cancel answers while a cell is busy.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any, Protocol

from ipywidgets import Widget
from psygnal import SignalInstance


class ShowsErrors(Protocol):
    """Where a handler's error goes."""

    def error(self, doing: str, error: BaseException) -> None:
        """Show `error`, which happened while `doing` what the words say."""


class _Drawer:
    """The drawing thread; it starts with the first thing to do and ends with the process."""

    def __init__(self) -> None:
        self._todo: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def post(self, function: Callable[[], None]) -> None:
        """Run `function` on the drawing thread: now if this is it, otherwise after what is already waiting."""
        if threading.current_thread() is self._thread:
            function()
            return
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._loop, name="workbench-drawing", daemon=True)
                self._thread.start()
        self._todo.put(function)

    def _loop(self) -> None:
        while True:
            self._todo.get()()


_DRAWER = _Drawer()


def flush(timeout_s: float = 60.0) -> None:
    """Wait until everything posted so far has run.

    Raises
    ------
    TimeoutError
        If that takes longer than `timeout_s` seconds.
    """
    done = threading.Event()
    _DRAWER.post(done.set)
    if not done.wait(timeout_s):
        raise TimeoutError(f"the panels have not finished drawing after {timeout_s} s.")


def heard_while_busy(widget: Widget) -> None:
    """Let what the page says of `widget` be heard while a cell runs, where JupyterLab sends it to a subshell.

    ipykernel 7.4 sends it back to the thread that created the widget instead, which is the one that is busy. That
    serves handlers that are not safe on another thread; ours all run on the drawing thread.
    """
    widget.comm._reply_subshell_for = lambda data, asked_for: asked_for


class Bindings:
    """Everything one panel listens to: made here, its errors shown in one place, all ended by `close`."""

    def __init__(self, errors: ShowsErrors):
        self._errors = errors
        self._connected: list[tuple[SignalInstance, Callable[..., None]]] = []
        self._waiting: set[tuple[int, ...]] = set()
        self._lock = threading.Lock()
        self.closed = False

    def connect(self, signal: SignalInstance, slot: Callable[..., None], doing: str = "Redrawing") -> None:
        """Call `slot` with what `signal` emits; an emission equal to one still waiting is dropped, being one redraw."""

        def received(*args: Any) -> None:
            key = (id(slot), *map(id, args))
            with self._lock:
                if key in self._waiting:
                    return
                self._waiting.add(key)

            def run() -> None:
                with self._lock:
                    self._waiting.discard(key)
                self.call(slot, *args, doing=doing)

            _DRAWER.post(run)

        signal.connect(received)
        self._connected.append((signal, received))

    def handler(self, function: Callable[..., None], doing: str) -> Callable[..., None]:
        """`function` as a widget's callback: runs on the drawing thread, with an error shown as one of `doing`."""

        def received(*args: Any) -> None:
            _DRAWER.post(lambda: self.call(function, *args, doing=doing))

        return received

    def call(self, function: Callable[..., None], *args: Any, doing: str) -> None:
        """Run `function` here and now and show its error, if any; nothing once closed."""
        if self.closed:
            return
        try:
            function(*args)
        except Exception as error:  # nothing may fail in silence, and a raising slot would end the emitting thread
            self._errors.error(doing, error)

    def disconnect(self, signal: SignalInstance) -> None:
        """Stop listening to one signal."""
        for known, slot in [c for c in self._connected if c[0] is signal]:
            known.disconnect(slot, missing_ok=True)
            self._connected.remove((known, slot))

    def close(self) -> None:
        """Stop listening to everything."""
        self.closed = True
        for signal, slot in self._connected:
            signal.disconnect(slot, missing_ok=True)
        self._connected.clear()

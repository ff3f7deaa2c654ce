"""Signals and clicks: one after another on one thread, with their errors shown."""

from __future__ import annotations

import threading

from psygnal import Signal

from widgets._bind import _DRAWER, Bindings, flush
from widgets._errors import Notices


class Thing:
    changed = Signal(object)


def test_a_raising_slot_is_shown_and_later_slots_still_run():
    notices, thing, got = Notices(), Thing(), []
    bindings = Bindings(notices)
    bindings.connect(thing.changed, lambda _: 1 / 0, "Dividing")
    bindings.connect(thing.changed, got.append)
    thing.changed.emit("a")
    flush()
    assert got == ["a"]
    assert "<b>Dividing failed.</b> ZeroDivisionError: division by zero" in notices.text


def test_handlers_run_one_after_another_whatever_thread_they_come_from():
    at_once, most, ran = 0, 0, 0

    def handle(_: object) -> None:
        nonlocal at_once, most, ran
        at_once += 1
        most = max(most, at_once)
        ran += 1
        at_once -= 1

    bindings = Bindings(Notices())
    handler = bindings.handler(handle, "Counting")
    threads = [threading.Thread(target=lambda: [handler(i) for i in range(100)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    flush()
    assert (most, ran) == (1, 400)


def test_an_emission_equal_to_one_that_waits_is_one_redraw():
    thing, got, hold = Thing(), [], threading.Event()
    bindings = Bindings(Notices())
    bindings.connect(thing.changed, got.append)
    _DRAWER.post(lambda: hold.wait(60))
    for item in ("a", "a", "b", "a"):
        thing.changed.emit(item)
    hold.set()
    flush()
    assert got == ["a", "b"]


def test_a_signal_emitted_by_a_handler_is_handled_at_once():
    thing, order = Thing(), []
    bindings = Bindings(Notices())
    bindings.connect(thing.changed, lambda item: order.append(item))

    def first(_: object) -> None:
        thing.changed.emit("inner")
        order.append("outer")

    bindings.handler(first, "Nesting")("click")
    flush()
    assert order == ["inner", "outer"]


def test_the_emitting_thread_never_waits_for_a_handler():
    thing, hold = Thing(), threading.Event()
    bindings = Bindings(Notices())
    bindings.connect(thing.changed, lambda _: hold.wait(60))
    thing.changed.emit("a")  # would hang here
    assert not hold.is_set()
    hold.set()
    flush()


def test_closed_bindings_listen_to_nothing_not_even_to_what_was_waiting():
    thing, got, hold = Thing(), [], threading.Event()
    bindings = Bindings(Notices())
    bindings.connect(thing.changed, got.append)
    _DRAWER.post(lambda: hold.wait(60))
    thing.changed.emit("waiting")
    bindings.close()
    thing.changed.emit("later")
    hold.set()
    flush()
    assert got == []
    assert len(thing.changed) == 0


def test_one_signal_can_be_let_go_of_alone():
    one, two, got = Thing(), Thing(), []
    bindings = Bindings(Notices())
    bindings.connect(one.changed, got.append)
    bindings.connect(two.changed, got.append)
    bindings.disconnect(one.changed)
    one.changed.emit(1)
    two.changed.emit(2)
    flush()
    assert got == [2]

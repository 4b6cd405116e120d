"""Threads that do what they are given."""

from __future__ import annotations

import threading

from service.workers import Workers

TIMEOUT_S = 120


def test_work_is_done_in_order():
    done: list[int] = []
    workers = Workers(1, name="some")
    for number in range(100):
        workers.put(lambda number=number: done.append(number), lambda: done.append(-1))
    last = threading.Event()
    workers.put(last.set, last.set)
    assert last.wait(TIMEOUT_S)
    assert done == list(range(100))
    workers.close()


def test_every_thread_takes_a_share():
    together = threading.Barrier(3)
    workers = Workers(2, name="some")
    for _ in range(2):
        workers.put(lambda: together.wait(TIMEOUT_S), together.abort)
    together.wait(TIMEOUT_S)  # raises unless both are at it at the same time
    workers.close()


def test_an_exception_is_logged_and_the_thread_goes_on(caplog):
    workers = Workers(1, name="some")
    workers.put(lambda: 1 / 0, lambda: None)
    next_one = threading.Event()
    workers.put(next_one.set, lambda: None)
    assert next_one.wait(TIMEOUT_S)
    assert "ZeroDivisionError" in caplog.text
    workers.close()


def test_what_was_not_begun_is_dropped_and_what_was_is_finished():
    begun, gate, done, dropped = threading.Event(), threading.Event(), [], []
    workers = Workers(1, name="some")

    def first() -> None:
        begun.set()
        gate.wait(TIMEOUT_S)
        done.append("first")

    workers.put(first, lambda: dropped.append("first"))
    workers.put(lambda: done.append("second"), lambda: dropped.append("second"))
    assert begun.wait(TIMEOUT_S)
    closing = threading.Thread(target=workers.close)
    closing.start()
    gate.set()
    closing.join(TIMEOUT_S)
    assert not closing.is_alive()
    # The second may have had its turn before it was dropped, but never both or neither.
    assert done[0] == "first"
    assert done[1:] + dropped == ["second"]


def test_closed_workers_drop_at_once_and_may_be_closed_again():
    workers = Workers(2, name="some")
    workers.close()
    workers.close()
    dropped: list[int] = []
    workers.put(lambda: dropped.append(0), lambda: dropped.append(1))
    assert dropped == [1]

"""The engine thread: batching, isolation, dropping, draining, dying."""

from __future__ import annotations

import threading
import weakref
from concurrent.futures import CancelledError, wait
from functools import partial

import numpy as np
import pytest

from core.errors import TooManyRequests, Unavailable
from core.runtime import Pool
from index.store import Selection
from service.engine import Engine

TIMEOUT_S = 120  # generous: a busy machine is no failure


class GatedEncoder:
    """Embeds an image as its first pixel, records batches, and waits while its gate is closed."""

    device = "cpu"

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)
        self.batches: list[list[int]] = []

    def encode(self, pixels_BHW3):
        firsts = [int(pixels[0, 0, 0]) for pixels in pixels_BHW3]
        self.batches.append(firsts)
        self.entered.release()
        assert self.gate.wait(TIMEOUT_S)
        if 13 in firsts:
            raise ValueError("unlucky")
        if 66 in firsts:
            raise SystemExit
        return pixels_BHW3[:, 0, 0, :2].astype(np.float32)


class RangeIndex:
    """Finds rows 0, 1, 2 ... with the query's first number as score, and ends after `count` of them."""

    def __init__(self, count: int = 1000) -> None:
        self.count = count
        self.selections = []

    def search(self, query_embeddings_BD, top_k, *, selection):
        self.selections.append(selection)
        rows_K = np.where(np.arange(top_k) < self.count, np.arange(top_k), -1)
        return np.tile(rows_K, (len(query_embeddings_BD), 1)), np.tile(query_embeddings_BD[:, :1], (1, top_k))


def image(value: int):
    return np.full((2, 2, 3), value, np.uint8)


@pytest.fixture
def encoder():
    return GatedEncoder()


@pytest.fixture
def engine(encoder):
    engine = Engine(encoder, RangeIndex(), max_batch=4, queue_limit=8)
    yield engine
    encoder.gate.set()
    engine.close(TIMEOUT_S)


def occupy(engine, encoder):
    """Have the engine busy with one image until the gate opens."""
    encoder.gate.clear()
    future = engine.submit(image(1), 1)
    assert encoder.entered.acquire(timeout=TIMEOUT_S)
    return future


def test_queued_jobs_are_batched_up_to_the_limit(engine, encoder):
    first = occupy(engine, encoder)
    others = [engine.submit(image(value), 3) for value in range(2, 8)]
    assert engine.depth == 6
    encoder.gate.set()
    wait([first, *others], TIMEOUT_S)
    assert encoder.batches == [[1], [2, 3, 4, 5], [6, 7]]
    assert [future.result().scores[0] for future in others] == [2, 3, 4, 5, 6, 7]
    assert all(len(future.result().rows) == 3 for future in others)
    began_at, ended_at = others[0].result().stages["queue"]
    assert ended_at >= began_at


def test_each_job_gets_its_own_top_k(engine, encoder):
    first = occupy(engine, encoder)
    futures = [engine.submit(image(2), top_k) for top_k in (1, 500, 7)]
    encoder.gate.set()
    wait([first, *futures], TIMEOUT_S)
    assert [len(future.result().rows) for future in futures] == [1, 500, 7]


def test_jobs_of_one_selection_are_searched_together(encoder):
    index = RangeIndex()
    engine = Engine(encoder, index, max_batch=8, queue_limit=8)
    first = occupy(engine, encoder)
    some, others = (Selection((name,), np.ones(9, np.bool_)) for name in ("some", "others"))
    waiting = [engine.submit(image(2), 1, selection) for selection in (some, others, None, some, others)]
    encoder.gate.set()
    wait([first, *waiting], TIMEOUT_S)
    assert index.selections == [None, some, others, None]
    engine.close(TIMEOUT_S)


def test_unfiltered_scores_are_added_on_request(encoder):
    class BySelection(RangeIndex):
        def search(self, query_embeddings_BD, top_k, *, selection):
            rows_BK, scores_BK = super().search(query_embeddings_BD, top_k, selection=selection)
            return rows_BK, scores_BK if selection is None else scores_BK / 10

    index = BySelection()
    engine = Engine(encoder, index, max_batch=4, queue_limit=8)
    some = Selection(("a",), np.ones(1, np.bool_))
    with_unfiltered = engine.submit(image(5), 3, some, unfiltered=True).result(TIMEOUT_S)
    without = engine.submit(np.array([5, 5], np.float32), 3, some).result(TIMEOUT_S)
    engine.close(TIMEOUT_S)
    assert with_unfiltered.unfiltered_scores.tolist() == [5, 5, 5]
    assert with_unfiltered.scores.tolist() == without.scores.tolist() == [0.5, 0.5, 0.5]
    assert without.unfiltered_scores is None
    assert index.selections == [None, some, some]


def test_padding_is_cut_off(encoder):
    engine = Engine(encoder, RangeIndex(count=2), max_batch=4, queue_limit=8)
    assert list(engine.submit(image(5), 10).result(TIMEOUT_S).rows) == [0, 1]
    engine.close(TIMEOUT_S)


def test_a_search_encodes_nothing(engine, encoder):
    found = engine.submit(np.array([0.25, 0.5], np.float32), 2).result(TIMEOUT_S)
    assert list(found.scores) == [0.25, 0.25]
    assert list(found.stages) == ["queue", "search"]
    assert encoder.batches == []


def test_one_bad_image_fails_alone(engine, encoder):
    first = occupy(engine, encoder)
    good, bad, other = (engine.submit(image(value), 1) for value in (2, 13, 3))
    encoder.gate.set()
    wait([first, good, bad, other], TIMEOUT_S)
    assert good.result().scores[0] == 2
    assert other.result().scores[0] == 3
    with pytest.raises(ValueError, match="unlucky"):
        bad.result()
    assert engine.submit(image(4), 1).result(TIMEOUT_S).scores[0] == 4


def test_a_full_queue_refuses(engine, encoder):
    first = occupy(engine, encoder)
    waiting = [engine.submit(image(2), 1) for _ in range(8)]
    with pytest.raises(TooManyRequests):
        engine.submit(image(3), 1)
    encoder.gate.set()
    wait([first, *waiting], TIMEOUT_S)
    assert engine.submit(image(3), 1).result(TIMEOUT_S).scores[0] == 3


def test_a_cancelled_job_is_never_encoded(engine, encoder):
    first = occupy(engine, encoder)
    abandoned, wanted = engine.submit(image(2), 1), engine.submit(image(3), 1)
    assert abandoned.cancel()
    encoder.gate.set()
    wait([first, wanted], TIMEOUT_S)
    assert encoder.batches == [[1], [3]]
    with pytest.raises(CancelledError):
        abandoned.result()


def test_a_cancelled_job_leaves_the_queue_with_its_pixels(engine, encoder):
    occupy(engine, encoder)
    pixels = image(2)
    abandoned, _ = engine.submit(pixels, 1), engine.submit(image(3), 1)
    held = weakref.ref(pixels)
    del pixels
    assert abandoned.cancel()
    assert held() is None
    assert engine.depth == 1


def test_a_pool_keeps_nothing_of_cancelled_work():
    gate, pixels = threading.Event(), image(2)
    pool = Pool(1, "test")
    running = pool.submit(partial(gate.wait, TIMEOUT_S))
    abandoned = pool.submit(partial(np.sum, pixels))
    held = weakref.ref(pixels)
    del pixels
    assert abandoned.cancel()
    assert held() is None
    gate.set()
    assert running.result(TIMEOUT_S)
    pool.close()
    with pytest.raises(Unavailable, match="stopping"):
        pool.submit(gate.is_set)


def test_closing_finishes_accepted_jobs_and_accepts_no_more(engine, encoder):
    first = occupy(engine, encoder)
    waiting = [engine.submit(image(value), 1) for value in range(2, 9)]
    assert not engine.close(timeout_s=0.01)  # it is busy
    with pytest.raises(Unavailable):
        engine.submit(image(9), 1)
    encoder.gate.set()
    assert engine.close(TIMEOUT_S)
    assert [future.result(0).scores[0] for future in (first, *waiting)] == list(range(1, 9))


def test_a_dead_thread_is_replaced_and_only_the_fatal_job_fails(engine, encoder):
    first = occupy(engine, encoder)
    good, fatal, other = (engine.submit(image(value), 1) for value in (2, 66, 3))
    late = [engine.submit(image(value), 1) for value in (4, 5, 6)]
    encoder.gate.set()
    wait([first, good, fatal, other, *late], TIMEOUT_S)
    assert [each.result(0).scores[0] for each in (first, good, other, *late)] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(RuntimeError, match="died of this image"):
        fatal.result(0)
    assert engine.alive
    assert encoder.batches[:6] == [[1], [2, 66, 3, 4], [2], [66], [3], [4]]  # one by one after the death


def test_an_engine_that_keeps_dying_stops_and_fails_waiting_jobs(engine, encoder):
    first = occupy(engine, encoder)
    fatal = [engine.submit(image(66), 1) for _ in range(3)]
    waiting = [engine.submit(image(2), 1) for _ in range(2)]
    encoder.gate.set()
    wait([first, *fatal, *waiting], TIMEOUT_S)
    assert [type(each.exception(0)) for each in (*fatal, *waiting)] == [RuntimeError] * 3 + [Unavailable] * 2
    assert engine.close(TIMEOUT_S)
    assert not engine.alive
    with pytest.raises(Unavailable):
        engine.submit(image(1), 1)


def test_a_search_that_dies_counts_as_any_other(encoder):
    class FatalIndex:
        def search(self, query_embeddings_BD, top_k, *, selection=None):
            raise SystemExit

    deaths: list[None] = []
    engine = Engine(encoder, FatalIndex(), max_batch=4, queue_limit=8, on_death=lambda: deaths.append(None))
    with pytest.raises(RuntimeError):
        engine.submit(np.ones(2, np.float32), 1).result(TIMEOUT_S)
    assert engine.close(TIMEOUT_S)
    assert len(deaths) == 2  # it was tried once more


def test_a_death_that_no_image_caused_fails_no_job(engine, encoder, monkeypatch):
    def die_once(pixels_BHW3):
        del encoder.encode  # the class's own from now on
        raise SystemExit

    start, alive = threading.Thread.start, []

    def watched(thread):
        alive.append(engine.alive)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", watched)
    encoder.encode = die_once
    assert engine.submit(image(5), 1).result(TIMEOUT_S).scores[0] == 5
    assert engine.alive
    assert alive == [True]  # the engine never reported itself dead


def test_a_thread_that_cannot_start_fails_waiting_jobs(encoder):
    def fail() -> None:
        raise RuntimeError("no threads here")

    engine = Engine(encoder, RangeIndex(), max_batch=4, queue_limit=8, on_start=fail)
    with pytest.raises(Unavailable):
        engine.submit(image(1), 1).result(TIMEOUT_S)


def test_the_heartbeat_stops_while_the_thread_is_stuck(engine, encoder):
    occupy(engine, encoder)
    silent_s = engine.silent_s
    threading.Event().wait(0.05)
    assert engine.silent_s >= silent_s + 0.05
    threading.Event().wait(1)
    stuck_s = engine.silent_s
    encoder.gate.set()
    engine.submit(image(2), 1).result(TIMEOUT_S)
    engine.submit(image(3), 1).result(TIMEOUT_S)  # between the two it has shown that it moves
    assert engine.silent_s < stuck_s

"""An image's way through the threads: handed on, abandoned, stopped; and the generation held for as long as needed."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError
from contextlib import ExitStack

import numpy as np
import pytest

from core.errors import Unavailable, UndecodableImage
from index.bundle import Bundle
from service.passage import Passage
from service.recognizer import Recognizer
from service.settings import Settings
from service.workers import Workers
from wikiclip.answers import RecognizeOptions

TIMEOUT_S = 120  # generous: a busy machine is no failure
WIDTH = 16


class Ending:
    """The end of a passage; `result` joins, too."""

    def __init__(self, pending) -> None:
        self.cancel = pending.cancel
        self._pending = pending

    def result(self, timeout_s):
        return self._pending.result(timeout_s)()


class Ways:
    """Begins passages over one recogniser, with pools of its own."""

    def __init__(self, bundle, encoder, held: ExitStack) -> None:
        self.encoder = encoder
        self.recognizer = held.enter_context(Recognizer(Bundle.open(bundle), Settings(threads=1), self.encoder))
        held.callback(encoder.gate.set)  # before it is closed
        self.snapshot = held.enter_context(self.recognizer.acquire())
        self.decoders, self.lookups = Workers(1, name="decode"), Workers(1, name="lookup")
        held.callback(self.decoders.close)
        held.callback(self.lookups.close)

    def begin(self, image, **options):
        pools = {"decoders": self.decoders, "lookups": self.lookups}
        passage = Passage(self.snapshot, RecognizeOptions(**options), **pools, max_pixels=10**7)
        return Ending(passage.begin(image))

    @property
    def holders(self) -> int:
        return self.snapshot.generation._holders - 1  # but for this one's own

    def settle(self) -> None:
        """Return when the threads have done all that they were given."""
        await_turn(self.decoders)
        self.snapshot.generation.engine.search(np.ones(WIDTH, np.float32), 1).result(TIMEOUT_S)
        await_turn(self.lookups)


def await_turn(workers: Workers) -> None:
    """Return when all that was put before has been done."""
    reached = threading.Event()
    workers.put(reached.set, reached.set)
    assert reached.wait(TIMEOUT_S)


def keep_busy(workers: Workers) -> threading.Event:
    """Have one thread wait for the event that is returned."""
    gate = threading.Event()
    workers.put(lambda: gate.wait(TIMEOUT_S), gate.set)
    return gate


@pytest.fixture
def ways(small_bundle, gated_encoder):
    gated_encoder.gate.set()
    with ExitStack() as held:
        yield Ways(small_bundle, gated_encoder, held)


def test_the_stages_follow_each_other(ways, giraffe):
    passed = ways.begin(giraffe, top_k=3).result(TIMEOUT_S)
    assert list(passed.stages) == ["decode", "queue", "encode", "search", "join"]
    moments = [moment for stage in passed.stages.values() for moment in stage]
    assert moments == sorted(moments)
    assert list(passed.timings_ms) == ["decode", "queue", "encode", "search"]
    assert len(passed.ranking.predictions) == 3
    assert ways.holders == 0


def test_records_in_memory_are_joined_by_who_takes_the_result(ways, giraffe):
    first = ways.begin(giraffe).result(TIMEOUT_S)
    ways.lookups.close()
    again = ways.begin(giraffe).result(TIMEOUT_S)
    assert again.ranking == first.ranking
    with pytest.raises(Unavailable):  # reading what an explanation needs takes a thread
        ways.begin(giraffe, explain=True).result(TIMEOUT_S)


def test_an_embedding_sets_out_at_the_search_and_finds_the_same(ways, giraffe):
    first = ways.begin(giraffe).result(TIMEOUT_S)
    again = ways.begin(first.embedding_D).result(TIMEOUT_S)
    assert list(again.stages) == ["queue", "search", "join"]
    assert again.ranking == first.ranking
    assert sum(ways.encoder.sizes) == 1


def test_a_selection_is_made_on_the_way(ways, giraffe):
    everything = ways.begin(giraffe, top_k=100).result(TIMEOUT_S).ranking
    kind = everything.predictions[-1].types[0]
    some = ways.begin(giraffe, types=(kind,), top_k=100).result(TIMEOUT_S).ranking
    assert 0 < len(some.predictions) < len(everything.predictions)
    assert all(kind in prediction.types for prediction in some.predictions)
    assert ways.holders == 0


def test_a_bad_image_is_its_own_error(ways, giraffe):
    bad, good = ways.begin(giraffe[:100]), ways.begin(giraffe)
    with pytest.raises(UndecodableImage):
        bad.result(TIMEOUT_S)
    assert good.result(TIMEOUT_S).ranking.predictions
    assert ways.holders == 0


def test_what_is_abandoned_before_it_is_decoded_is_never_decoded(ways, giraffe):
    gate = keep_busy(ways.decoders)
    abandoned = ways.begin(giraffe[:100])  # it would be an error
    assert abandoned.cancel()
    assert ways.holders == 1  # its turn in the pool is still to come
    gate.set()
    ways.settle()
    assert ways.holders == 0
    with pytest.raises(CancelledError):
        abandoned.result(0)


def test_what_is_abandoned_in_the_queue_is_never_encoded(ways, giraffe):
    ways.encoder.gate.clear()
    first = ways.begin(giraffe)
    assert ways.encoder.entered.acquire(timeout=TIMEOUT_S)
    abandoned = ways.begin(giraffe)
    await_turn(ways.decoders)  # it has been handed to the engine
    assert abandoned.cancel()
    ways.encoder.gate.set()
    assert first.result(TIMEOUT_S).ranking.predictions
    ways.settle()
    assert sum(ways.encoder.sizes) == 1
    assert ways.holders == 0


def test_what_is_abandoned_while_it_is_handed_to_the_engine_is_never_encoded(ways, giraffe, monkeypatch):
    ways.encoder.gate.clear()
    first = ways.begin(giraffe)
    assert ways.encoder.entered.acquire(timeout=TIMEOUT_S)
    engine, begun, abandoned = ways.snapshot.generation.engine, threading.Event(), []

    def submit(*arguments, _submit=engine.submit, **named):
        future = _submit(*arguments, **named)
        assert begun.wait(TIMEOUT_S)
        assert abandoned[0].cancel()
        ways.encoder.gate.set()
        engine.search(np.ones(WIDTH, np.float32), 1).result(TIMEOUT_S)  # the queue is empty before this returns
        return future

    monkeypatch.setattr(engine, "submit", submit)
    abandoned.append(ways.begin(giraffe))
    begun.set()
    assert first.result(TIMEOUT_S).ranking.predictions
    ways.settle()
    assert sum(ways.encoder.sizes) == 1
    assert ways.holders == 0


def test_what_is_abandoned_while_it_is_encoded_lets_go_in_the_end(ways, giraffe):
    ways.encoder.gate.clear()
    abandoned = ways.begin(giraffe)
    assert ways.encoder.entered.acquire(timeout=TIMEOUT_S)
    assert abandoned.cancel()
    assert ways.holders == 1  # the engine is still at it
    ways.encoder.gate.set()
    ways.settle()
    assert ways.holders == 0


@pytest.mark.parametrize("pool", ["decoders", "lookups"])
def test_a_pool_that_takes_nothing_any_more_is_said_to_stop(ways, giraffe, pool):
    getattr(ways, pool).close()
    with pytest.raises(Unavailable, match="stopping"):
        ways.begin(giraffe).result(TIMEOUT_S)
    assert ways.holders == 0


def test_what_a_pool_drops_when_it_is_shut_is_told(ways, giraffe):
    gate = keep_busy(ways.decoders)
    waiting = ways.begin(giraffe)
    closing = threading.Thread(target=ways.decoders.close)
    closing.start()
    with pytest.raises(Unavailable, match="stopping"):
        waiting.result(TIMEOUT_S)
    gate.set()
    closing.join(TIMEOUT_S)
    assert not closing.is_alive()
    assert ways.holders == 0

"""The stages of one image: their order, cancellation at each of them, closing, and how long the bundle stays open."""

from __future__ import annotations

import asyncio
import io
import threading

import numpy as np
import pytest
from PIL import Image

from core.errors import Unavailable, UndecodableImage
from imaging import Decoder, load_region
from index.bundle import Bundle
from service.pipeline import RecognitionPipeline
from service.ranking import timings_ms
from service.recognizer import Recognizer
from service.settings import Settings
from wikiclip.answers import RecognizeOptions

TIMEOUT_S = 120  # generous: a busy machine is not a failure
WIDTH = 16


def tiny_png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    return buffer.getvalue()


class Pipeline:
    """A pipeline over one view of a bundle, with one thread for each pool."""

    def __init__(self, view, encoder) -> None:
        self.view, self.encoder, self.engine = view, encoder, view.loaded.engine
        self.decoder = Decoder(max_pixels=10**7, budget_bytes=2**28, timeout_s=TIMEOUT_S)
        self.pipeline = RecognitionPipeline(self.decoder)
        self.lookup_pool = self.pipeline._lookup_pool

    async def run(self, image, **options):
        async with asyncio.timeout(TIMEOUT_S):
            return await self.pipeline.run(image, RecognizeOptions(**options), self.view)

    def start(self, image, **options) -> asyncio.Task:
        return asyncio.create_task(self.run(image, **options))

    @property
    def users(self) -> int:
        return self.view.loaded._users - 1  # the fixture is one

    async def idle(self) -> None:
        """Return when all threads have done what was submitted and, within a time limit, released the bundle."""
        await asyncio.to_thread(self.decoder.check, tiny_png())  # it has one thread
        await asyncio.wrap_future(self.lookup_pool.submit(lambda: None))
        await asyncio.wrap_future(self.engine.submit(np.ones(WIDTH, np.float32), 1))
        await asyncio.to_thread(self._wait_until_released)  # a pool has several threads: one idle one is not enough

    def _wait_until_released(self) -> None:
        loaded = self.view.loaded
        with loaded._unused:
            loaded._unused.wait_for(lambda: loaded._users == 1, TIMEOUT_S)

    async def encoding(self) -> None:
        """Return when the encoder has begun a batch."""
        assert await asyncio.to_thread(self.encoder.entered.acquire, timeout=TIMEOUT_S)

    async def cancelled(self, task: asyncio.Task) -> None:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


@pytest.fixture
def pipeline(small_bundle, gated_encoder):
    gated_encoder.gate.set()
    with Recognizer(Bundle.open(small_bundle), Settings(threads=1), gated_encoder) as recognizer:
        with recognizer.acquire() as view:
            pipeline = Pipeline(view, gated_encoder)
            yield pipeline
            gated_encoder.gate.set()
        pipeline.pipeline.close()


async def queued(pipeline, count: int) -> None:
    """Return when the engine's queue has `count` jobs."""
    async with asyncio.timeout(TIMEOUT_S):
        while pipeline.engine.depth != count:
            await asyncio.sleep(0.001)  # decoding happens in another thread


def test_stages_follow_each_other(pipeline, giraffe):
    result = asyncio.run(pipeline.run(giraffe, top_k=3))
    assert list(result.stages) == ["decode", "queue", "encode", "search", "join"]
    moments = [moment for stage in result.stages.values() for moment in stage]
    assert moments == sorted(moments)
    assert list(timings_ms(result.stages)) == ["decode", "queue", "encode", "search"]
    assert len(result.recognition.predictions) == 3
    assert pipeline.users == 0


def test_records_in_memory_need_no_thread(pipeline, giraffe):
    first = asyncio.run(pipeline.run(giraffe))
    pipeline.lookup_pool.close()
    assert asyncio.run(pipeline.run(giraffe)).recognition.predictions == first.recognition.predictions
    with pytest.raises(Unavailable):  # an explanation is read from files
        asyncio.run(pipeline.run(giraffe, explain=True))


def test_an_embedding_starts_at_the_search_and_finds_the_same(pipeline, giraffe):
    first = asyncio.run(pipeline.run(giraffe))
    again = asyncio.run(pipeline.run(first.embedding_D))
    assert list(again.stages) == ["queue", "search", "join"]
    assert (first.recognition.cached, again.recognition.cached) == (False, True)
    changes = {"cached": True, "timings_ms": again.recognition.timings_ms}
    assert again.recognition == first.recognition.model_copy(update=changes)
    assert sum(pipeline.encoder.sizes) == 1


def test_types_select_before_the_search(pipeline, giraffe):
    everything = asyncio.run(pipeline.run(giraffe, top_k=100)).recognition
    kind = everything.predictions[-1].types[0]
    some = asyncio.run(pipeline.run(giraffe, types=(kind,), top_k=100)).recognition
    assert 0 < len(some.predictions) < len(everything.predictions)
    assert all(kind in prediction.types for prediction in some.predictions)
    assert pipeline.users == 0


def test_a_bad_image_fails_alone(pipeline, giraffe):
    async def run():
        return await asyncio.gather(pipeline.run(giraffe[:100]), pipeline.run(giraffe), return_exceptions=True)

    bad, good = asyncio.run(run())
    assert isinstance(bad, UndecodableImage)
    assert good.recognition.predictions
    assert pipeline.users == 0


def test_an_image_cancelled_before_it_is_decoded_is_never_decoded(pipeline, giraffe, monkeypatch):
    decoding, gate = threading.Event(), threading.Event()

    def gated(data, **arguments):
        decoding.set()
        assert gate.wait(TIMEOUT_S)
        return load_region(data, **arguments)

    monkeypatch.setattr("imaging.decoder.load_region", gated)

    async def run() -> None:
        first = pipeline.start(giraffe)
        assert await asyncio.to_thread(decoding.wait, TIMEOUT_S)
        second = pipeline.start(giraffe)
        async with asyncio.timeout(TIMEOUT_S):
            while pipeline.decoder._ordinary._executor._work_queue.qsize() != 1:
                await asyncio.sleep(0)
        await pipeline.cancelled(second)
        await pipeline.cancelled(first)
        gate.set()
        await pipeline.idle()

    asyncio.run(run())
    assert pipeline.encoder.sizes == []
    assert pipeline.users == 0


def test_an_image_cancelled_in_the_queue_is_never_encoded(pipeline, giraffe):
    async def run() -> None:
        pipeline.encoder.gate.clear()
        first = pipeline.start(giraffe)
        await pipeline.encoding()
        second = pipeline.start(giraffe)
        await queued(pipeline, 1)
        await pipeline.cancelled(second)
        pipeline.encoder.gate.set()
        assert (await first).recognition.predictions
        await pipeline.idle()

    asyncio.run(run())
    assert sum(pipeline.encoder.sizes) == 1
    assert pipeline.users == 0


def test_an_image_cancelled_while_it_is_encoded_harms_no_other(pipeline, giraffe):
    async def run():
        pipeline.encoder.gate.clear()
        task = pipeline.start(giraffe)
        await pipeline.encoding()
        await pipeline.cancelled(task)
        pipeline.encoder.gate.set()
        return await pipeline.run(giraffe)

    assert asyncio.run(run()).recognition.predictions
    assert pipeline.users == 0


def test_the_bundle_stays_open_while_a_thread_reads_it_for_a_cancelled_image(pipeline, giraffe, monkeypatch):
    reading, gate = threading.Event(), threading.Event()
    rank = pipeline.view.ranker.rank

    def slow_rank(*arguments):
        reading.set()
        assert gate.wait(TIMEOUT_S)
        return rank(*arguments)

    monkeypatch.setattr(pipeline.view.ranker, "rank", slow_rank)

    async def run() -> None:
        task = pipeline.start(giraffe, explain=True)
        assert await asyncio.to_thread(reading.wait, TIMEOUT_S)
        await pipeline.cancelled(task)
        assert pipeline.users == 1
        gate.set()
        await pipeline.idle()

    asyncio.run(run())
    assert pipeline.users == 0


@pytest.mark.parametrize("options", [{}, {"types": ("animal",)}])
def test_a_closed_pipeline_is_reported_as_unavailable(pipeline, giraffe, options):
    pipeline.pipeline.close()
    with pytest.raises(Unavailable, match="stopping"):
        asyncio.run(pipeline.run(giraffe, **options))
    assert pipeline.users == 0

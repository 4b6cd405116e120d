"""From image bytes to named entities, without HTTP: what the app serves, a notebook can call.

Shapes: H/W pixels, D embedding width.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Self, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from core.errors import (
    BundleAltered,
    BundleRefused,
    Conflict,
    DeadlineExceeded,
    TooLarge,
    TooManyRequests,
    Unavailable,
    UndecodableImage,
    UserError,
)
from index.bundle import Bundle
from index.transfer import local_bundle
from service.cache import Cache, SingleFlight, cache_key
from service.engine import Encoder
from service.limits import Admission
from service.loaded_bundle import LoadedBundle, Snapshot
from service.passage import Passage, Passed
from service.settings import Settings
from service.telemetry import Metrics, record_stages
from service.workers import Workers
from wikiclip.answers import Recognition, RecognizeOptions

Edit = TypeVar("Edit")
Ended = TypeVar("Ended")

# What became of an image that was not answered, as the metrics name it.
_OUTCOMES: dict[type[UserError], str] = {
    UndecodableImage: "undecodable",
    TooLarge: "too_large",
    TooManyRequests: "full",
    DeadlineExceeded: "deadline",
}

_LOOKUP_THREADS = 2

log = logging.getLogger("wikiclip.recognizer")


class Recognizer:
    """A bundle ready to answer, and the swap to another one.

    `recognize_many` is for programs and notebooks, `recognize` for one event loop. Close it when done, or use `with`.
    Without an `encoder` each bundle's own is run on ONNX Runtime; one that is given serves them all.
    """

    def __init__(self, bundle: Bundle, settings: Settings, encoder: Encoder | None = None) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.admission = Admission(
            settings.queue_limit,
            minimum=max(settings.batch_limit("cuda"), settings.max_batch_images),
            deadline_s=settings.deadline_ms / 1000,
            on_refusal=partial(self.metrics.count_images, "full"),
        )
        self._given_encoder = encoder
        self._current = LoadedBundle(bundle, settings, self.metrics, encoder)
        self._switch = threading.Lock()  # a generation is not let go between being read here and being held
        self._swapping = False
        self._decoders = Workers(settings.decode_thread_count, name="decode")
        # What is short does not wait behind all images that are still to be decoded.
        self._lookups = Workers(_LOOKUP_THREADS, name="lookup")
        self._cache: Cache | None = None
        if settings.cache == "on":
            self._cache = Cache(
                settings.cache_max_bytes,
                settings.redis_url,
                settings.redis_timeout_ms / 1000,
                self.metrics.redis_errors.inc,
            )
        self._flights: SingleFlight[Recognition] = SingleFlight()
        self._encodings: SingleFlight[tuple[RecognizeOptions, Recognition, Passed]] = SingleFlight()
        self._closing = False
        self._tell_bundle()

    @classmethod
    def open(cls, bundle: Path | str, settings: Settings | None = None) -> Self:
        """Check and load a bundle, given as a folder or by URI.

        Raises `BundleError`, `TransferError` where a URI does not answer, `UserError` where the device cannot be had.
        """
        settings = settings or Settings()
        return cls(Bundle.open(local_bundle(bundle, settings.bundle_cache)), settings)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def begin_draining(self) -> None:
        """Say from now on that this is not ready, while what was accepted is finished."""
        self._closing = True

    def close(self) -> None:
        """Finish what was accepted, within the deadline of a request, and let go of everything. Idempotent."""
        self._closing = True
        if self._current.close(self.settings.deadline_ms / 1000):
            self._decoders.close()
            self._lookups.close()

    async def aclose(self) -> None:
        """`close`, and the connections that belong to the event loop."""
        if self._cache is not None:
            await self._cache.close()
        await asyncio.to_thread(self.close)

    @contextmanager
    def acquire(self) -> Iterator[Snapshot]:
        """What answers now, kept open and as it is while the block runs, even if another takes its place."""
        with self._switch:
            generation = self._current
            generation.acquire()
        try:
            yield generation.snapshot()
        finally:
            generation.release()

    async def swap(self, bundle: Path | str) -> LoadedBundle:
        """Load another bundle (a folder or a URI) beside the one that answers, check it, and let it answer from now on.

        Requests that have begun are finished by the old one, which is then released. Raises `BundleRefused` where the
        other cannot be served (the old one stays), `Conflict` while another swap is under way. For one event loop.
        """
        if self._swapping:
            raise Conflict("another bundle is being loaded; try again when it is done")
        self._swapping = True
        try:
            new = await asyncio.to_thread(self._open_generation, bundle)
        except (UserError, OSError) as error:
            self.metrics.bundle_swaps.labels("refused").inc()
            log.warning("%s is refused, %s stays: %s", bundle, self._current.snapshot().label, error)
            raise BundleRefused(f"{error}; {self._current.snapshot().label} stays") from error
        finally:
            self._swapping = False
        if self._closing:
            new.retire(self.settings.deadline_ms / 1000)
            raise Unavailable("the service is stopping; try again elsewhere")
        with self._switch:
            old, self._current = self._current, new
        old.retire(self.settings.deadline_ms / 1000)
        self.metrics.bundle_swaps.labels("loaded").inc()
        self._tell_bundle()
        log.info("%s answers instead of %s", new.snapshot().label, old.snapshot().label)
        return new

    def _open_generation(self, bundle: Path | str) -> LoadedBundle:
        folder = local_bundle(bundle, self.settings.bundle_cache)
        generation = LoadedBundle(Bundle.open(folder), self.settings, self.metrics, self._given_encoder)
        try:
            generation.check()
        except BundleAltered:
            generation.close(0)
            raise
        return generation

    def _tell_bundle(self) -> None:
        self.metrics.bundle.clear()
        self.metrics.bundle.labels(self._current.model, self._current.snapshot().label).set(1)

    @property
    def label(self) -> str:
        """What answers now, as name@fingerprint, with +N after N live changes."""
        return self._current.snapshot().label

    @property
    def unready_reason(self) -> str | None:
        """Why requests cannot be answered now, None when they can."""
        return "the service is stopping" if self._closing else self._current.unready_reason

    @property
    def queue_depth(self) -> int:
        return self._current.engine.depth

    def recognize_many(
        self, images: Sequence[bytes], options: RecognizeOptions | None = None
    ) -> list[Recognition | UserError]:
        """Recognise images in batches, in order. A bad image gives its error in its place and spoils no other."""
        options = options or RecognizeOptions()
        answers: list[Recognition | UserError] = []
        with self.acquire() as snapshot:
            chunk = min(2 * self.settings.batch_limit(snapshot.generation.encoder.device), self.settings.queue_limit)
            for start in range(0, len(images), chunk):
                answers += self._recognize_chunk(snapshot, images[start : start + chunk], options)
        return answers

    async def recognize(self, data: bytes, options: RecognizeOptions, snapshot: Snapshot | None = None) -> Recognition:
        """Recognise one image, through the cache. The caller has been admitted, and holds `snapshot` if it names one.

        Raises `UndecodableImage`, `TooLarge`, `BadParameter`, `DeadlineExceeded`, `Unavailable`. Cancelling it drops
        the work, unless someone else waits for the same.
        """
        if snapshot is None:
            with self.acquire() as current:
                return await self.recognize(data, options, current)
        outcome = "failed"
        timings_ms: Mapping[str, float] = {}
        try:
            recognition = await self._within_deadline(data, options, snapshot)
            outcome, timings_ms = "answered", recognition.timings_ms
        except asyncio.CancelledError:
            outcome = "abandoned"
            raise
        except UserError as error:
            outcome = _OUTCOMES.get(type(error), "refused")
            raise
        finally:
            # In the loop's next turn, when who waits has the answer.
            asyncio.get_running_loop().call_soon(self.metrics.observe_image, outcome, timings_ms)
        return recognition

    async def _within_deadline(self, data: bytes, options: RecognizeOptions, snapshot: Snapshot) -> Recognition:
        started_at = time.monotonic()
        try:
            async with asyncio.timeout(self.settings.deadline_ms / 1000):
                if self._cache is None or options.explain:  # pixels are needed, and the answer is large: not kept
                    recognition, _ = await self._compute(snapshot, data, options)
                else:
                    recognition = await self._through_cache(self._cache, snapshot, data, options)
        except TimeoutError:
            raise DeadlineExceeded(
                f"no answer within {self.settings.deadline_ms} ms; try again later or with fewer images at a time"
            ) from None
        total_ms = 1000 * (time.monotonic() - started_at)
        return _with_total(recognition, total_ms)

    async def edit(self, snapshot: Snapshot, change: Callable[[], Future[Edit]]) -> Edit:
        """What a change to the entities gives, within the deadline of a request; `change` gives it to a worker. The
        caller holds `snapshot`.

        Raises what the change does, or `DeadlineExceeded`: then it may have been made or not.
        """
        pending = change()
        snapshot.generation.acquire()
        pending.add_done_callback(lambda _: snapshot.generation.release())
        try:
            async with asyncio.timeout(self.settings.deadline_ms / 1000):
                return await asyncio.wrap_future(pending)
        except TimeoutError:
            raise DeadlineExceeded(
                f"the change was not made within {self.settings.deadline_ms} ms and may still be; ask for the entity"
            ) from None

    async def _through_cache(
        self, cache: Cache, snapshot: Snapshot, data: bytes, options: RecognizeOptions
    ) -> Recognition:
        image_sha256 = hashlib.sha256(data).hexdigest()
        # An embedding depends on the encoder only: another bundle with the same one starts with these.
        embedding_key = cache_key("embedding", image_sha256, snapshot.generation.encoder_hash, repr(options.box))
        # Services of one bundle that share a Redis may run different files of its encoder.
        answered_by = f"{snapshot.label} {snapshot.generation.encoder_hash}"
        answer_key = cache_key("answer", image_sha256, answered_by, repr(options))
        kept = _read_answer(await cache.get(answer_key))
        if kept is not None:
            self.metrics.cache_lookups.labels("answer").inc()
            return kept

        async def encode() -> tuple[RecognizeOptions, Recognition, Passed]:
            recognition, passed = await self._compute(snapshot, data, options)
            await cache.put(embedding_key, passed.embedding_D.astype("<f4").tobytes())
            return options, recognition, passed

        async def work() -> Recognition:
            embedding_D = _read_embedding(
                await cache.get(embedding_key), snapshot.generation.bundle.manifest.embedding_dim
            )
            self.metrics.cache_lookups.labels("miss" if embedding_D is None else "embedding").inc()
            if embedding_D is None:
                # Others may ask the same of the same image, or something else: it is encoded for the first of them.
                asked, recognition, passed = await self._encodings.run(embedding_key + snapshot.label, encode)
                if asked != options:
                    recognition, _ = await self._compute(snapshot, passed.embedding_D, options)
            else:
                recognition, _ = await self._compute(snapshot, embedding_D, options)
            await cache.put(answer_key, _write_answer(recognition))
            return recognition

        return await self._flights.run(answer_key, work)

    async def _compute(
        self, snapshot: Snapshot, image: bytes | npt.NDArray[np.float32], options: RecognizeOptions
    ) -> tuple[Recognition, Passed]:
        """The answer to an image, or to its embedding [D]."""
        passed = (await _end_of(self._begin(snapshot, image, options)))()
        record_stages(passed.stages)
        return _recognition(snapshot, passed, cached=isinstance(image, np.ndarray)), passed

    def _recognize_chunk(
        self, snapshot: Snapshot, images: Sequence[bytes], options: RecognizeOptions
    ) -> list[Recognition | UserError]:
        answers: list[Recognition | UserError] = []
        for pending in [self._begin(snapshot, data, options) for data in images]:
            try:
                passed = pending.result()()
            except UserError as error:
                answers.append(error.with_traceback(None))  # which knows of this list
                continue
            recognition = _recognition(snapshot, passed, cached=False)
            total_ms = sum(recognition.timings_ms.values())
            answers.append(_with_total(recognition, total_ms))
        return answers

    def _begin(
        self, snapshot: Snapshot, image: bytes | npt.NDArray[np.float32], options: RecognizeOptions
    ) -> Future[Callable[[], Passed]]:
        passage = Passage(
            snapshot,
            options,
            decoders=self._decoders,
            lookups=self._lookups,
            max_pixels=self.settings.max_pixels,
        )
        return passage.begin(image)


async def _end_of(pending: Future[Ended]) -> Ended:
    """What a future of another thread gives. Cancelling this cancels that.

    asyncio's own way ties the two into a knot that only the collector undoes, one for each request.
    """
    loop = asyncio.get_running_loop()
    ended = loop.create_future()

    def tell() -> None:
        if not ended.done():
            ended.set_result(None)

    def on_end(_: Future[Ended]) -> None:
        # A loop that is closed has nobody left who waits.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(tell)

    pending.add_done_callback(on_end)
    try:
        await ended
    except asyncio.CancelledError:
        pending.cancel()
        raise
    try:
        return pending.result()
    finally:
        del pending  # an error knows of this frame, and the future of the error


def _recognition(snapshot: Snapshot, passed: Passed, *, cached: bool) -> Recognition:
    return Recognition(
        model=snapshot.generation.model,
        bundle=snapshot.label,
        cached=cached,
        in_catalog_probability=passed.ranking.known,
        abstained=passed.ranking.abstained,
        predictions=passed.ranking.predictions,
        timings_ms=passed.timings_ms,
    )


def _read_embedding(value: bytes | None, dim: int) -> npt.NDArray[np.float32] | None:
    """An embedding from the cache, None unless it is whole: Redis may hold anything."""
    if value is None or len(value) != 4 * dim:
        return None
    embedding_D = np.frombuffer(value, "<f4").astype(np.float32)
    return embedding_D if np.isfinite(embedding_D).all() else None


def _with_total(recognition: Recognition, total_ms: float) -> Recognition:
    timings_ms = {stage: round(value, 3) for stage, value in {**recognition.timings_ms, "total": total_ms}.items()}
    return recognition.model_copy(update={"timings_ms": timings_ms})


def _write_answer(recognition: Recognition) -> bytes:
    return recognition.model_copy(update={"cached": True, "timings_ms": {}}).model_dump_json().encode()


def _read_answer(value: bytes | None) -> Recognition | None:
    """Return an answer from the cache, None unless it is complete: Redis may hold anything."""
    if value is None:
        return None
    try:
        return Recognition.model_validate_json(value)
    except ValidationError:
        log.warning("an answer in the cache is damaged: computing it again")
        return None

"""From image bytes to named entities, without HTTP. The app serves it, and programs and notebooks can call it.

Shapes: D embedding width.
"""

import asyncio
import hashlib
import logging
import math
import threading
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Self, TypeVar

import numpy as np

from core.arrays import Float32Array, combined
from core.errors import (
    BadParameter,
    BundleAltered,
    BundleRefused,
    Conflict,
    DeadlineExceeded,
    TooLarge,
    TooManyRequests,
    Unavailable,
    UndecodableImage,
    UserError,
    WikiclipError,
)
from core.lines import append_row
from core.runtime import returnable_memory
from imaging import Decoder, automatic_budget
from index.bundle import Bundle
from index.embeddings import read_embedding
from index.transfer import local_bundle
from service.cache import Cache, SingleFlight, answer_key, embedding_key
from service.engine import Encoder
from service.limits import Admission
from service.loaded_bundle import BundleView, LoadedBundle, opening
from service.pipeline import RecognitionPipeline
from service.ranking import timings_ms
from service.settings import Settings
from service.telemetry import Metrics, record_stages
from wikiclip.answers import (
    Box,
    BundleChange,
    Embedding,
    EmbeddingQuery,
    Feedback,
    FeedbackOptions,
    Recognition,
    RecognizeOptions,
    SkippedImage,
    TextQuery,
)

Query = TypeVar("Query")
T = TypeVar("T")

_MAX_REASON = 1000  # characters of a manifest's errors
_NORM_TOLERANCE = 1e-4

_OUTCOMES: dict[type[BaseException], str] = {  # as the metric names them
    UndecodableImage: "undecodable",
    TooLarge: "too_large",
    TooManyRequests: "full",
    DeadlineExceeded: "deadline",
    asyncio.CancelledError: "abandoned",
}

log = logging.getLogger("wikiclip.recognizer")


class Recognizer:
    """A bundle that answers, and that can be swapped for another one.

    Use `recognize_many` in programs and notebooks, `recognize` in an event loop. Close it when done, or use `with`.
    By default each bundle's own encoder runs on ONNX Runtime; an `encoder` replaces it for all bundles.
    """

    def __init__(self, bundle: Bundle, settings: Settings, encoder: Encoder | None = None) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self._deadline_s = settings.deadline_ms / 1000
        self.admission = Admission(
            settings.queue_limit,
            minimum=max(
                settings.batch_limit("cuda"), settings.max_batch_images, settings.view_limit, 1 + settings.region_limit
            ),
            deadline_s=self._deadline_s,
            on_refusal=partial(self.metrics.count_images, "full"),
        )
        self._encoder = encoder
        self._decoder = Decoder(
            max_pixels=settings.max_pixels,
            budget_bytes=settings.decode_budget_bytes or automatic_budget(),
            timeout_s=settings.decode_timeout_s,
            threads=settings.decode_thread_count,
        )
        self._current = LoadedBundle(bundle, settings, self.metrics, self._decoder, encoder)
        self._current_lock = threading.Lock()  # a bundle must not be retired between being read here and acquired
        self._swapping = False
        self._closing = False
        self._pipeline = RecognitionPipeline(self._decoder)
        self._cache = Cache(
            settings.cache_max_bytes,
            settings.redis_url,
            settings.redis_timeout_ms / 1000,
            self.metrics.redis_errors.inc,
        )
        self._encodings: SingleFlight[tuple[RecognizeOptions, Recognition, Float32Array]] = SingleFlight()
        self._publish_bundle()

    @classmethod
    def open(cls, bundle: Path | str, settings: Settings | None = None) -> Self:
        """Check and load a bundle, given as a folder or a URI.

        Raises `BundleError`, `TransferError` if a URI does not answer, `UserError` if the device is not available.
        """
        settings = settings or Settings()
        with opening(bundle):
            return cls(Bundle.open(local_bundle(bundle, settings.bundle_cache)), settings)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def begin_draining(self) -> None:
        """Report that this is not ready, while accepted requests are finished."""
        self._closing = True

    def close(self) -> None:
        """Finish accepted work, within the deadline of a request, and close everything. Idempotent."""
        self._closing = True
        if self._current.close(self._deadline_s):
            self._pipeline.close()

    async def aclose(self) -> None:
        """Close this and the connections of the event loop."""
        await self._cache.close()
        await asyncio.to_thread(self.close)

    @property
    def label(self) -> str:
        """Return the bundle that answers, as name@fingerprint, with +N after N live changes."""
        return self._current.view().label

    @property
    def unready_reason(self) -> str | None:
        """Return why requests cannot be answered now, None if they can."""
        if self._closing:
            return "the service is stopping"
        return self._current.unready_reason or self._pipeline.stuck_reason(self.settings.stuck_ms / 1000)

    @property
    def queue_depth(self) -> int:
        return self._current.engine.depth

    @contextmanager
    def acquire(self) -> Iterator[BundleView]:
        """Yield what answers now. It stays open and unchanged within the block, even if the bundle is swapped."""
        with self._current_lock:
            loaded = self._current
            loaded.acquire()
        try:
            yield loaded.view()
        finally:
            loaded.release()

    async def swap(self, bundle: Path | str) -> BundleChange:
        """Load and check another bundle (a folder or a URI) and answer from it.

        Requests that have begun finish with the old bundle, which is then closed. Raises `BundleRefused` if the other
        bundle cannot be served (the old one stays), `Conflict` during another swap. For one event loop.
        """
        if self._swapping:
            raise Conflict("another bundle is being loaded; retry when it is done")
        self._swapping = True
        try:
            new = await asyncio.to_thread(self._load, bundle)
        except WikiclipError as error:
            self.metrics.bundle_swaps.labels("refused").inc()
            log.warning("%s is refused, %s stays: %s", bundle, self.label, error)
            reason = " ".join(str(error).split())[:_MAX_REASON]
            raise BundleRefused(f"{reason}; {self.label} stays") from error
        finally:
            self._swapping = False
        if self._closing:
            new.retire(self._deadline_s)
            raise Unavailable("the service is stopping; retry elsewhere")
        with self._current_lock:
            old, self._current = self._current, new
        current, previous = new.view(), old.view().label
        old.retire(self._deadline_s)
        self.metrics.bundle_swaps.labels("loaded").inc()
        self._publish_bundle()
        log.info("%s answers instead of %s", current.label, previous)
        return BundleChange(
            bundle=current.label, previous=previous, model=new.model, entities=current.entities.entity_count
        )

    def _load(self, bundle: Path | str) -> LoadedBundle:
        with opening(bundle):
            folder = local_bundle(bundle, self.settings.bundle_cache)
            with returnable_memory():
                loaded = LoadedBundle(Bundle.open(folder), self.settings, self.metrics, self._decoder, self._encoder)
        try:
            loaded.check()
        except BundleAltered:
            loaded.close(self._deadline_s)
            raise
        return loaded

    def _publish_bundle(self) -> None:
        self.metrics.bundle.clear()
        self.metrics.bundle.labels(self._current.model, self.label).set(1)

    def recognize_many(
        self, images: Sequence[bytes | EmbeddingQuery], options: RecognizeOptions | None = None
    ) -> list[Recognition | WikiclipError]:
        """Recognise images, or those of embeddings, in batches.

        Returns one outcome per image, in order: a bad image does not affect others.
        """
        options = options or RecognizeOptions()

        async def recognize(image: bytes | EmbeddingQuery, view: BundleView) -> Recognition:
            query = _checked_embedding(image, options, view) if isinstance(image, EmbeddingQuery) else image
            recognition = await self._recognize_uncached(query, options, view, math.inf)
            return _with_total(recognition, sum(recognition.timings_ms.values()))

        return self._map(recognize, images, jobs=self.images_of(options))

    def images_of(self, options: RecognizeOptions) -> int:
        """Return how many images a request for one image counts as: its regions count, too."""
        return 1 if options.regions is None else 1 + self.settings.region_limit

    def recognize_together(self, images: Sequence[bytes], options: RecognizeOptions | None = None) -> Recognition:
        """Recognise the one thing that several images show, at most `MAX_VIEWS`. Raises as `recognize_views` does."""
        self.check_views(len(images))
        options = options or RecognizeOptions()

        async def recognize(images: Sequence[bytes], view: BundleView) -> Recognition:
            recognition = await self._answer_views(images, options, view, cache=False)
            return _with_total(recognition, sum(recognition.timings_ms.values()))

        [outcome] = self._map(recognize, [images])
        if isinstance(outcome, WikiclipError):
            raise outcome
        return outcome

    def embed_many(self, images: Sequence[bytes]) -> list[Embedding | WikiclipError]:
        """Return the query embeddings of images, or why there is none, in order."""

        async def embed(image: bytes, view: BundleView) -> Embedding:
            found = await self._pipeline.embed(image, None, view, math.inf)
            return _embedding(found.embedding_D, view)

        return self._map(embed, images)

    def _map(
        self, work: Callable[[Query, BundleView], Awaitable[T]], images: Sequence[Query], jobs: int = 1
    ) -> list[T | WikiclipError]:
        """Run `work` on images, or lists of images, in batches, with one view. Each gives the engine `jobs` jobs."""
        outcomes: list[T | WikiclipError] = []
        # In a thread of its own, because the calling thread of a notebook already runs an event loop.
        with self.acquire() as view, ThreadPoolExecutor(1) as executor:

            async def outcome(image: Query) -> T | WikiclipError:
                try:
                    return await work(image, view)
                except WikiclipError as error:
                    return error.with_traceback(None)  # a traceback would keep the image in memory

            async def chunk_outcomes(chunk: Sequence[Query]) -> list[T | WikiclipError]:
                return await asyncio.gather(*map(outcome, chunk))

            most = min(2 * self.settings.batch_limit(view.loaded.encoder.device), self.settings.queue_limit)
            size = max(1, most // jobs)
            for start in range(0, len(images), size):
                outcomes += executor.submit(asyncio.run, chunk_outcomes(images[start : start + size])).result()
        return outcomes

    async def recognize(
        self, query: bytes | EmbeddingQuery, options: RecognizeOptions, view: BundleView | None = None
    ) -> Recognition:
        """Recognise one image, through the cache, or the image of an embedding, in which case nothing is cached.

        The caller has admitted it, and keeps `view` open if it gives one. Cancelling it drops the work, unless another
        request waits for the same. Raises `UndecodableImage`, `TooLarge`, `BadParameter`, `DeadlineExceeded`,
        `Unavailable`, `Conflict` for an embedding by another encoder.
        """
        if view is None:
            with self.acquire() as current:
                return await self.recognize(query, options, current)
        started_at = time.monotonic()
        async with self._in_time():
            if isinstance(query, EmbeddingQuery):
                recognition, _ = await self._pipeline.recognize(_checked_embedding(query, options, view), options, view)
            elif self.settings.cache == "on" and not options.explain:  # explanations are large and need the pixels
                recognition = await self._recognize_cached(query, options, view)
            else:
                recognition = await self._recognize_uncached(query, options, view, self._deadline_s)
        self.metrics.observe_answer(recognition.timings_ms)
        return _with_total(recognition, 1000 * (time.monotonic() - started_at))

    def check_views(self, images: int) -> None:
        """Raise `TooLarge` for more images of one thing than `MAX_VIEWS`."""
        if images > self.settings.view_limit:
            raise TooLarge(
                f"{images} images of one thing; send at most {self.settings.view_limit}, or use /recognize/batch for "
                "images of different things"
            )

    async def recognize_views(
        self, images: Sequence[bytes | UserError], options: RecognizeOptions, view: BundleView | None = None
    ) -> Recognition:
        """Recognise the one thing that several images show, whatever their order, through the cache.

        An image that is an error, or does not decode, is skipped. The caller has admitted all, and keeps `view` open if
        it gives one. Raises as `recognize` does, and `UndecodableImage` if no image decodes.
        """
        if view is None:
            with self.acquire() as current:
                return await self.recognize_views(images, options, current)
        started_at = time.monotonic()
        async with self._in_time(len(images)):
            recognition = await self._answer_views(images, options, view, cache=self.settings.cache == "on")
        skipped = len(recognition.skipped or ())
        self.metrics.observe_answer(recognition.timings_ms, len(images) - skipped)
        self.metrics.count_images("undecodable", skipped)
        return _with_total(recognition, 1000 * (time.monotonic() - started_at))

    async def embed(self, query: bytes | TextQuery, box: Box | None, view: BundleView) -> Embedding:
        """Return the query embedding of an image, through the cache, or that of an entity with this text and no image.

        To query with it gives the same answer as to query with the image. The caller has admitted it and keeps `view`
        open. Raises as `recognize` does, and `NoEntitySide` if the bundle cannot embed texts.
        """
        timings: Mapping[str, float] = {}
        async with self._in_time():
            if isinstance(query, TextQuery):
                embedding_D = await asyncio.to_thread(view.loaded.embed_text, query.text)
            else:
                image_sha256 = hashlib.sha256(query).hexdigest()
                cache = self.settings.cache == "on"
                embedding_D, timings = await self._embed_image(query, image_sha256, box, view, cache=cache)
        self.metrics.observe_answer(timings)
        return _embedding(embedding_D, view)

    async def keep_feedback(
        self, query: bytes | EmbeddingQuery, options: FeedbackOptions, view: BundleView
    ) -> Feedback:
        """Append the embedding of a query and the id of its entity to `FEEDBACK_FILE`, which must be set.

        The caller has admitted it and keeps `view` open. Raises as `recognize` does, `UnknownEntity`, and
        `FeedbackFileError` if it cannot be kept.
        """
        path = self.settings.feedback_file
        assert path is not None
        await asyncio.to_thread(view.entities.get, options.entity_id)
        if isinstance(query, EmbeddingQuery):
            embedding = _embedding(_checked_embedding(query, RecognizeOptions(box=options.box), view), view)
        else:
            embedding = await self.embed(query, options.box, view)
        data_id = f"feedback_{uuid.uuid4().hex}"
        row = {
            "data_id": data_id,
            "entity_id": options.entity_id,
            "data_split": "feedback",
            "embedding": embedding.embedding,
            "encoder": embedding.encoder,
        }
        async with self._in_time(0):
            await asyncio.to_thread(append_row, path, row)
        return Feedback(data_id=data_id, entity_id=options.entity_id)

    async def _embed_image(
        self, image: bytes, image_sha256: str, box: Box | None, view: BundleView, *, cache: bool
    ) -> tuple[Float32Array, Mapping[str, float]]:
        """Return the embedding of an image [D], and how long each stage took, in milliseconds."""
        key = embedding_key(image_sha256, box, view)
        if cache and (embedding_D := await self._cached_embedding(key, view)) is not None:
            return embedding_D, {}
        found = await self._pipeline.embed(image, box, view, self._deadline_s)
        record_stages(found.stages)
        if cache:
            await self._cache.put_embedding(key, found.embedding_D)
        return found.embedding_D, timings_ms(found.stages)

    async def _cached_embedding(self, key: str, view: BundleView) -> Float32Array | None:
        embedding_D = await self._cache.get_embedding(key, view.loaded.bundle.manifest.embedding_dim)
        self.metrics.cache_lookups.labels("miss" if embedding_D is None else "embedding").inc()
        return embedding_D

    async def _cached_answer(self, key: str, view: BundleView) -> Recognition | None:
        answer = await self._cache.get_answer(key, view.label)
        if answer is not None:
            self.metrics.cache_lookups.labels("answer").inc()
        return answer

    @asynccontextmanager
    async def _in_time(self, images: int = 1) -> AsyncIterator[None]:
        """Count images by how the block fails. Raises `DeadlineExceeded` if it takes longer than a request may."""
        try:
            try:
                async with asyncio.timeout(self._deadline_s):
                    yield
            except TimeoutError:
                raise DeadlineExceeded(
                    f"no answer within {self.settings.deadline_ms} ms; retry later or with fewer images at a time"
                ) from None
        except (asyncio.CancelledError, Exception) as error:
            other = "refused" if isinstance(error, WikiclipError) else "failed"
            self.metrics.count_images(_OUTCOMES.get(type(error), other), images)
            raise

    async def _recognize_cached(self, image: bytes, options: RecognizeOptions, view: BundleView) -> Recognition:
        image_sha256 = hashlib.sha256(image).hexdigest()
        key = answer_key([image_sha256], options, view)
        if (answer := await self._cached_answer(key, view)) is not None:
            return answer
        if options.regions is not None:
            self.metrics.cache_lookups.labels("miss").inc()
            recognition = await self._recognize_uncached(image, options, view, self._deadline_s)
            await self._cache.put_answer(key, recognition)
            return recognition
        encoding = embedding_key(image_sha256, options.box, view)
        embedding_D = await self._cached_embedding(encoding, view)
        if embedding_D is None:

            async def encode() -> tuple[RecognizeOptions, Recognition, Float32Array]:
                recognition, embedding_D = await self._pipeline.recognize(image, options, view, self._deadline_s)
                await self._cache.put_embedding(encoding, embedding_D)
                await self._cache.put_answer(key, recognition)
                return options, recognition, embedding_D

            # Concurrent requests for one image encode it once, whatever their options.
            encoded_for, recognition, embedding_D = await self._encodings.run(encoding + view.label, encode)
            if encoded_for == options:
                return recognition
        recognition, _ = await self._pipeline.recognize(embedding_D, options, view)
        await self._cache.put_answer(key, recognition)
        return recognition

    async def _recognize_uncached(
        self, image: bytes | Float32Array, options: RecognizeOptions, view: BundleView, deadline_s: float
    ) -> Recognition:
        """Recognise an image, and its regions if the options ask for them, or an embedding."""
        if options.regions is None or not isinstance(image, bytes):
            recognition, _ = await self._pipeline.recognize(image, options, view, deadline_s)
            return recognition
        return await self._pipeline.recognize_regions(image, options, view, deadline_s, self.settings.region_limit)

    async def _answer_views(
        self, images: Sequence[bytes | UserError], options: RecognizeOptions, view: BundleView, *, cache: bool
    ) -> Recognition:
        """Answer as `recognize_views` does, without the total time. Equal images count once."""
        if options.box is not None or options.explain or options.regions is not None:
            raise BadParameter("several images have one answer; leave out box, explain and regions, or send one image")
        hashed = [(hashlib.sha256(image).hexdigest() if isinstance(image, bytes) else "", image) for image in images]
        # By content, so that rounding does not depend on the order of the images.
        distinct = sorted((each, image) for each, image in dict(hashed).items() if isinstance(image, bytes))
        hashes = [image_sha256 for image_sha256, _ in distinct]
        if cache and (answer := await self._cached_answer(answer_key(hashes, options, view), view)) is not None:
            return answer.model_copy(update={"skipped": _skipped(hashed, {})})
        outcomes = await asyncio.gather(*(self._embed_view(*each, view, cache=cache) for each in distinct))
        pairs = list(zip(hashes, outcomes, strict=True))
        errors = {image_sha256: outcome for image_sha256, outcome in pairs if isinstance(outcome, UserError)}
        embedded = {image_sha256: outcome for image_sha256, outcome in pairs if not isinstance(outcome, UserError)}
        skipped = _skipped(hashed, errors)
        if not embedded:
            raise UndecodableImage(f"none of the {len(images)} images decodes; the first: {skipped[0].detail}")
        embeddings_VD = np.stack([embedding_D for embedding_D, _ in embedded.values()])
        embedding_D = embeddings_VD[0] if len(embedded) == 1 else combined(embeddings_VD)
        recognition, _ = await self._pipeline.recognize(embedding_D, options, view, views=len(embedded))
        if cache:
            await self._cache.put_answer(answer_key(list(embedded), options, view), recognition)
        slowest = max((timings_ms for _, timings_ms in embedded.values()), key=lambda each: sum(each.values()))
        timings = {**recognition.timings_ms, **slowest}
        return recognition.model_copy(update={"cached": not slowest, "skipped": skipped, "timings_ms": timings})

    async def _embed_view(
        self, image_sha256: str, image: bytes, view: BundleView, *, cache: bool
    ) -> tuple[Float32Array, Mapping[str, float]] | UserError:
        """Return what `_embed_image` does, or why the image does not decode."""
        try:
            return await self._embed_image(image, image_sha256, None, view, cache=cache)
        except (UndecodableImage, TooLarge) as error:
            return error.with_traceback(None)  # a traceback would keep the image in memory

    async def edit(self, view: BundleView, change: Callable[[], T]) -> T:
        """Make a change with the editor of `view`, which the caller keeps open.

        Raises what the change raises, or `DeadlineExceeded`: then it may still be made.
        """
        assert view.loaded.editor is not None
        pending = view.loaded.editor.submit(change)
        view.loaded.keep_open(pending)
        try:
            async with asyncio.timeout(self._deadline_s):
                return await asyncio.wrap_future(pending)
        except TimeoutError:
            raise DeadlineExceeded(
                f"the change was not made within {self.settings.deadline_ms} ms, but may still be; check the entity"
            ) from None


def _with_total(recognition: Recognition, total_ms: float) -> Recognition:
    return recognition.model_copy(update={"timings_ms": {**recognition.timings_ms, "total": round(total_ms, 3)}})


def _embedding(embedding_D: Float32Array, view: BundleView) -> Embedding:
    return Embedding(
        embedding=tuple(embedding_D.tolist()),
        dim=len(embedding_D),
        encoder=view.loaded.encoder_hash,
        bundle=view.label,
    )


def _skipped(
    hashed: Sequence[tuple[str, bytes | UserError]], errors: Mapping[str, UserError]
) -> tuple[SkippedImage, ...]:
    """Return the images that are errors or, by their hashes, have one."""
    outcomes = [image if isinstance(image, UserError) else errors.get(sha256) for sha256, image in hashed]
    return tuple(
        SkippedImage(index=index, detail=error.detail) for index, error in enumerate(outcomes) if error is not None
    )


def _checked_embedding(query: EmbeddingQuery, options: RecognizeOptions, view: BundleView) -> Float32Array:
    """Return the embedding of a query [D], of length 1. Raises `BadParameter`, or `Conflict` for another encoder."""
    if options.explain or options.box is not None or options.regions is not None:
        raise BadParameter("an embedding has no pixels; leave out explain, box and regions, or send the image")
    view.loaded.check_encoder(query.encoder)
    embedding_D = read_embedding(query.embedding, view.loaded.bundle.manifest.embedding_dim)
    norm = float(np.linalg.norm(embedding_D))
    # One that was normalised gives the same scores as its image only if it is not changed again.
    return embedding_D if abs(norm - 1) < _NORM_TOLERANCE else embedding_D / np.float32(norm)

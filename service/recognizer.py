"""From image bytes to named entities, without HTTP: what the app serves, a notebook can call.

Shapes: H/W pixels, D embedding width.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Awaitable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Self

import faiss
import numpy as np
import numpy.typing as npt
import orjson

from core.errors import DeadlineExceeded, UserError
from imaging import Preprocessing, load_pixels
from index.bundle import Bundle
from service.admission import Admission
from service.answers import Prediction, Recognition, RecognizeOptions
from service.cache import Cache, SingleFlight, cache_key
from service.encoder import OnnxEncoder
from service.engine import Encoder, Engine, Found
from service.join import Joiner, Ranking
from service.metrics import Metrics
from service.settings import Settings

log = logging.getLogger("wikiclip.recognizer")


class Recognizer:
    """A bundle ready to answer.

    `recognize_many` is for programs and notebooks, `recognize` for one event loop. Close it when done, or use `with`.
    Without an `encoder` the bundle's own is run on ONNX Runtime.
    """

    def __init__(self, bundle: Bundle, settings: Settings, encoder: Encoder | None = None) -> None:
        self.bundle = bundle
        self.settings = settings
        self.metrics = Metrics()
        self.admission = Admission(settings.queue_limit)
        self.store = bundle.store()
        self.model = model_name(bundle)
        self.label = f"{bundle.name}@{bundle.fingerprint}"
        self.preprocessing = Preprocessing.from_dict(bundle.manifest.preprocessing)
        index = bundle.index()
        self._joiner = Joiner(self.store, bundle.calibration, index.entity_count)
        self.encoder = encoder or _open_encoder(bundle, self.preprocessing, settings)
        self._decoders = ThreadPoolExecutor(settings.decode_thread_count, thread_name_prefix="decode")
        self._cache: Cache | None = None
        if settings.cache == "on":
            self._cache = Cache(
                settings.cache_max_bytes,
                settings.redis_url,
                settings.redis_timeout_ms / 1000,
                self.metrics.redis_errors.inc,
            )
        self._flights: SingleFlight[Recognition] = SingleFlight()
        self._engine = Engine(
            self.encoder,
            index,
            max_batch=settings.max_batch,
            queue_limit=settings.queue_limit,
            # OpenMP keeps the number of threads for each calling thread.
            on_start=lambda: faiss.omp_set_num_threads(settings.thread_count),
            on_batch=self.metrics.batch_images.observe,
        )
        self._stuck_after_s = max(10.0, 2 * settings.deadline_ms / 1000)
        self._closing = False

    @classmethod
    def open(cls, bundle_path: Path, settings: Settings | None = None) -> Self:
        """Check and load a bundle. Raises `BundleError`, or `UserError` where the device cannot be had."""
        return cls(Bundle.open(bundle_path), settings or Settings())

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
        if not self._engine.close(self.settings.deadline_ms / 1000):
            log.error("the engine did not stop in %d ms", self.settings.deadline_ms)
            return  # it still uses the store and the index
        self._decoders.shutdown(cancel_futures=True)
        self.store.close()

    async def aclose(self) -> None:
        """`close`, and the connections that belong to the event loop."""
        if self._cache is not None:
            await self._cache.close()
        await asyncio.to_thread(self.close)

    @property
    def not_ready_because(self) -> str | None:
        """Why requests cannot be answered now, None when they can."""
        if self._closing:
            return "the service is stopping"
        if not self._engine.alive:
            return "the engine has died"
        if self._engine.silent_s > self._stuck_after_s:
            return f"the engine has been stuck for {self._engine.silent_s:.0f} s"
        return None

    @property
    def queue_depth(self) -> int:
        return self._engine.depth

    def recognize_many(
        self, images: Sequence[bytes], options: RecognizeOptions | None = None
    ) -> list[Recognition | UserError]:
        """Recognise images in batches, in order. A bad image gives its error in its place and spoils no other."""
        options = options or RecognizeOptions()
        answers: list[Recognition | UserError] = []
        chunk = min(2 * self.settings.max_batch, self.settings.queue_limit)
        for start in range(0, len(images), chunk):
            answers += self._recognize_chunk(images[start : start + chunk], options)
        return answers

    async def recognize(self, data: bytes, options: RecognizeOptions) -> Recognition:
        """Recognise one image, through the cache. The caller has been admitted.

        Raises `UndecodableImage`, `TooLarge`, `BadParameter`, `DeadlineExceeded`, `Unavailable`. Cancelling it drops
        the work, unless someone else waits for the same.
        """
        started_at = time.monotonic()
        try:
            async with asyncio.timeout(self.settings.deadline_ms / 1000):
                if self._cache is None:
                    recognition = await self._compute(data, options)
                else:
                    recognition = await self._through_cache(self._cache, data, options)
        except TimeoutError:
            raise DeadlineExceeded(
                f"no answer within {self.settings.deadline_ms} ms; try again later or with fewer images at a time"
            ) from None
        total_ms = 1000 * (time.monotonic() - started_at)
        self.metrics.observe_stages(dict(recognition.timings_ms))
        return replace(recognition, timings_ms={**recognition.timings_ms, "total": total_ms})

    async def _through_cache(self, cache: Cache, data: bytes, options: RecognizeOptions) -> Recognition:
        image_sha256 = hashlib.sha256(data).hexdigest()
        fingerprint = self.bundle.fingerprint
        embedding_key = cache_key("embedding", image_sha256, fingerprint, repr(options.box))
        answer_key = cache_key("answer", image_sha256, fingerprint, repr(options))
        kept = _read_answer(await cache.get(answer_key))
        if kept is not None:
            self.metrics.cache_lookups.labels("answer").inc()
            return kept

        async def work() -> Recognition:
            embedding_D = self._read_embedding(await cache.get(embedding_key))
            self.metrics.cache_lookups.labels("miss" if embedding_D is None else "embedding").inc()
            recognition, found = await self._compute_found(data, options, embedding_D)
            if embedding_D is None:
                await cache.put(embedding_key, found.embedding_D.astype("<f4").tobytes())
            await cache.put(answer_key, _write_answer(recognition))
            return recognition

        return await self._flights.run(answer_key, work)

    async def _compute(self, data: bytes, options: RecognizeOptions) -> Recognition:
        recognition, _ = await self._compute_found(data, options, None)
        return recognition

    async def _compute_found(
        self, data: bytes, options: RecognizeOptions, embedding_D: npt.NDArray[np.float32] | None
    ) -> tuple[Recognition, Found]:
        timings_ms: dict[str, float] = {}
        top_k = self._joiner.first_top_k(options)
        if embedding_D is None:
            pixels_HW3, timings_ms["decode"] = await self._in_pool(self._decode, data, options)
            found = await asyncio.wrap_future(self._engine.submit(pixels_HW3, top_k))
        else:
            found = await asyncio.wrap_future(self._engine.search(embedding_D, top_k))
        _add_engine_time(timings_ms, found)
        while isinstance(ranking := await self._in_pool(self._joiner.join, found, options, top_k), int):
            top_k = ranking
            found = await asyncio.wrap_future(self._engine.search(found.embedding_D, top_k))
            _add_engine_time(timings_ms, found)
        return self._recognition(ranking, timings_ms, cached=embedding_D is not None), found

    def _recognize_chunk(self, images: Sequence[bytes], options: RecognizeOptions) -> list[Recognition | UserError]:
        decoding = [self._decoders.submit(self._decode, data, options) for data in images]
        top_k = self._joiner.first_top_k(options)
        engaged: list[tuple[Future[Found], float] | UserError] = []
        for decoded in decoding:
            try:
                pixels_HW3, decode_ms = decoded.result()
                engaged.append((self._engine.submit(pixels_HW3, top_k), decode_ms))
            except UserError as error:
                engaged.append(error)
        return [item if isinstance(item, UserError) else self._finish(*item, options, top_k) for item in engaged]

    def _finish(self, pending: Future[Found], decode_ms: float, options: RecognizeOptions, top_k: int) -> Recognition:
        found = pending.result()
        timings_ms = {"decode": decode_ms}
        _add_engine_time(timings_ms, found)
        while isinstance(ranking := self._joiner.join(found, options, top_k), int):
            top_k = ranking
            found = self._engine.search(found.embedding_D, top_k).result()
            _add_engine_time(timings_ms, found)
        timings_ms["total"] = sum(timings_ms.values())
        return self._recognition(ranking, timings_ms, cached=False)

    def _decode(self, data: bytes, options: RecognizeOptions) -> tuple[npt.NDArray[np.uint8], float]:
        started_at = time.monotonic()
        pixels_HW3 = load_pixels(data, self.preprocessing, max_pixels=self.settings.max_pixels, box=options.box)
        return pixels_HW3, 1000 * (time.monotonic() - started_at)

    async def _in_pool(self, call: Any, *arguments: Any) -> Any:
        pending: Awaitable[Any] = asyncio.get_running_loop().run_in_executor(self._decoders, call, *arguments)
        return await pending

    def _recognition(self, ranking: Ranking, timings_ms: dict[str, float], *, cached: bool) -> Recognition:
        return Recognition(
            model=self.model,
            bundle=self.label,
            cached=cached,
            abstained=ranking.abstained,
            predictions=ranking.predictions,
            timings_ms=timings_ms,
        )

    def _read_embedding(self, value: bytes | None) -> npt.NDArray[np.float32] | None:
        """An embedding from the cache, None unless it is whole: Redis may hold anything."""
        if value is None or len(value) != 4 * self.bundle.manifest.embedding_dim:
            return None
        embedding_D = np.frombuffer(value, "<f4").astype(np.float32)
        return embedding_D if np.isfinite(embedding_D).all() else None


def _open_encoder(bundle: Bundle, preprocessing: Preprocessing, settings: Settings) -> OnnxEncoder:
    entry = bundle.manifest.image_encoder
    return OnnxEncoder(
        bundle.image_encoder_path,
        preprocessing,
        input_name=entry.input,
        embedding_name=entry.outputs[1],
        embedding_dim=bundle.manifest.embedding_dim,
        device=settings.device,
        threads=settings.thread_count,
    )


def model_name(bundle: Bundle) -> str:
    """What answers call the model: `name` in the manifest's `model`, else its image encoder's spec without a path."""
    model = bundle.manifest.model
    return str(model.get("name") or Path(str(model.get("image_encoder", "unknown"))).name)


def _add_engine_time(timings_ms: dict[str, float], found: Found) -> None:
    timings_ms["queue"] = timings_ms.get("queue", 0.0) + found.queue_ms
    if found.encode_ms is not None:
        timings_ms["encode"] = found.encode_ms
    timings_ms["search"] = timings_ms.get("search", 0.0) + found.search_ms


def _write_answer(recognition: Recognition) -> bytes:
    return orjson.dumps({**asdict(recognition), "cached": True, "timings_ms": {}})


def _read_answer(value: bytes | None) -> Recognition | None:
    """An answer from the cache, None unless it is whole: Redis may hold anything."""
    if value is None:
        return None
    try:
        content = orjson.loads(value)
        predictions = tuple(Prediction(**{**p, "types": tuple(p["types"])}) for p in content["predictions"])
        return Recognition(**{**content, "predictions": predictions})
    except (ValueError, TypeError, KeyError, AttributeError):
        log.warning("an answer in the cache is damaged: computing it anew")
        return None

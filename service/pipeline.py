"""One image from bytes to an answer: decode, encode, search, rank, and the same for its regions.

Shapes: H/W pixels, D embedding width.
"""

import asyncio
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from core.arrays import Float32Array, Pixels
from core.errors import BadParameter
from core.runtime import Pool
from imaging import Decoder
from service.engine import Found
from service.loaded_bundle import BundleView
from service.ranking import timings_ms
from service.regions import choose, propose
from service.telemetry import record_stages
from wikiclip.answers import Box, Recognition, RecognizeOptions

_LOOKUP_THREADS = 2
_WHOLE: Box = (0.0, 0.0, 1.0, 1.0)

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class PipelineResult:
    """What one image, or one embedding, led to.

    `stages` maps `decode`, `queue`, `encode`, `search` and `join` (names and confidence), as far as they took place, to
    start and end, by `time.monotonic`.
    """

    recognition: Recognition
    embedding_D: Float32Array
    stages: Mapping[str, tuple[float, float]]


class RecognitionPipeline:
    """A decoder, and a thread pool for the entity store, around the engine of a bundle.

    The entity store has its own pool, so that a lookup does not wait for all queued images to be decoded.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._lookup_pool = Pool(_LOOKUP_THREADS, "lookup")

    async def run(
        self,
        image: bytes | Pixels | Float32Array,
        options: RecognizeOptions,
        view: BundleView,
        deadline_s: float = math.inf,
        views: int = 1,
    ) -> PipelineResult:
        """Recognise an image, pixels [H, W, 3] or an embedding [D], which may combine several `views` of one thing.

        The decoder refuses an image that would miss the deadline.

        Cancelling it drops stages that have not begun. Raises what a stage raises, for example `UndecodableImage`, and
        `BadParameter` if the bundle cannot explain.
        """
        if options.explain and not view.loaded.bundle.manifest.image_encoder.has_patch_tokens:
            raise BadParameter("this bundle's image encoder has no patch tokens to explain with; leave out explain")
        with view.loaded.in_use():
            ranker = view.ranker
            selection = await self._lookup(view, lambda: ranker.selection(options)) if options.types else None
            region: Box | None = None
            stages: dict[str, tuple[float, float]] = {}
            query: Pixels | Float32Array
            if isinstance(image, bytes):
                query, region, stages["decode"] = await self._decoder.load_region(
                    image, view.loaded.preprocessing, options.box, deadline_s=deadline_s
                )
            else:
                query = image
            found = await asyncio.wrap_future(
                view.loaded.engine.submit(
                    query,
                    ranker.top_k(options),
                    selection,
                    view.entities,
                    unfiltered=ranker.needs_unfiltered_scores(options),
                    explain=options.explain,
                )
            )
            found = replace(found, stages={**stages, **found.stages})
            join_started_at = time.monotonic()
            if ranker.needs_file_access(found, options):
                recognition = await self._lookup(view, lambda: ranker.rank(found, options, region, views))
            else:
                recognition = ranker.rank(found, options, views=views)
            stages = {**found.stages, "join": (join_started_at, time.monotonic())}
            return PipelineResult(recognition=recognition, embedding_D=found.embedding_D, stages=stages)

    async def embed(self, image: bytes, box: Box | None, view: BundleView, deadline_s: float) -> Found:
        """Encode an image without a search. Cancels and raises as `run` does."""
        with view.loaded.in_use():
            pixels_HW3, _, decode = await self._decoder.load_region(
                image, view.loaded.preprocessing, box, deadline_s=deadline_s
            )
            found = await asyncio.wrap_future(view.loaded.engine.submit(pixels_HW3, 0))
            return replace(found, stages={"decode": decode, **found.stages})

    async def recognize(
        self,
        query: bytes | Float32Array,
        options: RecognizeOptions,
        view: BundleView,
        deadline_s: float = math.inf,
        views: int = 1,
    ) -> tuple[Recognition, Float32Array]:
        """Return the answer to a query, and its embedding [D]. Raises as `run` does."""
        result = await self.run(query, options, view, deadline_s, views)
        record_stages(result.stages)
        return result.recognition, result.embedding_D

    async def recognize_regions(
        self, image: bytes, options: RecognizeOptions, view: BundleView, deadline_s: float, limit: int
    ) -> Recognition:
        """Recognise an image, and up to `limit` regions of it. Raises as `run` does, and `BadParameter`."""
        if not view.loaded.bundle.manifest.image_encoder.has_patch_tokens:
            raise BadParameter("this bundle's image encoder has no patch tokens to find things with; leave out regions")
        if options.box is not None:
            raise BadParameter("box is one region and regions finds them; leave out one of the two")
        whole = await self.run(image, options, view, deadline_s)
        record_stages(whole.stages)
        started_at = time.monotonic()
        proposed = [] if limit == 0 else await self._propose(image, view, deadline_s, limit)
        unexplained = options.model_copy(update={"explain": False})
        results = await asyncio.gather(
            *(self.run(pixels_HW3, unexplained, view, deadline_s) for _, pixels_HW3 in proposed)
        )
        stages = {"regions": (started_at, time.monotonic())}
        record_stages(stages)
        answers = [(box, each.recognition) for (box, _), each in zip(proposed, results, strict=True)]
        regions = choose([(_WHOLE, whole.recognition), *answers])
        timings = {**whole.recognition.timings_ms, **timings_ms(stages)}
        return whole.recognition.model_copy(update={"regions": regions, "timings_ms": timings})

    async def _propose(self, image: bytes, view: BundleView, deadline_s: float, limit: int) -> list[tuple[Box, Pixels]]:
        """Return up to `limit` squares that may show one thing each, and their pixels."""
        with view.loaded.in_use():
            preprocessing = view.loaded.preprocessing
            pixels_HW3, _, _ = await self._decoder.load_region(image, preprocessing.whole(), deadline_s=deadline_s)
            encodings = (
                asyncio.wrap_future(view.loaded.engine.submit(each_HW3, 0, explain=True))
                for each_HW3 in (pixels_HW3, pixels_HW3[::-1, ::-1])
            )
            upright, turned = await asyncio.gather(*encodings)
            assert upright.patch_tokens_PC is not None
            assert turned.patch_tokens_PC is not None
            find = partial(propose, upright.patch_tokens_PC, turned.patch_tokens_PC, limit)
            boxes = await self._lookup(view, find)
            if not boxes:
                return []
            return await self._decoder.load_squares(image, preprocessing, boxes, deadline_s=deadline_s)

    def stuck_reason(self, after_s: float) -> str | None:
        """Return which threads have been stuck for longer than `after_s`, None if there are free ones of each kind."""
        stuck = {"decoders": self._decoder.stuck_s, "lookups of entities": self._lookup_pool.stuck_s}
        for threads, stuck_s in stuck.items():
            if stuck_s > after_s:
                return f"all {threads} have been stuck for {stuck_s:.0f} s"
        return None

    def close(self) -> None:
        """Finish the stages that are running or queued, then stop."""
        self._decoder.close()
        self._lookup_pool.close()

    async def _lookup(self, view: BundleView, work: Callable[[], T]) -> T:
        """Run `work` in the lookup pool. The bundle stays open until it ends, even if the caller is cancelled."""
        pending = self._lookup_pool.submit(work)
        view.loaded.keep_open(pending)
        try:
            return await asyncio.wrap_future(pending)
        finally:
            del pending, work  # an exception refers to this frame, and the future to the exception: a reference cycle

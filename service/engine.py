"""The one thread that runs the image encoder and searches the index.

Shapes: B batch, H/W pixels, P patches, C patch channels, D embedding width, K results.
"""

import logging
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from core.arrays import Float32Array, Int64Array, Pixels, Queries
from core.errors import TooManyRequests, Unavailable
from index.overlay import EntityView
from index.store import Selection

_IDLE_WAKE_S = 1.0
_MAX_DEATHS_IN_A_ROW = 3
_MAX_SHARED_TOP_K = 128  # a job that wants more results is searched alone, because it would slow the others down

Scalar = TypeVar("Scalar", bound=np.generic)

log = logging.getLogger("wikiclip.engine")


class Encoder(Protocol):
    device: str
    heat_maps: bool  # whether patch tokens can be compared with entities

    def encode(self, pixels_BHW3: Pixels) -> Queries: ...

    def patch_tokens(self, pixels_BHW3: Pixels) -> Float32Array: ...


@dataclass(frozen=True, kw_only=True)
class Found:
    """The result of one job: the query embedding, and entity rows with their cosines, best first.

    `stages` maps `queue`, `encode` (images only) and `search` to start and end, by `time.monotonic`.
    `unfiltered_scores` are the best cosines without the selection, `patch_tokens_PC` the patches of the image; both are
    None unless the job asked for them.
    """

    embedding_D: Float32Array
    rows: Int64Array
    scores: Float32Array
    stages: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    unfiltered_scores: Float32Array | None = None
    patch_tokens_PC: Float32Array | None = None


@dataclass(kw_only=True, eq=False)
class _Job:
    pixels_HW3: Pixels | None  # None for a query that is an embedding
    embedding_D: Float32Array | None  # None for an image until its batch is done
    top_k: int
    selection: Selection | None
    index: EntityView
    unfiltered: bool
    explain: bool
    future: Future[Found] = field(default_factory=Future)
    queued_at: float = field(default_factory=time.monotonic)
    isolated: bool = False  # it was in a batch that killed the thread, so it runs in a batch of its own
    patch_tokens_PC: Float32Array | None = None
    unfiltered_scores_K: Float32Array | None = None


class Engine:
    """A bounded queue and the thread that processes it in batches.

    As soon as the thread is free, it takes what is queued, up to `max_batch`. A job leaves the queue when its future is
    cancelled.
    If a batch fails, its jobs are retried one by one, so that only the bad one fails. If the thread dies, a new thread
    retries the jobs of that batch one by one. After three deaths in a row the engine stops for good.
    """

    def __init__(
        self,
        encoder: Encoder,
        index: EntityView,
        *,
        max_batch: int,
        queue_limit: int,
        on_start: Callable[[], None] = lambda: None,
        on_batch: Callable[[int], None] = lambda size: None,
        on_death: Callable[[], None] = lambda: None,
    ) -> None:
        self._encoder = encoder
        self._index = index
        self._max_batch = max_batch
        self._queue_limit = queue_limit
        self._on_start = on_start
        self._on_batch = on_batch
        self._on_death = on_death
        self._queue: deque[_Job] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._last_sign_of_life = time.monotonic()
        self._deaths_in_a_row = 0
        self._start_thread()

    @property
    def depth(self) -> int:
        """Return how many jobs are queued."""
        return len(self._queue)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def silent_s(self) -> float:
        """Return the seconds since the thread last started a batch or, when idle, woke up."""
        return time.monotonic() - self._last_sign_of_life

    def submit(
        self,
        query: npt.NDArray[Any],
        top_k: int,
        selection: Selection | None = None,
        index: EntityView | None = None,
        *,
        unfiltered: bool = False,
        explain: bool = False,
    ) -> Future[Found]:
        """Search for an image, uint8 [H, W, 3], which is encoded first, or for an embedding, float32 [D].

        With a `top_k` of 0 an image is only encoded. `index` is the revision of the index to search, by default the
        engine's own. `unfiltered` adds the best scores without the selection, `explain` the patch tokens of an image (a
        second pass of the encoder). Raises `TooManyRequests` if the queue is full, `Unavailable` if the engine is
        closed.
        """
        is_image = query.ndim == 3
        job = _Job(
            pixels_HW3=query if is_image else None,
            embedding_D=None if is_image else query,
            top_k=top_k,
            selection=selection,
            index=index or self._index,
            unfiltered=unfiltered,
            explain=explain,
        )
        with self._wake:
            if self._closing or not self._thread.is_alive():
                raise Unavailable("the service is stopping or its engine has died; retry later or elsewhere")
            if len(self._queue) >= self._queue_limit:
                raise TooManyRequests(f"{len(self._queue)} images are waiting; retry later", retry_after_s=1)
            self._queue.append(job)
            self._wake.notify()
        job.future.add_done_callback(self._drop_if_cancelled)
        return job.future

    def _drop_if_cancelled(self, future: Future[Found]) -> None:
        if future.cancelled():
            with self._wake:
                for job in self._queue:
                    if job.future is future:
                        self._queue.remove(job)
                        return

    def close(self, timeout_s: float) -> bool:
        """Accept no more jobs, finish those accepted and stop. Return False if that takes longer than `timeout_s`."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        deadline = time.monotonic() + timeout_s
        while True:
            thread = self._thread
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread is self._thread:  # otherwise it died and a new thread finishes its work
                return not thread.is_alive()

    def _start_thread(self) -> None:
        thread = threading.Thread(target=self._run, name="engine", daemon=True)
        thread.start()
        self._thread = thread  # after its start, so that `alive` never reports a thread that has not started

    def _run(self) -> None:
        batch: list[_Job] = []
        try:
            self._on_start()
            while True:
                batch = self._take()
                if batch:
                    self._serve(batch)
                    self._deaths_in_a_row = 0
                elif self._closing and not self._queue:  # in this order: once closing, the queue only shrinks
                    return
        except BaseException:
            # The thread has no caller to raise to.
            log.critical("the engine thread dies of a batch of %d", len(batch), exc_info=True)
            self._on_death()
            self._recover(batch)

    def _recover(self, batch: list[_Job]) -> None:
        """Queue the jobs of the batch that killed this thread again and start the next thread, or stop for good."""
        unfinished = [job for job in batch if not job.future.done()]
        with self._wake:
            if len(unfinished) == 1 and unfinished[0].isolated:
                self._deaths_in_a_row += 1
                unfinished.pop().future.set_exception(RuntimeError("the engine thread died of this image"))
            for job in reversed(unfinished):
                job.isolated = True
                self._queue.appendleft(job)
            if batch and self._deaths_in_a_row < _MAX_DEATHS_IN_A_ROW:
                self._start_thread()
                return
            self._closing = True
            waiting = [job for job in self._queue if job.isolated or job.future.set_running_or_notify_cancel()]
            self._queue.clear()
        for job in waiting:
            job.future.set_exception(Unavailable("the engine has died; retry later or elsewhere"))

    def _take(self) -> list[_Job]:
        """Return the next batch. It is empty if the engine closes or is idle for a while."""
        batch: list[_Job] = []
        with self._wake:
            self._last_sign_of_life = time.monotonic()
            if not self._queue and not self._closing:
                self._wake.wait(_IDLE_WAKE_S)
                self._last_sign_of_life = time.monotonic()
            while self._queue and len(batch) < self._max_batch:
                if batch and (batch[0].isolated or self._queue[0].isolated):
                    break
                job = self._queue.popleft()
                if job.isolated or job.future.set_running_or_notify_cancel():
                    batch.append(job)
        return batch

    def _serve(self, batch: list[_Job]) -> None:
        try:
            self._process(batch)
        except Exception as error:
            if len(batch) == 1:
                # The error refers to these frames, and they refer to the job: with its future a reference cycle.
                traceback.clear_frames(error.__traceback__)
                batch.pop().future.set_exception(error)
                return
            log.warning("a batch of %d failed (%s): retrying its images one by one", len(batch), error)
            for job in batch:
                self._last_sign_of_life = time.monotonic()
                self._serve([job])

    def _process(self, batch: Sequence[_Job]) -> None:
        started_at = time.monotonic()
        images = [job for job in batch if job.pixels_HW3 is not None]
        encoded_BD = self._encode(images)
        encoded_at = time.monotonic()

        def search(group: Sequence[_Job], selection: Selection | None) -> tuple[Int64Array, Float32Array]:
            queries_BD = encoded_BD if group == images else _stack([embedding_of(job) for job in group])
            return group[0].index.search(queries_BD, max(job.top_k for job in group), selection=selection)

        def embedding_of(job: _Job) -> Float32Array:
            """Return a job's embedding [D]. Of an image, it is copied from the device."""
            if job.embedding_D is None:
                job.embedding_D = np.asarray(encoded_BD)[images.index(job)]
            return job.embedding_D

        for group in _search_groups([job for job in batch if job.unfiltered], by_selection=False):
            _, scores_BK = search(group, None)
            for job, scores_K in zip(group, scores_BK, strict=True):
                job.unfiltered_scores_K = scores_K[: job.top_k]
        results: list[tuple[_Job, Found]] = []
        for job in (job for job in batch if job.top_k == 0):
            stages = {"queue": (job.queued_at, started_at), "encode": (started_at, encoded_at)}
            rows, scores = np.empty(0, np.int64), np.empty(0, np.float32)
            encoded = Found(
                embedding_D=embedding_of(job),
                rows=rows,
                scores=scores,
                stages=stages,
                patch_tokens_PC=job.patch_tokens_PC,
            )
            results.append((job, encoded))
        for group in _search_groups([job for job in batch if job.top_k > 0]):
            search_started_at = time.monotonic()
            rows_BK, scores_BK = search(group, group[0].selection)
            search_took = (search_started_at, time.monotonic())
            for job, rows_K, scores_K in zip(group, rows_BK, scores_BK, strict=True):
                found_K = rows_K[: job.top_k] >= 0
                stages = {"queue": (job.queued_at, started_at)}
                if job.pixels_HW3 is not None:
                    stages["encode"] = (started_at, encoded_at)
                found = Found(
                    embedding_D=embedding_of(job),
                    rows=rows_K[: job.top_k][found_K],
                    scores=scores_K[: job.top_k][found_K],
                    stages={**stages, "search": search_took},
                    unfiltered_scores=job.unfiltered_scores_K,
                    patch_tokens_PC=job.patch_tokens_PC,
                )
                results.append((job, found))
        # Last, when nothing can fail any more: a future is set once.
        for job, found in results:
            job.future.set_result(found)

    def _encode(self, images: Sequence[_Job]) -> Queries:
        """Return the embeddings of some images, and keep the patch tokens of those that are to be explained."""
        if not images:
            return np.empty((0, 0), np.float32)
        embeddings_BD = self._encoder.encode(_stack([job.pixels_HW3 for job in images]))
        self._on_batch(len(images))
        to_explain = [job for job in images if job.explain]
        if to_explain:
            patch_tokens_BPC = self._encoder.patch_tokens(_stack([job.pixels_HW3 for job in to_explain]))
            for job, patch_tokens_PC in zip(to_explain, patch_tokens_BPC, strict=True):
                job.patch_tokens_PC = patch_tokens_PC
        return embeddings_BD


def _stack(arrays: Sequence[npt.NDArray[Scalar] | None]) -> npt.NDArray[Scalar]:
    """Stack arrays, a single one without copying it."""
    present = [array for array in arrays if array is not None]
    return present[0][None] if len(present) == 1 else np.stack(present)


def _search_groups(batch: Sequence[_Job], *, by_selection: bool = True) -> list[list[_Job]]:
    """Group the jobs that one search can answer: those of one index and one selection, except with a large `top_k`."""
    shared: dict[tuple[int, Selection | None], list[_Job]] = {}
    alone: list[list[_Job]] = []
    for job in batch:
        if job.top_k <= _MAX_SHARED_TOP_K:
            shared.setdefault((id(job.index), job.selection if by_selection else None), []).append(job)
        else:
            alone.append([job])
    return [*shared.values(), *alone]

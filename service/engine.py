"""The one thread that owns the image encoder and the index.

Shapes: B batch, H/W pixels, D embedding width, K results.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from core.errors import TooManyRequests, Unavailable
from index.store import Selection

_IDLE_BEAT_S = 1.0
_DEATHS_IN_A_ROW = 3
_SEARCHED_TOGETHER = 128  # a job that wants more results than this is searched alone: it would slow the others

Scalar = TypeVar("Scalar", bound=np.generic)

log = logging.getLogger("wikiclip.engine")


class Encoder(Protocol):
    device: str

    def encode(self, pixels_BHW3: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]: ...

    def patch_tokens(self, pixels_BHW3: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]: ...


class Index(Protocol):
    def search(
        self, query_embeddings_BD: npt.NDArray[np.float32], top_k: int, *, selection: Selection | None
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]: ...


@dataclass(frozen=True, kw_only=True)
class Found:
    """What one job gave: the query embedding, entity rows with cosines (falling), and where the time went.

    `stages` has when `queue`, `encode` (not of a job that was a search only) and `search` began and ended, by
    `time.monotonic`. `unfiltered_scores` are the best cosines of the whole catalog, where they were asked for.
    """

    embedding_D: npt.NDArray[np.float32]
    rows: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]
    stages: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    unfiltered_scores: npt.NDArray[np.float32] | None = None
    patch_tokens_PC: npt.NDArray[np.float32] | None = None  # only where it was submitted with `explain`


@dataclass(kw_only=True, eq=False)
class _Job:
    pixels_HW3: npt.NDArray[np.uint8] | None
    embedding_D: npt.NDArray[np.float32] | None
    top_k: int
    selection: Selection | None
    index: Index
    unfiltered: bool = False
    explain: bool = False
    alone: bool = False  # taken before, in a batch that the thread died of: whichever it was, the next dies by itself
    future: Future[Found]
    queued_at: float = field(default_factory=time.monotonic)


class Engine:
    """A bounded queue and the thread that empties it.

    The thread takes what is there, up to `max_batch`, as soon as it is free: while it works the queue fills, and that
    is the batching. A job whose future was cancelled (the client went, or its deadline passed) is dropped unprocessed.
    If a batch fails its jobs are tried one by one, so one bad item fails alone. The same holds where the thread dies of
    a batch: another takes its place and tries each job once more, by itself; only one that kills it again fails. After
    three such in a row, none answered between, the engine is given up.
    """

    def __init__(
        self,
        encoder: Encoder,
        index: Index,
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
        self._beat = time.monotonic()
        self._deaths_in_a_row = 0
        self._start_thread()

    @property
    def depth(self) -> int:
        """Jobs waiting."""
        return len(self._queue)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def silent_s(self) -> float:
        """Seconds since the thread last showed that it moves; it does so between batches and while idle."""
        return time.monotonic() - self._beat

    def submit(
        self,
        pixels_HW3: npt.NDArray[np.uint8],
        top_k: int,
        selection: Selection | None = None,
        index: Index | None = None,
        *,
        unfiltered: bool = False,
        explain: bool = False,
        future: Future[Found] | None = None,
    ) -> Future[Found]:
        """Encode, and search among what `selection` allows; `index` is one state of the engine's own, to search that.

        With `unfiltered`, also find the best scores without the selection. With `explain`, also compute the patch
        tokens, which takes a second pass of the encoder. A given `future` is the one returned, so the caller can cancel
        it before this method returns.

        Raises `TooManyRequests` if the queue is full, `Unavailable` if the engine is closed.
        """
        index = index or self._index
        return self._put(
            _Job(
                pixels_HW3=pixels_HW3,
                embedding_D=None,
                top_k=top_k,
                selection=selection,
                index=index,
                unfiltered=unfiltered,
                explain=explain,
                future=future or Future(),
            )
        )

    def search(
        self,
        embedding_D: npt.NDArray[np.float32],
        top_k: int,
        selection: Selection | None = None,
        index: Index | None = None,
        *,
        unfiltered: bool = False,
        future: Future[Found] | None = None,
    ) -> Future[Found]:
        """Search only, for an embedding that is known. `future` and what it raises are as with `submit`."""
        return self._put(
            _Job(
                pixels_HW3=None,
                embedding_D=embedding_D,
                top_k=top_k,
                selection=selection,
                index=index or self._index,
                unfiltered=unfiltered,
                future=future or Future(),
            )
        )

    def close(self, timeout_s: float) -> bool:
        """Take no more, finish what was taken, and stop. False if that took longer than `timeout_s`."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        until = time.monotonic() + timeout_s
        while True:
            thread = self._thread
            thread.join(max(0.0, until - time.monotonic()))
            if thread is self._thread:  # else it died meanwhile, and another finishes its work
                return not thread.is_alive()

    def _start_thread(self) -> None:
        thread = threading.Thread(target=self._run, name="engine", daemon=True)
        thread.start()
        self._thread = thread  # only now: whoever asks meanwhile whether it is alive asks about the one before

    def _put(self, job: _Job) -> Future[Found]:
        with self._wake:
            if self._closing or not self._thread.is_alive():
                raise Unavailable("the service is stopping or its engine has died; try again later or elsewhere")
            if len(self._queue) >= self._queue_limit:
                raise TooManyRequests(f"{len(self._queue)} images are waiting; try again later", retry_after_s=1)
            self._queue.append(job)
            self._wake.notify()
        return job.future

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
            # Nothing is above this to raise to: what must go on goes on in another thread.
            log.critical("the engine thread dies of a batch of %d", len(batch), exc_info=True)
            self._on_death()
            self._bury(batch)

    def _bury(self, batch: list[_Job]) -> None:
        """Settle what the thread that dies leaves behind, and start the next one unless that is of no use."""
        left = [job for job in batch if not job.future.done()]
        with self._wake:
            if len(left) == 1 and left[0].alone:
                self._deaths_in_a_row += 1
                left.pop().future.set_exception(RuntimeError("the engine thread died of this image"))
            for job in reversed(left):
                job.alone = True
                self._queue.appendleft(job)
            if batch and self._deaths_in_a_row < _DEATHS_IN_A_ROW:
                self._start_thread()
                return
            self._closing = True
            waiting = [job for job in self._queue if job.alone or job.future.set_running_or_notify_cancel()]
            self._queue.clear()
        for job in waiting:
            job.future.set_exception(Unavailable("the engine has died; try again later or elsewhere"))

    def _take(self) -> list[_Job]:
        """The next batch, empty when the engine closes or nothing came for a while. Dropped jobs cost nothing."""
        batch: list[_Job] = []
        with self._wake:
            self._beat = time.monotonic()
            if not self._queue and not self._closing:
                self._wake.wait(_IDLE_BEAT_S)
                self._beat = time.monotonic()
            while self._queue and len(batch) < self._max_batch:
                if batch and (batch[0].alone or self._queue[0].alone):
                    break
                job = self._queue.popleft()
                if job.alone or job.future.set_running_or_notify_cancel():
                    batch.append(job)
        return batch

    def _serve(self, batch: list[_Job]) -> None:
        try:
            self._process(batch)
        except Exception as error:
            if len(batch) == 1:
                batch[0].future.set_exception(error)
                return
            log.warning("a batch of %d failed (%s): trying one by one", len(batch), error)
            for job in batch:
                self._beat = time.monotonic()
                self._serve([job])

    def _process(self, batch: Sequence[_Job]) -> None:
        started_at = time.monotonic()
        to_encode = [job for job in batch if job.embedding_D is None]
        embeddings: dict[int, npt.NDArray[np.float32]] = {}
        if to_encode:
            encoded_BD = self._encoder.encode(
                _stacked([job.pixels_HW3 for job in to_encode if job.pixels_HW3 is not None])
            )
            embeddings = {id(job): encoded_BD[place] for place, job in enumerate(to_encode)}
            self._on_batch(len(to_encode))
        explained = [job for job in to_encode if job.explain]
        patch_tokens: dict[int, npt.NDArray[np.float32]] = {}
        if explained:
            tokens_BPC = self._encoder.patch_tokens(
                _stacked([job.pixels_HW3 for job in explained if job.pixels_HW3 is not None])
            )
            patch_tokens = {id(job): tokens_BPC[place] for place, job in enumerate(explained)}
        encoded_at = time.monotonic()
        queries = embeddings | {id(job): job.embedding_D for job in batch if job.embedding_D is not None}
        unfiltered: dict[int, npt.NDArray[np.float32]] = {}
        for group in _search_groups([job for job in batch if job.unfiltered], selected=False):
            _, scores_BK = group[0].index.search(
                _stacked([queries[id(job)] for job in group]), max(job.top_k for job in group), selection=None
            )
            unfiltered |= {id(job): scores_K[: job.top_k] for job, scores_K in zip(group, scores_BK, strict=True)}
        results: list[tuple[_Job, Found]] = []
        for group in _search_groups(batch):
            queries_BD = _stacked([queries[id(job)] for job in group])
            began_at = time.monotonic()
            rows_BK, scores_BK = group[0].index.search(
                queries_BD, max(job.top_k for job in group), selection=group[0].selection
            )
            search = (began_at, time.monotonic())
            for place, job in enumerate(group):
                found_K = rows_BK[place, : job.top_k] >= 0
                found = Found(
                    embedding_D=queries_BD[place],
                    rows=rows_BK[place, : job.top_k][found_K],
                    scores=scores_BK[place, : job.top_k][found_K],
                    stages={
                        "queue": (job.queued_at, started_at),
                        **({"encode": (started_at, encoded_at)} if job.embedding_D is None else {}),
                        "search": search,
                    },
                    unfiltered_scores=unfiltered.get(id(job)),
                    patch_tokens_PC=patch_tokens.get(id(job)),
                )
                results.append((job, found))
        # Only now, when nothing can fail any more: a job has one outcome.
        for job, found in results:
            job.future.set_result(found)


def _stacked(arrays: Sequence[npt.NDArray[Scalar]]) -> npt.NDArray[Scalar]:
    """`np.stack`, without a copy of what is alone."""
    return arrays[0][None] if len(arrays) == 1 else np.stack(arrays)


def _search_groups(batch: Sequence[_Job], *, selected: bool = True) -> list[list[_Job]]:
    """Jobs of one state and one selection (whichever, if not `selected`) are searched together, but for those that want
    many results."""
    together: dict[tuple[int, Selection | None], list[_Job]] = {}
    alone: list[list[_Job]] = []
    for job in batch:
        if job.top_k <= _SEARCHED_TOGETHER:
            together.setdefault((id(job.index), job.selection if selected else None), []).append(job)
        else:
            alone.append([job])
    return [*together.values(), *alone]

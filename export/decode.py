"""The images of entities, read and decoded in worker processes: no torch here, for each worker imports this module.

A file that takes its worker down with it (a decoder that crashes, memory that runs out) is rejected like any other that
does not decode, and nothing else is lost. Shapes: H = W = size_px.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import islice
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from catalog.images import ImageReader, UnusableImage
from core.errors import TooLarge, UndecodableImage
from core.runtime import usable_cores
from imaging import Preprocessing, load_pixels, make_thumbnail

# A catalog is its operator's own: this only keeps one absurd file from taking all memory.
MAX_PIXELS = 200_000_000
HASH_BYTES = 16
_ENTITIES_PER_JOB = 8
_JOBS_AHEAD = 3  # of each worker
_NICENESS = 19  # of workers: what the models need of the cores comes first, and they wait for each other at each step

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class ImageJob:
    """The images of one entity. A bundle that has it knows its content by `known_hash`, with `known_images` in use."""

    images: Sequence[str]
    text_hash: bytes
    known_hash: bytes = b""
    known_images: int = 0


@dataclass(frozen=True, kw_only=True)
class DecodedImages:
    """What came of an entity's images: `pixels` uint8 [H, W, 3] of each that can be used, `failures` of the others.

    `content_hash` is that of text and images together, empty where it cannot be told. An entity that is `unchanged`
    has not been decoded.
    """

    content_hash: bytes
    unchanged: bool = False
    pixels: list[Pixels] = field(default_factory=list)
    thumbnail: bytes | None = None
    failures: list[tuple[str, str]] = field(default_factory=list)  # image, reason


def hash_text(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=HASH_BYTES).digest()


def default_workers() -> int:
    """One for each core that this process may use, up to 16."""
    return min(16, usable_cores())


@dataclass(frozen=True, kw_only=True)
class _Decoder:
    """What a worker does with a job."""

    reader: ImageReader
    preprocessing: Preprocessing
    thumbnail_px: int

    def decode(self, job: ImageJob) -> DecodedImages:
        digest = hashlib.blake2b(job.text_hash, digest_size=HASH_BYTES)
        readable: list[tuple[str, bytes]] = []
        failures: dict[str, str] = {}
        for image in job.images:
            try:
                data = self.reader.read(image)
            except UnusableImage as error:
                failures[image] = str(error)
                digest.update(b"unreadable")
            else:
                readable.append((image, data))
                digest.update(b"image" + hashlib.blake2b(data, digest_size=HASH_BYTES).digest())
        content_hash = digest.digest()
        # Where an image did not decode the last time it is tried again, for its reason was not kept.
        if content_hash == job.known_hash and len(readable) == job.known_images:
            return DecodedImages(content_hash=content_hash, unchanged=True, failures=list(failures.items()))
        pixels: list[Pixels] = []
        thumbnail: bytes | None = None
        for image, data in readable:
            try:
                pixels_HW3 = load_pixels(data, self.preprocessing, max_pixels=MAX_PIXELS)
                if thumbnail is None and self.thumbnail_px:
                    thumbnail = make_thumbnail(data, self.thumbnail_px, max_pixels=MAX_PIXELS)
            except (UndecodableImage, TooLarge) as error:
                failures[image] = str(error)
                continue
            pixels.append(pixels_HW3)
        in_order = [(image, failures[image]) for image in job.images if image in failures]
        return DecodedImages(content_hash=content_hash, pixels=pixels, thumbnail=thumbnail, failures=in_order)

    def decode_all(self, jobs: Sequence[ImageJob]) -> list[DecodedImages]:
        return [self.decode(job) for job in jobs]


class DecodePool:
    """Worker processes that decode, started at the first image. Raises whatever the reader does but `UnusableImage`."""

    def __init__(self, reader: ImageReader, preprocessing: Preprocessing, *, thumbnail_px: int, workers: int) -> None:
        self._decoder = _Decoder(reader=reader, preprocessing=preprocessing, thumbnail_px=thumbnail_px)
        self._workers = workers
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop()

    def map(self, jobs: Iterable[ImageJob]) -> Iterator[DecodedImages]:
        """The outcome of each job, in order, while the workers are a bounded number of jobs ahead."""
        pending: deque[tuple[list[ImageJob], Future[list[DecodedImages]] | None]] = deque()
        jobs = iter(jobs)
        while group := list(islice(jobs, _ENTITIES_PER_JOB)):
            pending.append((group, self._submit(group)))
            if len(pending) >= _JOBS_AHEAD * self._workers:
                yield from self._outcome(pending)
        while pending:
            yield from self._outcome(pending)

    def _outcome(
        self, pending: deque[tuple[list[ImageJob], Future[list[DecodedImages]] | None]]
    ) -> Sequence[DecodedImages]:
        group, future = pending.popleft()
        try:
            return self._decoder.decode_all(group) if future is None else future.result()
        except BrokenProcessPool:
            # One of the files ahead took its worker down, and all jobs with it: those at the head are tried alone.
            self._stop()
            outcome = [self._decode_alone(job) for job in group]
            for position, (jobs, _) in enumerate(pending):
                pending[position] = (jobs, self._submit(jobs))
            return outcome

    def _decode_alone(self, job: ImageJob) -> DecodedImages:
        future = self._submit([job])
        try:
            return self._decoder.decode(job) if future is None else future.result()[0]
        except BrokenProcessPool:
            self._stop()
            reason = "the process that decoded it died (a damaged file, or memory ran out)"
            return DecodedImages(content_hash=b"", failures=[(image, reason) for image in job.images])

    def _submit(self, jobs: list[ImageJob]) -> Future[list[DecodedImages]] | None:
        """None where there is no image: that is quicker done here."""
        if not any(job.images for job in jobs):
            return None
        if self._pool is None:
            # Not forked: this process has threads, and libraries that do not survive it.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._workers, mp_context=context, initializer=_begin_worker)
        try:
            return self._pool.submit(self._decoder.decode_all, jobs)
        except BrokenProcessPool:  # noticed here before at a result
            failed: Future[list[DecodedImages]] = Future()
            failed.set_exception(BrokenProcessPool())
            return failed

    def _stop(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


def _begin_worker() -> None:
    os.nice(_NICENESS)
    _follow_parent()


def _follow_parent() -> None:
    """End with the parent, and not before: a worker whose parent was killed would wait for work forever, and Ctrl-C,
    which reaches all processes of a terminal, is the parent's to answer.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None, "runs in workers only"
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()

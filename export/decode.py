"""Read and decode images in worker processes. Each worker imports this module, so it does not import torch.

A file that crashes its worker is rejected like any other file that does not decode. Shapes: H = W = size_px.
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
from functools import cache
from itertools import islice
from typing import Self

from catalog.images import MAX_PIXELS, ImageReader, UnusableImage
from core.arrays import Pixels
from core.errors import TooLarge, UndecodableImage
from core.runtime import usable_cores
from imaging import Decoder, Preprocessing, automatic_budget

HASH_BYTES = 16
_TIMEOUT_S = 30.0  # to decode an image; nobody waits for it
_ENTITIES_PER_JOB = 8
_JOBS_PER_WORKER = 3
_NICENESS = 19  # of workers; the models have priority on the cores


@dataclass(frozen=True, kw_only=True)
class ImageJob:
    """The images of an entity, and the content hash and image count of the same entity in the base."""

    images: Sequence[str]
    text_hash: bytes
    known_hash: bytes = b""
    known_images: int = 0


@dataclass(frozen=True, kw_only=True)
class DecodedImages:
    """The decoded images of an entity, uint8 [H, W, 3]. An `unchanged` entity is not decoded.

    `content_hash` covers text and images. It is empty if the worker crashed.
    """

    content_hash: bytes
    unchanged: bool = False
    pixels: list[Pixels] = field(default_factory=list)
    thumbnail: bytes | None = None
    failures: list[tuple[str, str]] = field(default_factory=list)  # image and reason


def hash_text(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=HASH_BYTES).digest()


def default_workers() -> int:
    """Return one worker per usable core, at most 16."""
    return min(16, usable_cores())


@cache
def image_decoder() -> Decoder:
    """Return this process's decoder. Its budget leaves as much to one worker on each other core."""
    budget_bytes = automatic_budget() // usable_cores()
    return Decoder(max_pixels=MAX_PIXELS, budget_bytes=budget_bytes, timeout_s=_TIMEOUT_S, processes=1)


@dataclass(frozen=True, kw_only=True)
class _EntityDecoder:
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
        # An entity with an image that failed to decode is decoded again, because the reason is not stored.
        if content_hash == job.known_hash and len(readable) == job.known_images:
            return DecodedImages(content_hash=content_hash, unchanged=True, failures=list(failures.items()))
        pixels: list[Pixels] = []
        thumbnail: bytes | None = None
        for image, data in readable:
            try:
                pixels_HW3 = image_decoder().load_pixels(data, self.preprocessing)
                if thumbnail is None and self.thumbnail_px:
                    thumbnail = image_decoder().make_thumbnail(data, self.thumbnail_px)
            except (UndecodableImage, TooLarge) as error:
                failures[image] = str(error)
                continue
            pixels.append(pixels_HW3)
        ordered = [(image, failures[image]) for image in job.images if image in failures]
        return DecodedImages(content_hash=content_hash, pixels=pixels, thumbnail=thumbnail, failures=ordered)

    def decode_all(self, jobs: Sequence[ImageJob]) -> list[DecodedImages]:
        return [self.decode(job) for job in jobs]


_Pending = tuple[list[ImageJob], Future[list[DecodedImages]]]


class DecodePool:
    """A pool of decoding processes, started at the first image. Raises the reader's errors except `UnusableImage`."""

    def __init__(self, reader: ImageReader, preprocessing: Preprocessing, *, thumbnail_px: int, workers: int) -> None:
        self._decoder = _EntityDecoder(reader=reader, preprocessing=preprocessing, thumbnail_px=thumbnail_px)
        self._workers = workers
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def map(self, jobs: Iterable[ImageJob]) -> Iterator[DecodedImages]:
        """Yield the result of each job, in order. The workers are at most a few jobs ahead."""
        pending: deque[_Pending] = deque()
        jobs = iter(jobs)
        while group := list(islice(jobs, _ENTITIES_PER_JOB)):
            pending.append((group, self._submit(group)))
            if len(pending) >= _JOBS_PER_WORKER * self._workers:
                yield from self._result(pending)
        while pending:
            yield from self._result(pending)

    def _result(self, pending: deque[_Pending]) -> Sequence[DecodedImages]:
        group, future = pending.popleft()
        try:
            return future.result()
        except BrokenProcessPool:
            # A file crashed its worker, which ends the pool. Decode this group one by one, and submit the rest again.
            self._stop()
            results = [self._decode_alone(job) for job in group]
            for position, (jobs, _) in enumerate(pending):
                pending[position] = (jobs, self._submit(jobs))
            return results

    def _decode_alone(self, job: ImageJob) -> DecodedImages:
        try:
            return self._submit([job]).result()[0]
        except BrokenProcessPool:
            self._stop()
            reason = "the decoding process crashed (a damaged file, or out of memory)"
            return DecodedImages(content_hash=b"", failures=[(image, reason) for image in job.images])

    def _submit(self, jobs: list[ImageJob]) -> Future[list[DecodedImages]]:
        future: Future[list[DecodedImages]] = Future()
        if not any(job.images for job in jobs):
            future.set_result(self._decoder.decode_all(jobs))  # faster than through the pool
            return future
        if self._pool is None:
            context = multiprocessing.get_context("spawn")  # forking is unsafe in a process with threads
            self._pool = ProcessPoolExecutor(self._workers, mp_context=context, initializer=_start_worker)
        try:
            return self._pool.submit(self._decoder.decode_all, jobs)
        except BrokenProcessPool as error:  # raised by submit before any result
            future.set_exception(error)
            return future

    def _stop(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


def _start_worker() -> None:
    """Lower the priority, ignore Ctrl-C, which the parent handles, and end when the parent ends."""
    os.nice(_NICENESS)
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None, "only workers run this"
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()

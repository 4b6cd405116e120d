"""Decoding of untrusted images within a budget of memory and time.

`imaging.header` says what an image will take, and each image waits until that much of the budget is free. Ordinary
images are decoded in threads, at full speed. All others are decoded in processes, which end when they exceed their
memory or time. Each kind has its share of the budget and its queue, so neither delays the other.
"""

import asyncio
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from core.arrays import Pixels
from core.errors import TooLarge, TooManyRequests
from core.runtime import Pool, usable_cores, usable_memory
from imaging.decode import decode, make_thumbnail
from imaging.header import read_header
from imaging.preprocess import Box, Preprocessing, load_pixels, load_region, load_squares, needed_px, resize_bytes
from imaging.process import DecoderProcess

_MEMORY_SHARE = 0.4  # of what the process may use; index, encoder and request bodies need the rest
_ORDINARY_SHARE = 0.25  # of the budget
_PROCESS_BYTES = 16 * 2**20  # what a process takes in addition to the image: modules that it imports late
_MAX_PROCESSES = 4
_WAIT_SHARE, _PATIENCE = 0.75, 0.9  # of a deadline: by when an image must be begun if it takes all its time, and end
_SMALL_SHARE = 0.25  # of the time for an image of `max_pixels`: what one without pixels gets
_CHECK_PX = 224

T = TypeVar("T")
Stage = tuple[float, float]  # start and end, by `time.monotonic`


def automatic_budget() -> int:
    """Return the budget in bytes that suits the memory that this process may use."""
    return int(_MEMORY_SHARE * usable_memory())


@dataclass(kw_only=True, eq=False)
class _Job:
    function: Callable[..., Any]
    data: bytes
    arguments: dict[str, Any]
    memory_bytes: int
    timeout_s: float
    deadline_s: float
    isolated: bool
    submitted_at: float = field(default_factory=time.monotonic)
    process: DecoderProcess | None = None  # while it is running in one
    cancelled: bool = False


class Decoder:
    """Decodes images for any number of threads and event loops. Close it when done.

    An image that is not ordinary gets `timeout_s` to decode, a small one a quarter of that. Threads and processes start
    when they are needed.

    All methods raise `TooLarge` if the image exceeds `max_pixels` or the budget, `UndecodableImage` if it is damaged or
    takes too long, `Unavailable` if this is closed.
    """

    def __init__(
        self, *, max_pixels: int, budget_bytes: int, timeout_s: float, threads: int = 1, processes: int | None = None
    ) -> None:
        self._max_pixels = max_pixels
        self._timeout_s = timeout_s
        ordinary_bytes = int(_ORDINARY_SHARE * budget_bytes)
        self._ordinary = Pool(threads, "decode", budget_bytes=ordinary_bytes)
        processes = processes or min(_MAX_PROCESSES, usable_cores())
        self._isolated = Pool(processes, "decode-isolated", budget_bytes=budget_bytes - ordinary_bytes)
        self._processes = [DecoderProcess() for _ in range(processes)]  # those without a job
        self._kill_lock = threading.Lock()  # a process must not be killed once it has another job

    @property
    def stuck_s(self) -> float:
        """Return for how long every thread has been at the same image, 0 while one is free. Processes have a limit."""
        return self._ordinary.stuck_s

    async def load_region(
        self, data: bytes, preprocessing: Preprocessing, box: Box | None = None, *, deadline_s: float = math.inf
    ) -> tuple[Pixels, Box, Stage]:
        """Do what `imaging.load_region` does, and return when. Cancelling it drops the image, or kills its process.

        With a `deadline_s`, an image ends in nine tenths of it, and one that is not begun in time gets
        `TooManyRequests`.
        """
        target_px = needed_px(preprocessing, box)
        (pixels_HW3, region), stage = await self._load(
            load_region, data, target_px, deadline_s, preprocessing=preprocessing, box=box
        )
        return pixels_HW3, region, stage

    async def load_squares(
        self, data: bytes, preprocessing: Preprocessing, boxes: Sequence[Box], *, deadline_s: float = math.inf
    ) -> list[tuple[Box, Pixels]]:
        """Do what `imaging.load_squares` does, as `load_region` does."""
        target_px = max(needed_px(preprocessing, box) for box in boxes)
        squares, _ = await self._load(
            load_squares, data, target_px, deadline_s, preprocessing=preprocessing, boxes=boxes
        )
        return squares

    async def _load(
        self, function: Callable[..., T], data: bytes, target_px: int, deadline_s: float, **arguments: Any
    ) -> tuple[T, Stage]:
        job, future = self._begin(function, data, target_px, deadline_s, **arguments)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            with self._kill_lock:
                job.cancelled = True
                if job.process is not None:
                    job.process.kill()
            raise
        finally:
            del future  # an exception refers to this frame, and the future to the exception: a reference cycle

    def load_pixels(self, data: bytes, preprocessing: Preprocessing) -> Pixels:
        """Do what `imaging.load_pixels` does."""
        return self._begin(load_pixels, data, preprocessing.size_px, preprocessing=preprocessing)[1].result()[0]

    def make_thumbnail(self, data: bytes, size_px: int) -> bytes:
        """Do what `imaging.make_thumbnail` does."""
        return self._begin(make_thumbnail, data, size_px, size_px=size_px)[1].result()[0]

    def check(self, data: bytes) -> None:
        """Decode the image to see whether that works."""
        self._begin(_check, data, _CHECK_PX)[1].result()

    def close(self) -> None:
        """Finish what is running or queued, then stop. Idempotent."""
        self._ordinary.close()
        self._isolated.close()
        for process in self._processes:
            process.close()

    def _begin(
        self, function: Callable[..., T], data: bytes, target_px: int, deadline_s: float = math.inf, **arguments: Any
    ) -> tuple[_Job, Future[tuple[T, Stage]]]:
        header = read_header(data, max_pixels=self._max_pixels, target_px=target_px)
        memory_bytes, pool = header.memory_bytes, self._ordinary
        if "preprocessing" in arguments:
            memory_bytes += resize_bytes(arguments["preprocessing"], header.width, header.height)
        if not header.ordinary or memory_bytes > pool.budget_bytes:
            pool = self._isolated
            memory_bytes += 2 * len(data) + _PROCESS_BYTES
        if memory_bytes > pool.budget_bytes:
            raise TooLarge(
                f"decoding {header.kind} of {header.width} x {header.height} pixels takes {memory_bytes >> 20} MiB; "
                f"the limit is {pool.budget_bytes >> 20} MiB, scale it down or send a JPEG"
            )
        share = header.width * header.height / self._max_pixels
        job = _Job(
            function=function,
            data=data,
            arguments={**arguments, "max_pixels": self._max_pixels},
            memory_bytes=memory_bytes,
            timeout_s=self._timeout_s * (_SMALL_SHARE + (1 - _SMALL_SHARE) * share),
            deadline_s=deadline_s,
            isolated=pool is self._isolated,
        )
        return job, pool.submit(lambda: self._run(job), memory_bytes)

    def _run(self, job: _Job) -> tuple[Any, Stage]:
        started_at = time.monotonic()
        wait_s = _WAIT_SHARE * job.deadline_s - self._timeout_s
        if started_at - job.submitted_at > wait_s:
            reason = f"no decoder was free for this image in {wait_s:.2g} s; retry later"
            raise TooManyRequests(reason, retry_after_s=math.ceil(self._timeout_s))
        try:
            outcome = self._run_isolated(job) if job.isolated else job.function(job.data, **job.arguments)
        except MemoryError:
            raise TooLarge("there is no memory to decode the image now; scale it down") from None
        return outcome, (started_at, time.monotonic())

    def _run_isolated(self, job: _Job) -> Any:
        with self._kill_lock:
            if job.cancelled:
                return None
            process = job.process = self._processes.pop()
        try:
            return process.run(
                job.function,
                job.data,
                job.arguments,
                memory_bytes=job.memory_bytes,
                timeout_s=job.timeout_s,
                patience_s=job.submitted_at + _PATIENCE * job.deadline_s - time.monotonic(),
            )
        finally:
            with self._kill_lock:
                job.process = None
                self._processes.append(process)


def _check(data: bytes, *, max_pixels: int) -> None:
    decode(data, max_pixels=max_pixels, target_px=_CHECK_PX)

"""Decoding of untrusted images within a budget of memory and time.

`imaging.header` says what an image will take, and each image waits until that much of the budget is free. Ordinary
images are decoded in threads, at full speed. All others are decoded in processes, which end when they exceed their
memory or time. Each kind has its share of the budget and its queue, so neither delays the other.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from core.errors import TooLarge, TooManyRequests, Unavailable
from core.runtime import usable_cores, usable_memory
from imaging.decode import decode, make_thumbnail
from imaging.header import Header, read_header
from imaging.preprocess import Box, Preprocessing, load_region, needed_px, resize_bytes
from imaging.process import DecoderProcess

_MEMORY_SHARE = 0.4  # of what the process may use; index, encoder and request bodies need the rest
_ORDINARY_SHARE = 0.25  # of the budget
_PROCESS_BYTES = 16 * 2**20  # what a process takes in addition to the image: modules that it imports late
_MAX_PROCESSES = 4
_IDLE_S = 10.0  # after which a process ends
_WAIT_SHARE, _PATIENCE = 0.75, 0.9  # of a deadline: by when an image must be begun if it takes all its time, and end
_SMALL_SHARE = 0.25  # of the time for an image of `max_pixels`: what one without pixels gets
_CHECK_PX = 224

Pixels = npt.NDArray[np.uint8]
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
    lane: _Lane
    submitted_at: float = field(default_factory=time.monotonic)
    future: Future[Any] = field(default_factory=Future)
    process: DecoderProcess | None = None  # while it is running in one
    stage: Stage = (0.0, 0.0)


class _Lane:
    """A queue with its share of the budget and its threads. The decoder's lock guards all fields."""

    def __init__(self, lock: threading.Lock, *, share_bytes: int, max_threads: int, isolated: bool) -> None:
        self.wake = threading.Condition(lock)
        self.share_bytes = self.free_bytes = share_bytes
        self.max_threads = max_threads
        self.isolated = isolated
        self.queue: deque[_Job] = deque()
        self.threads: list[threading.Thread] = []
        self.idle = 0
        self.started_at: dict[int, float] = {}  # of the jobs in progress, by thread


class Decoder:
    """Decodes images for any number of threads and event loops. Close it when done, or use `with`.

    An image that is not ordinary gets `timeout_s` to decode, a small one a quarter of that. With a `deadline_s`, one
    that is not begun in time gets `TooManyRequests`, and all end in nine tenths of it. Threads and processes start when
    they are needed.

    All methods raise `TooLarge` if the image exceeds `max_pixels` or the budget, `UndecodableImage` if it is damaged or
    takes too long, `Unavailable` if this is closed.
    """

    def __init__(
        self,
        *,
        max_pixels: int,
        budget_bytes: int,
        timeout_s: float,
        deadline_s: float = math.inf,
        threads: int = 1,
        processes: int | None = None,
    ) -> None:
        self._max_pixels = max_pixels
        self._timeout_s = timeout_s
        self._patience_s = _PATIENCE * deadline_s
        self._wait_s = _WAIT_SHARE * deadline_s - timeout_s if math.isfinite(deadline_s) else None
        self._lock = threading.Lock()
        self._closing = False
        ordinary_bytes = int(_ORDINARY_SHARE * budget_bytes)
        self._ordinary = _Lane(self._lock, share_bytes=ordinary_bytes, max_threads=threads, isolated=False)
        self._isolated = _Lane(
            self._lock,
            share_bytes=budget_bytes - ordinary_bytes,
            max_threads=processes or min(_MAX_PROCESSES, usable_cores()),
            isolated=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def stuck_s(self) -> float:
        """Return for how long every thread has been at the same image, 0 while one is free. Processes have a limit."""
        started_at = list(self._ordinary.started_at.values())
        return time.monotonic() - max(started_at) if len(started_at) == self._ordinary.max_threads else 0.0

    async def load_region(
        self, data: bytes, preprocessing: Preprocessing, box: Box | None = None
    ) -> tuple[Pixels, Box, Stage]:
        """Do what `imaging.load_region` does, and return when. Cancelling it drops the image, or kills its process."""
        job = self._begin_load_region(data, preprocessing, box)
        timer = None
        if self._wait_s is not None:
            timer = asyncio.get_running_loop().call_later(self._wait_s, self._expire, job)
        try:
            pixels_HW3, region = await asyncio.wrap_future(job.future)
            return pixels_HW3, region, job.stage
        except asyncio.CancelledError:
            self._drop(job)
            raise
        finally:
            if timer is not None:
                timer.cancel()
            del job  # an exception refers to this frame, and the future to the exception: a reference cycle

    def load_pixels(self, data: bytes, preprocessing: Preprocessing) -> Pixels:
        """Do what `imaging.load_pixels` does."""
        pixels_HW3: Pixels = self._result(self._begin_load_region(data, preprocessing, None))[0]
        return pixels_HW3

    def make_thumbnail(self, data: bytes, size_px: int) -> bytes:
        """Do what `imaging.make_thumbnail` does."""
        header = read_header(data, max_pixels=self._max_pixels, target_px=size_px)
        thumbnail: bytes = self._result(self._begin(make_thumbnail, data, {"size_px": size_px}, header))
        return thumbnail

    def check(self, data: bytes) -> None:
        """Decode the image to see whether that works."""
        header = read_header(data, max_pixels=self._max_pixels, target_px=_CHECK_PX)
        self._result(self._begin(_check, data, {}, header))

    def close(self) -> None:
        """Finish what is running or queued, then stop. Idempotent."""
        with self._lock:
            self._closing = True
            for lane in (self._ordinary, self._isolated):
                lane.wake.notify_all()
        for thread in self._ordinary.threads + self._isolated.threads:
            thread.join()

    def _begin_load_region(self, data: bytes, preprocessing: Preprocessing, box: Box | None) -> _Job:
        header = read_header(data, max_pixels=self._max_pixels, target_px=needed_px(preprocessing, box))
        more_bytes = resize_bytes(preprocessing, header.width, header.height)
        return self._begin(load_region, data, {"preprocessing": preprocessing, "box": box}, header, more_bytes)

    def _begin(
        self, function: Callable[..., Any], data: bytes, arguments: dict[str, Any], header: Header, more_bytes: int = 0
    ) -> _Job:
        pixels = header.width * header.height
        memory_bytes, lane = header.memory_bytes + more_bytes, self._ordinary
        if not header.ordinary or memory_bytes > lane.share_bytes:
            lane = self._isolated
            memory_bytes += 2 * len(data) + _PROCESS_BYTES
        if memory_bytes > lane.share_bytes:
            raise TooLarge(
                f"decoding {header.kind} of {header.width} x {header.height} pixels takes {memory_bytes >> 20} MiB; "
                f"the limit is {lane.share_bytes >> 20} MiB, scale it down or send a JPEG"
            )
        job = _Job(
            function=function,
            data=data,
            arguments={**arguments, "max_pixels": self._max_pixels},
            memory_bytes=memory_bytes,
            timeout_s=self._timeout_s * (_SMALL_SHARE + (1 - _SMALL_SHARE) * pixels / self._max_pixels),
            lane=lane,
        )
        with self._lock:
            if self._closing:
                raise Unavailable("the service is stopping; retry later or elsewhere")
            lane.queue.append(job)
            if lane.idle < len(lane.queue) and len(lane.threads) < lane.max_threads:
                name = "decode-isolated" if lane.isolated else "decode"
                lane.threads.append(threading.Thread(target=self._work, args=(lane,), name=name, daemon=True))
                lane.threads[-1].start()
            lane.wake.notify()
        return job

    def _result(self, job: _Job) -> Any:
        try:
            return job.future.result(self._wait_s)
        except TimeoutError:
            self._expire(job)
            return job.future.result()
        finally:
            del job  # a reference cycle, as above

    def _expire(self, job: _Job) -> None:
        """Refuse the job unless it has begun."""
        with self._lock:
            if job not in job.lane.queue:
                return
            job.lane.queue.remove(job)
        if job.future.set_running_or_notify_cancel():
            reason = f"no decoder was free for this image in {self._wait_s:g} s; retry later"
            job.future.set_exception(TooManyRequests(reason, retry_after_s=math.ceil(self._timeout_s)))

    def _drop(self, job: _Job) -> None:
        """Forget a job whose future is cancelled. If it is running in a process, kill that."""
        with self._lock:
            if job in job.lane.queue:
                job.lane.queue.remove(job)
                job.lane.wake.notify()  # the next one may fit
            elif job.process is not None:
                job.process.kill()

    def _work(self, lane: _Lane) -> None:
        process = DecoderProcess() if lane.isolated else None
        while (job := self._take(lane, process)) is not None:
            self._run(job)
            with self._lock:
                del lane.started_at[threading.get_ident()]
                lane.free_bytes += job.memory_bytes
                lane.wake.notify()
            del job
        if process is not None:
            process.close()

    def _take(self, lane: _Lane, process: DecoderProcess | None) -> _Job | None:
        """Return the first job in the queue when its memory is free, None if this is closed."""
        with self._lock:
            while True:
                if lane.queue and lane.queue[0].memory_bytes <= lane.free_bytes:
                    job = lane.queue.popleft()
                    lane.started_at[threading.get_ident()] = time.monotonic()
                    job.process = process
                    lane.free_bytes -= job.memory_bytes
                    lane.wake.notify()  # the next one may fit too
                    return job
                if self._closing and not lane.queue:
                    return None
                lane.idle += 1
                woken = lane.wake.wait(None if process is None else _IDLE_S)
                lane.idle -= 1
                if process is not None and not woken:
                    process.close()

    def _run(self, job: _Job) -> None:
        started_at = time.monotonic()
        outcome: Any = None
        failure: Exception | None = None
        try:
            if job.future.cancelled():
                pass
            elif job.process is None:
                outcome = job.function(job.data, **job.arguments)
            else:
                outcome = job.process.run(
                    job.function,
                    job.data,
                    job.arguments,
                    memory_bytes=job.memory_bytes,
                    timeout_s=job.timeout_s,
                    patience_s=job.submitted_at + self._patience_s - started_at,
                )
        except MemoryError:
            failure = TooLarge("there is no memory to decode the image now; scale it down")
        except Exception as error:
            failure = error
        job.stage = (started_at, time.monotonic())
        with self._lock:
            job.process = None  # from now on, it is another job's
        if job.future.set_running_or_notify_cancel():
            if failure is None:
                job.future.set_result(outcome)
            else:
                job.future.set_exception(failure)
        del job, failure  # a reference cycle, as above


def _check(data: bytes, *, max_pixels: int) -> None:
    decode(data, max_pixels=max_pixels, target_px=_CHECK_PX)

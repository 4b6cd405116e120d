"""A decoder process: it has a memory and a time limit, and it can be killed at any moment.

A thread cannot be stopped while a library decodes, and libraries exceed what a header declares. Both ends are in this
module. The parent starts the process with `subprocess`: `multiprocessing` would import the caller's main module again.
"""

import math
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from core.errors import TooLarge, UndecodableImage, UserError
from imaging.decode import readable_types

_MAIN = "import sys; from imaging.process import main; main(int(sys.argv[1]))"
_NICENESS = 5  # ordinary images are decoded first
_GRACE_S = 5.0  # for the process to start, and to be ended by its own timer
_IDLE_S = 10.0  # after which the process ends
_FRESH_S = 5.0  # after which it gets no more tasks, because it may be about to end
_SECRETS = "WIKICLIP_"  # prefix of settings, which the process does not need


class DecoderProcess:
    """Runs one task at a time, in a process that starts at the first and is replaced if it dies."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection[Any, Any] | None = None
        self._idle_since = 0.0

    def run(
        self,
        function: Callable[..., Any],
        data: bytes,
        arguments: dict[str, Any],
        *,
        memory_bytes: int,
        timeout_s: float,
        patience_s: float = math.inf,
    ) -> Any:
        """Return `function(data, **arguments)`, both of which can be pickled.

        Raises what it raises, `TooLarge` if it takes more than `memory_bytes`, `UndecodableImage` if it takes longer
        than `timeout_s` or, with the start of the process, than `patience_s`, or crashes.
        """
        if self._process is None or self._process.poll() is not None or time.monotonic() > self._idle_since + _FRESH_S:
            self._start()
        assert self._pipe is not None
        try:
            self._pipe.send((function, arguments, memory_bytes, timeout_s))
            self._pipe.send_bytes(data)
            if not self._pipe.poll(max(0.0, min(timeout_s + _GRACE_S, patience_s))):
                self.close()
                raise UndecodableImage(_too_slow(timeout_s))
            outcome = self._pipe.recv()
        except (EOFError, OSError):
            raise self._death(memory_bytes, timeout_s) from None
        self._idle_since = time.monotonic()
        if isinstance(outcome, MemoryError):
            self.close()  # its heap may be fragmented
            raise TooLarge(_too_much(memory_bytes))
        try:
            if isinstance(outcome, Exception):
                raise outcome
            return outcome
        finally:
            del outcome  # an exception refers to this frame: a reference cycle

    def kill(self) -> None:
        """Stop the task that is running, from any thread. `run` then raises."""
        process = self._process
        if process is not None:
            process.kill()

    def close(self) -> None:
        """End the process. A later `run` starts another one."""
        if self._process is not None and self._pipe is not None:
            self._process.kill()
            self._process.wait()
            self._pipe.close()
            self._process = self._pipe = None

    def _start(self) -> None:
        self.close()
        ours, theirs = multiprocessing.Pipe()
        environment = {name: value for name, value in os.environ.items() if not name.startswith(_SECRETS)}
        environment |= {
            "MALLOC_ARENA_MAX": "1",  # otherwise each thread of a library reserves 64 MB of address space
            "MALLOC_MMAP_THRESHOLD_": str(2**17),  # the default rises, and then freed images stay in the heap
            "MALLOC_TRIM_THRESHOLD_": str(2**17),
            "OPENBLAS_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(__file__).parents[1]),
        }
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _MAIN, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # libtiff writes a line for each damaged row
            )
        threading.Thread(target=self._process.wait, name="decoder-process", daemon=True).start()  # leaves no zombie
        self._pipe, self._idle_since = ours, time.monotonic()

    def _death(self, memory_bytes: int, timeout_s: float) -> UserError:
        """Return why the process died."""
        assert self._process is not None
        self._process.kill()
        status = self._process.wait()
        self.close()
        if status == -signal.SIGALRM:
            return UndecodableImage(_too_slow(timeout_s))
        if status == -signal.SIGKILL:  # by the kernel, for want of memory
            return TooLarge(_too_much(memory_bytes))
        return UndecodableImage("the image crashed its decoder; save it again as a JPEG or PNG file")


def _too_slow(timeout_s: float) -> str:
    return f"decoding the image takes longer than {timeout_s:.2g} s; send a smaller one, or a JPEG or PNG file"


def _too_much(memory_bytes: int) -> str:
    return f"decoding takes more than the {memory_bytes >> 20} MiB that the header suggests; send a JPEG or PNG file"


def main(descriptor: int) -> None:
    """Run tasks from the pipe until there are none for a while, or the parent ends in any way and so closes its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    os.nice(_NICENESS)
    with suppress(OSError):  # where the kernel runs out of memory, this process is the one to kill
        Path("/proc/self/oom_score_adj").write_text("1000")
    readable_types()
    with Connection(descriptor) as pipe:
        while pipe.poll(_IDLE_S):
            try:
                task, data = pipe.recv(), pipe.recv_bytes()
            except EOFError:
                return
            pipe.send(_run(data, *task))
            del task, data  # while this waits for the next


def _run(
    data: bytes, function: Callable[..., Any], arguments: dict[str, Any], memory_bytes: int, timeout_s: float
) -> Any:
    # SIGALRM keeps its default action, which ends the process even in the middle of a library, and without the parent.
    signal.setitimer(signal.ITIMER_REAL, timeout_s)
    unlimited, hard = resource.getrlimit(resource.RLIMIT_AS)
    if (used := _address_space_bytes()) is not None:
        limit = used + memory_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    try:
        return function(data, **arguments)
    except MemoryError:
        return MemoryError()
    except UserError as error:
        return error.with_traceback(None)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (unlimited, hard))


def _address_space_bytes() -> int | None:
    """Return the size of this process's address space, None where the system does not tell (not Linux)."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:
        return None

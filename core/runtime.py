"""The process and its native libraries: usable cores and memory, threads, faiss and ONNX Runtime with their settings.

Other modules write `from core.runtime import faiss` (or `onnxruntime`). Both libraries read environment variables while
they are being loaded, so they are loaded here, on first use, after `configure_native_libraries`.
"""

from __future__ import annotations

import ctypes
import importlib
import io
import os
import platform
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout, suppress
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from core.errors import Unavailable

if TYPE_CHECKING:
    import faiss as faiss  # noqa: PLC0414 - re-exported
    import onnxruntime as onnxruntime  # noqa: PLC0414 - re-exported

T = TypeVar("T")

# Parameters of glibc's mallopt, from malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_NEVER = 2**31 - 1  # bytes, the largest value that mallopt takes
_DEFAULT_THRESHOLD, _MAX_MMAP_THRESHOLD = 128 * 1024, 32 * 1024**2  # bytes, glibc's own values
_SERVING_TRIM_THRESHOLD = 16 * 1024**2  # with less, the heap of a large request body is returned and faulted in again
_CPU_INFO = Path("/proc/cpuinfo")
_BLAS_KERNELS = (
    ("SkylakeX", {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}),
    ("Haswell", {"avx2", "fma"}),
)


def __getattr__(name: str) -> Any:
    """Load faiss or onnxruntime on first use (PEP 562)."""
    if name not in ("faiss", "onnxruntime"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    configure_native_libraries()
    return importlib.import_module(name)


def configure_native_libraries() -> None:
    """Set the environment variables that faiss and ONNX Runtime read when they are loaded. Values already set win.

    - `ORT_DISABLE_TELEMETRY`: since 1.32, ONNX Runtime sends usage data to its maker unless this is set before import.
    - `CUDA_DEVICE_ORDER`: NVML, which says how much memory a GPU has, counts GPUs by their place on the bus.
    - `OPENBLAS_CORETYPE`: the OpenBLAS in faiss's wheels dates from 2021. It does not recognise newer processors and
      falls back to SSE3 kernels, which multiply matrices four times as slowly.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    kernels = blas_kernels(_cpu_flags())
    if kernels is not None:
        os.environ.setdefault("OPENBLAS_CORETYPE", kernels)


@cache
def load_cuda_libraries() -> str:
    """Load CUDA and cuDNN from pip's `nvidia-*` wheels, which the linker does not search. Return the error, if any."""
    from core.runtime import onnxruntime

    output = io.StringIO()
    with redirect_stdout(output):  # stdout is for answers
        onnxruntime.preload_dlls()
    return output.getvalue().partition("\n")[0].strip()


def blas_kernels(cpu_flags: set[str]) -> str | None:
    """Return OpenBLAS's name of the best kernels for a processor, or None to let OpenBLAS decide."""
    return next((name for name, required in _BLAS_KERNELS if required <= cpu_flags), None)


def _cpu_flags() -> set[str]:
    """Return the first core's feature flags as Linux lists them, or an empty set on other systems."""
    try:
        with _CPU_INFO.open() as lines:
            return next((set(line.split()[2:]) for line in lines if line.startswith("flags")), set())
    except OSError:
        return set()


@contextmanager
def returnable_memory() -> Iterator[None]:
    """Let blocks of 128 KiB or more that are allocated meanwhile go back to the system as soon as they are freed.

    glibc raises its thresholds as it frees large blocks. The weights and tables of a bundle would then share its heaps
    with small blocks that outlive them. Outside, requests may take large blocks from the heaps, which is faster.
    Other C libraries are left alone.
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_M_TRIM_THRESHOLD, _DEFAULT_THRESHOLD)
    mallopt(_M_MMAP_THRESHOLD, _DEFAULT_THRESHOLD)
    try:
        yield
    finally:
        mallopt(_M_MMAP_THRESHOLD, _MAX_MMAP_THRESHOLD)
        mallopt(_M_TRIM_THRESHOLD, _SERVING_TRIM_THRESHOLD)


def keep_freed_memory() -> None:
    """Let this process keep freed blocks of any size for later ones. For programs that run torch on a CPU and then end.

    By default, glibc returns each large block to the system, and every batch of an encoder faults its memory in again.
    Other C libraries are left alone.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, _NEVER)


def usable_cores() -> int:
    """Return how many cores this process may use: its CPU affinity on Linux, elsewhere all of the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usable_memory(root: Path = Path("/")) -> int:
    """Return how many bytes this process may use: the machine's memory, or less in a cgroup (version 1 or 2)."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    try:
        entries = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return limits[0]
    for entry in entries:
        _, controllers, path = entry.split(":", 2)
        if controllers == "":
            mount, file = "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            mount, file = "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        # Every group above limits too. In a container, the path may be the host's, and only the top exists.
        group = root / mount / path.lstrip("/")
        for folder in (group, *group.parents):
            with suppress(OSError, ValueError):  # there is no such group, or its limit is "max"
                limits.append(int((folder / file).read_text()))
            if folder == root / mount:
                break
    return min(limits)


def session_options(threads: int = 0) -> onnxruntime.SessionOptions:
    """Return the options of a session that answers requests. 0 threads: one per core."""
    from core.runtime import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Without this, idle threads spin and take cores from decoding.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


class Pool:
    """Threads that run work in order, and that reserve memory for it: `budget_bytes` are shared by what is running.

    Cancelled work leaves the queue at once, with the image that it refers to. Close it when done.
    """

    def __init__(self, threads: int, name: str, *, budget_bytes: int = 0) -> None:
        self.budget_bytes = self.free_bytes = budget_bytes
        self._threads = threads
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._turn = threading.Lock()  # to wait for memory
        self._freed = threading.Condition()
        self._started_at: dict[int, float] = {}  # of the work in progress, by thread

    @property
    def stuck_s(self) -> float:
        """Return for how long every thread has been at the same work, 0 while a thread is free."""
        started_at = list(self._started_at.values())
        return time.monotonic() - max(started_at) if len(started_at) == self._threads else 0.0

    def submit(self, work: Callable[[], T], memory_bytes: int = 0) -> Future[T]:
        """Run `work` once `memory_bytes` of the budget are free. Raises `Unavailable` if the pool is closed."""
        assert memory_bytes <= self.budget_bytes, "it would wait for ever"
        held = [work]
        try:
            pending = self._executor.submit(lambda: self._run(held, memory_bytes))
        except RuntimeError:
            raise Unavailable("the service is stopping; retry later or elsewhere") from None
        pending.add_done_callback(lambda _: held.clear())
        return pending

    def close(self) -> None:
        """Finish what is running or queued, then stop. Idempotent."""
        self._executor.shutdown()

    def _run(self, held: list[Callable[[], T]], memory_bytes: int) -> T:
        with self._turn, self._freed:
            self._freed.wait_for(lambda: self.free_bytes >= memory_bytes)
            self.free_bytes -= memory_bytes
        thread = threading.get_ident()
        self._started_at[thread] = time.monotonic()
        try:
            return held.pop()()
        finally:
            del self._started_at[thread]
            with self._freed:
                self.free_bytes += memory_bytes
                self._freed.notify_all()


def describe_run(settings: dict[str, Any]) -> dict[str, Any]:
    """Return `hardware`, `commit`, `date` and `settings`: the conditions of a measurement."""
    return {
        "hardware": _hardware(),
        "commit": _commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "settings": settings,
    }


def _hardware() -> dict[str, Any]:
    cores = usable_cores()
    model = platform.processor() or platform.machine()
    if _CPU_INFO.exists() and (found := re.search(r"^model name\s*:\s*(.+)$", _CPU_INFO.read_text(), re.MULTILINE)):
        model = found[1].strip()
    return {"name": f"{model} {cores} cores", "cpu": model, "cores": cores, "python": platform.python_version()}


def _commit() -> str:
    """Return the short commit, with `-dirty` if files have changed, or `unknown` outside a checkout."""
    try:
        commit, changed = (
            subprocess.run(["git", *command], cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
            for command in (["rev-parse", "--short=10", "HEAD"], ["status", "--porcelain"])
        )
    except (FileNotFoundError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip() + ("-dirty" if changed.stdout.strip() else "")

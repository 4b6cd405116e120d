"""Which kernels OpenBLAS is to take. The one in the wheels of faiss is of 2021 and knows a processor by its model: on
any that came later it multiplies matrices as if it had SSE3 only, four times as slowly."""

from __future__ import annotations

import os
from pathlib import Path

_CPU_INFO = Path("/proc/cpuinfo")
_KERNELS = (("SkylakeX", {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}), ("Haswell", {"avx2", "fma"}))


def choose_kernels() -> None:
    """Name them by what the processor can do, where nobody has (`OPENBLAS_CORETYPE`). Before OpenBLAS is loaded."""
    if "OPENBLAS_CORETYPE" not in os.environ and (kernels := kernels_for(_flags())) is not None:
        os.environ["OPENBLAS_CORETYPE"] = kernels


def kernels_for(flags: set[str]) -> str | None:
    """OpenBLAS's name of the best kernels for a processor with these flags, None where it may as well find out."""
    return next((name for name, wanted in _KERNELS if wanted <= flags), None)


def _flags() -> set[str]:
    """What Linux says that the first core can do; nothing where that is not told so."""
    try:
        with _CPU_INFO.open() as lines:
            return next((set(line.split()[2:]) for line in lines if line.startswith("flags")), set())
    except OSError:
        return set()

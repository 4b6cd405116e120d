"""Metrics, evaluation and timings."""

import core  # noqa: F401 - before faiss: it says which kernels its BLAS takes

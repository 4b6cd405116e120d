"""The bundle on disk, the entity store and the search index. No torch."""

import core  # noqa: F401 - before faiss: it says which kernels its BLAS takes

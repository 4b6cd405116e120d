"""An exact index written to its file vector by vector: faiss's own way holds all of them in memory first.

The layout is faiss's `IndexFlatIP` (`write_index` in faiss/impl/index_write.cpp): a header, then float32 [N, D].
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from core.runtime import faiss
from index.embeddings import EmbeddingShards, Float32Array

_HEADER_BYTES = 45  # its bytes 8 to 16 count the vectors, its last 8 their components


def is_flat(index: Any) -> bool:
    """Whether an index is an exact one in main memory, which `write_flat` can write."""
    return type(faiss.downcast_index(index)) is faiss.IndexFlatIP


def write_flat(path: Path, index: Any, embeddings: EmbeddingShards, batches: Iterator[Float32Array]) -> None:
    """Write the file that the empty `index` would give after `add` of all `batches`, the shards of `embeddings`."""
    header = faiss.serialize_index(index).tobytes()
    assert len(header) == _HEADER_BYTES, "faiss writes another layout than the one that is known here"
    count = len(embeddings)
    with path.open("wb") as file:
        file.write(header[:8] + struct.pack("<q", count) + header[16:-8] + struct.pack("<Q", count * embeddings.dim))
        for embeddings_nD in batches:
            file.write(embeddings_nD.tobytes())

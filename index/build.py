"""Build the search index of a bundle: `index/entity.faiss` and, last, `index/manifest.json`."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from core.arrays import Float32Array
from core.errors import UserError
from core.files import atomic_write, sha256_file
from core.runtime import faiss
from index.autotune import QUERIES, Targets, cheapest, choose, curve, exact_positions, held_out_queries
from index.embeddings import Embeddings
from index.faiss_index import SEED, factory_index, fill, train, untuned_parameters, visible_gpus
from index.manifest import INDEX_FILE, INDEX_MANIFEST_FILE, IndexManifest
from index.search import EntityIndex

_FLAT_HEADER_BYTES = 45  # bytes 8 to 16 are the number of vectors, the last 8 the number of floats


def build_index(
    bundle: Path,
    embeddings: Embeddings,
    *,
    factory: str = "Flat",
    targets: Targets | None = None,
    device: str = "auto",
    created_at: str | None = None,
    progress: bool = False,
) -> IndexManifest:
    """Build an index of all embeddings, pooled as the bundle says. It replaces the bundle's existing one.

    `factory` is a faiss factory string, or `auto` for the first candidate that meets the targets. With `targets`, the
    search parameters are tuned at full size, otherwise they favour recall. `device` (`auto`, `cpu`, `cuda`) is where
    lists are trained. Raise `UserError` if faiss cannot make or train the index, if no candidate is expected to meet
    the targets, or if there is no GPU for `cuda`.
    """
    started = time.perf_counter()
    gpus = 0 if device == "cpu" else visible_gpus()
    if device == "cuda" and gpus == 0:
        raise UserError(
            "--device cuda: this faiss sees no GPU; install the `gpu` extra on a machine with one, or use --device cpu"
        )
    choice: dict[str, Any] = {}
    why = "exact search, nothing is lost" if factory == "Flat" else "given on the command line"
    if factory == "auto":
        targets = targets or Targets()
        factory, why, choice["candidates"] = choose(embeddings, targets, progress=progress)
    index = factory_index(embeddings.dim, factory)
    parameters: Mapping[str, Any] = untuned_parameters(index)
    path = bundle / INDEX_FILE
    path.parent.mkdir(exist_ok=True)
    with atomic_write(path) as temporary:
        batches = tqdm(embeddings, desc="index", total=embeddings.parts, unit="shard", disable=not progress)
        if type(faiss.downcast_index(index)) is faiss.IndexFlatIP:
            _write_flat(temporary, index, embeddings, batches)
        else:
            train(index, embeddings, factory, gpus)
            _reserve(index, len(embeddings))
            fill(index, batches)
            faiss.write_index(index, str(temporary))
        del index  # tuning uses the memory-mapped file, as serving does
        if targets is not None and len(embeddings):
            parameters, measured = _tune(temporary, embeddings, targets, parameters)
            choice |= {"targets": asdict(targets), "seed": SEED, **measured}
            why = f"{why}; {measured['verdict']}"
    manifest = IndexManifest(
        factory=factory,
        parameters=parameters,
        why=f"{why}; {f'trained on {gpus} GPU(s)' if gpus else 'built on the CPU'}",
        metric="inner product",
        dim=embeddings.dim,
        count=len(embeddings),
        bytes=path.stat().st_size,
        sha256=sha256_file(path),
        created_at=created_at or datetime.now(UTC).isoformat(timespec="seconds"),
        elapsed_s=round(time.perf_counter() - started, 3),
        choice=choice or None,
    )
    manifest.write(bundle / INDEX_MANIFEST_FILE)
    return manifest


def _write_flat(path: Path, index: Any, embeddings: Embeddings, batches: Iterable[Float32Array]) -> None:
    """Write the file of an exact index without holding all vectors in memory, as faiss would.

    The layout is that of `IndexFlatIP` in faiss/impl/index_write.cpp: a header, then float32 [N, D].
    """
    header = faiss.serialize_index(index).tobytes()
    assert len(header) == _FLAT_HEADER_BYTES, "this version of faiss writes another layout"
    count = len(embeddings)
    with path.open("wb") as file:
        file.write(header[:8] + struct.pack("<q", count) + header[16:-8] + struct.pack("<Q", count * embeddings.dim))
        for embeddings_nD in batches:
            file.write(embeddings_nD.tobytes())


def _reserve(index: Any, count: int) -> None:
    """Allocate all codes at once. Growing by doubling would need up to three times their size."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexHNSW):
        index = faiss.downcast_index(index.storage)
    if isinstance(index, faiss.IndexFlatCodes) and not isinstance(index, faiss.IndexFastScan):
        index.codes.resize(count * index.code_size)
        index.codes.resize(0)


def _tune(
    path: Path, embeddings: Embeddings, targets: Targets, untuned: Mapping[str, Any]
) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """Return the fastest parameters that reach the recall at full size, and the measurements."""
    positions_Q = np.random.default_rng(SEED).integers(len(embeddings), size=QUERIES)
    queries_QD = held_out_queries(embeddings, positions_Q, SEED)
    points = curve(
        EntityIndex.read(path, embeddings, untuned), queries_QD, exact_positions(embeddings, queries_QD), targets.recall
    )
    best = cheapest(points, targets.recall)
    if best is None:
        best = max(points, key=lambda point: point.recall)
        verdict = f"measured over all: recall@10 no more than {best.recall:.4f}, {targets.recall} was asked for"
    else:
        within = "within" if best.p50_ms <= targets.budget_ms else "NOT within"
        # The verdict is part of the bundle's fingerprint, so it leaves out the measured time.
        verdict = f"measured over all: recall@10 {best.recall:.4f}, {within} {targets.budget_ms:g} ms"
    return best.parameters, {"verdict": verdict, "curve": [asdict(point) for point in points]}

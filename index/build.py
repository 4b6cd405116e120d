"""Build the search index of a bundle: `index/entity.faiss` and, last, `index/manifest.json`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from core.files import atomic_write, sha256_file
from core.runtime import faiss
from index.choose import Targets, choose
from index.embeddings import EmbeddingShards, Float32Array
from index.factory import SEED, factory_index, fill, gpu_count, train
from index.flat_file import is_flat, write_flat
from index.manifest import INDEX_FILE, INDEX_MANIFEST_FILE, IndexManifest
from index.search import EntityIndex
from index.tune import QUERIES, cheapest, curve, exact_positions, held_out_queries


def build_index(
    bundle: Path,
    embeddings: EmbeddingShards,
    *,
    factory: str = "Flat",
    targets: Targets | None = None,
    device: str = "auto",
    created_at: str | None = None,
    progress: bool = False,
) -> IndexManifest:
    """Index all `embeddings` and write the result durably below `bundle`; one that was there is replaced.

    `factory` is any string faiss's `index_factory` takes, or `auto`: then `targets` decide. With `targets` the search
    parameters are tuned at full size; without they are on the side of finding more. `device` is `auto`, `cpu` or
    `cuda`, and says where lists are trained. Raises `UserError` for a factory faiss cannot make or train, for targets
    that no index is expected to meet, and where cuda is asked for and faiss has none.
    """
    started = time.perf_counter()
    gpus = gpu_count(device)
    choice: dict[str, Any] = {}
    why = "exact search, nothing is lost" if factory == "Flat" else "given on the command line"
    if factory == "auto":
        targets = targets or Targets()
        chosen = choose(embeddings, targets, progress=progress)
        factory, why = chosen.factory, chosen.why
        choice["candidates"] = chosen.candidates
    index = factory_index(embeddings.dim, factory)
    parameters: Mapping[str, Any] = _untuned(index)
    path = bundle / INDEX_FILE
    path.parent.mkdir(exist_ok=True)
    with atomic_write(path) as temporary:
        batches = _shown(embeddings, progress)
        if is_flat(index):  # nothing to train or to compute, so memory for all of them is not wanted
            write_flat(temporary, index, embeddings, batches)
        else:
            _fill(index, embeddings, factory, gpus, batches)
            faiss.write_index(index, str(temporary))
        del index  # what is tuned is what will be served: the file, mapped
        if targets is not None and len(embeddings):
            parameters, measured = _tuned(temporary, embeddings, targets, parameters)
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


def _fill(index: Any, embeddings: EmbeddingShards, factory: str, gpus: int, batches: Iterator[Float32Array]) -> None:
    train(index, embeddings, factory, gpus)
    _reserve(index, len(embeddings))
    fill(index, batches)


def _shown(embeddings: EmbeddingShards, progress: bool) -> Iterator[Float32Array]:
    """The embeddings of each shard, under a progress bar."""
    with tqdm(total=len(embeddings), desc="index", unit="embedding", disable=not progress) as bar:
        for embeddings_nD in embeddings:
            yield embeddings_nD
            bar.update(len(embeddings_nD))


def _reserve(index: Any, count: int) -> None:
    """Room for all codes at once: growing by doubling would hold them up to three times."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexHNSW):
        index = faiss.downcast_index(index.storage)
    if isinstance(index, faiss.IndexFlatCodes) and not isinstance(index, faiss.IndexFastScan):
        index.codes.resize(count * index.code_size)
        index.codes.resize(0)


def _tuned(
    path: Path, embeddings: EmbeddingShards, targets: Targets, untuned: Mapping[str, Any]
) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """The quickest parameters that reach the recall at full size, and what was measured for them."""
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
        # The time itself is in the curve: this sentence is part of the bundle's fingerprint.
        verdict = f"measured over all: recall@10 {best.recall:.4f}, {within} {targets.budget_ms:g} ms"
    return best.parameters, {"verdict": verdict, "curve": [asdict(point) for point in points]}


def _untuned(index: Any) -> dict[str, Any]:
    """The search parameters that go with an index: untuned, on the side of finding more."""
    parameters: dict[str, Any] = {}
    index = faiss.downcast_index(index)
    while True:
        if isinstance(index, faiss.IndexPreTransform):
            index = faiss.downcast_index(index.index)
        elif isinstance(index, faiss.IndexRefine):
            parameters["k_factor"] = 10
            index = faiss.downcast_index(index.base_index)
        else:
            break
    if isinstance(index, faiss.IndexIVF):
        parameters["nprobe"] = max(1, round(2 * index.nlist**0.5))
    elif isinstance(index, faiss.IndexHNSW):
        parameters["efSearch"] = 128
    if isinstance(index, (faiss.IndexPQ, faiss.IndexIVFPQ, faiss.IndexFastScan, faiss.IndexIVFFastScan)):
        parameters["k_factor"] = 50
    return parameters

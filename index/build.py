"""Build the search index of a bundle: `index/entity.faiss` and, last, `index/manifest.json`."""

from __future__ import annotations

import math
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from tqdm import tqdm

from core.errors import UserError
from core.files import durable, sha256_file
from index.embeddings import EmbeddingShards
from index.manifest import INDEX_FILE, INDEX_MANIFEST_FILE, IndexManifest
from index.search import factory_index

_MAX_TRAINING_VECTORS = 500_000


def build_index(
    bundle: Path,
    embeddings: EmbeddingShards,
    *,
    factory: str = "auto",
    device: str = "auto",
    created_at: str | None = None,
    progress: bool = False,
) -> IndexManifest:
    """Index all `embeddings` and write the result durably below `bundle`; one that was there is replaced.

    `factory` is `auto` or any string faiss's `index_factory` takes; `device` is `auto`, `cpu` or `cuda`. Raises
    `UserError` for a factory faiss cannot make or train, and where cuda is asked for and faiss has none.
    """
    started = time.perf_counter()
    chosen, why = _choose(factory, len(embeddings))
    index = factory_index(embeddings.dim, chosen)
    on_device, device_why = _to_device(index, device)
    _train(on_device, embeddings, chosen)
    with tqdm(total=len(embeddings), desc="index", unit="embedding", disable=not progress) as bar:
        for embeddings_nD in embeddings:
            on_device.add(embeddings_nD)
            bar.update(len(embeddings_nD))
    if on_device is not index:
        index = faiss.index_gpu_to_cpu(on_device)
    path = bundle / INDEX_FILE
    path.parent.mkdir(exist_ok=True)
    with durable(path) as temporary:
        faiss.write_index(index, str(temporary))
    manifest = IndexManifest(
        factory=chosen,
        parameters=_parameters(index),
        why=f"{why}; {device_why}",
        metric="inner product",
        dim=embeddings.dim,
        count=len(embeddings),
        bytes=path.stat().st_size,
        sha256=sha256_file(path),
        created_at=created_at or datetime.now(UTC).isoformat(timespec="seconds"),
        elapsed_s=round(time.perf_counter() - started, 3),
    )
    manifest.write(bundle / INDEX_MANIFEST_FILE)
    return manifest


def _choose(factory: str, count: int) -> tuple[str, str]:
    if factory == "auto":
        return "Flat", f"auto: exact search over {count} embeddings, nothing is lost"
    return factory, "given on the command line"


def _to_device(index: Any, device: str) -> tuple[Any, str]:
    # The CPU wheel has the function, but always answers 0.
    gpus = faiss.get_num_gpus() if hasattr(faiss, "StandardGpuResources") else 0
    if device == "cuda" and gpus == 0:
        raise UserError(
            "--device cuda: this faiss sees no GPU; install the `gpu` extra on a machine with one, or use --device cpu"
        )
    if device == "cpu" or gpus == 0:
        return index, "built on the CPU"
    return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index), "built on a GPU"


def _train(index: Any, embeddings: EmbeddingShards, factory: str) -> None:
    if index.is_trained:
        return
    step = math.ceil(len(embeddings) / _MAX_TRAINING_VECTORS) or 1
    sample_SD = embeddings.at(np.arange(0, len(embeddings), step))
    try:
        index.train(sample_SD)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1]
        raise UserError(
            f"factory {factory!r} cannot be trained on {len(sample_SD)} embeddings ({reason}); take a smaller one"
        ) from error


def _parameters(index: Any) -> dict[str, Any]:
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
        parameters["nprobe"] = max(1, math.isqrt(index.nlist) * 2)
    elif isinstance(index, faiss.IndexHNSW):
        parameters["efSearch"] = 128
    return parameters

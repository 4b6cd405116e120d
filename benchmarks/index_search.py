"""`wikiclip bench index`: how long a search over the bundle's embeddings takes, single queries and batches of 64."""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np

from benchmarks.timing import percentiles_ms
from index.bundle import Bundle

BATCH = 64


def measure(bundle_path: Path, *, smoke: bool) -> dict[str, object]:
    """Latency of single queries on one thread, and queries a second in batches on one thread; top-10."""
    bundle = Bundle.open(bundle_path)
    index = bundle.index()
    dim = bundle.manifest.embedding_dim
    random = np.random.default_rng(0)
    # Queries near real embeddings: random directions would be far from everything.
    embeddings = bundle.embeddings()
    chosen = random.integers(len(embeddings), size=4096)
    queries = embeddings.at(chosen) + random.normal(0, 0.5 / np.sqrt(dim), (len(chosen), dim)).astype(np.float32)
    faiss.omp_set_num_threads(1)
    repeats = 200 if smoke else 2000
    single = percentiles_ms(lambda i: index.search(queries[i % 4096][None], 10), repeats=repeats, warm_up=20)
    starts = range(0, 4096, BATCH)
    batched = percentiles_ms(
        lambda i: index.search(queries[starts[i % len(starts)] :][:BATCH], 10),
        repeats=max(10, repeats // 20),
        warm_up=2,
    )
    return {
        "factory": bundle.index_manifest.factory,
        "embeddings": len(index),
        "dim": dim,
        "threads": 1,
        "single": single,
        "batch_64_queries_per_s": round(1000 * BATCH / batched["p50_ms"], 1),
    }

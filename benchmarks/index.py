"""`wikiclip bench index`: search time over the bundle's embeddings, and over many more that are synthetic.

`--vectors 6063945` measures at Wikipedia's size. At each size the index is chosen as `wikiclip index` does. Its peers
(flat search, faiss's HNSW and usearch) get the same embeddings. The smaller sizes are the first embeddings of the
largest. All files are written to a temporary folder (`TMPDIR`), 1.1 KB per embedding and more.

Shapes: Q queries, n embeddings of a shard, D embedding width, K = 10 results.
"""

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from benchmarks import synthetic
from benchmarks.measure import percentiles_ms, process_memory_bytes
from core.arrays import Float32Array, Int64Array
from core.runtime import faiss, usable_cores
from evaluation.pages import Bars, Lines, Report
from index.autotune import K, Targets, exact_positions, held_out_queries
from index.build import build_index
from index.bundle import Bundle
from index.embeddings import Embeddings, EmbeddingShards
from index.faiss_index import SEED, one_thread
from index.manifest import EMBEDDINGS_FOLDER

TARGETS = Targets(budget_ms=4.0, recall=0.98, memory_gb=4.0)
_SIZES = (4_000, 20_000, 100_000, 500_000, 1_000_000, 3_000_000)
_QUERIES, _BATCH = 1000, 64
_LINKS = 32  # of an element in HNSW and usearch
_EFFORTS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
REPORT = Report(
    title="The index at any size",
    text="The bundle's own index, then the chosen index and its peers over synthetic embeddings.",
    plots=(
        Bars(title="The bundle's own index", label="ms of one query, one thread", values=("single/*",)),
        Lines(
            title="Latency of the chosen index by size", points=("made_up/sizes/*",), x="vectors",
            y=("single/p50_ms", "single/p99_ms"), x_label="embeddings", y_label="ms of one query, one thread",
            x_log=True, y_log=True,
        ),
        Lines(
            title="Latency against recall at every size",
            points=("made_up/sizes/*/curve/*", "made_up/sizes/*/peers/*/points/*"),
            x="recall_at_10", y=("p50_ms",), x_label="recall@10 against exact search",
            y_label="median ms of one query, one thread", y_log=True,
        ),
    ),
)  # fmt: skip

Search = Callable[[Float32Array, int], Int64Array]  # of queries, with an effort, for positions [Q, K]
BuildPeer = Callable[[Embeddings], Search]


def measure(
    bundle_path: Path,
    *,
    smoke: bool,
    vectors: int | None = None,
    dim: int | None = None,
    peers_up_to: int = 20_000,
) -> dict[str, object]:
    """Measure the bundle's own index, then `vectors` synthetic embeddings of width `dim`."""
    bundle = Bundle.open(bundle_path)
    index, embeddings = bundle.index(), bundle.searched()
    own_dim = bundle.manifest.embedding_dim
    rng = np.random.default_rng(0)
    # Queries are close to embeddings; random directions would be far from all of them.
    near_QD = embeddings.at(rng.integers(len(embeddings), size=_QUERIES))
    queries_QD = near_QD + rng.normal(0, 0.5 / np.sqrt(own_dim), near_QD.shape).astype(np.float32)
    vectors, dim = vectors or (4_000 if smoke else 100_000), dim or (32 if smoke else 512)
    return {
        "factory": bundle.index_manifest.factory,
        "embeddings": len(index),
        "dim": own_dim,
        "threads": 1,
        **_latency(index, queries_QD, repeats=200 if smoke else 2000),
        "made_up": measure_sizes(bundle, vectors, dim, peers_up_to, repeats=50 if smoke else 200),
    }


def as_table(figures: Mapping[str, Any]) -> str:
    """Return the figures as text, one index per line. Of a peer, the fastest point with the wanted recall counts."""
    rows = [("embeddings", "index", "recall@10", "p50 ms", "p99 ms", "queries/s")]

    def add(embeddings: int, name: str, latency: Mapping[str, float], recall: object = "", per_s: object = "") -> None:
        rows.append((f"{embeddings:,}", name, str(recall), str(latency["p50_ms"]), str(latency["p99_ms"]), str(per_s)))

    own, synthetic_sizes = figures, figures["made_up"]["sizes"]
    add(own["embeddings"], f"the bundle's {own['factory']}", own["single"], per_s=own["batch_64_queries_per_s"])
    for size in synthetic_sizes:
        found = size["recall_at_10"], size["batch_64_queries_per_s"]
        add(size["vectors"], f"chosen {size['factory']}", size["single"], *found)
        for peer, measured in size["peers"].items():
            reached = [point for point in measured["points"] if point["recall_at_10"] >= TARGETS.recall]
            if reached:
                best = min(reached, key=itemgetter("p50_ms"))
                add(size["vectors"], peer, best, best["recall_at_10"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [" ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, "one thread; queries/s in batches of 64; synthetic embeddings but for the bundle's"])


def _latency(index: Any, queries_QD: Float32Array, *, repeats: int) -> dict[str, Any]:
    """Return the latency of one query and the queries per second in batches, on one thread."""
    faiss.omp_set_num_threads(1)
    count = len(queries_QD)
    single = percentiles_ms(lambda i: index.search(queries_QD[i % count][None], K), repeats=repeats, warm_up=50)
    batched = percentiles_ms(lambda i: index.search(np.roll(queries_QD, i, 0)[:_BATCH], K), repeats=20, warm_up=2)
    return {
        "single": single,
        "batch_64_queries_per_s": round(1000 * min(_BATCH, count) / batched["p50_ms"], 1),
    }


# ---- the chosen index at every size ----


def measure_sizes(like: Bundle, vectors: int, dim: int, peers_up_to: int, *, repeats: int) -> dict[str, Any]:
    """Build and measure at every size, with the image encoder of the bundle `like`."""
    sizes = []
    for size in tqdm([*(size for size in _SIZES if size < vectors), vectors], desc="size"):
        with TemporaryDirectory(prefix="bench-index.") as temporary:
            folder = Path(temporary) / "bundle"
            synthetic.write_embeddings(folder / EMBEDDINGS_FOLDER, size, dim)
            synthetic.write_bundle(folder, like, count=size)
            peers = PEERS if size <= peers_up_to else {}
            sizes.append(_at_size(folder, dim, peers, repeats=repeats))
        click.echo(json.dumps(sizes[-1]), err=True)  # so that an interrupted run leaves its results
    return {"vectors": vectors, "dim": dim, "targets": vars(TARGETS), "sizes": sizes}


def _at_size(folder: Path, dim: int, peers: Mapping[str, BuildPeer], *, repeats: int) -> dict[str, Any]:
    """Return the figures of the chosen index and its peers."""
    embeddings = EmbeddingShards(folder / EMBEDDINGS_FOLDER, dim)
    manifest = build_index(folder, embeddings, factory="auto", targets=TARGETS, device="cpu", progress=True)
    # The index was tuned with other queries.
    rng = np.random.default_rng(SEED + 1)
    queries_QD = held_out_queries(embeddings, rng.integers(len(embeddings), size=_QUERIES), SEED + 1)
    truth_QK = exact_positions(embeddings, queries_QD)
    points = (manifest.choice or {}).get("curve", ())
    # The memory of a new process is not affected by other work.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        served = process.submit(probe, folder, queries_QD, truth_QK).result()
    return {
        "vectors": len(embeddings),
        "factory": manifest.factory,
        "parameters": dict(manifest.parameters),
        "build_s": manifest.elapsed_s,
        "index_mb": round(manifest.bytes / 1e6, 1),
        "curve": [{"recall_at_10": round(point["recall"], 4), "p50_ms": point["p50_ms"]} for point in points],
        **served,
        "peers": {
            name: _measure_peer(build, embeddings, queries_QD, truth_QK, repeats) for name, build in peers.items()
        },
    }


def probe(bundle_path: Path, queries_QD: Float32Array, truth_QK: Int64Array) -> dict[str, Any]:
    """Open a bundle as a service does. Return time to the first answer, latency, recall@10 and memory."""
    faiss.omp_set_num_threads(1)
    started = time.perf_counter()
    bundle = Bundle.open(bundle_path)
    index, store = bundle.index(), bundle.store()
    rows_BK, _ = index.search(queries_QD[:1], K)
    store.by_rows(rows_BK[0].tolist())
    ready_s = time.perf_counter() - started
    found_QK = np.concatenate([index.search(query_D[None], K)[0] for query_D in queries_QD])
    return {
        "ready_s": round(ready_s, 3),
        "recall_at_10": round(overlap(found_QK, truth_QK), 4),
        **_latency(index, queries_QD, repeats=1000),
        "memory_mb": {kind: round(size / 1024**2, 1) for kind, size in process_memory_bytes(os.getpid()).items()},
    }


def overlap(found_QK: npt.NDArray[Any], truth_QK: npt.NDArray[Any]) -> float:
    """Return the share of the true nearest that were found."""
    return float((truth_QK[:, :, None] == found_QK[:, None, :]).any(axis=2).mean())


# ---- peers ----


def _faiss_peer(factory: str, embeddings: Embeddings) -> Search:
    faiss.omp_set_num_threads(usable_cores())
    index = faiss.index_factory(embeddings.dim, factory, faiss.METRIC_INNER_PRODUCT)
    for part_nD in embeddings:
        if not index.is_trained:
            index.train(part_nD[:1000])
        index.add(part_nD)

    def search(queries_QD: Float32Array, effort: int) -> Int64Array:
        if factory.startswith("HNSW"):
            index.hnsw.efSearch = effort
        return np.asarray(index.search(queries_QD, K)[1])

    return search


def _usearch_peer(embeddings: Embeddings) -> Search:
    from usearch.index import Index  # faiss crashes if it is loaded after usearch

    index = Index(ndim=embeddings.dim, metric="ip", dtype="f16", connectivity=_LINKS)
    for part_nD in embeddings:
        positions_n = np.arange(len(index), len(index) + len(part_nD), dtype=np.uint64)
        index.add(positions_n, part_nD, threads=usable_cores())

    def search(queries_QD: Float32Array, effort: int) -> Int64Array:
        index.expansion_search = effort  # type: ignore[misc]  # it has a setter
        keys = index.search(queries_QD, K, threads=1).keys  # one-dimensional for a single query
        return np.atleast_2d(np.asarray(keys)).astype(np.int64)

    return search


PEERS: dict[str, BuildPeer] = {  # all over float16
    "flat": partial(_faiss_peer, "SQfp16"),
    "HNSW32": partial(_faiss_peer, f"HNSW{_LINKS}_SQfp16"),
    "usearch": _usearch_peer,
}


def _measure_peer(
    build: BuildPeer, embeddings: Embeddings, queries_QD: Float32Array, truth_QK: Int64Array, repeats: int
) -> dict[str, Any]:
    """Return the build time, and recall and latency of one query on one thread by effort."""
    started = time.perf_counter()
    search = build(embeddings)
    build_s = time.perf_counter() - started
    points = []
    with one_thread():
        for effort in (0,) if build is PEERS["flat"] else _EFFORTS:
            found_QK = np.concatenate([search(query_D[None], effort) for query_D in queries_QD])
            latency = percentiles_ms(
                lambda i, effort=effort: search(queries_QD[i % len(queries_QD)][None], effort),  # type: ignore[misc]
                repeats=repeats,
                warm_up=5,
            )
            points.append({"effort": effort, "recall_at_10": round(overlap(found_QK, truth_QK), 4), **latency})
    return {"build_s": round(build_s, 1), "points": points}

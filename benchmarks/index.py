"""`wikiclip bench index`: search time over the bundle's embeddings, and over many more that are synthetic.

`python -m benchmarks.index --vectors 6063945` measures at Wikipedia's size. At each size the index is chosen as
`wikiclip index` does, next to flat search, faiss's HNSW and usearch on the same embeddings. The smaller sizes are the
first embeddings of the largest. All files are written to a work folder, which is removed at the end.

Shapes: Q queries, n embeddings added at once, D embedding width, K = 10 results.
"""

from __future__ import annotations

import json
import multiprocessing
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from benchmarks import synthetic
from benchmarks.measure import percentiles_ms, write_outcome
from core.cli import run
from core.runtime import describe_run, faiss, usable_cores
from evaluation.pages import Lines, Report
from index.autotune import K, Targets, exact_positions, held_out_queries
from index.build import build_index
from index.bundle import Bundle
from index.embeddings import Embeddings, EmbeddingShards
from index.faiss_index import SEED, one_thread
from index.manifest import EMBEDDINGS_FOLDER

TARGETS = Targets(budget_ms=4.0, recall=0.98, memory_gb=4.0)
WORK = Path("build/bench-index")
_SIZES = (20_000, 100_000, 500_000, 1_000_000, 3_000_000)
_QUERIES, _BATCH = 1000, 64
_LINKS = 32  # of an element in HNSW and usearch
_EFFORTS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_RECALL_AXES: dict[str, Any] = {
    "x": "recall_at_10", "y": ("p50_ms",), "x_label": "recall@10 against exact search",
    "y_label": "median ms of one query, one thread", "y_log": True,
}  # fmt: skip
REPORT = Report(
    title="The index at any size",
    text="The chosen index and its peers over synthetic embeddings.",
    plots=(
        Lines(
            title="Latency of the chosen index by size", points=("made_up/sizes/*",), x="vectors",
            y=("single/p50_ms", "single/p99_ms"), x_label="embeddings", y_label="ms of one query, one thread",
            x_log=True, y_log=True,
        ),
        Lines(
            title="The smallest size", points=("made_up/sizes/0/curve/*", "made_up/sizes/0/peers/*/points/*"),
            **_RECALL_AXES,
        ),
        Lines(
            title="All sizes", points=("made_up/sizes/*/curve/*", "made_up/sizes/*/peers/*/points/*"), **_RECALL_AXES
        ),
    ),
)  # fmt: skip

Float32Array = npt.NDArray[np.float32]
Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The largest size, and the largest sizes at which peers are built, since building them takes much longer."""

    vectors: int = 100_000
    dim: int = 512
    peers_up_to: int = 20_000
    usearch_up_to: int = 20_000  # builds two to five times as slowly as faiss's HNSW
    growth: bool = True
    repeats: int = 200

    @property
    def sizes(self) -> list[int]:
        return [*(size for size in _SIZES if self.growth and size < self.vectors), self.vectors]

    def sizes_of(self, peer: str) -> list[int]:
        """Return the sizes at which a peer is measured."""
        largest = self.usearch_up_to if peer == "usearch" else self.peers_up_to
        return [size for size in self.sizes if size <= largest]


SMOKE = Scale(vectors=6_000, dim=32, repeats=50)


def measure(
    bundle_path: Path, *, smoke: bool, scale: Scale | None = None, work: Path | None = None
) -> dict[str, object]:
    """Measure the bundle's own index, then synthetic ones in the folder `work`."""
    bundle = Bundle.open(bundle_path)
    scale = scale or (SMOKE if smoke else Scale())
    index, embeddings = bundle.index(), bundle.embeddings()
    dim = bundle.manifest.embedding_dim
    rng = np.random.default_rng(0)
    # Queries are close to embeddings; random directions would be far from all of them.
    positions = rng.integers(len(embeddings), size=_QUERIES)
    queries_QD = embeddings.at(positions) + rng.normal(0, 0.5 / np.sqrt(dim), (_QUERIES, dim)).astype(np.float32)
    return {
        "factory": bundle.index_manifest.factory,
        "embeddings": len(index),
        "dim": dim,
        "threads": 1,
        **_latency(index, queries_QD, repeats=200 if smoke else 2000),
        "made_up": measure_scale(bundle, scale, work or WORK),
    }


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


def measure_scale(like: Bundle, scale: Scale, work: Path) -> dict[str, Any]:
    """Build and measure at every size, with the image encoder of the bundle `like`."""
    whole = work / "whole"
    shutil.rmtree(work, ignore_errors=True)
    try:
        synthetic.write_embeddings(whole / EMBEDDINGS_FOLDER, scale.vectors, scale.dim)
        figures: dict[int, dict[str, Any]] = {}
        truths: dict[int, Path] = {}
        for size in tqdm(scale.sizes, desc="size"):
            truths[size] = work / f"queries-{size}.npz"
            figures[size] = _at_size(size, whole, like, scale, truths[size])
        embeddings = EmbeddingShards(whole / EMBEDDINGS_FOLDER, scale.dim)
        for name in tqdm(PEERS, desc="peer"):
            sizes = scale.sizes_of(name)
            growing = _measure_peer(name, embeddings, [truths[size] for size in sizes], scale.repeats)
            for size, measured in zip(sizes, growing, strict=True):
                figures[size].setdefault("peers", {})[name] = measured
                _log({"vectors": size, name: measured})
        return {"vectors": scale.vectors, "dim": scale.dim, "targets": vars(TARGETS), "sizes": [*figures.values()]}
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _at_size(size: int, whole: Path, like: Bundle, scale: Scale, query_file: Path) -> dict[str, Any]:
    """Return the figures of the chosen index. Write the queries it was measured with and their nearest embeddings."""
    folder = whole
    if size != scale.vectors:
        folder = whole.with_name(f"first-{size}")
        synthetic.link_first_shards(folder / EMBEDDINGS_FOLDER, whole / EMBEDDINGS_FOLDER, size)
    embeddings = EmbeddingShards(folder / EMBEDDINGS_FOLDER, scale.dim)
    synthetic.write_bundle(folder, like, count=size)
    manifest = build_index(folder, embeddings, factory="auto", targets=TARGETS, device="cpu", progress=True)
    # The index was tuned with other queries.
    rng = np.random.default_rng(SEED + 1)
    queries_QD = held_out_queries(embeddings, rng.integers(size, size=_QUERIES), SEED + 1)
    np.savez(query_file, queries=queries_QD, truth=exact_positions(embeddings, queries_QD))
    points = (manifest.choice or {}).get("curve", ())
    figures = {
        "vectors": size,
        "factory": manifest.factory,
        "parameters": dict(manifest.parameters),
        "build_s": manifest.elapsed_s,
        "index_mb": round(manifest.bytes / 1e6, 1),
        "curve": [{"recall_at_10": round(point["recall"], 4), "p50_ms": point["p50_ms"]} for point in points],
        **_in_processes(folder, query_file),
    }
    if folder != whole:
        shutil.rmtree(folder)
    _log(figures)
    return figures


def _log(figures: dict[str, Any]) -> None:
    click.echo(json.dumps(figures), err=True)  # so that an interrupted run leaves its results


def _in_processes(folder: Path, query_file: Path) -> dict[str, Any]:
    """Return what a process measures after opening the bundle, and the memory of two such processes."""
    spawn = multiprocessing.get_context("spawn")  # the memory of a new process is not affected by other work
    with ProcessPoolExecutor(1, spawn) as first, ProcessPoolExecutor(1, spawn) as second:
        figures = first.submit(probe, folder, query_file).result()
        second.submit(probe, folder, query_file).result()
        again = [process.submit(_search_all, query_file).result() for process in (first, second)]
        return {**figures, "two_processes_mb": again}


_opened: dict[Path, Any] = {}  # the index of this process by its query file


def probe(bundle_path: Path, query_file: Path) -> dict[str, Any]:
    """Open a bundle as a service does. Return time to the first answer, latency, recall@10 and memory."""
    arrays = np.load(query_file)
    queries_QD, truth_QK = arrays["queries"], arrays["truth"]
    faiss.omp_set_num_threads(1)
    started = time.perf_counter()
    bundle = Bundle.open(bundle_path)
    checked_s = time.perf_counter() - started
    index, store = bundle.index(), bundle.store()
    rows_BK, _ = index.search(queries_QD[:1], K)
    store.by_rows(rows_BK[0].tolist())
    ready_s = time.perf_counter() - started
    _opened[query_file] = index
    found_QK = np.concatenate([index.search(query_D[None], K)[0] for query_D in queries_QD])
    return {
        "checked_s": round(checked_s, 3),
        "ready_s": round(ready_s, 3),
        "recall_at_10": round(overlap(found_QK, truth_QK), 4),
        **_latency(index, queries_QD, repeats=1000),
        "memory_mb": _memory_mb(),
    }


def _search_all(query_file: Path) -> dict[str, float]:
    """Run all queries again and return the memory of this process."""
    _opened[query_file].search(np.load(query_file)["queries"], K)
    return _memory_mb()


def overlap(found_QK: npt.NDArray[Any], truth_QK: npt.NDArray[Any]) -> float:
    """Return the share of the true nearest that were found."""
    return float((truth_QK[:, :, None] == found_QK[:, None, :]).any(axis=2).mean())


def _memory_mb() -> dict[str, float]:
    """Return this process's own memory, that of mapped files, and its share of memory that several processes map."""
    status = Path("/proc/self/status").read_text() + Path("/proc/self/smaps_rollup").read_text()
    found = dict(re.findall(r"^(RssAnon|RssFile|Pss):\s+(\d+) kB", status, re.MULTILINE))
    kinds = {"own": "RssAnon", "mapped": "RssFile", "share": "Pss"}
    return {kind: round(int(found[name]) / 1024, 1) for kind, name in kinds.items()}


# ---- peers ----


class FaissPeer:
    """Flat search or HNSW over float16."""

    def __init__(self, index: Any, efforts: Sequence[int]) -> None:
        self.efforts, self._index = efforts, index

    def add(self, part_nD: Float32Array) -> None:
        faiss.omp_set_num_threads(usable_cores())
        if not self._index.is_trained:
            self._index.train(part_nD[:1000])
        self._index.add(part_nD)

    def search(self, queries_QD: Float32Array, effort: int) -> Int64Array:
        if effort:
            self._index.hnsw.efSearch = effort
        return np.asarray(self._index.search(queries_QD, K)[1])


class UsearchPeer:
    """usearch over float16."""

    def __init__(self, dim: int) -> None:
        from usearch.index import Index  # faiss crashes if it is loaded after usearch

        self.efforts: Sequence[int] = _EFFORTS
        self._index = Index(ndim=dim, metric="ip", dtype="f16", connectivity=_LINKS)

    def add(self, part_nD: Float32Array) -> None:
        keys_n = np.arange(len(self._index), len(self._index) + len(part_nD), dtype=np.uint64)
        self._index.add(keys_n, part_nD, threads=usable_cores())

    def search(self, queries_QD: Float32Array, effort: int) -> Int64Array:
        self._index.expansion_search = effort  # type: ignore[misc]  # it has a setter
        keys = self._index.search(queries_QD, K, threads=1).keys  # one-dimensional for a single query
        return np.atleast_2d(np.asarray(keys)).astype(np.int64)


Peer = FaissPeer | UsearchPeer
PEERS: dict[str, Callable[[int], Peer]] = {
    "flat": lambda dim: FaissPeer(faiss.index_factory(dim, "SQfp16", faiss.METRIC_INNER_PRODUCT), (0,)),
    "HNSW32": lambda dim: FaissPeer(
        faiss.index_factory(dim, f"HNSW{_LINKS}_SQfp16", faiss.METRIC_INNER_PRODUCT), _EFFORTS
    ),
    "usearch": UsearchPeer,
}


def _measure_peer(
    name: str, embeddings: Embeddings, query_files: Sequence[Path], repeats: int
) -> Iterator[dict[str, Any]]:
    """Grow an index from one size to the next, in whole shards. Yield the build time so far, and recall and latency of
    one query on one thread by effort."""
    peer = PEERS[name](embeddings.dim)
    parts = iter(embeddings)
    added, build_s = 0, 0.0
    for query_file in query_files:
        size = int(query_file.stem.partition("-")[2])
        while added < size:
            part_nD = next(parts)
            started = time.perf_counter()
            peer.add(part_nD)
            build_s += time.perf_counter() - started
            added += len(part_nD)
        with np.load(query_file) as arrays:
            points = [_point(peer, effort, arrays["queries"], arrays["truth"], repeats) for effort in peer.efforts]
        yield {"build_s": round(build_s, 1), "points": points}


def _point(peer: Peer, effort: int, queries_QD: Float32Array, truth_QK: Int64Array, repeats: int) -> dict[str, Any]:
    with one_thread():
        found_QK = np.concatenate([peer.search(query_D[None], effort) for query_D in queries_QD])
        latency = percentiles_ms(
            lambda i: peer.search(queries_QD[i % len(queries_QD)][None], effort), repeats=repeats, warm_up=5
        )
    return {"effort": effort, "recall_at_10": round(overlap(found_QK, truth_QK), 4), **latency}


@click.command(context_settings={"show_default": True})
@click.option("--vectors", default=Scale.vectors, help="Synthetic embeddings at the largest size.")
@click.option("--dim", default=Scale.dim, help="Their width.")
@click.option("--peers-up-to", default=Scale.peers_up_to, help="The largest size with flat search and HNSW.")
@click.option("--usearch-up-to", default=Scale.usearch_up_to, help="The largest size with usearch, which is slower.")
@click.option("--growth/--no-growth", default=True, help="Measure the smaller sizes too.")
@click.option("--bundle", default="demo/bundle", type=click.Path(path_type=Path))
@click.option(
    "--work", default=WORK, type=click.Path(path_type=Path),
    help="Work folder, 1.1 KB per embedding and more; it is emptied first and removed at the end.",
)  # fmt: skip
@click.option("--results", default="benchmarks/results", type=click.Path(path_type=Path))
def main(bundle: Path, work: Path, results: Path, **scale_options: Any) -> None:
    """Measure the index over synthetic embeddings; writes index.json and index.html."""
    scale = Scale(**scale_options)
    ran = describe_run({"bundle": bundle.name, "smoke": False, "benchmarks": ["index"], **vars(scale)})
    figures = measure(bundle, smoke=False, scale=scale, work=work)
    write_outcome(results, "index", {**ran, "figures": figures}, REPORT.title, {"index": (REPORT, figures)})
    click.echo(json.dumps(figures))


if __name__ == "__main__":
    run(main)

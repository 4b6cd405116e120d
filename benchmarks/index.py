"""`wikiclip bench index`: search time over the bundle's embeddings, and over many more that are synthetic.

`python -m benchmarks.index --vectors 6063945` measures at Wikipedia's size. At each size the index is chosen as
`wikiclip index` does, next to flat search, faiss's HNSW and usearch on the same embeddings. The smaller sizes are the
first embeddings of the largest. All files are written to a work folder, which is removed at the end.

Shapes: Q queries, n embeddings added at once, D embedding width, K = 10 results.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import click
import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from benchmarks import synthetic
from benchmarks.index_probe import memory_after_searching, overlap, probing, read_reply
from benchmarks.measure import percentiles_ms, write_report, write_results
from core.cli import run
from core.runtime import describe_run, faiss, usable_cores
from evaluation.pages import Series, line_plot, page, section, table
from index.autotune import K, Targets, exact_positions, held_out_queries
from index.build import build_index
from index.bundle import Bundle
from index.embeddings import Embeddings, EmbeddingShards
from index.faiss_index import SEED, one_thread
from index.manifest import EMBEDDINGS_FOLDER, IndexManifest

TARGETS = Targets(budget_ms=4.0, recall=0.98, memory_gb=4.0)
WORK = Path("build/bench-index")
_SIZES = (20_000, 100_000, 500_000, 1_000_000, 3_000_000)
_QUERIES, _BATCH = 1000, 64
_LINKS = 32  # of an element in HNSW and usearch
_EFFORTS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)

Float32Array = npt.NDArray[np.float32]
Int64Array = npt.NDArray[np.int64]
Search = Callable[[Float32Array], Int64Array]  # from queries to the positions of the nearest embeddings


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The largest size, and the largest sizes at which peers are built, since building them takes much longer."""

    vectors: int
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


DEFAULT = Scale(vectors=100_000)
SMOKE = Scale(vectors=6_000, dim=32, repeats=50)


def measure(
    bundle_path: Path, *, smoke: bool, scale: Scale | None = None, work: Path | None = None
) -> dict[str, object]:
    """Measure the bundle's own index, then synthetic ones in the folder `work`."""
    bundle = Bundle.open(bundle_path)
    scale = scale or (SMOKE if smoke else DEFAULT)
    return {**_of_bundle(bundle, smoke=smoke), "made_up": measure_scale(bundle, scale, work or WORK)}


def _of_bundle(bundle: Bundle, *, smoke: bool) -> dict[str, object]:
    """Return the latency of single queries, and queries per second in batches: top-10 on one thread."""
    index, embeddings = bundle.index(), bundle.embeddings()
    dim = bundle.manifest.embedding_dim
    rng = np.random.default_rng(0)
    # Queries are close to embeddings; random directions would be far from all of them.
    positions = rng.integers(len(embeddings), size=4096)
    queries = embeddings.at(positions) + rng.normal(0, 0.5 / np.sqrt(dim), (len(positions), dim)).astype(np.float32)
    faiss.omp_set_num_threads(1)
    repeats = 200 if smoke else 2000
    single = percentiles_ms(lambda i: index.search(queries[i % 4096][None], 10), repeats=repeats, warm_up=20)
    batches = np.split(queries, 4096 // _BATCH)
    batched = percentiles_ms(
        lambda i: index.search(batches[i % len(batches)], 10), repeats=max(10, repeats // 20), warm_up=2
    )
    return {
        "factory": bundle.index_manifest.factory,
        "embeddings": len(index),
        "dim": dim,
        "threads": 1,
        "single": single,
        "batch_64_queries_per_s": round(1000 * _BATCH / batched["p50_ms"], 1),
    }


def measure_scale(like: Bundle, scale: Scale, work: Path) -> dict[str, Any]:
    """Build and measure at every size, with the image encoder of the bundle `like`."""
    whole = work / "whole"
    shutil.rmtree(work, ignore_errors=True)
    try:
        synthetic.write_embeddings(whole / EMBEDDINGS_FOLDER, scale.vectors, scale.dim, progress=True)
        figures: dict[int, dict[str, Any]] = {}
        truths: dict[int, Truth] = {}
        for size in tqdm(scale.sizes, desc="size"):
            figures[size], truths[size] = _at_size(size, whole, like, scale, work)
        embeddings = EmbeddingShards(whole / EMBEDDINGS_FOLDER, scale.dim)
        for name in tqdm(PEERS, desc="peer"):
            growing = [truths[size] for size in scale.sizes_of(name)]
            for truth, measured in zip(growing, _measure_peer(name, embeddings, growing, scale.repeats), strict=True):
                figures[truth.size].setdefault("peers", {})[name] = measured
                _log({"vectors": truth.size, name: measured})
        return {"vectors": scale.vectors, "dim": scale.dim, "targets": vars(TARGETS), "sizes": [*figures.values()]}
    finally:
        shutil.rmtree(work, ignore_errors=True)


@dataclass(frozen=True)
class Truth:
    """Queries at one size, and the positions of their nearest embeddings."""

    size: int
    queries_QD: Float32Array
    nearest_QK: Int64Array


def _at_size(size: int, whole: Path, like: Bundle, scale: Scale, work: Path) -> tuple[dict[str, Any], Truth]:
    """Return the figures of the chosen index, and the queries it was measured with."""
    folder = whole
    if size != scale.vectors:
        folder = work / f"first-{size}"
        synthetic.link_first_shards(folder / EMBEDDINGS_FOLDER, whole / EMBEDDINGS_FOLDER, size)
    embeddings = EmbeddingShards(folder / EMBEDDINGS_FOLDER, scale.dim)
    synthetic.write_bundle(folder, like, count=size)
    manifest = build_index(folder, embeddings, factory="auto", targets=TARGETS, device="cpu", progress=True)
    # The index was tuned with other queries.
    rng = np.random.default_rng(SEED + 1)
    queries_QD = held_out_queries(embeddings, rng.integers(size, size=_QUERIES), SEED + 1)
    truth = Truth(size, queries_QD, exact_positions(embeddings, queries_QD))
    query_file = work / "queries.npz"
    np.savez(query_file, queries=queries_QD, truth=truth.nearest_QK)
    figures = {"vectors": size, **_described(manifest), **_in_processes(folder, query_file)}
    if folder != whole:
        shutil.rmtree(folder)
    _log(figures)
    return figures, truth


def _log(figures: dict[str, Any]) -> None:
    click.echo(json.dumps(figures), err=True)  # so that an interrupted run leaves its results


def _described(manifest: IndexManifest) -> dict[str, Any]:
    choice = manifest.choice or {}
    return {
        "factory": manifest.factory,
        "parameters": dict(manifest.parameters),
        "build_s": manifest.elapsed_s,
        "index_mb": round(manifest.bytes / 1e6, 1),
        "curve": [
            {"recall_at_10": round(point["recall"], 4), "p50_ms": point["p50_ms"], **point["parameters"]}
            for point in choice.get("curve", ())
        ],
    }


def _in_processes(folder: Path, query_file: Path) -> dict[str, Any]:
    """Return what a process measures after opening the bundle, and the memory of two such processes."""
    with probing(folder, query_file) as first:
        figures = read_reply(first)
        with probing(folder, query_file) as second:
            read_reply(second)
            return {**figures, "two_processes_mb": [memory_after_searching(process) for process in (first, second)]}


# ---- peers ----


class Peer(Protocol):
    def add(self, part_nD: Float32Array) -> None: ...

    def searches(self) -> Iterator[tuple[str, Search]]:
        """Yield searches by rising effort. Each is valid until the next one is taken."""
        ...


class FaissPeer:
    """Flat search (without `efforts`) or HNSW over float16."""

    def __init__(self, index: Any, threads: int, efforts: Sequence[int] = ()) -> None:
        self._index, self._threads, self._efforts = index, threads, efforts

    def add(self, part_nD: Float32Array) -> None:
        faiss.omp_set_num_threads(self._threads)
        if not self._index.is_trained:
            self._index.train(part_nD[:1000])
        self._index.add(part_nD)

    def searches(self) -> Iterator[tuple[str, Search]]:
        if not self._efforts:
            yield "all", self._search
        for effort in self._efforts:
            self._index.hnsw.efSearch = effort
            yield f"efSearch {effort}", self._search

    def _search(self, queries_QD: Float32Array) -> Int64Array:
        return np.asarray(self._index.search(queries_QD, K)[1])


class UsearchPeer:
    """usearch over float16."""

    def __init__(self, dim: int, threads: int) -> None:
        from usearch.index import Index  # faiss crashes if it is loaded after usearch

        self._threads = threads
        self._index = Index(ndim=dim, metric="ip", dtype="f16", connectivity=_LINKS)

    def add(self, part_nD: Float32Array) -> None:
        start = len(self._index)
        keys_n = np.arange(start, start + len(part_nD), dtype=np.uint64)
        self._index.add(keys_n, part_nD, threads=self._threads)

    def searches(self) -> Iterator[tuple[str, Search]]:
        for effort in _EFFORTS:
            self._index.expansion_search = effort  # type: ignore[misc]  # it has a setter
            yield f"expansion {effort}", self._search

    def _search(self, queries_QD: Float32Array) -> Int64Array:
        keys = self._index.search(queries_QD, K, threads=1).keys  # one-dimensional for a single query
        return np.atleast_2d(np.asarray(keys)).astype(np.int64)


def _flat(dim: int, threads: int) -> Peer:
    half = faiss.ScalarQuantizer.QT_fp16
    return FaissPeer(faiss.IndexScalarQuantizer(dim, half, faiss.METRIC_INNER_PRODUCT), threads)


def _hnsw(dim: int, threads: int) -> Peer:
    half = faiss.ScalarQuantizer.QT_fp16
    return FaissPeer(faiss.IndexHNSWSQ(dim, half, _LINKS, faiss.METRIC_INNER_PRODUCT), threads, _EFFORTS)


PEERS: dict[str, Callable[[int, int], Peer]] = {"flat": _flat, "HNSW32": _hnsw, "usearch": UsearchPeer}


def _measure_peer(
    name: str, embeddings: Embeddings, growing: Sequence[Truth], repeats: int
) -> Iterator[dict[str, Any]]:
    """Grow an index from one size to the next, in whole shards. Yield the build time so far, and recall and latency of
    one query on one thread by effort."""
    peer = PEERS[name](embeddings.dim, usable_cores())
    parts = iter(embeddings)
    added, build_s = 0, 0.0
    for truth in growing:
        while added < truth.size:
            part_nD = next(parts)
            started = time.perf_counter()
            peer.add(part_nD)
            build_s += time.perf_counter() - started
            added += len(part_nD)
        assert added == truth.size, "a size is a whole number of shards"
        yield {"build_s": round(build_s, 1), "points": [*_points(peer, truth, repeats)]}


def _points(peer: Peer, truth: Truth, repeats: int) -> Iterator[dict[str, Any]]:
    def search_one(search: Search, number: int) -> Int64Array:
        return search(truth.queries_QD[number % len(truth.queries_QD)][None])

    for effort, search in peer.searches():
        with one_thread():
            found_QK = np.concatenate([search(query_D[None]) for query_D in truth.queries_QD])
            latency = percentiles_ms(partial(search_one, search), repeats=repeats, warm_up=5)
        yield {"effort": effort, "recall_at_10": round(overlap(found_QK, truth.nearest_QK), 4), **latency}


# ---- report ----


def report(figures: dict[str, Any]) -> str:
    """Return an HTML page: growth, and recall against latency at the largest size and at the one with most peers."""
    made_up = figures["made_up"]
    sizes = made_up["sizes"]
    compared = max(sizes, key=lambda each: (len(each.get("peers", ())), each["vectors"]))
    shown = [sizes[-1]] if compared is sizes[-1] else [sizes[-1], compared]
    rows = [
        [
            f"{each['vectors']:,}", each["factory"], f"{each['recall_at_10']:.4f}", f"{each['single']['p50_ms']:.2f}",
            f"{each['single']['p99_ms']:.2f}", f"{each['memory_mb']['own']:,.0f}",
            f"{each['memory_mb']['mapped']:,.0f}", f"{each['build_s']:,.0f}", f"{each['ready_s']:.2f}",
        ]
        for each in sizes
    ]  # fmt: skip
    header = ["embeddings", "index", "recall@10", "p50 ms", "p99 ms", "own MB", "mapped MB", "build s", "ready s"]
    blocks = [table(header, rows)] + ([_growth_plot(sizes)] if len(sizes) > 1 else [])
    parts = [section(f"Embeddings of width {made_up['dim']}, index chosen by measurement", *blocks)]
    parts += [section(f"Recall against latency, {each['vectors']:,} embeddings", _recall_plot(each)) for each in shown]
    return page("The index at any size", "".join(parts))


def _recall_plot(size: dict[str, Any]) -> str:
    curves = {f"chosen: {size['factory']}": size["curve"]}
    curves |= {name: peer["points"] for name, peer in size.get("peers", {}).items()}
    series = [
        Series(name=name, points=sorted((point["recall_at_10"], point["p50_ms"]) for point in points))
        for name, points in curves.items()
    ]
    return line_plot(
        series,
        title="Recall against latency",
        x_label="recall@10 against exact search",
        y_label="median ms of one query, one thread",
        y_log=True,
    )


def _growth_plot(sizes: list[dict[str, Any]]) -> str:
    series = {"chosen": [(each["vectors"], each["single"]["p50_ms"]) for each in sizes]}
    for each in sizes:
        for name, peer in each.get("peers", {}).items():
            good = [point["p50_ms"] for point in peer["points"] if point["recall_at_10"] >= 0.98]
            if good:
                series.setdefault(name, []).append((each["vectors"], min(good)))
    return line_plot(
        [Series(name=name, points=points) for name, points in series.items()],
        title="Latency at recall@10 of 0.98 by size",
        x_label="embeddings",
        y_label="median ms of one query, one thread",
        x_log=True,
        y_log=True,
    )


@click.command()
@click.option("--vectors", default=DEFAULT.vectors, show_default=True, help="Synthetic embeddings at the largest size.")
@click.option("--dim", default=DEFAULT.dim, show_default=True, help="Their width.")
@click.option(
    "--peers-up-to", default=DEFAULT.peers_up_to, show_default=True,
    help="The largest size at which flat search and HNSW are built too.",
)  # fmt: skip
@click.option(
    "--usearch-up-to", default=DEFAULT.usearch_up_to, show_default=True,
    help="The largest size at which usearch is built, which takes longer.",
)  # fmt: skip
@click.option("--growth/--no-growth", default=True, show_default=True, help="Measure the smaller sizes too.")
@click.option("--bundle", default="demo/bundle", show_default=True, type=click.Path(path_type=Path))
@click.option(
    "--work", default=WORK, show_default=True, type=click.Path(path_type=Path),
    help="Work folder, 1.1 KB per embedding and more; it is emptied first and removed at the end.",
)  # fmt: skip
@click.option("--results", default="benchmarks/results", show_default=True, type=click.Path(path_type=Path))
def main(bundle: Path, work: Path, results: Path, **scale_options: Any) -> None:
    """Measure the index over synthetic embeddings; writes index.json and index.html."""
    scale = Scale(**scale_options)
    ran = describe_run({"bundle": bundle.name, "smoke": False, "benchmarks": ["index"], **vars(scale)})
    figures = measure(bundle, smoke=False, scale=scale, work=work)
    path = write_results(results, "index", {**ran, "figures": figures})
    write_report(path, lambda: report(figures))
    click.echo(json.dumps(figures))
    click.echo(f"written to {path}", err=True)


if __name__ == "__main__":
    run(main)

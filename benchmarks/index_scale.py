"""How the index that is chosen for a bundle does at any size, beside flat search, HNSW and usearch.

Everything is made up, written to a folder, measured and removed. The sizes are the first so many of one population.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from tqdm import tqdm

from benchmarks import index_peers, synthetic
from benchmarks.index_probe import probing, told
from core.runtime import usable_cores
from index.build import build_index
from index.bundle import Bundle
from index.choose import Targets
from index.embeddings import EmbeddingShards
from index.factory import SEED
from index.manifest import EMBEDDINGS_FOLDER, IndexManifest
from index.tune import exact_positions, held_out_queries

TARGETS = Targets(budget_ms=4.0, recall=0.98, memory_gb=4.0)
_SIZES = (20_000, 100_000, 500_000, 1_000_000, 3_000_000)
_QUERIES = 1000


@dataclass(frozen=True, kw_only=True)
class Scale:
    """`vectors` at most, and the sizes up to which peers are built: their time grows faster than that."""

    vectors: int
    dim: int = 512
    peers_up_to: int = 20_000
    usearch_up_to: int = 20_000  # its graph takes two to five times as long as faiss's
    growth: bool = True
    repeats: int = 200

    @property
    def sizes(self) -> list[int]:
        """Rising, the last one all; whole shards but for that."""
        return [*(size for size in _SIZES if self.growth and size < self.vectors), self.vectors]

    def sizes_of(self, peer: str) -> list[int]:
        """Those at which the peer of that name is measured."""
        most = self.usearch_up_to if peer == "usearch" else self.peers_up_to
        return [size for size in self.sizes if size <= most]


def measure_scale(like: Bundle, scale: Scale, work: Path) -> dict[str, Any]:
    """Build and measure at every size below the folder `work`, which is made and removed."""
    threads = usable_cores()
    whole = work / "whole"
    shutil.rmtree(work, ignore_errors=True)
    try:
        synthetic.write_embeddings(whole / EMBEDDINGS_FOLDER, scale.vectors, scale.dim, progress=True)
        found = {}
        asked = {}
        for size in tqdm(scale.sizes, desc="size"):
            found[size], asked[size] = _at_size(size, whole, like, scale, work)
        embeddings = EmbeddingShards(whole / EMBEDDINGS_FOLDER, scale.dim)
        for name in tqdm(index_peers.PEERS, desc="peer"):
            sizes = scale.sizes_of(name)
            stages = [asked[size] for size in sizes]
            measured = index_peers.measure_growth(name, embeddings, stages, threads=threads, repeats=scale.repeats)
            for size, figures in zip(sizes, measured, strict=True):
                found[size].setdefault("peers", {})[name] = figures
                _tell({"vectors": size, name: figures})
        return {"vectors": scale.vectors, "dim": scale.dim, "targets": vars(TARGETS), "sizes": [*found.values()]}
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _at_size(
    size: int, whole: Path, like: Bundle, scale: Scale, work: Path
) -> tuple[dict[str, Any], index_peers.Asked]:
    """The figures of the chosen index, and what it was asked."""
    folder = whole
    if size != scale.vectors:
        folder = work / f"first-{size}"
        synthetic.link_first_shards(folder / EMBEDDINGS_FOLDER, whole / EMBEDDINGS_FOLDER, size)
    embeddings = EmbeddingShards(folder / EMBEDDINGS_FOLDER, scale.dim)
    synthetic.write_bundle(folder, like, count=size)
    manifest = build_index(folder, embeddings, factory="auto", targets=TARGETS, device="cpu", progress=True)
    # Other queries than those that the search was tuned with.
    rng = np.random.default_rng(SEED + 1)
    queries_QD = held_out_queries(embeddings, rng.integers(size, size=_QUERIES), SEED + 1)
    truth_QK = exact_positions(embeddings, queries_QD)
    np.savez(work / "queries.npz", queries=queries_QD, truth=truth_QK)
    found: dict[str, Any] = {"vectors": size, **_described(manifest), **_opened(folder, work / "queries.npz")}
    if folder != whole:
        shutil.rmtree(folder)
    _tell(found)
    return found, index_peers.Asked(size, queries_QD, truth_QK)


def _tell(figures: dict[str, Any]) -> None:
    click.echo(json.dumps(figures), err=True)  # a long run that is stopped has not been for nothing


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


def _opened(folder: Path, queries: Path) -> dict[str, Any]:
    """What a process of its own finds, and what two at once hold in memory."""
    with probing(folder, queries) as first:
        found = told(first)
        with probing(folder, queries) as second:
            told(second)
            shares = []
            for process in (first, second):
                assert process.stdin is not None, "it was opened with a pipe"
                process.stdin.write("\n")
                process.stdin.flush()
                shares.append(told(process))
    return {**found, "two_processes_mb": shares}

"""`wikiclip bench index`: how long a search over the bundle's embeddings takes, and over many more that are made up.

`python -m benchmarks.index_search --vectors 6063945` does so at Wikipedia's size.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from core.runtime import faiss

# isort: split
import click
import numpy as np

from benchmarks.index_scale import Scale, measure_scale
from benchmarks.measure import percentiles_ms, write_results
from core.cli import run
from core.files import atomic_write_bytes
from core.runtime import describe_run
from evaluation.pages import Series, line_plot, page, section, table
from index.bundle import Bundle

BATCH = 64
DEFAULT = Scale(vectors=100_000)
SMOKE = Scale(vectors=6_000, dim=32, repeats=50)
WORK = Path("build/bench-index")


def measure(
    bundle_path: Path, *, smoke: bool, scale: Scale | None = None, work: Path | None = None
) -> dict[str, object]:
    """The bundle's own index, then what `scale` says, below the folder `work`, which is removed at the end."""
    bundle = Bundle.open(bundle_path)
    scale = scale or (SMOKE if smoke else DEFAULT)
    return {**_of_bundle(bundle, smoke=smoke), "made_up": measure_scale(bundle, scale, work or WORK)}


def _of_bundle(bundle: Bundle, *, smoke: bool) -> dict[str, object]:
    """Latency of single queries on one thread, and queries a second in batches on one thread; top-10."""
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


def report(figures: dict[str, Any]) -> str:
    """The page: growth, and recall against latency at the largest size and at that with most others beside it."""
    made_up = figures["made_up"]
    sizes = made_up["sizes"]
    compared = max(sizes, key=lambda each: (len(each.get("peers", ())), each["vectors"]))
    shown = [sizes[-1]] if compared is sizes[-1] else [sizes[-1], compared]
    rows = [
        [
            f"{each['vectors']:,}",
            each["factory"],
            f"{each['recall_at_10']:.4f}",
            f"{each['single']['p50_ms']:.2f}",
            f"{each['single']['p99_ms']:.2f}",
            f"{each['memory_mb']['own']:,.0f}",
            f"{each['memory_mb']['mapped']:,.0f}",
            f"{each['build_s']:,.0f}",
            f"{each['ready_s']:.2f}",
        ]
        for each in sizes
    ]
    header = ["embeddings", "index", "recall@10", "p50 ms", "p99 ms", "own MB", "mapped MB", "build s", "ready s"]
    blocks = [table(header, rows)]
    if len(sizes) > 1:
        blocks.append(_growth(sizes))
    return page(
        "The index at any size",
        section(f"Embeddings of width {made_up['dim']}, chosen by measurement", *blocks)
        + "".join(section(f"Recall against latency, {each['vectors']:,} embeddings", _curves(each)) for each in shown),
    )


def _curves(size: dict[str, Any]) -> str:
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


def _growth(sizes: list[dict[str, Any]]) -> str:
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
@click.option("--vectors", default=DEFAULT.vectors, show_default=True, help="Made-up embeddings, at most.")
@click.option("--dim", default=DEFAULT.dim, show_default=True, help="Their width.")
@click.option(
    "--peers-up-to", default=DEFAULT.peers_up_to, show_default=True,
    help="The size up to which flat search and HNSW are built beside the chosen index.",
)  # fmt: skip
@click.option(
    "--usearch-up-to", default=DEFAULT.usearch_up_to, show_default=True,
    help="The size up to which usearch is, which takes longer.",
)  # fmt: skip
@click.option("--growth/--no-growth", default=True, show_default=True, help="Measure the sizes below it too.")
@click.option("--bundle", default="demo/bundle", show_default=True, type=click.Path(path_type=Path))
@click.option(
    "--work", default=WORK, show_default=True, type=click.Path(path_type=Path),
    help="Folder for what is made, 1.1 KB an embedding and more; it is emptied first and removed at the end.",
)  # fmt: skip
@click.option("--results", default="benchmarks/results", show_default=True, type=click.Path(path_type=Path))
def main(
    vectors: int,
    dim: int,
    peers_up_to: int,
    usearch_up_to: int,
    growth: bool,
    bundle: Path,
    work: Path,
    results: Path,
) -> None:
    """Measure the index over made-up embeddings; writes index.json and index.html."""
    scale = Scale(vectors=vectors, dim=dim, peers_up_to=peers_up_to, usearch_up_to=usearch_up_to, growth=growth)
    ran = describe_run({"bundle": bundle.name, "smoke": False, "benchmarks": ["index"], **vars(scale)})
    figures = measure(bundle, smoke=False, scale=scale, work=work)
    path = write_results(results, "index", {**ran, "figures": figures})
    atomic_write_bytes(path.with_suffix(".html"), report(figures).encode())
    click.echo(json.dumps(figures))
    click.echo(f"written to {path}", err=True)


if __name__ == "__main__":
    run(main)

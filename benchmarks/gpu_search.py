"""Exact search on the GPUs of this machine, against the time that reading the vectors takes at least.

`python -m benchmarks.gpu_search --bandwidth-gb-s 4800` does so over 6,063,945 made-up embeddings of width 1280. It has
not run yet.
"""

from __future__ import annotations

import json

from core.runtime import faiss

# isort: split
import click
import numpy as np

from benchmarks.measure import percentiles_ms
from benchmarks.synthetic import Float32Array, Population
from core.cli import run
from core.runtime import describe_run
from index.embeddings import Embeddings
from index.gpu import placement

_AT_A_TIME = 50_000
_K, _BATCH = 10, 64


class MadeUp(Embeddings):
    """So many embeddings that are drawn as they are asked for, one pass at a time, and never held."""

    def __init__(self, count: int, dim: int) -> None:
        super().__init__(dim, [], [])
        self._count = count
        self.population = Population.of(dim)

    def __len__(self) -> int:
        return self._count

    @property
    def parts(self) -> int:
        return -(-self._count // _AT_A_TIME)

    def part(self, number: int) -> Float32Array:
        start = number * _AT_A_TIME
        return self.population.draw(min(_AT_A_TIME, self._count - start), np.random.default_rng((1, start)))


@click.command()
@click.option("--vectors", default=6_063_945, show_default=True, help="Made-up embeddings.")
@click.option("--dim", default=1280, show_default=True, help="Their width.")
@click.option(
    "--bandwidth-gb-s", type=float, required=True, help="Memory bandwidth of all GPUs together, by their data sheet."
)
def measure(vectors: int, dim: int, bandwidth_gb_s: float) -> None:
    """Milliseconds of one exact query and queries a second in batches of 64, beside the memory-bandwidth floor."""
    made = MadeUp(vectors, dim)
    placed = placement(faiss.IndexFlatIP(dim), made, "cuda")
    queries_QD = made.population.draw(512, np.random.default_rng(2))
    search = placed.candidates.search
    single = percentiles_ms(lambda i: search(queries_QD[i % 512][None], _K, {}, None, 1), repeats=500, warm_up=20)
    batches = np.split(queries_QD, len(queries_QD) // _BATCH)
    batched = percentiles_ms(lambda i: search(batches[i % len(batches)], _K, {}, None, 1), repeats=50, warm_up=5)
    figures = {
        "placed": placed.why,
        "floor_ms": round(2 * vectors * dim / bandwidth_gb_s / 1e6, 3),
        "single": single,
        "batch_64_queries_per_s": round(1000 * _BATCH / batched["p50_ms"], 1),
    }
    settings = {"vectors": vectors, "dim": dim, "bandwidth_gb_s": bandwidth_gb_s}
    click.echo(json.dumps({**describe_run(settings), "figures": figures}))


if __name__ == "__main__":
    run(measure)

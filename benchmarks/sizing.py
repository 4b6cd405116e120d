"""`python -m benchmarks.sizing`: disk, memory, hours and cost of a catalog of any size, computed rather than measured.

Only two figures are measured, on the demo. A model takes 2 floating-point operations per parameter and token. Hours
assume that a GPU reaches `--utilisation` of its vendor's peak for dense bfloat16. `--write` puts the tables between
their markers in docs/oven.md and docs/operations.md.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from core.cli import run
from core.files import atomic_write_bytes
from index.autotune import candidates

DOCS = Path(__file__).resolve().parents[1] / "docs"

# Measured on the demo: `process_resident_memory_bytes` of /metrics after a few answers; entities.sqlite over entities.
SERVICE_GB = 0.17
STORE_BYTES_AN_ENTITY = 803

WIKI6M_ENTITIES, WIKI6M_IMAGES = 6_063_945, 2_032_340
PAIRS, PAIR_ENTITIES = 1_000_000, 7_943  # OVEN's training set with 200 pairs per entity
TEXT_TOKENS = 256
SIZES = (10_000, 100_000, 1_000_000, WIKI6M_ENTITIES)
WIDTHS = (128, 512, 1280)  # tiny, CLIP ViT-B, EVA-CLIP-8B


@dataclass(frozen=True)
class Tower:
    """An image tower: Transformer layers over patches, projected to an embedding."""

    name: str
    layers: int
    width: int
    mlp_ratio: float
    patches: int
    embedding_dim: int

    @property
    def parameters(self) -> float:
        return self.layers * (4 + 2 * self.mlp_ratio) * self.width**2

    @property
    def operations(self) -> float:
        return 2 * self.parameters * (self.patches + 1)


@dataclass(frozen=True)
class TextModel:
    name: str
    parameters: float
    width: int

    @property
    def operations(self) -> float:
        return 2 * self.parameters * TEXT_TOKENS


@dataclass(frozen=True)
class Gpu:
    """A GPU and the vendor's peak for dense bfloat16."""

    name: str
    peak_tflops: int


EVA = Tower("EVA-CLIP-8B", layers=32, width=4096, mlp_ratio=5, patches=256, embedding_dim=1280)
CLIP_L = Tower("CLIP ViT-L/14", layers=24, width=1024, mlp_ratio=4, patches=256, embedding_dim=768)
LLAMA_1B = TextModel("LLaMA 3.2 1B", parameters=1.24e9, width=2048)
LLAMA_3B = TextModel("LLaMA 3.2 3B", parameters=3.21e9, width=3072)
VARIANTS = ((CLIP_L, LLAMA_1B), (EVA, LLAMA_1B), (EVA, LLAMA_3B))
GPUS = (Gpu("L4", 121), Gpu("L40S", 362), Gpu("A100 80 GB", 312), Gpu("H100 SXM", 989))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in (header, ["---"] * len(header), *rows))


def gb(size_bytes: float | None) -> str:
    if size_bytes is None:
        return "-"
    value = size_bytes / 1e9
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def oven_disk() -> str:
    """Return the disk space of a full run on OVEN, in GB."""
    rows = []
    for tower, text in VARIANTS:
        cached_images = (PAIRS + PAIR_ENTITIES) * tower.embedding_dim * (2 * tower.patches + 4)
        cached_texts = PAIR_ENTITIES * TEXT_TOKENS * text.width * 2
        sizes = [
            2 * (tower.parameters + text.parameters),
            cached_images + cached_texts,
            2 * tower.embedding_dim * WIKI6M_ENTITIES,
            STORE_BYTES_AN_ENTITY * WIKI6M_ENTITIES,
            *(_index_bytes(WIKI6M_ENTITIES, tower.embedding_dim, kind) for kind in ("SQfp16", "IVF")),
        ]
        rows.append([f"{tower.name}, {text.name}", *map(gb, sizes)])
    header = ("encoders", "weights", "training features", "embeddings", "store", "exact index", "IVF index")
    return table(header, rows)


def oven_hours(utilisation: float, price: float | None) -> str:
    """Return the hours of each stage on one GPU, and the cost if the price of an hour is given."""
    rows = []
    for tower, text in VARIANTS:
        training = PAIRS * tower.operations + PAIR_ENTITIES * (tower.operations + text.operations)
        stages = [training, WIKI6M_IMAGES * tower.operations, WIKI6M_ENTITIES * text.operations]
        for gpu in GPUS:
            hours = [operations / (gpu.peak_tflops * 1e12 * utilisation * 3600) for operations in stages]
            cost = [] if price is None else [f"{price * sum(hours):.0f}"]
            figures = [f"{each:.1f}" for each in (*hours, sum(hours))]
            rows.append([f"{tower.name}, {text.name}", gpu.name, *figures, *cost])
    header = ["encoders", "GPU", "training features", "entity images", "entity texts", "together"]
    return table([*header, *([] if price is None else ["cost"])], rows)


def serving(bandwidth_gb_s: float) -> str:
    """Return disk, memory and the least time of exact search by catalog size and width, with one image per entity."""
    rows = []
    for count in SIZES:
        for dim in WIDTHS:
            embeddings = 2 * dim * count
            exact, ivf = (_index_bytes(count, dim, kind) for kind in ("SQfp16", "IVF"))
            assert exact is not None
            sizes = [
                embeddings + STORE_BYTES_AN_ENTITY * count + exact,
                SERVICE_GB * 1e9 + exact,
                None if ivf is None else SERVICE_GB * 1e9 + ivf,
                embeddings,
            ]
            rows.append([f"{count:,}", str(dim), *map(gb, sizes), f"{exact / bandwidth_gb_s / 1e6:.1f}"])
    header = (
        "entities", "width", "disk, exact index", "memory, exact index", "memory, IVF index", "mapped embeddings",
        "exact search, ms at least",
    )  # fmt: skip
    return table(header, rows)


def _index_bytes(count: int, dim: int, kind: str) -> float | None:
    """Return the size of an index of this kind as `wikiclip index` estimates it, None if that does not consider it."""
    return next((each.bytes(count) for each in candidates(count, dim) if each.factory(count).startswith(kind)), None)


def tables(utilisation: float, bandwidth_gb_s: float, price: float | None) -> dict[str, str]:
    """Return the tables by page and name."""
    return {
        "oven.md: disk": oven_disk(),
        "oven.md: hours": oven_hours(utilisation, price),
        "operations.md: serving": serving(bandwidth_gb_s),
    }


def put_in(page: str, name: str, content: str) -> str:
    """Return the page with the table between its markers replaced."""
    opening, closing = f"<!-- sizing: {name} -->", f"<!-- /sizing: {name} -->"
    between = re.compile(f"(?<={re.escape(opening)}).*?(?={re.escape(closing)})", flags=re.DOTALL)
    assert len(between.findall(page)) == 1, f"the page has no markers for {name}"
    return between.sub(lambda _: f"\n\n{content}\n", page)


@click.command(context_settings={"show_default": True})
@click.option("--utilisation", default=0.4, type=click.FloatRange(0, 1, min_open=True), help="Share of a GPU's peak.")
@click.option("--bandwidth", default=20.0, type=click.FloatRange(0, min_open=True), help="Memory bandwidth in GB/s.")
@click.option("--price", type=click.FloatRange(0), help="Price of a GPU hour; adds a column of cost.")
@click.option("--write", is_flag=True, help="Write the tables to the pages instead of printing them.")
def main(utilisation: float, bandwidth: float, price: float | None, write: bool) -> None:
    """Print the disk, memory and hours of a full run and of a service."""
    for place, content in tables(utilisation, bandwidth, price).items():
        file, name = place.split(": ")
        if write:
            page = (DOCS / file).read_text(encoding="utf-8")
            atomic_write_bytes(DOCS / file, put_in(page, name, content).encode())
        else:
            click.echo(f"{place}\n\n{content}")


if __name__ == "__main__":
    run(main)

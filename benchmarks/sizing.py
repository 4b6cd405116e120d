"""`python -m benchmarks.sizing`: disk, memory, hours and cost of a catalog of any size, computed rather than measured.

Only two figures are measured, on the demo. A model takes 2 floating-point operations per parameter and token. Hours
assume that a GPU reaches `--utilisation` of its vendor's peak for dense bfloat16. `--write` puts the tables between
their markers in docs/oven.md and docs/operations.md.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
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
TEXT_TOKENS, PATCHES = 256, 256
SIZES = (10_000, 100_000, 1_000_000, WIKI6M_ENTITIES)
WIDTHS = (128, 512, 1280)  # tiny, CLIP ViT-B, EVA-CLIP-8B

# Image towers: parameters of the Transformer's layers, and embedding width. Language models: parameters, and width.
TOWERS = {"EVA-CLIP-8B": (32 * 14 * 4096**2, 1280), "CLIP ViT-L/14": (24 * 12 * 1024**2, 768)}
TEXT_MODELS = {"LLaMA 3.2 1B": (1.24e9, 2048), "LLaMA 3.2 3B": (3.21e9, 3072)}
VARIANTS = (("CLIP ViT-L/14", "LLaMA 3.2 1B"), ("EVA-CLIP-8B", "LLaMA 3.2 1B"), ("EVA-CLIP-8B", "LLaMA 3.2 3B"))
GPUS = {"L4": 121, "L40S": 362, "A100 80 GB": 312, "H100 SXM": 989}  # TFLOP/s


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
        (tower_parameters, dim), (text_parameters, text_width) = TOWERS[tower], TEXT_MODELS[text]
        sizes = [
            2 * (tower_parameters + text_parameters),
            (PAIRS + PAIR_ENTITIES) * dim * (2 * PATCHES + 4) + PAIR_ENTITIES * TEXT_TOKENS * text_width * 2,
            2 * dim * WIKI6M_ENTITIES,
            STORE_BYTES_AN_ENTITY * WIKI6M_ENTITIES,
            _index_bytes(WIKI6M_ENTITIES, dim, "SQfp16"),
            _index_bytes(WIKI6M_ENTITIES, dim, "IVF"),
        ]
        rows.append([f"{tower}, {text}", *map(gb, sizes)])
    header = ("encoders", "weights", "training features", "embeddings", "store", "exact index", "IVF index")
    return table(header, rows)


def oven_hours(utilisation: float, price: float | None) -> str:
    """Return the hours of each stage on one GPU, and the cost if the price of an hour is given."""
    rows = []
    for tower, text in VARIANTS:
        per_image = 2 * TOWERS[tower][0] * (PATCHES + 1)
        per_text = 2 * TEXT_MODELS[text][0] * TEXT_TOKENS
        training = PAIRS * per_image + PAIR_ENTITIES * (per_image + per_text)
        stages = [training, WIKI6M_IMAGES * per_image, WIKI6M_ENTITIES * per_text]
        for gpu, peak_tflops in GPUS.items():
            hours = [operations / (peak_tflops * 1e12 * utilisation * 3600) for operations in stages]
            cost = [] if price is None else [f"{price * sum(hours):.0f}"]
            rows.append([f"{tower}, {text}", gpu, *(f"{each:.1f}" for each in (*hours, sum(hours))), *cost])
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

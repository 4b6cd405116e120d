"""The operations page, word for word: swap, rollback, backup and compaction do as it says; sizes are computed."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from core.errors import TooLarge, UndecodableImage
from imaging.decoder import Decoder
from index.autotune import candidates
from index.bundle import Bundle

PageRun = Any  # the dataclass in conftest.py, which no module can import

ROOT = Path(__file__).resolve().parents[2]
# The page's figures for the demo: a service's memory, and `entities.sqlite` over its entities.
SERVICE_GB, STORE_BYTES_AN_ENTITY = 0.17, 845
ALERTS = (
    "WikiclipDown", "WikiclipNotReady", "WikiclipHighLatency", "WikiclipRejecting",
    "WikiclipErrors", "WikiclipEngineDeaths", "WikiclipRedisFailing", "WikiclipQueueFull",
)  # fmt: skip


@pytest.fixture(scope="module")
def page() -> str:
    return (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def operations(run_page: Callable[..., PageRun]) -> PageRun:
    return run_page("operations")


def test_the_service_is_watched_swapped_and_rolled_back(operations: PageRun) -> None:
    metrics = operations.after("curl -s --fail http://127.0.0.1:8000/metrics")
    assert re.search(r"^wikiclip_ready 1", metrics, flags=re.MULTILINE)
    (resident,) = re.findall(r"^process_resident_memory_bytes (\S+)", metrics, flags=re.MULTILINE)
    # The page's figure, as far as it can hold on any machine.
    assert SERVICE_GB / 2 < float(resident) / 1e9 < SERVICE_GB * 3
    swapped = operations.after("ln -sfn")
    name = Bundle.open(operations.folder / "bundles" / "2026-12").name
    assert swapped.count('"previous":') == 2
    assert f'"bundle":"{name}@' in swapped


def test_the_backup_holds_the_change(operations: PageRun) -> None:
    answers = operations.after("wikiclip index --compact")
    assert "Flag of Sweden" not in answers
    assert "Flag of" in answers
    assert (operations.folder / "backup" / "live.sqlite").is_file()


def test_the_store_is_as_large_as_the_page_says() -> None:
    bundle = ROOT / "demo" / "bundle"
    entities = Bundle.open(bundle).manifest.counts.entities
    assert (bundle / "entities.sqlite").stat().st_size / entities == pytest.approx(STORE_BYTES_AN_ENTITY, rel=0.01)


def test_the_table_of_sizes_follows_from_its_formulas(page: str) -> None:
    rows = re.findall(r"^\| ([\d,]+) \| (\d+) \| (.*) \|$", page, flags=re.MULTILINE)
    assert len(rows) == 7
    for entities, width, sizes in rows:
        count, dim = int(entities.replace(",", "")), int(width)
        embeddings_gb = 2e-9 * dim * count
        by_kind = {each.factory(count)[:3]: each.bytes(count) for each in candidates(count, dim)}
        ivf_gb = SERVICE_GB + by_kind["IVF"] / 1e9 if "IVF" in by_kind else None
        disk_gb = 2 * embeddings_gb + STORE_BYTES_AN_ENTITY * count / 1e9
        exact = [disk_gb, SERVICE_GB + by_kind["SQf"] / 1e9, ivf_gb, embeddings_gb, 1000 * embeddings_gb / 20]
        for shown, computed in zip(sizes.split(" | "), exact, strict=True):
            decimals = len(shown.partition(".")[2])
            assert shown == ("-" if computed is None else f"{computed:.{decimals}f}")


@pytest.mark.parametrize(
    ("memory_gb", "side_px", "error"), [(1, 4000, UndecodableImage), (1, 4200, TooLarge), (8, 8000, UndecodableImage)]
)
def test_the_largest_avif_is_as_the_page_says(memory_gb: int, side_px: int, error: type[Exception]) -> None:
    header = b"\0\0\0\x14ftypavif\0\0\0\0" + b"\0\0\0\x14ispe" + struct.pack(">III", 0, side_px, side_px)
    decoder = Decoder(max_pixels=64_000_000, budget_bytes=int(0.4e9 * memory_gb), timeout_s=30, processes=1)
    with pytest.raises(error):  # it is admitted, or not; there is no picture to decode
        decoder.check(header)
    decoder.close()


@pytest.mark.parametrize("alert", ALERTS)
def test_the_runbook_has_every_alert(page: str, alert: str) -> None:
    assert page.count(f"| `{alert}` |") == 1

"""The operations page, word for word: swap, rollback, backup and compaction do as it says; tables are computed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.sizing import DOCS, GPUS, SERVICE_GB, STORE_BYTES_AN_ENTITY, oven_hours, put_in, tables
from index.bundle import Bundle

PageRun = Any  # the dataclass in conftest.py, which no module can import

ROOT = Path(__file__).resolve().parents[2]
ALERTS = (
    "WikiclipDown", "WikiclipNotReady", "WikiclipHighLatency", "WikiclipRejecting",
    "WikiclipErrors", "WikiclipEngineDeaths", "WikiclipRedisFailing", "WikiclipQueueFull",
)  # fmt: skip


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


@pytest.mark.parametrize("place", ["oven.md: disk", "oven.md: hours", "operations.md: serving"])
def test_tables_are_what_the_command_computes(place: str) -> None:
    file, name = place.split(": ")
    page = (DOCS / file).read_text(encoding="utf-8")
    content = tables(utilisation=0.4, bandwidth_gb_s=20.0, price=None)[place]
    assert f"<!-- sizing: {name} -->" in page
    assert put_in(page, name, content) == page, "run `python -m benchmarks.sizing --write`"


def test_cost_is_hours_times_price() -> None:
    for row in oven_hours(0.4, 2.5).splitlines()[2:]:
        *_, together, cost = (cell.strip() for cell in row.strip("|").split("|"))
        assert float(cost) == pytest.approx(2.5 * float(together), abs=1)
    assert all(gpu in oven_hours(0.4, None) for gpu in GPUS)


@pytest.mark.parametrize("alert", ALERTS)
def test_the_runbook_has_every_alert(alert: str) -> None:
    page = (DOCS / "operations.md").read_text(encoding="utf-8")
    assert page.count(f"| `{alert}` |") == 1

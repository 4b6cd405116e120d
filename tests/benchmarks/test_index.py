"""`wikiclip bench index` over synthetic bundles of any size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import index
from benchmarks.index import measure_sizes, overlap
from evaluation.pages import figures_page
from index.bundle import Bundle


def test_overlap_by_hand() -> None:
    assert overlap(np.array([[1, 2], [7, -1]]), np.array([[2, 3], [7, 8]])) == pytest.approx(0.5)


def test_every_size_is_measured_reported_and_removed(
    small_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("benchmarks.index._SIZES", (4000,))
    monkeypatch.setattr("benchmarks.index._QUERIES", 200)
    monkeypatch.setattr("benchmarks.index._EFFORTS", (16, 256))
    found = measure_sizes(Bundle.open(small_bundle), 4500, 16, 4000, repeats=5)
    assert list(tmp_path.iterdir()) == []
    small, large = found["sizes"]
    assert (small["vectors"], large["vectors"]) == (4000, 4500)
    assert set(small["peers"]) == {"flat", "HNSW32", "usearch"}
    assert large["peers"] == {}
    (exact,) = small["peers"]["flat"]["points"]
    assert exact["recall_at_10"] >= 0.999  # the positions are those of this size
    for each in (small, large):
        assert each["recall_at_10"] >= 0.97
        assert each["ready_s"] > 0
        assert each["memory_mb"]["own"] > 0
    for peer in small["peers"].values():
        assert max(point["recall_at_10"] for point in peer["points"]) > 0.97
    text = figures_page("Index", {"index": (index.REPORT, {"made_up": found})})
    assert text.count("<svg") == 2
    assert "4500" in text
    own = {"factory": "Flat", "embeddings": 14, "single": {"p50_ms": 0.5, "p99_ms": 1.5}, "batch_64_queries_per_s": 9.0}
    table = index.as_table({**own, "made_up": found}).splitlines()
    assert table[1].split() == ["14", "the", "bundle's", "Flat", "0.5", "1.5", "9.0"]
    assert [line.split()[0] for line in table[2:-1]] == ["4,000"] * 4 + ["4,500"]

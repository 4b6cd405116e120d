"""`python -m benchmarks.index` over synthetic bundles of any size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import index
from benchmarks.index import Scale, measure_scale, overlap
from evaluation.pages import figures_page
from index.bundle import Bundle


def test_overlap_by_hand() -> None:
    assert overlap(np.array([[1, 2], [7, -1]]), np.array([[2, 3], [7, 8]])) == pytest.approx(0.5)


def test_every_size_is_measured_reported_and_removed(
    small_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.index._SIZES", (4000,))
    scale = Scale(vectors=4500, dim=16, peers_up_to=4500, usearch_up_to=4000, repeats=5)
    found = measure_scale(Bundle.open(small_bundle), scale, tmp_path / "work")
    assert not (tmp_path / "work").exists()
    small, large = found["sizes"]
    assert (small["vectors"], large["vectors"]) == (4000, 4500)
    assert set(small["peers"]) == {"flat", "HNSW32", "usearch"}
    assert set(large["peers"]) == {"flat", "HNSW32"}
    for each in (small, large):
        (exact,) = each["peers"]["flat"]["points"]
        assert exact["recall_at_10"] >= 0.999  # the positions are those of this size
        assert each["recall_at_10"] >= 0.97
        assert each["ready_s"] >= each["checked_s"] > 0
        assert len(each["two_processes_mb"]) == 2
    for peer in (*small["peers"].values(), *large["peers"].values()):
        assert max(point["recall_at_10"] for point in peer["points"]) > 0.97
    text = figures_page("Index", {"index": (index.REPORT, {"made_up": found})})
    assert text.count("<svg") == 3
    assert "4500" in text

"""The claim benchmark as a whole with tiny networks, and the shapes of the networks that need a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.claim import REPORT, measure
from benchmarks.compare import metrics_of
from benchmarks.generative.models import (
    ENCODERS,
    EncoderShape,
    ImageTower,
    parameter_count,
)
from core.errors import UserError
from evaluation.pages import figures_page

SMALL = EncoderShape(width=64, layers=1, heads=2, mlp_ratio=1, patch_px=32, embedding_dim=32, size_px=64)


def test_both_precisions_are_measured_and_reported(small_bundle: Path, monkeypatch) -> None:
    monkeypatch.setitem(ENCODERS, "vit-b32", SMALL)
    monkeypatch.setattr("benchmarks.claim._MOMENT_S", 0.02)
    figures = measure(small_bundle, smoke=False, size="tiny", entities=30, minutes=0.01)
    assert set(figures["median_ms"]) == {"wikiclip", "faithful", "optimised"}
    assert set(figures["ratio"]) == {"faithful", "optimised"}
    assert set(figures["precisions"]) == {"float32", "int8"}
    for precision, each in figures["precisions"].items():
        for mode, times in each["ratio"].items():
            low, high = each["ratio_interval"][mode]
            assert low <= times <= high, precision
            medians = [each["systems"][name]["latency"]["median"] for name in (mode, "wikiclip")]
            assert times == pytest.approx(medians[0] / medians[1], abs=0.06)
    assert figures["knobs"]["names_in_tree"] == 30  # more than the bundle has titles
    # The latencies of three systems in two precisions can be compared between runs.
    assert len(dict(metrics_of(figures))) == 6
    html = figures_page("Claim", {"claim": (REPORT, figures)})
    assert "paper_ms AutoVER 13B" in html
    assert html.count("<svg") == 2
    assert all(line in html for line in figures["verdict"])


def test_a_missing_gpu_is_an_error(small_bundle: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(UserError, match="sees no GPU"):
        measure(small_bundle, smoke=True, device="cuda")


@pytest.mark.parametrize(
    ("name", "least", "most"), [("vit-b32", 87e6, 89e6), ("vit-l14", 302e6, 305e6), ("eva-clip-8b", 7.4e9, 7.7e9)]
)
def test_shapes_and_parameters_of_every_encoder(name: str, least: float, most: float) -> None:
    shape = ENCODERS[name]
    with torch.device("meta"):
        tower = ImageTower(shape)
    assert least < parameter_count(tower) < most
    pixels = torch.empty(2, 3, shape.size_px, shape.size_px, device="meta")
    patch_tokens_BPC, embedding_BD = tower(pixels)
    assert patch_tokens_BPC.shape == (2, (shape.size_px // shape.patch_px) ** 2, shape.width)
    assert embedding_BD.shape == (2, shape.embedding_dim)

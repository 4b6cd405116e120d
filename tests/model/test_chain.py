"""A custom ONNX encoder through all commands: train, export, evaluate, serve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnxruntime
import pytest

from benchmarks.generator import service_process
from imaging import normalise
from model.encoders import open_image_encoder
from tests.commands import run_wikiclip


def figures_of(*arguments: str | Path | float) -> dict[str, Any]:
    done = run_wikiclip(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


@pytest.mark.parametrize("centring", ["--no-centre", "--centre"])
def test_an_onnx_encoder_goes_from_training_to_the_service(
    dataset: Any, onnx_spec: str, text_spec: str, tmp_path: Path, centring: str
) -> None:
    checkpoint, bundle = tmp_path / "checkpoint", tmp_path / "bundle"
    encoders = ["--image-encoder", onnx_spec, "--text-encoder", text_spec]
    size = ["--epochs", 4, "--lr", 0.003, "--batch-size", 8, "--width", 16, "--heads", 2, "--max-tokens", 16]
    trained = figures_of(
        "train", "--catalog", dataset.catalog, "--pairs", dataset.pairs, "--validation", dataset.validation, *encoders,
        "--out", checkpoint, "--cache-dir", tmp_path / "cache", "--device", "cpu", centring, *size,
    )  # fmt: skip
    figures_of("export", "--catalog", dataset.catalog, "--checkpoint", checkpoint, "--out", bundle, *encoders)
    predictions = tmp_path / "predictions.jsonl"
    evaluated = figures_of("evaluate", "--bundle", bundle, "--queries", dataset.validation, "--out", predictions)
    for part in ("seen", "unseen"):
        assert evaluated[part] == pytest.approx(100 * trained["validation"][part])

    encoder = open_image_encoder(onnx_spec)
    pixels_BHW3 = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
    (embedding_BD,) = onnxruntime.InferenceSession(bundle / "image_encoder.onnx").run(
        ["image_embedding"], {"pixel_values": normalise(pixels_BHW3, encoder.preprocessing)}
    )
    served_BD = embedding_BD / np.linalg.norm(embedding_BD, axis=1, keepdims=True)  # as the service does
    own_BD = encoder.encode(pixels_BHW3).image_embedding_BD.numpy()
    assert np.allclose(served_BD, own_BD, atol=1e-5) == (centring == "--no-centre")

    answered = [json.loads(line)["pred_entity_id"] for line in predictions.read_text().splitlines()]
    with service_process(bundle, "--cache", "off") as (_, url):
        for row, entity_id in zip(dataset.validation.read_text().splitlines()[:3], answered, strict=False):
            image = (dataset.folder / json.loads(row)["image"]).read_bytes()
            answer = httpx.post(f"{url}/recognize", content=image, headers={"Content-Type": "image/png"}).json()
            assert answer["predictions"][0]["entity_id"] == entity_id

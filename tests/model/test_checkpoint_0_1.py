"""A checkpoint written by version 0.1 loads and gives the same outputs.

`tests/fixtures/checkpoint_0.1` has the checkpoint and the outputs of commit 25c21df. That commit trained it with
`run_training`: a random tiny encoder of 32 px, MiniLM, and an adaptor with centring and self-attention. Never
regenerate it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

from core.files import sha256_file
from model.checkpoint import Checkpoint
from model.encoders.tiny import BUILT_IN

ROOT = Path(__file__).resolve().parents[2]
FIXTURE = ROOT / "tests" / "fixtures" / "checkpoint_0.1"
OUTPUTS = json.loads((FIXTURE / "outputs.json").read_text(encoding="utf-8"))
# Instruction sets of other processors move values in the seventh digit.
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return Checkpoint.load(FIXTURE / "checkpoint")


def test_identity_is_unchanged(checkpoint: Checkpoint) -> None:
    assert checkpoint.sha256 == OUTPUTS["sha256"]
    assert checkpoint.logit_scale == OUTPUTS["logit_scale"]
    assert checkpoint.adaptor.config.centre
    assert checkpoint.adaptor.config.self_attention


def test_outputs_are_unchanged(checkpoint: Checkpoint) -> None:
    pixels = np.random.default_rng(7).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    image = checkpoint.image_encoder.encode(pixels)
    text = checkpoint.text_encoder.encode(OUTPUTS["texts"])
    entity_embeddings = checkpoint.adaptor(
        image.patch_tokens_BPC,
        torch.tensor(OUTPUTS["image_mask"]),
        text.text_tokens_BTC,
        text.mask_BT,
        image.image_embedding_BD,
    )
    assert text.mask_BT.sum(dim=1).tolist() == OUTPUTS["text_tokens_per_text"]
    assert checkpoint.text_encoder.token_spans(OUTPUTS["texts"])[2] == [tuple(s) for s in OUTPUTS["token_spans"]]
    for name, values in {
        "patch_token_means": image.patch_tokens_BPC.mean(dim=1),
        "query_embeddings": checkpoint.embed_queries(pixels),
        "entity_embeddings": entity_embeddings,
    }.items():
        np.testing.assert_allclose(values, OUTPUTS[name], atol=TOLERANCE, rtol=0, err_msg=name)


def test_the_demos_checkpoint_has_the_built_in_tiny_encoder() -> None:
    assert sha256_file(BUILT_IN) == sha256_file(ROOT / "demo" / "checkpoint" / "image_encoder.safetensors")


def test_tiny_works_from_the_files_of_the_wheel_without_the_demo(tmp_path: Path) -> None:
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert "model" in wheel["only-include"]
    assert not any(pattern.startswith("model") for pattern in wheel["exclude"])
    for package in ("core", "catalog", "imaging", "model"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import model; "
        "from model.encoders import open_image_encoder; print(model.__file__, open_image_encoder('tiny').content_hash)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    manifest = json.loads((ROOT / "demo" / "checkpoint" / "checkpoint.json").read_text(encoding="utf-8"))
    assert done.stdout.split() == [str(tmp_path / "model" / "__init__.py"), manifest["image_encoder"]["content_hash"]]

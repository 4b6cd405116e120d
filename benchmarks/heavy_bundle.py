"""A bundle like another one, but with a ViT-B/32 in int8 as its image encoder and vectors drawn at random: as heavy to
serve as a real one of that size."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from export.onnx_export import INPUT, OUTPUTS
from index.build import build_index
from index.bundle import Bundle, list_files
from index.embeddings import EmbeddingShards, write_shard
from index.manifest import EMBEDDINGS_FOLDER, IMAGE_ENCODER_FILE, MANIFEST_FILE, STORE_FILE, ImageEncoderEntry

if TYPE_CHECKING:
    from benchmarks.generative.retrieval import EncoderShape


def bundles_to_measure(bundle_path: Path, folder: Path, *, smoke: bool) -> dict[str, Path]:
    """Bundles by the name of their encoder: the one that was named, and without `smoke` the heavy one, in `folder`."""
    if smoke:
        return {"own": bundle_path}
    return {"own": bundle_path, "vit-b32-int8": write_heavy_bundle(bundle_path, folder)}


def write_heavy_bundle(base_path: Path, folder: Path) -> Path:
    """Write the bundle below `folder`, with the entities of `base_path`; where it is. Needs the extra `export`."""
    from benchmarks.generative.retrieval import ENCODERS, quantised_file, write_encoder

    shape = ENCODERS["vit-b32"]
    base = Bundle.open(base_path)
    bundle = folder / "vit-b32-int8"
    (bundle / EMBEDDINGS_FOLDER).mkdir(parents=True)
    encoder_file, _ = write_encoder("vit-b32", folder)
    shutil.copyfile(quantised_file(encoder_file, shape.size_px, folder), bundle / IMAGE_ENCODER_FILE)
    shutil.copyfile(base_path / STORE_FILE, bundle / STORE_FILE)
    rows_N = base.embeddings().rows_N
    vectors_ND = np.random.default_rng(0).standard_normal((len(rows_N), shape.embedding_dim), dtype=np.float32)
    vectors_ND /= np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    write_shard(bundle / EMBEDDINGS_FOLDER, 0, rows_N, vectors_ND)
    embeddings = EmbeddingShards(bundle / EMBEDDINGS_FOLDER, shape.embedding_dim)
    build_index(bundle, embeddings, factory=base.index_manifest.factory)
    replace(
        base.manifest,
        name=bundle.name,
        model={**base.manifest.model, "name": "vit-b32-int8"},
        files=list_files(bundle),
        **encoder_fields(shape),
    ).write(bundle / MANIFEST_FILE)
    return bundle


def encoder_fields(shape: EncoderShape) -> dict[str, Any]:
    """What a manifest says of an image encoder of that shape."""
    from benchmarks.generative.recognizer import clip_preprocessing

    return {
        "preprocessing": clip_preprocessing(shape.size_px).to_dict(),
        "embedding_dim": shape.embedding_dim,
        "patches": (shape.size_px // shape.patch_px) ** 2,
        "image_encoder": ImageEncoderEntry(file=IMAGE_ENCODER_FILE, input=INPUT, outputs=OUTPUTS, parity={}),
    }

"""A bundle like another one, but with a ViT-B/32 in int8 as its image encoder and vectors drawn at random: as heavy to
serve as a real one of that size."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np

from export.onnx_export import INPUT, OUTPUTS
from index.build import build_index
from index.bundle import Bundle, list_files
from index.embeddings import EmbeddingShards, write_shard
from index.manifest import EMBEDDINGS_FOLDER, STORE_FILE, ImageEncoderEntry

ENCODER_FILE = "image_encoder.onnx"
DIM, PATCHES, SIZE_PX = 512, 49, 224


def bundles_to_measure(bundle_path: Path, folder: Path, *, smoke: bool) -> dict[str, Path]:
    """Bundles by the name of their encoder: the one that was named, and without `smoke` the heavy one, in `folder`."""
    if smoke:
        return {"own": bundle_path}
    return {"own": bundle_path, "vit-b32-int8": write_heavy_bundle(bundle_path, folder)}


def write_heavy_bundle(base_path: Path, folder: Path) -> Path:
    """Write the bundle below `folder`, with the entities of `base_path`; where it is. Needs the extra `export`."""
    from benchmarks.generative.retrieval import quantised_file, write_encoder

    base = Bundle.open(base_path)
    bundle = folder / "vit-b32-int8"
    (bundle / EMBEDDINGS_FOLDER).mkdir(parents=True)
    encoder_file, _ = write_encoder("vit-b32", folder)
    shutil.copyfile(quantised_file(encoder_file, SIZE_PX, folder), bundle / ENCODER_FILE)
    shutil.copyfile(base_path / STORE_FILE, bundle / STORE_FILE)
    rows_N = base.embeddings().rows_N
    vectors_ND = np.random.default_rng(0).standard_normal((len(rows_N), DIM), dtype=np.float32)
    vectors_ND /= np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    write_shard(bundle / EMBEDDINGS_FOLDER, 0, rows_N, vectors_ND)
    build_index(bundle, EmbeddingShards(bundle / EMBEDDINGS_FOLDER, DIM), factory=base.index_manifest.factory)
    replace(
        base.manifest,
        name=bundle.name,
        model={**base.manifest.model, "name": "vit-b32-int8"},
        preprocessing={
            "size_px": SIZE_PX, "resize": "shortest", "crop": "center", "interpolation": "bicubic",
            "mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711],
        },
        embedding_dim=DIM,
        patches=PATCHES,
        image_encoder=ImageEncoderEntry(file=ENCODER_FILE, input=INPUT, outputs=OUTPUTS, parity={}),
        files=list_files(bundle),
    ).write(bundle / "manifest.json")  # fmt: skip
    return bundle

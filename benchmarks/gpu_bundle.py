"""A bundle as large as Wikipedia, with a ViT-L that computes in float16: what a GPU is measured with.

It needs no GPU to be made. Nothing in it takes longer than it must, since a machine with a GPU is dear: several
processes draw the embeddings while one writes the encoder and one the entities, titles cannot be searched, and what is
searched on a GPU has no index but in name.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

from core.runtime import faiss

# isort: split

from benchmarks.heavy_bundle import encoder_fields
from benchmarks.made_bundle import write_embeddings, write_plain_store
from core.errors import UserError
from core.files import sha256_file
from core.runtime import usable_cores
from index.build import build_index
from index.bundle import list_files
from index.embeddings import EmbeddingShards
from index.manifest import (
    EMBEDDINGS_FOLDER,
    IMAGE_ENCODER_FILE,
    INDEX_FILE,
    INDEX_MANIFEST_FILE,
    MANIFEST_FILE,
    SCHEMA_VERSION,
    STORE_FILE,
    Counts,
    IndexManifest,
    Manifest,
)

if TYPE_CHECKING:
    from benchmarks.generative.retrieval import EncoderShape

STAND_IN = "PQ1x8"  # a byte an embedding


def write_gpu_bundle(bundle: Path, encoder: str, entities: int, *, searched_on: str, progress: bool = False) -> None:
    """Write it to the folder `bundle`, which is not there yet. Needs the extra `export`.

    `searched_on` is `cuda`, where the index is a stand-in that nobody may search, or `cpu`, where it is exact.
    """
    shape = shape_of(encoder)
    folder = bundle / EMBEDDINGS_FOLDER
    bundle.mkdir(parents=True)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        beside = [
            pool.submit(write_half_encoder, encoder, bundle / IMAGE_ENCODER_FILE),
            pool.submit(write_plain_store, bundle / STORE_FILE, entities),
        ]
        processes = max(1, usable_cores() - 1)
        write_embeddings(folder, entities, shape.embedding_dim, progress=progress, processes=processes)
        for each in beside:
            each.result()
    if searched_on == "cuda":
        write_stand_in_index(bundle, shape.embedding_dim, entities)
    else:
        build_index(bundle, EmbeddingShards(folder, shape.embedding_dim))
    Manifest(
        schema_version=SCHEMA_VERSION,
        name=f"{encoder}-{entities}",
        model={"name": f"{encoder}, float16, random weights"},
        counts=Counts(entities=entities, embeddings=entities, without_image=0, without_text=0, rejected=0),
        calibration=None,
        export={"made_up": True, "searched_on": searched_on},
        files=list_files(bundle),
        created_at=_now(),
        elapsed_s=0.0,
        **encoder_fields(shape),
    ).write(bundle / MANIFEST_FILE)


def shape_of(encoder: str) -> EncoderShape:
    """Raises `UserError` where there is none of that name."""
    from benchmarks.generative.retrieval import ENCODERS

    if encoder not in ENCODERS:
        raise UserError(f"--encoder {encoder}: there is none of that name; take one of {', '.join(ENCODERS)}")
    return ENCODERS[encoder]


def write_half_encoder(encoder: str, path: Path) -> None:
    """The encoder of that name with random weights, as ONNX that computes in float16."""
    import torch

    from benchmarks.generative.retrieval import build_tower
    from export.float16 import InFloat16
    from export.onnx_export import Normalised, export_normalised

    torch.manual_seed(0)
    shape = shape_of(encoder)
    export_normalised(Normalised(InFloat16(build_tower(shape))), shape.size_px, path)


def write_stand_in_index(bundle: Path, dim: int, count: int) -> None:
    """An index that opens, and all of whose embeddings are the same: exact search on a GPU reads the bundle's own."""
    index = faiss.index_factory(dim, STAND_IN, faiss.METRIC_INNER_PRODUCT)
    index.is_trained = True
    index.codes.resize(count)
    index.ntotal = count
    path = bundle / INDEX_FILE
    path.parent.mkdir()
    faiss.write_index(index, str(path))
    IndexManifest(
        factory=STAND_IN,
        parameters={},
        why="a stand-in, for exact search on a GPU: not to be searched",
        metric="inner product",
        dim=dim,
        count=count,
        bytes=path.stat().st_size,
        sha256=sha256_file(path),
        created_at=_now(),
        elapsed_s=0.0,
    ).write(bundle / INDEX_MANIFEST_FILE)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")

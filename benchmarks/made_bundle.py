"""Bundles of any size with made-up content, for what only shows at Wikipedia's size.

The embeddings have the structure of real ones: they lie in a cone (a common offset), in clusters within topics, of very
different sizes (Zipf's law), and vary about their cluster along few directions much and along many a little (a spectrum
that falls as a power). They stand in random order, so that the first n are a sample of them all.

Shapes: N embeddings, n of them in a shard, D the embedding width, T topics, C clusters.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from index.bundle import Bundle, list_files
from index.embeddings import rows_file, vectors_file, write_shard
from index.manifest import EMBEDDINGS_FOLDER, MANIFEST_FILE, STORE_FILE, Counts
from index.store import StoredEntity, write_store

Float32Array = npt.NDArray[np.float32]

SHARD = 4000  # about what an export writes
_TOPICS, _CLUSTERS = 300, 20_000
_OFFSET, _TOPIC, _CLUSTER, _OWN = 0.55, 0.40, 0.45, 0.55  # lengths of the parts; the sum is normalised
_SIZE_POWER = 0.8  # the r-th largest cluster has a share of about r to the -0.8
_SPECTRUM_POWER = 0.5  # the standard deviation along the r-th direction falls as r to the -0.5


@dataclass(frozen=True, kw_only=True)
class Population:
    """Where made-up embeddings are drawn from."""

    offset_D: Float32Array
    clusters_CD: Float32Array  # each with its topic in it
    shares_C: npt.NDArray[np.float64]
    directions_DD: Float32Array  # orthogonal, each as long as the standard deviation along it

    @classmethod
    def of(cls, dim: int, seed: int = 0) -> Population:
        rng = np.random.default_rng(seed)
        topics_TD = _TOPIC * _directions(rng, _TOPICS, dim)
        ranks = np.arange(1, _CLUSTERS + 1)
        shares_C = ranks**-_SIZE_POWER
        spectrum_D = np.arange(1, dim + 1) ** -_SPECTRUM_POWER
        rotation_DD = np.linalg.qr(rng.normal(size=(dim, dim)))[0]
        return cls(
            offset_D=_OFFSET * _directions(rng, 1, dim)[0],
            clusters_CD=topics_TD[rng.integers(_TOPICS, size=_CLUSTERS)] + _CLUSTER * _directions(rng, _CLUSTERS, dim),
            shares_C=shares_C / shares_C.sum(),
            directions_DD=(_OWN * spectrum_D / np.linalg.norm(spectrum_D) * rotation_DD).T.astype(np.float32),
        )

    def draw(self, count: int, rng: np.random.Generator) -> Float32Array:
        """Embeddings [n, D] of unit length."""
        dim = len(self.offset_D)
        drawn_nD = rng.standard_normal((count, dim), np.float32) @ self.directions_DD
        drawn_nD += self.clusters_CD[rng.choice(len(self.shares_C), count, p=self.shares_C)]
        drawn_nD += self.offset_D
        drawn_nD /= np.linalg.norm(drawn_nD, axis=1, keepdims=True)
        return drawn_nD


def _directions(rng: np.random.Generator, count: int, dim: int) -> Float32Array:
    drawn = rng.standard_normal((count, dim), np.float32)
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    return drawn


def write_embeddings(folder: Path, count: int, dim: int, *, seed: int = 0, progress: bool = False) -> None:
    """Write `count` made-up embeddings to `folder` as shards, an entity each."""
    folder.mkdir(parents=True)
    population = Population.of(dim, seed)
    with tqdm(desc="make", unit="embedding", total=count, disable=not progress) as bar:
        for shard, start in enumerate(range(0, count, SHARD)):
            rows_n = np.arange(start, min(start + SHARD, count))
            write_shard(folder, shard, rows_n, population.draw(len(rows_n), np.random.default_rng((seed, shard))))
            bar.update(len(rows_n))


def first_of(folder: Path, source: Path, count: int) -> None:
    """The first `count` embeddings of `source` as a folder of their own, by hard links: whole shards of it."""
    folder.mkdir(parents=True)
    for shard in range(-(-count // SHARD)):
        for name in (vectors_file(shard), rows_file(shard)):
            os.link(source / name, folder / name)


def write_bundle(folder: Path, like: Bundle, *, count: int, progress: bool = False) -> None:
    """A bundle around the made-up embeddings in `folder`, an entity each, without an index.

    Image encoder, preprocessing and calibration are those of `like`: they fit the embeddings in nothing but form.
    """

    def entities() -> Iterator[tuple[StoredEntity, None]]:
        for row in tqdm(range(count), desc="entities", unit="entity", disable=not progress):
            yield _entity(row), None

    write_store(folder / STORE_FILE, entities())
    shutil.copyfile(like.image_encoder_path, folder / like.manifest.image_encoder.file)
    dim = np.load(folder / EMBEDDINGS_FOLDER / vectors_file(0), mmap_mode="r").shape[1]
    manifest = replace(
        like.manifest,
        name="made",
        embedding_dim=dim,
        image_encoder=replace(like.manifest.image_encoder, int8=None, float16=None),
        counts=Counts(entities=count, embeddings=count, without_image=0, without_text=0, rejected=0),
        files=list_files(folder),
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    manifest.write(folder / MANIFEST_FILE)


def _entity(row: int) -> StoredEntity:
    return StoredEntity(
        row=row,
        entity_id=f"Q{row}",
        title=f"Thing {row} of kind {row % 997}",
        titles={},
        description=f"A made-up thing, number {row}.",
        url=None,
        types=(f"type {row % 50}",),
        symbol=None,
        image_count=1,
        has_text=True,
    )

"""Bundles of any size with made-up content, for what only shows at Wikipedia's size.

The embeddings have the structure of real ones: they lie in a cone (a common offset), in clusters within topics, of very
different sizes (Zipf's law), and vary about their cluster along few directions much and along many a little (a spectrum
that falls as a power). They stand in random order, so that the first n are a sample of them all.

Shapes: N embeddings, n of them in a shard, D the embedding width, T topics, C clusters.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from index.bundle import Bundle, list_files
from index.embeddings import rows_file, vectors_file, write_shard
from index.manifest import EMBEDDINGS_FOLDER, FAMILIARITY_FILE, MANIFEST_FILE, STORE_FILE, Counts
from index.store import INDEXES, SCHEMA, StoredEntity, write_store

Float32Array = npt.NDArray[np.float32]

SHARD = 4000  # about what an export writes
_TOPICS, _CLUSTERS = 300, 20_000
_OFFSET, _TOPIC, _CLUSTER, _OWN = 0.55, 0.40, 0.45, 0.55  # lengths of the parts; the sum is normalised
_SIZE_POWER = 0.8  # the r-th largest cluster has a share of about r to the -0.8
_BLAS_THREADS = "OPENBLAS_NUM_THREADS"
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


def write_embeddings(
    folder: Path, count: int, dim: int, *, seed: int = 0, progress: bool = False, processes: int = 1
) -> None:
    """Write `count` made-up embeddings to `folder` as shards, an entity each. By several processes, each has one thread
    for its products."""
    folder.mkdir(parents=True)
    write = partial(_write_shard, folder, count, dim, seed)
    shards = range(-(-count // SHARD))
    with tqdm(desc="make", unit="embedding", total=count, disable=not progress) as bar, ExitStack() as stack:
        written: Iterable[int]
        if processes == 1:
            written = map(write, shards)
        else:
            stack.enter_context(_one_blas_thread())
            pool = stack.enter_context(ProcessPoolExecutor(processes, mp_context=get_context("spawn")))
            written = pool.map(write, shards)
        for rows in written:
            bar.update(rows)


def _write_shard(folder: Path, count: int, dim: int, seed: int, shard: int) -> int:
    rows_n = np.arange(shard * SHARD, min((shard + 1) * SHARD, count))
    drawn_nD = _population(dim, seed).draw(len(rows_n), np.random.default_rng((seed, shard)))
    write_shard(folder, shard, rows_n, drawn_nD)
    return len(rows_n)


@lru_cache(maxsize=1)
def _population(dim: int, seed: int) -> Population:
    return Population.of(dim, seed)


@contextmanager
def _one_blas_thread() -> Iterator[None]:
    """Processes that are started within the block have it so: numpy looks once, when it is imported."""
    before = os.environ.get(_BLAS_THREADS)
    os.environ[_BLAS_THREADS] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_BLAS_THREADS]
        else:
            os.environ[_BLAS_THREADS] = before


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
    for file in {like.manifest.image_encoder.file, FAMILIARITY_FILE} & like.manifest.files.keys():
        shutil.copyfile(like.path / file, folder / file)
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


def write_plain_store(path: Path, count: int) -> None:
    """A store of the same entities, made by SQLite itself and not to be searched by title: 15 s for six million, where
    `write_store` takes many minutes."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;" + SCHEMA)
        connection.execute(
            """
            WITH RECURSIVE number (row) AS (SELECT 0 UNION ALL SELECT row + 1 FROM number WHERE row + 1 < ?)
            INSERT INTO entity
            SELECT
                row, 'Q' || row, 'Thing ' || row || ' of kind ' || (row % 997), '{}',
                'A made-up thing, number ' || row || '.', NULL, '["type ' || (row % 50) || '"]', NULL, 1, TRUE, NULL
            FROM number
            """,
            (count,),
        )
        connection.executescript(INDEXES)


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

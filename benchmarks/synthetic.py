"""Synthetic inputs for the benchmarks: images, hostile request bodies, embeddings and whole bundles of any size.

The embeddings have the structure of real ones. They share an offset, so they lie in a cone. They form clusters within
topics, and the sizes of the clusters follow Zipf's law. Around its cluster, an embedding varies much along a few
directions and little along many (a power law). Their order is random, so the first n are a sample of all.

Shapes: N embeddings, n of them in a shard, D embedding width, T topics, C clusters.
"""

import random
import shutil
import sqlite3
import struct
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, features
from tqdm import tqdm

from benchmarks.extreme import chunk, encoded
from core.arrays import Float32Array
from core.errors import UserError
from core.runtime import usable_cores
from index.build import build_index
from index.bundle import Bundle, list_files
from index.embeddings import EmbeddingShards, vectors_file, write_shard
from index.manifest import EMBEDDINGS_FOLDER, IMAGE_ENCODER_FILE, MANIFEST_FILE, STORE_FILE, Counts, ImageEncoderEntry
from index.store import INDEXES, SCHEMA

SHARD_SIZE = 4000  # about what an export writes
TINY_FACTORY = "PQ1x8"  # one byte per embedding
_TOPICS, _CLUSTERS = 300, 20_000
_OFFSET, _TOPIC, _CLUSTER, _OWN = 0.55, 0.40, 0.45, 0.55  # lengths of the parts; the sum is normalised
_SIZE_POWER = 0.8  # the r-th largest cluster has a share proportional to r to the -0.8
_SPECTRUM_POWER = 0.5  # the standard deviation along the r-th direction is proportional to r to the -0.5

# ---- images ----


def photograph(seed: int, width: int = 640, height: int = 480) -> bytes:
    """Return a JPEG that takes as long to decode as a photograph: smooth areas, edges, some grain."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    draw = ImageDraw.Draw(coarse)
    for _ in range(20):
        x, y, r = (int(rng.integers(low, high)) for low, high in ((0, width), (0, height), (10, 90)))
        draw.ellipse((x - r, y - r, x + r, y + r), fill=tuple(rng.integers(0, 256, 3).tolist()))
    grainy = np.asarray(coarse, np.int16) + rng.normal(0, 6, (height, width, 1)).astype(np.int16)
    return encoded(Image.fromarray(grainy.clip(0, 255).astype(np.uint8)), "JPEG", quality=85)


def write_photographs(folder: Path, count: int, width: int, height: int) -> list[str]:
    """Write `count` different photographs to `folder` and return their paths."""
    paths = [folder / f"{number}.jpg" for number in range(count)]
    for number, path in enumerate(paths):
        path.write_bytes(photograph(number, width, height))
    return [str(path) for path in paths]


def bust_cache(image: bytes, number: int) -> bytes:
    """Return bytes that no cache has seen but that decode to the same picture: decoders ignore what follows its end."""
    return image + number.to_bytes(8, "big")


# ---- hostile request bodies ----

_FORMATS = tuple(
    name for name in ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "TIFF", "BMP") if name != "AVIF" or features.check("avif")
)
_POLYGLOT_PARTS = (b"<script>alert(1)</script>", b"PK\x03\x04" + b"\0" * 26, b"%PDF-1.7", b"GIF89a", b"\xff\xd8\xff")
_EXTREME_BYTES = (0, 1, 0x7F, 0x80, 0xFF)


def hostile_bodies(count: int, seed: int = 0) -> Iterator[tuple[bytes, str]]:
    """Yield `count` bodies with a claimed content type: mutated images, decompression bombs, polyglots and noise.

    Two in five claim a random content type. The same seed gives the same bodies.
    """
    rng = random.Random(seed)
    image = Image.fromarray(np.random.default_rng(3).integers(0, 256, (48, 64, 3), dtype=np.uint8))
    valid = {name: encoded(image, name) for name in _FORMATS}
    bombs = (_png_bomb(30_000, 30_000), _png_bomb(2**31 - 1, 2**31 - 1), _png_bomb(1, 200_000_000))
    for _ in range(count):
        image_format = rng.choice(_FORMATS)
        claimed = image_format if rng.random() < 0.6 else rng.choice(_FORMATS)
        kind = rng.random()
        if kind < 0.85:
            body = _mutate(valid[image_format], rng)
        elif kind < 0.9:
            body = rng.choice(bombs)
        elif kind < 0.95:
            parts = [rng.choice(_POLYGLOT_PARTS), valid[image_format]]
            rng.shuffle(parts)
            body = b"".join(parts)
        else:
            body = rng.randbytes(rng.randrange(1, 2000))
        yield body, f"image/{claimed.lower()}"


def _mutate(valid: bytes, rng: random.Random) -> bytes:
    """Change a few bytes, most of them near the header. Then keep the rest, remove or repeat a part, or truncate it."""
    data = bytearray(valid)
    mean_offset = 24.0 if rng.random() < 0.5 else len(data) / 8
    for _ in range(rng.randint(1, 8)):
        offset = min(int(rng.expovariate(1 / mean_offset)), len(data) - 1)
        data[offset] = rng.choice((*_EXTREME_BYTES, rng.randrange(256)))
    start, length = rng.randrange(len(data) // 2), rng.randrange(1, len(data) // 2)
    before, part, after = data[:start], data[start : start + length], data[start + length :]
    return bytes(rng.choice((data, before + after, before + part + part + after, data[:-length])))


def _png_bomb(width: int, height: int) -> bytes:
    """Return a one-bit PNG of a few hundred bytes that claims this size."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(100_000), 9)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


# ---- embeddings ----


class Population:
    """The distribution that synthetic embeddings are drawn from."""

    def __init__(self, dim: int) -> None:
        rng = np.random.default_rng(0)
        topics_TD = _TOPIC * _unit_vectors(rng, _TOPICS, dim)
        sizes_C = np.arange(1, _CLUSTERS + 1) ** -_SIZE_POWER
        self._shares_C = sizes_C / sizes_C.sum()
        spectrum_D = np.arange(1, dim + 1) ** -_SPECTRUM_POWER
        rotation_DD = np.linalg.qr(rng.normal(size=(dim, dim)))[0]
        self._offset_D = _OFFSET * _unit_vectors(rng, 1, dim)[0]
        clusters_CD = topics_TD[rng.integers(_TOPICS, size=_CLUSTERS)]  # each includes its topic
        self._clusters_CD = clusters_CD + _CLUSTER * _unit_vectors(rng, _CLUSTERS, dim)
        # Orthogonal; the length of each is the standard deviation along it.
        self._directions_DD = (_OWN * spectrum_D / np.linalg.norm(spectrum_D) * rotation_DD).T.astype(np.float32)

    def draw(self, count: int, rng: np.random.Generator) -> Float32Array:
        """Return L2-normalised embeddings [n, D]."""
        drawn_nD: Float32Array = rng.standard_normal((count, len(self._offset_D)), np.float32) @ self._directions_DD
        drawn_nD += self._clusters_CD[rng.choice(len(self._shares_C), count, p=self._shares_C)]
        drawn_nD += self._offset_D
        drawn_nD /= np.linalg.norm(drawn_nD, axis=1, keepdims=True)
        return drawn_nD


def _unit_vectors(rng: np.random.Generator, count: int, dim: int) -> Float32Array:
    vectors_nD = rng.standard_normal((count, dim), np.float32)
    vectors_nD /= np.linalg.norm(vectors_nD, axis=1, keepdims=True)
    return vectors_nD


def write_embeddings(folder: Path, count: int, dim: int) -> None:
    """Write `count` synthetic embeddings, one per entity, to `folder` as shards. Every core draws some of them.

    The first whole shards are the same for any `count`.
    """
    folder.mkdir(parents=True)
    population = Population(dim)

    def write(shard: int) -> None:
        rows_n = np.arange(shard * SHARD_SIZE, min((shard + 1) * SHARD_SIZE, count))
        write_shard(folder, shard, rows_n, population.draw(len(rows_n), np.random.default_rng((0, shard))))

    shards = -(-count // SHARD_SIZE)
    with ThreadPoolExecutor(usable_cores()) as pool:
        for _ in tqdm(pool.map(write, range(shards)), desc="draw", unit="shard", total=shards):
            pass


# ---- bundles ----


def write_store(path: Path, count: int) -> None:
    """Write an entity store in seconds, even for six million entities: it is generated in SQL, without title search."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;" + SCHEMA)
        connection.execute(
            """
            WITH RECURSIVE number (row) AS (SELECT 0 UNION ALL SELECT row + 1 FROM number WHERE row + 1 < ?)
            INSERT INTO entity
            SELECT
                row, 'Q' || row, 'Thing ' || row || ' of kind ' || (row % 997), '{}',
                'A synthetic thing, number ' || row || '.', NULL, '["type ' || (row % 50) || '"]', NULL, 1, TRUE, NULL
            FROM number
            """,
            (count,),
        )
        connection.executescript(INDEXES)


def write_bundle(folder: Path, base: Bundle, *, count: int) -> None:
    """Complete the bundle whose embeddings are in `folder`, except for its index, with the image encoder of `base`."""
    write_store(folder / STORE_FILE, count)
    entry = base.manifest.image_encoder
    shutil.copyfile(base.path / entry.file, folder / entry.file)
    _write_manifest(
        folder,
        base,
        count,
        embedding_dim=np.load(folder / EMBEDDINGS_FOLDER / vectors_file(0), mmap_mode="r").shape[1],
        image_encoder=entry.model_copy(update={"int8": None, "float16": None}),
    )


def encoder_bundles(bundle_path: Path, folder: Path, *, smoke: bool) -> dict[str, Path]:
    """Return bundles by the name of their encoder: `bundle_path`, and without `smoke` one with a ViT-B/32 in int8."""
    bundles = {"own": bundle_path}
    if not smoke:
        base = Bundle.open(bundle_path)
        bundles["vit-b32-int8"] = folder / "vit-b32-int8"
        write_vit_bundle(bundles["vit-b32-int8"], base, "vit-b32", base.manifest.counts.entities, int8=True)
    return bundles


def write_vit_bundle(
    bundle: Path, base: Bundle, encoder: str, entities: int, *, int8: bool = False, search_device: str = "cpu"
) -> None:
    """Write a bundle with a ViT of random weights, in int8 or float16, and synthetic entities.

    Serving it costs as much as a real bundle of that size. Exact search on a GPU reads the bundle's embeddings, so for
    `search_device` `cuda` the index is tiny and inexact. Needs the extra `export`, but no GPU.
    """
    from benchmarks.generative.models import ENCODERS, clip_preprocessing, write_encoder
    from export.onnx import INPUT, OUTPUTS

    if encoder not in ENCODERS:
        raise UserError(f"--encoder {encoder} is unknown; choose one of {', '.join(ENCODERS)}")
    shape = ENCODERS[encoder]
    write_embeddings(bundle / EMBEDDINGS_FOLDER, entities, shape.embedding_dim)
    write_store(bundle / STORE_FILE, entities)
    write_encoder(encoder, bundle / IMAGE_ENCODER_FILE, "int8" if int8 else "float16")
    embeddings = EmbeddingShards(bundle / EMBEDDINGS_FOLDER, shape.embedding_dim)
    build_index(bundle, embeddings, factory=TINY_FACTORY if search_device == "cuda" else "Flat", progress=True)
    _write_manifest(
        bundle,
        base,
        entities,
        preprocessing=clip_preprocessing(shape.size_px).to_dict(),
        embedding_dim=shape.embedding_dim,
        patches=shape.patches,
        image_encoder=ImageEncoderEntry(file=IMAGE_ENCODER_FILE, input=INPUT, outputs=OUTPUTS, parity={}),
    )


def _write_manifest(bundle: Path, base: Bundle, entities: int, **changes: Any) -> None:
    """Write the manifest of `base` with these changes, without calibration."""
    counts = Counts(entities=entities, embeddings=entities, without_image=0, without_text=0, rejected=0)
    changes |= {"name": bundle.name, "counts": counts, "calibration": None, "files": list_files(bundle)}
    base.manifest.model_copy(update=changes).write(bundle / MANIFEST_FILE)

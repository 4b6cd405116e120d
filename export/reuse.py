"""Reuse the image encoder's ONNX file and the embeddings of unchanged entities from an earlier bundle (`--base`).

`embeddings/00000.content.npy` uint8 [n, 16] has a hash of the text and image bytes of each entity of a shard. Every
export reads and hashes the images, because sizes and times of files do not prove equal content, and hashing is cheap
compared with embedding.

Shapes: n entities of a shard, N entities of the bundle, k embeddings of one entity, D embedding width.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from core.errors import UserError
from core.files import atomic_write
from export.config import ExportConfig
from export.decode import HASH_BYTES
from export.model import ExportModel, describe_model
from export.onnx import Parity
from index.bundle import Bundle
from index.manifest import EMBEDDINGS_FOLDER, IMAGE_ENCODER_FILE, MANIFEST_FILE, Manifest

_MODEL_KEYS = ("image_encoder_hash", "text_encoder_hash", "checkpoint_sha256")


@dataclass(frozen=True, kw_only=True)
class BaseEntity:
    """An entity of the base. `embeddings_kD` is float16, as stored."""

    content_hash: bytes
    image_count: int
    embeddings_kD: npt.NDArray[np.float16]
    thumbnail: bytes | None
    attended_words: tuple[tuple[int, int, float], ...]


class BaseEntities:
    """The entities of a bundle, by id. Raises `BundleError`, and `UserError` for a bundle without content hashes."""

    def __init__(self, path: Path) -> None:
        bundle = Bundle.open(path)
        self.manifest = bundle.manifest
        self._hashes = _read_hashes(path, bundle.manifest.counts.entities)
        self._embeddings = bundle.embeddings()
        self._store = bundle.store()

    def close(self) -> None:
        self._store.close()

    def find(self, entity_ids: Sequence[str]) -> dict[str, BaseEntity]:
        """Return the entities that the base has, by id."""
        stored = self._store.by_ids(entity_ids)
        thumbnails = self._store.thumbnails([entity.row for entity in stored.values()])
        found = {}
        for entity_id, entity in stored.items():
            found[entity_id] = BaseEntity(
                content_hash=self._hashes[entity.row].tobytes(),
                image_count=entity.image_count,
                embeddings_kD=self._embeddings.stored(self._embeddings.positions_of(entity.row)),
                thumbnail=thumbnails.get(entity.row),
                attended_words=self._store.attended_words(entity.row),
            )
        return found


@contextmanager
def open_base(config: ExportConfig, model: ExportModel) -> Iterator[BaseEntities | None]:
    """Open the bundle of `--base`. Yields None without one, or if nothing can be copied from it.

    Models and thumbnails must be the same. With `--store-text`, the base must have texts too, because their attended
    words are copied with the embeddings.
    """
    if config.base is None:
        yield None
        return
    with closing(BaseEntities(config.base)) as base:
        settings = base.manifest.export
        fits = (
            _same_model(base.manifest, model)
            and settings.get("thumbnail_px") == config.thumbnail_px
            and (not config.store_text or settings.get("store_text"))
        )
        yield base if fits else None


def copy_image_encoder(config: ExportConfig, model: ExportModel, folder: Path) -> Parity | None:
    """Copy the image encoder from the base to `folder` and return its parity, None if its file would differ.

    Raises `BundleError` if a file of the base is not as its manifest says.
    """
    if config.base is None:
        return None
    manifest = Manifest.read(config.base / MANIFEST_FILE)  # the export has opened the bundle, and so checked it
    if not _same_image_encoder(manifest, model) or manifest.export.get("half") != config.half:
        return None
    for name, entry in manifest.files.items():
        if name.startswith(IMAGE_ENCODER_FILE):  # or its external data
            entry.check(config.base / name, "export the base again")
            with atomic_write(folder / name) as temporary:
                shutil.copyfile(config.base / name, temporary)
    return Parity(**manifest.image_encoder.parity)


def _same_model(manifest: Manifest, model: ExportModel) -> bool:
    described = describe_model(model)
    return all(manifest.model.get(key) == described[key] for key in _MODEL_KEYS)


def _same_image_encoder(manifest: Manifest, model: ExportModel) -> bool:
    """Return whether the image encoders have the same outputs. A checkpoint's centre is part of its image encoder."""
    same_weights = manifest.model.get("image_encoder_hash") == model.image_encoder.content_hash
    without_centre = model.centre is None and not (manifest.model.get("adaptor") or {}).get("centre")
    return _same_model(manifest, model) or (same_weights and without_centre)


def write_hashes(folder: Path, shard: int, content_hashes: Sequence[bytes]) -> None:
    """Write the content hashes of a shard's entities. Missing ones are zero."""
    hashes = b"".join(content_hash or bytes(HASH_BYTES) for content_hash in content_hashes)
    with atomic_write(folder / _hashes_file(shard)) as temporary, temporary.open("wb") as file:
        np.save(file, np.frombuffer(hashes, np.uint8).reshape(-1, HASH_BYTES), allow_pickle=False)


def _hashes_file(shard: int) -> str:
    return f"{shard:05d}.content.npy"


def _read_hashes(path: Path, entities: int) -> npt.NDArray[np.uint8]:
    shards: list[npt.NDArray[np.uint8]] = []
    while (file := path / EMBEDDINGS_FOLDER / _hashes_file(len(shards))).exists():
        shards.append(np.load(file, allow_pickle=False))
    if sum(map(len, shards)) != entities:
        raise UserError(f"--base {path} has no content hashes of its entities; export it once in full without --base")
    hashes_N16: npt.NDArray[np.uint8] = np.concatenate(shards)
    return hashes_N16

"""The bundle that an export starts from: entities whose content is the same have their embeddings copied from it.

`embeddings/00000.content.npy` uint8 [n, 16] holds a hash of text and image bytes of each entity of that shard; which
models made the embeddings the manifest says. Images are read to be hashed, whatever their size and time say: those lie
after a download or a copy, reading costs little beside decoding and encoding, and a wrong embedding would stay forever.
Shapes: n entities of a shard, N entities of the bundle, k embeddings of one entity, D embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from core.errors import UserError
from core.files import atomic_write
from export.decode import HASH_BYTES
from index.bundle import Bundle
from index.manifest import EMBEDDINGS_FOLDER

# What embeddings and thumbnails depend on, besides text and images.
_MODEL_KEYS = ("image_encoder_hash", "text_encoder_hash", "checkpoint_sha256")


@dataclass(frozen=True, kw_only=True)
class BaseEntity:
    """An entity of the base: `embeddings_kD` float16, the very bytes of its shard."""

    content_hash: bytes
    image_count: int
    embeddings_kD: npt.NDArray[np.float16]
    thumbnail: bytes | None
    attended_words: tuple[tuple[int, int, float], ...]


class BaseEntities:
    """The entities of a bundle by id, with what an export may copy. `same_model` says whether it may.

    Raises `UserError` for a bundle without content hashes, which an earlier version wrote; `BundleError`.
    """

    def __init__(self, path: Path) -> None:
        bundle = Bundle.open(path)
        self._manifest = bundle.manifest
        self.fingerprint = bundle.fingerprint
        self._hashes = _read_hashes(path, bundle.manifest.counts.entities)
        self._embeddings = bundle.embeddings()
        self._store = bundle.store()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._store.close()

    def fits(self, model: Mapping[str, Any], *, thumbnail_px: int, store_text: bool) -> bool:
        """Whether anything can be copied: the same models and thumbnails made the base.

        Where texts are stored, the base has to have stored them, too: the attended words are stored with them.
        """
        ours = self._manifest
        return (
            all(ours.model.get(key) == model[key] for key in _MODEL_KEYS)
            and ours.export.get("thumbnail_px") == thumbnail_px
            and (not store_text or bool(ours.export.get("store_text")))
        )

    def find(self, entity_ids: Sequence[str]) -> dict[str, BaseEntity]:
        """Those of the entities that are in the base."""
        stored = self._store.by_ids(entity_ids)
        thumbnails = self._store.thumbnails([entity.row for entity in stored.values()])
        found = {}
        for entity_id, entity in stored.items():
            positions = np.searchsorted(self._embeddings.rows_N, [entity.row, entity.row + 1])
            found[entity_id] = BaseEntity(
                content_hash=self._hashes[entity.row].tobytes(),
                image_count=entity.image_count,
                embeddings_kD=self._embeddings.stored(np.arange(*positions)),
                thumbnail=thumbnails.get(entity.row),
                attended_words=self._store.attended_words(entity.row),
            )
        return found


def hashes_file(shard: int) -> str:
    return f"{shard:05d}.content.npy"


def write_hashes(folder: Path, shard: int, content_hashes: Sequence[bytes]) -> None:
    """Write the content hashes of a shard's entities durably; zeros where one could not be told."""
    hashes_n16 = np.frombuffer(
        b"".join(content_hash or bytes(HASH_BYTES) for content_hash in content_hashes), np.uint8
    ).reshape(-1, HASH_BYTES)
    with atomic_write(folder / hashes_file(shard)) as temporary, temporary.open("wb") as file:
        np.save(file, hashes_n16, allow_pickle=False)


def _read_hashes(path: Path, entities: int) -> npt.NDArray[np.uint8]:
    shards: list[npt.NDArray[np.uint8]] = []
    while (file := path / EMBEDDINGS_FOLDER / hashes_file(len(shards))).exists():
        shards.append(np.load(file, allow_pickle=False))
    if sum(map(len, shards)) != entities:
        raise UserError(f"--base {path} has no content hashes of its entities; export it once in full without --base")
    hashes_N16: npt.NDArray[np.uint8] = np.concatenate(shards)
    return hashes_N16

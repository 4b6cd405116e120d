"""Frozen features on disk, computed once: keyed by what the encoder computes and by what went into it.

    ROOT/<first 32 digits of the encoder's content hash>/
        <segment>.<array>.npy     rows of features, memory-mapped when read
        <segment>.keys.npy        uint8 [n, 32]: the SHA-256 of each row's input; written last

A segment without its keys does not exist: whenever a run is killed, the next one finds whole segments or none. Runs at
the same time write segments of different names.

Shapes: N rows, P patches, C channels, D embedding, S tokens of all rows of a segment together.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt

from core.errors import UserError
from core.files import atomic_write

Array = npt.NDArray[np.generic]
_KEYS = "keys"
_SEGMENT_BYTES = 256 * 1024 * 1024
_FLOAT16_MAX = float(np.finfo(np.float16).max)


def default_cache_root() -> Path:
    """Where features are kept if no folder is named: the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "wikiclip" / "features"


def content_key(data: bytes) -> bytes:
    """The key of an input: the SHA-256 of an image file's bytes, or of a text in UTF-8."""
    return hashlib.sha256(data).digest()


def to_float16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float16]:
    """Half precision, with what lies beyond its range brought to its ends and not to infinity."""
    return np.clip(values, -_FLOAT16_MAX, _FLOAT16_MAX).astype(np.float16)


class Segments:
    """Rows of named arrays, appended and read back by key. The arrays of a row may differ in nothing but their values.

    Raises `UserError` if the folder cannot be written.
    """

    def __init__(self, root: Path, content_hash: str) -> None:
        self.folder = root / content_hash[:32]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"features cannot be cached in {root}: {error}; name a folder with --cache-dir") from error
        self._arrays: dict[str, dict[str, Array]] = {}
        self._where: dict[bytes, tuple[str, int]] = {}
        for keys_file in sorted(self.folder.glob(f"*.{_KEYS}.npy")):
            if not keys_file.name.startswith("."):
                self._open(keys_file.name.removesuffix(f".{_KEYS}.npy"))

    def __contains__(self, key: bytes) -> bool:
        return key in self._where

    def row(self, key: bytes) -> tuple[Mapping[str, Array], int]:
        """The arrays of the segment that holds `key`, and the row in them."""
        segment, row = self._where[key]
        return self._arrays[segment], row

    def append(self, keys: Sequence[bytes], arrays: Mapping[str, Array]) -> None:
        """Write one segment, whole or not at all."""
        segment = secrets.token_hex(8)
        try:
            for name, array in arrays.items():
                self._write(segment, name, array)
            self._write(segment, _KEYS, np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), 32))
        except OSError as error:
            raise UserError(
                f"features cannot be cached in {self.folder}: {error}; make room, or name a folder with --cache-dir"
            ) from error
        self._open(segment)

    def _write(self, segment: str, name: str, array: Array) -> None:
        with atomic_write(self.folder / f"{segment}.{name}.npy") as temporary, temporary.open("wb") as file:
            np.save(file, array)

    def _open(self, segment: str) -> None:
        arrays = {
            file.name.split(".")[1]: np.load(file, mmap_mode="r") for file in self.folder.glob(f"{segment}.*.npy")
        }
        for row, key in enumerate(arrays.pop(_KEYS)):
            self._where[key.tobytes()] = (segment, row)
        self._arrays[segment] = arrays


class ImageFeatureCache:
    """Patch tokens (float16) and image embeddings (float32) of images, by the SHA-256 of their bytes."""

    def __init__(self, root: Path, content_hash: str) -> None:
        self._segments = Segments(root, content_hash)
        self._pending: list[tuple[bytes, npt.NDArray[np.float16], npt.NDArray[np.float32]]] = []
        self._pending_bytes = 0

    def __contains__(self, key: bytes) -> bool:
        return key in self._segments

    def add(
        self,
        keys: Sequence[bytes],
        patch_tokens_NPC: npt.NDArray[np.float32],
        image_embedding_ND: npt.NDArray[np.float32],
    ) -> None:
        """Take features in; they reach the disk a segment at a time, the last of them with `flush`."""
        for key, tokens, embedding in zip(keys, to_float16(patch_tokens_NPC), image_embedding_ND, strict=True):
            self._pending.append((key, tokens, embedding))
            self._pending_bytes += tokens.nbytes + embedding.nbytes
        if self._pending_bytes >= _SEGMENT_BYTES:
            self.flush()

    def flush(self) -> None:
        if self._pending:
            keys, tokens, embeddings = zip(*self._pending, strict=True)
            arrays: dict[str, Array] = {
                "patch_tokens": np.stack(tokens),
                "image_embedding": np.stack(embeddings).astype(np.float32),
            }
            self._segments.append(keys, arrays)
            self._pending, self._pending_bytes = [], 0

    def patch_tokens(self, key: bytes) -> npt.NDArray[np.float16]:
        """float16 `[P, C]` of an image that is in the cache."""
        arrays, row = self._segments.row(key)
        return cast(npt.NDArray[np.float16], arrays["patch_tokens"][row])

    def image_embedding(self, key: bytes) -> npt.NDArray[np.float32]:
        """float32 `[D]` of an image that is in the cache."""
        arrays, row = self._segments.row(key)
        return cast(npt.NDArray[np.float32], arrays["image_embedding"][row])


class TextFeatureCache:
    """Text tokens (float16) of texts of any length, by the SHA-256 of the text. Stored end to end, without padding."""

    def __init__(self, root: Path, content_hash: str) -> None:
        self._segments = Segments(root, content_hash)
        self._pending: list[tuple[bytes, npt.NDArray[np.float16]]] = []
        self._pending_bytes = 0

    def __contains__(self, key: bytes) -> bool:
        return key in self._segments

    def add(self, keys: Sequence[bytes], tokens: Iterable[npt.NDArray[np.float32]]) -> None:
        """Take the tokens `[T, C]` of each text in; they reach the disk a segment at a time, the last with `flush`."""
        for key, text_tokens_TC in zip(keys, tokens, strict=True):
            half = to_float16(text_tokens_TC)
            self._pending.append((key, half))
            self._pending_bytes += half.nbytes
        if self._pending_bytes >= _SEGMENT_BYTES:
            self.flush()

    def flush(self) -> None:
        if self._pending:
            keys, tokens = zip(*self._pending, strict=True)
            ends = np.cumsum([len(text) for text in tokens], dtype=np.int64)
            self._segments.append(keys, {"text_tokens": np.concatenate(tokens), "ends": ends})
            self._pending, self._pending_bytes = [], 0

    def text_tokens(self, key: bytes) -> npt.NDArray[np.float16]:
        """float16 `[T, C]` of a text that is in the cache."""
        arrays, row = self._segments.row(key)
        ends = cast(npt.NDArray[np.int64], arrays["ends"])
        start = int(ends[row - 1]) if row else 0
        return cast(npt.NDArray[np.float16], arrays["text_tokens"][start : int(ends[row])])

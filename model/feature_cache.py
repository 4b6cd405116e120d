"""Frozen features on disk, computed once, keyed by the encoder's content hash and by the SHA-256 of each input.

    ROOT/<first 32 digits of the encoder's content hash>/
        <segment>.<array>.npy     rows of features, memory-mapped when read
        <segment>.keys.npy        uint8 [n, 32]: the SHA-256 of each row's input; written last

A segment without its keys file is ignored, so a killed run leaves only complete segments. Concurrent runs write
segments with different names.

Shapes: N rows, P patches, C channels, D embedding, T text tokens.
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
    """Return the default folder of features, in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "wikiclip" / "features"


def content_key(data: bytes) -> bytes:
    """Return the key of an input: the SHA-256 of an image file's bytes, or of a text in UTF-8."""
    return hashlib.sha256(data).digest()


def to_float16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float16]:
    """Convert to half precision. Values beyond its range become its largest, not infinity."""
    return np.clip(values, -_FLOAT16_MAX, _FLOAT16_MAX).astype(np.float16)


class FeatureCache:
    """Rows of named arrays, appended a segment at a time and read back by key.

    Raises `UserError` if the folder cannot be written.
    """

    def __init__(self, root: Path, content_hash: str) -> None:
        self.folder = root / content_hash[:32]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot cache features in {root}: {error}; name a folder with --cache-dir") from error
        self._arrays: dict[str, dict[str, Array]] = {}  # by segment
        self._where: dict[bytes, tuple[str, int]] = {}
        self._pending: list[tuple[bytes, tuple[Array, ...]]] = []
        self._pending_bytes = 0
        for keys_file in sorted(self.folder.glob(f"*.{_KEYS}.npy")):
            if not keys_file.name.startswith("."):
                self._open(keys_file.name.removesuffix(f".{_KEYS}.npy"))

    def __contains__(self, key: bytes) -> bool:
        return key in self._where

    def flush(self) -> None:
        """Write the pending rows as one segment."""
        if not self._pending:
            return
        keys, rows = zip(*self._pending, strict=True)
        segment = secrets.token_hex(8)
        try:
            for name, array in self._pack(rows).items():
                self._write(segment, name, array)
            self._write(segment, _KEYS, np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), 32))
        except OSError as error:
            raise UserError(
                f"cannot cache features in {self.folder}: {error}; free some space, or name a folder with --cache-dir"
            ) from error
        self._open(segment)
        self._pending, self._pending_bytes = [], 0

    def _pack(self, rows: Sequence[tuple[Array, ...]]) -> dict[str, Array]:
        """Return the arrays of a segment."""
        raise NotImplementedError

    def _append(self, rows: Iterable[tuple[bytes, tuple[Array, ...]]]) -> None:
        """Add rows, and write a segment once enough are pending."""
        for key, arrays in rows:
            self._pending.append((key, arrays))
            self._pending_bytes += sum(array.nbytes for array in arrays)
        if self._pending_bytes >= _SEGMENT_BYTES:
            self.flush()

    def _row(self, key: bytes) -> tuple[Mapping[str, Array], int]:
        """Return the arrays of the segment with `key`, and the row in them."""
        segment, row = self._where[key]
        return self._arrays[segment], row

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


class ImageFeatureCache(FeatureCache):
    """Patch tokens (float16) and image embeddings (float32), by the SHA-256 of the image file."""

    def add(
        self,
        keys: Sequence[bytes],
        patch_tokens_NPC: npt.NDArray[np.float32],
        image_embedding_ND: npt.NDArray[np.float32],
    ) -> None:
        """Add features. `flush` writes the last of them to disk."""
        self._append(zip(keys, zip(to_float16(patch_tokens_NPC), image_embedding_ND, strict=True), strict=True))

    def _pack(self, rows: Sequence[tuple[Array, ...]]) -> dict[str, Array]:
        tokens, embeddings = zip(*rows, strict=True)
        return {"patch_tokens": np.stack(tokens), "image_embedding": np.stack(embeddings).astype(np.float32)}

    def patch_tokens(self, key: bytes) -> npt.NDArray[np.float16]:
        """Return float16 `[P, C]` of a cached image."""
        arrays, row = self._row(key)
        return cast(npt.NDArray[np.float16], arrays["patch_tokens"][row])

    def image_embedding(self, key: bytes) -> npt.NDArray[np.float32]:
        """Return float32 `[D]` of a cached image."""
        arrays, row = self._row(key)
        return cast(npt.NDArray[np.float32], arrays["image_embedding"][row])


class TextFeatureCache(FeatureCache):
    """Text tokens (float16) by the SHA-256 of the text, stored end to end without padding."""

    def add(self, keys: Sequence[bytes], tokens: Iterable[npt.NDArray[np.float32]]) -> None:
        """Add the tokens `[T, C]` of each text. `flush` writes the last of them to disk."""
        self._append((key, (to_float16(tokens_TC),)) for key, tokens_TC in zip(keys, tokens, strict=True))

    def _pack(self, rows: Sequence[tuple[Array, ...]]) -> dict[str, Array]:
        tokens = [row[0] for row in rows]
        ends = np.cumsum([len(tokens_TC) for tokens_TC in tokens], dtype=np.int64)
        return {"text_tokens": np.concatenate(tokens), "ends": ends}

    def text_tokens(self, key: bytes) -> npt.NDArray[np.float16]:
        """Return float16 `[T, C]` of a cached text."""
        arrays, row = self._row(key)
        ends = cast(npt.NDArray[np.int64], arrays["ends"])
        start = int(ends[row - 1]) if row else 0
        return cast(npt.NDArray[np.float16], arrays["text_tokens"][start : int(ends[row])])

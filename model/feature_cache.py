"""Frozen features on disk, computed once, keyed by the encoder's content hash and by the SHA-256 of each input.

    ROOT/<first 32 digits of the encoder's content hash>/<segment>.safetensors
        keys          uint8 [N, 32]: the SHA-256 of each row's input
        tokens        float16: the tokens of all rows, end to end
        ends          int64 [N]: where each row's tokens end
        embeddings    float32 [N, D]: of images; D is 0 for texts

Segments are written atomically, so a killed run leaves only complete ones. Concurrent runs write segments with
different names.

Shapes: N rows, T tokens or patches of a row, C channels, D embedding.
"""

import hashlib
import os
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from core.arrays import Float16Array, Float32Array
from core.errors import UserError
from core.files import atomic_write_bytes

_SEGMENT_BYTES = 256 * 1024 * 1024
_FLOAT16_MAX = float(np.finfo(np.float16).max)


def default_cache_root() -> Path:
    """Return the default folder of features, in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "wikiclip" / "features"


def content_key(data: bytes) -> bytes:
    """Return the key of an input: the SHA-256 of an image file's bytes, or of a text in UTF-8."""
    return hashlib.sha256(data).digest()


def to_float16(values: Float32Array) -> Float16Array:
    """Convert to half precision. Values beyond its range become its largest, not infinity."""
    return np.clip(values, -_FLOAT16_MAX, _FLOAT16_MAX).astype(np.float16)


class FeatureCache:
    """The features of one encoder, appended a segment at a time and read back by key.

    Raises `UserError` if the folder cannot be written.
    """

    def __init__(self, root: Path, content_hash: str) -> None:
        self.folder = root / content_hash[:32]
        self._where: dict[bytes, tuple[Any, int, slice]] = {}  # segment, row, tokens
        self._pending: list[tuple[bytes, Float16Array, Float32Array]] = []
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot cache features in {root}: {error}; name a folder with --cache-dir") from error
        for file in sorted(self.folder.glob("[!.]*.safetensors")):
            self._open(file)

    @property
    def size_bytes(self) -> int:
        """The size of all segments on disk."""
        return sum(file.stat().st_size for file in self.folder.glob("[!.]*.safetensors"))

    def __contains__(self, key: bytes) -> bool:
        return key in self._where

    def add(
        self,
        keys: Sequence[bytes],
        tokens: Iterable[Float32Array],
        embeddings_ND: Float32Array | None = None,
    ) -> None:
        """Add the tokens `[T, C]` of each key and, of images, the embeddings. `flush` writes the last of them.

        Of images that are only queries, T may be 0.
        """
        if embeddings_ND is None:
            embeddings_ND = np.zeros((len(keys), 0), np.float32)
        self._pending += zip(keys, map(to_float16, tokens), embeddings_ND, strict=True)
        if sum(tokens_TC.nbytes + embedding_D.nbytes for _, tokens_TC, embedding_D in self._pending) >= _SEGMENT_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write the pending rows as one segment."""
        if not self._pending:
            return
        keys, tokens, embeddings = zip(*self._pending, strict=True)
        segment = {
            "keys": np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 32),
            "tokens": np.concatenate(tokens),
            "ends": np.cumsum([len(tokens_TC) for tokens_TC in tokens], dtype=np.int64),
            "embeddings": np.stack(embeddings),
        }
        file = self.folder / f"{secrets.token_hex(8)}.safetensors"
        try:
            atomic_write_bytes(file, save(segment))
        except OSError as error:
            raise UserError(
                f"cannot cache features in {self.folder}: {error}; free some space, or name a folder with --cache-dir"
            ) from error
        self._open(file)
        self._pending = []

    def tokens(self, key: bytes) -> Float16Array:
        """Return the tokens `[T, C]` of an image or a text."""
        segment, _, tokens = self._where[key]
        result: Float16Array = segment.get_slice("tokens")[tokens]
        return result

    def embedding(self, key: bytes) -> Float32Array:
        """Return the embedding `[D]` of an image."""
        segment, row, _ = self._where[key]
        result: Float32Array = segment.get_slice("embeddings")[row]
        return result

    def _open(self, file: Path) -> None:
        segment: Any = safe_open(file, "np")
        start = 0
        for row, (key, end) in enumerate(zip(segment.get_tensor("keys"), segment.get_tensor("ends"), strict=True)):
            self._where[key.tobytes()] = (segment, row, slice(start, int(end)))
            start = int(end)

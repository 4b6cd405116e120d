"""Images in tar shards, as WebDataset names them: `KEY.jpg` with `KEY.json` beside it, which says where it came from.

    FOLDER/00000.tar        shards; one that is there is whole
    FOLDER/images.sqlite    where in which shard the bytes of each URL lie, and why there are none

A shard is renamed into place before its images are listed, so one that is not listed was never finished.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import sqlite3
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from catalog.images import LocalImages, UnusableImage
from catalog.records import is_url
from core.errors import CatalogError, UserError
from core.files import atomic_write
from core.jsonl import Rejected

INDEX_FILE = "images.sqlite"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS images (url TEXT PRIMARY KEY, shard INTEGER, "offset" INTEGER, size INTEGER) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS failed (url TEXT PRIMARY KEY, line INTEGER, reason TEXT, entity_id TEXT) WITHOUT ROWID;
"""
_EXTENSIONS = {"image/jpeg": "jpg", "image/tiff": "tif"}


@dataclass(frozen=True)
class TarImages:
    """Images by URL out of the shards in a folder, any other from the files of this machine."""

    folder: Path

    def __post_init__(self) -> None:
        if not (self.folder / INDEX_FILE).is_file():
            raise CatalogError(
                f"{self.folder} holds no {INDEX_FILE}; give the folder that `wikiclip fetch-images` wrote"
            )

    def read(self, image: str) -> bytes:
        """The bytes of an image. Raises `UnusableImage` if it was not fetched, `CatalogError` if its shard is gone."""
        if not is_url(image):
            return LocalImages().read(image)
        # Opened anew each time: this is read from threads and from processes that were forked.
        with closing(sqlite3.connect(f"{(self.folder / INDEX_FILE).resolve().as_uri()}?mode=ro", uri=True)) as db:
            place = db.execute('SELECT shard, "offset", size FROM images WHERE url = ?', (image,)).fetchone()
            failed = db.execute("SELECT reason FROM failed WHERE url = ?", (image,)).fetchone()
        if place is None:
            raise UnusableImage(f"was not fetched: {failed[0]}" if failed else "was not fetched; run fetch-images")
        shard, offset, size = place
        path = shard_path(self.folder, shard)
        try:
            with path.open("rb") as file:
                data = os.pread(file.fileno(), size, offset)
        except OSError as error:
            raise CatalogError(f"{path} cannot be read: {error.strerror}; fetch the images again") from error
        if len(data) != size:
            raise CatalogError(f"{path} is cut short; remove {self.folder} and fetch the images again")
        return data


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.tar"


class TarShards:
    """The shards of a folder being filled. One process may hold it at a time; raises `UserError` if another does.

    An image is there for good once its shard is finished, which is when it reaches `shard_bytes`, or on `close`.
    """

    def __init__(self, folder: Path, *, shard_bytes: int) -> None:
        self._folder = folder
        self._shard_bytes = shard_bytes
        folder.mkdir(parents=True, exist_ok=True)
        self._held = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._held)
            raise UserError(f"another process is fetching into {folder}; wait for it to end") from None
        self._db = sqlite3.connect(folder / INDEX_FILE, isolation_level=None)
        self._db.executescript(_SCHEMA)
        (last,) = self._db.execute("SELECT MAX(shard) FROM images").fetchone()
        self._number = 0 if last is None else last + 1
        self._pending: dict[str, tuple[bytes, dict[str, Any]]] = {}
        self._pending_bytes = 0

    def __enter__(self) -> TarShards:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.finish_shard()
        finally:
            self._db.close()
            os.close(self._held)

    def knows(self, url: str) -> bool:
        """Whether an image is there, or is known not to be had."""
        query = "SELECT 1 FROM images WHERE url = ?1 UNION ALL SELECT 1 FROM failed WHERE url = ?1"
        return url in self._pending or self._db.execute(query, (url,)).fetchone() is not None

    def forget_failures(self) -> None:
        """Let every image that was not to be had be tried again."""
        self._db.execute("DELETE FROM failed")

    def fail(self, url: str, *, line: int, entity_id: str, reason: str) -> None:
        self._db.execute("INSERT OR REPLACE INTO failed VALUES (?, ?, ?, ?)", (url, line, reason, entity_id))

    def failures(self) -> Iterator[Rejected]:
        """The images that were not to be had, by their lines in the catalog."""
        for url, line, reason, entity_id in self._db.execute("SELECT * FROM failed ORDER BY line, url"):
            yield Rejected(line=line, reason=f"image {url}: {reason}", record=entity_id)

    def add(self, url: str, data: bytes, media_type: str, facts: Mapping[str, Any]) -> None:
        """Take an image in, which is kept in memory until its shard is finished.

        `facts` go into its JSON, besides its URL, type and SHA-256.
        """
        described = {"url": url, "media_type": media_type, "sha256": hashlib.sha256(data).hexdigest(), **facts}
        self._pending[url] = (data, described)
        self._pending_bytes += len(data)
        if self._pending_bytes >= self._shard_bytes:
            self.finish_shard()

    def finish_shard(self) -> None:
        """Write what was taken in as one shard, and list it."""
        if not self._pending:
            return
        places = []
        with (
            atomic_write(shard_path(self._folder, self._number)) as temporary,
            tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar,
        ):
            for url, (data, described) in self._pending.items():
                kind = described["media_type"]
                key = hashlib.sha256(url.encode()).hexdigest()[:32]
                extension = _EXTENSIONS.get(kind, kind.removeprefix("image/"))
                offset = _add_member(tar, f"{key}.{extension}", data)
                places.append((url, self._number, offset, len(data)))
                _add_member(tar, f"{key}.json", json.dumps(described, ensure_ascii=False).encode())
        self._db.execute("BEGIN")
        self._db.executemany("INSERT INTO images VALUES (?, ?, ?, ?)", places)
        self._db.execute("COMMIT")
        self._pending.clear()
        self._pending_bytes = 0
        self._number += 1


def _add_member(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Add a file and return where in the archive its bytes begin."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
    return tar.offset - -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE

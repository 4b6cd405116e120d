"""Images of a catalog: local files, and tar shards of images by URL.

A folder of shards follows WebDataset's conventions: `KEY.jpg`, and `KEY.json` with its URL, type and SHA-256.

    FOLDER/00000.tar        complete shards
    FOLDER/images.sqlite    shard, offset and size of each URL's bytes, or why its download failed

A shard is renamed into place before its images are listed, so an unlisted shard is overwritten by the next run.
"""

import errno
import hashlib
import io
import json
import os
import sqlite3
import stat
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from catalog.records import is_url
from core.errors import CatalogError
from core.files import atomic_write, locked
from core.lines import Rejected
from core.runtime import usable_cores
from imaging import Decoder, automatic_budget

INDEX_FILE = "images.sqlite"
MAX_PIXELS = 200_000_000  # catalogs are trusted; this only keeps one file from exhausting memory
_DECODE_TIMEOUT_S = 30.0
# Errors of a disk or mount. Every later image would seem missing too.
_MACHINE_ERRORS = {errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
_SCHEMA = """
CREATE TABLE IF NOT EXISTS images (url TEXT PRIMARY KEY, shard INTEGER, "offset" INTEGER, size INTEGER) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS failed (url TEXT PRIMARY KEY, line INTEGER, reason TEXT, entity_id TEXT) WITHOUT ROWID;
"""
_EXTENSIONS = {"image/jpeg": "jpg", "image/tiff": "tif"}


def image_checker() -> Decoder:
    """Return a decoder whose `check` tells whether images of a catalog can be used."""
    return Decoder(
        max_pixels=MAX_PIXELS, budget_bytes=automatic_budget(), timeout_s=_DECODE_TIMEOUT_S, threads=usable_cores()
    )


class UnusableImage(Exception):
    """An image of a record that cannot be read. The message says why."""


@dataclass(frozen=True)
class ImageReader:
    """Reads images of records: local files, and images by URL from the tar shards in `folder`."""

    folder: Path | None = None

    def __post_init__(self) -> None:
        if self.folder is not None and not (self.folder / INDEX_FILE).is_file():
            raise CatalogError(f"{self.folder} has no {INDEX_FILE}; give the folder that `wikiclip fetch-images` wrote")

    def read(self, image: str) -> bytes:
        """Return an image's bytes. Raises `UnusableImage`, or `CatalogError` if the disk fails or a shard is lost."""
        if not is_url(image):
            return _read_file(image)
        if self.folder is None:
            raise UnusableImage("images by URL are not fetched; see `wikiclip fetch-images`")
        return _read_from_shard(self.folder, image)


def _read_file(image: str) -> bytes:
    try:
        # O_NONBLOCK keeps a named pipe from blocking. The check for a regular file excludes endless devices.
        with open(os.open(image, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UnusableImage("cannot be read: not a file")
            return file.read()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        if getattr(error, "errno", None) in _MACHINE_ERRORS:
            raise CatalogError(f"image {image} cannot be read: {reason}; repair that, then --resume") from error
        raise UnusableImage(f"cannot be read: {reason}") from error


def _read_from_shard(folder: Path, url: str) -> bytes:
    # A connection per call, because this is called from several threads and from forked processes.
    with closing(sqlite3.connect(f"{(folder / INDEX_FILE).resolve().as_uri()}?mode=ro", uri=True)) as db:
        place = db.execute('SELECT shard, "offset", size FROM images WHERE url = ?', (url,)).fetchone()
        failed = db.execute("SELECT reason FROM failed WHERE url = ?", (url,)).fetchone()
    if place is None:
        raise UnusableImage(f"was not fetched: {failed[0]}" if failed else "was not fetched; run fetch-images")
    shard, offset, size = place
    path = shard_path(folder, shard)
    try:
        with path.open("rb") as file:
            data = os.pread(file.fileno(), size, offset)
    except OSError as error:
        raise CatalogError(f"{path} cannot be read: {error.strerror}; fetch the images again") from error
    if len(data) != size:
        raise CatalogError(f"{path} is cut short; remove {folder} and fetch the images again")
    return data


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.tar"


class TarShards:
    """Writes tar shards into a folder, which it locks. Raises `UserError` if another process has the lock.

    An image is durable once its shard is finished, at `shard_bytes` or when the context ends.
    """

    def __init__(self, folder: Path, *, shard_bytes: int) -> None:
        self._folder = folder
        self._shard_bytes = shard_bytes
        self._opened = ExitStack()
        busy = f"another process is fetching into {folder}; wait for it to end"
        self._opened.enter_context(locked(folder, busy))
        self._db = self._opened.enter_context(closing(sqlite3.connect(folder / INDEX_FILE, isolation_level=None)))
        self._db.executescript(_SCHEMA)
        (last,) = self._db.execute("SELECT MAX(shard) FROM images").fetchone()
        self._number = 0 if last is None else last + 1
        self._pending: dict[str, tuple[bytes, dict[str, Any]]] = {}
        self._pending_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._opened:
            self.finish_shard()

    def knows(self, url: str) -> bool:
        """Return whether an image has been added or its failure recorded."""
        query = "SELECT 1 FROM images WHERE url = ?1 UNION ALL SELECT 1 FROM failed WHERE url = ?1"
        return url in self._pending or self._db.execute(query, (url,)).fetchone() is not None

    def forget_failures(self) -> None:
        """Delete all recorded failures, so that those images are tried again."""
        self._db.execute("DELETE FROM failed")

    def fail(self, url: str, *, line: int, entity_id: str, reason: str) -> None:
        """Record a failed download."""
        self._db.execute("INSERT OR REPLACE INTO failed VALUES (?, ?, ?, ?)", (url, line, reason, entity_id))

    def failures(self) -> Iterator[Rejected]:
        """Yield the failed downloads in catalog order."""
        for url, line, reason, entity_id in self._db.execute("SELECT * FROM failed ORDER BY line, url"):
            yield Rejected(line=line, reason=f"image {url}: {reason}", record=entity_id)

    def add(self, url: str, data: bytes, media_type: str, facts: Mapping[str, Any]) -> None:
        """Add an image to the current shard, which is in memory. `facts` are added to the image's JSON."""
        described = {"url": url, "media_type": media_type, "sha256": hashlib.sha256(data).hexdigest(), **facts}
        self._pending[url] = (data, described)
        self._pending_bytes += len(data)
        if self._pending_bytes >= self._shard_bytes:
            self.finish_shard()

    def finish_shard(self) -> None:
        """Write the current shard and list its images."""
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
    """Add a file and return the offset of its bytes in the archive."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
    return tar.offset - -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE

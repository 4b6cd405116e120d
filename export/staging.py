"""The work folder of an export: what is finished so far, so that a killed one can be taken up again.

OUT/.partial/
    settings.json           what the content depends on; a resume must match it
    image_encoder.json      written once the ONNX file is in place: its parity
    shards/00000.jsonl      written once a shard's embeddings are in place: its records and rejects
    bundle/                 the bundle being made; moved into OUT at the end, manifest last
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from core.errors import UserError
from core.files import atomic_write_bytes, sync
from core.jsonl import Rejected
from export.onnx_export import Parity
from index.manifest import EMBEDDINGS_FOLDER, IMAGE_ENCODER_FILE, MANIFEST_FILE, STORE_FILE
from index.store import StoredEntity

WORK_FOLDER = ".partial"
_BUNDLE_PARTS = (EMBEDDINGS_FOLDER, IMAGE_ENCODER_FILE, STORE_FILE, "index", MANIFEST_FILE)


@dataclass(frozen=True, kw_only=True)
class StagedShard:
    """What a shard leaves besides its embeddings: its entities with their thumbnails, and what it had to leave out."""

    entities: Sequence[tuple[StoredEntity, bytes | None]]
    rejected: Sequence[Rejected]  # catalog records
    images_failed: Sequence[Rejected]


class StagingDir:
    """The work folder below an output folder. One process may hold it at a time."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._work = out / WORK_FOLDER
        self.bundle = self._work / "bundle"
        self.embeddings = self.bundle / EMBEDDINGS_FOLDER

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the work folder, made if missing, and clear it of half-written files. Raises `UserError` if taken."""
        self._work.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._work, os.O_RDONLY)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"another export is writing {self._out}; wait for it to end, or choose another --out"
                ) from None
            for leftover in self._work.rglob(".*.partial"):
                leftover.unlink()
            yield
        finally:
            os.close(descriptor)

    def settings(self) -> dict[str, Any] | None:
        """The settings this export was begun with, None at its begin."""
        return _read(self._work / "settings.json")

    def begin(self, settings: Mapping[str, Any]) -> None:
        for folder in (self.embeddings, self._work / "shards"):
            folder.mkdir(parents=True, exist_ok=True)
        atomic_write_bytes(self._work / "settings.json", json.dumps(settings, indent=2).encode())

    def parity(self) -> Parity | None:
        """None until the image encoder's ONNX file is in place."""
        content = _read(self._work / "image_encoder.json")
        return None if content is None else Parity(**content)

    def finish_image_encoder(self, parity: Parity) -> None:
        atomic_write_bytes(self._work / "image_encoder.json", json.dumps(asdict(parity)).encode())

    def discard(self, file: str) -> None:
        """Take away a file, of ONNX with its data, which an export that goes on without it has left."""
        for each in self.bundle.glob(f"{file}*"):
            each.unlink()

    def has_shard(self, number: int) -> bool:
        return self._shard_path(number).exists()

    def finish_shard(self, number: int, shard: StagedShard) -> None:
        """Record a shard as finished; its embeddings must be in place."""
        rows: list[dict[str, Any]] = [
            {"entity": entity.to_dict(), "thumbnail": None if webp is None else base64.b64encode(webp).decode()}
            for entity, webp in shard.entities
        ]
        rows += [{"rejected": asdict(rejected)} for rejected in shard.rejected]
        rows += [{"image_failed": asdict(rejected)} for rejected in shard.images_failed]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        atomic_write_bytes(self._shard_path(number), text.encode())

    def shards(self) -> Iterator[StagedShard]:
        """The finished shards, in order."""
        number = 0
        while self.has_shard(number):
            yield self._read_shard(number)
            number += 1

    def entities(self) -> Iterator[tuple[StoredEntity, bytes | None]]:
        """The entities of the finished shards, in row order."""
        for shard in self.shards():
            yield from shard.entities

    def _read_shard(self, number: int) -> StagedShard:
        entities: list[tuple[StoredEntity, bytes | None]] = []
        rejected: list[Rejected] = []
        images_failed: list[Rejected] = []
        with self._shard_path(number).open(encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                if "entity" in row:
                    webp = row["thumbnail"]
                    thumbnail = None if webp is None else base64.b64decode(webp)
                    entities.append((StoredEntity.from_dict(row["entity"]), thumbnail))
                elif "rejected" in row:
                    rejected.append(Rejected(**row["rejected"]))
                else:
                    images_failed.append(Rejected(**row["image_failed"]))
        return StagedShard(entities=entities, rejected=rejected, images_failed=images_failed)

    def _shard_path(self, number: int) -> Path:
        return self._work / "shards" / f"{number:05d}.jsonl"

    @property
    def is_ready_to_publish(self) -> bool:
        """The bundle is whole; at most some of it has been moved already."""
        return (self.bundle / MANIFEST_FILE).exists()

    def publish(self) -> None:
        """Move the bundle into the output folder, manifest last, and remove the work folder."""
        extras = sorted(entry.name for entry in self.bundle.iterdir() if entry.name not in _BUNDLE_PARTS)
        for name in (*extras, *_BUNDLE_PARTS):
            if (self.bundle / name).exists():  # not yet moved by an earlier attempt
                if name == MANIFEST_FILE:
                    sync(self._out)
                os.replace(self.bundle / name, self._out / name)
        sync(self._out)
        self.remove()

    def remove(self) -> None:
        shutil.rmtree(self._work)


def is_unfinished(out: Path) -> bool:
    """Whether an export to this folder was begun and not ended."""
    return (out / WORK_FOLDER).exists()


def foreign_files(out: Path) -> list[str]:
    """What lies in an output folder without a manifest and was put there by no export that can be taken up again."""
    spool = StagingDir(out)
    if spool.is_ready_to_publish:  # some of its parts may have been moved already
        return []
    return sorted(entry.name for entry in out.iterdir() if entry.name != WORK_FOLDER)


def _read(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    content: dict[str, Any] = json.loads(path.read_bytes())
    return content

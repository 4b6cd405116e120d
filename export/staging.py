"""The staging folder of an export, which makes it resumable, and the thread that writes shards into it.

OUT/.partial/
    settings.json           what the content depends on; a resumed export must match it
    image_encoder.json      parity of the ONNX file, written after the file
    shards/00000.json       records and rejects of a shard, written after its embeddings
    bundle/                 the unfinished bundle; moved into OUT at the end, manifest last

Shapes: n embeddings of a shard, T text tokens, D embedding width.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ConfigDict, TypeAdapter

from core.errors import UserError
from core.files import atomic_write_bytes, locked, sync
from core.lines import Rejected
from export.config import ExportConfig, check_image_root
from export.onnx import Parity
from export.reuse import write_hashes
from export.shards import EmbeddedShard, StageTimes
from index.embeddings import write_shard
from index.manifest import EMBEDDINGS_FOLDER, MANIFEST_FILE
from index.store import StoredEntity
from model.encoders import TextEncoder

STAGING_FOLDER = ".partial"
WRITING = "waiting for the disk"
MAX_WORDS = 12
_WORD = re.compile(r"\w+(?:['’-]\w+)*")


@dataclass(frozen=True, kw_only=True)
class StagedShard:
    """A finished shard without its embeddings: entities with thumbnails, bad records and failed images."""

    __pydantic_config__ = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")
    entities: Sequence[tuple[StoredEntity, bytes | None]]
    rejected: Sequence[Rejected]
    images_failed: Sequence[Rejected]


_STAGED_JSON = TypeAdapter(StagedShard)


class StagingDir:
    """The staging folder of an output folder."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._folder = out / STAGING_FOLDER
        self.bundle = self._folder / "bundle"
        self.embeddings = self.bundle / EMBEDDINGS_FOLDER

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Create and lock the folder, and delete half-written files. Raises `UserError` if another process has it."""
        busy = f"another export is writing {self._out}; wait for it to end, or choose another --out"
        with locked(self._folder, busy):
            for leftover in self._folder.rglob(".*.partial"):
                leftover.unlink()
            yield

    def settings(self) -> dict[str, Any] | None:
        """Return the settings the export was begun with, or None for a new one."""
        path = self._folder / "settings.json"
        return json.loads(path.read_bytes()) if path.exists() else None

    def begin(self, settings: Mapping[str, Any]) -> None:
        for folder in (self.embeddings, self._folder / "shards"):
            folder.mkdir(parents=True, exist_ok=True)
        atomic_write_bytes(self._folder / "settings.json", json.dumps(settings, indent=2).encode())

    def parity(self) -> Parity | None:
        """Return the image encoder's parity, or None before its ONNX file is complete."""
        path = self._folder / "image_encoder.json"
        return Parity(**json.loads(path.read_bytes())) if path.exists() else None

    def finish_image_encoder(self, parity: Parity) -> None:
        atomic_write_bytes(self._folder / "image_encoder.json", json.dumps(asdict(parity)).encode())

    def discard(self, file: str) -> None:
        """Delete a file of the bundle, with its external data, that an earlier run may have left."""
        for each in self.bundle.glob(f"{file}*"):
            each.unlink()

    def has_shard(self, number: int) -> bool:
        return self._shard_path(number).exists()

    def finish_shard(self, number: int, shard: StagedShard) -> None:
        """Record a shard as finished. Its embeddings must have been written."""
        atomic_write_bytes(self._shard_path(number), _STAGED_JSON.dump_json(shard, by_alias=True))

    def shards(self) -> Iterator[StagedShard]:
        """Yield the finished shards, in order."""
        number = 0
        while self.has_shard(number):
            yield _STAGED_JSON.validate_json(self._shard_path(number).read_bytes())
            number += 1

    def entities(self) -> Iterator[tuple[StoredEntity, bytes | None]]:
        """Yield the entities of the finished shards, in row order."""
        for shard in self.shards():
            yield from shard.entities

    def _shard_path(self, number: int) -> Path:
        return self._folder / "shards" / f"{number:05d}.json"

    @property
    def is_ready_to_publish(self) -> bool:
        """Whether the bundle is complete. Some of its parts may have been moved already."""
        return (self.bundle / MANIFEST_FILE).exists()

    def publish(self) -> None:
        """Move the bundle into the output folder, manifest last, and delete the staging folder."""
        for part in sorted(self.bundle.iterdir(), key=lambda part: part.name == MANIFEST_FILE):
            if part.name == MANIFEST_FILE:
                sync(self._out)
            os.replace(part, self._out / part.name)
        sync(self._out)
        self.remove()

    def remove(self) -> None:
        shutil.rmtree(self._folder)


def is_unfinished(out: Path) -> bool:
    """Return whether the folder has an unfinished export."""
    return (out / STAGING_FOLDER).exists()


def check_output(out: Path, *, resume: bool) -> None:
    """Raise `UserError` if the output folder has anything but an export that may be resumed."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder")
    if not resume and (out / MANIFEST_FILE).exists():
        raise UserError(f"--out {out} already has a bundle, which never changes; choose another folder")
    if not resume and is_unfinished(out):
        raise UserError(f"--out {out} has an unfinished export; finish it with --resume, or remove the folder")
    if (out / MANIFEST_FILE).exists() or StagingDir(out).is_ready_to_publish:
        return  # parts of the bundle may have been moved already
    if files := sorted(entry.name for entry in out.iterdir() if entry.name != STAGING_FOLDER):
        raise UserError(f"--out {out} is not empty (it has {files[0]}); choose an empty or a new folder")


def write_shards(
    config: ExportConfig,
    text_encoder: TextEncoder | None,
    staging: StagingDir,
    shards: Generator[EmbeddedShard],
    times: StageTimes,
) -> Generator[EmbeddedShard]:
    """Write shards in a thread while the models embed the next one. Yields each when its writing begins."""
    previous: Future[None] = Future()
    previous.set_result(None)
    with ThreadPoolExecutor(1, thread_name_prefix="writer") as thread, closing(shards):
        for embedded in shards:
            check_image_root(config)  # otherwise a shard whose images all seem missing would count as finished
            with times.measure(WRITING):
                previous.result()
            previous = thread.submit(_write, staging, text_encoder, embedded)
            yield embedded
        previous.result()


def _write(staging: StagingDir, text_encoder: TextEncoder | None, embedded: EmbeddedShard) -> None:
    records = embedded.records
    number, copied = records.shard.number, records.copied
    rows_n = np.array([*embedded.rows, *(row for row, copied_kD in copied for _ in copied_kD)], np.int64)
    all_nD = np.concatenate([embedded.embeddings_nD.astype(np.float16), *(copied_kD for _, copied_kD in copied)])
    order_n = np.argsort(rows_n, kind="stable")
    write_shard(staging.embeddings, number, rows_n[order_n], all_nD[order_n])
    write_hashes(staging.embeddings, number, records.content_hashes)
    entities = [(_with_words(entity, embedded, text_encoder), webp) for entity, webp in records.entities]
    staging.finish_shard(
        number,
        StagedShard(entities=entities, rejected=records.shard.rejected, images_failed=records.images_failed),
    )


def _with_words(entity: StoredEntity, embedded: EmbeddedShard, text_encoder: TextEncoder | None) -> StoredEntity:
    """Add the most attended words of the entity's text, by the mean attention over its images."""
    if entity.row not in embedded.attention:
        return entity
    assert text_encoder is not None, "only a checkpoint gives attention"
    assert entity.text is not None, "attention is recorded only with --store-text"
    (spans_T,) = text_encoder.token_spans([entity.text])
    mean_T = np.mean(embedded.attention[entity.row], axis=0).tolist()
    return replace(entity, attended_words=find_attended_words(entity.text, spans_T, mean_T))


def find_attended_words(
    text: str, spans_T: Sequence[tuple[int, int]], weights_T: Sequence[float]
) -> tuple[tuple[int, int, float], ...]:
    """Return up to 12 words as (start, end, weight), heaviest first.

    `spans_T` are the characters of each token. A word's weight is the sum over its tokens. Tokens of punctuation and
    special tokens belong to no word.
    """
    words = [match.span() for match in _WORD.finditer(text)]
    weight_of: dict[tuple[int, int], float] = {}
    place = 0
    for (start, end), weight in sorted(zip(spans_T, weights_T, strict=True)):
        while place < len(words) and words[place][1] <= start:
            place += 1
        if start < end and place < len(words) and words[place][0] < end:
            weight_of[words[place]] = weight_of.get(words[place], 0.0) + weight
    heaviest = sorted(weight_of.items(), key=lambda item: (-item[1], item[0]))[:MAX_WORDS]
    return tuple((start, end, round(weight, 4)) for (start, end), weight in heaviest)

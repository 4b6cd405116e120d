"""Compact live changes into a new bundle: the base without its hidden rows, then the entities that were put.

Services of the old bundle keep running. Changes made after the compaction began apply to the new bundle too.

Shapes: n embeddings of a shard, M entities put, H hidden rows of the base, D embedding width.
"""

import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from tqdm import tqdm

from core.arrays import Float16Array
from core.errors import UserError
from core.files import sync
from index.build import build_index
from index.bundle import Bundle, list_files
from index.delta import Delta
from index.embeddings import Embeddings, EmbeddingShards, pooled, write_shard
from index.live import LiveSegment
from index.manifest import (
    EMBEDDINGS_FOLDER,
    ENTITY_ENCODER_FOLDER,
    INDEX_MANIFEST_FILE,
    MANIFEST_FILE,
    REMEMBERED_FOLDER,
    STORE_FILE,
    Manifest,
    RememberedEntry,
    content_fingerprint,
)
from index.store import EntityStore, StoredEntity, write_store

_SHARD_SIZE = 4096
_ROWS_AT_A_TIME = 500


def compact(bundle_path: Path, live_dir: Path, out: Path, *, progress: bool = False) -> Bundle:
    """Write the bundle with its live changes to `out`, with the same kind of index. `live_dir` then serves both.

    If the process is killed, only a folder `.OUT.partial` is left, which the next call replaces. Raise `UserError` if
    `out` exists or there are no changes, `BundleError`, `LiveDirError`.
    """
    bundle = Bundle.open(bundle_path)
    if out.exists():
        raise UserError(f"--out {out} exists already; choose a new folder")
    with bundle.store() as store:
        live = LiveSegment(live_dir, bundle, store)
        try:
            delta = live.delta
            if delta.revision <= live.base_revision:
                raise UserError(f"{live_dir} has no changes to this bundle; there is nothing to compact")
            partial = out.resolve().with_name(f".{out.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            (partial / EMBEDDINGS_FOLDER).mkdir(parents=True)
            content = _write(bundle, store, live, delta, partial, progress=progress)
            # Before the bundle appears, so that nobody serves it without its live changes.
            live.rebase(content, bundle.name, delta.revision)
        finally:
            live.close()
    os.replace(partial, out)
    sync(out.resolve().parent)
    return Bundle.open(out)


def _write(bundle: Bundle, store: EntityStore, live: LiveSegment, delta: Delta, folder: Path, *, progress: bool) -> str:
    """Write the new bundle into `folder`. Return its content fingerprint."""
    started = time.perf_counter()
    counted = {"entities": 0, "without_image": 0, "without_text": 0}

    def entities() -> Iterator[tuple[StoredEntity, bytes | None]]:
        total = len(store) - len(delta.hidden_H) + len(delta.entities)
        with tqdm(desc="entities", unit="entity", total=total, disable=not progress) as bar:
            for entity, thumbnail in _entities(store, live, delta):
                yield replace(entity, row=counted["entities"]), thumbnail
                counted["entities"] += 1
                counted["without_image"] += entity.image_count == 0
                counted["without_text"] += not entity.has_text
                bar.update()

    write_store(folder / STORE_FILE, entities(), store.types.rows())
    given = {row: each.images_ID for row, each in sorted(delta.references.items()) if row < len(store)}
    shards = _write_visible(bundle.embeddings(), delta, folder / EMBEDDINGS_FOLDER, given)
    _write_put(shards, len(store), delta, folder / EMBEDDINGS_FOLDER)
    remembered = _write_remembered(bundle, delta, folder)
    rewritten = (STORE_FILE, f"{EMBEDDINGS_FOLDER}/", f"{REMEMBERED_FOLDER}/")
    for name in bundle.manifest.files:
        if not name.startswith(rewritten):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.path / name, folder / name)
    embeddings = EmbeddingShards(folder / EMBEDDINGS_FOLDER, bundle.manifest.embedding_dim)
    old_index = bundle.index_manifest
    searched = pooled(embeddings, bundle.manifest.pooling)
    index = build_index(folder, searched, factory=old_index.factory, device="cpu", progress=progress)
    index = index.model_copy(update={"parameters": old_index.parameters, "why": old_index.why})
    index.write(folder / INDEX_MANIFEST_FILE)
    compacted = {"from": bundle.fingerprint, "generation": delta.revision}
    known = bundle.manifest.model_dump(exclude=set(bundle.manifest.model_extra or ()))
    changed = {
        "remembered": remembered,
        "counts": {**known["counts"], **counted, "embeddings": len(embeddings)},
        "export": {**known["export"], "compacted": compacted},
        "files": list_files(folder),
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "elapsed_s": round(time.perf_counter() - started, 3),
    }
    manifest = Manifest.model_validate({**known, **changed})
    if (bundle.path / ENTITY_ENCODER_FOLDER).is_dir():
        shutil.copytree(bundle.path / ENTITY_ENCODER_FOLDER, folder / ENTITY_ENCODER_FOLDER)
    for file in (*folder.rglob("*"), folder):
        sync(file)
    manifest.write(folder / MANIFEST_FILE)
    return content_fingerprint(manifest)


def _entities(store: EntityStore, live: LiveSegment, delta: Delta) -> Iterator[tuple[StoredEntity, bytes | None]]:
    """Yield the visible entities with their thumbnails: those of the base in row order, then those put."""
    for start in range(0, len(store), _ROWS_AT_A_TIME):
        rows = np.setdiff1d(np.arange(start, min(start + _ROWS_AT_A_TIME, len(store))), delta.gone_H).tolist()
        thumbnails = store.thumbnails(rows)
        for entity in store.by_rows(rows):
            words = store.attended_words(entity.row)
            current = delta.entities.get(entity.row, entity)
            yield replace(current, attended_words=words), thumbnails.get(entity.row)
    for row in _put_rows(delta, len(store)):
        yield delta.entities[row], live.thumbnail(row)


def _put_rows(delta: Delta, base_count: int) -> list[int]:
    return sorted(row for row in delta.entities if row >= base_count)


def _write_visible(base: Embeddings, delta: Delta, folder: Path, given: Mapping[int, Float16Array]) -> int:
    """Write the vectors of visible rows, or those `given` for a row, in row order. Return the number of shards."""
    position = shards = 0
    given_G = np.array(list(given), np.int64)
    hidden_H = np.union1d(delta.gone_H, given_G)
    # A given row is written before the first row of the next part, because its own may continue there.
    next_rows = np.append(base.rows_N, np.iinfo(np.int64).max)[base.starts[1:]]
    for vectors_nD, own_G in zip(base, np.split(given_G, np.searchsorted(given_G, next_rows))[:-1], strict=True):
        rows_n = base.rows_N[position : position + len(vectors_nD)]
        position += len(vectors_nD)
        visible_n, own = ~np.isin(rows_n, hidden_H), [given[row] for row in own_G.tolist()]
        written_nD = np.concatenate([vectors_nD[visible_n].astype(np.float16), *own])
        rows_n = np.concatenate([rows_n[visible_n], np.repeat(own_G, [len(each) for each in own])])
        if len(rows_n):
            order_n = np.argsort(rows_n, kind="stable")
            # Each row moves up by the rows before it that are gone.
            moved_n = rows_n[order_n] - np.searchsorted(delta.gone_H, rows_n[order_n])
            write_shard(folder, shards, moved_n, written_nD[order_n])
            shards += 1
    return shards


def _write_put(shards: int, base_count: int, delta: Delta, folder: Path) -> None:
    """Write the embeddings of the entities that were put, after that many shards."""
    rows = _put_rows(delta, base_count)
    first_row = base_count - len(delta.gone_H)
    for number, start in enumerate(range(0, len(rows), _SHARD_SIZE), shards):
        images = [delta.references[row].images_ID for row in rows[start : start + _SHARD_SIZE]]
        rows_n = np.repeat(first_row + start + np.arange(len(images)), [len(each) for each in images])
        write_shard(folder, number, rows_n, np.concatenate(images))


def _write_remembered(bundle: Bundle, delta: Delta, folder: Path) -> RememberedEntry | None:
    """Write the remembered vectors of visible rows. Return their entry for the manifest."""
    entry, vectors = bundle.manifest.remembered, bundle.remembered_vectors()
    if entry is None or vectors is None:
        return None
    visible = len(vectors) - int(np.isin(vectors.rows_N, delta.gone_H).sum())
    if not visible:
        return None
    (folder / REMEMBERED_FOLDER).mkdir()
    _write_visible(vectors, delta, folder / REMEMBERED_FOLDER, {})
    return entry.model_copy(update={"entities": visible})

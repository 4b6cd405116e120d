"""Catalogs in any of their formats, streamed as entity records. The format is told by the file's content."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, cast

from catalog.records import BadRecord, EntityRecord, from_encyclopedic_vqa, from_native, from_oven
from catalog.seen import SeenIds
from core.errors import CatalogError
from core.jsonl import Rejected, read_jsonl

_PARQUET_BATCH_ROWS = 1024
_BLOCK_BYTES = 1 << 20
# Encyclopedic-VQA's knowledge base is one object whose keys are URLs; a JSONL record's first key never is one.
_URL_KEYED_OBJECT = re.compile(rb'\s*\{\s*"https?:')


def read_catalog(path: Path, image_root: Path | None = None) -> Iterator[EntityRecord | Rejected]:
    """Yield the entity records of a catalog in order, and a `Rejected` for each record that is none.

    Formats: JSONL (`.jsonl`, `.jsonl.gz`) in the project's own form or OVEN's Wiki6M, Parquet, and Encyclopedic-VQA's
    `encyclopedic_kb_wiki.json` (also gzipped). None is held in memory as a whole. Relative image paths are taken from
    the catalog's folder; `image_root` is where OVEN's `wikipedia_images_full` lies. For Parquet and for
    Encyclopedic-VQA `Rejected.line` counts records. Raises `CatalogError` for a file that cannot be read at all.
    """
    with SeenIds() as seen:
        for item in _rows(path, image_root):
            if isinstance(item, Rejected):
                yield item
                continue
            line, row, convert = item
            try:
                record = replace(convert(row), line=line)
                if not seen.add(record.entity_id):
                    raise BadRecord(f"entity_id {record.entity_id!r} stands in an earlier record")
            except BadRecord as error:
                yield Rejected(line=line, reason=str(error), record=_excerpt(row))
                continue
            yield record


def count_hint(path: Path) -> int | None:
    """About how many records a catalog has, bad ones included: lines, or rows of Parquet. None where reading it as a
    whole is the only way to know. Raises `CatalogError`.
    """
    head = _head(path)
    if head.startswith(b"PAR1"):
        import pyarrow.parquet

        return int(pyarrow.parquet.read_metadata(path).num_rows)
    if _URL_KEYED_OBJECT.match(head):
        return None
    try:
        with _open(path) as file:
            return sum(block.count(b"\n") for block in iter(lambda: file.read(_BLOCK_BYTES), b""))
    except (OSError, EOFError) as error:
        raise CatalogError(f"{path} cannot be read to its end: {error}") from error


def _rows(path: Path, image_root: Path | None) -> Iterator[tuple[int, Any, Callable[[Any], EntityRecord]] | Rejected]:
    folder = path.parent
    head = _head(path)
    if head.startswith(b"PAR1"):
        for number, row in enumerate(_parquet_rows(path), start=1):
            yield number, row, lambda row: from_native(row, folder)
    elif _URL_KEYED_OBJECT.match(head):
        for number, entry in enumerate(_url_keyed_entries(path), start=1):
            yield number, entry, lambda entry: from_encyclopedic_vqa(*entry)
    else:
        for item in read_jsonl(path):
            if isinstance(item, Rejected):
                yield item
            elif "wikidata_id" in item[1] and "entity_id" not in item[1]:
                yield *item, lambda row: from_oven(row, image_root)
            else:
                yield *item, lambda row: from_native(row, folder)


def _head(path: Path) -> bytes:
    try:
        with _open(path) as file:
            return file.read(4096)
    except FileNotFoundError:
        raise CatalogError(f"{path} does not exist; check the path") from None
    except (OSError, EOFError) as error:
        raise CatalogError(f"{path} cannot be read: {error}") from error


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_PARQUET_BATCH_ROWS):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise CatalogError(f"{path} cannot be read as Parquet: {error}") from error


def _url_keyed_entries(path: Path) -> Iterator[tuple[str, Any]]:
    import ijson

    try:
        with _open(path) as file:
            yield from ijson.kvitems(file, "", use_float=True)
    except (ijson.JSONError, OSError, EOFError) as error:
        raise CatalogError(f"{path} cannot be read to its end as JSON: {error}") from error


def _excerpt(row: Any) -> str:
    return json.dumps(row, ensure_ascii=True, default=str)[:500]

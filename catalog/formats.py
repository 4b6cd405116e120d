"""Catalog files: read any supported format as a stream of records, and write JSONL or Parquet."""

from __future__ import annotations

import gzip
import json
import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, cast

from catalog.records import (
    CREDIT_FIELDS,
    BadRecord,
    EntityRecord,
    from_encyclopedic_vqa,
    from_native,
    from_oven,
    to_native,
)
from core.errors import CatalogError, UserError
from core.files import atomic_write, atomic_write_bytes
from core.lines import Rejected, excerpt, read_jsonl

_PARQUET_BATCH_ROWS = 1024
_BLOCK_BYTES = 1 << 20
_SEEN_CACHE_KIB = 16 * 1024
_MAX_DEPTH = 100  # ijson's memory grows with the square of the depth: 100,000 levels take 25 GB
# Encyclopedic-VQA's knowledge base is one object whose keys are URLs. The first key of a JSONL record never is one.
_URL_KEYED_OBJECT = re.compile(rb'\s*\{\s*"https?:')


def read_catalog(path: Path, image_root: Path | None = None) -> Iterator[EntityRecord | Rejected]:
    """Yield the records of a catalog in order, with a `Rejected` in place of each bad or repeated record.

    The format is detected by content: JSONL (also gzipped) in the project's own form or OVEN's Wiki6M, Parquet, or
    Encyclopedic-VQA's `encyclopedic_kb_wiki.json` (also gzipped). All are streamed. Relative image paths refer to the
    catalog's folder. `image_root` contains OVEN's `wikipedia_images_full`. For Parquet and Encyclopedic-VQA, `line`
    counts records. Raises `CatalogError` if the file cannot be read.
    """
    with closing(SeenIds()) as seen:
        for item in _rows(path, image_root):
            if isinstance(item, Rejected):
                yield item
                continue
            line, row, convert = item
            try:
                record = replace(convert(row), line=line)
                if not seen.add(record.entity_id):
                    raise BadRecord(f"entity_id {record.entity_id!r} repeats an earlier record")
            except BadRecord as error:
                yield Rejected(line=line, reason=str(error), record=excerpt(row))
                continue
            yield record


def types_path(catalog: Path) -> Path:
    """Return where `wikiclip catalog` writes the parents of a catalog's types."""
    return catalog.with_name(f"{catalog.name}.types.jsonl")


def copy_types(catalog: Path, out: Path) -> None:
    """Copy the parents of types for another catalog with the same types, if there are any."""
    if (types := types_path(catalog)).is_file():
        atomic_write_bytes(types_path(out), types.read_bytes())


class SeenIds:
    """A set of entity ids in a temporary SQLite database. Six million ids as a Python set would take gigabytes."""

    def __init__(self) -> None:
        # Without a name, SQLite creates a private temporary file, spills to it only when the cache is full, and the
        # file vanishes with the process. Generators may resume on another thread, but never on two at once.
        self._connection = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._connection.executescript(
            f"PRAGMA cache_size = -{_SEEN_CACHE_KIB}; PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;"
            "CREATE TABLE seen (entity_id TEXT PRIMARY KEY) WITHOUT ROWID; BEGIN;"
        )

    def add(self, entity_id: str) -> bool:
        """Add an id. Returns whether it is new."""
        return self._connection.execute("INSERT OR IGNORE INTO seen VALUES (?)", (entity_id,)).rowcount == 1

    def close(self) -> None:
        self._connection.close()


def count_hint(path: Path) -> int | None:
    """Return about how many records a catalog has, or None if only parsing all of it can tell. Raises `CatalogError`.

    Counts rows of Parquet, lines of JSONL, bad records included.
    """
    head = _head(path)
    if head.startswith(b"PAR1"):
        import pyarrow.parquet

        return int(pyarrow.parquet.read_metadata(path).num_rows)
    if _URL_KEYED_OBJECT.match(head):
        return None
    with _open(path) as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(_BLOCK_BYTES), b""))


def _rows(path: Path, image_root: Path | None) -> Iterator[tuple[int, Any, Callable[[Any], EntityRecord]] | Rejected]:
    """Yield line number, row and converter of each row."""
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
    with _open(path) as file:
        return file.read(4096)


@contextmanager
def _open(path: Path, format_error: type[Exception] = EOFError) -> Iterator[BinaryIO]:
    """Open a file, decompressed if its name ends in .gz. Raises `CatalogError` for any error while it is read."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield cast(BinaryIO, file)
    except FileNotFoundError:
        raise CatalogError(f"{path} does not exist; check the path") from None
    except (OSError, EOFError, format_error) as error:
        raise CatalogError(f"{path} cannot be read to its end: {error}") from error


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    with _open(path, pyarrow.ArrowException) as file, pyarrow.parquet.ParquetFile(file) as rows:
        for batch in rows.iter_batches(batch_size=_PARQUET_BATCH_ROWS):
            yield from batch.to_pylist()


def _url_keyed_entries(path: Path) -> Iterator[tuple[str, Any]]:
    import ijson

    def limited(events: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        depth = 0
        for event in events:
            depth += (event[0] in ("start_map", "start_array")) - (event[0] in ("end_map", "end_array"))
            if depth > _MAX_DEPTH:
                raise ijson.JSONError(f"it is nested over {_MAX_DEPTH} levels deep")
            yield event

    with _open(path, ijson.JSONError) as file:
        yield from ijson.kvitems(ijson.parse(limited(ijson.basic_parse(file, use_float=True))), "")


def check_catalog_name(path: Path) -> None:
    """Raise `UserError` if a path cannot be that of a new catalog."""
    if not path.name.endswith((".jsonl", ".jsonl.gz", ".parquet")):
        raise UserError(f"--out {path} must end in .jsonl, .jsonl.gz or .parquet")
    if not path.resolve().parent.is_dir():
        raise UserError(f"the folder of --out {path} does not exist; make it")


def write_catalog(path: Path, records: Iterable[EntityRecord]) -> None:
    """Write records in the format of the file's name. The same records give the same bytes.

    The file appears complete at the end.
    """
    write_rows(path, map(to_native, records))


def write_rows(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    """Write rows of the project's own format as `write_catalog` does. Parquet has only the columns of a record."""
    with atomic_write(path) as temporary:
        if path.suffix == ".parquet":
            _write_parquet(temporary, rows)
            return
        lines = (json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
        with temporary.open("wb") as file:
            if path.suffix == ".gz":
                with gzip.GzipFile("", "wb", compresslevel=6, fileobj=file, mtime=0) as compressed:
                    compressed.writelines(lines)
            else:
                file.writelines(lines)


def _write_parquet(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    text = pyarrow.string()
    other_types = {
        "images": pyarrow.list_(text),
        "types": pyarrow.list_(text),
        "titles": pyarrow.map_(text, text),
        "image_credits": pyarrow.list_(pyarrow.struct(dict.fromkeys(CREDIT_FIELDS, text))),
    }
    columns = ("entity_id", "title", "text", "images", "url", "types", "titles", "symbol", "description")
    schema = pyarrow.schema({name: other_types.get(name, text) for name in (*columns, "image_credits")})
    rows = ({**row, "titles": list(row.get("titles", {}).items())} for row in rows)
    with pyarrow.parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        while batch := list(islice(rows, _PARQUET_BATCH_ROWS)):
            writer.write_batch(pyarrow.RecordBatch.from_pylist(batch, schema))

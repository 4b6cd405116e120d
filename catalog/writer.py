"""Catalogs out, in the project's own format: JSONL, gzipped JSONL or Parquet, by the name of the file."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from catalog.records import EntityRecord
from core.errors import UserError
from core.files import atomic_write

_PARQUET_BATCH_ROWS = 1024


def to_native(record: EntityRecord) -> dict[str, Any]:
    """A record as a row of the project's own format."""
    return {
        "entity_id": record.entity_id,
        "title": record.title,
        "text": record.text,
        "images": list(record.images),
        "url": record.url,
        "types": list(record.types),
        "titles": dict(record.titles),
        "symbol": record.symbol,
        "description": record.description,
    }


def check_catalog_name(path: Path) -> None:
    """Raise `UserError` if no format of a catalog has such a name."""
    if not path.name.endswith((".jsonl", ".jsonl.gz", ".parquet")):
        raise UserError(f"--out {path} must end in .jsonl, .jsonl.gz or .parquet")


@contextmanager
def catalog_writer(path: Path) -> Iterator[Callable[[EntityRecord], None]]:
    """Yield what writes one record after another. The file appears whole at the end; the same records, the same bytes.

    Raises `UserError` for a name of no known format.
    """
    check_catalog_name(path)
    with atomic_write(path) as temporary:
        if path.name.endswith(".parquet"):
            with _parquet_writer(temporary) as write:
                yield write
            return
        with temporary.open("wb") as file:
            if path.name.endswith(".gz"):
                with gzip.GzipFile("", "wb", compresslevel=6, fileobj=file, mtime=0) as compressed:
                    yield lambda record: _ignore(compressed.write(_line(record)))
            else:
                yield lambda record: _ignore(file.write(_line(record)))


def _line(record: EntityRecord) -> bytes:
    return json.dumps(to_native(record), ensure_ascii=False).encode() + b"\n"


def _ignore(count: int) -> None:
    """Files say how much they wrote; a buffered one always writes all."""


@contextmanager
def _parquet_writer(path: Path) -> Iterator[Callable[[EntityRecord], None]]:
    import pyarrow
    import pyarrow.parquet

    text = pyarrow.string()
    schema = pyarrow.schema(
        {
            "entity_id": text,
            "title": text,
            "text": text,
            "images": pyarrow.list_(text),
            "url": text,
            "types": pyarrow.list_(text),
            "titles": pyarrow.map_(text, text),
            "symbol": text,
            "description": text,
        }
    )
    rows: list[dict[str, Any]] = []
    with pyarrow.parquet.ParquetWriter(path, schema, compression="zstd") as writer:

        def flush() -> None:
            writer.write_batch(pyarrow.RecordBatch.from_pylist(rows, schema))
            rows.clear()

        def write(record: EntityRecord) -> None:
            row = to_native(record)
            rows.append({**row, "titles": list(row["titles"].items())})
            if len(rows) == _PARQUET_BATCH_ROWS:
                flush()

        yield write
        if rows:
            flush()

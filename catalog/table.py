"""Read a table of pictures: a CSV file with a row for each picture (`wikiclip catalog --folder --table`)."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from core.errors import CatalogError
from core.lines import Rejected, excerpt

ENTITY_COLUMNS = ("text", "description", "types", "url", "symbol")
COLUMNS = ("image", "title", "entity_id", *ENTITY_COLUMNS)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row: its line in the file, and its cells by column. Cells that are not there are empty."""

    line: int
    cells: dict[str, str]


def read_table(path: Path) -> Iterator[Row | Rejected]:
    """Yield the rows of a table in UTF-8 with commas, semicolons or tabs, without empty rows.

    Raises `CatalogError` if the file cannot be read, or its first line lacks a column or has an unknown one.
    """
    try:
        content = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise CatalogError(f"{path} cannot be read: {error.strerror}; name a CSV file with --table") from error
    except UnicodeDecodeError:
        raise CatalogError(f"{path} is not UTF-8; save it again as CSV with that encoding") from None
    header = content.partition("\n")[0].strip()
    delimiter = max(",;\t", key=header.count)
    reader = csv.DictReader(io.StringIO(content, newline=""), delimiter=delimiter, restkey="", restval="")
    names = [name.strip() for name in reader.fieldnames or ()]
    if missing := [name for name in ("image", "title") if name not in names]:
        raise CatalogError(f"{path} has no column {' and no column '.join(missing)}; its first line reads {header!r}")
    if unknown := [name for name in names if name not in COLUMNS]:
        raise CatalogError(
            f"{path} has an unknown column {unknown[0]!r}; rename it to one of {', '.join(COLUMNS)}, or remove it"
        )
    reader.fieldnames = names
    try:
        for row in reader:
            if "" in row:
                reason = "row with more cells than the first line: quote commas in texts"
                yield Rejected(line=reader.line_num, reason=reason, record=excerpt(row))
                continue
            cells = {name: value.strip() for name, value in row.items()}
            if any(cells.values()):
                yield Row(line=reader.line_num, cells=cells)
    except csv.Error as error:
        raise CatalogError(f"line {reader.line_num} of {path} is not CSV: {error}; save it again as CSV") from error

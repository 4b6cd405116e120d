"""Read the parents of types, which `wikiclip catalog` writes or a user gives (`wikiclip export --type-parents`)."""

from __future__ import annotations

from pathlib import Path

from catalog.records import BadRecord, optional_string, required_string, strings
from core.lines import Rejected, excerpt, read_jsonl
from index.types import TypeHierarchy, TypeParents


def read_type_parents(path: Path | None) -> tuple[list[TypeParents], list[Rejected]]:
    """Return one row per type, with the parents of all its lines, and the lines that were rejected.

    Raises `CatalogError` if the file cannot be read.
    """
    rows: list[TypeParents] = []
    rejected: list[Rejected] = []
    for item in () if path is None else read_jsonl(path):
        if isinstance(item, Rejected):
            line, reason, record = item.line, item.reason, item.record
        else:
            line, row = item
            try:
                if row.get("parents") is None:
                    raise BadRecord("`parents` is missing")
                type_, label = required_string(row, "type"), optional_string(row, "label") or ""
                rows.append(TypeParents(type=type_, parents=strings(row, "parents"), label=label))
                continue
            except BadRecord as error:
                reason, record = str(error), excerpt(row)
        assert path is not None
        rejected.append(Rejected(line=line, reason=f"{path.name}: {reason}", record=record))
    return TypeHierarchy(rows).rows(), rejected

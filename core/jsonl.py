"""Read JSON Lines, and log the records that had to be skipped."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.lines import LINE_TOO_LONG, MAX_LINE_BYTES, read_lines


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """A skipped record: its 1-based line number, the reason, and its first 500 characters."""

    line: int
    reason: str
    record: str


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]] | Rejected]:
    """Yield `(line_number, object)` for each line of a file, which may be compressed. Skip blank lines.

    Yields `Rejected` for a line that is not a JSON object, nests too deeply or is over `MAX_LINE_BYTES`. Raises
    `CatalogError` as `read_lines` does.
    """
    for raw, position in read_lines(path):
        if len(raw) > MAX_LINE_BYTES:
            yield Rejected(line=position.line, reason=LINE_TOO_LONG, record=excerpt(raw))
        elif raw.strip():
            yield _parse(position.line, raw)


def _parse(line_number: int, raw: bytes) -> tuple[int, dict[str, Any]] | Rejected:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        return Rejected(line=line_number, reason=f"not JSON: {error}", record=excerpt(raw))
    if not isinstance(value, dict):
        return Rejected(
            line=line_number, reason=f"expected a JSON object, got {type(value).__name__}", record=excerpt(raw)
        )
    return line_number, value


def to_jsonl(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Return rows as JSON Lines in UTF-8."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def excerpt(record: object) -> str:
    """Return the beginning of a record, for `Rejected.record`: of a line as it is, of a parsed one as JSON."""
    if isinstance(record, bytes):
        return record[:2000].decode("utf-8", "replace").strip()[:500]
    try:
        return json.dumps(record, default=str)[:500]
    except RecursionError:
        return "(nested too deeply to be shown)"


class RejectLog:
    """Count rejected records and write them to a JSONL file, which is created at the first one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0
        path.unlink(missing_ok=True)

    def add(self, rejected: Rejected) -> None:
        self.count += 1
        row = {"line": rejected.line, "reason": rejected.reason, "record": rejected.record}
        with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:  # for lone surrogates
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def rejects_path(out: Path) -> Path:
    """Return the path of the reject log next to an output."""
    return out.resolve().parent / "rejected.jsonl"

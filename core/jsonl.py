"""Read JSON Lines, and log the records that had to be skipped."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import CatalogError


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """A skipped record: its 1-based line number, the reason, and its first 500 characters."""

    line: int
    reason: str
    record: str


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]] | Rejected]:
    """Yield `(line_number, object)` for each line of a `.jsonl` or `.jsonl.gz` file.

    Yields `Rejected` for a line that is not a JSON object. Skips blank lines.

    Raises `CatalogError` if the file is missing, truncated, or not in gzip format although its name says so.
    """
    line_number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for line_number, raw in enumerate(file, start=1):
                if raw.strip():
                    yield _parse(line_number, raw)
    except FileNotFoundError:
        raise CatalogError(f"{path} does not exist; check the path") from None
    except (OSError, EOFError) as error:
        raise CatalogError(f"{path} cannot be read after line {line_number}: {error}") from error


def _parse(line_number: int, raw: bytes) -> tuple[int, dict[str, Any]] | Rejected:
    try:
        value = json.loads(raw)
    except ValueError as error:
        return Rejected(line=line_number, reason=f"not JSON: {error}", record=_excerpt(raw))
    if not isinstance(value, dict):
        return Rejected(
            line=line_number, reason=f"expected a JSON object, got {type(value).__name__}", record=_excerpt(raw)
        )
    return line_number, value


def _excerpt(raw: bytes) -> str:
    return raw[:2000].decode("utf-8", "replace").strip()[:500]


class RejectLog:
    """Count rejected records and write them to a JSONL file, which is created at the first one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0
        path.unlink(missing_ok=True)

    def add(self, rejected: Rejected) -> None:
        self.count += 1
        row = {"line": rejected.line, "reason": rejected.reason, "record": rejected.record}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def summary(self) -> str:
        """Return one line for the end of a command, or an empty string if nothing was rejected."""
        return f"{self.count} record(s) rejected, see {self.path}" if self.count else ""

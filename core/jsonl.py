"""JSON Lines in, and a log of what had to be rejected out."""

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
    """A record that is skipped: where it stood (1-based line), why, and what it was (its first 500 characters)."""

    line: int
    reason: str
    record: str


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]] | Rejected]:
    """Yield `(line_number, object)` for each line of a `.jsonl` or `.jsonl.gz` file, or `Rejected`.

    Rejected is a line that is no JSON object; blank lines are skipped.
    Raises `CatalogError` if the file is missing, is no gzip, or ends in mid-stream.
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
            line=line_number, reason=f"a JSON object is wanted, this is {type(value).__name__}", record=_excerpt(raw)
        )
    return line_number, value


def _excerpt(raw: bytes) -> str:
    return raw[:2000].decode("utf-8", "replace").strip()[:500]


class RejectLog:
    """Writes rejected records to a JSONL file and counts them. The file exists only if something was rejected."""

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
        """One line for the end of a command, empty when nothing was rejected."""
        return f"{self.count} record(s) rejected, see {self.path}" if self.count else ""

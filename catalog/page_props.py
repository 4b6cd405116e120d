"""Page images from MediaWiki's `page_props` table, as `WIKI-DATE-page_props.sql.gz` holds it.

The PageImages extension notes each article's best image there: `page_image_free`, and `page_image` where a better one
is not free. https://www.mediawiki.org/wiki/Manual:Page_props_table
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from catalog.compressed import START, Position, read_lines
from core.errors import CatalogError

# Quotes within a string are escaped, so this matches nothing inside of one.
_ROW = re.compile(rb"\((\d+),'(page_image|page_image_free)','((?:[^'\\]|\\.)*)'[,)]", re.DOTALL)
_ESCAPED = re.compile(rb"\\(.)", re.DOTALL)
_SPECIAL = {b"0": b"\0", b"n": b"\n", b"r": b"\r", b"t": b"\t", b"Z": b"\x1a"}
_DATABASE = re.compile(rb"^-- Host:.*Database: *(\w+)", re.MULTILINE)
_HEAD_LINES = 100


@dataclass(frozen=True, kw_only=True)
class PageImage:
    """The best image of a page: a file's name without `File:`, and whether it may be used freely."""

    page_id: int
    file: str
    free: bool


def read_page_images(
    path: Path, start: Position = START, on_bytes: Callable[[int], object] = lambda count: None
) -> Iterator[tuple[list[PageImage], Position]]:
    """Yield the page images of each line of the dump with the position after it. Raises `CatalogError`."""
    for line, position in read_lines(path, start, on_bytes):
        images = [
            PageImage(page_id=int(page_id), file=name, free=prop == b"page_image_free")
            for page_id, prop, value in _ROW.findall(line)
            if (name := _unescaped(value).decode("utf-8", "replace"))
        ]
        yield images, position


def wiki_of(path: Path) -> str:
    """The wiki a dump belongs to, as `enwiki`, from its head. Raises `CatalogError` if it is no dump of page_props."""
    head = b""
    for line, position in read_lines(path):
        head += line[:500]
        if position.line >= _HEAD_LINES or line.startswith(b"INSERT"):
            break
    database = _DATABASE.search(head)
    if database is None or b"`page_props`" not in head:
        raise CatalogError(f"{path} is no page_props dump; give WIKI-DATE-page_props.sql.gz as Wikimedia publishes it")
    return database[1].decode()


def file_url(site: str, file: str, width_px: int) -> str:
    """Where a wiki redirects to one of its files, local or of Commons, `width_px` wide (0: as it was uploaded)."""
    width = f"?width={width_px}" if width_px else ""
    return f"{site}/wiki/Special:FilePath/{quote(file.replace(' ', '_'), safe='')}{width}"


def _unescaped(value: bytes) -> bytes:
    return _ESCAPED.sub(lambda match: _SPECIAL.get(match[1], match[1]), value)

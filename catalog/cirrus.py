"""Wikimedia's CirrusSearch dumps: the documents of a wiki's search index.

Published weekly as `WIKI_content-DATE-NNNNN.json.bz2` (before 2026 as one `WIKI-DATE-cirrussearch-content.json.gz`):
Elasticsearch's bulk format, an action line `{"index": {"_id": PAGE_ID}}` before each document. Fields:
https://www.mediawiki.org/wiki/Extension:CirrusSearch/Schema
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import orjson

from catalog.compressed import START, Position, read_lines
from catalog.records import BadRecord

_ITEM = re.compile(r"Q([1-9]\d{0,17})")
_WIKIPEDIA = re.compile(r"([a-z][a-z0-9_]*)wiki")
_HAS_OWN_SITE = {"commons", "mediawiki", "meta", "outreach", "sources", "species", "wikidata", "wikifunctions"}


@dataclass(frozen=True, kw_only=True)
class Page:
    """What a catalog needs of an article. `item` is the number of its Wikidata item: 42 is Q42."""

    item: int
    wiki: str
    page_id: int
    title: str
    url: str
    text: str


@dataclass(frozen=True, kw_only=True)
class PageFilter:
    """Which articles are taken: of one language (None: any), with at least `min_links` links to them."""

    language: str | None = None
    min_links: int = 0


class LeftOut(Exception):
    """A document that is whole but not wanted; its message is the reason, the same for all of its kind."""


def read_documents(
    path: Path, start: Position = START, on_bytes: Callable[[int], object] = lambda count: None
) -> Iterator[tuple[int | None, bytes, Position]]:
    """Yield each document's page id (None without an action line), its line, and the position after it.

    Raises `CatalogError`.
    """
    page_id: int | None = None
    for line, position in read_lines(path, start, on_bytes):
        if line.startswith(b'{"index"'):
            page_id = _page_id(line)
        elif line.strip():
            yield page_id, line, position
            page_id = None


def parse_document(line: bytes) -> dict[str, Any]:
    """The document of a line. Raises `BadRecord`."""
    try:
        document = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise BadRecord(f"not JSON: {error}") from None
    if not isinstance(document, dict):
        raise BadRecord(f"expected a JSON object, got {type(document).__name__}")
    return document


def page_of(document: Mapping[str, Any], page_id: int | None, wanted: PageFilter, max_text: int) -> Page:
    """The article of a document, its text cut to `max_text` characters. Raises `LeftOut` or `BadRecord`."""
    if document.get("namespace") != 0:
        raise LeftOut("not in the article namespace")
    if wanted.language is not None and document.get("language") != wanted.language:
        raise LeftOut(f"the language is not {wanted.language}")
    item = _ITEM.fullmatch(str(document.get("wikibase_item") or ""))
    if item is None:
        raise LeftOut("no Wikidata item")
    links = document.get("incoming_links") or 0
    if not isinstance(links, int):
        raise BadRecord("`incoming_links` must be a whole number")
    if links < wanted.min_links:
        raise LeftOut(f"fewer than {wanted.min_links} links to it")
    if page_id is None:
        page_id = document.get("page_id")
    if not isinstance(page_id, int):
        raise BadRecord("the page id is missing: no action line stands before the document")
    title, wiki = _text(document, "title"), _text(document, "wiki")
    if not title or not wiki:
        raise BadRecord("`title` and `wiki` are needed")
    return Page(
        item=int(item[1]),
        wiki=wiki,
        page_id=page_id,
        title=title,
        url=f"{site_of(wiki)}/wiki/{quote(title.replace(' ', '_'), safe='/:(),!;@$*~')}",
        text=_article_text(document)[:max_text],
    )


def site_of(wiki: str) -> str:
    """The address of a Wikipedia by its database name, as `enwiki`. Raises `BadRecord` for another project's."""
    code = _WIKIPEDIA.fullmatch(wiki)
    if code is None or code[1] in _HAS_OWN_SITE:
        raise BadRecord(f"{wiki} is no Wikipedia")
    return f"https://{code[1].replace('_', '-')}.wikipedia.org"


def _article_text(document: Mapping[str, Any]) -> str:
    opening, text = _text(document, "opening_text"), _text(document, "text")
    # The whole text begins with the opening, but for what stands before it: hatnotes, captions.
    return text if not opening or text.startswith(opening) else f"{opening}\n{text}"


def _text(document: Mapping[str, Any], key: str) -> str:
    value = document.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRecord(f"`{key}` must be a string, it is {type(value).__name__}")
    return value


def _page_id(line: bytes) -> int | None:
    try:
        return int(orjson.loads(line)["index"]["_id"])
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError):
        return None  # what follows is rejected with that reason, where it does not name its page itself

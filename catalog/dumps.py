"""Read Wikimedia's dumps: articles, page images and items.

CirrusSearch dumps, published weekly as `WIKI_content-DATE-NNNNN.json.bz2` (before 2026 as one
`WIKI-DATE-cirrussearch-content.json.gz`), contain the search index in Elasticsearch's bulk format: an action line
`{"index": {"_id": PAGE_ID}}` before each document. https://www.mediawiki.org/wiki/Extension:CirrusSearch/Schema

Page images come from MediaWiki's `page_props` table, dumped as `WIKI-DATE-page_props.sql.gz`. The PageImages extension
stores each article's best image there as `page_image_free`, and as `page_image` if a better one is not free.
https://www.mediawiki.org/wiki/Manual:Page_props_table

Items come from Wikidata's JSON dump, `latest-all.json.bz2` or `.gz`: an array with one entity per line. Empty objects
are written as empty lists. https://doc.wikimedia.org/Wikibase/master/php/docs_topics_json.html
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import quote

from catalog.records import BadRecord, optional_string, parse_object
from core.errors import CatalogError
from core.lines import LINE_TOO_LONG, MAX_LINE_BYTES, OnBytes, Position, read_lines

_DUMPS = {  # with how each begins, by the option that takes it; None: no option does
    "--content": ("a CirrusSearch dump", re.compile(rb'\{"index": *\{')),
    "--wikidata": ("a Wikidata dump", re.compile(rb'\{("id": *"[QPL]\d+", *)?"type": *"(item|property|lexeme)"')),
    "--page-props": ("a page_props dump", re.compile(rb"CREATE TABLE `page_props`")),
    None: ("a dump that no option takes", re.compile(rb"<mediawiki |CREATE TABLE `")),
}
_ITEM = re.compile(r"Q([1-9]\d{0,17})")
_ACTION = re.compile(rb'\{"index":.*"_id":\s*"?(\d{1,18})\b')  # up to SQLite's integers
_WIKIPEDIA = re.compile(r"([a-z][a-z0-9_]*)wiki")
_OTHER_PROJECTS = {"commons", "mediawiki", "meta", "outreach", "sources", "species", "wikidata", "wikifunctions"}
# Quotes within a string are escaped, so this cannot match inside a string.
_PAGE_IMAGE = re.compile(rb"\((\d{1,18}),'(page_image|page_image_free)','((?:[^'\\]|\\.)*)'[,)]", re.DOTALL)
_ESCAPED = re.compile(rb"\\(.)", re.DOTALL)
_SPECIAL = {b"0": b"\0", b"n": b"\n", b"r": b"\r", b"t": b"\t", b"Z": b"\x1a"}
_DATABASE = re.compile(rb"^-- Host:.*Database: *(\w+)", re.MULTILINE)
_HEAD_LINES = 100
INSTANCE_OF, SUBCLASS_OF, PARENT_TAXON, IMAGE = "P31", "P279", "P171", "P18"
ALL_LANGUAGES = "mul"  # the fallback for languages without a label
_ID = re.compile(rb'"id":\s*"Q(\d{1,18})"')
# In the line of an item that has superclasses, and whose label may name a type.
CLASS_CLAIMS = tuple(f'"{each}"'.encode() for each in (SUBCLASS_OF, PARENT_TAXON))


def check_kind(path: Path, option: str) -> None:
    """Raise `CatalogError` if a file is known to be another dump than the option takes."""
    for line, _ in islice(read_lines(path), _HEAD_LINES):
        for wanted_by, (kind, beginning) in _DUMPS.items():
            if beginning.match(line):
                if wanted_by == option:
                    return
                advice = f"give it as {wanted_by}" if wanted_by else f"{option} takes {_DUMPS[option][0]}"
                raise CatalogError(f"{path} is {kind}, which {option} cannot read; {advice}")


@dataclass(frozen=True, kw_only=True)
class Page:
    """The parts of an article that a catalog uses. `item` is the number of its Wikidata item: 42 is Q42."""

    item: int
    wiki: str
    page_id: int
    title: str
    url: str
    text: str


class LeftOut(Exception):
    """A valid document that the filters exclude. The message is the reason, which is counted."""


def read_documents(
    path: Path, start: Position, on_bytes: OnBytes
) -> Iterator[tuple[tuple[int | None, bytes], Position]]:
    """Yield each document's page id (None without an action line) and line, with the position after it.

    Raises `CatalogError`.
    """
    page_id: int | None = None
    for line, position in read_lines(path, start, on_bytes):
        if line.startswith(b'{"index":'):
            action = _ACTION.match(line)
            page_id = None if action is None else int(action[1])
        elif line.strip():
            yield (page_id, line), position
            page_id = None


def parse_page(line: bytes, page_id: int | None, *, language: str | None, min_links: int, max_text: int) -> Page:
    """Parse an article, its text cut to `max_text` characters. Raises `BadRecord`.

    Raises `LeftOut` if it is not in `language` (None: any) or has fewer than `min_links` incoming links.
    """
    document = parse_object(line)
    if document.get("namespace") != 0:
        raise LeftOut("not in the article namespace")
    if language is not None and document.get("language") != language:
        raise LeftOut(f"the language is not {language}")
    item = _ITEM.fullmatch(str(document.get("wikibase_item") or ""))
    if item is None:
        raise LeftOut("no Wikidata item")
    links = document.get("incoming_links") or 0
    if not isinstance(links, int):
        raise BadRecord("`incoming_links` must be a whole number")
    if links < min_links:
        raise LeftOut(f"fewer than {min_links} links to it")
    if page_id is None:
        page_id = document.get("page_id")
    if not isinstance(page_id, int) or page_id >= 2**63:
        raise BadRecord("the page id is missing: no action line precedes the document")
    title, wiki = optional_string(document, "title"), optional_string(document, "wiki")
    if not title or not wiki:
        raise BadRecord("`title` or `wiki` is missing")
    opening, text = (optional_string(document, key) or "" for key in ("opening_text", "text"))
    if not text.startswith(opening):
        text = f"{opening}\n{text}"  # a hatnote or caption precedes the opening
    return Page(
        item=int(item[1]),
        wiki=wiki,
        page_id=page_id,
        title=title,
        url=f"{site_of(wiki)}/wiki/{quote(title.replace(' ', '_'), safe='/:(),!;@$*~')}",
        text=text[:max_text],
    )


def site_of(wiki: str) -> str:
    """Return the URL of a Wikipedia by its database name, such as `enwiki`. Raises `BadRecord` for other projects."""
    code = _WIKIPEDIA.fullmatch(wiki)
    if code is None or code[1] in _OTHER_PROJECTS:
        raise BadRecord(f"{wiki} is not a Wikipedia")
    return f"https://{code[1].replace('_', '-')}.wikipedia.org"


def read_page_images(
    path: Path, start: Position, on_bytes: OnBytes
) -> Iterator[tuple[list[tuple[int, bool, str]], Position]]:
    """Yield the page images of each line with the position after it. Raises `CatalogError`.

    An image is a page id, whether its licence is free, and a file name without `File:`.
    """
    for line, position in read_lines(path, start, on_bytes):
        if len(line) > MAX_LINE_BYTES:
            raise CatalogError(f"{path}, line {position.line}: {LINE_TOO_LONG}; give Wikimedia's own dump")
        yield (
            [
                (int(page_id), prop == b"page_image_free", name)
                for page_id, prop, value in _PAGE_IMAGE.findall(line)
                if (
                    name := _ESCAPED.sub(lambda match: _SPECIAL.get(match[1], match[1]), value).decode(
                        "utf-8", "replace"
                    )
                )
            ],
            position,
        )


def wiki_of(path: Path) -> str:
    """Return the wiki of a page_props dump, such as `enwiki`. Raises `CatalogError` for another file."""
    head = b""
    for line, position in read_lines(path):
        head += line[:500]
        if position.line >= _HEAD_LINES or line.startswith(b"INSERT"):
            break
    database = _DATABASE.search(head)
    if database is None or b"`page_props`" not in head:
        raise CatalogError(
            f"{path} is not a page_props dump; give WIKI-DATE-page_props.sql.gz as Wikimedia publishes it"
        )
    return database[1].decode()


def file_url(site: str, file: str, width_px: int) -> str:
    """Return the URL that redirects to a file of a wiki or of Commons, `width_px` wide (0: the original)."""
    width = f"?width={width_px}" if width_px else ""
    return f"{site}/wiki/Special:FilePath/{quote(file.replace(' ', '_'), safe='')}{width}"


@dataclass(frozen=True, kw_only=True)
class Item:
    """The parts of an item that a catalog uses. Q42 is the number 42. `image` is the name of a file on Commons.

    `superclasses` are what it is a subclass of, and the parent taxa of a taxon.
    """

    number: int
    types: tuple[int, ...] = ()
    superclasses: tuple[int, ...] = ()
    image: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    description: str | None = None


def number_of(line: bytes) -> int | None:
    """Return the item number of a line without parsing it, or None if it is not near the start."""
    match = _ID.search(line, 0, 200)
    return None if match is None else int(match[1])


def parse_item(line: bytes, languages: Sequence[str]) -> Item | None:
    """Parse an item, with labels in `languages` and a description in the first. Raises `BadRecord`.

    Returns None for other entities. Statements of preferred rank replace those of normal rank.
    """
    text = line.strip().rstrip(b",")
    if text in (b"", b"[", b"]"):
        return None
    entity = parse_object(text)
    try:
        if entity["type"] != "item":
            return None
        claims = entity.get("claims") or {}
        labels, descriptions = entity.get("labels") or {}, entity.get("descriptions") or {}
        return Item(
            number=_number(entity["id"].removeprefix("Q")),
            types=tuple(_best(claims, INSTANCE_OF, _item_number)),
            superclasses=tuple(
                superclass for each in (SUBCLASS_OF, PARENT_TAXON) for superclass in _best(claims, each, _item_number)
            ),
            image=next(_best(claims, IMAGE, str), None),
            labels={language: label for language in languages if (label := _label(labels, language)) is not None},
            description=_label(descriptions, languages[0]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadRecord(f"not a Wikidata entity: {type(error).__name__} {error}") from None


def _best(claims: Mapping[str, Any], property_id: str, convert: Callable[[Any], Any]) -> Iterator[Any]:
    statements = claims.get(property_id) or []
    ranks = {statement["rank"] for statement in statements}
    rank = "preferred" if "preferred" in ranks else "normal"
    for statement in statements:
        if statement["rank"] == rank and statement["mainsnak"]["snaktype"] == "value":
            yield convert(statement["mainsnak"]["datavalue"]["value"])


def _item_number(value: Mapping[str, Any]) -> int:
    return _number(value["numeric-id"] if "numeric-id" in value else value["id"].removeprefix("Q"))


def _number(value: Any) -> int:
    number = int(value)
    if not 0 <= number < 2**63:
        raise ValueError(f"{number} is not the number of an item")
    return number


def _label(texts: Mapping[str, Any], language: str) -> str | None:
    entry = texts.get(language) or texts.get(ALL_LANGUAGES)
    return None if entry is None else str(entry["value"])

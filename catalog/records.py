"""Entity records, and their conversion from and to the rows of each catalog format."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from core.lines import LINE_TOO_LONG, MAX_LINE_BYTES

CREDIT_FIELDS = ("author", "licence", "licence_url", "source")
ImageCredit = Mapping[str, str]  # some of `CREDIT_FIELDS`

_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class EntityRecord:
    """An entity of the knowledge base. `images` are local paths or URLs.

    `text` is the input of the text encoder. `symbol` is a character that depicts the entity. `description` is one line
    to display. `image_credits` has an entry per image, or none at all. `line` is the record's line in the catalog, from
    1.
    """

    entity_id: str
    title: str
    text: str = ""
    images: tuple[str, ...] = ()
    url: str | None = None
    types: tuple[str, ...] = ()
    titles: Mapping[str, str] = field(default_factory=dict)
    symbol: str | None = None
    description: str | None = None
    image_credits: tuple[ImageCredit | None, ...] = ()
    line: int = 0


class BadRecord(Exception):
    """A row that is not a valid entity record. The message is the reason for the reject log."""


def is_url(image: str) -> bool:
    """Return whether an image is a URL rather than a path."""
    return _URL.match(image) is not None


def parse_object(line: bytes) -> dict[str, Any]:
    """Parse a line of a dump. Raises `BadRecord` unless it is a JSON object."""
    if len(line) > MAX_LINE_BYTES:
        raise BadRecord(LINE_TOO_LONG)
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise BadRecord(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadRecord(f"expected a JSON object, got {type(value).__name__}")
    return value


def from_native(row: Mapping[str, Any], folder: Path) -> EntityRecord:
    """Convert a row of the project's own format. Image paths are relative to `folder`. Raises `BadRecord`."""
    images = strings(row, "images")
    return EntityRecord(
        entity_id=required_string(row, "entity_id"),
        title=required_string(row, "title"),
        text=optional_string(row, "text") or "",
        images=tuple(image if is_url(image) else os.path.join(folder, image) for image in images),
        url=optional_string(row, "url"),
        types=strings(row, "types"),
        titles=_titles(row),
        symbol=optional_string(row, "symbol"),
        description=optional_string(row, "description"),
        image_credits=_image_credits(row, len(images)),
    )


def to_native(record: EntityRecord) -> dict[str, Any]:
    """Convert a record to a row of the project's own format. Without a credit there is no field for them."""
    row = {**vars(record), "images": list(record.images), "types": list(record.types), "titles": dict(record.titles)}
    del row["line"], row["image_credits"]
    if any(record.image_credits):
        row["image_credits"] = list(record.image_credits)
    return row


def from_oven(row: Mapping[str, Any], image_root: Path | None) -> EntityRecord:
    """Convert a row of OVEN's Wiki6M. Its image is looked up below `image_root`. Raises `BadRecord`."""
    entity_id = required_string(row, "wikidata_id")
    summary = optional_string(row, "wikipedia_summary") or ""
    content = optional_string(row, "wikipedia_content") or ""
    title = required_string(row, "wikipedia_title")
    images: tuple[str, ...] = ()
    if image_root is not None:
        image = image_root / "wikipedia_images_full" / entity_id[:4] / f"{entity_id}.jpg"
        images = (str(image),) if os.path.isfile(image) else ()  # unlike is_file, without an error for a long name
    return EntityRecord(
        entity_id=entity_id,
        title=title,
        text=content if content.startswith(summary) else f"{summary}\n{content}",
        images=images,
        url="https://en.wikipedia.org/wiki/" + title.replace(" ", "_"),
    )


def from_encyclopedic_vqa(url: str, row: object) -> EntityRecord:
    """Convert an entry of Encyclopedic-VQA's knowledge base. The URL becomes the id. Raises `BadRecord`."""
    if not isinstance(row, dict):
        raise BadRecord(f"expected a JSON object, got {type(row).__name__}")
    if not url.strip():
        raise BadRecord("the URL is empty")
    sections = zip(strings(row, "section_titles"), strings(row, "section_texts"), strict=False)
    return EntityRecord(
        entity_id=url,
        title=required_string(row, "title"),
        text="\n\n".join(f"{title}\n{text}".strip() for title, text in sections),
        images=strings(row, "image_urls"),
        url=url,
    )


def required_string(row: Mapping[str, Any], key: str) -> str:
    """Return a row's string. Raises `BadRecord` if it is missing, blank or of another type."""
    value = optional_string(row, key)
    if value is None or not value.strip():
        raise BadRecord(f"`{key}` is missing or empty")
    return value


def optional_string(row: Mapping[str, Any], key: str) -> str | None:
    """Return a row's string, or None if it is missing. Raises `BadRecord` for another type."""
    value = row.get(key)
    if value is None:
        return None
    if not isinstance(value, str):
        raise BadRecord(f"`{key}` must be a string, it is {type(value).__name__}")
    return _encodable(key, value)


def strings(row: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """Return a row's strings without the empty ones; none if they are missing. Raises `BadRecord` for another type."""
    value = row.get(key)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise BadRecord(f"`{key}` must be a list of strings")
    return tuple(_encodable(key, item) for item in value if item)


def _titles(row: Mapping[str, Any]) -> dict[str, str]:
    value = row.get("titles")
    if value is None:
        return {}
    if isinstance(value, list) and all(isinstance(pair, tuple) for pair in value):
        value = dict(value)  # a Parquet map
    if not isinstance(value, dict) or not all(
        isinstance(language, str) and isinstance(title, str | None) for language, title in value.items()
    ):
        raise BadRecord("`titles` must be an object of language to string")
    # A Parquet struct has every language of the column, with null for the missing ones.
    return {language: _encodable("titles", title) for language, title in value.items() if title is not None}


def _image_credits(row: Mapping[str, Any], images: int) -> tuple[ImageCredit | None, ...]:
    value = row.get("image_credits")
    if not value:
        return ()
    if not isinstance(value, list) or len(value) != images or not all(isinstance(each, dict | None) for each in value):
        raise BadRecord("`image_credits` must be a list with an object or null for each of `images`")
    credits: list[ImageCredit | None] = []
    for each in value:
        strings = {name: string for name in CREDIT_FIELDS if (string := optional_string(each or {}, name))}
        credits.append(strings or None)
    return tuple(credits) if any(credits) else ()


def _encodable(key: str, value: str) -> str:
    """Return the value. Raises `BadRecord` for lone surrogates, which JSON allows but UTF-8 does not."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRecord(f"`{key}` contains a lone surrogate, which is not a character") from None
    return value

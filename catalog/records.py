"""One entity of the knowledge base, and how a row of each known format becomes one."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class EntityRecord:
    """An item of the knowledge base. `images` are local paths (resolved against the catalog's folder) or URLs.

    `text` feeds the text encoder only. `symbol` is a character that shows the entity, `description` one line about it.
    `line` is where the record stood in its catalog, from 1.
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
    line: int = 0


class BadRecord(Exception):
    """A row that is no entity record. Its message is the reason that goes into the reject log."""


def is_url(image: str) -> bool:
    """Whether an image of a record is named by URL rather than by path."""
    return _URL.match(image) is not None


def from_native(row: Mapping[str, Any], folder: Path) -> EntityRecord:
    """A record in the project's own format; relative image paths are taken from `folder`. Raises `BadRecord`."""
    return EntityRecord(
        entity_id=_required(row, "entity_id"),
        title=_required(row, "title"),
        text=_optional(row, "text") or "",
        images=tuple(image if is_url(image) else os.path.join(folder, image) for image in _strings(row, "images")),
        url=_optional(row, "url"),
        types=_strings(row, "types"),
        titles=_titles(row),
        symbol=_optional(row, "symbol"),
        description=_optional(row, "description"),
    )


def from_oven(row: Mapping[str, Any], image_root: Path | None) -> EntityRecord:
    """A row of OVEN's Wiki6M. Its image is the file below `image_root`, where there is one. Raises `BadRecord`."""
    entity_id = _required(row, "wikidata_id")
    summary = _optional(row, "wikipedia_summary") or ""
    content = _optional(row, "wikipedia_content") or ""
    title = _required(row, "wikipedia_title")
    images: tuple[str, ...] = ()
    if image_root is not None:
        image = image_root / "wikipedia_images_full" / entity_id[:4] / f"{entity_id}.jpg"
        images = (str(image),) if image.is_file() else ()
    return EntityRecord(
        entity_id=entity_id,
        title=title,
        text=content if content.startswith(summary) else f"{summary}\n{content}",
        images=images,
        url="https://en.wikipedia.org/wiki/" + title.replace(" ", "_"),
    )


def from_encyclopedic_vqa(url: str, row: object) -> EntityRecord:
    """An entry of Encyclopedic-VQA's knowledge base: URL as id, sections as text. Raises `BadRecord`."""
    if not isinstance(row, dict):
        raise BadRecord(f"an object is wanted, this is {type(row).__name__}")
    if not url.strip():
        raise BadRecord("the URL is empty")
    sections = zip(_strings(row, "section_titles"), _strings(row, "section_texts"), strict=False)
    return EntityRecord(
        entity_id=url,
        title=_required(row, "title"),
        text="\n\n".join(f"{title}\n{text}".strip() for title, text in sections),
        images=_strings(row, "image_urls"),
        url=url,
    )


def _required(row: Mapping[str, Any], key: str) -> str:
    value = _optional(row, key)
    if value is None or not value.strip():
        raise BadRecord(f"`{key}` is missing or empty")
    return value


def _optional(row: Mapping[str, Any], key: str) -> str | None:
    value = row.get(key)
    if value is None:
        return None
    if not isinstance(value, str):
        raise BadRecord(f"`{key}` must be a string, it is {type(value).__name__}")
    return _encodable(key, value)


def _strings(row: Mapping[str, Any], key: str) -> tuple[str, ...]:
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
        value = dict(value)  # how a Parquet map comes
    if not isinstance(value, dict):
        raise BadRecord("`titles` must be an object of language to string")
    # A Parquet struct has every language of the column, null where this row has none.
    present = {language: title for language, title in value.items() if title is not None}
    if not all(isinstance(language, str) and isinstance(title, str) for language, title in present.items()):
        raise BadRecord("`titles` must be an object of language to string")
    return {language: _encodable("titles", title) for language, title in present.items()}


def _encodable(key: str, value: str) -> str:
    """JSON can smuggle in lone surrogates, which no file or database would take later."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRecord(f"`{key}` holds a lone surrogate, which is no character") from None
    return value

"""Wikidata's JSON dump: `latest-all.json.bz2` or `.gz`, one array with an entity a line.

https://doc.wikimedia.org/Wikibase/master/php/docs_topics_json.html; what is empty comes as a list, not as an object.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from catalog.records import BadRecord

INSTANCE_OF, SUBCLASS_OF, IMAGE = "P31", "P279", "P18"
# A label that holds for all languages which have none of their own.
ALL_LANGUAGES = "mul"

_ID = re.compile(rb'"id":\s*"Q(\d+)"')
_SUBCLASS_CLAIM = b'"P279"'


@dataclass(frozen=True, kw_only=True)
class Item:
    """What a catalog needs of an item. Items are numbers: 42 is Q42. `image` is the name of a file on Commons."""

    number: int
    types: tuple[int, ...] = ()
    superclasses: tuple[int, ...] = ()
    image: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    description: str | None = None


def number_of(line: bytes) -> int | None:
    """The item a line is about, told without parsing it; None if that is not to be seen at its begin."""
    match = _ID.search(line, 0, 200)
    return None if match is None else int(match[1])


def may_be_class(line: bytes) -> bool:
    """Whether the item may be a subclass of another: its name is needed where it is a type."""
    return _SUBCLASS_CLAIM in line


def parse_item(line: bytes, languages: Sequence[str]) -> Item | None:
    """The item of a line, labelled in `languages`, described in the first; None if it is no item. Raises `BadRecord`.

    Of statements the best are taken: the preferred, or where there are none those of normal rank.
    """
    text = line.strip().rstrip(b",")
    if text in (b"", b"[", b"]"):
        return None
    try:
        entity = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise BadRecord(f"not JSON: {error}") from None
    try:
        if entity["type"] != "item":
            return None
        claims = entity.get("claims") or {}
        labels, descriptions = entity.get("labels") or {}, entity.get("descriptions") or {}
        return Item(
            number=int(entity["id"].removeprefix("Q")),
            types=tuple(_best(claims, INSTANCE_OF, _item_number)),
            superclasses=tuple(_best(claims, SUBCLASS_OF, _item_number)),
            image=next(_best(claims, IMAGE, str), None),
            labels={language: label for language in languages if (label := _in(labels, language)) is not None},
            description=_in(descriptions, languages[0]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadRecord(f"no entity of Wikidata: {type(error).__name__} {error}") from None


def _best(claims: Mapping[str, Any], property_id: str, convert: Callable[[Any], Any]) -> Iterator[Any]:
    statements = claims.get(property_id) or []
    ranks = {statement["rank"] for statement in statements}
    rank = "preferred" if "preferred" in ranks else "normal"
    for statement in statements:
        if statement["rank"] == rank and statement["mainsnak"]["snaktype"] == "value":
            yield convert(statement["mainsnak"]["datavalue"]["value"])


def _item_number(value: Mapping[str, Any]) -> int:
    return int(value["numeric-id"] if "numeric-id" in value else value["id"].removeprefix("Q"))


def _in(texts: Mapping[str, Any], language: str) -> str | None:
    entry = texts.get(language) or texts.get(ALL_LANGUAGES)
    return None if entry is None else str(entry["value"])

"""Items of Wikidata's JSON dump, `latest-all.json.bz2` or `.gz`: an array with one entity per line.

https://doc.wikimedia.org/Wikibase/master/php/docs_topics_json.html. Empty objects are written as empty lists.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from catalog.records import BadRecord, parse_object

INSTANCE_OF, SUBCLASS_OF, PARENT_TAXON, IMAGE = "P31", "P279", "P171", "P18"
ALL_LANGUAGES = "mul"  # the fallback for languages without a label
_ID = re.compile(rb'"id":\s*"Q(\d{1,18})"')
# In the line of an item that has superclasses, and whose label may name a type.
CLASS_CLAIMS = tuple(f'"{each}"'.encode() for each in (SUBCLASS_OF, PARENT_TAXON))


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
            labels={language: label for language in languages if (label := _text(labels, language)) is not None},
            description=_text(descriptions, languages[0]),
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


def _text(texts: Mapping[str, Any], language: str) -> str | None:
    entry = texts.get(language) or texts.get(ALL_LANGUAGES)
    return None if entry is None else str(entry["value"])

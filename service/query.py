"""What a request for recognition asks for, from its query string."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qsl

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field, ValidationError

from core.errors import BadParameter
from imaging import check_box
from wikiclip.answers import MAX_TOP_K, Box, RecognizeOptions

_KEPT, _KEPT_BYTES = 1024, 256  # query strings, and how long one may be


class RecognizeQuery(BaseModel):
    """The parameters as they are sent."""

    top_k: int = Field(default=5, ge=1, le=MAX_TOP_K, description="Predictions, at most.")
    min_score: float | None = Field(
        default=None, ge=-1, le=1, allow_inf_nan=False, description="Drop predictions with a lower cosine."
    )
    types: list[str] | None = Field(
        default=None, description="Only entities with any of these types; repeat it or separate by commas."
    )
    lang: str | None = Field(
        default=None, max_length=35, description="Titles in this language (a code as fr) where there are."
    )
    box: str | None = Field(
        default=None, max_length=200, description="The region meant: x,y,w,h in fractions of the image."
    )
    explain: bool = Field(
        default=False, description="Say of each prediction where in the image it matches, and by which words."
    )


def query_parameters() -> list[dict[str, Any]]:
    """OpenAPI of these parameters."""
    properties: dict[str, dict[str, Any]] = RecognizeQuery.model_json_schema()["properties"]
    return [
        {
            "name": name,
            "in": "query",
            "required": False,
            "description": schema.pop("description"),
            "schema": schema,
        }
        for name, schema in properties.items()
    ]


def options_of(request: Request) -> RecognizeOptions:
    """What a request asks for; a query string is read once. Raises `BadParameter` or `RequestValidationError`."""
    query: bytes = request.scope["query_string"]
    return (_kept if len(query) <= _KEPT_BYTES else _parsed)(query)


def _parsed(query: bytes) -> RecognizeOptions:
    given: dict[str, Any] = {}
    types: list[str] = []
    for name, value in parse_qsl(query.decode("latin-1"), keep_blank_values=True):
        if name == "types":
            types.append(value)
        else:
            given[name] = value
    try:
        asked = RecognizeQuery.model_validate({**given, "types": types})
    except ValidationError as error:
        raise RequestValidationError(
            [{**item, "loc": ("query", *item["loc"])} for item in error.errors(include_url=False)]
        ) from None
    wanted_types = (part.strip() for value in types for part in value.split(","))
    return RecognizeOptions(
        top_k=asked.top_k,
        min_score=asked.min_score,
        types=tuple(sorted({kind for kind in wanted_types if kind})),
        lang=asked.lang or None,
        box=None if not asked.box else _box(asked.box),
        explain=asked.explain,
    )


_kept = lru_cache(maxsize=_KEPT)(_parsed)


def _box(text: str) -> Box:
    try:
        x, y, width, height = (float(part) for part in text.split(","))
    except ValueError:
        raise BadParameter(f"box {text[:60]!r} is not four numbers; give x,y,w,h in fractions of the image") from None
    if not all(math.isfinite(side) for side in (x, y, width, height)):
        raise BadParameter(f"box {text[:60]!r} is not four numbers; give x,y,w,h in fractions of the image")
    check_box((x, y, width, height))
    return x, y, width, height

"""Request bodies: read within limits, and the images in them. Bodies stay in memory and are never written to disk."""

import asyncio
import base64
import binascii
import io
import math
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import orjson
from pydantic import BaseModel, ValidationError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import Field, File, FormParser, parse_options_header
from starlette.requests import Request

from core.errors import BadParameter, BadRequest, SlowRequest, TooLarge, UnsupportedMediaType, UserError
from imaging import canonical_type, readable_types
from service.limits import BodyBudget
from wikiclip.answers import EmbeddingQuery, TextQuery

_DRAIN_BYTES = 8 * 1024**2  # read beyond the limit before the connection is closed
_MAX_REFERENCES = 1000  # images of an entity in one form
_OTHER_PARTS = 16  # parts of a form besides those that the service reads
_MAX_JSON_VALUES = 100_000  # 20 MB of empty lists take seconds to parse, in one call that stops all threads
_UNKNOWN_TYPE = "application/octet-stream"  # clients send it for a file whose type they do not know
_WHITESPACE = string.whitespace.encode()
_JSON_EXAMPLE = '{"image": {"base64": "..."}}'


AnyModel = TypeVar("AnyModel", bound=BaseModel)


@dataclass(frozen=True, kw_only=True)
class _Part:
    name: bytes | None
    content_type: str | None
    data: bytes


async def read_body(request: Request, max_body_bytes: int, timeout_s: float) -> bytes:
    """Read the body of a request.

    Raises `TooLarge` over the limit, `SlowRequest` if it takes longer than `timeout_s`, `BadRequest` if it is empty,
    `TooManyRequests` over the app's budget for all bodies. `RequestContext` gives the bytes back to that.
    A body over the limit is read up to `_DRAIN_BYTES` beyond it and discarded, because many clients do not read a
    response before they have sent their body. With `Expect: 100-continue` it is not read at all.
    """
    error = TooLarge(f"the body is over {max_body_bytes} bytes; send a smaller image")
    declared = request.headers.get("content-length", "")
    too_large = declared.isdecimal() and int(declared) > max_body_bytes
    if too_large and request.headers.get("expect", "").lower() == "100-continue":
        raise error  # reading would send 100 Continue
    budget: BodyBudget = request.app.state.body_budget
    chunks: list[bytes] = []
    size_bytes = 0
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in request.stream():
                size_bytes += len(chunk)
                too_large = too_large or size_bytes > max_body_bytes
                if not too_large:
                    budget.take(len(chunk))
                    request.state.body_bytes += len(chunk)
                    chunks.append(chunk)
                    continue
                chunks.clear()
                if size_bytes > max_body_bytes + _DRAIN_BYTES:
                    break
    except TimeoutError:
        if not too_large:
            raise SlowRequest(f"the body did not arrive within {timeout_s:g} s; send a smaller image") from None
    if too_large:
        raise error
    if size_bytes == 0:
        raise BadRequest("the body is empty; send an image")
    return b"".join(chunks)


def is_form(content_type: str) -> bool:
    return _media_type(content_type) == "multipart/form-data"


def query_of(
    body: bytes, content_type: str, max_images: int = 1
) -> bytes | str | EmbeddingQuery | list[bytes | UserError]:
    """Return the image of a `POST /recognize` in any of its three forms, or its URL, several images or an embedding.

    Several images are as `images_of` returns them. Raises `BadRequest`, `UnsupportedMediaType` or `BadParameter`, and
    `TooLarge` for a form with far more parts than `max_images`.
    """
    if is_form(content_type):
        parts = _image_parts(body, content_type, max_images, too_many=TooLarge)
        return _image_in_part(parts[0]) if len(parts) == 1 else _images_in_parts(parts)
    return reference_of(body, content_type)


def reference_of(body: bytes, content_type: str) -> bytes | str | EmbeddingQuery:
    """Return the one image of a body, as `query_of` does, or an embedding."""
    return _image_or(EmbeddingQuery, "embedding", body, content_type)


def embeddable_of(body: bytes, content_type: str) -> bytes | str | TextQuery:
    """Return the image of a `POST /embed`, as `query_of` does, or its text."""
    return _image_or(TextQuery, "text", body, content_type)


def _image_or(model: type[AnyModel], name: str, body: bytes, content_type: str) -> bytes | str | AnyModel:
    """Return the one image, its URL, or the model if the body is JSON with the field `name`."""
    if is_form(content_type):
        parts = _image_parts(body, content_type, 1)
        if len(parts) != 1:
            raise BadRequest(f"the form has {len(parts)} parts named image; send one")
        return _image_in_part(parts[0])
    if _media_type(content_type) != "application/json":
        _check_type(content_type)
        return body
    content = _json(body)
    if not isinstance(content, dict) or name not in content:
        return image_in_json(content.get("image") if isinstance(content, dict) else None)
    if "image" in content:
        raise BadRequest(f"the JSON has both image and {name}; send one of them")
    return validated(model, content)


def validated(model: type[AnyModel], content: object, advice: str = "") -> AnyModel:
    """Return parsed JSON as a model. Raises `BadParameter`, which names the first wrong field and gives the advice."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "record"
        raise BadParameter(f"{field[:100]}: {first['msg']}{advice}") from error


def images_of(body: bytes, content_type: str, max_images: int = 1) -> list[bytes | UserError]:
    """Return the `image` parts of a multipart body, in order. An empty part or one of another type is an error.

    Raises `BadRequest` for a malformed body, one without such a part, and one with far more parts than `max_images`;
    `UnsupportedMediaType` if it is not multipart.
    """
    if not is_form(content_type):
        raise UnsupportedMediaType("send multipart/form-data with parts named image")
    return _images_in_parts(_image_parts(body, content_type, max_images))


def _images_in_parts(parts: Sequence[_Part]) -> list[bytes | UserError]:
    images: list[bytes | UserError] = []
    for part in parts:
        try:
            images.append(_image_in_part(part))
        except UserError as error:
            images.append(error.with_traceback(None))  # a traceback would keep the image in memory
    return images


def record_of(body: bytes, content_type: str) -> tuple[Any, list[bytes | str]]:
    """Return the record of a `PUT /entities/{entity_id}` as parsed JSON, and its images or their URLs.

    Raises `BadRequest` or `UnsupportedMediaType`, and `TooLarge` for a form with far more than `_MAX_REFERENCES` parts.
    """
    media_type = _media_type(content_type)
    if media_type == "application/json":
        record = _json(body)
        image = record.pop("image", None) if isinstance(record, dict) else None
        images = image if isinstance(image, list) else [] if image is None else [image]
        if len(images) > _MAX_REFERENCES:
            raise TooLarge(f"{len(images)} images of one entity; send at most {_MAX_REFERENCES}")
        return record, [image_in_json(each) for each in images]
    if not is_form(content_type):
        raise UnsupportedMediaType("send application/json, or multipart/form-data with the parts record and image")
    parts = _parse_multipart(body, content_type, _MAX_REFERENCES, TooLarge)
    records = [part for part in parts if part.name == b"record"]
    if len(records) != 1:
        raise BadRequest("the form needs one part record, with the record as JSON, and any number of parts image")
    return _json(records[0].data), [_image_in_part(part) for part in parts if part.name == b"image"]


def _media_type(content_type: str) -> str:
    return content_type.partition(";")[0].strip().lower()


def _image_parts(
    body: bytes, content_type: str, max_images: int, too_many: type[UserError] = BadRequest
) -> list[_Part]:
    parts = [part for part in _parse_multipart(body, content_type, max_images, too_many) if part.name == b"image"]
    if not parts:
        raise BadRequest("the form has no part named image; add one")
    return parts


def _image_in_part(part: _Part) -> bytes:
    if not part.data:
        raise BadRequest("the part image is empty; send a file with content")
    if part.content_type is not None and part.content_type.lower() != _UNKNOWN_TYPE:
        _check_type(part.content_type)
    return part.data


def _check_type(content_type: str) -> None:
    if canonical_type(content_type) is None:
        declared = content_type.partition(";")[0].strip()[:80]
        raise UnsupportedMediaType(
            f"the content type {declared!r} is not an image type that the service reads; send "
            f"{', '.join(readable_types())}, multipart/form-data or application/json"
        )


def _json(body: bytes) -> Any:
    if sum(map(body.count, (b",", b"[", b"{"))) > _MAX_JSON_VALUES:
        raise BadRequest(f"the JSON has over {_MAX_JSON_VALUES} values; send {_JSON_EXAMPLE}")
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is not JSON ({error}); send {_JSON_EXAMPLE}") from error


def image_in_json(image: object) -> bytes | str:
    if not isinstance(image, dict) or len(image) != 1 or not isinstance(next(iter(image.values())), str):
        raise BadRequest(f"image must be an object with one string; send {_JSON_EXAMPLE}")
    kind, value = next(iter(image.items()))
    if kind == "url":
        return str(value)
    if kind != "base64":
        raise BadRequest(f"image has the unknown key {kind[:40]!r}; send {_JSON_EXAMPLE}")
    if value.startswith("data:"):
        head, _, value = value.partition(",")
        _check_type(head.removeprefix("data:"))
    try:
        data = base64.b64decode(value.encode("ascii").translate(None, _WHITESPACE), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRequest(f"image.base64 is malformed ({error}); encode the file's bytes in base64") from error
    if not data:
        raise BadRequest("image.base64 is empty; send an image")
    return data


def _parse_multipart(
    body: bytes, content_type: str, max_read: int, too_many: type[UserError] = BadRequest
) -> list[_Part]:
    _, parameters = parse_options_header(content_type)
    boundary = parameters.get(b"boundary")
    if not boundary:
        raise BadRequest("the multipart content type has no boundary; let the client library set it")
    parts: list[_Part] = []
    endings: list[None] = []

    def add(part: _Part) -> None:
        if len(parts) == max_read + _OTHER_PARTS:
            raise too_many(f"the form has over {len(parts)} parts; send fewer")
        parts.append(part)

    def add_field(field: Field) -> None:
        add(_Part(name=field.field_name, content_type=field.content_type, data=field.value or b""))

    def add_file(file: File) -> None:
        assert file.in_memory
        data = cast(io.BytesIO, file.file_object).getvalue()
        add(_Part(name=file.field_name, content_type=file.content_type, data=data))

    parser = FormParser(
        "multipart/form-data",
        add_field,
        add_file,
        lambda: endings.append(None),
        boundary,
        config={"MAX_MEMORY_FILE_SIZE": math.inf},  # no temporary files
    )
    try:
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise BadRequest(f"the multipart body is malformed ({error}); let the client library build it") from error
    finally:
        parser.parser = None  # breaks a reference cycle, which would keep the images in memory
    if not endings:
        raise BadRequest("the multipart body is incomplete; send all of it")
    return parts


# How /openapi.json describes these bodies. FastAPI does not know them, because the routes read them here.

BINARY: dict[str, Any] = {"type": "string", "format": "binary"}
_IMAGE_IN_JSON: dict[str, Any] = {
    "oneOf": [
        {"type": "object", "required": [kind], "properties": {kind: {"type": "string"}}} for kind in ("base64", "url")
    ]
}


def request_body(content: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return a route's `openapi_extra` for a body with these schemas by media type."""
    schemas = {media_type: {"schema": schema} for media_type, schema in content.items()}
    return {"requestBody": {"required": True, "content": schemas}}


def image_body(other: type[BaseModel], *, several: bool = False) -> dict[str, Any]:
    """Describe the three forms of an image, and what JSON may have instead.

    With `several`, a form may have any number of images.
    """
    images = {"oneOf": [BINARY, {"type": "array", "items": BINARY, "minItems": 1}]}
    form = {"type": "object", "required": ["image"], "properties": {"image": images if several else BINARY}}
    in_json = {"type": "object", "required": ["image"], "properties": {"image": _IMAGE_IN_JSON}}
    raw = dict.fromkeys(readable_types(), BINARY)
    json_body = {"oneOf": [in_json, other.model_json_schema()]}
    return request_body({"multipart/form-data": form, "application/json": json_body, **raw})


def images_body() -> dict[str, Any]:
    """Describe the form that `images_of` reads."""
    images = {"type": "array", "items": BINARY}
    form = {"type": "object", "required": ["image"], "properties": {"image": images}}
    return request_body({"multipart/form-data": form})


def record_body(model: type[BaseModel]) -> dict[str, Any]:
    """Describe the two forms that `record_of` reads, for a record of this model."""
    record = model.model_json_schema()
    images_in_json = {"oneOf": [_IMAGE_IN_JSON, {"type": "array", "items": _IMAGE_IN_JSON}]}
    in_json = {**record, "properties": {**record["properties"], "image": images_in_json}}
    images = {"oneOf": [BINARY, {"type": "array", "items": BINARY}]}
    form = {"type": "object", "required": ["record"], "properties": {"record": record, "image": images}}
    return request_body({"application/json": in_json, "multipart/form-data": form})

"""Request bodies: read within bounds, and the images in them. All in memory: a query image never touches the disk."""

from __future__ import annotations

import asyncio
import base64
import binascii
from dataclasses import dataclass
from typing import Any

import orjson
import python_multipart
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.requests import ClientDisconnect, Request

from core.errors import BadRequest, SlowRequest, TooLarge, UnsupportedMediaType, UserError
from imaging import canonical_type, readable_types

_DRAIN_BYTES = 8 * 1024**2  # beyond the limit; a body larger than that has its connection closed
_UNDECLARED = "application/octet-stream"  # what clients send for a file whose kind they do not know


async def read_body(request: Request, max_body_bytes: int, timeout_s: float) -> bytes:
    """The body of a request. Raises `TooLarge` if it is over the limit, `SlowRequest` if it does not come within
    `timeout_s`, `BadRequest` if it is empty. Of a body that is over the limit nothing is kept, and no more is read than
    `_DRAIN_BYTES` past it; nothing at all where the client waits to be told to send it (`Expect: 100-continue`)."""
    declared = request.headers.get("content-length", "")
    too_large = declared.isdecimal() and int(declared) > max_body_bytes
    if too_large and request.headers.get("expect", "").lower() == "100-continue":
        raise _too_large(max_body_bytes)  # the first read would be what tells it to go on
    chunks: list[bytes] = []
    size_bytes = 0
    try:
        async with asyncio.timeout(timeout_s):
            more = True
            while more:  # not `request.stream()`: a generator that the event loop has to know of, 0.02 ms a request
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                chunk, more = message.get("body", b""), message.get("more_body", False)
                size_bytes += len(chunk)
                too_large = too_large or size_bytes > max_body_bytes
                if not too_large:
                    chunks.append(chunk)
                    continue
                # Many clients see only a closed connection if the answer comes before their body is taken.
                chunks.clear()
                if size_bytes > max_body_bytes + _DRAIN_BYTES:
                    break
    except TimeoutError:
        if not too_large:
            raise SlowRequest(f"the body did not come within {timeout_s:g} s; send a smaller image") from None
    if too_large:
        raise _too_large(max_body_bytes)
    if size_bytes == 0:
        raise BadRequest("the body is empty; send an image")
    return b"".join(chunks)


def _too_large(max_body_bytes: int) -> TooLarge:
    return TooLarge(f"the body is over {max_body_bytes} bytes; send a smaller image")


@dataclass(frozen=True, kw_only=True)
class ImageUrl:
    """Where an image is said to be; nothing about it has been checked."""

    url: str


def image_of(body: bytes, content_type: str) -> bytes | ImageUrl:
    """The one image of a `POST /recognize`, in any of its three forms, or where it is.

    Raises `BadRequest` or `UnsupportedMediaType`.
    """
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type == "multipart/form-data":
        images = images_of(body, content_type)
        if len(images) != 1:
            raise BadRequest(f"{len(images)} parts named image; send one, or use /recognize/batch")
        if isinstance(images[0], UserError):
            raise images[0]
        return images[0]
    if media_type == "application/json":
        return _image_in_json(body)
    _check_type(content_type)
    return body


def images_of(body: bytes, content_type: str) -> list[bytes | UserError]:
    """The `image` parts of a multipart body in order; a part that is empty or declared as no image is its error.

    Raises `BadRequest` if the body is malformed or has no such part, `UnsupportedMediaType` if it is no multipart.
    """
    if content_type.partition(";")[0].strip().lower() != "multipart/form-data":
        raise UnsupportedMediaType("send multipart/form-data with parts named image")
    parts = [part for part in _parse_multipart(body, content_type) if part.name == "image"]
    if not parts:
        raise BadRequest("the form has no part named image; add one")
    return [_image_in_part(part) for part in parts]


def record_of(body: bytes, content_type: str) -> tuple[Any, bytes | ImageUrl | None]:
    """The record of a `PUT /entities/{entity_id}` as parsed JSON, and its image or where that is, None without.

    Either all of it is JSON, or the form has a part `record` with the JSON and perhaps a part `image`. Raises
    `BadRequest` or `UnsupportedMediaType`.
    """
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type == "application/json":
        record = _json(body)
        given = record.pop("image", None) if isinstance(record, dict) else None
        return record, None if given is None else _image_given(given)
    if media_type != "multipart/form-data":
        raise UnsupportedMediaType("send application/json, or multipart/form-data with the parts record and image")
    parts = _parse_multipart(body, content_type)
    records = [part for part in parts if part.name == "record"]
    images = [_image_in_part(part) for part in parts if part.name == "image"]
    if len(records) != 1 or len(images) > 1:
        raise BadRequest("the form needs one part record, with the record as JSON, and one part image at most")
    for image in images:
        if isinstance(image, UserError):
            raise image
        return _json(records[0].data), image
    return _json(records[0].data), None


@dataclass(kw_only=True)
class _Part:
    name: str = ""
    content_type: str | None = None
    data: bytes = b""


def _image_in_part(part: _Part) -> bytes | UserError:
    if not part.data:
        return BadRequest("the part image is empty; send a file with content")
    if part.content_type is not None and part.content_type.lower() != _UNDECLARED:
        try:
            _check_type(part.content_type)
        except UnsupportedMediaType as error:
            return error
    return part.data


def _check_type(content_type: str) -> None:
    if canonical_type(content_type) is None:
        declared = content_type.partition(";")[0].strip()[:80] or "no content type"
        raise UnsupportedMediaType(
            f"{declared!r} is no image type that is read here; declare one of {', '.join(readable_types())}, "
            "or send multipart/form-data or application/json"
        )


def _image_in_json(body: bytes) -> bytes | ImageUrl:
    content = _json(body)
    return _image_given(content.get("image") if isinstance(content, dict) else None)


def _json(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is no JSON ({error}); send {{'image': {{'base64': ...}}}}") from error


def _image_given(image: object) -> bytes | ImageUrl:
    if not isinstance(image, dict) or len(image) != 1 or not isinstance(next(iter(image.values())), str):
        raise BadRequest('the JSON is not as wanted; send {"image": {"base64": "..."}}')
    kind, value = next(iter(image.items()))
    if kind == "url":
        return ImageUrl(url=value)
    if kind != "base64":
        raise BadRequest(f'image has {kind[:40]!r}; send {{"image": {{"base64": "..."}}}}')
    return _from_base64(value)


def _from_base64(value: str) -> bytes:
    if value.startswith("data:"):
        head, _, value = value.partition(",")
        _check_type(head.removeprefix("data:"))
    try:
        data = base64.b64decode("".join(value.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRequest(f"image.base64 is malformed ({error}); encode the file's bytes in base64") from error
    if not data:
        raise BadRequest("image.base64 is empty; send an image")
    return data


def _parse_multipart(body: bytes, content_type: str) -> list[_Part]:
    _, parameters = parse_options_header(content_type)
    boundary = parameters.get(b"boundary")
    if not boundary:
        raise BadRequest("the multipart content type names no boundary; let the client library set it")
    collector = _Collector()
    try:
        parser = python_multipart.MultipartParser(boundary, collector.callbacks())  # type: ignore[arg-type]
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise BadRequest(f"the multipart body is malformed ({error}); let the client library build it") from error
    if not collector.ended:
        raise BadRequest("the multipart body ends too early; send all of it")
    return collector.parts


class _Collector:
    """Gathers the parts of a multipart body from the parser's callbacks."""

    def __init__(self) -> None:
        self.parts: list[_Part] = []
        self.ended = False
        self._header = b""
        self._value = b""
        self._pieces: list[bytes] = []

    def callbacks(self) -> dict[str, Any]:
        return {
            "on_part_begin": self._part_begin,
            "on_header_field": self._header_field,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_part_data": self._part_data,
            "on_part_end": self._part_end,
            "on_end": self._end,
        }

    def _part_begin(self) -> None:
        self.parts.append(_Part())
        self._pieces = []

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        name = self._header.lower()
        if name == b"content-disposition":
            _, options = parse_options_header(self._value)
            self.parts[-1].name = options.get(b"name", b"").decode("utf-8", "replace")
        elif name == b"content-type":
            self.parts[-1].content_type = self._value.decode("latin-1").strip()
        self._header = self._value = b""

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        self._pieces.append(data[start:end])

    def _part_end(self) -> None:
        self.parts[-1].data = b"".join(self._pieces)

    def _end(self) -> None:
        self.ended = True

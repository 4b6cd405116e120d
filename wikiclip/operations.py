"""The operations of the HTTP API: what each sends, and how its answer is read. Both clients have them as methods."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import (
    IO,
    TYPE_CHECKING,
    Any,
    Concatenate,
    Generic,
    NamedTuple,
    ParamSpec,
    TypeAlias,
    TypeVar,
    cast,
    overload,
)
from urllib.parse import quote

import httpx

from wikiclip.answers import (
    AddedImage,
    BatchRecognition,
    BundleChange,
    EditedEntity,
    Embedding,
    EmbeddingQuery,
    EmbedOptions,
    Entities,
    EntityDetails,
    EntityRequest,
    Feedback,
    Info,
    Liveness,
    Readiness,
    Recognition,
    RecognizeOptions,
    Reply,
)
from wikiclip.errors import UserError

if TYPE_CHECKING:
    from wikiclip.client import AsyncClient, Client

P = ParamSpec("P")
T = TypeVar("T")
AnyReply = TypeVar("AnyReply", bound=Reply)

Image: TypeAlias = bytes | str | os.PathLike[str] | IO[bytes]
"""The bytes of an image file, its path, a file open for reading, or a URL (`https://...`) that the service fetches."""

REQUEST_ID_HEADER = "x-request-id"


class Retries(NamedTuple):
    """After which statuses and failures a request is sent again."""

    statuses: frozenset[int]
    failures: tuple[type[Exception], ...]


_IDEMPOTENT = Retries(frozenset((429, 502, 503, 504)), (httpx.NetworkError, httpx.RemoteProtocolError))
_NOT_BEGUN = Retries(frozenset((429, 503)), (httpx.ConnectError,))  # the service has refused it, or not received it
_ONCE = Retries(frozenset(), ())


@dataclass(frozen=True, kw_only=True)
class Request(Generic[T]):
    """A request, as arguments of httpx, and what to do with its answer."""

    method: str
    url: str
    read: Callable[[httpx.Response], T]
    content: dict[str, Any]
    admin: bool = False
    retries: Retries = _IDEMPOTENT


def _request(
    method: str,
    url: str,
    answer: type[AnyReply],
    *,
    admin: bool = False,
    retries: Retries = _IDEMPOTENT,
    **content: Any,
) -> Request[AnyReply]:
    """Return a request whose answer is JSON. `content` has arguments of httpx."""

    def read(response: httpx.Response) -> AnyReply:
        reply = answer.model_validate_json(response.content)
        return reply.model_copy(update={"request_id": response.headers.get(REQUEST_ID_HEADER, reply.request_id)})

    return Request(method=method, url=url, read=read, content=content, admin=admin, retries=retries)


class _Operation(Generic[P, T]):
    """A method that builds a request. On `Client` it returns the answer, on `AsyncClient` a coroutine."""

    def __init__(self, build: Callable[Concatenate[Any, P], Request[T]]) -> None:
        self._build = build

    @overload
    def __get__(self, client: None, kind: type) -> Callable[Concatenate[Any, P], Request[T]]: ...
    @overload
    def __get__(self, client: Client, kind: type) -> Callable[P, T]: ...
    @overload
    def __get__(self, client: AsyncClient, kind: type) -> Callable[P, Coroutine[Any, Any, T]]: ...
    def __get__(self, client: Any, kind: type) -> Any:
        if client is None:
            return self._build  # for help() and documentation tools

        @functools.wraps(self._build)
        def send(*args: P.args, **kwargs: P.kwargs) -> Any:
            return client._send(self._build(client, *args, **kwargs))

        return send


class Operations:
    """The methods of both clients. All raise the `WikiclipError` of the answer's status, and `Unavailable` without one.

    Files are read when the method is called.
    """

    @_Operation
    def recognize(self, image: Image, options: RecognizeOptions | None = None) -> Request[Recognition]:
        """Recognise one image."""
        return _request("POST", "/recognize", Recognition, params=_query(options), **_image_body(image))

    @_Operation
    def recognize_views(self, images: Iterable[Image], options: RecognizeOptions | None = None) -> Request[Recognition]:
        """Recognise the one thing that several images show. `skipped` has those that do not decode.

        A service takes at most `info().limits["max_views"]` images, and no URLs.
        """
        files = [_image_part(image) for image in images]
        return _request("POST", "/recognize", Recognition, params=_query(options), files=files)

    @_Operation
    def recognize_batch(
        self, images: Iterable[Image], options: RecognizeOptions | None = None
    ) -> Request[BatchRecognition]:
        """Recognise several images. `results` has a `Recognition` or a `Problem` for each, in order.

        A service takes at most `info().limits["max_batch_images"]` images, and no URLs.
        """
        files = [_image_part(image) for image in images]
        return _request("POST", "/recognize/batch", BatchRecognition, params=_query(options), files=files)

    @_Operation
    def recognize_embedding(
        self, embedding: Embedding | Iterable[float], options: RecognizeOptions | None = None
    ) -> Request[Recognition]:
        """Recognise the image of an embedding. Raises `Conflict` if an `Embedding` is by another encoder."""
        return _request("POST", "/recognize", Recognition, params=_query(options), **_embedding_body(embedding))

    @_Operation
    def embed(self, image: Image, options: EmbedOptions | None = None) -> Request[Embedding]:
        """Return the query embedding of an image."""
        return _request("POST", "/embed", Embedding, params=_query(options), **_image_body(image))

    @_Operation
    def embed_text(self, text: str) -> Request[Embedding]:
        """Return the embedding of an entity with this text and no image.

        Raises `Unprocessable` if the bundle cannot embed texts.
        """
        return _request("POST", "/embed", Embedding, json={"text": text})

    @_Operation
    def get_entity(self, entity_id: str) -> Request[EntityDetails]:
        """Return the record of an entity. Raises `NotFound`."""
        return _request("GET", _entity_url(entity_id), EntityDetails)

    @_Operation
    def search_entities(self, query: str, *, limit: int = 20) -> Request[Entities]:
        """Search entities by words of their titles. The last word may be incomplete."""
        return _request("GET", "/entities", Entities, params={"query": query, "limit": limit})

    @_Operation
    def sample_entities(self, *, limit: int = 20) -> Request[Entities]:
        """Return entities spread evenly over the catalog."""
        return _request("GET", "/examples", Entities, params={"limit": limit})

    @_Operation
    def get_thumbnail(self, entity_id: str) -> Request[bytes]:
        """Return the thumbnail of an entity, a WebP file. Raises `NotFound` if it has none."""
        url = f"{_entity_url(entity_id)}/thumbnail"
        return Request(method="GET", url=url, read=lambda response: response.content, content={})

    @_Operation
    def put_entity(
        self, entity_id: str, entity: EntityRequest, image: Image | Sequence[Image] | None = None
    ) -> Request[EditedEntity]:
        """Add or replace an entity, with any number of images, while serving. Needs the admin token."""
        record = entity.model_dump_json(exclude_defaults=True)
        several = image if isinstance(image, list | tuple) else [] if image is None else [image]
        images = cast(Sequence[Image], several)
        body: dict[str, Any]
        if not images:
            body = {"content": record, "headers": {"Content-Type": "application/json"}}
        elif all(map(_is_url, images)):
            body = {"json": {**entity.model_dump(exclude_defaults=True), "image": [{"url": each} for each in images]}}
        else:
            body = {"files": [("record", (None, record, "application/json")), *map(_image_part, images)]}
        return _request("PUT", _entity_url(entity_id), EditedEntity, admin=True, **body)

    @_Operation
    def add_image(
        self, entity_id: str, image: Image | None = None, *, embedding: Embedding | Iterable[float] | None = None
    ) -> Request[AddedImage]:
        """Add an image, or its embedding, to an entity while serving. Needs the admin token.

        Raises `NotFound` if there is no such entity, `Conflict` if an `Embedding` is by another encoder. A request that
        may have been received is not sent again.
        """
        url, body = f"{_entity_url(entity_id)}/images", _image_or_embedding(image, embedding)
        return _request("POST", url, AddedImage, admin=True, retries=_NOT_BEGUN, **body)

    @_Operation
    def remove_image(self, entity_id: str, image_id: str) -> Request[None]:
        """Remove an image that was added to an entity while serving. Needs the admin token.

        Raises `Conflict` for an image of the bundle, and for the only one of an entity that was put. Raises `NotFound`
        if there is none, which may be because an attempt whose answer was lost has removed it.
        """
        url = f"{_entity_url(entity_id)}/images/{quote(image_id, safe='')}"
        return Request(method="DELETE", url=url, read=lambda _: None, content={}, admin=True)

    @_Operation
    def delete_entity(self, entity_id: str) -> Request[None]:
        """Delete an entity while serving. Needs the admin token.

        Raises `NotFound` if there is none, which may be because an attempt whose answer was lost has deleted it.
        """
        return Request(method="DELETE", url=_entity_url(entity_id), read=lambda _: None, content={}, admin=True)

    @_Operation
    def swap_bundle(self, path: str, *, timeout_s: float = 600.0) -> Request[BundleChange]:
        """Let the service answer from another bundle, a folder on its machine or a URI. Needs the admin token.

        Loading may take `timeout_s` seconds. A swap that may have begun is not sent again.
        """
        body = {"json": {"path": path}, "timeout": timeout_s}
        return _request("POST", "/admin/bundle", BundleChange, admin=True, retries=_NOT_BEGUN, **body)

    @_Operation
    def feedback(
        self,
        entity_id: str,
        image: Image | None = None,
        options: EmbedOptions | None = None,
        *,
        embedding: Embedding | Iterable[float] | None = None,
    ) -> Request[Feedback]:
        """Tell the service which entity an image, or the image of an embedding, shows.

        Raises `NotFound` if there is no such entity, `Forbidden` if the service keeps no feedback. A request that may
        have been received is not sent again.
        """
        params, body = {**_query(options), "entity_id": entity_id}, _image_or_embedding(image, embedding)
        return _request("POST", "/feedback", Feedback, retries=_NOT_BEGUN, params=params, **body)

    @_Operation
    def info(self) -> Request[Info]:
        """Return what is served, and its limits."""
        return _request("GET", "/info", Info)

    @_Operation
    def live(self) -> Request[Liveness]:
        """Check once that the process answers."""
        return _request("GET", "/livez", Liveness, retries=_ONCE)

    @_Operation
    def ready(self) -> Request[Readiness]:
        """Check once that images can be recognised now. Raises `Unavailable` with the reason if not."""
        return _request("GET", "/readyz", Readiness, retries=_ONCE)


def _embedding_body(embedding: Embedding | Iterable[float]) -> dict[str, Any]:
    if isinstance(embedding, Embedding):
        query = EmbeddingQuery(embedding=list(embedding.embedding), encoder=embedding.encoder)
    else:
        query = EmbeddingQuery(embedding=[float(value) for value in embedding])
    return {"json": query.model_dump(exclude_none=True)}


def _image_or_embedding(image: Image | None, embedding: Embedding | Iterable[float] | None) -> dict[str, Any]:
    if image is not None and embedding is None:
        return _image_body(image)
    if embedding is not None and image is None:
        return _embedding_body(embedding)
    raise UserError("give either an image or an embedding")


def _query(options: EmbedOptions | None) -> dict[str, Any]:
    params: dict[str, Any] = {} if options is None else options.model_dump(exclude_defaults=True)
    if "box" in params:
        params["box"] = ",".join(str(side) for side in params["box"])
    return params


def _entity_url(entity_id: str) -> str:
    return f"/entities/{quote(entity_id, safe='')}"


def _is_url(image: Image) -> bool:
    return isinstance(image, str) and image.startswith(("http://", "https://"))


def _image_body(image: Image) -> dict[str, Any]:
    return {"json": {"image": {"url": image}}} if _is_url(image) else {"files": [_image_part(image)]}


def _image_part(image: Image) -> tuple[str, tuple[str, bytes, str]]:
    """Return an image as a part of a form. Its bytes are in memory, so that it can be sent again."""
    if _is_url(image):
        raise UserError(f"{image!r} is a URL; of several images each must be a file, so recognise it by itself")
    if isinstance(image, str | os.PathLike):
        data = Path(image).read_bytes()
    else:
        data = image if isinstance(image, bytes) else image.read()
    if not isinstance(data, bytes):
        raise UserError("the image's file is open as text; open it with mode 'rb'")
    return "image", ("image", data, "application/octet-stream")

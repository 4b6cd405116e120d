"""Routes that recognise images, look up entities and, with the admin token, change what is served."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from functools import partial
from http import HTTPStatus
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, Query, Request
from pydantic import BaseModel, Field, ValidationError
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from core.errors import BadParameter, BadRequest, Forbidden, NotFound, TooManyRequests, Unavailable, WikiclipError
from imaging import canonical_type, check_box
from index.store import StoredEntity, matched_language
from service import uploads
from service.auth import require_admin, require_key
from service.errors import problem_of, problems
from service.image_fetcher import ImageFetcher
from service.limits import RateLimiter, client_name
from service.loaded_bundle import BundleView
from service.recognizer import Recognizer
from service.telemetry import timed
from service.updates import Editor
from wikiclip.answers import (
    AddedImage,
    BatchRecognition,
    BundleChange,
    EditedEntity,
    Embedding,
    EmbeddingQuery,
    EmbedOptions,
    Entities,
    Entity,
    EntityDetails,
    EntityRequest,
    Feedback,
    FeedbackOptions,
    FoundEntity,
    Problem,
    Recognition,
    RecognizeOptions,
    TextQuery,
)

_MAX_BUNDLE_REQUEST_BYTES = 64 * 1024
_INLINE_BYTES = 1024**2  # parsed in some milliseconds; a thread costs half of one
_MAX_ID_CHARACTERS = 2000  # Encyclopedic-VQA's ids are URLs
_OTHER_ROUTES = re.compile(r"/(thumbnail|images/[^/]*)$")
_ADMIN_ONLY: dict[str, Any] = {"security": [{"admin": []}]}

T = TypeVar("T")
AnyQuery = TypeVar("AnyQuery", bytes, bytes | EmbeddingQuery, bytes | TextQuery)

recognition_router = APIRouter(dependencies=[Depends(require_key)], tags=["recognition"])
entity_router = APIRouter(dependencies=[Depends(require_key)], tags=["entities"])
admin_router = APIRouter(dependencies=[Depends(require_admin)], tags=["administration"])


async def any_recognizer(request: Request) -> Recognizer:
    """Return the app's recogniser, ready or not. Raises `Unavailable` while there is none."""
    recognizer: Recognizer | None = request.app.state.recognizer
    if recognizer is None:
        raise Unavailable("the bundle is being loaded; retry later or elsewhere")
    return recognizer


async def ready_recognizer(request: Request) -> Recognizer:
    """Return the app's recogniser. Raises `Unavailable` while it cannot answer."""
    recognizer = await any_recognizer(request)
    reason = recognizer.unready_reason
    if reason is not None:
        raise Unavailable(f"{reason}; retry later or elsewhere")
    return recognizer


async def checked_options(options: Annotated[RecognizeOptions, Query()]) -> RecognizeOptions:
    """Return the query parameters of a recognition. Raises `BadParameter` for a box outside the image."""
    if options.box is not None:
        check_box(options.box)
    return options


AnyRecognizer = Annotated[Recognizer, Depends(any_recognizer)]
ReadyRecognizer = Annotated[Recognizer, Depends(ready_recognizer)]
Options = Annotated[RecognizeOptions, Depends(checked_options)]


@recognition_router.post(
    "/recognize",
    summary="Name the entities in an image, or the one thing that several images show",
    responses=problems(400, 401, 403, 408, 409, 413, 415, 422, 429, 503, 504),
    openapi_extra=uploads.image_body(EmbeddingQuery, several=True),
)
async def recognize(request: Request, response: Response, options: Options, recognizer: ReadyRecognizer) -> Recognition:
    images = recognizer.images_of(options)
    is_form = uploads.is_form(_content_type(request))  # it may have several images
    if not is_form:
        await _apply_rate_limit(request, recognizer, images)
    query = await _read(request, recognizer, partial(uploads.query_of, max_images=recognizer.settings.view_limit))
    if isinstance(query, list):
        images = len(query)
        recognizer.check_views(images)
    if is_form:
        await _apply_rate_limit(request, recognizer, images)

    async def recognize_query() -> Recognition:
        if isinstance(query, list):
            return await recognizer.recognize_views(query, options)
        return await recognizer.recognize(await _fetched(request, query), options)

    with recognizer.admission.admit(images):
        recognition = await _while_connected(request, recognize_query())
    stages = (f"{stage};dur={value:.3f}" for stage, value in recognition.timings_ms.items())
    response.headers["Server-Timing"] = ", ".join(stages)
    return recognition.model_copy(update={"request_id": request.state.request_id})


@recognition_router.post(
    "/embed",
    summary="Get the query embedding of an image, or of an entity with a text and no image",
    responses=problems(400, 401, 403, 408, 413, 415, 422, 429, 503, 504),
    openapi_extra=uploads.image_body(TextQuery),
)
async def embed(request: Request, options: Annotated[EmbedOptions, Query()], recognizer: ReadyRecognizer) -> Embedding:
    query = await _read_query(request, recognizer, options, uploads.embeddable_of)

    async def embed_query(view: BundleView) -> Embedding:
        return await recognizer.embed(await _fetched(request, query), options.box, view)

    with recognizer.admission.admit(1), recognizer.acquire() as view:
        return await _while_connected(request, embed_query(view))


@recognition_router.post(
    "/feedback",
    summary="Tell which entity an image shows. Its embedding is kept, not the image",
    status_code=HTTPStatus.CREATED,
    responses=problems(400, 401, 403, 404, 408, 409, 413, 415, 422, 429, 503, 504),
    openapi_extra=uploads.image_body(EmbeddingQuery),
)
async def feedback(
    request: Request, options: Annotated[FeedbackOptions, Query()], recognizer: ReadyRecognizer
) -> Feedback:
    if recognizer.settings.feedback_file is None:
        raise Forbidden("feedback is off; set WIKICLIP_FEEDBACK_FILE to keep it")
    query = await _read_query(request, recognizer, options, uploads.reference_of)

    async def keep(view: BundleView) -> Feedback:
        return await recognizer.keep_feedback(await _fetched(request, query), options, view)

    with recognizer.admission.admit(1), recognizer.acquire() as view:
        return await _while_connected(request, keep(view))


@recognition_router.post(
    "/recognize/batch",
    summary="Name the entities in several images. Results are in order, and a bad image does not affect the others",
    responses=problems(400, 401, 408, 413, 415, 422, 429, 503),
    openapi_extra=uploads.images_body(),
)
async def recognize_batch(request: Request, options: Options, recognizer: ReadyRecognizer) -> BatchRecognition:
    if options.regions is not None:
        raise BadParameter("regions are found in one image at a time; leave out regions, or send each to /recognize")
    max_images = recognizer.settings.max_batch_images
    images = await _read(request, recognizer, partial(uploads.images_of, max_images=max_images))
    if len(images) > max_images:
        raise BadRequest(f"{len(images)} images; send at most {max_images} at a time")
    await _apply_rate_limit(request, recognizer, len(images))
    request_id = request.state.request_id

    async def result(image: bytes | WikiclipError, view: BundleView) -> Recognition | Problem:
        try:
            if isinstance(image, WikiclipError):
                raise image
            recognition = await recognizer.recognize(image, options, view)
        except WikiclipError as error:
            return problem_of(error, request_id)
        return recognition.model_copy(update={"request_id": request_id})

    async def results(view: BundleView) -> list[Recognition | Problem]:
        return await asyncio.gather(*(result(image, view) for image in images))

    # One view for all images: a bundle that is swapped meanwhile is for the next request.
    with recognizer.admission.admit(len(images)), recognizer.acquire() as view:
        return BatchRecognition(
            request_id=request_id,
            model=view.loaded.model,
            bundle=view.label,
            results=tuple(await _while_connected(request, results(view))),
        )


@entity_router.get("/entities", summary="Search entities by title", responses=problems(401, 422, 503))
def search_entities(
    recognizer: ReadyRecognizer,
    query: Annotated[
        str, Query(min_length=1, max_length=200, description="Words of a title. The last word may be incomplete.")
    ],
    limit: Annotated[int, Query(ge=1, le=100, description="Maximum number of entities.")] = 20,
) -> Entities:
    with recognizer.acquire() as view:
        found = view.entities.search_titles(query, limit)
    return Entities(entities=tuple(_found_entity(each, matched_language(each, query)) for each in found))


@entity_router.get(
    "/examples", summary="Get entities spread evenly over the catalog", responses=problems(401, 422, 503)
)
def sample_entities(
    recognizer: ReadyRecognizer,
    limit: Annotated[int, Query(ge=1, le=100, description="Maximum number of entities.")] = 20,
) -> Entities:
    with recognizer.acquire() as view:
        found = view.entities.sample(limit)
    return Entities(entities=tuple(_found_entity(each, None) for each in found))


def _found_entity(entity: StoredEntity, matched: str | None) -> FoundEntity:
    found = FoundEntity.model_validate(entity, from_attributes=True)
    return found.model_copy(update={"matched_language": matched})


@entity_router.get(
    # Before the route of the record, because an id may contain slashes.
    "/entities/{entity_id:path}/thumbnail",
    summary="Get the thumbnail of an entity",
    response_class=Response,
    responses={200: {"content": {"image/webp": {"schema": uploads.BINARY}}}, **problems(401, 404, 503)},
)
def get_thumbnail(entity_id: str, recognizer: ReadyRecognizer) -> Response:
    with recognizer.acquire() as view:
        thumbnail = view.entities.thumbnail(entity_id)
    if thumbnail is None:
        raise NotFound("the bundle has no thumbnail of this entity; show its symbol or title")
    # With live changes, the thumbnail may change at any time.
    cache_control = "public, max-age=3600" if view.entities.revision is None else "no-cache"
    headers = {"Cache-Control": cache_control, "ETag": f'"{view.label.rpartition("@")[2]}"'}
    return Response(thumbnail, media_type="image/webp", headers=headers)


@entity_router.get(
    "/entities/{entity_id:path}", summary="Get the record of an entity", responses=problems(401, 404, 503)
)
def get_entity(entity_id: str, recognizer: ReadyRecognizer) -> EntityDetails:
    with recognizer.acquire() as view:
        entity = Entity.model_validate(view.entities.get(entity_id), from_attributes=True)
        return EntityDetails(**dict(entity), image_ids=view.entities.image_ids(entity_id))


class BundleRequest(BaseModel):
    path: str = Field(
        min_length=1,
        max_length=4096,
        description="Folder of the bundle on the service's machine, or a URI such as s3://bucket/prefix.",
    )


@admin_router.post(
    "/admin/bundle",
    summary="Swap to another bundle without failing a request",
    responses=problems(400, 401, 403, 408, 409, 413, 422, 429, 503),
    openapi_extra={**_ADMIN_ONLY, **uploads.request_body({"application/json": BundleRequest.model_json_schema()})},
)
async def swap_bundle(request: Request, recognizer: AnyRecognizer) -> BundleChange:
    # FastAPI would read a body of any size, and before the dependency checks the token.
    body = await uploads.read_body(request, _MAX_BUNDLE_REQUEST_BYTES, recognizer.settings.receive_timeout_ms / 1000)
    try:
        path = BundleRequest.model_validate_json(body).path
    except ValidationError as error:
        raise BadParameter(f'{error.errors()[0]["msg"]}; send {{"path": "..."}}') from error
    return await recognizer.swap(path)


@admin_router.put(
    "/entities/{entity_id:path}",
    summary="Add or replace an entity while serving",
    responses={
        201: {"model": EditedEntity, "description": "The entity is new"},
        **problems(400, 401, 403, 408, 409, 413, 415, 422, 429, 503, 504),
    },
    openapi_extra={**_ADMIN_ONLY, **uploads.record_body(EntityRequest)},
)
async def put_entity(request: Request, response: Response, entity_id: str, recognizer: ReadyRecognizer) -> EditedEntity:
    if not entity_id.strip() or len(entity_id) > _MAX_ID_CHARACTERS or _OTHER_ROUTES.search(entity_id):
        raise BadParameter(
            f"an entity id has 1 to {_MAX_ID_CHARACTERS} characters and does not end in /thumbnail or /images/...; "
            "choose another"
        )
    record, images = await _read(request, recognizer, uploads.record_of)
    entity = uploads.validated(EntityRequest, record, "; see PUT /entities in /docs")
    with recognizer.admission.admit(1), recognizer.acquire() as view:
        editor = _editor(view)
        view.loaded.check_encoder(entity.encoder)
        fetched = [await _fetched(request, image) for image in images]
        change = partial(editor.put, entity_id, entity, fetched)
        edited, created = await _while_connected(request, recognizer.edit(view, change))
    if created:
        response.status_code = HTTPStatus.CREATED
    return edited


@admin_router.post(
    "/entities/{entity_id:path}/images",
    summary="Add an image, or its embedding, to an entity while serving",
    status_code=HTTPStatus.CREATED,
    responses=problems(400, 401, 403, 404, 408, 409, 413, 415, 422, 429, 503, 504),
    openapi_extra={**_ADMIN_ONLY, **uploads.image_body(EmbeddingQuery)},
)
async def add_image(request: Request, entity_id: str, recognizer: ReadyRecognizer) -> AddedImage:
    image = await _read(request, recognizer, uploads.reference_of)
    with recognizer.admission.admit(1), recognizer.acquire() as view:
        editor = _editor(view)
        if isinstance(image, EmbeddingQuery):
            view.loaded.check_encoder(image.encoder)
        text = (await asyncio.to_thread(view.entities.get, entity_id)).text or ""
        change = partial(editor.add_image, entity_id, await _fetched(request, image), text)
        return await _while_connected(request, recognizer.edit(view, change))


@admin_router.delete(
    # Before the route of the entity, because an id may contain slashes.
    "/entities/{entity_id:path}/images/{image_id}",
    summary="Remove an image that was added to an entity while serving",
    status_code=HTTPStatus.NO_CONTENT,
    responses=problems(401, 403, 404, 409, 429, 503, 504),
    openapi_extra=_ADMIN_ONLY,
)
async def remove_image(entity_id: str, image_id: str, recognizer: ReadyRecognizer) -> Response:
    with recognizer.admission.admit(1), recognizer.acquire() as view:
        await recognizer.edit(view, partial(_editor(view).live.remove_image, entity_id, image_id))
    return Response(status_code=HTTPStatus.NO_CONTENT)


@admin_router.delete(
    "/entities/{entity_id:path}",
    summary="Delete an entity while serving",
    status_code=HTTPStatus.NO_CONTENT,
    responses=problems(401, 403, 404, 429, 503, 504),
    openapi_extra=_ADMIN_ONLY,
)
async def delete_entity(entity_id: str, recognizer: ReadyRecognizer) -> Response:
    with recognizer.admission.admit(1), recognizer.acquire() as view:
        await recognizer.edit(view, partial(_editor(view).live.delete, entity_id))
    return Response(status_code=HTTPStatus.NO_CONTENT)


async def _fetched(request: Request, image: str | AnyQuery) -> bytes | AnyQuery:
    """Return what is at the URL if it is one."""
    if not isinstance(image, str):
        return image
    fetcher: ImageFetcher = request.app.state.fetcher
    with timed("fetch"):
        return await fetcher.fetch(image)


async def _read_query(
    request: Request, recognizer: Recognizer, options: EmbedOptions, read: Callable[[bytes, str], T]
) -> T:
    """Return what `read` makes of a body with one image, which is counted against the rate limit."""
    if options.box is not None:
        check_box(options.box)
    await _apply_rate_limit(request, recognizer, 1)
    return await _read(request, recognizer, read)


async def _read(request: Request, recognizer: Recognizer, read: Callable[[bytes, str], T]) -> T:
    """Return what `read` makes of a request's body, in a thread if it is so large that others would wait."""
    settings, content_type = recognizer.settings, _content_type(request)
    with timed("body"):
        try:
            body = await uploads.read_body(request, settings.max_body_bytes, settings.receive_timeout_ms / 1000)
        except TooManyRequests:
            recognizer.metrics.count_images("full")
            raise
    if len(body) <= _INLINE_BYTES or canonical_type(content_type) is not None:  # an image is not parsed here
        return read(body, content_type)
    return await asyncio.to_thread(read, body, content_type)


def _content_type(request: Request) -> str:
    return request.headers.get("content-type", "")


async def _apply_rate_limit(request: Request, recognizer: Recognizer, images: int) -> None:
    """Count images against the client's rate limit. Raises `TooManyRequests`."""
    limiter: RateLimiter | None = request.app.state.rate_limiter
    if limiter is not None:
        address = request.client.host if request.client else None
        try:
            await limiter.take(client_name(request.state.key_digest, address), images)
        except TooManyRequests:
            recognizer.metrics.count_images("rate", images)
            raise


async def _while_connected(request: Request, work: Awaitable[T]) -> T:
    """Await `work`, but cancel it if the client disconnects."""
    task = asyncio.current_task()
    assert task is not None
    disconnected = False

    async def watch() -> None:
        nonlocal disconnected
        # The body has been read, so the only message that can still come is the disconnect.
        while (await request.receive())["type"] != "http.disconnect":
            pass
        disconnected = task.cancel()

    watching = asyncio.create_task(watch())
    try:
        return await work
    except asyncio.CancelledError:
        if disconnected and task.uncancel() == 0:
            raise ClientDisconnect from None
        raise
    finally:
        watching.cancel()


def _editor(view: BundleView) -> Editor:
    if view.loaded.editor is None:
        raise Forbidden("live changes are off; set WIKICLIP_LIVE_DIR to allow them")
    return view.loaded.editor

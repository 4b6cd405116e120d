"""The routes that answer about images and entities."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, Query, Request
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from core.errors import BadRequest, NotFound, TooManyRequests, Unavailable, WikiclipError
from imaging import readable_types
from index.store import StoredEntity
from service import problems, schemas
from service.auth import require_key
from service.body import ImageUrl, image_of, images_of, read_body
from service.image_fetcher import ImageFetcher
from service.limits import RateLimiter, client_name
from service.loaded_bundle import BundleView
from service.query import options_of, query_parameters
from service.recognizer import Recognizer
from service.telemetry import timed
from wikiclip.answers import BatchRecognition, Entities, Entity, Problem, Recognition

T = TypeVar("T")


class DirectRoute(APIRoute):
    """A route whose function takes the request and reads from it what it needs, behind the same key as the others.

    The framework resolves parameters for every request, which takes longer than all else that it does; here it only
    documents them.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        async def answer(request: Request) -> Response:
            await require_key(request)
            response: Response = await self.endpoint(request)
            return response

        return answer


router = APIRouter(dependencies=[Depends(require_key)])
recognition = APIRouter(route_class=DirectRoute)


def json_response(content: BaseModel, headers: Mapping[str, str] | None = None, status: int = 200) -> Response:
    return Response(content.model_dump_json(), status, media_type="application/json", headers=dict(headers or {}))


def recognizer_of(request: Request) -> Recognizer:
    """The recogniser behind the app. Raises `Unavailable` while there is none that can answer."""
    recognizer: Recognizer | None = request.app.state.recognizer
    reason = "the bundle is being loaded" if recognizer is None else recognizer.unready_reason
    if recognizer is None or reason is not None:
        raise Unavailable(f"{reason}; try again later or elsewhere")
    return recognizer


@recognition.post(
    "/recognize",
    summary="Which entities are in this image",
    response_model=Recognition,
    responses=schemas.problems(400, 401, 403, 408, 413, 415, 422, 429, 503, 504),
    openapi_extra={"parameters": query_parameters(), **schemas.recognize_body(list(readable_types()))},
)
async def recognize(request: Request) -> Response:
    options = options_of(request)
    recognizer = recognizer_of(request)
    recognizer.admission.refuse_if_full(1)  # before its body is read
    await _count(request, 1)
    body = await _body(request, recognizer)
    given = image_of(body, request.headers.get("content-type", ""))
    fetcher: ImageFetcher = request.app.state.fetcher

    async def result() -> Recognition:
        if isinstance(given, ImageUrl):
            with timed("fetch"):
                image = await fetcher.fetch(given.url)
        else:
            image = given
        return await recognizer.recognize(image, options)

    with recognizer.admission.admit(1):
        recognition = await _while_connected(request, result())
    answer = recognition.model_copy(update={"request_id": request.state.request_id})
    return json_response(answer, {"Server-Timing": _server_timing(answer.timings_ms)})


@recognition.post(
    "/recognize/batch",
    summary="The same for several images at once, in order; one bad image spoils no other",
    response_model=BatchRecognition,
    responses=schemas.problems(400, 401, 408, 413, 415, 422, 429, 503),
    openapi_extra={"parameters": query_parameters(), **schemas.batch_body()},
)
async def recognize_batch(request: Request) -> Response:
    options = options_of(request)
    recognizer = recognizer_of(request)
    recognizer.admission.refuse_if_full(1)
    body = await _body(request, recognizer)
    images = images_of(body, request.headers.get("content-type", ""))
    if len(images) > recognizer.settings.max_batch_images:
        raise BadRequest(f"{len(images)} images; send at most {recognizer.settings.max_batch_images} at a time")
    await _count(request, len(images))
    request_id = request.state.request_id

    async def result(image: bytes | WikiclipError, view: BundleView) -> Recognition | Problem:
        try:
            if isinstance(image, WikiclipError):
                raise image
            recognition = await recognizer.recognize(image, options, view)
        except WikiclipError as error:
            return problems.problem_of(error, request_id)
        return recognition.model_copy(update={"request_id": request_id})

    async def all_results(view: BundleView) -> list[Recognition | Problem]:
        return await asyncio.gather(*(result(image, view) for image in images))

    # One state for all of them: a bundle swapped meanwhile is for the next request.
    with recognizer.admission.admit(len(images)), recognizer.acquire() as view:
        results = await _while_connected(request, all_results(view))
    return json_response(
        BatchRecognition(
            request_id=request_id,
            model=view.loaded.model,
            bundle=view.label,
            results=tuple(results),
        )
    )


@router.get(
    "/entities",
    summary="Entities by title",
    response_model=Entities,
    responses=schemas.problems(401, 422, 503),
)
def search_entities(
    request: Request,
    query: Annotated[
        str, Query(min_length=1, max_length=200, description="Words of a title; the last may be unfinished.")
    ],
    limit: Annotated[int, Query(ge=1, le=100, description="Entities, at most.")] = 20,
) -> Response:
    with recognizer_of(request).acquire() as view:
        found = view.entities.search_titles(query, limit)
    return json_response(Entities(entities=tuple(entity_answer(entity) for entity in found)))


@router.get(
    # Ids may hold slashes, so this stands before the route of the record.
    "/entities/{entity_id:path}/thumbnail",
    summary="A small picture of an entity",
    response_class=Response,
    responses={200: {"content": {"image/webp": {}}}, **schemas.problems(401, 404, 503)},
)
def get_thumbnail(request: Request, entity_id: str) -> Response:
    with recognizer_of(request).acquire() as view:
        thumbnail = view.entities.thumbnail(entity_id)
    if thumbnail is None:
        raise NotFound("the bundle has no thumbnail of this entity; show its symbol or title")
    # What may be changed at any time is asked for each time.
    keep = "public, max-age=3600" if view.delta is None else "no-cache"
    headers = {"Cache-Control": keep, "ETag": f'"{view.label.rpartition("@")[2]}"'}
    return Response(thumbnail, media_type="image/webp", headers=headers)


@router.get(
    "/entities/{entity_id:path}",
    summary="The record of an entity",
    response_model=Entity,
    responses=schemas.problems(401, 404, 503),
)
def get_entity(request: Request, entity_id: str) -> Response:
    with recognizer_of(request).acquire() as view:
        entity = view.entities.get(entity_id)
    return json_response(entity_answer(entity))


async def _body(request: Request, recognizer: Recognizer) -> bytes:
    with timed("body"):
        return await read_body(request, recognizer.settings.max_body_bytes, recognizer.settings.receive_timeout_s)


async def _count(request: Request, images: int) -> None:
    """Count images against the rate of who sends them, before they cost anything. Raises `TooManyRequests`."""
    limiter: RateLimiter | None = request.app.state.rate_limiter
    if limiter is not None:
        address = request.client.host if request.client else None
        try:
            await limiter.take(client_name(request.state.key_digest, address), images)
        except TooManyRequests:
            recognizer_of(request).metrics.count_images("rate", images)
            raise


def entity_answer(entity: StoredEntity) -> Entity:
    return Entity.model_validate(entity, from_attributes=True)


def _server_timing(timings_ms: Mapping[str, float]) -> str:
    return ", ".join([f"{stage};dur={value:.3f}" for stage, value in timings_ms.items()])


async def _while_connected(request: Request, work: Awaitable[T]) -> T:
    """Do `work` unless the client goes away first: then it is cancelled, and nothing is computed for nobody."""
    answering = asyncio.current_task()
    assert answering is not None, "a request is answered in a task"
    gone = False

    async def watch() -> None:
        nonlocal gone
        # The body has been read, so all that can still come is the news that the client has gone.
        while (await request.receive())["type"] != "http.disconnect":
            pass
        gone = answering.cancel()

    watching = asyncio.get_running_loop().create_task(watch())
    try:
        return await work
    except asyncio.CancelledError:
        if gone and answering.uncancel() == 0:
            raise ClientDisconnect from None
        raise
    finally:
        watching.cancel()

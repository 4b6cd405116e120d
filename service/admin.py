"""Routes that change what is served. They need the admin token."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, Depends, Request
from pydantic import ValidationError
from starlette.responses import Response

from core.errors import BadParameter, Forbidden, Unavailable
from service import schemas
from service.auth import require_admin
from service.body import ImageUrl, read_body, record_of
from service.image_fetcher import ImageFetcher
from service.loaded_bundle import BundleView
from service.recognizer import Recognizer
from service.routes import entity_answer, json_response, recognizer_of
from service.updates import Editor
from wikiclip.answers import BundleChange, EditedEntity

_MAX_BODY_BYTES = 64 * 1024
_MAX_ID_CHARACTERS = 2000  # Encyclopedic-VQA's ids are URLs

router = APIRouter(dependencies=[Depends(require_admin)])


@router.post(
    "/admin/bundle",
    summary="Swap to another bundle without failing a request",
    response_model=BundleChange,
    responses=schemas.problems(400, 401, 403, 408, 409, 413, 422, 503),
    openapi_extra={**schemas.ADMIN_ONLY, **schemas.json_body(schemas.BundleRequest)},
)
async def change_bundle(request: Request) -> Response:
    recognizer: Recognizer | None = request.app.state.recognizer
    if recognizer is None:
        raise Unavailable("the bundle is being loaded; try again later")
    path = (await _bundle_request(request, recognizer.settings.receive_timeout_s)).path
    previous = recognizer.label
    new = await recognizer.swap(path)
    current = new.view()
    return json_response(
        BundleChange(bundle=current.label, previous=previous, model=new.model, entities=current.entities.entity_count)
    )


@router.put(
    "/entities/{entity_id:path}",
    summary="Add or replace an entity while serving",
    response_model=EditedEntity,
    responses={
        201: {"model": EditedEntity, "description": "The entity is new"},
        **schemas.problems(400, 401, 403, 408, 413, 415, 422, 429, 503, 504),
    },
    openapi_extra={**schemas.ADMIN_ONLY, **schemas.entity_body()},
)
async def put_entity(request: Request, entity_id: str) -> Response:
    recognizer = recognizer_of(request)
    _check_id(entity_id)
    settings = recognizer.settings
    body = await read_body(request, settings.max_body_bytes, settings.receive_timeout_s)
    record, image = record_of(body, request.headers.get("content-type", ""))
    entity = _entity(record)
    with recognizer.admission.admit(1), recognizer.acquire() as view:
        editor = _editor(view)
        if isinstance(image, ImageUrl):
            fetcher: ImageFetcher = request.app.state.fetcher
            image_bytes: bytes | None = await fetcher.fetch(image.url)
        else:
            image_bytes = image
        put = await recognizer.edit(view, editor.put(entity_id, entity, image_bytes))
    answer = EditedEntity(**dict(entity_answer(put.entity)), bundle=view.label_at(put.revision))
    return json_response(answer, status=HTTPStatus.CREATED if put.created else HTTPStatus.OK)


@router.delete(
    "/entities/{entity_id:path}",
    summary="Delete an entity while serving",
    status_code=HTTPStatus.NO_CONTENT,
    responses=schemas.problems(401, 403, 404, 429, 503, 504),
    openapi_extra=schemas.ADMIN_ONLY,
)
async def delete_entity(request: Request, entity_id: str) -> Response:
    recognizer = recognizer_of(request)
    with recognizer.admission.admit(1), recognizer.acquire() as view:
        editor = _editor(view)
        await recognizer.edit(view, editor.delete(entity_id))
    return Response(status_code=HTTPStatus.NO_CONTENT)


def _editor(view: BundleView) -> Editor:
    if view.loaded.editor is None:
        raise Forbidden("live changes are off; set WIKICLIP_LIVE_DIR to allow them")
    return view.loaded.editor


def _check_id(entity_id: str) -> None:
    if not entity_id.strip() or entity_id.endswith("/thumbnail") or len(entity_id) > _MAX_ID_CHARACTERS:
        raise BadParameter(
            f"an entity id has 1 to {_MAX_ID_CHARACTERS} characters and does not end in /thumbnail; choose another"
        )


def _entity(record: Any) -> schemas.EntityRequest:
    try:
        return schemas.EntityRequest.model_validate(record)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "record"
        raise BadParameter(f"{field}: {first['msg']}; see PUT /entities in /docs") from error


async def _bundle_request(request: Request, timeout_s: float) -> schemas.BundleRequest:
    # FastAPI would read a body of any size, and before the dependency checks the token.
    body = await read_body(request, _MAX_BODY_BYTES, timeout_s)
    try:
        return schemas.BundleRequest.model_validate_json(body)
    except ValidationError as error:
        raise BadParameter(f'{error.errors()[0]["msg"]}; send {{"path": "..."}}') from error

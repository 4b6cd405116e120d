"""Routes that change what is served. They need the admin token."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, Field, ValidationError
from starlette.responses import Response

from core.errors import BadParameter, Forbidden, Unavailable
from service.auth import require_admin
from service.errors import problems
from service.loaded_bundle import BundleView
from service.recognizer import Recognizer
from service.routes import ReadyRecognizer, fetched
from service.updates import Editor, EntityRequest
from service.uploads import read_body, record_body, record_of, request_body
from wikiclip.answers import BundleChange, EditedEntity, Entity

_MAX_BODY_BYTES = 64 * 1024
_MAX_ID_CHARACTERS = 2000  # Encyclopedic-VQA's ids are URLs

_ADMIN_ONLY: dict[str, Any] = {"security": [{"admin": []}]}

router = APIRouter(dependencies=[Depends(require_admin)])


class BundleRequest(BaseModel):
    path: str = Field(
        min_length=1,
        max_length=4096,
        description="Folder of the bundle on the service's machine, or a URI such as s3://bucket/prefix.",
    )


@router.post(
    "/admin/bundle",
    summary="Swap to another bundle without failing a request",
    responses=problems(400, 401, 403, 408, 409, 413, 422, 503),
    openapi_extra={**_ADMIN_ONLY, **request_body({"application/json": BundleRequest.model_json_schema()})},
)
async def change_bundle(request: Request) -> BundleChange:
    recognizer: Recognizer | None = request.app.state.recognizer
    if recognizer is None:
        raise Unavailable("the bundle is being loaded; retry later")
    path = (await _bundle_request(request, recognizer.settings.receive_timeout_s)).path
    previous = recognizer.label
    new = await recognizer.swap(path)
    current = new.view()
    return BundleChange(
        bundle=current.label, previous=previous, model=new.model, entities=current.entities.entity_count
    )


@router.put(
    "/entities/{entity_id:path}",
    summary="Add or replace an entity while serving",
    responses={
        201: {"model": EditedEntity, "description": "The entity is new"},
        **problems(400, 401, 403, 408, 413, 415, 422, 429, 503, 504),
    },
    openapi_extra={**_ADMIN_ONLY, **record_body(EntityRequest)},
)
async def put_entity(request: Request, response: Response, entity_id: str, recognizer: ReadyRecognizer) -> EditedEntity:
    _check_id(entity_id)
    settings = recognizer.settings
    body = await read_body(request, settings.max_body_bytes, settings.receive_timeout_s)
    record, image = record_of(body, request.headers.get("content-type", ""))
    entity = _entity(record)
    with recognizer.admission.admit(1), recognizer.acquire() as view:
        editor = _editor(view)
        image_bytes = None if image is None else await fetched(request, image)
        put = await recognizer.edit(view, editor.put(entity_id, entity, image_bytes))
    if put.created:
        response.status_code = HTTPStatus.CREATED
    stored = Entity.model_validate(put.entity, from_attributes=True)
    return EditedEntity(**dict(stored), bundle=view.label_at(put.revision))


@router.delete(
    "/entities/{entity_id:path}",
    summary="Delete an entity while serving",
    status_code=HTTPStatus.NO_CONTENT,
    responses=problems(401, 403, 404, 429, 503, 504),
    openapi_extra=_ADMIN_ONLY,
)
async def delete_entity(entity_id: str, recognizer: ReadyRecognizer) -> Response:
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


def _entity(record: Any) -> EntityRequest:
    try:
        return EntityRequest.model_validate(record)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "record"
        raise BadParameter(f"{field}: {first['msg']}; see PUT /entities in /docs") from error


async def _bundle_request(request: Request, timeout_s: float) -> BundleRequest:
    # FastAPI would read a body of any size, and before the dependency checks the token.
    body = await read_body(request, _MAX_BODY_BYTES, timeout_s)
    try:
        return BundleRequest.model_validate_json(body)
    except ValidationError as error:
        raise BadParameter(f'{error.errors()[0]["msg"]}; send {{"path": "..."}}') from error

"""Every error as `application/problem+json` (RFC 9457)."""

import logging
import math
import re
from collections.abc import Mapping
from functools import cache
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from core import errors
from core.errors import BadParameter, BundleError, SlowRequest, TooLarge, TooManyRequests, Unauthorized, WikiclipError
from wikiclip.answers import Problem

_REQUEST_ERRORS: tuple[type[WikiclipError], ...] = (
    errors.BadRequest,
    errors.Unauthorized,
    errors.Forbidden,
    errors.NotFound,
    errors.UnknownEntity,
    errors.SlowRequest,
    errors.Conflict,
    errors.TooLarge,
    errors.UnsupportedMediaType,
    errors.HeadTooLarge,
    errors.UndecodableImage,
    errors.BadParameter,
    errors.BundleRefused,
    errors.NoEntitySide,
    errors.FetchFailed,
    errors.TooManyRequests,
    errors.Unavailable,
    errors.LiveDirError,
    errors.FeedbackFileError,
    errors.DeadlineExceeded,
)
_HTTP_DETAILS = {404: "there is no such page; see /docs", 405: "this path takes other methods; see Allow"}

log = logging.getLogger("wikiclip.service")


def problem_type(error: type[WikiclipError]) -> str:
    """Return the URL that explains a kind of error: a place on the documentation page."""
    return "/docs#problem-" + _kebab_case(error.__name__)


@cache
def _kebab_case(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "-", name).lower()


def problem_types() -> list[dict[str, Any]]:
    """Return every kind of error that a request can meet, for the documentation."""
    return [{"type": problem_type(kind), "title": kind.title, "status": kind.status} for kind in _REQUEST_ERRORS]


def problem_table() -> str:
    """Return the problem types as a Markdown table for the API description. Each type's URL leads to its row."""
    head = "Errors are `application/problem+json` (RFC 9457). Quote their `request_id` to the operator."
    lines = [head, "", "| Status | Title | Type |", "| --- | --- | --- |"]
    for each in problem_types():
        row_id = each["type"].partition("#")[2]
        lines.append(f'| {each["status"]} | {each["title"]} | <span id="{row_id}">`{each["type"]}`</span> |')
    return "\n".join(lines)


def problem_of(error: WikiclipError, request_id: str) -> Problem:
    # A bundle error names files of this machine.
    detail = "the bundle cannot be served; see the service's log" if isinstance(error, BundleError) else error.detail
    return Problem(
        type=problem_type(type(error)), title=error.title, status=error.status, detail=detail, request_id=request_id
    )


def problem_response(error: WikiclipError, request_id: str) -> Response:
    headers: dict[str, str] = {}
    if isinstance(error, TooManyRequests):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = 'Bearer realm="wikiclip"'
    if isinstance(error, TooLarge | SlowRequest):
        headers["Connection"] = "close"  # the rest of the body may be unread
    return _response(problem_of(error, request_id), headers)


def unexpected_response(request_id: str) -> Response:
    """Return the response to a bug. Details are in the log only."""
    detail = "the service failed, not the request; report the request_id to the operator"
    return _http_response(500, detail, request_id)


def install(app: FastAPI) -> None:
    """Register the handlers of the service's own errors, the framework's and invalid parameters."""

    async def on_wikiclip_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, WikiclipError)
        if error.status >= 500:
            # As text: a handler may keep records, and the error's traceback refers to the image.
            log.warning("%s: %s", type(error).__name__, str(error), extra={"request_id": request.state.request_id})
        return problem_response(error, request.state.request_id)

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        detail = _HTTP_DETAILS.get(error.status_code, HTTPStatus(error.status_code).phrase)
        return _http_response(error.status_code, detail, request.state.request_id, error.headers)

    async def on_invalid_parameter(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        reasons = (f"{'.'.join(str(part) for part in item['loc'][1:])}: {item['msg']}" for item in error.errors())
        return problem_response(BadParameter("; ".join(reasons)), request.state.request_id)

    app.add_exception_handler(WikiclipError, on_wikiclip_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(RequestValidationError, on_invalid_parameter)


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the `responses` of a route that may answer with these error statuses."""
    titles = {status: [kind.title for kind in _REQUEST_ERRORS if kind.status == status] for status in statuses}
    titles |= {500: [HTTPStatus(500).phrase]}
    content = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {status: {"description": ", or ".join(titles[status]), "content": content} for status in statuses}


def _http_response(status: int, detail: str, request_id: str, headers: Mapping[str, str] | None = None) -> Response:
    title = HTTPStatus(status).phrase
    problem = Problem(type="about:blank", title=title, status=status, detail=detail, request_id=request_id)
    return _response(problem, headers)


def _response(problem: Problem, headers: Mapping[str, str] | None = None) -> Response:
    return Response(
        problem.model_dump_json(), problem.status, headers=dict(headers or {}), media_type="application/problem+json"
    )

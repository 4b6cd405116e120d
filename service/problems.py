"""Every error as `application/problem+json` (RFC 9457), whoever raised it."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from core.errors import (
    BadParameter,
    BadRequest,
    BundleError,
    BundleRefused,
    Conflict,
    DeadlineExceeded,
    FetchFailed,
    Forbidden,
    HeadTooLarge,
    LiveDirError,
    NoEntitySide,
    SlowRequest,
    TooLarge,
    TooManyRequests,
    Unauthorized,
    Unavailable,
    UndecodableImage,
    UnknownEntity,
    UnsupportedMediaType,
    WikiclipError,
)
from wikiclip.answers import Problem

_MET_BY_REQUESTS: tuple[type[WikiclipError], ...] = (
    BadRequest,
    Unauthorized,
    Forbidden,
    UnknownEntity,
    SlowRequest,
    Conflict,
    TooLarge,
    UnsupportedMediaType,
    HeadTooLarge,
    UndecodableImage,
    BadParameter,
    BundleRefused,
    NoEntitySide,
    FetchFailed,
    TooManyRequests,
    Unavailable,
    LiveDirError,
    DeadlineExceeded,
)

KNOWN: tuple[type[Exception], ...] = (WikiclipError, HTTPException, RequestValidationError)

log = logging.getLogger("wikiclip.service")


def problem_type(error: type[WikiclipError]) -> str:
    """Where a kind of error is explained: a place on the documentation page."""
    return "/docs#problem-" + re.sub(r"(?<!^)(?=[A-Z])", "-", error.__name__).lower()


def problem_types() -> list[dict[str, Any]]:
    """Every kind of error a request can meet, for the documentation."""
    return [{"type": problem_type(kind), "title": kind.title, "status": kind.status} for kind in _MET_BY_REQUESTS]


def problem_of(error: WikiclipError, request_id: str) -> Problem:
    """The body of the answer to an error."""
    detail = error.detail
    if isinstance(error, BundleError):
        detail = "the bundle cannot be served; see the service's log"  # the message names files of this machine
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
    """The answer to a fault of ours: it tells nothing but the id to look for in the log."""
    return _response(
        Problem(
            type="about:blank",
            title="Internal Server Error",
            status=500,
            detail="something went wrong here, not with the request; quote the request_id to the operator",
            request_id=request_id,
        )
    )


def install(app: FastAPI) -> None:
    """Make `app` answer our own errors, the framework's and failed parameter checks alike."""
    for kind in KNOWN:
        app.add_exception_handler(kind, answer_to)


async def answer_to(request: Request, error: Exception) -> Response:
    """The answer to an error of one of the `KNOWN` kinds."""
    if isinstance(error, HTTPException):
        return _to_http_error(request, error)
    if isinstance(error, RequestValidationError):
        return _to_invalid_parameter(request, error)
    assert isinstance(error, WikiclipError)
    return _to_wikiclip_error(request, error)


def _to_wikiclip_error(request: Request, error: WikiclipError) -> Response:
    if error.status >= 500:
        log.warning("%s: %s", type(error).__name__, error, extra={"request_id": request.state.request_id})
    return problem_response(error, request.state.request_id)


def _to_http_error(request: Request, error: HTTPException) -> Response:
    title = HTTPStatus(error.status_code).phrase
    detail = {404: "no such page here; /docs lists what there is", 405: "this path takes other methods; see Allow"}
    problem = Problem(
        type="about:blank",
        title=title,
        status=error.status_code,
        detail=detail.get(error.status_code, title),
        request_id=request.state.request_id,
    )
    return _response(problem, error.headers)


def _to_invalid_parameter(request: Request, error: RequestValidationError) -> Response:
    reasons = (f"{'.'.join(str(part) for part in item['loc'][1:])}: {item['msg']}" for item in error.errors())
    return problem_response(BadParameter("; ".join(reasons)), request.state.request_id)


def _response(problem: Problem, headers: Mapping[str, str] | None = None) -> Response:
    return Response(
        problem.model_dump_json(), problem.status, headers=dict(headers or {}), media_type="application/problem+json"
    )

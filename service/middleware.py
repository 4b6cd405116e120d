"""ASGI middleware around every request: request id, security headers, access log, metrics, traces, internal errors, and
refusals while the service is full.
"""

import logging
import random
import re
import time
from collections.abc import Iterable
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from core.errors import TooManyRequests
from service.errors import problem_response, unexpected_response
from service.recognizer import Recognizer
from service.telemetry import PROBE_PATHS, Tracing

RECOGNITION_PATHS = frozenset(("/recognize", "/recognize/batch"))

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_random = random.Random()  # ids must be unique, not secret: no system call for each
_CLIENT_CLOSED_REQUEST = 499  # nginx's status for the log; no client receives it

# blob: and data: are images that the user picked or dropped, and what the page draws on a canvas.
_CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self' data:; "
    "font-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_SECURITY_HEADERS = (
    (b"content-security-policy", _CONTENT_SECURITY_POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
)

access_log = logging.getLogger("wikiclip.access")
log = logging.getLogger("wikiclip.service")


class RequestContext:
    """Gives each request an id and its response the common headers, then logs, counts and traces it.

    While the service is full, recognition requests get 429 before routing and before their bodies are read: under
    overload, most requests end here.

    This is a plain ASGI class. Starlette's `BaseHTTPMiddleware` would hide client disconnects.
    """

    def __init__(self, app: ASGIApp, *, tracing: Tracing | None = None) -> None:
        self._app = app
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = request_id_of(scope["headers"])
        scope.setdefault("state", {}).update(request_id=request_id, body_bytes=0)
        if self._tracing is None:
            await self._respond(scope, receive, send, request_id)
            return
        with self._tracing.request(scope, request_id) as set_response:
            status = await self._respond(scope, receive, send, request_id)
            set_response(_route(scope), status)

    async def _respond(self, scope: Scope, receive: Receive, send: Send, request_id: str) -> int:
        """Run the app and return the response's status, 0 if there was no response."""
        started_at = time.monotonic()
        state = scope["app"].state
        recognizer: Recognizer | None = state.recognizer
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *common_headers(request_id)]
            await send(message)

        try:
            if recognizer is not None and scope["method"] == "POST" and scope["path"] in RECOGNITION_PATHS:
                recognizer.admission.refuse_if_full(1)
            await self._app(scope, receive, send_with_headers)
        except TooManyRequests as error:  # from refuse_if_full: the app answers those that it raises
            response = problem_response(error, request_id)
            if "expect" in Headers(scope=scope):
                # The client may send its body or not, so the next bytes could be a body or a request.
                response.headers["Connection"] = "close"
            await response(scope, receive, send_with_headers)
        except ClientDisconnect:
            status = _CLIENT_CLOSED_REQUEST
        except Exception:
            log.exception("unexpected error", extra={"request_id": request_id})
            if status:
                raise  # the response has begun: the server can only close the connection
            await unexpected_response(request_id)(scope, receive, send_with_headers)
        finally:
            state.body_budget.give_back(scope["state"]["body_bytes"])
            elapsed_s = time.monotonic() - started_at
            state.metrics.observe_request(_route(scope), status, elapsed_s)
            _log_access(scope, request_id, status, elapsed_s)
        return status


def request_id_of(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """Return the client's X-Request-ID if it is well-formed, else a new id. Header names are in lower case."""
    for name, value in headers:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            return value.decode("ascii")
    return new_request_id()


def new_request_id() -> str:
    return f"{_random.getrandbits(128):032x}"


def common_headers(request_id: str) -> list[tuple[bytes, bytes]]:
    """Return the headers of every response."""
    return [(b"x-request-id", request_id.encode()), *_SECURITY_HEADERS]


def _log_access(scope: Scope, request_id: str, status: int, elapsed_s: float) -> None:
    level = logging.DEBUG if scope["path"] in PROBE_PATHS and status < HTTPStatus.BAD_REQUEST else logging.INFO
    if access_log.isEnabledFor(level):
        method, path, client = scope["method"], scope["path"], scope.get("client")
        fields = {"request_id": request_id, "method": method, "path": path, "status": status}
        fields |= {"elapsed_ms": round(1000 * elapsed_s, 2), "client": client[0] if client else None}
        access_log.log(level, "%s %s %d", method, path, status, extra=fields)


def _route(scope: Scope) -> str:
    """Return the route's template. Raw paths contain entity ids and would create millions of metric series."""
    path = getattr(scope.get("route"), "path", None)
    if path is None and scope["path"] in RECOGNITION_PATHS:
        return str(scope["path"])  # refused before routing
    return path or "unmatched"

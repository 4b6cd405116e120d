"""What happens around every request: its id, security headers, the access log, metrics, and faults of ours."""

from __future__ import annotations

import logging
import random
import re
import time
from collections.abc import Callable, Iterable

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.problems import unexpected_response
from service.telemetry import Metrics, Tracing

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_ids = random.Random()
_CLIENT_GONE = 499  # as nginx logs it; nobody receives it

# The page draws on a canvas and shows what the user picked (blob:); nothing is loaded from elsewhere.
_CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
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
    """ASGI middleware; a plain one, since Starlette's base class hides a client's leaving."""

    def __init__(
        self,
        app: ASGIApp,
        metrics_of: Callable[[], Metrics],
        tracing: Tracing | None = None,
    ) -> None:
        self._app = app
        self._tracing = tracing
        self._metrics_of = metrics_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = request_id_of(scope["headers"])
        scope.setdefault("state", {})["request_id"] = request_id
        if self._tracing is None:
            await self._answer(scope, receive, send, request_id)
            return
        with self._tracing.request(scope, request_id) as trace:
            status = await self._answer(scope, receive, send, request_id)
            if trace is not None:
                trace.set_response(_route(scope), status)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, request_id: str) -> int:
        """Have the request answered; the status, 0 where none was sent."""
        started_at = time.monotonic()
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = with_common_headers(message["headers"], request_id)
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except ClientDisconnect:
            status = _CLIENT_GONE
        except Exception:
            log.exception("unexpected error", extra={"request_id": request_id})
            if status:
                raise  # the answer has begun: all that is left is to break the connection
            await unexpected_response(request_id)(scope, receive, send_with_headers)
        finally:
            elapsed_s = time.monotonic() - started_at
            note_request(self._metrics_of(), scope, _route(scope), request_id, status, elapsed_s)
        return status


def request_id_of(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The id that the client gave, where it is a plain one, else a new one. Names of headers are in lower case."""
    given = next((value for name, value in headers if name == b"x-request-id"), b"")
    return given.decode("ascii") if _REQUEST_ID.fullmatch(given) else new_request_id()


def new_request_id() -> str:
    """It is to be told from others, not to be kept from anyone: drawn without asking the kernel each time."""
    return f"{_ids.getrandbits(128):032x}"


def with_common_headers(headers: Iterable[tuple[bytes, bytes]], request_id: str) -> list[tuple[bytes, bytes]]:
    """The headers of an answer with those that every answer has, but for what it says otherwise itself."""
    own = list(headers)
    given = [name for name, _ in own]
    security = [header for header in _SECURITY_HEADERS if header[0] not in given]
    return [*own, (b"x-request-id", request_id.encode()), *security]


def note_request(metrics: Metrics, scope: Scope, route: str, request_id: str, status: int, elapsed_s: float) -> None:
    """Count a request, and write it to the access log."""
    metrics.observe_request(route, status, elapsed_s)
    if not access_log.isEnabledFor(logging.INFO):
        return
    client = scope.get("client")
    access_log.info(
        "%s %s %d",
        scope["method"],
        scope["path"],
        status,
        extra={
            "request_id": request_id,
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "elapsed_ms": round(1000 * elapsed_s, 2),
            "client": client[0] if client else None,
        },
    )


def _route(scope: Scope) -> str:
    """The route's template, not the path: a path holds entity ids, and there are millions of them."""
    return getattr(scope.get("route"), "path", None) or "unmatched"

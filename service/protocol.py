"""HTTP as uvicorn speaks it, with bounds on what comes before a body: the head of a request, its size and its time.

The app bounds the body; before there is a head there is no app to ask.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable
from typing import Any, cast

from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from core.errors import BadRequest, HeadTooLarge, SlowRequest, UserError
from service.metrics import Metrics
from service.middleware import note_request, request_id_of, with_common_headers
from service.problems import problem_response

MAX_HEAD_BYTES = 64 * 1024


class BoundedHttp(HttpToolsProtocol):
    """A connection must bring a whole head within `timeout_s` of its first byte, the first head of connecting, or it is
    closed; so is one that goes on with a body for longer than that after its answer. Between requests uvicorn's own
    keep-alive timeout holds."""

    def __init__(
        self,
        *arguments: Any,
        timeout_s: float,
        refuse: Callable[[Scope], UserError | None],
        metrics_of: Callable[[], Metrics],
        **named: Any,
    ) -> None:
        """What `refuse` gives for a head is answered in place of the app."""
        super().__init__(*arguments, **named)
        self._timeout_s = timeout_s
        self._refuse_early = refuse
        self._metrics_of = metrics_of
        self._timer: asyncio.TimerHandle | None = None
        self._in_head = True
        self._head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._head_bytes += len(data)
            self._start_timer()
        super().data_received(data)
        if self._in_head and self._head_bytes > MAX_HEAD_BYTES:
            self._refuse(HeadTooLarge(f"the head of the request is over {MAX_HEAD_BYTES} bytes; send less"))

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_timer()
        super().on_headers_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        started_at = time.monotonic()
        scope = cast(Scope, cycle.scope)
        error = self._refuse_early(scope)
        if error is None:
            super()._start_asgi_task(cycle, app)
            return
        request_id = request_id_of(scope)
        self._write(error, request_id, keep_alive=cycle.keep_alive)
        cycle.response_started = cycle.response_complete = True
        if not cycle.keep_alive:
            self.transport.close()
        self.on_response_complete()
        elapsed_s = time.monotonic() - started_at
        note_request(self._metrics_of(), scope, scope["path"], request_id, error.status, elapsed_s)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._stop_timer()
        self._in_head, self._head_bytes = True, 0

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._in_head:
            self._start_timer()  # answered before all of the body had come: the rest has its time, too

    def send_400_response(self, msg: str) -> None:
        self._refuse(BadRequest("this is no HTTP request that can be read; check what sends it"))

    def _start_timer(self) -> None:
        if self._timer is None and not self.transport.is_closing():
            self._timer = self.loop.call_later(self._timeout_s, self._on_timeout)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_timeout(self) -> None:
        self._timer = None
        if self._in_head and self._head_bytes:
            self._refuse(SlowRequest(f"the head of the request did not come within {self._timeout_s:g} s; send faster"))
        else:
            self.transport.close()  # nobody asked anything, or has the answer already

    def _refuse(self, error: UserError) -> None:
        """Answer in place of the app and close. Without a word where an answer to an earlier request is under way."""
        if not self.transport.is_closing() and (self.cycle is None or self.cycle.response_complete):
            self._write(error, uuid.uuid4().hex, keep_alive=False)
        self.transport.close()

    def _write(self, error: UserError, request_id: str, *, keep_alive: bool) -> None:
        response = problem_response(error, request_id)
        headers = [*self.server_state.default_headers, *with_common_headers(response.raw_headers, request_id)]
        if not keep_alive and "connection" not in response.headers:
            headers.append((b"connection", b"close"))
        lines = b"".join(name + b": " + value + b"\r\n" for name, value in headers)
        self.transport.write(STATUS_LINE[error.status] + lines + b"\r\n" + bytes(response.body))

"""HTTP as uvicorn speaks it, with bounds on what comes before a body: the head of a request, its size and its time.

The app bounds the body; before there is a head there is no app to ask.
"""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from core.errors import BadRequest, HeadTooLarge, SlowRequest, UserError
from service.problems import problem_response

MAX_HEAD_BYTES = 64 * 1024


class BoundedHttp(HttpToolsProtocol):
    """A connection must bring a whole head within `timeout_s` of its first byte, the first head of connecting, or it is
    closed; so is one that goes on with a body for longer than that after its answer. Between requests uvicorn's own
    keep-alive timeout holds."""

    def __init__(self, *arguments: Any, timeout_s: float, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._timeout_s = timeout_s
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
            request_id = uuid.uuid4().hex
            response = problem_response(error, request_id)
            response.headers["Connection"] = "close"
            response.headers["X-Request-ID"] = request_id
            headers = b"".join(name + b": " + value + b"\r\n" for name, value in response.raw_headers)
            self.transport.write(STATUS_LINE[error.status] + headers + b"\r\n" + bytes(response.body))
        self.transport.close()

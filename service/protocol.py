"""Limits that uvicorn lacks: on the size and time of a request head, and on the time of a body that continues after its
response.

This is the only module that depends on uvicorn's private classes. It is written for uvicorn 0.54; pyproject.toml pins
that minor version.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from core.errors import BadRequest, HeadTooLarge, SlowRequest, UserError
from service.errors import problem_response
from service.middleware import common_headers, new_request_id

MAX_HEAD_BYTES = 64 * 1024


class GuardedHttpProtocol(HttpToolsProtocol):
    """An HTTP/1.1 connection that closes when its client is too slow or its request head too large.

    A request head must arrive within `timeout_s` of its first byte, the first head within `timeout_s` of connecting.
    If a response is sent before the request body is complete, the rest of the body must arrive within `timeout_s`.
    Between requests, uvicorn's keep-alive timeout applies.
    """

    def __init__(self, *arguments: Any, timeout_s: float, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._timeout_s = timeout_s
        self._timer: asyncio.TimerHandle | None = None
        self._in_head = True
        self._head_bytes = 0

    @property
    def _idle(self) -> bool:
        """True if every request so far has its response."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if not self._in_head:
            if self._idle:
                self._start_timer()
        elif self._head_bytes:
            self._start_timer()
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(HeadTooLarge(f"the request head is over {MAX_HEAD_BYTES} bytes; send less"))
        elif self._idle and self.timeout_keep_alive_task is None and not self.transport.is_closing():
            # uvicorn stops its keep-alive timer when the rest of a body arrives after the response, and never
            # starts it again.
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

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
            self._start_timer()

    def send_400_response(self, msg: str) -> None:
        self._refuse(BadRequest("this is not a valid HTTP request; check the client"))

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
            self._refuse(SlowRequest(f"the request head did not arrive within {self._timeout_s:g} s; send faster"))
        else:
            self.transport.close()

    def _refuse(self, error: UserError) -> None:
        """Send an error response and close. Close without one if an earlier request is still being answered."""
        if self._idle and not self.transport.is_closing():
            request_id = new_request_id()
            response = problem_response(error, request_id)
            headers = [*self.server_state.default_headers, *response.raw_headers, *common_headers(request_id)]
            if "connection" not in response.headers:
                headers.append((b"connection", b"close"))
            lines = [name + b": " + value + b"\r\n" for name, value in headers]
            self.transport.write(b"".join([STATUS_LINE[error.status], *lines, b"\r\n", bytes(response.body)]))
        self.transport.close()

"""Limits that uvicorn lacks: on the size and time of a request head, on pipelined requests, on the time of a body that
continues after its response, and on the time that a client takes to read.

This is the only module that depends on uvicorn's private classes. It is written for uvicorn 0.54; pyproject.toml pins
that minor version.
"""

import asyncio
import math
import socket
import sys
from typing import Any

import httptools
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from core.errors import BadRequest, HeadTooLarge, SlowRequest, UserError
from service.errors import problem_response
from service.middleware import common_headers, new_request_id

MAX_HEAD_BYTES = 64 * 1024
MAX_HEADERS = 128
_PIECE_BYTES = 1024  # parsed at a time outside of bodies; this bounds how many requests one packet can begin
_LINGER_S = 1.0  # an error response is lost if the connection is closed while the client still sends
_FRAMING = (b"content-length", b"transfer-encoding")


class _Flow(FlowControl):
    """uvicorn's flow control, which reads on only if everything that was read before is parsed."""

    held = False

    def resume_reading(self) -> None:
        if not self.held:
            super().resume_reading()


class GuardedHttpProtocol(HttpToolsProtocol):
    """An HTTP/1.1 connection that closes when its client is too slow, or sends more than a request may have.

    - A request head must arrive within `timeout_s` of its first byte, the first head within `timeout_s` of connecting.
      If a response is sent before the request body is complete, the rest of the body must arrive within `timeout_s`.
      Between requests, uvicorn's keep-alive timeout applies.
    - A head has at most `MAX_HEAD_BYTES` and `MAX_HEADERS`. `MAX_HEAD_BYTES` also limits what a body contains between
      two pieces of content: sizes and extensions of chunks, and trailers.
    - Pipelined requests wait unparsed until those before them have their responses, and no more are read.
    - A client that receives nothing for `timeout_s`, although responses wait for it, is disconnected (on Linux).
    - `Upgrade` is ignored, as RFC 9110 permits. httptools would take what follows the head for another protocol.
    """

    flow: _Flow

    def __init__(self, *arguments: Any, timeout_s: float, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._timeout_s = timeout_s
        self._timer: asyncio.TimerHandle | None = None
        self._unparsed = memoryview(b"")
        self._in_head = True
        self._head_bytes = 0  # since the head began, or since the last content of the body
        self._body_left_bytes = 0  # of a Content-Length
        self._refused = False
        self._active: RequestResponseCycle | None = None

    @property
    def _idle(self) -> bool:
        """True if every request so far has its response."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = _Flow(transport)
        if sys.platform == "linux":
            # The kernel ends a connection whose client has received nothing for that long, although data waits for it.
            client: socket.socket = transport.get_extra_info("socket")
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, math.ceil(1000 * self._timeout_s))
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._unset_keepalive_if_required()  # uvicorn does so only for connections that end without an error
        self._unparsed = memoryview(b"")
        if self._active is not None and not self._active.response_complete:  # uvicorn tells only the last request
            self._active.disconnected = True
            self._active.message_event.set()
        super().connection_lost(exc)

    # ---- receiving ----

    def data_received(self, data: bytes) -> None:
        if not self._refused:
            self._unparsed = memoryview(bytes(self._unparsed) + data if self._unparsed else data)
            self._parse()

    def _parse(self) -> None:
        """Parse what has been read, but no further request while one waits for its response."""
        while self._unparsed and (self._idle or not self._in_head) and not self._ended:
            self._unset_keepalive_if_required()
            self._parse_piece(self._body_left_bytes or _PIECE_BYTES)
        if self._ended:
            return
        was_held, self.flow.held = self.flow.held, bool(self._unparsed)
        if self.flow.held:
            self.flow.pause_reading()
            return
        if was_held:
            self.flow.resume_reading()
        if self._idle and (self._head_bytes or not self._in_head):
            self._start_timer()
        elif self._idle and self._timer is None and self.timeout_keep_alive_task is None:
            # uvicorn starts its keep-alive timer after the response, but its request body may end later.
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def _parse_piece(self, size: int) -> None:
        unparsed = self._unparsed
        piece, self._unparsed = unparsed[:size], unparsed[size:]
        self._head_bytes += len(piece)
        try:
            self.parser.feed_data(piece)
        except httptools.HttpParserUpgrade as upgrade:
            # The parser has ended the message after its head. Let it continue with the body.
            self._unparsed = unparsed[upgrade.args[0] :]
            framing = [name + b": " + value for name, value in self.headers if name in _FRAMING]
            self.parser.feed_data(b"\r\n".join([b"POST / HTTP/1.1", *framing, b"\r\n"]))
        except httptools.HttpParserError as error:
            reason = error.__context__  # what a callback raised
            invalid = BadRequest("this is not a valid HTTP request; check the client")
            self._refuse(reason if isinstance(reason, UserError) else invalid)
        if self._head_bytes > MAX_HEAD_BYTES:
            part = "request head" if self._in_head else "framing of the request body"
            self._refuse(HeadTooLarge(f"the {part} is over {MAX_HEAD_BYTES} bytes; send less"))

    # The parser's callbacks. Outside of a head, it reports trailers, and the head that `_parse_piece` repeats.

    def on_message_begin(self) -> None:
        if self._in_head:
            super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        if self._in_head:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:
            if len(self.headers) == MAX_HEADERS:
                raise HeadTooLarge(f"the request has over {MAX_HEADERS} headers; send fewer")
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._in_head:
            super().on_headers_complete()
            self._in_head, self._head_bytes = False, 0
            self._body_left_bytes = next((int(value) for name, value in self.headers if name == b"content-length"), 0)
            self._stop_timer()

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        self._head_bytes = 0
        self._body_left_bytes = max(0, self._body_left_bytes - len(body))

    def on_message_complete(self) -> None:
        if not self.parser.should_upgrade():
            super().on_message_complete()
            self._in_head, self._head_bytes = True, 0
            self._stop_timer()

    # ---- responding ----

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._active = cycle
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.transport.is_closing():
            self._parse()

    def resume_writing(self) -> None:
        if not self.transport.is_closing():  # uvloop resumes when it discards what is unsent, and fails later writes
            super().resume_writing()

    # ---- ending ----

    @property
    def _ended(self) -> bool:
        return self._refused or self.transport.is_closing()

    def _start_timer(self) -> None:
        if self._timer is None and not self._ended:
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
        """Send an error response and close, or close without one if a response has begun or is due before it."""
        if self._ended:
            return
        if not self._idle and (self._in_head or self.pipeline or self.cycle.response_started):
            self.transport.close()
            return
        if not self._idle:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        elif not self._in_head:
            self.transport.close()  # the request has its response
            return
        request_id = new_request_id()
        response = problem_response(error, request_id)
        headers = [*self.server_state.default_headers, *response.raw_headers, *common_headers(request_id)]
        if "connection" not in response.headers:
            headers.append((b"connection", b"close"))
        lines = [name + b": " + value + b"\r\n" for name, value in headers]
        self.transport.write(b"".join([STATUS_LINE[error.status], *lines, b"\r\n", bytes(response.body)]))
        self._refused = True
        self._unparsed = memoryview(b"")
        self._stop_timer()
        self.flow.held = False
        self.flow.resume_reading()
        self.transport.write_eof()
        self._timer = self.loop.call_later(_LINGER_S, self.transport.close)

"""HTTP as uvicorn speaks it, with bounds on what comes before a body: the head of a request, its size and its time.

The app bounds the body; before there is a head there is no app to ask.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from core.errors import BadRequest, HeadTooLarge, SlowRequest, TooManyRequests, UserError
from service.middleware import new_request_id, note_request, request_id_of, with_common_headers
from service.problems import problem_response
from service.telemetry import Metrics

if TYPE_CHECKING:
    from uvicorn._types import ASGI3Application

MAX_HEAD_BYTES = 64 * 1024
_BODY_BYTES = 1024**2  # of a body that are kept before the app is told of them
_SMALL_BYTES = 4096  # of a piece of a body
_GO_ON = b"HTTP/1.1 100 "  # before a body, not an answer
_ANY_ID = "0" * 32  # stands for an id of a request where answers are prepared


class Head(NamedTuple):
    """The head of a request, as far as it decides whether it is refused before there is a request to the app."""

    method: bytes
    target: bytes  # path and query
    headers: Sequence[tuple[bytes, bytes]]  # names in lower case

    @property
    def path(self) -> bytes:
        return self.target.partition(b"?")[0]


class BoundedHttp(HttpToolsProtocol):
    """A connection must bring a whole head within `timeout_s` of its first byte, the first head of connecting, or it is
    closed; so is one that goes on with a body for longer than that after its answer. Between requests uvicorn's own
    keep-alive timeout holds."""

    def __init__(
        self,
        *arguments: Any,
        timeout_s: float,
        refuse: Callable[[Head], TooManyRequests | None],
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
        super().data_received(data)
        if not self._in_head:
            if self._answered:
                self._start_timer()  # answered before all of the body had come: the rest has its time, too
        elif self._head_bytes:
            self._start_timer()
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(HeadTooLarge(f"the head of the request is over {MAX_HEAD_BYTES} bytes; send less"))
        elif self._answered and self.timeout_keep_alive_task is None and not self.transport.is_closing():
            # uvicorn counts the idle time from an answer, and no longer once the rest of a body came after it.
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    @property
    def _answered(self) -> bool:
        """Whether nothing is being answered: what was refused early has no cycle of its own."""
        return self.cycle is None or self.cycle.response_complete

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_timer()
        if self._answered:
            head = Head(self.parser.get_method(), self.url, self.headers)
            refusal = self._refuse_early(head)
            if refusal is not None:
                self._answer_refused(head, refusal)
                return
        super().on_headers_complete()
        if self.scope["method"] != "HEAD":
            self.cycle.transport = _HeadWithBody(self.transport)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        # A turn later: what the client has sent of the body by now is read first, and the app need not wait for it.
        self.loop.call_soon(super()._start_asgi_task, cycle, app)

    def _answer_refused(self, head: Head, error: TooManyRequests) -> None:
        started_at = time.monotonic()
        self.server_state.total_requests += 1
        # Who waits to be told to send a body may send it or not: what comes next would be anybody's guess.
        may_go_on = self.parser.get_http_version() != "1.0" and not self.expect_100_continue
        keep_alive = may_go_on and self.parser.should_keep_alive()
        request_id = request_id_of(head.headers)
        if len(request_id) == len(_ANY_ID):
            around_id = _refusal_around_id(error.detail, error.retry_after_s, keep_alive)
            self._write(error.status, request_id.encode().join(around_id))
        else:
            self._write(error.status, _rendered(error, request_id, keep_alive))
        if not keep_alive:
            self.transport.close()
        path = head.path.decode("ascii")
        self.scope["method"], self.scope["path"] = head.method.decode("ascii"), path
        elapsed_s = time.monotonic() - started_at
        note_request(self._metrics_of(), cast(Scope, self.scope), path, request_id, error.status, elapsed_s)

    def on_body(self, body: bytes) -> None:
        if self._answered:
            return
        pieces: bytearray | _Pieces = self.cycle.body
        if not isinstance(pieces, _Pieces):  # the first, or the app has taken what there was
            pieces = _Pieces()
            self.cycle.body = cast(bytearray, pieces)  # of which uvicorn makes `bytes`, and no more
        pieces.append(body)
        if pieces.size_bytes > _BODY_BYTES:
            self.flow.pause_reading()
            self.cycle.message_event.set()

    def on_message_complete(self) -> None:
        if not self._answered:
            super().on_message_complete()
        self._stop_timer()
        self._in_head, self._head_bytes = True, 0

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._in_head:
            self._start_timer()

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
        if not self.transport.is_closing() and self._answered:
            self._write(error.status, _rendered(error, new_request_id(), keep_alive=False))
        self.transport.close()

    def _write(self, status: int, rest: bytes) -> None:
        default = b"".join(name + b": " + value + b"\r\n" for name, value in self.server_state.default_headers)
        self.transport.write(STATUS_LINE[status] + default + rest)


class _Pieces:
    """The body of a request as it came, where uvicorn keeps a bytearray: joined once, when the app takes it.

    Small pieces are joined at once, so that a body takes little more memory than it has bytes, however it comes.
    """

    def __init__(self) -> None:
        self.size_bytes = 0
        self._pieces: list[bytes | bytearray] = []

    def append(self, piece: bytes) -> None:
        self.size_bytes += len(piece)
        if len(piece) >= _SMALL_BYTES:
            self._pieces.append(piece)
        elif self._pieces and isinstance(self._pieces[-1], bytearray):
            self._pieces[-1] += piece
        else:
            self._pieces.append(bytearray(piece))

    def __bytes__(self) -> bytes:
        return b"".join(self._pieces)


class _HeadWithBody(asyncio.Transport):
    """What an answer is written to: its head goes out with the first piece of its body, where there is one to come.

    Written by itself it wakes a client who cannot use it yet; and if the process is killed before the body, a proxy
    that has passed the head on cannot ask elsewhere.

    It does not know of the cycle, which knows of it: only the collector would undo that, and the body of the request
    would stay until it comes.
    """

    def __init__(self, connection: asyncio.Transport) -> None:
        super().__init__()
        self._connection = connection
        self._head: bytes | None = None

    def write(self, data: bytes) -> None:  # type: ignore[override]
        if self._head is None:
            if data.startswith(_GO_ON):
                self._connection.write(data)
            else:
                self._head = data
        elif self._head:
            self._connection.write(self._head + data)
            self._head = b""
        else:
            self._connection.write(data)

    def close(self) -> None:
        self._connection.close()

    def is_closing(self) -> bool:
        return self._connection.is_closing()


def _rendered(error: UserError, request_id: str, keep_alive: bool) -> bytes:
    """The answer to an error, but for what comes first: the status and the headers that all answers have."""
    response = problem_response(error, request_id)
    headers = with_common_headers(response.raw_headers, request_id)
    if not keep_alive and "connection" not in response.headers:
        headers.append((b"connection", b"close"))
    lines = b"".join(name + b": " + value + b"\r\n" for name, value in headers)
    return lines + b"\r\n" + bytes(response.body)


@lru_cache(maxsize=128)
def _refusal_around_id(detail: str, retry_after_s: float, keep_alive: bool) -> list[bytes]:
    """What `_rendered` gives for a refusal, cut where its id stands, which is as long as `_ANY_ID`."""
    return _rendered(TooManyRequests(detail, retry_after_s=retry_after_s), _ANY_ID, keep_alive).split(_ANY_ID.encode())

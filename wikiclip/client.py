"""Clients of a running service that retry: a blocking one and one for asyncio."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any, Generic, Self, TypeVar

import httpx
from pydantic import ValidationError

from wikiclip import errors
from wikiclip.errors import ServiceError, TooManyRequests, Unavailable, UserError, WikiclipError
from wikiclip.operations import REQUEST_ID_HEADER, Operations, Request

_ERRORS: dict[int, type[WikiclipError]] = {
    kind.status: kind
    for kind in vars(errors).values()
    if isinstance(kind, type)
    and issubclass(kind, WikiclipError)
    and kind not in (WikiclipError, UserError, ServiceError)
}
_FAILURES = (httpx.RequestError, httpx.InvalidURL)
_FIRST_PAUSE_S = 0.2
_MAX_PAUSE_S = 60.0

Http = TypeVar("Http", httpx.Client, httpx.AsyncClient)
T = TypeVar("T")


class _Base(Operations, Generic[Http]):
    _kind: type[Http]

    def __init__(
        self,
        base_url: str,
        *,
        timeout_s: float = 30.0,
        retries: int = 5,
        api_key: str | None = None,
        admin_token: str | None = None,
    ) -> None:
        self._base_url, self._retries = base_url, retries
        self._headers, self._admin_headers = _authorization(api_key), _authorization(admin_token)
        try:
            self._http: Http = self._kind(base_url=base_url, timeout=timeout_s)
        except (httpx.InvalidURL, ValueError) as error:
            raise UserError(f"{base_url!r} is not a URL ({error}); give one like http://127.0.0.1:8000") from error

    def _arguments(self, request: Request[Any]) -> dict[str, Any]:
        headers = {**(self._admin_headers if request.admin else self._headers), **request.content.get("headers", {})}
        return {"method": request.method, "url": request.url, **request.content, "headers": headers}

    def _judge(self, request: Request[T], outcome: httpx.Response | Exception, attempt: int) -> T | float:
        """Return the answer, or the seconds to wait before the next attempt. Raises a final failure."""
        last = attempt >= self._retries
        pause_s: float = min(_FIRST_PAUSE_S * 2 ** min(attempt, 10), _MAX_PAUSE_S) * random.uniform(0.8, 1.2)
        if isinstance(outcome, Exception):
            if last or not isinstance(outcome, request.retries.failures):
                reason = str(outcome) or type(outcome).__name__
                raise Unavailable(
                    f"{self._base_url} cannot be reached ({reason}); is the service running?"
                ) from outcome
            return pause_s
        if outcome.is_success:
            try:
                return request.read(outcome)
            except ValidationError as error:
                reason = f"{self._base_url} does not answer as a WikiCLIP service does; check the URL"
                raise UserError(reason) from error
        if last or outcome.status_code not in request.retries.statuses:
            raise _error_of(outcome)
        return _retry_after_s(outcome) or pause_s


class Client(_Base[httpx.Client]):
    """A client of the service at `base_url`. Thread-safe. Close it when done, or use `with`.

    An image is `bytes`, a path, a file open for reading, or a URL that the service fetches. A request that was refused
    or lost (429, 502, 503, 504, connection broken) is sent again up to `retries` times. Before that, the client waits
    for as long as `Retry-After` says, otherwise 0.2 s, doubling each time. `api_key` and `admin_token` are those of
    the service's settings.
    """

    _kind = httpx.Client

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def _send(self, request: Request[T]) -> T:
        arguments, attempt = self._arguments(request), 0
        while True:
            try:
                outcome: httpx.Response | Exception = self._http.request(**arguments)
            except _FAILURES as error:
                outcome = error
            result = self._judge(request, outcome, attempt)
            if not isinstance(result, float):
                return result
            attempt += 1
            time.sleep(result)


class AsyncClient(_Base[httpx.AsyncClient]):
    """`Client` for asyncio: await its methods. Use `async with`, or `await close()`."""

    _kind = httpx.AsyncClient

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def _send(self, request: Request[T]) -> T:
        arguments, attempt = self._arguments(request), 0
        while True:
            try:
                outcome: httpx.Response | Exception = await self._http.request(**arguments)
            except _FAILURES as error:
                outcome = error
            result = self._judge(request, outcome, attempt)
            if not isinstance(result, float):
                return result
            attempt += 1
            await asyncio.sleep(result)


def _authorization(token: str | None) -> dict[bytes, bytes]:
    return {} if token is None else {b"Authorization": f"Bearer {token}".encode()}


def _retry_after_s(response: httpx.Response) -> float | None:
    value = response.headers.get("retry-after", "")
    return min(float(value), _MAX_PAUSE_S) if value.isdecimal() else None


def _error_of(response: httpx.Response) -> WikiclipError:
    status, request_id = response.status_code, response.headers.get(REQUEST_ID_HEADER, "")
    try:
        detail = str(response.json()["detail"])
    except (ValueError, KeyError, TypeError, RecursionError):
        detail = f"the service answered {status} without a reason; is this a WikiCLIP service?"
    if status >= 500 and request_id:
        detail += f" (request_id {request_id})"
    error: WikiclipError
    if status == TooManyRequests.status:
        error = TooManyRequests(detail, retry_after_s=_retry_after_s(response) or 1.0)
    else:
        error = _ERRORS.get(status, ServiceError if status >= 500 else UserError)(detail)
    error.status, error.request_id = status, request_id
    return error

"""Clients of a running service that retry: a blocking one and one for asyncio."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any, Generic, Self, TypeVar

import httpx
from pydantic import ValidationError

from wikiclip import errors
from wikiclip.answers import Info, Recognition, RecognizeOptions
from wikiclip.errors import TooManyRequests, Unavailable, UserError

_ERRORS: dict[int, type[UserError]] = {
    kind.status: kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, UserError) and kind is not UserError
}
_RETRIED_STATUSES = (429, 503)
_FAILURES = (httpx.TransportError, httpx.InvalidURL)
_RETRIED_FAILURES = (httpx.NetworkError, httpx.RemoteProtocolError)  # requests have no side effects: retrying is safe
_FIRST_PAUSE_S = 0.2
_MAX_PAUSE_S = 60.0

Http = TypeVar("Http", httpx.Client, httpx.AsyncClient)
Content = TypeVar("Content", Recognition, Info)


class _Base(Generic[Http]):
    _kind: type[Http]

    def __init__(self, base_url: str, *, timeout_s: float = 30.0, retries: int = 5, api_key: str | None = None) -> None:
        headers = {} if api_key is None else {b"Authorization": f"Bearer {api_key}".encode()}
        try:
            self._http: Http = self._kind(base_url=base_url, timeout=timeout_s, headers=headers)
        except (httpx.InvalidURL, ValueError) as error:
            raise UserError(f"{base_url!r} is not a URL ({error}); give one like http://127.0.0.1:8000") from error
        self._base_url, self._retries = base_url, retries

    def _judge(self, kind: type[Content], outcome: httpx.Response | Exception, attempt: int) -> Content | float:
        """Return the answer, or the seconds to wait before the next attempt. Raises a final failure."""
        last = attempt >= self._retries
        pause_s: float = min(_FIRST_PAUSE_S * 2 ** min(attempt, 10), _MAX_PAUSE_S) * random.uniform(0.8, 1.2)
        if isinstance(outcome, Exception):
            if last or not isinstance(outcome, _RETRIED_FAILURES):
                reason = f"{self._base_url} cannot be reached ({outcome}); is the service running?"
                raise Unavailable(reason) from outcome
            return pause_s
        if outcome.is_success:
            try:
                return kind.model_validate_json(outcome.content)
            except ValidationError as error:
                reason = f"{self._base_url} does not answer as a WikiCLIP service does; check the URL"
                raise UserError(reason) from error
        if last or outcome.status_code not in _RETRIED_STATUSES:
            raise _error_of(outcome)
        return _retry_after_s(outcome) or pause_s


class Client(_Base[httpx.Client]):
    """A client of the service at `base_url`. Thread-safe. Close it when done, or use `with`.

    Retries up to `retries` times when the service is full or not ready (429, 503) and when a connection fails or breaks
    off. It waits for as long as `Retry-After` says, otherwise 0.2 s, doubling each time.
    """

    _kind = httpx.Client

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def recognize(self, image: bytes, options: RecognizeOptions | None = None) -> Recognition:
        """Recognise one image.

        Raises the `UserError` with the status of the answer, `Unavailable` if the service cannot be reached.
        """
        return self._request(Recognition, **_recognize_request(image, options))

    def info(self) -> Info:
        """Return what is served, and its limits: `GET /info`."""
        return self._request(Info, method="GET", url="/info")

    def _request(self, kind: type[Content], **request: Any) -> Content:
        attempt = 0
        while True:
            try:
                outcome: httpx.Response | Exception = self._http.request(**request)
            except _FAILURES as error:
                outcome = error
            result = self._judge(kind, outcome, attempt)
            if not isinstance(result, float):
                return result
            attempt += 1
            time.sleep(result)


class AsyncClient(_Base[httpx.AsyncClient]):
    """`Client` for asyncio. Use `async with`, or `await close()`."""

    _kind = httpx.AsyncClient

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def recognize(self, image: bytes, options: RecognizeOptions | None = None) -> Recognition:
        """Recognise one image, as `Client.recognize` does."""
        return await self._request(Recognition, **_recognize_request(image, options))

    async def info(self) -> Info:
        """Return what is served, as `Client.info` does."""
        return await self._request(Info, method="GET", url="/info")

    async def _request(self, kind: type[Content], **request: Any) -> Content:
        attempt = 0
        while True:
            try:
                outcome: httpx.Response | Exception = await self._http.request(**request)
            except _FAILURES as error:
                outcome = error
            result = self._judge(kind, outcome, attempt)
            if not isinstance(result, float):
                return result
            attempt += 1
            await asyncio.sleep(result)


def _recognize_request(image: bytes, options: RecognizeOptions | None) -> dict[str, Any]:
    parameters: dict[str, Any] = {} if options is None else options.model_dump(exclude_defaults=True)
    if "box" in parameters:
        parameters["box"] = ",".join(str(side) for side in parameters["box"])
    return {
        "method": "POST",
        "url": "/recognize",
        "params": parameters,
        "files": {"image": ("image", image, "application/octet-stream")},
    }


def _retry_after_s(response: httpx.Response) -> float | None:
    value = response.headers.get("retry-after", "")
    return min(float(value), _MAX_PAUSE_S) if value.isdecimal() else None


def _error_of(response: httpx.Response) -> UserError:
    try:
        detail = str(response.json()["detail"])
    except (ValueError, KeyError, TypeError, RecursionError):
        detail = f"the service answered {response.status_code} without a reason; is this a WikiCLIP service?"
    if response.status_code == TooManyRequests.status:
        return TooManyRequests(detail, retry_after_s=_retry_after_s(response) or 1.0)
    return _ERRORS.get(response.status_code, UserError)(detail)

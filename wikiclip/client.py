"""Clients of a running service that retry: a blocking one and one for asyncio."""

from __future__ import annotations

import asyncio
import random
import time
from types import TracebackType
from typing import Any, Self, TypeVar

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


class Client:
    """A client of the service at `base_url`. Thread-safe. Close it when done, or use `with`.

    Retries up to `retries` times when the service is full or not ready (429, 503) and when a connection fails or breaks
    off. It waits for as long as `Retry-After` says, otherwise 0.2 s, doubling each time.
    """

    def __init__(self, base_url: str, *, timeout_s: float = 30.0, retries: int = 5, api_key: str | None = None) -> None:
        self._base_url, self._retries = base_url, retries
        self._http = _open(httpx.Client, base_url, timeout_s, api_key)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def recognize(self, image: bytes, options: RecognizeOptions | None = None) -> Recognition:
        """Recognise one image.

        Raises the `UserError` with the status of the answer, `Unavailable` if the service cannot be reached.
        """
        return _parse(Recognition, self._base_url, self._request(**_recognize_request(image, options)))

    def info(self) -> Info:
        """Return what is served, and its limits: `GET /info`."""
        return _parse(Info, self._base_url, self._request(method="GET", url="/info"))

    def _request(self, **request: Any) -> httpx.Response:
        retrying = _Retrying(self._base_url, self._retries)
        while True:
            try:
                outcome: httpx.Response | Exception = self._http.request(**request)
            except _FAILURES as error:
                outcome = error
            response = retrying.check(outcome)
            if response is not None:
                return response
            time.sleep(retrying.pause_s)


class AsyncClient:
    """`Client` for asyncio. Use `async with`, or `await close()`."""

    def __init__(self, base_url: str, *, timeout_s: float = 30.0, retries: int = 5, api_key: str | None = None) -> None:
        self._base_url, self._retries = base_url, retries
        self._http = _open(httpx.AsyncClient, base_url, timeout_s, api_key)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def recognize(self, image: bytes, options: RecognizeOptions | None = None) -> Recognition:
        """Recognise one image, as `Client.recognize` does."""
        return _parse(Recognition, self._base_url, await self._request(**_recognize_request(image, options)))

    async def info(self) -> Info:
        """Return what is served, as `Client.info` does."""
        return _parse(Info, self._base_url, await self._request(method="GET", url="/info"))

    async def _request(self, **request: Any) -> httpx.Response:
        retrying = _Retrying(self._base_url, self._retries)
        while True:
            try:
                outcome: httpx.Response | Exception = await self._http.request(**request)
            except _FAILURES as error:
                outcome = error
            response = retrying.check(outcome)
            if response is not None:
                return response
            await asyncio.sleep(retrying.pause_s)


class _Retrying:
    """Decides whether to retry one request."""

    def __init__(self, base_url: str, retries: int) -> None:
        self._base_url = base_url
        self._left = retries
        self._next_pause_s = _FIRST_PAUSE_S
        self.pause_s = 0.0

    def check(self, outcome: httpx.Response | Exception) -> httpx.Response | None:
        """Return the response of a successful attempt, or None to retry after `pause_s`. Raises a final failure."""
        self._left -= 1
        self.pause_s = self._next_pause_s * random.uniform(0.8, 1.2)
        self._next_pause_s = min(2 * self._next_pause_s, _MAX_PAUSE_S)
        if isinstance(outcome, Exception):
            if self._left < 0 or not isinstance(outcome, _RETRIED_FAILURES):
                raise Unavailable(
                    f"{self._base_url} cannot be reached ({outcome}); is the service running?"
                ) from outcome
            return None
        if outcome.is_success:
            return outcome
        if self._left < 0 or outcome.status_code not in _RETRIED_STATUSES:
            raise _error_of(outcome)
        self.pause_s = _retry_after_s(outcome) or self.pause_s
        return None


def _open(kind: type[Http], base_url: str, timeout_s: float, api_key: str | None) -> Http:
    headers = {} if api_key is None else {b"Authorization": f"Bearer {api_key}".encode()}
    try:
        return kind(base_url=base_url, timeout=timeout_s, headers=headers)
    except (httpx.InvalidURL, ValueError) as error:
        raise UserError(f"{base_url!r} is not a URL ({error}); give one like http://127.0.0.1:8000") from error


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


def _parse(kind: type[Content], base_url: str, response: httpx.Response) -> Content:
    try:
        return kind.model_validate_json(response.content)
    except ValidationError as error:
        raise UserError(f"{base_url} does not answer as a WikiCLIP service does; check the URL") from error


def _retry_after_s(response: httpx.Response) -> float | None:
    value = response.headers.get("retry-after", "")
    return min(float(value), _MAX_PAUSE_S) if value.isdigit() else None


def _error_of(response: httpx.Response) -> UserError:
    try:
        detail = str(response.json()["detail"])
    except (ValueError, KeyError, TypeError):
        detail = f"the service answered {response.status_code} without a reason; is this a WikiCLIP service?"
    if response.status_code == TooManyRequests.status:
        return TooManyRequests(detail, retry_after_s=_retry_after_s(response) or 1.0)
    return _ERRORS.get(response.status_code, UserError)(detail)

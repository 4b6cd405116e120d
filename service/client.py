"""A small typed client of the service, with retries: one that blocks, and one for an event loop."""

from __future__ import annotations

import asyncio
import random
import time
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx

from core.errors import (
    BadRequest,
    DeadlineExceeded,
    Forbidden,
    NotFound,
    TooLarge,
    TooManyRequests,
    Unauthorized,
    Unavailable,
    Unprocessable,
    UnsupportedMediaType,
    UserError,
)
from service.answers import AttendedWord, Explanation, Prediction, Recognition, RecognizeOptions

_ERRORS: dict[int, type[UserError]] = {
    kind.status: kind
    for kind in (
        BadRequest,
        Unauthorized,
        Forbidden,
        NotFound,
        TooLarge,
        UnsupportedMediaType,
        Unprocessable,
        Unavailable,
        DeadlineExceeded,
    )
}
_RETRIED_STATUSES = (429, 503)
_FAILURES = (httpx.TransportError, httpx.InvalidURL)
# Nobody there, or gone before the answer was whole: asking changes nothing, so it may be asked again.
_RETRIED_FAILURES = (httpx.NetworkError, httpx.RemoteProtocolError)
_FIRST_PAUSE_S = 0.2
_MAX_PAUSE_S = 60.0

Http = TypeVar("Http", httpx.Client, httpx.AsyncClient)


class Client:
    """Asks a service at `base_url`. Safe for several threads. Close it when done, or use `with`.

    A refusal for want of room (429, 503) and a connection that fails or breaks off, even within an answer, are tried
    again up to `retries` times, after the time that `Retry-After` tells or else after 0.2 s, doubling each time.
    `api_key` is for a service that wants one.
    """

    def __init__(self, base_url: str, *, timeout_s: float = 30.0, retries: int = 5, api_key: str | None = None) -> None:
        self._base_url, self._retries = base_url, retries
        self._http = _opened(httpx.Client, base_url, timeout_s, api_key)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def recognize(self, image: bytes, options: RecognizeOptions | None = None) -> Recognition:
        """Recognise one image.

        Raises the `UserError` that the service's problem stands for, `Unavailable` if it cannot be reached.
        """
        return _recognition(self._base_url, self._ask(**_question(image, options)))

    def info(self) -> dict[str, Any]:
        """What is served: `GET /info`."""
        content: dict[str, Any] = self._ask(method="GET", url="/info").json()
        return content

    def _ask(self, **request: Any) -> httpx.Response:
        attempts = _Attempts(self._base_url, self._retries)
        while True:
            try:
                outcome: httpx.Response | Exception = self._http.request(**request)
            except _FAILURES as error:
                outcome = error
            answer = attempts.answer(outcome)
            if answer is not None:
                return answer
            time.sleep(attempts.pause_s)


class AsyncClient:
    """`Client` for an event loop: the same questions, to be awaited. Use `async with`, or `await close()`."""

    def __init__(self, base_url: str, *, timeout_s: float = 30.0, retries: int = 5, api_key: str | None = None) -> None:
        self._base_url, self._retries = base_url, retries
        self._http = _opened(httpx.AsyncClient, base_url, timeout_s, api_key)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def recognize(self, image: bytes, options: RecognizeOptions | None = None) -> Recognition:
        """As `Client.recognize`."""
        return _recognition(self._base_url, await self._ask(**_question(image, options)))

    async def info(self) -> dict[str, Any]:
        """As `Client.info`."""
        content: dict[str, Any] = (await self._ask(method="GET", url="/info")).json()
        return content

    async def _ask(self, **request: Any) -> httpx.Response:
        attempts = _Attempts(self._base_url, self._retries)
        while True:
            try:
                outcome: httpx.Response | Exception = await self._http.request(**request)
            except _FAILURES as error:
                outcome = error
            answer = attempts.answer(outcome)
            if answer is not None:
                return answer
            await asyncio.sleep(attempts.pause_s)


class _Attempts:
    """What to make of each attempt at a question, whoever waits for it and however."""

    def __init__(self, base_url: str, retries: int) -> None:
        self._base_url = base_url
        self._left = retries
        self._next_pause_s = _FIRST_PAUSE_S
        self.pause_s = 0.0

    def answer(self, outcome: httpx.Response | Exception) -> httpx.Response | None:
        """The answer, or None where to ask again after `pause_s`. Raises what is final."""
        self._left -= 1
        self.pause_s = self._next_pause_s * random.uniform(0.8, 1.2)
        self._next_pause_s = min(2 * self._next_pause_s, _MAX_PAUSE_S)
        if isinstance(outcome, Exception):
            if self._left < 0 or not isinstance(outcome, _RETRIED_FAILURES):
                raise Unavailable(f"{self._base_url} cannot be asked ({outcome}); is the service running?") from outcome
            return None
        if outcome.is_success:
            return outcome
        if self._left < 0 or outcome.status_code not in _RETRIED_STATUSES:
            raise _error_of(outcome)
        self.pause_s = _retry_after_s(outcome) or self.pause_s
        return None


def _opened(kind: type[Http], base_url: str, timeout_s: float, api_key: str | None) -> Http:
    headers = {} if api_key is None else {b"Authorization": f"Bearer {api_key}".encode()}
    try:
        return kind(base_url=base_url, timeout=timeout_s, headers=headers)
    except (httpx.InvalidURL, ValueError) as error:
        raise UserError(f"{base_url!r} is no URL ({error}); give one as http://127.0.0.1:8000") from error


def _question(image: bytes, options: RecognizeOptions | None) -> dict[str, Any]:
    return {
        "method": "POST",
        "url": "/recognize",
        "params": _parameters(options or RecognizeOptions()),
        "files": {"image": ("image", image, "application/octet-stream")},
    }


def _recognition(base_url: str, answer: httpx.Response) -> Recognition:
    content: dict[str, Any] = answer.json()
    try:
        return Recognition(
            model=content["model"],
            bundle=content["bundle"],
            cached=content["cached"],
            known=content["known"],
            abstained=content["abstained"],
            predictions=tuple(_prediction(each) for each in content["predictions"]),
            timings_ms=content["timings_ms"],
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"{base_url} does not answer as a WikiCLIP service does; check the URL") from error


def _parameters(options: RecognizeOptions) -> list[tuple[str, str | int | float]]:
    parameters: list[tuple[str, str | int | float]] = [("top_k", options.top_k)]
    parameters += [("types", kind) for kind in options.types]
    if options.min_score is not None:
        parameters.append(("min_score", options.min_score))
    if options.lang is not None:
        parameters.append(("lang", options.lang))
    if options.box is not None:
        parameters.append(("box", ",".join(str(side) for side in options.box)))
    if options.explain:
        parameters.append(("explain", "true"))
    return parameters


def _prediction(content: dict[str, Any]) -> Prediction:
    fields = {name: content[name] for name in Prediction.__dataclass_fields__}
    why = fields["explanation"]
    if why is not None:
        rows, words = why["heat_map"], why["words"]
        why = Explanation(
            heat_map=None if rows is None else tuple(tuple(row) for row in rows),
            region=tuple(why["region"]),
            words=None if words is None else tuple(AttendedWord(**word) for word in words),
        )
    return Prediction(**{**fields, "types": tuple(fields["types"]), "explanation": why})


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

"""A small typed client of the service, with retries."""

from __future__ import annotations

import random
import time
from types import TracebackType
from typing import Any, Self

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
from service.answers import Explanation, HeardWord, Prediction, Recognition, RecognizeOptions

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
_MAX_PAUSE_S = 60.0


class Client:
    """Asks a service at `base_url`. Safe for several threads. Close it when done, or use `with`.

    A refusal for want of room (429, 503) and a failed connection are tried again up to `retries` times, after the time
    that `Retry-After` tells or else after 0.2 s, doubling each time. `api_key` is for a service that wants one.
    """

    def __init__(self, base_url: str, *, timeout_s: float = 30.0, retries: int = 5, api_key: str | None = None) -> None:
        self._base_url = base_url
        self._retries = retries
        headers = {} if api_key is None else {b"Authorization": f"Bearer {api_key}".encode()}
        try:
            self._http = httpx.Client(base_url=base_url, timeout=timeout_s, headers=headers)
        except (httpx.InvalidURL, ValueError) as error:
            raise UserError(f"{base_url!r} is no URL ({error}); give one as http://127.0.0.1:8000") from error

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
        files = {"image": ("image", image, "application/octet-stream")}
        answer = self._ask("POST", "/recognize", params=_parameters(options or RecognizeOptions()), files=files)
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
            raise UserError(f"{self._base_url} does not answer as a WikiCLIP service does; check the URL") from error

    def info(self) -> dict[str, Any]:
        """What is served: `GET /info`."""
        content: dict[str, Any] = self._ask("GET", "/info").json()
        return content

    def _ask(self, method: str, path: str, **request: Any) -> httpx.Response:
        for attempt in range(self._retries + 1):
            pause_s = min(0.2 * 2**attempt, _MAX_PAUSE_S) * random.uniform(0.8, 1.2)
            last = attempt == self._retries
            try:
                response = self._http.request(method, path, **request)
            except (httpx.TransportError, httpx.InvalidURL) as error:
                if last or not isinstance(error, httpx.ConnectError):
                    raise Unavailable(f"{self._base_url} cannot be asked ({error}); is the service running?") from error
            else:
                if response.is_success:
                    return response
                if last or response.status_code not in _RETRIED_STATUSES:
                    raise _error_of(response)
                pause_s = _retry_after_s(response) or pause_s
            time.sleep(pause_s)
        raise AssertionError("the last attempt returns or raises")


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
            words=None if words is None else tuple(HeardWord(**word) for word in words),
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

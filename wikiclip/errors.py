"""Errors that a request can end in. `except wikiclip.TooManyRequests` catches it from a client and from a recogniser.

`UserError` is the base of those whose message says what is wrong and what to do. `core.errors` shows the whole tree.
"""

from __future__ import annotations


class WikiclipError(Exception):
    """Base of all errors raised on purpose. `status` is the HTTP status, `title` the RFC 9457 title."""

    status: int = 500
    exit_code: int = 1
    title: str = "Internal error"

    @property
    def detail(self) -> str:
        return str(self)


class UserError(WikiclipError):
    status = 400
    exit_code = 2
    title = "Bad request"


class BadRequest(UserError):
    pass


class Unauthorized(UserError):
    status = 401
    title = "Unauthorized"


class Forbidden(UserError):
    status = 403
    title = "Forbidden"


class NotFound(UserError):
    status = 404
    title = "Not found"


class SlowRequest(UserError):
    status = 408
    title = "Request too slow"


class Conflict(UserError):
    status = 409
    title = "Conflict"


class TooLarge(UserError):
    status = 413
    title = "Image too large"


class UnsupportedMediaType(UserError):
    status = 415
    title = "Unsupported media type"


class Unprocessable(UserError):
    status = 422
    title = "Unprocessable content"


class TooManyRequests(UserError):
    status = 429
    title = "Too many requests"

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Unavailable(UserError):
    status = 503
    title = "Not ready"


class DeadlineExceeded(UserError):
    status = 504
    title = "Deadline exceeded"
